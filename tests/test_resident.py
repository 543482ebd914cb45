"""The loader that keeps the images on the device gives what the loader gives that reads the file."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_contrastive.batch import Batch, Share
from dist_contrastive.config import AugmentConfig, DataConfig, UserError, ViewConfig
from dist_contrastive.data import resident
from dist_contrastive.data.beton import Dataset, open_dataset
from dist_contrastive.data.loader import Loader
from dist_contrastive.data.resident import ResidentLoader, loader_of
from dist_contrastive.run import train
from tests.betons import jpeg, picture, write_beton
from tests.runs import tiny_config, write_dataset

SHAPES = [(32, 32), (48, 31), (64, 200), (5, 90), (1, 1), (7, 1), (150, 120), (33, 47), (1, 9), (16, 16)]
DATA = DataConfig(image_size=24)
CROPS = AugmentConfig(
    (
        ViewConfig(count=2),
        ViewConfig(count=2, size=5, crop_scale=(0.05, 0.4)),
        ViewConfig(size=64, crop_ratio=(0.5, 2.0)),
        ViewConfig(size=1),
    )
)
CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Pictures of all shapes, every third stored as a JPEG."""
    pictures = [picture(*SHAPES[i % len(SHAPES)], seed=i) for i in range(53)]
    stored = [jpeg(image) if i % 3 == 0 else image for i, image in enumerate(pictures)]
    return open_dataset(write_beton(tmp_path_factory.mktemp("mixed") / "mixed.beton", stored, num_test=7))


def both(dataset: Dataset, device: str, **options: Any) -> tuple[Loader, Loader]:
    settings: dict[str, Any] = {"seed": 3, "share": Share(12), "threads": 2, **options}
    return (
        Loader(dataset, DATA, CROPS, **settings),
        ResidentLoader(dataset, DATA, CROPS, device=torch.device(device), **settings),
    )


def assert_same(found: Batch, expected: Batch, device: str) -> None:
    for ours, theirs in zip(found.views, expected.views, strict=True):
        assert ours.device.type == device
        assert ours.dtype == torch.uint8
        assert torch.equal(ours.cpu(), theirs)
    for name in ("labels", "indices"):
        assert torch.equal(getattr(found.samples, name), getattr(expected.samples, name))
    assert found.samples.epoch == expected.samples.epoch
    assert (found.draws is None) == (expected.draws is None)
    if found.draws is not None and expected.draws is not None:
        assert torch.equal(found.draws, expected.draws)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("max_values", [1, 1 << 24])
def test_epochs_are_the_same_to_the_last_pixel(
    dataset: Dataset, device: str, max_values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident, "MAX_VALUES", max_values)
    for share in (Share(12), Share(12, 1, 3)):
        read, kept = both(dataset, device, share=share)
        with read, kept:
            for epoch, start_step in ((0, 0), (5, 2)):
                batches = zip(kept.epoch(epoch, start_step), read.epoch(epoch, start_step), strict=True)
                for found, expected in batches:
                    assert_same(found, expected, device)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_passes_in_order_are_the_same_on_and_off_the_device(dataset: Dataset, device: str) -> None:
    read, kept = both(dataset, device)
    with read, kept:
        for indices in (np.arange(46), np.arange(46, 53), np.arange(40, 53)):
            on_device = device if indices.max() < 46 else "cpu"
            pairs = zip(kept.views(indices, batch_size=50), read.views(indices, batch_size=50), strict=True)
            pairs_too = zip(kept.centered(indices, batch_size=50), read.centered(indices, batch_size=50), strict=True)
            for found, expected in (*pairs, *pairs_too):
                assert_same(found, expected, on_device)


def test_what_does_not_fit_is_refused(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "_free_bytes", lambda device: 1000)
    with pytest.raises(
        UserError, match=r"^--data\.resident: the 46 training images of .* take 0\.00 GiB decoded, .* has"
    ):
        both(dataset, "cpu")


def test_a_run_takes_the_same_course(tmp_path: Path) -> None:
    """From the same seed, and resumed with the other loader."""
    losses = []
    for name, resident_first in (("read", False), ("kept", True)):
        config = replace(tiny_config(tmp_path / name, write_dataset(tmp_path)), epochs=2)
        for kept, stop in ((resident_first, 3), (not resident_first, 0)):
            data = replace(config.data, resident=kept)
            train(replace(config, data=data, stop_after_steps=stop or config.stop_after_steps))
        losses.append((config.run_dir / "metrics.jsonl").read_text())
    assert [line.split('"loss"')[1][:12] for line in losses[0].splitlines() if '"loss"' in line] == [
        line.split('"loss"')[1][:12] for line in losses[1].splitlines() if '"loss"' in line
    ]


def test_the_option_chooses_the_loader(dataset: Dataset, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, dataset.path)
    for kept in (False, True):
        chosen = replace(config, data=replace(config.data, resident=kept))
        with loader_of(chosen, dataset, Share(8), torch.device("cpu")) as loader:
            assert isinstance(loader, ResidentLoader) == kept
