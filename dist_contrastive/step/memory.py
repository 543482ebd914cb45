"""How much memory there is, and how much something takes: counted in tensors, or measured."""

import ctypes
import gc
import resource
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from dist_contrastive import distributed
from dist_contrastive.config import TrainConfig, require

USABLE = 0.9
"""Part of the free memory that a step may take: allocators and libraries need some that no tensor shows."""

RESET_PEAK = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")
CGROUP = Path("/sys/fs/cgroup")


class TensorCount(TorchDispatchMode):
    """Counts the bytes of all tensors that are made within the context, on devices of one type or, without one, on any.

    Attributes:
        live: bytes that are held now.
        peak: the most that was held at once.
    """

    def __init__(self, device_type: str | None = None) -> None:
        super().__init__()
        self._device_type = device_type
        self.live = 0
        self.peak = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):  # what comes from outside is not counted, nor are views of it
            if isinstance(tensor, Tensor):
                self._known[tensor.untyped_storage()] = None
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if not isinstance(tensor, Tensor) or tensor.untyped_storage() in self._known:
                continue
            if self._device_type in (None, tensor.device.type):
                self._count(tensor.untyped_storage())
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._known[storage] = None
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.live -= size


def usable_bytes(config: TrainConfig, device: torch.device) -> float:
    """What a step of this rank may take: USABLE of the free memory, or what `--batch.memory-gib` says.

    `UserError` where the system does not tell.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        for path in (RESET_PEAK, STATUS):
            require(
                path.exists(),
                f"--batch.micro auto: this system does not tell how much memory a process takes (no {path}); give "
                "--batch.micro N",
            )
        free = _free_host_memory() // distributed.local_ranks()
    if config.batch.memory_gib:
        return min(float(free), config.batch.memory_gib * 2**30)
    return USABLE * free


def _free_host_memory() -> int:
    """Bytes that this host's ranks may still take: of the machine, of the container, of the process's limit."""
    free = psutil.virtual_memory().available
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int((CGROUP / "memory.current").read_text()))
    except OSError:  # no cgroup of its own, or an older kind, whose limit psutil does not show either
        pass
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        free = min(free, (soft - psutil.Process().memory_info().vms) * distributed.local_ranks())
    return max(0, free)


def measure_peak(call: Callable[[], None], device: torch.device) -> float:
    """Bytes by which `call()` raises this process's memory at its worst moment: allocated on a GPU, resident on the CPU."""
    release_memory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return float(torch.cuda.max_memory_allocated(device) - before)
    RESET_PEAK.write_text("5")  # the peak of resident memory starts again from what is resident now (proc(5))
    before = _status_bytes("VmRSS")
    call()
    return float(max(0, _status_bytes("VmHWM") - before))


def _status_bytes(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def release_memory(device: torch.device) -> None:
    """Give freed memory back, of a failed attempt, say."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc keeps what was freed
        libc.malloc_trim(0)
