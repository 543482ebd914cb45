"""KoLeo against nested loops of its paper, on one rank and on several, in one block and in many."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dist_contrastive import distributed
from dist_contrastive.losses import blocks
from dist_contrastive.losses.koleo import EPSILON, koleo
from dist_contrastive.step.memory import TensorCount
from tests.harness import run_ranks


def embeddings(num_rows: int, size: int = 6) -> Tensor:
    return F.normalize(torch.randn(num_rows, size, generator=torch.Generator().manual_seed(0)), dim=1)


def reference(anchors: Tensor, everyone: Tensor, offset: int) -> Tensor:
    """Sablayrolles et al. 2019, equation 2, as loops in float64, with autograd's gradient."""
    total = anchors.new_zeros(())
    for i in range(len(anchors)):
        distances = [(anchors[i] - everyone[j]).norm() for j in range(len(everyone)) if j != offset + i]
        total = total - torch.log(min(distances) + 1e-8)
    return total / len(anchors)


def with_gradients(
    anchors: Tensor, everyone: Tensor, offset: int, function: Callable[..., Tensor] = koleo
) -> list[Tensor]:
    """The loss and its gradients for both."""
    anchors, everyone = (x.clone().requires_grad_() for x in (anchors, everyone))
    loss = function(anchors, everyone, offset=offset)
    loss.backward()
    assert anchors.grad is not None
    assert everyone.grad is not None
    return [loss.detach(), anchors.grad, everyone.grad]


@pytest.mark.parametrize("offset", [0, 4])
def test_value_and_gradients_equal_the_papers_loops(offset: int) -> None:
    everyone = embeddings(9)
    anchors = everyone[offset : offset + 5]
    expected = with_gradients(anchors.double(), everyone.double(), offset, reference)
    for found, correct in zip(with_gradients(anchors, everyone, offset), expected, strict=True):
        assert correct.any()
        torch.testing.assert_close(found.double(), correct, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("most", [1, 9, 20])
def test_many_blocks_give_what_one_gives(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    everyone = embeddings(9)
    results = []
    for pairs in (1 << 20, most):
        monkeypatch.setitem(blocks.MAX_PAIRS, "cpu", pairs)
        results.append(with_gradients(everyone[2:7], everyone, 2))
    for one, many in zip(*results, strict=True):
        assert torch.equal(one, many)


def test_equal_rows_stay_finite_and_get_no_gradient_from_one_another() -> None:
    row = embeddings(1)
    found = with_gradients(row.repeat(4, 1), row.repeat(4, 1), 0)
    assert found[0].item() == pytest.approx(-math.log(EPSILON), rel=1e-6)
    assert not found[1].any()
    assert not found[2].any()


def test_the_gradient_of_rows_that_almost_meet_has_the_bound_of_the_docstring() -> None:
    row = embeddings(1)
    moved = row + 1e-7
    pair = torch.cat([row, moved])
    loss, of_anchors, of_everyone = with_gradients(pair, pair, 0)
    assert torch.isfinite(loss)
    for gradient in (of_anchors, of_everyone):
        assert gradient.any()
        bound = 1 / (2 * (torch.linalg.vector_norm(row - moved).item() + EPSILON))
        assert gradient.norm(dim=1).max().item() <= bound * 1.001


def test_a_single_row_has_no_neighbour() -> None:
    row = embeddings(1)
    anchors, everyone = row.clone().requires_grad_(), row.clone().requires_grad_()
    loss = koleo(anchors, everyone, offset=0)
    loss.backward()
    assert loss.item() == 0
    assert anchors.grad is not None
    assert not anchors.grad.any()


def test_float32_inside_autocast() -> None:
    rows = embeddings(200).bfloat16()  # many enough that bfloat16 would not tell the nearest
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = koleo(rows, rows, offset=0)
    assert loss.dtype == torch.float32
    assert loss.item() == koleo(rows.float(), rows.float(), offset=0).item()


def test_memory_stays_far_below_the_matrix_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(blocks.MAX_PAIRS, "cpu", 1 << 16)
    rows = embeddings(2048, 16).requires_grad_()
    with TensorCount() as tensors:
        koleo(rows, rows, offset=0).backward()
    assert tensors.peak < 2048 * 2048  # bytes: a quarter of one matrix in float32


def loss_of_share(rank: int, rows: np.ndarray) -> tuple[float, np.ndarray]:
    """This rank's loss over its share of the rows, and the gradient at its share averaged as DDP does."""
    share = len(rows) // distributed.world_size()
    mine = torch.from_numpy(rows[rank * share : (rank + 1) * share].copy()).requires_grad_()
    loss = koleo(mine, distributed.gather_with_grad(mine), offset=distributed.row_offset(share))
    loss.backward()
    assert mine.grad is not None
    return loss.item(), (mine.grad / distributed.world_size()).numpy()


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_give_the_loss_and_gradient_of_the_whole_batch(num_ranks: int) -> None:
    """With four ranks of two rows each, most have their neighbour on another one."""
    rows = embeddings(8).numpy()
    loss, gradient = loss_of_share(0, rows)
    shares = run_ranks(loss_of_share, num_ranks, rows)
    assert np.mean([share_loss for share_loss, _ in shares]) == pytest.approx(loss, rel=1e-5)
    found = np.concatenate([share for _, share in shares])
    np.testing.assert_allclose(found, gradient, rtol=1e-5, atol=1e-5 * np.abs(gradient).max())
