"""NT-Xent against nested-loop pseudocode of its paper, on one rank and on several."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dist_contrastive import distributed
from dist_contrastive.losses.infonce import nt_xent
from tests.harness import run_ranks


def nt_xent_reference(views: np.ndarray, temperature: float) -> float:
    """SimCLR, algorithm 1 and equation 1, written as loops in float64; `views` [V, N, E] of unit length."""
    num_views, num_samples, _ = views.shape
    everyone = [(v, i) for v in range(num_views) for i in range(num_samples)]
    total = 0.0
    for v, i in everyone:
        denominator = sum(
            math.exp(float(views[v, i] @ views[u, k]) / temperature) for u, k in everyone if (u, k) != (v, i)
        )
        positives = [float(views[v, i] @ views[u, i]) / temperature for u in range(num_views) if u != v]
        total += sum(-(s - math.log(denominator)) for s in positives) / len(positives)
    return total / len(everyone)


def embeddings(num_views: int, num_samples: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(num_views, num_samples, 16, generator=generator), dim=-1)


@pytest.mark.parametrize("num_views", [2, 3])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_equals_the_papers_loops(num_views: int, temperature: float) -> None:
    z = embeddings(num_views, 5)
    rows = z.flatten(0, 1)
    loss = nt_xent(rows, rows, offset=0, num_views=num_views, temperature=temperature)
    assert loss.item() == pytest.approx(nt_xent_reference(z.double().numpy(), temperature), rel=1e-5)


def test_float32_inside_autocast() -> None:
    z = embeddings(2, 8).flatten(0, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nt_xent(z.bfloat16(), z.bfloat16(), offset=0, num_views=2, temperature=0.07)
    exact = nt_xent(z.bfloat16().float(), z.bfloat16().float(), offset=0, num_views=2, temperature=0.07)
    assert loss.dtype == torch.float32
    assert loss.item() == exact.item()


def loss_of_share(rank: int, z: np.ndarray) -> tuple[float, np.ndarray]:
    """This rank's loss over its share of z [V, N, E], and the gradient at its share averaged as DDP does."""
    num_views, num_samples, _ = z.shape
    share = num_samples // distributed.world_size()
    mine = torch.from_numpy(z[:, rank * share : (rank + 1) * share].copy()).requires_grad_()
    rows = mine.flatten(0, 1)
    everyone = distributed.gather_with_grad(rows)
    loss = nt_xent(rows, everyone, offset=rank * len(rows), num_views=num_views, temperature=0.2)
    loss.backward()
    assert mine.grad is not None
    return loss.item(), (mine.grad / distributed.world_size()).numpy()


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_give_the_loss_and_gradient_of_the_whole_batch(num_ranks: int) -> None:
    z = embeddings(2, 8)
    whole = z.clone().requires_grad_()
    rows = whole.flatten(0, 1)
    loss = nt_xent(rows, rows, offset=0, num_views=2, temperature=0.2)
    loss.backward()
    assert whole.grad is not None
    shares = run_ranks(loss_of_share, num_ranks, z.numpy())
    assert np.mean([share_loss for share_loss, _ in shares]) == pytest.approx(loss.item(), rel=1e-6)
    gradient = np.concatenate([gradient for _, gradient in shares], axis=1)
    np.testing.assert_allclose(gradient, whole.grad.numpy(), rtol=1e-5, atol=1e-7)
