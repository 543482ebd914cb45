"""What keeps a teacher's assignments to prototypes from collapsing: a bias on its logits, found over the samples of all ranks."""

import math
from abc import ABC, abstractmethod

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dist_contrastive import distributed
from dist_contrastive.losses.prototypes import sinkhorn_bias


class Centering(nn.Module, ABC):
    """Its `bias` [K] is what a step's loss adds to the teacher's logits over the temperature."""

    bias: Tensor

    def __init__(self, num_prototypes: int) -> None:
        super().__init__()
        self.register_buffer("bias", torch.zeros(num_prototypes), persistent=False)

    @abstractmethod
    def settle(
        self,
        targets: Float[Tensor, "n e"],
        prototypes: Float[Tensor, "k e"],
        temperature: float,
        weights: Float[Tensor, " n"] | None = None,
    ) -> None:
        """Find the bias for these targets of the rank batch; all ranks call it together. Rows of weight 0 are padding."""

    def follow(
        self,
        targets: Float[Tensor, "n e"],
        prototypes: Float[Tensor, "k e"],
        done: Bool[Tensor, ""],
        weights: Float[Tensor, " n"] | None = None,
    ) -> None:
        """Remember the targets of an update, if that was `done`."""


class MeanCentering(Centering):
    """DINO's: the moving average of the logits is subtracted (Caron et al. 2021, equation 4)."""

    center: Tensor

    def __init__(self, num_prototypes: int, momentum: float) -> None:
        """`momentum` is how much of itself the center keeps in a step; at 1 it stays 0."""
        super().__init__(num_prototypes)
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(num_prototypes))

    def settle(self, targets: Tensor, prototypes: Tensor, temperature: float, weights: Tensor | None = None) -> None:
        self.bias = -self.center / temperature

    def follow(self, targets: Tensor, prototypes: Tensor, done: Tensor, weights: Tensor | None = None) -> None:
        counted = targets.new_ones(len(targets)) if weights is None else (weights > 0).to(targets.dtype)
        sums = torch.cat([counted @ targets, counted.sum()[None]])
        sums = distributed.all_reduce_sum(sums)
        # The mean logits are those of the mean embedding.
        logits = prototypes @ (sums[:-1] / sums[-1].clamp(min=1))
        self.center.copy_(self.center.lerp(logits, 1 - self.momentum).where(done, self.center))


class SinkhornKnopp(Centering):
    """SwAV's and DINOv2's: every prototype gets the same share of the step's samples."""

    def __init__(self, num_prototypes: int, iterations: int) -> None:
        super().__init__(num_prototypes)
        self.iterations = iterations

    def settle(self, targets: Tensor, prototypes: Tensor, temperature: float, weights: Tensor | None = None) -> None:
        self.bias = sinkhorn_bias(
            targets, prototypes, temperature=temperature, iterations=self.iterations, weights=weights
        )


UNINFORMED, UNIFORM = 0.02, 0.9
"""Shares of ln K: what targets must tell of their samples, or nothing is to be learnt from them; from which entropy on they are
taken to be uniform then."""
FEW = 4
"""Prototypes, or the fourth part of all, that are too few for all samples."""


def describe_collapse(entropy: float, entropy_of_mean: float, num_prototypes: int) -> str:
    """What is to be said where targets of these entropies, in nats, hold nothing to learn, or next to nothing; else nothing.

    The entropy of the mean target less the mean entropy is what a target tells of its sample. The exponential of the former is
    how many prototypes are in use.
    """
    largest, in_use = math.log(num_prototypes), math.exp(entropy_of_mean)
    if in_use < min(FEW, num_prototypes / FEW):
        return (
            f"{in_use:.1f} of {num_prototypes:,} prototypes have nearly all samples (entropy of the mean target "
            f"{entropy_of_mean:.2f} of {largest:.2f}): little can be learnt from them; is centering on, and are samples shuffled?"
        )
    if entropy_of_mean - entropy > UNINFORMED * largest:
        return ""
    alike = "uniform" if entropy > UNIFORM * largest else "the same"
    return (
        f"all targets are {alike} (entropy {entropy:.2f} of ln {num_prototypes} = {largest:.2f}): nothing can be learnt from "
        "them; a lower temperature of the targets, a larger momentum of the teacher or a smaller learning rate may help"
    )
