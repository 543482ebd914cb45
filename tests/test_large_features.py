"""Features of any number: what is held of them and where, and that neither pieces nor ranks change a score."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_contrastive import distributed
from dist_contrastive.config import DataConfig, EncoderConfig
from dist_contrastive.data.beton import open_dataset
from dist_contrastive.evaluation import chunks, features, knn, linear
from dist_contrastive.evaluation.features import extract, raw_pixels
from dist_contrastive.evaluation.knn import knn_predict
from dist_contrastive.evaluation.linear import fit_logistic, linear_probe
from dist_contrastive.models.base import Encoder
from dist_contrastive.models.drop_path import PassKeys
from dist_contrastive.step.memory import TensorCount
from tests.betons import open_loader, picture, write_beton
from tests.harness import run_ranks
from tests.test_linear import problem

CPU = torch.device("cpu")
CLASSES = 4
NUM_IMAGES, WIDE, BATCH = 90, 16384, 6


def wide_encoder() -> Encoder:
    """Of images of 8 px; it has far more features than an image has pixels."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(192, WIDE))
    return Encoder(body, WIDE, EncoderConfig(), 8, patch_embedding=None, pass_keys=PassKeys())


def extract_on_rank(rank: int, path: Path) -> tuple[np.ndarray, int]:
    """The features, and how many bytes of tensors were held at once."""
    features.BATCH_SIZE = BATCH
    distributed.PIECE_BYTES = 4 * WIDE * BATCH
    encoder = wide_encoder()
    with open_loader(open_dataset(path), DataConfig(image_size=8)) as loader, TensorCount() as held:
        found = extract(encoder, loader, np.arange(NUM_IMAGES), CPU)
    return found.numpy(), held.peak


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_rank_0_alone_holds_all_features_and_once(tmp_path: Path, num_ranks: int) -> None:
    path = write_beton(tmp_path / "x.beton", [picture(8, 8, seed) for seed in range(NUM_IMAGES)])
    with open_loader(open_dataset(path), DataConfig(image_size=8)) as loader:
        expected = extract(wide_encoder(), loader, np.arange(NUM_IMAGES), CPU).numpy()
    (whole, peak), *others = run_ranks(extract_on_rank, num_ranks, path)
    np.testing.assert_allclose(whole, expected, rtol=1e-4, atol=1e-5)
    few_batches = 4 * 4 * WIDE * BATCH
    assert whole.nbytes <= peak <= whole.nbytes + few_batches
    for found, peak in others:
        assert found.shape == (0, WIDE)
        assert peak <= whole.nbytes / num_ranks + few_batches


def pixels() -> tuple[Tensor, Tensor]:
    """Bytes uint8 [N, 256] of overlapping classes, and the classes [N]."""
    x, y = problem(6000, size=256)
    low, high = x.amin(0), x.amax(0)
    return ((x - low) / (high - low) * 255).round().to(torch.uint8), y


def probe(x: Tensor, y: Tensor) -> object:
    return linear_probe(x, y, x[:500], y[:500], strengths=[1e-2, 1e-3])


def neighbours(x: Tensor, y: Tensor) -> object:
    return knn_predict(x, y, x[:500], num_classes=CLASSES, ks=[1, 20], temperature=0.1)


@pytest.mark.parametrize("score", [probe, neighbours])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_a_score_holds_pieces_and_no_copy_of_the_features(
    score: Callable[[Tensor, Tensor], object], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = pixels()
    monkeypatch.setitem(chunks.CHUNK_BYTES, "cpu", 1 << 17)
    monkeypatch.setattr(linear, "DIRECTION_SAMPLES", 0)
    monkeypatch.setattr(linear, "DIRECTION_SAMPLES_PER_FEATURE", 1)
    monkeypatch.setattr(knn, "CHUNK_VALUES", 1 << 14)
    x = x.to(dtype)
    with TensorCount() as held:
        score(x, y)
    pieces = held.peak
    assert pieces < 4 * x.numel() / 3, "beyond the features that were there, less than a third of them as floats"
    thrice, labels = x.repeat(3, 1), y.repeat(3)
    with TensorCount() as held:
        score(thrice, labels)
    # Some numbers of each sample: its label, whether it counts, its class as predicted, and the places of all of them.
    assert held.peak - pieces < 2 * len(x) * 64


def test_the_fit_does_not_depend_on_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = problem(700)
    whole = fit_logistic(x, y, num_classes=CLASSES, strength=1e-3, tolerance=1e-7)
    monkeypatch.setitem(chunks.CHUNK_BYTES, "cpu", 4 * 20 * 33)
    pieces = fit_logistic(x, y, num_classes=CLASSES, strength=1e-3, tolerance=1e-7)
    assert pieces.objective == pytest.approx(whole.objective, rel=1e-6)
    assert (pieces.predict(x) == whole.predict(x)).double().mean() >= 0.998


def test_samples_that_do_not_count_have_no_say() -> None:
    x, y = problem(700)
    x = x.double()
    kept = torch.rand(700, generator=torch.Generator().manual_seed(0)) < 0.6
    alone = fit_logistic(x[kept], y[kept], num_classes=CLASSES, strength=1e-3, tolerance=1e-10)
    x[~kept] = 1e3
    among = fit_logistic(x, y, kept=kept.double(), num_classes=CLASSES, strength=1e-3, tolerance=1e-10)
    assert among.objective == pytest.approx(alone.objective, rel=1e-9)
    torch.testing.assert_close(among.weight, alone.weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("shift", [1e3, 3e4])
def test_a_mean_far_from_zero_costs_no_digits(shift: float) -> None:
    """Of features as float32 knows them."""
    x, y = problem(700)
    shifted = x + shift
    exact = fit_logistic(shifted.double(), y, num_classes=CLASSES, strength=1e-3, tolerance=1e-9)
    single = fit_logistic(shifted, y, num_classes=CLASSES, strength=1e-3, tolerance=1e-6)
    assert single.objective == pytest.approx(exact.objective, rel=1e-5)


def test_bytes_score_as_their_values_do() -> None:
    x, y = pixels()
    assert fit_logistic(x, y, num_classes=CLASSES, strength=1e-2).objective == pytest.approx(
        fit_logistic(x / 255, y, num_classes=CLASSES, strength=1e-2).objective, rel=1e-5
    )
    of_bytes, of_values = (
        knn_predict(part, y, part[:200], num_classes=CLASSES, ks=[5], temperature=0.1)[5] for part in (x, x / 255)
    )
    assert (of_bytes == of_values).double().mean() >= 0.99


@pytest.mark.parametrize("values", [1 << 6, 1 << 9, 1 << 24])
def test_neighbours_do_not_depend_on_the_pieces(values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of features whose cosines are exact and mostly equal to others'."""
    generator = torch.Generator().manual_seed(0)
    bank, queries = (torch.randint(2, (n, 16), generator=generator).float() * 2 - 1 for n in (300, 70))
    y = torch.randint(CLASSES, (300,), generator=generator)
    monkeypatch.setattr(knn, "CHUNK_VALUES", values)
    similarity, places = knn._nearest_of_all(F.normalize(queries), bank, 50, max(1, values // 64))
    order = (queries @ bank.T).sort(dim=1, descending=True, stable=True)
    assert torch.equal(places, order.indices[:, :50])
    assert torch.equal(similarity, order.values[:, :50] / 16)
    found = knn_predict(bank, y, queries, num_classes=CLASSES, ks=[1, 7, 50], temperature=0.1)
    for k, classes in found.items():
        weights = (order.values[:, :k].double() / 16 / 0.1).exp()
        votes = torch.zeros(70, CLASSES, dtype=torch.float64).scatter_add_(1, y[order.indices[:, :k]], weights)
        assert torch.equal(classes, (votes >= votes.amax(1, keepdim=True) * (1 - 1e-9)).int().argmax(1))


def test_raw_pixels_are_the_images_bytes(tmp_path: Path) -> None:
    images = [picture(8, 8, seed) for seed in range(7)]
    with open_loader(open_dataset(write_beton(tmp_path / "x.beton", images)), DataConfig(image_size=8)) as loader:
        found = raw_pixels(loader, np.array([5, 0, 3]), 8)
    assert torch.equal(found, torch.from_numpy(np.stack([images[i].reshape(-1) for i in (5, 0, 3)])))
