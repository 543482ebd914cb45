"""Folders of images: what their sub-folders are taken for, what is refused, and that no file is in a dataset twice."""

import os
from collections import Counter
from pathlib import Path

import pytest

from dist_contrastive.config import UserError
from dist_contrastive.data.folders import TEST_SHARE, Role, split_role
from dist_contrastive.data.format import NO_LABEL, TEST, TRAIN
from dist_contrastive.data.packing import choose_test
from dist_contrastive.data.sources import Source, open_source


def make_files(folder: Path, *names: str) -> Path:
    """Files that a source lists, of their names' kinds; a name that ends in a slash is an empty folder."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(name.encode())
    return folder


def cats_and_dogs(*folders: str, num: int = 1) -> list[str]:
    return [f"{folder}/{name}/{n}.jpg" for folder in folders for name in ("cat", "dog") for n in range(num)]


def folder_source(folder: Path, kind: str = "folder") -> Source:
    return open_source(f"{kind}:{folder}")


def names(source: Source, split: int | None) -> list[str]:
    return [sample.name for sample in source.samples if sample.split == split]


# ---- which part of a folder without splits is held out


def test_a_part_of_each_class_is_held_out_where_there_are_no_splits(tmp_path: Path) -> None:
    make_files(tmp_path, *(f"{name}/{number}.jpg" for name in ("dog", "cat") for number in range(40)), "one/alone.jpg")
    source = folder_source(tmp_path)
    assert source.classes == ("cat", "dog", "one")
    assert source.split_note == "15 % of each class held out for test by a hash of the path"
    assert [sample.split for sample in source.samples] == [None] * 81
    counts = Counter(source.samples[index].label for index in choose_test(source.samples))
    assert counts == {0: round(TEST_SHARE * 40), 1: round(TEST_SHARE * 40)}
    assert len({sample.name for sample in source.samples}) == 81
    assert all(sample.image == tmp_path / sample.name for sample in source.samples)


def test_the_choice_is_the_same_wherever_the_folder_lies_and_whatever_is_beside(tmp_path: Path) -> None:
    files = [f"{name}/{number}.jpg" for name in ("a", "b") for number in range(20)]
    first = folder_source(make_files(tmp_path / "first", *files))
    second = folder_source(make_files(tmp_path / "second", *reversed(files), "c/1.jpg", "c/2.jpg"))
    chosen = [[source.samples[index].name for index in choose_test(source.samples)] for source in (first, second)]
    assert chosen[0] == [name for name in chosen[1] if not name.startswith("c/")]
    # Written down, because a test split that changes between versions would leak into what was trained on.
    assert chosen[0][:3] == ["a/0.jpg", "a/19.jpg", "a/5.jpg"]


# ---- folders that are understood


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train", "test"), ("train", "val"), ("train", "valid"), ("Train", "Test"), ("TRAIN", "VAL"), ("training", "testing"),
        ("Training", "Validation"), ("trn", "tst"), ("train", "dev"), ("train", "eval"), ("train2017", "val2017"),
        ("train_set", "test_set"), ("trainset", "testset"), ("training_set", "test_set"), ("TrainingData", "TestData"),
        ("train-images", "test-images"), ("images_train", "images_val"), ("seg_train", "seg_test"), ("trainval", "test"),
        ("ILSVRC2012_img_train", "ILSVRC2012_img_val"), ("train", "holdout"), ("train_data", "evaluation"),
    ],
)  # fmt: skip
def test_splits_are_known_by_what_people_call_them(tmp_path: Path, train: str, test: str) -> None:
    make_files(tmp_path, *cats_and_dogs(train, test), f"{test}/bird/2.jpg", "README.md", "labels.csv", "meta/notes.txt")
    source = folder_source(tmp_path)
    assert source.classes == ("bird", "cat", "dog")
    assert names(source, TRAIN) == [f"{train}/cat/0.jpg", f"{train}/dog/0.jpg"]
    assert names(source, TEST) == [f"{test}/bird/2.jpg", f"{test}/cat/0.jpg", f"{test}/dog/0.jpg"]
    assert [sample.label for sample in source.samples] == [1, 2, 0, 1, 2]
    assert all(sample.image == tmp_path / sample.name for sample in source.samples)
    assert source.split_note == f"train from {train}/, test from {test}/"


@pytest.mark.parametrize(
    ("files", "note"),
    [
        (cats_and_dogs("train", "val", "test"), "train from train/, test from test/; not used: val/ (test/ is there)"),
        (
            [*cats_and_dogs("train", "val"), "test/1.jpg"],
            "train from train/, test from val/; not used: test/ (no class folders)",
        ),
        (
            cats_and_dogs("train", "test", "extra"),
            "train from train/, test from test/; not used: extra/ (further images)",
        ),
        (
            [*cats_and_dogs("train", "test"), "unlabeled/1.jpg", "logo.png"],
            "train from train/, test from test/; not used: unlabeled/ (further images), 1 image(s) beside the splits",
        ),
        (
            [*cats_and_dogs("train", "test"), "train+unlabeled/1.jpg"],
            "train from train/, test from test/; not used: train+unlabeled/ (further images)",
        ),
        (cats_and_dogs("data/train", "data/test"), "train from data/train/, test from data/test/"),
        (cats_and_dogs("a/b/Train", "a/b/Test"), "train from a/b/Train/, test from a/b/Test/"),
        (cats_and_dogs("train/images", "test/images"), "train from train/images/, test from test/images/"),
        (
            cats_and_dogs("seg_train/seg_train", "seg_test/seg_test"),
            "train from seg_train/seg_train/, test from seg_test/seg_test/",
        ),
    ],
)
def test_one_split_serves_as_test_and_the_note_says_which(tmp_path: Path, files: list[str], note: str) -> None:
    source = folder_source(make_files(tmp_path, *files))
    assert source.classes == ("cat", "dog")
    assert source.split_note == note
    assert (len(names(source, TRAIN)), len(names(source, TEST)), len(names(source, None))) == (2, 2, 0)


@pytest.mark.parametrize("others", [[], ["test/unknown.jpg"], ["test/"], ["annotations/a.xml"]])
def test_train_alone_is_split(tmp_path: Path, others: list[str]) -> None:
    source = folder_source(make_files(tmp_path, *cats_and_dogs("train", num=4), *others))
    assert source.classes == ("cat", "dog")
    assert source.split_note.startswith("15 % of each class in train/ held out for test")
    assert len(choose_test(source.samples)) == 2
    assert len(source.samples) == 8


@pytest.mark.parametrize("beside", ["bus", "bullet_train", "Car"])
def test_a_vehicle_called_train_is_a_class(tmp_path: Path, beside: str) -> None:
    source = folder_source(make_files(tmp_path, "train/1.jpg", f"{beside}/1.jpg", "ship/1.jpg"))
    assert source.classes == tuple(sorted(("train", beside, "ship")))
    assert source.split_note == "15 % of each class held out for test by a hash of the path"


@pytest.mark.parametrize(
    "classes",
    [
        ("bullet_train", "truck"), ("test_tube", "beaker", "flask"), ("validator", "trainer"), ("0", "1", "2"),
        ("n01443537", "n01629819"), ("setter", "retriever"), ("exam", "dataset"),
    ],
)  # fmt: skip
def test_names_that_only_sound_like_splits_are_classes(tmp_path: Path, classes: tuple[str, ...]) -> None:
    source = folder_source(make_files(tmp_path, *(f"{name}/images/{n}.jpg" for name in classes for n in range(2))))
    assert source.classes == tuple(sorted(classes))


@pytest.mark.parametrize(
    ("files", "kind", "splits", "note"),
    [
        (["1.jpg", "2.png", "notes.txt"], "folder", {None: 2}, "no labels: the images lie in one folder"),
        (["cat/1.jpg", "cat/2.jpg"], "folder", {None: 2}, "no labels: all images lie in one folder, cat/"),
        (["a/b/c/1.jpg", "a/b/c/2.jpg"], "folder", {None: 2}, "no labels: all images lie in one folder, a/b/c/"),
        (["images/1.jpg", "labels/1.txt"], "folder", {None: 1}, "no labels: all images lie in one folder, images/"),
        (["train/1.jpg", "test/2.jpg"], "folder", {TRAIN: 1, TEST: 1}, "no labels: train/ has no class folders"),
        (["train/1.jpg"], "folder", {None: 1}, "no labels: train/ has no class folders"),
        (
            ["train2017/1.jpg", "val2017/2.jpg", "annotations/instances.json"], "folder", {TRAIN: 1, TEST: 1},
            "train from train2017/, test from val2017/; no labels: train2017/ has no class folders",
        ),
        (
            ["train/images/1.jpg", "train/labels/1.txt", "valid/images/2.jpg", "valid/labels/2.txt"], "folder",
            {TRAIN: 1, TEST: 1}, "train from train/images/, test from valid/images/",
        ),
        (["train/cat/1.jpg", "test/cat/2.jpg"], "folder", {TRAIN: 1, TEST: 1}, "train/ has one class folder only"),
        (["1.jpg", "a/2.jpg", "a/b/3.jpg", "train/4.jpg"], "images", {None: 4}, "no labels: as asked for"),
        (cats_and_dogs("train", "test"), "images", {None: 4}, "no labels: as asked for"),
        (["2019/1.jpg", "2020/2.jpg"], "images", {None: 2}, "no labels: as asked for"),
    ],
)  # fmt: skip
def test_images_without_classes_are_a_dataset_without_labels(
    tmp_path: Path, files: list[str], kind: str, splits: dict[int | None, int], note: str
) -> None:
    source = folder_source(make_files(tmp_path, *files), kind)
    assert source.classes == ()
    assert {sample.label for sample in source.samples} == {NO_LABEL}
    found = Counter(sample.split for sample in source.samples if not sample.name.endswith(".txt"))
    assert found == splits
    assert note in source.split_note


@pytest.mark.parametrize(
    "files",
    [
        cats_and_dogs("fold1", "fold2"), ["train/1.jpg", "bus/x/2.jpg", "car/3.jpg"], cats_and_dogs("train", "bus"),
        ["cat/2019/1.jpg", "cat/2020/1.jpg", "dog/2019/1.jpg", "dog/2020/1.jpg"], ["test/1.jpg", "cat/1.jpg", "stray.jpg"],
    ],
)  # fmt: skip
def test_classes_can_be_asked_for_whatever_the_folders_look_like(tmp_path: Path, files: list[str]) -> None:
    source = folder_source(make_files(tmp_path, *files), "classes")
    assert source.classes == tuple(sorted({name.partition("/")[0] for name in files if "/" in name}))
    assert len(source.samples) == sum("/" in name for name in files)


def test_nested_files_count_and_hidden_ones_do_not(tmp_path: Path) -> None:
    make_files(
        tmp_path, "a/x/deep/1.jpg", "a/2.jpg", "b/3.jpg", "b/.DS_Store", ".git/config", "__MACOSX/b/3.jpg", "list.csv"
    )
    assert names(folder_source(tmp_path), None) == ["a/2.jpg", "a/x/deep/1.jpg", "b/3.jpg"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train", (Role.TRAIN, "")), ("Test-Images", (Role.TEST, "")), ("valData", (Role.VAL, "")), ("val", (Role.VAL, "")),
        ("DEV", (Role.VAL, "")), ("unlabeled2017", (Role.EXTRA, "")), ("train_val", (Role.TRAIN, "")),
        ("seg_pred", (None, "seg pred")), ("testA", (Role.TEST, "a")), ("test-dev", (Role.UNCLEAR, "")),
        ("trainer", (None, "trainer")), ("contest", (None, "contest")), ("7", (None, "")),
    ],
)  # fmt: skip
def test_roles_are_read_word_by_word(name: str, expected: tuple[Role | None, str]) -> None:
    assert split_role(name) == expected


# ---- folders that are refused


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], ["holds no images"]),
        (["README.md", "a/notes.txt"], ["holds no images"]),
        (["a/1.jpg", "b/2.jpg", "c/.hidden"], ["/c holds no images"]),
        (["a/1.jpg", "b/"], ["/b holds no images"]),
        (["1.jpg", "cat/2.jpg", "dog/3.jpg"], ["1 images beside folders", "cat/, dog/", "classes:", "images:"]),
        (["train/1.jpg", "train/cat/2.jpg", "train/dog/3.jpg"], ["train/ holds 1 images beside", "train/cat/"]),
        (cats_and_dogs("data"), ["data/ is the only folder", "folder:", "images:"]),
        (["cat/1.jpg", "cat/2019/1.jpg"], ["cat/ is the only folder", "images:"]),
        # splits that are not understood
        (cats_and_dogs("fold1", "fold2", "fold3"), ["fold1/, fold2/, fold3/", "classes:"]),
        (["part1/1.jpg", "part2/2.jpg"], ["part1/, part2/"]),
        (cats_and_dogs("2019", "2020"), ["2019/, 2020/", "cat, dog"]),
        (cats_and_dogs("photo", "sketch", "cartoon"), ["cartoon/, photo/, sketch/", "cat, dog"]),
        (cats_and_dogs("train/fold1", "train/fold2"), ["fold1/, train/fold2/"]),
        (["bottle/train/good/1.jpg", "bottle/test/bad/1.jpg", "cable/train/good/1.jpg"], ["bottle/", "train/"]),
        (["cat/train/1.jpg", "cat/test/1.jpg", "dog/train/1.jpg", "dog/test/1.jpg"], ["cat/train/", "splits of its own"]),
        (["trainA/1.jpg", "trainB/1.jpg", "testA/1.jpg", "testB/1.jpg"], ["testA/, testB/, trainA/, trainB/"]),
        ([*cats_and_dogs("seg_train", "seg_test"), "seg_pred/1.jpg"], ["seg_test/, seg_train/"]),
        (cats_and_dogs("tr", "te"), ["te/, tr/", "if they are splits, call them train and test", "classes:"]),
        # folders that hold no class
        (["images/1.jpg", "masks/1.png"], ["images/, masks/", "not named like a class", "for images/ alone: folder:"]),
        (["rgb/1.jpg", "Labels/1.png"], ["Labels/", "classes:"]),
        (["train/img/1.jpg", "train/annotations/1.png"], ["train/annotations/, train/img/", "for train/img/ alone"]),
        # splits beside classes, or twice
        (cats_and_dogs("train", "bus"), ["train/", "bus/"]),
        ([*cats_and_dogs("train", "test"), "masks/1.png"], ["test/, train/", "masks/"]),
        (["test/1.jpg", "cat/1.jpg", "dog/1.jpg"], ["test/", "cat/, dog/", "classes:"]),
        (["valid/1.jpg", "invalid/1.jpg"], ["valid/", "invalid/"]),
        (["train/1.jpg", "test/1.jpg", "bus/1.jpg"], ["test/, train/", "bus/"]),
        (cats_and_dogs("Train", "train", "test"), ["Train/ and train/"]),
        (cats_and_dogs("train", "val", "valid"), ["val/ and valid/"]),
        (cats_and_dogs("train", "test", "testing"), ["test/ and testing/"]),
        (cats_and_dogs("train", "test-dev"), ["test-dev/", "several splits"]),
        # a split is missing, or has other classes
        (cats_and_dogs("test"), ["test/ and no training split", "folder:", "/test"]),
        (cats_and_dogs("val", "test"), ["test/, val/ and no training split"]),
        (
            [*cats_and_dogs("train"), "test/unknown/1.jpg", "test/other/1.jpg"],
            ["no class of train/", "test/other/", "for train/ alone: folder:"],
        ),
        ([*cats_and_dogs("train"), "test/Cat/1.jpg", "test/dog/1.jpg"], ["train/cat and test/Cat"]),
        ([*cats_and_dogs("test"), "train/cat/1.jpg"], ["train/ has one class folder only (cat)", "test/"]),
    ],
)  # fmt: skip
def test_what_is_not_clear_is_refused_with_the_folders_names(
    tmp_path: Path, files: list[str], words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        folder_source(make_files(tmp_path, *files))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("files", [["1.jpg"], ["a/1.jpg"], []])
def test_classes_need_two_folders(tmp_path: Path, files: list[str]) -> None:
    with pytest.raises(UserError, match="images"):
        folder_source(make_files(tmp_path, *files), "classes")


# ---- links, and one file under several names


def test_links_to_folders_outside_are_followed_but_not_in_a_circle(tmp_path: Path) -> None:
    make_files(tmp_path, "data/a/1.jpg", "data/b/2.jpg", "elsewhere/3.jpg")
    (tmp_path / "data/a/loop").symlink_to(tmp_path / "data/a")
    (tmp_path / "data/b/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/b/itself").symlink_to(tmp_path / "data/b/itself")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "data/b/pipe.jpg").symlink_to(tmp_path / "pipe")
    source = folder_source(tmp_path / "data")
    assert {sample.name for sample in source.samples} == {"a/1.jpg", "b/2.jpg", "b/link/3.jpg", "b/itself"}
    assert [found.name for found in source.left_out] == ["a/loop", "b/link/back"]


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("data/cat/up", "data"), ("data/cat/up", "."), ("data/cat/up", "data/dog"), ("data/cat/x/up", "data/dog"),
        ("data/cat/up.jpg", "data/dog/1.jpg"), ("outside/up", "data/dog"), ("outside/up.jpg", "data/dog/1.jpg"),
        ("outside/up", "."),
    ],
)  # fmt: skip
def test_a_link_brings_no_image_of_another_class(tmp_path: Path, link: str, target: str) -> None:
    make_files(
        tmp_path,
        "data/cat/0.jpg",
        "data/cat/x/2.jpg",
        "data/dog/1.jpg",
        "data/dog/y/3.jpg",
        "other/4.jpg",
        "outside/5.jpg",
    )
    (tmp_path / "data/cat/outside").symlink_to(tmp_path / "outside")
    (tmp_path / link).symlink_to(tmp_path / target)
    source = folder_source(tmp_path / "data")
    assert source.classes == ("cat", "dog")
    assert {(sample.name, sample.label) for sample in source.samples} == {
        ("cat/0.jpg", 0), ("cat/x/2.jpg", 0), ("cat/outside/5.jpg", 0), ("dog/1.jpg", 1), ("dog/y/3.jpg", 1),
    }  # fmt: skip
    (left_out,) = source.left_out
    assert left_out.name == link.replace("outside", "data/cat/outside", 1).removeprefix("data/")
    assert (Path(target).name or str(tmp_path)) in left_out.reason


@pytest.mark.parametrize(
    ("files", "links", "words"),
    [
        # two links to one place outside
        (
            ["data/a/1.jpg", "data/b/2.jpg", "pool/3.jpg"], {"data/a/l": "pool", "data/b/l": "pool"},
            ["a/l and b/l", "two classes"],
        ),
        (
            ["data/a/1.jpg", "data/b/2.jpg", "pool/sub/3.jpg"], {"data/a/l": "pool/sub", "data/b/l": "pool"},
            ["a/l and b/l/sub", "two classes"],
        ),
        (
            ["data/a/1.jpg", "data/b/2.jpg", "pool/3.jpg"], {"data/a/l.jpg": "pool/3.jpg", "data/b/l.jpg": "pool/3.jpg"},
            ["a/l.jpg and b/l.jpg", "two classes"],
        ),
        (
            [*cats_and_dogs("data/train", "data/test"), "pool/3.jpg"],
            {"data/train/cat/l": "pool", "data/test/cat/l.jpg": "pool/3.jpg"},
            ["test/cat/l.jpg and train/cat/l/3.jpg", "to test on"],
        ),
        # a class folder or a split that is a link to another
        (["data/cat/1.jpg", "data/dog/2.jpg"], {"data/kitty": "data/cat"}, ["kitty", "cat"]),
        (cats_and_dogs("data/train"), {"data/test": "data/train"}, ["test", "train"]),
        (cats_and_dogs("data/train", "data/test"), {"data/test/bird": "data/train/cat"}, ["test/bird", "train/cat"]),
        (["data/cat/1.jpg", "data/dog/2.jpg"], {"data/all": "."}, ["all"]),
    ],
)  # fmt: skip
def test_one_file_in_two_places_is_refused(
    tmp_path: Path, files: list[str], links: dict[str, str], words: list[str]
) -> None:
    make_files(tmp_path, *files)
    for link, target in links.items():
        (tmp_path / link).symlink_to(tmp_path / target)
    with pytest.raises(UserError) as caught:
        folder_source(tmp_path / "data")
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ("cat/1.jpg", "dog/2.jpg", "in two classes"),
        ("train/cat/1.jpg", "train/dog/2.jpg", "in two classes"),
        ("train/cat/1.jpg", "test/cat/2.jpg", "to train on and to test on"),
    ],
)
def test_a_hard_link_across_classes_or_splits_is_refused(tmp_path: Path, first: str, second: str, words: str) -> None:
    base = cats_and_dogs("train", "test") if "/cat" in first else ["cat/0.jpg", "dog/0.jpg"]
    make_files(tmp_path, *base, first)
    (tmp_path / second).hardlink_to(tmp_path / first)
    with pytest.raises(UserError, match=f"are the same images, {words}") as caught:
        folder_source(tmp_path)
    assert first in str(caught.value)
    assert second in str(caught.value)


def test_a_second_name_of_a_file_in_one_class_is_left_out(tmp_path: Path) -> None:
    """Otherwise one of them could be held out for test and the other trained on."""
    make_files(tmp_path, "cat/1.jpg", "cat/2.jpg", "dog/3.jpg", "dog/4.jpg")
    (tmp_path / "cat/copy.jpg").hardlink_to(tmp_path / "cat/2.jpg")
    (tmp_path / "dog/a.jpg").symlink_to(tmp_path / "dog/4.jpg")
    for kind in ("folder", "images"):
        source = folder_source(tmp_path, kind)
        assert {sample.name for sample in source.samples} == {"cat/1.jpg", "cat/2.jpg", "dog/3.jpg", "dog/4.jpg"}
        assert {(found.name, found.reason) for found in source.left_out} == {
            ("cat/copy.jpg", "the same file as cat/2.jpg"), ("dog/a.jpg", "the same file as dog/4.jpg"),
        }  # fmt: skip


def test_links_as_class_folders_and_files_are_a_dataset(tmp_path: Path) -> None:
    """How subsets are made: links to images elsewhere, each in one class."""
    make_files(tmp_path, "pool/1.jpg", "pool/2.jpg", "birds/3.jpg")
    (tmp_path / "data/cat").mkdir(parents=True)
    (tmp_path / "data/dog").mkdir()
    (tmp_path / "data/cat/1.jpg").symlink_to(tmp_path / "pool/1.jpg")
    (tmp_path / "data/dog/2.jpg").symlink_to(tmp_path / "pool/2.jpg")
    (tmp_path / "data/bird").symlink_to(tmp_path / "birds")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    source = folder_source(tmp_path / "link")
    assert source.classes == ("bird", "cat", "dog")
    assert [sample.name for sample in source.samples] == ["bird/3.jpg", "cat/1.jpg", "dog/2.jpg"]
    assert source.left_out == ()


def test_folders_that_link_to_one_another_are_read_once_each(tmp_path: Path) -> None:
    """Twelve outside folders with links to all others: followed along every path there would be 12! of them."""
    make_files(tmp_path, "data/a/1.jpg", "data/b/2.jpg", *(f"pool/{n}/{n}.jpg" for n in range(12)))
    for n in range(12):
        for other in range(12):
            (tmp_path / f"pool/{n}/to{other}").symlink_to(tmp_path / f"pool/{other}")
    (tmp_path / "data/a/pool").symlink_to(tmp_path / "pool")
    source = folder_source(tmp_path / "data")
    assert len(source.samples) == 14
