"""What a batch of embeddings looks like: its covariance's spectrum, its effective rank, the closeness of positives, the
spread over the sphere.

Pure functions without gradient. Spectra are taken in float64 from the smaller of the two Gram matrices, which costs
O(N D min(N, D)) and whatever precision the embeddings come in. Non-finite embeddings give NaN, not an exception: it is
the training loop's business to stop at them, with the step's number.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

UNIFORMITY_BLOCK = 1024
"""Rows whose distances to all others are held at a time."""


def _gram_spectrum(z: Tensor) -> Tensor:
    """Squared singular values of `z` [N, D], float64 [min(N, D)], descending."""
    z = z.double()
    gram = z.T @ z if z.shape[0] >= z.shape[1] else z @ z.T
    # `eigvalsh` raises where it meets a NaN; a GPU's host would have to wait to know whether there is one.
    finite = torch.isfinite(gram).all()
    eigenvalues = torch.linalg.eigvalsh(gram.where(finite, 0.0)).clamp_min(0.0).flip(0)
    return eigenvalues.where(finite, torch.nan)


@torch.no_grad()
def covariance_spectrum(z: Tensor) -> Tensor:
    """Eigenvalues of the centred covariance matrix of `z` [N, D], float64 [D], descending, none negative.

    The covariance is Σ (z - mean)(z - mean)ᵀ / N, so the eigenvalues add up to the total variance. With N <= D at least
    D - N + 1 of them are zero. Where they fall to zero early, the embedding uses few of its dimensions (dimensional
    collapse: Jing et al. 2022, "Understanding dimensional collapse in contrastive self-supervised learning").
    """
    num_samples, size = z.shape
    z = z.double()
    eigenvalues = _gram_spectrum(z - z.mean(0)) / max(1, num_samples)
    return F.pad(eigenvalues, (0, size - eigenvalues.shape[0]))


@torch.no_grad()
def effective_rank(z: Tensor) -> Tensor:
    """The effective rank of `z` [N, D]: a float64 scalar tensor in [1, min(N, D)]; 0 where all of `z` is zero.

    exp(-Σ p log p) with p = σ / Σ σ over the singular values σ of `z`, which is not centred (Roy and Vetterli 2007,
    "The effective rank"; Garrido et al. 2023, "RankMe"). Embeddings that are all one vector have effective rank 1.
    """
    return effective_rank_of_spectrum(_gram_spectrum(z))


@torch.no_grad()
def effective_rank_of_spectrum(eigenvalues: Tensor) -> Tensor:
    """The effective rank from the eigenvalues [D] of a Gram or covariance matrix, none negative; as `effective_rank`."""
    singular_values = eigenvalues.double().sqrt()
    total = singular_values.sum()
    p = singular_values / total
    return torch.exp(-torch.special.xlogy(p, p).sum()).where(total != 0, 0.0)


@torch.no_grad()
def positive_cosine(z: Tensor) -> Tensor:
    """The mean cosine between two views of one sample, float32 scalar tensor in [-1, 1].

    `z` is [V, N, D], V >= 2 views of N samples, of any length; the mean runs over the samples and all pairs of views.
    """
    num_views = z.shape[0]
    if num_views < 2:
        raise ValueError(f"positive_cosine needs at least 2 views, got embeddings of shape {tuple(z.shape)}")
    unit = F.normalize(z.float(), dim=-1)
    # Σ over ordered pairs v != w of <z_v, z_w> is |Σ z_v|² - Σ |z_v|²: no V × V matrix.
    pairs = unit.sum(0).square().sum(-1) - unit.square().sum((0, 2))
    return (pairs / (num_views * (num_views - 1))).mean()


@torch.no_grad()
def alignment(z: Tensor) -> Tensor:
    """The mean squared distance between two views of one sample on the unit sphere, float32 scalar tensor in [0, 4].

    `z` is [V, N, D], V >= 2 views of N samples, of any length. The lower, the more alike views are; 0 also where every
    sample is the same (Wang and Isola 2020, "Understanding contrastive representation learning through alignment and
    uniformity on the hypersphere", with α = 2).
    """
    return 2 - 2 * positive_cosine(z)


@torch.no_grad()
def uniformity(z: Tensor) -> Tensor:
    """log of the mean of exp(-2 |x - y|²) over all pairs of distinct rows of `z` [N, D], scaled to length 1; float64 scalar.

    In [-8, 0] for any two vectors; the lower, the more evenly the rows spread over the sphere, 0 where all are one vector
    (Wang and Isola 2020, with t = 2). 0 for a single row, which has no pair. The memory grows with N times a block.
    """
    num_samples = len(z)
    if num_samples < 2:
        return torch.zeros((), dtype=torch.float64, device=z.device)
    unit = F.normalize(z.double(), dim=-1)
    # |x - y|² = 2 - 2 <x, y>; each row's pair with itself adds exp(0) = 1, taken off at the end.
    total = sum((4 * (block @ unit.T) - 4).exp().sum() for block in unit.split(UNIFORMITY_BLOCK))
    return ((total - num_samples).clamp_min(0) / (num_samples * (num_samples - 1))).log()
