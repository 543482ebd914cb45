"""SigLIP's loss against nested loops of its paper, on one rank and on several, in one block and in many."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dist_contrastive import distributed
from dist_contrastive.losses import blocks
from dist_contrastive.losses.sigmoid import sigmoid_loss
from dist_contrastive.step.memory import TensorCount
from tests.harness import run_ranks

LOG_SCALE, BIAS = math.log(10), -10.0  # the paper's start


def embeddings(num_rows: int, seed: int, size: int = 6) -> Tensor:
    return F.normalize(torch.randn(num_rows, size, generator=torch.Generator().manual_seed(seed)), dim=1)


class Inputs:
    """Images, all texts, and the two learnt numbers."""

    def __init__(self, images: Tensor, texts: Tensor) -> None:
        self.images, self.texts, self.log_scale, self.bias = (
            x.clone().requires_grad_()
            for x in (images, texts, images.new_tensor([LOG_SCALE]), images.new_tensor([BIAS]))
        )

    def loss(self, offset: int) -> Tensor:
        """As the docstring says to put scale and bias into the embeddings."""
        return sigmoid_loss(self.scaled_images(), self.longer(self.texts), offset=offset)

    def scaled_images(self) -> Tensor:
        return torch.cat([self.log_scale.exp() * self.images, self.bias.expand(len(self.images), 1)], dim=1)

    def longer(self, texts: Tensor) -> Tensor:
        return torch.cat([texts, texts.new_ones(len(texts), 1)], dim=1)

    def reference(self, offset: int) -> Tensor:
        """Zhai et al. 2023, equation 1, as loops, with autograd's gradient."""
        total = self.images.new_zeros(())
        for i in range(len(self.images)):
            for j in range(len(self.texts)):
                label = 1 if j == offset + i else -1
                logit = self.log_scale[0].exp() * (self.images[i] @ self.texts[j]) + self.bias[0]
                total = total - torch.log(1 / (1 + torch.exp(-label * logit)))
        return total / len(self.images)

    def gradients(self, loss: Tensor) -> list[Tensor]:
        loss.backward()
        found = [x.grad for x in (self.images, self.texts, self.log_scale, self.bias)]
        assert all(x is not None for x in found)
        return found  # type: ignore[return-value]


@pytest.mark.parametrize("offset", [0, 3])
def test_value_and_gradients_equal_the_papers_loops(offset: int) -> None:
    images, texts = embeddings(4, seed=1), embeddings(9, seed=2)
    exact = Inputs(images.double(), texts.double())
    expected = exact.reference(offset)
    inputs = Inputs(images, texts)
    loss = inputs.loss(offset)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for found, correct in zip(inputs.gradients(loss), exact.gradients(expected), strict=True):
        assert correct.any()
        torch.testing.assert_close(found.double(), correct, rtol=1e-4, atol=1e-5 * correct.abs().max().item())


@pytest.mark.parametrize("most", [1, 9, 20])
def test_many_blocks_give_what_one_gives(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for pairs in (1 << 20, most):
        monkeypatch.setitem(blocks.MAX_PAIRS, "cpu", pairs)
        inputs = Inputs(embeddings(5, seed=1), embeddings(9, seed=2))
        loss = inputs.loss(2)
        results.append([loss.detach(), *inputs.gradients(loss)])
    for one, many in zip(*results, strict=True):
        torch.testing.assert_close(many, one)


@pytest.mark.parametrize("logit", [-1e4, 1e4])
def test_large_logits_do_not_overflow(logit: float) -> None:
    """An image whose own text has the logit costs max(0, -logit), another text max(0, logit)."""
    images, texts = torch.tensor([[logit]], requires_grad=True), torch.ones(2, 1)
    loss = sigmoid_loss(images, texts, offset=1)
    loss.backward()
    assert loss.item() == 1e4
    assert images.grad is not None
    assert images.grad.item() == math.copysign(1.0, logit)


def test_a_pair_that_is_told_well_keeps_its_precision() -> None:
    images, texts = torch.tensor([[14.0]], requires_grad=True), torch.ones(1, 1)
    loss = sigmoid_loss(images, texts, offset=0)
    loss.backward()
    assert loss.item() == pytest.approx(math.log1p(math.exp(-14)), rel=1e-5)
    assert images.grad is not None
    assert images.grad.item() == pytest.approx(-1 / (1 + math.exp(14)), rel=1e-5)


def test_float32_inside_autocast() -> None:
    images, texts = embeddings(4, seed=1).bfloat16(), embeddings(9, seed=2).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = sigmoid_loss(images, texts, offset=0)
    assert loss.dtype == torch.float32
    assert loss.item() == sigmoid_loss(images.float(), texts.float(), offset=0).item()


def test_memory_stays_far_below_the_matrix_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(blocks.MAX_PAIRS, "cpu", 1 << 16)
    inputs = Inputs(embeddings(2048, 1), embeddings(2048, 2))
    with TensorCount() as tensors:
        inputs.loss(0).backward()
    assert tensors.peak < 2048 * 2048  # bytes: a quarter of one matrix in float32


def results_of_share(rank: int, images: np.ndarray, texts: np.ndarray) -> tuple[float, list[np.ndarray]]:
    """This rank's loss over its share, and the gradients averaged as DDP does: of its images and texts, of scale and bias."""
    num_ranks = distributed.world_size()
    share = len(images) // num_ranks
    inputs = Inputs(*(torch.from_numpy(x[rank * share : (rank + 1) * share].copy()) for x in (images, texts)))
    everyone = distributed.gather_with_grad(inputs.longer(inputs.texts))
    loss = sigmoid_loss(inputs.scaled_images(), everyone, offset=distributed.row_offset(share))
    of_images, of_texts, *of_numbers = inputs.gradients(loss)
    averaged = [of_images, of_texts, *(distributed.all_reduce_sum(x) for x in of_numbers)]
    return loss.item(), [(x / num_ranks).numpy() for x in averaged]


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_give_the_loss_and_gradient_of_the_whole_batch(num_ranks: int) -> None:
    images, texts = embeddings(8, seed=1).numpy(), embeddings(8, seed=2).numpy()
    loss, gradients = results_of_share(0, images, texts)
    shares = run_ranks(results_of_share, num_ranks, images, texts)
    assert np.mean([share_loss for share_loss, _ in shares]) == pytest.approx(loss, rel=1e-5)
    found = [np.concatenate([share[1][i] for share in shares]) for i in (0, 1)]
    for of_ranks, of_one in zip([*found, *shares[0][1][2:]], gradients, strict=True):
        np.testing.assert_allclose(of_ranks, of_one, rtol=1e-5, atol=1e-5 * np.abs(of_one).max())
