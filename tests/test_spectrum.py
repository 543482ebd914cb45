"""Spectra, effective rank and positive cosine against their definitions."""

import math

import numpy as np
import pytest
import torch

from dist_contrastive.losses.statistics import (
    alignment,
    covariance_spectrum,
    effective_rank,
    positive_cosine,
    uniformity,
)


@pytest.mark.parametrize("shape", [(50, 8), (8, 50), (1, 4), (16, 16)])
def test_covariance_spectrum_is_that_of_numpys_covariance(shape):
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 3.0
    expected = np.linalg.eigvalsh(np.cov(z.double().numpy().T, bias=True).reshape(shape[1], shape[1]))[::-1]
    got = covariance_spectrum(z)
    assert got.shape == (shape[1],)
    assert torch.all(got[:-1] >= got[1:])
    assert got.min() >= 0
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-10)


@pytest.mark.parametrize("shape", [(60, 12), (12, 60)])
def test_effective_rank_is_the_exponential_of_the_singular_values_entropy(shape):
    z = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    p = np.linalg.svd(z.double().numpy(), compute_uv=False)
    p /= p.sum()
    assert effective_rank(z).item() == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-9)


def test_effective_rank_of_known_matrices():
    assert effective_rank(torch.eye(7)).item() == pytest.approx(7)
    assert effective_rank(torch.ones(20, 5)).item() == pytest.approx(1, abs=1e-5)
    assert effective_rank(torch.zeros(20, 5)).item() == 0
    assert effective_rank(torch.eye(7).repeat(3, 1).bfloat16()).item() == pytest.approx(7)


def test_non_finite_embeddings_give_nan():
    z = torch.randn(10, 4)
    z[3, 2] = float("nan")
    assert math.isnan(effective_rank(z))
    assert covariance_spectrum(z).isnan().all()


@pytest.mark.parametrize("num_views", [2, 3, 5])
def test_positive_cosine_is_the_mean_over_all_pairs_of_views(num_views):
    z = torch.randn(num_views, 9, 6, generator=torch.Generator().manual_seed(2))
    pairs = [
        torch.cosine_similarity(z[v], z[w], dim=-1).mean() for v in range(num_views) for w in range(v + 1, num_views)
    ]
    assert positive_cosine(z).item() == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-6)


def test_positive_cosine_needs_two_views():
    with pytest.raises(ValueError, match="at least 2 views"):
        positive_cosine(torch.randn(1, 4, 3))


def test_statistics_carry_no_gradient():
    z = torch.randn(2, 5, 3, requires_grad=True)
    for value in (positive_cosine(z), effective_rank(z[0]), covariance_spectrum(z[0])):
        assert not value.requires_grad


def test_alignment_is_the_mean_squared_distance_of_views_on_the_sphere():
    z = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(2)) * torch.linspace(0.1, 4, 7)[:, None]
    unit = (z / z.norm(dim=-1, keepdim=True)).double()
    distances = [
        (unit[v, n] - unit[w, n]).square().sum().item() for v in range(3) for w in range(3) if v != w for n in range(7)
    ]
    assert alignment(z).item() == pytest.approx(np.mean(distances), rel=1e-5)
    assert alignment(z[:1].expand(2, 7, 5)).item() == pytest.approx(0, abs=1e-6)
    assert alignment(torch.stack([z[0], -z[0]])).item() == pytest.approx(4, rel=1e-6)


@pytest.mark.parametrize("num_samples", [2, 9, 1500])
def test_uniformity_is_the_log_of_the_mean_potential_of_pairs(num_samples):
    z = torch.randn(num_samples, 4, generator=torch.Generator().manual_seed(3))
    unit = (z / z.norm(dim=-1, keepdim=True)).double()
    distances = torch.pdist(unit).square()
    assert uniformity(z).item() == pytest.approx(torch.exp(-2 * distances).mean().log().item(), rel=1e-6)


def test_uniformity_of_collapse_of_opposites_and_of_one_row():
    one = torch.tensor([[3.0, 4.0]])
    assert uniformity(one).item() == 0
    assert uniformity(one.expand(50, 2)).item() == pytest.approx(0, abs=1e-9)
    assert uniformity(torch.cat([one, -one])).item() == pytest.approx(-8, rel=1e-6)
