"""The log-sum-exp of inner products by kernels that store none of them, and the choice between these and blocks."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

try:
    import triton

    from dist_contrastive.losses import kernels
except ImportError:  # it comes with torch's CUDA builds
    triton = None

Excluded = Literal["none", "itself", "sample"]
"""What an anchor is not compared with: nothing, its own row of the others, all rows of its own sample on its rank."""


@dataclass(frozen=True)
class Tiles:
    """How many anchors and others a program has on the chip at once, and its warps."""

    anchors: int
    others: int
    warps: int


TILES = {
    128: (Tiles(128, 64, 8), Tiles(64, 64, 4), Tiles(64, 32, 4)),
    256: (Tiles(64, 64, 4), Tiles(32, 32, 4)),
}
"""By the largest embedding that they are for: what compiles, for sm_80 or sm_90, to (almost) no spilt register. The last needs
less than 96 KiB of shared memory, which all have. Which is fastest is measured on the device."""
STAGES = 2
LEAST_CAPABILITY = (8, 0)
"""For sm_75 Triton's products use no tensor cores, spill 8 KB of registers and more, and take up to minutes to compile."""
MIN_PAIRS = 1 << 20
"""With fewer, launching takes longer than computing, whichever way: blocks, and nothing is measured."""
PROGRAMS_A_PROCESSOR = 2
REPETITIONS = 3


def log_sum_exp(
    anchors: Float[Tensor, "n e"],
    others: Float[Tensor, "m e"],
    *,
    scale: float,
    tiles: Tiles,
    excluded: Excluded = "none",
    offset: int = 0,
    num_views: int = 1,
) -> Float[Tensor, " n"]:
    """log Σ_j exp(scale · <anchor, other j>) of each anchor, over all that it is compared with; float32, with gradient for both.

    As exact as float32 products and sums (`kernels`), whatever matrices torch multiplies in TF32; inputs of 16 bits take less
    time. Memory beside inputs, their float16 parts and gradients: less than `PROGRAMS_A_PROCESSOR` tiles of float32 embeddings
    for each processor of the device. It can be differentiated once.

    Args:
        anchors: [n, E] this rank's embeddings.
        others: [m, E] what each anchor is compared with, at least one of them.
        scale: multiplies the inner products, 1 / temperature.
        tiles: of `TILES`.
        excluded: what is not compared.
        offset: the row of `others` at which the anchors themselves start, unless nothing is excluded.
        num_views: V, where anchors are [V·B, E], view by view.
    """
    logs: Tensor = _LogSumExp.apply(anchors, others, scale, tiles, excluded, offset, len(anchors) // num_views)
    return logs


class _LogSumExp(torch.autograd.Function):
    """The anchors' gradient comes with the sums; that of others takes the products again."""

    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        others: Tensor,
        scale: float,
        tiles: Tiles,
        excluded: Excluded,
        offset: int,
        batch_size: int,
    ) -> Tensor:
        parts = 1 if all(x.dtype in (torch.float16, torch.bfloat16) for x in (anchors, others)) else 2
        a, a_exponent = _as_float16(anchors, parts)
        b, b_exponent = (a, a_exponent) if others is anchors else _as_float16(others, parts)
        factor = torch.ldexp(a.new_full((1,), scale, dtype=torch.float32), a_exponent + b_exponent)
        size, needs_averages = anchors.shape[1], ctx.needs_input_grad[0]
        n, m = len(anchors), len(others)
        num_splits, each = _splits(n, tiles.anchors, m, tiles.others, anchors.device)
        sums = factor.new_empty(num_splits, n)
        averages = factor.new_empty((num_splits, n, size) if needs_averages else (1,))
        constants = {
            "EXCLUDED": {"none": kernels.NONE, "itself": kernels.ITSELF, "sample": kernels.SAMPLE}[excluded].value,
            "SIZE": size,
            "BLOCK_SIZE": _block_size(size),
            "PARTS": parts,
            "ANCHORS": tiles.anchors,
            "OTHERS": tiles.others,
            "num_warps": tiles.warps,
            "num_stages": STAGES,
        }
        integers = (n, m, offset, batch_size)
        with _on(anchors.device):
            kernels.log_sum_exp[(triton.cdiv(n, tiles.anchors), num_splits)](
                a, b, factor, sums, averages, *integers, each, NEEDS_AVERAGES=needs_averages, **constants
            )
        total = sums.logsumexp(0)
        of_anchors = None
        if needs_averages:
            averages.mul_((sums - total).exp_()[:, :, None])
            of_anchors = torch.ldexp(averages.sum(0).mul_(scale), b_exponent)
        ctx.save_for_backward(a, b, factor, a_exponent, total, of_anchors)
        ctx.rest = scale, tiles, constants, integers
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        a, b, factor, a_exponent, total, of_anchors = ctx.saved_tensors
        scale, tiles, constants, integers = ctx.rest
        if of_anchors is not None:
            of_anchors = of_anchors * upstream[0][:, None]
        of_others = None
        if ctx.needs_input_grad[1]:
            n, m, *_ = integers
            size = constants["SIZE"]
            # A zero stays one; what is no number makes all of the gradient none, as it should.
            largest = upstream[0].abs().amax()
            relative = upstream[0] / largest.where(largest != 0, 1.0)
            num_splits, each = _splits(m, tiles.others, n, tiles.anchors, a.device)
            gradients = factor.new_empty(num_splits, m, size)
            with _on(a.device):
                kernels.gradient_of_others[(triton.cdiv(m, tiles.others), num_splits)](
                    a, b, factor, total, relative, gradients, *integers, each, **constants
                )
            of_others = torch.ldexp(gradients.sum(0).mul_(scale * largest), a_exponent)
        return of_anchors, of_others, None, None, None, None, None


def _as_float16(x: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Float16 [parts, n, E], whose sum is x / 2**exponent, at most 1, and the exponent int32 [1]."""
    x = x.detach().float()
    exponent = torch.frexp(x.abs().amax().view(1)).exponent
    x = torch.ldexp(x, -exponent)
    high = x.half()
    return torch.stack([high, (x - high).half()] if parts == 2 else [high]), exponent


def _block_size(size: int) -> int:
    """Features of a tile: a power of two, as many as a tensor core takes at least."""
    return max(16, int(triton.next_power_of_2(size)))


def _splits(rows: int, rows_of_tile: int, passing: int, passing_of_tile: int, device: torch.device) -> tuple[int, int]:
    """Into how many parts what passes by is split, so that every processor has something to do, and the size of a part."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    wanted = max(1, PROGRAMS_A_PROCESSOR * processors * rows_of_tile // rows)
    num_tiles = -(-passing // passing_of_tile)
    tiles_of_part = -(-num_tiles // wanted)
    return -(-num_tiles // tiles_of_part), tiles_of_part * passing_of_tile


def _on(device: torch.device) -> Any:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@runtime_checkable
class Fused(Protocol):
    """A loss by `log_sum_exp`."""

    def __call__(self, anchors: Tensor, others: Tensor, /, *, tiles: Tiles) -> Tensor: ...


_chosen: dict[tuple[Any, ...], Tiles | None] = {}
"""What was measured to be fastest, for what: tiles, or None for blocks."""


def fastest(
    name: str, blocked: Callable[[Tensor, Tensor], Tensor], fused: Fused, anchors: Tensor, others: Tensor
) -> Tensor:
    """A loss in the way that is fastest on this device; both ways keep the contract of float32.

    On a GPU with tensor cores for Triton the first call with these shapes takes time for both, forward and backward, on copies;
    later ones don't wait for anything. Ranks need not choose alike, there is nothing between them in either way. Blocks where
    nothing can be measured: on a CPU, on simulated tensors, without Triton; and where `torch.use_deterministic_algorithms`
    wants every run to be the same.

    Args:
        name: of the loss.
        blocked, fused: the loss of (anchors, others).
        anchors, others: [n, E], [m, E].
    """
    tiles = _choose(name, blocked, fused, anchors, others) if _can_choose(anchors, others) else None
    if tiles is None:
        return blocked(anchors, others)
    with torch.autocast(anchors.device.type, enabled=False):
        return fused(anchors, others, tiles=tiles)


def _can_choose(anchors: Tensor, others: Tensor) -> bool:
    return (
        anchors.is_cuda
        and triton is not None
        and len(anchors) * len(others) >= MIN_PAIRS
        and anchors.shape[1] <= max(TILES)
        and not isinstance(anchors, FakeTensor)
        and not torch.are_deterministic_algorithms_enabled()
        and torch.cuda.get_device_capability(anchors.device) >= LEAST_CAPABILITY
    )


def _choose(
    name: str, blocked: Callable[[Tensor, Tensor], Tensor], fused: Fused, anchors: Tensor, others: Tensor
) -> Tiles | None:
    needs = tuple(torch.is_grad_enabled() and x.requires_grad for x in (anchors, others))
    key = (name, anchors.device, anchors.shape, others.shape, anchors.dtype, others.dtype, needs)
    if key not in _chosen:
        candidates = next(TILES[size] for size in sorted(TILES) if anchors.shape[1] <= size)
        with torch.autocast(anchors.device.type, enabled=False):
            seconds: dict[Tiles | None, float] = {None: _seconds(blocked, anchors, others, needs)}
            for tiles in candidates:
                try:
                    seconds[tiles] = _seconds(partial(fused, tiles=tiles), anchors, others, needs)
                except torch.OutOfMemoryError:
                    raise  # of the step, as everywhere in it
                except triton.OutOfResources:
                    continue  # more than this device's processors have
                except Exception as error:  # no compiler, or none for this device
                    warnings.warn(f"{name} goes by blocks, its kernel does not run here: {error!r}", stacklevel=2)
                    break
        _chosen[key] = min(seconds, key=seconds.__getitem__)
    return _chosen[key]


def _seconds(
    loss: Callable[[Tensor, Tensor], Tensor], anchors: Tensor, others: Tensor, needs: tuple[bool, ...]
) -> float:
    """The shortest time of both passes, after one that compiles."""
    times = []
    for _ in range(1 + REPETITIONS):
        inputs = [x.detach().clone().requires_grad_(needed) for x, needed in zip((anchors, others), needs, strict=True)]
        if others is anchors:  # a rank alone, for which the losses do less
            inputs[1] = inputs[0]
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        value = loss(*inputs)
        if any(needs):
            value.backward()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return min(times[1:])
