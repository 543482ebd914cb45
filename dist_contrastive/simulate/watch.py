"""Watches what is done with tensors: operations, collectives, waits of the host for a GPU, tensors on the wrong device.

It sees what torch dispatches, and so works on real ranks as well as on a simulated one.
"""

import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

import dist_contrastive
from dist_contrastive import distributed
from dist_contrastive.simulate.device import device_type, is_ready_to_copy
from dist_contrastive.simulate.findings import Collective, HostSync, Operation, Place, WrongDevice

aten = torch.ops.aten

READS = {
    aten._local_scalar_dense: "item",
    aten.is_nonzero: "bool",
    aten.equal: "equal",
    aten.nonzero: "nonzero",
    aten.masked_select: "masked_select",
    aten._unique2: "unique",
    aten.unique_dim: "unique",
    aten.unique_consecutive: "unique_consecutive",
    aten.bincount: "bincount",
    aten.repeat_interleave: "repeat_interleave",
    aten._linalg_check_errors: "linalg",
    aten._linalg_eigh: "linalg",
    aten._linalg_svd: "linalg",
    aten._linalg_solve_ex: "linalg",
    aten.linalg_eig: "linalg",
}
"""Operations whose outcome, or whose outcome's size, the host has to know."""
COPIES = (aten._to_copy, aten.copy_, aten._foreach_copy_)
INDEXED = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
"""They take indices from the host, at the price of a copy."""

PACKAGE = Path(dist_contrastive.__file__).parent
HERE = Path(__file__).parent
SIMULATION = HERE / "rank.py"
LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


class Watch(TorchDispatchMode):
    """Counts what happens to tensors of `device_type` within the context."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self._device_type = device_type
        self.clear()

    def clear(self) -> None:
        self._operations: Counter[str] = Counter()
        self._flops: Counter[str] = Counter()
        self._collectives: Counter[tuple[str, int, bool, Place, Place | None]] = Counter()
        self._syncs: Counter[tuple[str, Place, Place | None]] = Counter()
        self._wrong: Counter[tuple[str, Place, Place | None]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # questions about tensors
            return func(*args, **kwargs)
        if func.namespace == "c10d":
            self._collective(func, args)
        elif self._device_type == "cuda":
            self._synchronizes(func, args, kwargs)
            args, kwargs = self._on_the_device(func, args, kwargs)
        output = func(*args, **kwargs)
        if func.namespace != "c10d" and any(self._is_here(x) for x in tree_leaves((args, kwargs, output))):
            name = str(func.overloadpacket)
            self._operations[name] += 1
            if func.overloadpacket in flop_registry:
                self._flops[name] += flop_registry[func.overloadpacket](*args, **kwargs, out_val=output)
        return output

    def sync(self, what: str) -> None:
        """Note that the host waits for the device."""
        self._syncs[what, *places()] += 1

    def _is_here(self, x: Any) -> bool:
        return isinstance(x, Tensor) and device_type(x) == self._device_type

    def _collective(self, func: Any, args: Any) -> None:
        tensors = [[x for x in tree_leaves(arg) if isinstance(x, Tensor)] for arg in args]
        size = max((sum(x.numel() * x.element_size() for x in group) for group in tensors), default=0)
        kind = str(func.overloadpacket).removeprefix("c10d.").strip("_")
        is_message = any(group == distributed.messages() for group in map(_process_group, args) if group)
        self._collectives[kind, size, is_message, *places()] += 1
        needed = "cpu" if is_message else self._device_type
        if any(device_type(x) != needed for group in tensors for x in group):
            self._wrong[f"{kind} of a tensor that is not on the {needed} device", *places()] += 1

    def _synchronizes(self, func: Any, args: Any, kwargs: Any) -> None:
        """Note it if a GPU would make the host wait for `func`."""
        packet = func.overloadpacket
        if packet in COPIES:
            target, source = (args[0], args[1]) if packet is not aten._to_copy else (kwargs.get("device"), args[0])
            pairs = zip(target, source, strict=True) if isinstance(target, list) else [(target, source)]
            asynchronous = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
            for to, x in pairs:
                to_device = device_type(to) if isinstance(to, Tensor) else torch.device(to or device_type(x)).type
                if self._is_here(x) and to_device == "cpu":
                    # torch pins what it makes for a copy that nobody waits for; who reads it waits for an event.
                    if not asynchronous or (isinstance(to, Tensor) and not is_ready_to_copy(to)):
                        self.sync("copy to the host")
                elif device_type(x) == "cpu" and to_device == self._device_type:
                    if not asynchronous:
                        self.sync("copy to the device, blocking")
                    elif not is_ready_to_copy(x):
                        self.sync("copy to the device, not pinned")
        elif not args or not any(self._is_here(x) for x in tree_leaves(args)):
            return
        elif packet in READS:
            self.sync(READS[packet])
        elif packet in INDEXED:
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self.sync("boolean index")
            if any(not self._is_here(index) for index in indices):
                self.sync("index on the host")

    def _on_the_device(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments as they would have to be: what is on the host and must not be is noted and moved."""
        packet = func.overloadpacket
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        # Kernels take numbers from the host: tensors without axes.
        strangers = [x for x in leaves if device_type(x) == "cpu" and x.ndim > 0]
        if packet in COPIES or packet in INDEXED or not strangers or not any(self._is_here(x) for x in leaves):
            return args, kwargs
        self._wrong[f"{packet} of tensors on cpu and {self._device_type}", *places()] += 1

        def moved(x: Any) -> Any:
            is_stranger = isinstance(x, Tensor) and device_type(x) == "cpu" and x.ndim > 0
            return torch.empty_like(x, device=self._device_type) if is_stranger else x

        return tree_map(moved, args), tree_map(moved, kwargs)

    @property
    def operations(self) -> tuple[Operation, ...]:
        """Those that cost most, first."""
        names = sorted(self._operations, key=lambda name: (-self._flops[name], -self._operations[name], name))
        return tuple(Operation(name, self._operations[name], self._flops[name]) for name in names)

    @property
    def collectives(self) -> tuple[Collective, ...]:
        """In the order of their first call."""
        return tuple(
            Collective(kind, count, size, where, caller, is_message)
            for (kind, size, is_message, where, caller), count in self._collectives.items()
        )

    @property
    def host_syncs(self) -> tuple[HostSync, ...]:
        """In the order of their first call."""
        return tuple(HostSync(what, count, where, caller) for (what, where, caller), count in self._syncs.items())

    @property
    def wrong_devices(self) -> tuple[WrongDevice, ...]:
        """In the order of their first call, each once."""
        return tuple(WrongDevice(*key) for key in self._wrong)


def _process_group(arg: Any) -> dist.ProcessGroup | None:
    """The process group that an argument of a collective is, if it is one."""
    try:
        return dist.ProcessGroup.unbox(arg) if isinstance(arg, torch.ScriptObject) else None
    except RuntimeError:  # the kind of reduction, say
        return None


def places() -> tuple[Place, Place | None]:
    """The nearest line of a project's code that led here, and the nearest in another file."""
    frames = _project_frames(sys._getframe(1))
    nearest = next(frames, None)
    assert nearest is not None, "only libraries were at work"
    caller = next((place for place in frames if place.file != nearest.file), None)
    return nearest, caller


def _project_frames(frame: FrameType | None) -> Iterator[Place]:
    """From the inside out, up to where the simulation started."""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path == SIMULATION:
            return
        if _is_ours(path):
            file = path.relative_to(PACKAGE.parent) if path.is_relative_to(PACKAGE.parent) else path
            yield Place(str(file), frame.f_lineno, frame.f_code.co_name)
        frame = frame.f_back


def _is_ours(path: Path) -> bool:
    """Whether a file is neither a library's nor the simulation's."""
    if path.is_relative_to(PACKAGE):
        return not path.is_relative_to(HERE)
    return path.is_absolute() and not any(path.is_relative_to(folder) for folder in LIBRARIES)
