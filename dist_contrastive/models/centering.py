"""What keeps a teacher's assignments to prototypes from collapsing: a bias on its logits, found over the samples of all ranks."""

import math
from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
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
        weights: Float[Tensor, " n"] | None = None,
    ) -> None:
        """Remember the targets of an update that was done."""


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

    def follow(self, targets: Tensor, prototypes: Tensor, weights: Tensor | None = None) -> None:
        counted = targets.new_ones(len(targets)) if weights is None else (weights > 0).to(targets.dtype)
        sums = torch.cat([counted @ targets, counted.sum()[None]])
        sums = distributed.all_reduce_sum(sums)
        # The mean logits are those of the mean embedding.
        logits = prototypes @ (sums[:-1] / sums[-1].clamp(min=1))
        self.center.lerp_(logits, 1 - self.momentum)


class SinkhornKnopp(Centering):
    """SwAV's and DINOv2's: every prototype gets the same share of the step's samples."""

    def __init__(self, num_prototypes: int, iterations: int) -> None:
        super().__init__(num_prototypes)
        self.iterations = iterations

    def settle(self, targets: Tensor, prototypes: Tensor, temperature: float, weights: Tensor | None = None) -> None:
        self.bias = sinkhorn_bias(
            targets, prototypes, temperature=temperature, iterations=self.iterations, weights=weights
        )


UNIFORM, SINGLE = 0.99, 0.02
"""From which share of ln K the entropy of targets, and up to which that of their mean, is taken for a collapse."""


def describe_collapse(entropy: float, entropy_of_mean: float, num_prototypes: int) -> str:
    """What is to be said where targets of these entropies, in nats, hold nothing to learn; else nothing."""
    largest = math.log(num_prototypes)
    if entropy > UNIFORM * largest:
        return (
            f"all targets are uniform (entropy {entropy:.2f} of ln {num_prototypes} = {largest:.2f}): nothing can be learnt from "
            "them; a lower temperature of the targets, a larger momentum of the teacher or a smaller learning rate may help"
        )
    if entropy_of_mean < SINGLE * largest:
        return (
            f"one prototype has nearly all samples (entropy of the mean target {entropy_of_mean:.2f} of {largest:.2f}): nothing "
            "can be learnt from them; is centering on, and are samples shuffled?"
        )
    return ""
