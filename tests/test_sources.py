"""Sources: which samples they list and in which split; folders have test_folders."""

import hashlib
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import skimage
from PIL import Image
from torchvision.datasets import CIFAR10

from dist_contrastive.config import UserError
from dist_contrastive.data.format import TEST, TRAIN
from dist_contrastive.data.sources import PATCH_SIDE, PHOTOS, Sample, Source, open_source


def pixels(sample: Sample) -> np.ndarray:
    assert isinstance(sample.image, np.ndarray)
    return sample.image


@pytest.fixture(scope="module")
def photos() -> Source:
    return open_source("photos")


def test_photos_are_19_classes_of_400_and_100_patches(photos: Source) -> None:
    assert photos.classes == (
        "astronaut", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry", "retina", "rocket", "brick",
        "grass", "gravel", "coins", "moon", "page", "motorcycle", "text", "camera", "cell", "china", "flower",
    )  # fmt: skip
    counts = Counter((sample.split, sample.label) for sample in photos.samples)
    assert counts == {(TRAIN, label): 400 for label in range(19)} | {(TEST, label): 100 for label in range(19)}
    assert len({sample.name for sample in photos.samples}) == len(photos.samples)


def test_photos_are_the_same_patches_each_time(photos: Source) -> None:
    again = open_source("photos")
    assert [sample.name for sample in again.samples] == [sample.name for sample in photos.samples]
    assert all(np.array_equal(pixels(a), pixels(b)) for a, b in zip(again.samples, photos.samples, strict=True))


def test_photos_share_no_pixel_between_training_and_test(photos: Source) -> None:
    packages = Path(skimage.__file__).parent.parent
    for label, (name, place) in enumerate(PHOTOS.items()):
        photo = np.asarray(Image.open(packages / place).convert("RGB"))
        used = np.zeros((2, *photo.shape[:2]), bool)
        for sample in photos.samples:
            if sample.label == label:
                y, x = (int(number) for number in sample.name.removeprefix(name).split(","))
                patch = np.s_[y : y + PATCH_SIDE, x : x + PATCH_SIDE]
                assert np.array_equal(pixels(sample), photo[patch])
                used[sample.split][patch] = True
        assert not np.any(used[TRAIN] & used[TEST])
        assert not used[TRAIN][:, int(0.7 * photo.shape[1]) :].any()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("photo", "photos, cifar10"),
        ("", "photos, cifar10"),
        ("photos:here", "photos, cifar10"),
        ("folder", "photos, cifar10"),
        ("folder:", "no folder after the colon"),
        ("images:", "no folder after the colon"),
        ("classes", "photos, cifar10"),
        ("folder:/no/such/folder", "there is no folder"),
        (f"folder:{__file__}", "not a folder"),
        (str(Path(__file__).parent), "write folder:"),
    ],
)
def test_an_unknown_source_is_refused(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_source(spec)


def test_cifar10_is_read_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten images stand in for 60,000: the files are torchvision's in form, only their checksums are others."""
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()

    def write(name: str, content: dict[str, object]) -> list[str]:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    images = np.random.default_rng(0).integers(0, 256, (10, 3, 32, 32), dtype=np.uint8)
    train = write("data_batch_1", {"data": images[:8].reshape(8, -1), "labels": list(range(8))})
    test = write("test_batch", {"data": images[8:].reshape(2, -1), "labels": [9, 8]})
    meta = write("batches.meta", {"label_names": [f"class {number}" for number in range(10)]})
    monkeypatch.setattr(CIFAR10, "train_list", [train])
    monkeypatch.setattr(CIFAR10, "test_list", [test])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})

    source = open_source(f"cifar10:{tmp_path}")
    assert source.classes == tuple(f"class {number}" for number in range(10))
    assert [(sample.label, sample.split) for sample in source.samples] == [(n, TRAIN) for n in range(8)] + [
        (9, TEST), (8, TEST),
    ]  # fmt: skip
    for sample, image in zip(source.samples, images, strict=True):
        assert np.array_equal(pixels(sample), image.transpose(1, 2, 0))


def test_altered_cifar10_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / CIFAR10.base_folder).mkdir()
    (tmp_path / CIFAR10.base_folder / "data_batch_1").write_bytes(b"altered")
    with pytest.raises(UserError, match="remove it"):
        open_source(f"cifar10:{tmp_path}")


def test_a_failed_download_says_what_else_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    for name in ("no_proxy", "NO_PROXY", "HTTPS_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"can't be downloaded.*cifar-10-python.tar.gz.*folder:DIR"):
        open_source(f"cifar10:{tmp_path}")
