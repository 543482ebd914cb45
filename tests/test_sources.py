"""Sources: which samples they list, in which split, and what a user hears whose folder is not one."""

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
from dist_contrastive.data.sources import PATCH_SIDE, PHOTOS, TEST_SHARE, Sample, Source, open_source


def make_files(folder: Path, *names: str) -> Path:
    """Files that a source lists; it opens none of them."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"image")
    return folder


def folder_source(folder: Path) -> Source:
    return open_source(f"folder:{folder}")


def names(source: Source, split: int) -> list[str]:
    return [sample.name for sample in source.samples if sample.split == split]


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


def test_a_folder_of_class_folders_sets_a_part_of_each_class_aside(tmp_path: Path) -> None:
    make_files(tmp_path, *(f"{name}/{number}.jpg" for name in ("dog", "cat") for number in range(40)), "one/alone.jpg")
    source = folder_source(tmp_path)
    assert source.classes == ("cat", "dog", "one")
    counts = Counter((sample.split, sample.label) for sample in source.samples)
    num_test = round(TEST_SHARE * 40)
    assert counts == {(TRAIN, 0): 40 - num_test, (TRAIN, 1): 40 - num_test, (TRAIN, 2): 1} | {
        (TEST, 0): num_test, (TEST, 1): num_test,
    }  # fmt: skip
    assert len({sample.name for sample in source.samples}) == 81
    assert all(sample.image == tmp_path / sample.name for sample in source.samples)
    assert [sample.split for sample in source.samples] == sorted(sample.split for sample in source.samples)


def test_a_folder_is_split_the_same_wherever_it_lies_and_whatever_is_beside(tmp_path: Path) -> None:
    files = [f"{name}/{number}.jpg" for name in ("a", "b") for number in range(20)]
    first = folder_source(make_files(tmp_path / "first", *files))
    second = folder_source(make_files(tmp_path / "second", *reversed(files), "c/1.jpg", "c/2.jpg"))
    of_a_and_b = [(sample.name, sample.split) for sample in second.samples if not sample.name.startswith("c/")]
    assert [(sample.name, sample.split) for sample in first.samples] == of_a_and_b
    # Written down, because a test split that changes between versions would leak into what was trained on.
    assert names(first, TEST)[:3] == ["a/0.jpg", "a/19.jpg", "a/5.jpg"]


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_a_folder_with_splits_keeps_them(tmp_path: Path, held_out: str) -> None:
    make_files(tmp_path, "train/b/1.jpg", "train/a/1.jpg", f"{held_out}/a/2.jpg", f"{held_out}/c/3.jpg")
    source = folder_source(tmp_path)
    assert source.classes == ("a", "b", "c")
    assert names(source, TRAIN) == ["train/a/1.jpg", "train/b/1.jpg"]
    assert names(source, TEST) == [f"{held_out}/a/2.jpg", f"{held_out}/c/3.jpg"]
    assert [sample.label for sample in source.samples] == [0, 1, 0, 2]
    assert all(sample.image == tmp_path / sample.name for sample in source.samples)


def test_val_serves_where_test_has_no_class_folders(tmp_path: Path) -> None:
    make_files(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/a/2.jpg", "test/unlabelled.jpg")
    assert names(folder_source(tmp_path), TEST) == ["val/a/2.jpg"]


def test_train_alone_is_split(tmp_path: Path) -> None:
    make_files(tmp_path, *(f"train/{name}/{number}.jpg" for name in "ab" for number in range(4)))
    source = folder_source(tmp_path)
    assert source.classes == ("a", "b")
    assert len(names(source, TEST)) == 2
    assert all(sample.image == tmp_path / sample.name for sample in source.samples)


def test_nested_files_count_and_hidden_ones_do_not(tmp_path: Path) -> None:
    make_files(
        tmp_path, "a/x/deep/1.jpg", "a/2.jpg", "b/3.jpg", "b/.DS_Store", ".git/config", "__MACOSX/b/3.jpg", "list.csv"
    )
    assert names(folder_source(tmp_path), TRAIN) + names(folder_source(tmp_path), TEST) == [
        "a/x/deep/1.jpg", "b/3.jpg", "a/2.jpg",
    ]  # fmt: skip


def test_links_are_followed_but_not_in_a_circle(tmp_path: Path) -> None:
    make_files(tmp_path, "data/a/1.jpg", "data/b/2.jpg", "elsewhere/3.jpg")
    (tmp_path / "data/a/loop").symlink_to(tmp_path / "data/a")
    (tmp_path / "data/b/link").symlink_to(tmp_path / "elsewhere")
    source = folder_source(tmp_path / "data")
    assert {sample.name for sample in source.samples} == {"a/1.jpg", "b/2.jpg", "b/link/3.jpg"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no class folders"),
        (["1.jpg", "2.jpg"], "no class folders"),
        (["train/1.jpg", "test/2.jpg"], "no class folders"),
        (["a/1.jpg"], "one class only"),
        (["a/1.jpg", "b/2.jpg", "c/.hidden"], r"/c holds no images"),
    ],
)
def test_a_folder_that_is_no_dataset_is_refused(tmp_path: Path, files: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        folder_source(make_files(tmp_path, *files))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("photo", "photos, cifar10"),
        ("", "photos, cifar10"),
        ("photos:here", "photos, cifar10"),
        ("folder", "photos, cifar10"),
        ("folder:", "no folder after the colon"),
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
    make_files(tmp_path, f"{CIFAR10.base_folder}/data_batch_1")
    with pytest.raises(UserError, match="remove it"):
        open_source(f"cifar10:{tmp_path}")


def test_a_failed_download_says_what_else_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    for name in ("no_proxy", "NO_PROXY", "HTTPS_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"can't be downloaded.*cifar-10-python.tar.gz.*folder:DIR"):
        open_source(f"cifar10:{tmp_path}")
