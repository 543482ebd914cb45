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
        if input[:, 0].numel() * distributed.world_size() <= 1:
            raise ValueError(f"batch statistics need more than one value per channel, got {list(input.shape)}")
        output, mean, var, count = _Normalize.apply(input, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            self._update(mean, var * (count / (count - 1)))
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
        mean, var, count = _global_statistics(x)
        weight = torch.ones_like(mean) if weight is None else weight
        output, _, _ = torch.ops.aten.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var, count)
        return output, mean, var, count

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x, weight, mean, var, count = ctx.saved_tensors
        # As if mean and variance were constants: d = dy·w/σ, Σ dy·x̂ for the weight and Σ dy for the bias.
        d, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            grads[0], x, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        total_weight, total_bias = distributed.small_sum(torch.cat([of_weight, of_bias]).double()).float().chunk(2)
        # What flows through them, -w/σ·(x̂·mean of dy·x̂ + mean of dy) over all ranks' values, is an affine map of x̂, too.
        each = -weight.float() * torch.rsqrt(var + ctx.eps) / count
        through, _, _ = torch.ops.aten.native_batch_norm(
            x, each * total_weight, each * total_bias, mean, var, False, 0.0, ctx.eps
        )
        d.add_(through)
        return d, of_weight if ctx.needs_input_grad[1] else None, of_bias if ctx.needs_input_grad[2] else None, None


def _global_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [C], biased variance [C] and number of values, float32, over all ranks."""
    # On a GPU sums of 16-bit values are float32 by themselves; on a CPU they have the values' dtype.
    mean, var = torch.ops.aten.batch_norm_update_stats(x.float() if x.device.type == "cpu" else x, None, None, 0.0)
    mean, var = mean.double(), var.double()  # or a variance that is small beside the mean would be lost in rounding
    totals = distributed.small_sum(torch.cat([mean, var + mean.square(), torch.ones_like(mean[:1])]) * x[:, 0].numel())
    mean, square = (totals[:-1] / totals[-1]).chunk(2)
    return mean.float(), (square - mean.square()).clamp_(min=0).float(), totals[-1].float()
