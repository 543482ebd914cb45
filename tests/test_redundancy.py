"""Barlow Twins and VICReg against nested-loop pseudocode of their papers, on one rank and on several."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_contrastive import distributed
from dist_contrastive.config import EncoderConfig, UserError
from dist_contrastive.losses.redundancy import barlow_twins, vicreg
from dist_contrastive.methods.barlow import BarlowConfig
from dist_contrastive.methods.vicreg import VICRegConfig
from tests.harness import run_ranks
from tests.steps import build, share_of_batch


def barlow_reference(one: np.ndarray, other: np.ndarray, off_diagonal: float) -> float:
    """Zbontar et al. 2021, equations 1 and 2, as loops in float64 over embeddings [N, E]."""
    num_samples, size = one.shape
    a, b = ((x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) for x in (one, other))
    total = 0.0
    for i in range(size):
        for j in range(size):
            c = sum(a[n, i] * b[n, j] for n in range(num_samples)) / num_samples
            total += (1 - c) ** 2 if i == j else off_diagonal * c**2
    return float(total)


def vicreg_reference(one: np.ndarray, other: np.ndarray) -> tuple[float, float, float]:
    """Bardes et al. 2022, equations 1 to 6 (algorithm 1), as loops in float64; the three terms without weights."""
    num_samples, size = one.shape
    invariance = sum((one[n, d] - other[n, d]) ** 2 for n in range(num_samples) for d in range(size))
    variance = covariance = 0.0
    for x in (one, other):
        centred = x - x.mean(0)
        c = np.zeros((size, size))
        for n in range(num_samples):
            c += np.outer(centred[n], centred[n]) / (num_samples - 1)
        variance += sum(max(0.0, 1 - np.sqrt(c[d, d] + 1e-4)) for d in range(size)) / size
        covariance += sum(c[i, j] ** 2 for i in range(size) for j in range(size) if i != j) / size
    return float(invariance / (num_samples * size)), float(variance), float(covariance)


def embeddings(num_samples: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=generator)
    return 0.5 * torch.randn(2, num_samples, 6, generator=generator) @ mixing + shift


def test_barlow_twins_equals_the_papers_loops() -> None:
    one, other = embeddings(7).unbind(0)
    expected = barlow_reference(one.double().numpy(), other.double().numpy(), 0.1)
    assert barlow_twins(one, other, off_diagonal=0.1).item() == pytest.approx(expected, rel=1e-5)


def test_vicreg_equals_the_papers_loops() -> None:
    one, other = embeddings(7).unbind(0)
    terms = [t.item() for t in vicreg(one, other, invariance=25.0, variance=24.0, covariance=2.0)]
    invariance, variance, covariance = vicreg_reference(one.double().numpy(), other.double().numpy())
    assert terms == pytest.approx([25 * invariance, 24 * variance, 2 * covariance], rel=1e-5)
    assert all(term > 0 for term in terms)


def total_vicreg(one: Tensor, other: Tensor) -> Tensor:
    return torch.stack(vicreg(one, other, invariance=25.0, variance=25.0, covariance=1.0)).sum()


def total_barlow(one: Tensor, other: Tensor) -> Tensor:
    return barlow_twins(one, other, off_diagonal=0.0051)


LOSSES = {"barlow": total_barlow, "vicreg": total_vicreg}


@pytest.mark.parametrize("name", LOSSES)
def test_a_constant_dimension_and_a_large_mean_stay_finite_and_exact(name: str) -> None:
    z = embeddings(8)
    z[..., 0] = 3.0
    loss = LOSSES[name](*z.clone().requires_grad_().unbind(0))
    moved = (z + 100).requires_grad_()
    far = LOSSES[name](*moved.unbind(0))
    far.backward()
    assert moved.grad is not None
    assert torch.isfinite(moved.grad).all()
    assert far.item() == pytest.approx(loss.item(), rel=1e-3)


@pytest.mark.parametrize("name", LOSSES)
def test_float32_inside_autocast(name: str) -> None:
    z = embeddings(8).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = LOSSES[name](z[0], z[1])
    assert loss.dtype == torch.float32
    assert loss.item() == LOSSES[name](z[0].float(), z[1].float()).item()


def loss_of_share(rank: int, name: str, z: np.ndarray) -> tuple[float, np.ndarray]:
    """This rank's loss over its share of z [2, N, E], and the gradient at its share averaged as DDP does."""
    share = z.shape[1] // distributed.world_size()
    mine = torch.from_numpy(z[:, rank * share : (rank + 1) * share].copy()).requires_grad_()
    loss = LOSSES[name](mine[0], mine[1])
    loss.backward()
    assert mine.grad is not None
    return loss.item(), (mine.grad / distributed.world_size()).numpy()


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("name", LOSSES)
def test_ranks_give_the_loss_and_gradient_of_the_whole_batch(name: str, num_ranks: int) -> None:
    z = embeddings(8, shift=2.0).numpy()
    loss, gradient = loss_of_share(0, name, z)
    shares = run_ranks(loss_of_share, num_ranks, name, z)
    assert np.mean([share_loss for share_loss, _ in shares]) == pytest.approx(loss, rel=1e-5)
    found = np.concatenate([share for _, share in shares], axis=1)
    np.testing.assert_allclose(found, gradient, rtol=1e-4, atol=1e-5 * np.abs(gradient).max())


GROUP = EncoderConfig(name="resnet10_w16", stem="small", norm="group")


def test_the_methods_weigh_their_terms_as_the_papers_do() -> None:
    z = embeddings(8)
    one, other = z.double().numpy()
    invariance, variance, covariance = vicreg_reference(one, other)
    barlow, three_terms = build("barlow", GROUP), build("vicreg", GROUP)
    samples = share_of_batch(barlow).samples
    assert barlow.loss({"z": z}, samples)["loss"].item() == pytest.approx(
        barlow_reference(one, other, 0.0051), rel=1e-5
    )
    losses = {name: value.item() for name, value in three_terms.loss({"z": z}, samples).items()}
    expected = {"invariance": 25 * invariance, "variance": 25 * variance, "covariance": covariance}
    assert losses == pytest.approx({**expected, "loss": sum(expected.values())}, rel=1e-5)


@pytest.mark.parametrize(
    ("option", "config"),
    [
        ("off-diagonal", lambda: BarlowConfig(off_diagonal=-1.0)),
        ("invariance", lambda: VICRegConfig(invariance=-1.0)),
        ("variance", lambda: VICRegConfig(variance=-1.0)),
        ("covariance", lambda: VICRegConfig(covariance=-1.0)),
    ],
)
def test_negative_weights_are_refused(option: str, config: Callable[[], object]) -> None:
    with pytest.raises(UserError, match=f"^--method.{option} -1.0: give 0 or more"):
        config()
