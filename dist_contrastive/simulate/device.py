"""A CUDA device that has shapes and no numbers, on a machine that need not have one.

Tensors on the device are torch's fake tensors: operations give the right shapes, types and layouts, and compute nothing.
Tensors on the host are real. So the host's part of a step (what is drawn, what is decided) runs as it is. Whatever is read
back from the device is zero.

What it can't see: workspaces of cuDNN and NCCL, the context, the allocator's rounding and fragmentation, compiled code (it runs
what would be compiled).
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import FakeStore
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from dist_contrastive import distributed, rendezvous
from dist_contrastive.simulate.autograd import python_engine
from dist_contrastive.simulate.patches import attribute, patched

aten = torch.ops.aten
RANKS_OF_A_HOST = 8

_pinned = WeakIdKeyDictionary()
"""Memory of the host that the device may read by itself."""


class _HostIsReal(TorchDispatchMode):
    """Calls without a tensor on the device are computed; the others go on to torch's fake mode, which is below this one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet, to = func.overloadpacket, kwargs.get("device")
        to_host = to is not None and torch.device(to).type == "cpu"
        if not any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs))):
            if to is None or to_host:
                return _really(func, *args, **kwargs)
            if packet is aten._to_copy:
                layout = kwargs.get("memory_format") or torch.preserve_format
                return torch.empty_like(args[0], dtype=kwargs.get("dtype"), device=to, memory_format=layout)
        elif packet is aten._to_copy and to_host:
            return _really(torch.zeros, args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        elif packet is aten.copy_ and not isinstance(args[0], FakeTensor):
            return _really(torch.zero_, args[0])
        elif packet is aten._local_scalar_dense:
            return 0.0 if args[0].is_floating_point() else 0 if args[0].dtype != torch.bool else False
        elif packet is aten.is_nonzero:
            return False
        elif packet is aten.equal:
            return args[0].shape == args[1].shape
        elif packet is aten.nonzero:
            return args[0].new_empty((0, args[0].ndim), dtype=torch.int64)
        elif packet is aten.masked_select:
            return args[0].new_empty(0)
        elif packet in (aten.index_put_, aten._index_put_impl_):
            return args[0]  # also by a mask, whose number of elements is not known
        elif packet is aten.index:
            return func(args[0], [part for index in args[1] for part in _positions(index)])
        return func(*args, **kwargs)


def _really(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with attribute(fake_tensor, "unset_fake_temporarily")():
        return call(*args, **kwargs)


def _positions(index: Tensor | None) -> list[Tensor | None]:
    """An index as it is; a mask, which is all zero, as the positions at which it is not."""
    if index is None or index.dtype not in (torch.bool, torch.uint8):
        return [index]
    return [torch.empty(0, dtype=torch.int64, device="cuda")] * index.ndim


def device_type(tensor: Tensor) -> str:
    """`tensor.device.type`, without the dispatch that this takes on a fake tensor."""
    return tensor.fake_device.type if isinstance(tensor, FakeTensor) else tensor.device.type


def is_ready_to_copy(tensor: Tensor) -> bool:
    """Whether the device can read a host's tensor by itself, in one piece, while the host goes on."""
    return tensor.untyped_storage() in _pinned and bool(aten.is_non_overlapping_and_dense(tensor))


def pin(tensor: Tensor) -> Tensor:
    """A copy of a host's tensor in memory that the device may read by itself."""
    copy = tensor.clone()
    _pinned[copy.untyped_storage()] = None
    return copy


def _move_module(module: nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`Module._apply`, whose parameters stay the same objects, as optimizers hold them, while they become fake tensors."""
    for child in module.children() if recurse else ():
        child._apply(convert)
    for parameter in module._parameters.values():
        if parameter is None:
            continue
        with torch.no_grad():
            converted = convert(parameter)
        if converted is not parameter:
            other = nn.Parameter(converted, parameter.requires_grad)
            parameter.__class__, other.__class__ = other.__class__, parameter.__class__
            parameter.__dict__, other.__dict__ = other.__dict__, parameter.__dict__
            attribute(torch._C, "_swap_tensor_impl")(parameter, other)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = convert(buffer)
    return module


def _talk_to_nobody(new_group: Callable[..., Any], backend: str, timeout: timedelta) -> Any:
    return new_group(backend="fake", timeout=timeout)


@contextmanager
def _rank_of(ranks: int) -> Iterator[None]:
    """Rank 0 of `ranks`, as a launcher would have started it: environment and process group; at one rank, none."""
    local = min(ranks, RANKS_OF_A_HOST)
    names = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": local}
    # What a launcher of this process has said is of another run.
    others = ("ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT")
    before = {name: os.environ.pop(name, None) for name in (*names, *others)}
    if ranks > 1:
        os.environ.update({name: str(value) for name, value in names.items()})
        dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        if ranks > 1:
            distributed.shut_down()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


class _Event:
    """A mark in the device's work."""

    def __init__(self, on_sync: Callable[[str], None]) -> None:
        self._on_sync = on_sync

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        self._on_sync("event")


@contextmanager
def fake_cuda(ranks: int, on_sync: Callable[[str], None]) -> Iterator[None]:
    """Within the context this process is rank 0 of `ranks`, and its device is CUDA. All that it patches is the whole process's.

    `on_sync` is told of waits for the device that are no operation on tensors.
    """

    def read(tensor: Tensor) -> Any:
        on_sync("tolist")
        return _really(torch.zeros, tensor.shape, dtype=tensor.dtype).tolist()

    patches: list[tuple[Any, str, Any]] = [
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device_count", lambda: min(ranks, RANKS_OF_A_HOST)),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "set_device", lambda device: None),
        (torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True),
        (torch.cuda, "is_current_stream_capturing", lambda: False),
        (torch.cuda, "get_device_capability", lambda *args: (8, 0)),
        (torch.cuda, "Event", lambda: _Event(on_sync)),
        (torch.cuda, "synchronize", lambda *args: on_sync("synchronize")),
        (dist, "get_backend", lambda group=None: "nccl"),
        (dist, "new_group", partial(_talk_to_nobody, attribute(dist, "new_group"))),
        (rendezvous, "join", lambda *args, **kwargs: None),  # nobody else is there to answer
        (Tensor, "pin_memory", lambda tensor, *args: pin(tensor)),
        (FakeTensor, "tolist", read),
        (FakeTensorMode, "avoid_device_init", True),
        (nn.Module, "_apply", _move_module),
    ]
    with ExitStack() as stack:
        stack.enter_context(_rank_of(ranks))
        for owner, name, value in patches:
            stack.enter_context(patched(owner, name, value))
        stack.enter_context(python_engine())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_HostIsReal())
        yield


# Some kernels have no shapes for fake tensors. What BatchNorm's for sums over several ranks give: two or four [C], or one like x;
# what SGD's gives: nothing.
_library = torch.library.Library("aten", "IMPL", "Meta")  # what is registered goes with it


def _of_channels(x: Tensor, count: int) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32)) for _ in range(count))


for _name in ("batch_norm_stats", "batch_norm_update_stats"):
    _library.impl(_name, lambda x, *args: _of_channels(x, 2))
_library.impl("batch_norm_backward_reduce", lambda dy, x, *args: _of_channels(x, 4))
_library.impl("_fused_sgd_", lambda *args, **kwargs: None)
_library.impl("batch_norm_elemt", lambda x, *args: torch.empty_like(x))
_library.impl("batch_norm_backward_elemt", lambda dy, x, *args: torch.empty_like(x))
