"""BatchNorm whose statistics are of all ranks' samples (Ioffe and Szegedy 2015, over the global batch).

torch's own SyncBatchNorm takes no CPU tensor, so that nothing it does can be tested on a machine without GPUs, and its
collectives are out of `distributed.attempt`'s sight: where one rank runs out of memory in a forward pass, the others
wait in the next layer. This one sends its sums through `distributed`, and is the same code on every device and at any
number of ranks.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dist_contrastive import distributed


class SyncBatchNorm(_BatchNorm):
    """Batch normalization of [N, C, ...] over N, all further axes and all ranks, which need not have the same N.

    Parameters, buffers, running statistics and evaluation mode are those of `nn.BatchNorm2d`. All ranks must call it
    together, and take part in its backward pass together. Raises `ValueError` for a single value per channel.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected [N, C, ...], got {input.ndim} axes")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        # Of several ranks some may have none: a GPU would have to stand still for knowing how many the others have.
        if distributed.world_size() == 1 and input[:, 0].numel() <= 1:
            raise ValueError(f"batch statistics need more than one value per channel, got {list(input.shape)}")
        output, mean, var, count = _Normalize.apply(input, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            self._update(mean, var * (count / (count - 1).clamp(min=1)))
        normalized: Tensor = output
        return normalized

    @torch.no_grad()
    def _update(self, mean: Tensor, unbiased_var: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(unbiased_var, momentum)


def message_size(module: nn.Module) -> int:
    """How many numbers the largest message of the module's SyncBatchNorm layers has; 0 if there is no such layer."""
    return max((2 * m.num_features + 1 for m in module.modules() if isinstance(m, SyncBatchNorm)), default=0)


class _Normalize(torch.autograd.Function):
    """Input, weight, bias to output, and without gradient the global mean, (biased) variance and number of values."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = _dense(x)
        mean, var, count = _global_statistics(x)
        invstd = torch.rsqrt(var + eps)
        weight = None if weight is None else weight.to(mean.dtype)
        bias = None if bias is None else bias.to(mean.dtype)
        ctx.save_for_backward(x, weight, mean, invstd, count)
        ctx.mark_non_differentiable(mean, var, count)
        return _normalize(x, weight, bias, mean, invstd), mean, var, count

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x, weight, mean, invstd, count = ctx.saved_tensors
        dy = _dense(grads[0])
        sum_dy, sum_dy_xmu = _gradient_sums(dy, x, mean, invstd)
        # What flows through mean and variance comes from all ranks' values; a rank without any has to take part, too.
        total = distributed.small_sum(torch.cat([sum_dy, sum_dy_xmu]).double())
        mean_dy, mean_dy_xmu = (total / count).to(mean.dtype).chunk(2)
        return (
            _input_gradient(dy, x, mean, invstd, weight, mean_dy, mean_dy_xmu),
            sum_dy_xmu * invstd if ctx.needs_input_grad[1] else None,
            sum_dy if ctx.needs_input_grad[2] else None,
            None,
        )


def _global_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [C], biased variance [C] and number of values [], float32 (of float64 values float64), over all ranks."""
    if x.numel():
        # On a GPU sums of 16-bit values are float32 by themselves; on a CPU they have the values' dtype.
        mean, var = torch.batch_norm_update_stats(x.float() if _is_half(x) and not x.is_cuda else x, None, None, 0.0)
    else:
        mean = var = torch.zeros(x.shape[1], device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
    dtype = mean.dtype
    mean, var = mean.double(), var.double()  # or a variance that is small beside the mean would be lost in rounding
    totals = distributed.small_sum(torch.cat([mean, var + mean.square(), torch.ones_like(mean[:1])]) * x[:, 0].numel())
    mean, square = (totals[:-1] / totals[-1]).chunk(2)
    return mean.to(dtype), (square - mean.square()).clamp_(min=0).to(dtype), totals[-1].to(dtype)


def _dense(x: Tensor) -> Tensor:
    """`x` in a layout that CUDA's kernels read as it lies."""
    formats = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)
    return x if any(x.is_contiguous(memory_format=layout) for layout in formats) else x.contiguous()


def _is_half(x: Tensor) -> bool:
    return x.dtype in (torch.float16, torch.bfloat16)


# The elementwise work and the sums of one rank. On a GPU these are the kernels that torch's own SyncBatchNorm calls
# (torch/nn/modules/_functions.py), each of which reads its tensors once and makes one. A CPU has none of them: there the
# same function of the same arguments comes from BatchNorm with given statistics. x and dy: [N, C, ...] of one dtype, on a
# GPU dense; all else [C] in the statistics' dtype.


def _normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor) -> Tensor:
    """(x - mean)·invstd·weight + bias, in the dtype and layout of x."""
    if not x.numel():
        return torch.empty_like(x)
    if x.is_cuda:
        return torch.batch_norm_elemt(x, weight, bias, mean, invstd, 0.0)
    output: Tensor = torch.ops.aten.native_batch_norm(x, weight, bias, mean, invstd**-2, False, 0.0, 0.0)[0]
    return output


def _gradient_sums(dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    """Σ dy and Σ dy·(x - mean) of this rank's values."""
    if not x.numel():
        return torch.zeros_like(mean), torch.zeros_like(mean)
    if x.is_cuda:
        sum_dy, sum_dy_xmu, _, _ = torch.batch_norm_backward_reduce(dy, x, mean, invstd, None, True, False, False)
        return sum_dy, sum_dy_xmu
    _, sum_dy_normalized, sum_dy = torch.ops.aten.native_batch_norm_backward(
        dy, x, torch.ones_like(mean), mean, invstd**-2, None, None, False, 0.0, [False, True, True]
    )
    return sum_dy, sum_dy_normalized / invstd


def _input_gradient(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, mean_dy: Tensor, mean_dy_xmu: Tensor
) -> Tensor:
    """(dy - mean_dy - (x - mean)·invstd²·mean_dy_xmu)·invstd·weight, where the means are over all ranks' values."""
    if not x.numel():
        return torch.empty_like(x)
    if x.is_cuda:
        # The kernel divides sums by a number of values, which it takes as int32: it gets means, and one.
        one = torch.ones(1, dtype=torch.int32, device=x.device)
        return torch.batch_norm_backward_elemt(dy, x, mean, invstd, weight, mean_dy, mean_dy_xmu, one)
    scale = invstd if weight is None else invstd * weight
    # What flows through the statistics is an affine map of the normalized x.
    gradient: Tensor = _normalize(x, -scale * invstd * mean_dy_xmu, -scale * mean_dy, mean, invstd)
    return gradient.addcmul_(dy, scale.view(1, -1, *[1] * (x.ndim - 2)))
