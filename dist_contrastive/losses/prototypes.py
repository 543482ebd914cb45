"""Losses that compare samples by their assignments to prototypes: DINO, iBOT, SwAV.

Embeddings are small and prototypes many, so a matrix of logits [samples, K] is never whole: all of it is done a block of
samples at a time (`blocks`), in float32.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from dist_contrastive.distributed import all_gather, all_reduce_sum
from dist_contrastive.losses.blocks import blocks, softmax_


def other_views(num_views: int, num_targets: int, device: torch.device | None = None) -> Float[Tensor, "v w"]:
    """DINO's pairs (Caron et al. 2021, equation 3): each of the student's views with all of the teacher's but its own.

    [V, W] of 1, with 0 where v == w. The teacher sees the first W of the V views, the global ones.
    """
    return 1 - torch.eye(num_views, num_targets, device=device)


class _CrossEntropy(torch.autograd.Function):
    """The gradient is taken in the forward pass, block by block: what is kept has the size of embeddings and prototypes."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        prototypes: Tensor,
        targets: Tensor,
        target_prototypes: Tensor,
        bias: Tensor,
        shares: Tensor,
        coefficients: Tensor,
        grad_enabled: bool,
    ) -> Tensor:
        """Samples first: student [b v e], scaled by 1 / temperature, targets [b w e] likewise; shares [v w], coefficients [b v].

        Σ coefficients[b, v] · (cross entropy of Σ_w shares[v, w] · p_w, in which each row of shares is a distribution).
        """
        needs = [grad_enabled and needed for needed in ctx.needs_input_grad[:2]]
        total = student.new_zeros(())
        of_student, of_prototypes = (
            torch.zeros_like(x) if needed else None for x, needed in zip((student, prototypes), needs, strict=True)
        )
        num_samples, num_views, _ = student.shape
        num_targets = targets.shape[1]
        for rows in blocks(num_samples, len(prototypes) * max(num_views, num_targets), student.device):
            size = (rows.stop - rows.start, -1, len(prototypes))
            target = F.linear(targets[rows].flatten(0, 1), target_prototypes, bias)
            softmax_(target)
            target = target.view(size)
            block = student[rows].flatten(0, 1)
            logits = block @ prototypes.T
            pulled = ((logits.view(size) @ target.mT) * shares).sum(2)
            pushed = softmax_(logits).view_as(pulled)
            total += ((pushed - pulled) * coefficients[rows]).sum()
            if not any(needs):
                continue
            # What the logits get but for the coefficients, which are left to the smaller factor of each product.
            logits.view(size).baddbmm_(shares.expand(len(target), -1, -1), target, alpha=-1)
            weights = coefficients[rows].flatten()[:, None]
            if of_student is not None:
                of_student[rows] = ((logits @ prototypes) * weights).view_as(student[rows])
            if of_prototypes is not None:
                of_prototypes.addmm_(logits.T, block * weights)
        ctx.save_for_backward(of_student, of_prototypes)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        of_student, of_prototypes = (None if grad is None else upstream[0] * grad for grad in ctx.saved_tensors)
        return of_student, of_prototypes, None, None, None, None, None, None


def prototype_cross_entropy(
    student: Float[Tensor, "v b e"],
    prototypes: Float[Tensor, "k e"],
    targets: Float[Tensor, "w b e"],
    target_prototypes: Float[Tensor, "k e"],
    *,
    pairs: Float[Tensor, "v w"],
    bias: Float[Tensor, " k"],
    temperature: float,
    target_temperature: float,
    weights: Float[Tensor, " b"] | None = None,
) -> Float[Tensor, ""]:
    """The cross entropy H(p, q) = -Σ_k p_k log q_k of a teacher's and a student's assignments; a float32 scalar.

    DINO (Caron et al. 2021, equation 3) with `other_views`, iBOT's patches (Zhou et al. 2022, equation 2) with one view of
    each patch, SwAV (Caron et al. 2020, equation 2) with the prototypes themselves as the target's. Of view v of a sample,
    q = softmax(student · prototypesᵀ / temperature); of its view w,
    p = softmax(targets · target_prototypesᵀ / target_temperature + bias). The loss of a sample is the mean of H(p_w, q_v) over
    pairs of views, weighted with `pairs`.

    Memory beside embeddings, prototypes and their gradients: two to three times `blocks.MAX_PAIRS` values, whatever B; at
    least V + W rows of K. It can be differentiated once.

    Args:
        student: [V, B, E] this rank's embeddings, with gradient.
        prototypes: [K, E] with gradient.
        targets: [W, B, E] the teacher's embeddings of the same samples; no gradient reaches them.
        target_prototypes: [K, E] the teacher's; no gradient reaches them.
        pairs: [V, W] how much each pair of views counts, none negative, some positive.
        bias: [K] keeps the assignments from collapsing: DINO's centering is -center / target_temperature, where the center
            is one of logits without temperature; Sinkhorn-Knopp's is `sinkhorn_bias`.
        temperature, target_temperature: divide the inner products.
        weights: [B] the loss is Σ weights · (a sample's loss), padding has 0 (for iBOT, 1 / (images · masked patches of the
            patch's image)); without weights it is the mean over samples.
    """
    with torch.autocast(student.device.type, enabled=False):
        pairs = pairs.float()
        of_view = pairs.sum(1)
        # A view that is in no pair has a row of zeros and the coefficient 0.
        shares = pairs / of_view.clamp_min(torch.finfo(pairs.dtype).tiny)[:, None]
        if weights is None:
            weights = pairs.new_full((student.shape[1],), 1 / student.shape[1])
        coefficients = weights.float()[:, None] * (of_view / of_view.sum())
        loss: Tensor = _CrossEntropy.apply(
            student.float().transpose(0, 1) / temperature,
            prototypes.float(),
            targets.detach().float().transpose(0, 1) / target_temperature,
            target_prototypes.detach().float(),
            bias.detach().float(),
            shares,
            coefficients,
            torch.is_grad_enabled(),
        )
        return loss


@torch.no_grad()
def sinkhorn_bias(
    targets: Float[Tensor, "n e"],
    prototypes: Float[Tensor, "k e"],
    *,
    temperature: float,
    iterations: int,
    weights: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, " k"]:
    """The bias with which a softmax over prototypes is Sinkhorn-Knopp's assignment, over the samples of all ranks.

    SwAV's algorithm (Caron et al. 2020, equation 3 and its code in appendix A), DINOv2's centering (Oquab et al. 2023,
    section 4): from exp(targets · prototypesᵀ / temperature), each iteration scales every prototype to 1 / K of all samples'
    mass, then every sample to an equal part of it. The last scaling of samples is the softmax; those of prototypes, as
    logarithms, are the bias. Logarithms throughout: no temperature overflows. No sample's own scaling is kept: it follows
    from its logits and the bias before.

    Each iteration computes all logits once, block by block, and gathers one vector of K values a rank. The bias has mean 0, and
    is all 0 without a sample on any rank.

    Args:
        targets: [n, E] this rank's embeddings, as many on each rank.
        prototypes: [K, E] the same on all ranks.
        temperature: divides the inner products; SwAV's ε.
        iterations: how often; 0 gives the plain softmax.
        weights: [n] rows of weight 0 are padding and do not count; all others count alike.
    """
    with torch.autocast(targets.device.type, enabled=False):
        targets, prototypes = targets.float() / temperature, prototypes.float()
        bias = prototypes.new_zeros(len(prototypes))
        for iteration in range(iterations):
            mass = torch.full_like(bias, -torch.inf)
            for rows in blocks(len(targets), len(prototypes), targets.device):
                logits = F.linear(targets[rows], prototypes, bias)
                if iteration > 0:  # at first no sample is scaled yet
                    logits.sub_(logits.logsumexp(1, keepdim=True))
                if weights is not None:
                    logits.masked_fill_(weights[rows, None] == 0, -torch.inf)
                mass = torch.logaddexp(mass, logits.logsumexp(0))
            mass = all_gather(mass[None]).logsumexp(0)
            # What all prototypes have in common makes no difference to a softmax, and would grow.
            bias = (bias - (mass - mass.mean())).where(mass > -torch.inf, 0.0)
        return bias


@torch.no_grad()
def assignment_entropies(
    targets: Float[Tensor, "n e"],
    prototypes: Float[Tensor, "k e"],
    *,
    bias: Float[Tensor, " k"],
    temperature: float,
    weights: Float[Tensor, " n"] | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The mean entropy of a sample's assignment and the entropy of the mean assignment, over all ranks; in nats, float32.

    They tell the two ways to collapse (Caron et al. 2021, section 5.3): where every assignment is uniform both are ln K, where
    one prototype has all samples both are 0. Their difference is the information that an assignment has on its sample.
    Without a sample on any rank both are 0.

    Args:
        targets: [n, E] this rank's embeddings.
        prototypes: [K, E] the same on all ranks.
        bias: [K] as in `prototype_cross_entropy`.
        temperature: divides the inner products.
        weights: [n] rows of weight 0 are padding and do not count; all others count alike.
    """
    with torch.autocast(targets.device.type, enabled=False):
        targets, prototypes, bias = targets.float() / temperature, prototypes.float(), bias.float()
        counted = targets.new_ones(len(targets)) if weights is None else (weights != 0).float()
        mass = torch.zeros_like(bias)
        entropy = bias.new_zeros(())
        for rows in blocks(len(targets), len(prototypes), targets.device):
            assignments = F.linear(targets[rows], prototypes, bias)
            softmax_(assignments)
            mass += counted[rows] @ assignments
            entropy += counted[rows] @ torch.special.entr(assignments).sum(1)
        sums = all_reduce_sum(torch.cat([mass, torch.stack([entropy, counted.sum()])]))
        count = sums[-1].clamp_min(1.0)
        return sums[-2] / count, torch.special.entr(sums[:-2] / count).sum()
