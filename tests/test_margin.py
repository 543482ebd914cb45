"""The margin loss against nested-loop pseudocode of its paper, on one rank and on several."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dist_contrastive import distributed
from dist_contrastive.config import UserError
from dist_contrastive.losses.margin import margin_loss
from dist_contrastive.methods.margin import MarginConfig
from tests.harness import run_ranks


def margin_reference(views: np.ndarray, margin: float, hinge: Any, negatives: Any) -> float:
    """Hadsell, Chopra and LeCun 2006, equation 4, over in-batch pairs, as loops in float64; `views` [V, N, E]."""
    num_views, num_samples, _ = views.shape
    everyone = [(v, i) for v in range(num_views) for i in range(num_samples)]
    total = 0.0
    for v, i in everyone:
        pull = [0.5 * np.sum((views[v, i] - views[u, i]) ** 2) for u in range(num_views) if u != v]
        distances = [float(np.linalg.norm(views[v, i] - views[u, k])) for u, k in everyone if k != i]
        if negatives == "hardest":
            distances = [min(distances)]
        hinges = [max(0.0, margin - d) for d in distances]
        push = [0.5 * (h * h if hinge == "squared" else h) for h in hinges]
        total += sum(pull) / len(pull) + sum(push) / len(push)
    return total / len(everyone)


def embeddings(num_views: int, num_samples: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return F.normalize(torch.randn(num_views, num_samples, 4, generator=generator), dim=-1)


@pytest.mark.parametrize("negatives", ["all", "hardest"])
@pytest.mark.parametrize("hinge", ["squared", "linear"])
@pytest.mark.parametrize("num_views", [2, 3])
def test_equals_the_papers_loops(num_views: int, hinge: Any, negatives: Any) -> None:
    z = embeddings(num_views, 6)
    rows = z.flatten(0, 1)
    loss = margin_loss(
        rows,
        rows,
        offset=0,
        num_views=num_views,
        margin=1.2,
        hinge=hinge,
        negatives=negatives,
    )
    assert loss.item() == pytest.approx(margin_reference(z.double().numpy(), 1.2, hinge, negatives), rel=1e-5)


@pytest.mark.parametrize("negatives", ["all", "hardest"])
@pytest.mark.parametrize("hinge", ["squared", "linear"])
def test_equal_embeddings_have_a_finite_gradient(hinge: Any, negatives: Any) -> None:
    rows = F.normalize(torch.ones(6, 4), dim=-1).requires_grad_()
    margin_loss(
        rows,
        rows,
        offset=0,
        num_views=2,
        margin=1.0,
        hinge=hinge,
        negatives=negatives,
    ).backward()
    assert rows.grad is not None
    assert torch.isfinite(rows.grad).all()


def test_float32_inside_autocast() -> None:
    z = embeddings(2, 8).flatten(0, 1).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = margin_loss(z, z, offset=0, num_views=2, margin=1.0)
    assert loss.dtype == torch.float32
    assert loss.item() == margin_loss(z.float(), z.float(), offset=0, num_views=2, margin=1.0).item()


def loss_of_share(rank: int, z: np.ndarray, negatives: Any) -> tuple[float, np.ndarray]:
    num_views, num_samples, _ = z.shape
    share = num_samples // distributed.world_size()
    mine = torch.from_numpy(z[:, rank * share : (rank + 1) * share].copy()).requires_grad_()
    rows = mine.flatten(0, 1)
    loss = margin_loss(
        rows,
        distributed.gather_with_grad(rows),
        offset=rank * len(rows),
        num_views=num_views,
        margin=1.2,
        negatives=negatives,
    )
    loss.backward()
    assert mine.grad is not None
    return loss.item(), (mine.grad / distributed.world_size()).numpy()


@pytest.mark.parametrize("negatives", ["all", "hardest"])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_give_the_loss_and_gradient_of_the_whole_batch(num_ranks: int, negatives: str) -> None:
    z = embeddings(2, 8).numpy()
    loss, gradient = loss_of_share(0, z, negatives)
    shares = run_ranks(loss_of_share, num_ranks, z, negatives)
    assert np.mean([share_loss for share_loss, _ in shares]) == pytest.approx(loss, rel=1e-5)
    np.testing.assert_allclose(np.concatenate([g for _, g in shares], axis=1), gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("margin", [0.0, -1.0, 2.5])
def test_a_margin_that_no_pair_can_have_is_refused(margin: float) -> None:
    with pytest.raises(UserError, match=r"^--method.margin"):
        MarginConfig(margin=margin)
