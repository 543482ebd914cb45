"""BatchNorm's running statistics under a step that passes its samples in micro-batches, or passes them twice."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """The module's BatchNorm layers that have running statistics."""
    return [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


def running_statistics(norms: Sequence[_BatchNorm]) -> list[Tensor]:
    """The buffers of these layers: the only state that a forward pass moves."""
    return [buffer for norm in norms for buffer in norm.buffers(recurse=False)]


@contextmanager
def statistics_untouched(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Within the context BatchNorm normalizes by the batch and leaves its running statistics as they are."""
    before = [norm.track_running_stats for norm in norms]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm, tracked in zip(norms, before, strict=True):
            norm.track_running_stats = tracked


@contextmanager
def statistics_share(norms: Sequence[_BatchNorm], parts: Sequence[slice], number: int) -> Iterator[None]:
    """Within the context running statistics move by micro-batch `number`'s share of what a whole batch moves them.

    Micro-batch k of share w_k of the samples gets momentum m_k = a·w_k / (1 - a·(w_{k+1} + ...)), so that after all
    of them old = (1 - a)·old + a·(w_1·s_1 + w_2·s_2 + ...) for the layer's own momentum a.
    """
    total = parts[-1].stop
    share, later = (parts[number].stop - parts[number].start) / total, 1 - parts[number].stop / total
    before = [norm.momentum for norm in norms]
    for norm, momentum in zip(norms, before, strict=True):
        if momentum is not None:
            norm.momentum = momentum * share / (1 - momentum * later)
    try:
        yield
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum
