"""Pairs of images and captions: tables and tar shards in every form, and what is wrong with one or with all of it."""

import csv
import importlib.util
import io
import json
import os
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_contrastive.config import UserError
from dist_contrastive.data.beton import Dataset, open_dataset
from dist_contrastive.data.format import TEST, TRAIN
from dist_contrastive.data.packing import write_dataset
from dist_contrastive.data.pairs import Columns
from dist_contrastive.data.sources import TEMPLATES, Source, open_source
from dist_contrastive.pack import main
from tests.betons import picture

has_pyarrow = pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed")

Row = dict[str, object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four pictures in a folder of their own."""
    (tmp_path / "images").mkdir()
    for number in range(4):
        Image.fromarray(picture(8, 8, number)).save(tmp_path / "images" / f"{number}.png")
    return tmp_path


def write_csv(path: Path, rows: Sequence[Row], *, delimiter: str = ",") -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def write_tsv(path: Path, rows: Sequence[Row]) -> None:
    write_csv(path, rows, delimiter="\t")


def write_json_lines(path: Path, rows: Sequence[Row]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_parquet(path: Path, rows: Sequence[Row]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)


WRITERS: dict[str, Callable[[Path, Sequence[Row]], None]] = {
    "csv": write_csv, "tsv": write_tsv, "jsonl": write_json_lines, "parquet": write_parquet,
}  # fmt: skip
KINDS = ["csv", "tsv", "jsonl", pytest.param("parquet", marks=has_pyarrow)]


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(8, 8, seed)).save(file, "PNG")
    return file.getvalue()


def open_pairs(path: Path | str, columns: Columns | None = None) -> Source:
    return open_source(f"pairs:{path}", columns or Columns())


def captions_of(source: Source) -> dict[str, tuple[str, ...]]:
    return {sample.name: sample.captions for sample in source.samples}


def pack(source: Source, out: Path, max_bad: int = 0) -> Dataset:
    write_dataset(source, out, max_bad=max_bad)
    return open_dataset(out)


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_of_any_kind_is_packed_with_its_captions(folder: Path, kind: str) -> None:
    rows: list[Row] = [{"image": f"images/{n}.png", "caption": f'№ {n}, "日本語"\tà côté'} for n in range(4)]
    WRITERS[kind](folder / f"list.{kind}", rows)
    dataset = pack(open_pairs(folder / f"list.{kind}"), folder / "x.beton")
    assert dataset.captions is not None
    assert [dataset.captions.texts(n) for n in range(4)] == [[row["caption"]] for row in rows]
    assert dataset.manifest.classes == ()
    assert (dataset.manifest.num_train, dataset.manifest.num_test) == (3, 1)
    assert np.array_equal(dataset.file_bytes[dataset.pointers[2] :][: 8 * 8 * 3], picture(8, 8, 2).ravel())


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_one_image_are_one_sample_with_several_captions(folder: Path, kind: str) -> None:
    (folder / "link.png").symlink_to(folder / "images" / "0.png")
    WRITERS[kind](
        folder / f"list.{kind}",
        [
            {"file_name": "images/0.png", "text": "one"},
            {"file_name": "images/1.png", "text": "other"},
            {"file_name": "./images/../images/0.png", "text": "two"},
            {"file_name": "images/0.png", "text": "one"},
            {"file_name": str(folder / "link.png"), "text": " three "},
        ],
    )
    source = open_pairs(folder / f"list.{kind}")
    assert captions_of(source) == {"images/0.png": ("one", "two", "three"), "images/1.png": ("other",)}


def test_several_columns_are_several_captions(folder: Path) -> None:
    rows: list[Row] = [
        {"path": "images/0.png", "caption_1": "a", "Caption 2": "b", "title": "c", "note": "no caption"},
        {"path": "images/1.png", "caption_1": "d", "Caption 2": "", "title": "d", "note": ""},
    ]
    write_csv(folder / "list.csv", rows)
    assert list(captions_of(open_pairs(folder / "list.csv")).values()) == [("a", "b", "c"), ("d",)]
    chosen = open_pairs(folder / "list.csv", Columns("path", ("title",)))
    assert list(captions_of(chosen).values()) == [("c",), ("d",)]


@pytest.mark.parametrize("kind", ["jsonl", pytest.param("parquet", marks=has_pyarrow)])
def test_a_list_of_captions_is_several_captions(folder: Path, kind: str) -> None:
    rows: list[Row] = [{"image": "images/0.png", "captions": ["a", "b"]}, {"image": "images/1.png", "captions": ["c"]}]
    WRITERS[kind](folder / f"list.{kind}", rows)
    assert list(captions_of(open_pairs(folder / f"list.{kind}")).values()) == [("a", "b"), ("c",)]


def test_a_byte_order_mark_blank_lines_and_line_breaks_in_quotes_are_read(folder: Path) -> None:
    text = '\ufeffimage,caption\r\nimages/0.png,"two\nlines"\r\n\r\nimages/1.png,b\r\nimages/9.png,\r\n'
    (folder / "list.csv").write_text(text, encoding="utf-8", newline="")
    source = open_pairs(folder / "list.csv")
    assert captions_of(source) == {"images/0.png": ("two\nlines",), "images/1.png": ("b",)}
    assert [bad.name for bad in source.bad] == ["list.csv row 5"], "the header is row 1"


def test_a_split_column_decides(folder: Path) -> None:
    splits = ["Train", "test", "train", "val"]
    rows: list[Row] = [{"image": f"images/{n}.png", "caption": "x", "split": splits[n]} for n in range(4)]
    write_csv(folder / "list.csv", rows)
    source = open_pairs(folder / "list.csv")
    assert [(sample.name, sample.split) for sample in source.samples] == [
        ("images/0.png", TRAIN), ("images/1.png", TEST), ("images/2.png", TRAIN),
    ]  # fmt: skip
    assert source.split_note == "train from Train, train, test from test, as each pair says; not used: val"
    write_csv(folder / "list.csv", [row for row in rows if row["split"] != "test"])
    source = open_pairs(folder / "list.csv")
    assert [sample.split for sample in source.samples] == [TRAIN, TRAIN, TEST]
    write_csv(folder / "list.csv", rows[:1])
    assert "held out" in open_pairs(folder / "list.csv").split_note


def test_a_hash_of_the_path_decides_otherwise_whatever_the_order(folder: Path) -> None:
    rows: list[Row] = [{"image": f"images/{n}.png", "caption": "x"} for n in range(4)]
    tested = set()
    for order in (rows, rows[::-1]):
        write_csv(folder / "list.csv", order)
        source = open_pairs(folder / "list.csv")
        dataset = pack(source, folder / "x.beton")
        tested |= {source.samples[index].name for index in dataset.indices(TEST)}
    assert len(tested) == 1
    assert dataset.manifest.split == "15 % of the pairs held out for test by a hash of the path"


def test_a_label_column_gives_labels(folder: Path) -> None:
    rows: list[Row] = [{"image": f"images/{n}.png", "caption": "x", "label": (10, 9, 10, 2)[n]} for n in range(4)]
    write_csv(folder / "list.csv", rows)
    source = open_pairs(folder / "list.csv")
    assert source.classes == ("2", "9", "10")
    assert [sample.label for sample in source.samples] == [2, 1, 2, 0]


@pytest.mark.parametrize("form", ["folder", "pattern", "single"])
def test_tar_shards_are_read_where_they_lie(tmp_path: Path, form: str) -> None:
    for shard in range(2):
        members: dict[str, bytes] = {}
        for number in range(2):
            stem = f"{shard}{number}"
            members |= {f"{stem}.png": png(int(stem)), f"{stem}.txt": f"text {stem} ü\n".encode()}
        write_tar(tmp_path / f"shard-{shard:03}.tar", members)
    given = {"folder": tmp_path, "pattern": tmp_path / "shard-{000..001}.tar", "single": tmp_path / "shard-000.tar"}[
        form
    ]
    source = open_pairs(given)
    stems = ["00", "01", "10", "11"][: 2 if form == "single" else 4]
    assert captions_of(source) == {f"shard-00{stem[0]}.tar/{stem}.png": (f"text {stem} ü",) for stem in stems}
    dataset = pack(source, tmp_path / "x.beton")
    for index, stem in enumerate(stems):
        pixels = dataset.file_bytes[dataset.pointers[index] :][: 8 * 8 * 3]
        assert np.array_equal(pixels, picture(8, 8, int(stem)).ravel())


def test_a_json_in_a_shard_gives_captions_label_and_split(tmp_path: Path) -> None:
    def record(**fields: object) -> bytes:
        return json.dumps(fields).encode()

    members = {
        "a.png": png(0), "a.txt": b"same", "a.json": record(caption="same", split="train", label="cat", url="x", title="t"),
        "b.json": record(captions=["p", "q"], split="test", label="dog"), "b.JPG": png(1), "b.cls": b"1",
        "sub/c.png": png(2), "sub/c.json": record(caption="r", split="train", label="dog"),
    }  # fmt: skip
    write_tar(tmp_path / "x.tar", members)
    source = open_pairs(tmp_path / "x.tar")
    assert list(captions_of(source).values()) == [("same",), ("p", "q"), ("r",)]
    assert source.classes == ("cat", "dog")
    assert [(sample.label, sample.split) for sample in source.samples] == [(0, TRAIN), (1, TEST), (1, TRAIN)]
    assert source.not_images == {".cls": 1}
    assert captions_of(open_pairs(tmp_path / "x.tar", Columns(captions=("title",))))["x.tar/a.png"] == ("same", "t")


def listed(source: Source) -> dict[str, str]:
    return {bad.name: bad.reason for bad in source.bad}


def test_pairs_that_lack_something_are_left_out_with_their_row(folder: Path) -> None:
    (folder / "images" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 broken")
    rows: list[Row] = [{"image": f"images/{n}.png", "caption": "x"} for n in range(4)]
    rows += [
        {"image": "images/none.png", "caption": "x"}, {"image": "none", "caption": "x"},
        {"image": "images/0.png", "caption": " "}, {"image": "", "caption": "x"},
        {"image": "images/broken.jpg", "caption": "x"},
    ]  # fmt: skip
    write_csv(folder / "list.csv", rows)
    source = open_pairs(folder / "list.csv")
    assert listed(source) == {"list.csv row 8": "empty caption", "list.csv row 9": "no image"}
    dataset = pack(source, folder / "x.beton", max_bad=5)
    found = {bad.name: bad.reason for bad in dataset.manifest.left_out}
    assert found["images/none.png"] == "unreadable: No such file or directory (list.csv row 6)"
    assert found["none"] == "unreadable: No such file or directory (list.csv row 7)"
    assert found["images/broken.jpg"].endswith("(list.csv row 10)")
    assert (dataset.num_samples, len(found)) == (4, 5)
    for max_bad in (1, 4):
        with pytest.raises(
            UserError, match=rf"more than {max_bad} image.* can't be packed: list\.csv row 8 \(empty caption\)"
        ):
            pack(source, folder / "y.beton", max_bad=max_bad)
    assert not (folder / "y.beton").exists()


def test_members_that_lack_something_are_left_out_with_their_name(tmp_path: Path) -> None:
    good = {f"{n}.{suffix}": png(n) if suffix == "png" else b"text" for n in range(3) for suffix in ("png", "txt")}
    bad = {
        "a.png": png(0), "b.txt": b"text", "c.png": png(0), "c.txt": b"  ", "d.png": png(0), "d.txt": "é".encode("latin-1"),
        "e.png": png(0), "e.json": b"{", "f.png": png(0), "f.jpg": png(1), "f.txt": b"text", "g.png": png(0),
        "g.json": b'{"caption": 3}', "h.png": png(0), "h.json": b'{"caption": "\\ud800"}', "i.png": b"notes", "i.txt": b"text",
        "j.png": png(0), "j.json": b'["x"]', "k.png": png(0), "k.json": b'{"caption": "x", "caption": "y"}',
    }  # fmt: skip
    write_tar(tmp_path / "x.tar", good | bad)
    source = open_pairs(tmp_path / "x.tar")
    reasons = listed(source)
    assert {name.removeprefix("x.tar member "): reason.partition(" (")[0] for name, reason in reasons.items()} == {
        "a": "no caption, neither in a .txt nor in a .json", "b": "no image", "c": "empty caption", "d": "d.txt is not UTF-8",
        "e": "e.json is not JSON", "f": "several images: f.png, f.jpg", "g": "caption is no text but a number",
        "h": "caption is not text that UTF-8 can hold", "j": "j.json is no JSON object; give one with an image and a caption",
        "k": "k.json has several fields of the name caption: give each its own name",
    }  # fmt: skip
    dataset = pack(source, tmp_path / "x.beton", max_bad=11)
    assert dataset.num_samples == 3
    assert dataset.manifest.left_out[-1].name == "x.tar/i.png"
    assert dataset.manifest.left_out[-1].reason.endswith("(x.tar member i)")


ALL = "list.csv has the columns"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no header"),
        (b"image,caption\n", "has no rows"),
        (b"image,note\na,b\n", rf"{ALL} image, note, none of which is a caption; give --caption-columns"),
        (b"id,caption\na,b\n", rf"{ALL} id, caption, none of which is a path of an image; give --image-column"),
        (b"url,caption\na,b\n", "download the images first"),
        (b"image,caption\nhttp://x/a.jpg,b\n", r"list\.csv row 2: the image is a URL \(http://x/a\.jpg\)"),
        (b"image,path,caption\na,b,c\n", "image, path could all be the image; give --image-column"),
        (b"image,caption,caption\na,b,c\n", "several columns of the name caption"),
        (b"image,caption,label,class\na,b,c,d\n", "label, class could all be the label"),
        (b"image,caption\na,b\nc,d,e\n", r"row 3 has 3 fields and the header 2; put fields that hold a comma in quotes"),
        (b"image,caption\na,b\nc\n", r"row 3 has 1 fields and the header 2"),
        (b'image,caption\na,"b\n', "line 2 is no csv"),
        (b"image,caption\na,b\nc,caf\xe9\n", r"list\.csv line 3 is not UTF-8"),
        ("image,caption\na,b\n".encode("utf-16"), r"list\.csv line 1 is not UTF-8"),
        (b"image,caption,split\n0.png,b,train\n1.png,b,sample\n", r"row 3: its split is sample; write train, val or test"),
        (b"image,caption,split\n0.png,b,test\n", "none is to train on"),
        (b"image,caption,split\n0.png,b,train\n0.png,b,test\n",
         r"row 2 and row 3 are of the same image, 0\.png, and give it the split train and test"),
        (b"image,caption,label\n0.png,b,x\n./0.png,b,y\n", r"row 2 and row 3 .* the label x and y"),
    ],
)  # fmt: skip
def test_a_table_that_can_not_be_understood_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "list.csv").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        open_pairs(tmp_path / "list.csv")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no rows"),
        ("{", r"list\.jsonl row 1 is not JSON"),
        ('{"image": "a", "caption": "b"}\n[1]', r"list\.jsonl row 2 is no JSON object"),
        ('{"image": "a", "image": "b"}', r"row 1 has several fields of the name image"),
        ('{"image": {"bytes": "a"}, "caption": "b"}', "row 1: the image is no path but a record"),
    ],
)
def test_json_lines_that_can_not_be_understood_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "list.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        open_pairs(tmp_path / "list.jsonl")


def test_fields_that_are_no_text_are_left_out_with_their_row(folder: Path) -> None:
    rows: list[Row] = [
        {"image": "images/0.png", "caption": "x"}, {"image": "images/1.png", "caption": 3}, {"image": "images/2.png"},
        {"image": "images/3.png", "caption": [None, {"raw": "x"}]},
    ]  # fmt: skip
    write_json_lines(folder / "list.jsonl", rows)
    assert listed(open_pairs(folder / "list.jsonl")) == {
        "list.jsonl row 2": "caption is no text but a number",
        "list.jsonl row 3": "empty caption",
        "list.jsonl row 4": "caption is no text but a record",
    }


@has_pyarrow
def test_a_broken_parquet_and_one_that_is_not_utf_8_are_refused(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "list.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"list\.parquet is not a Parquet file") as caught:
        open_pairs(tmp_path / "list.parquet")
    assert "\n" not in str(caught.value)
    texts = pyarrow.array([b"a", b"caf\xe9"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"image": ["a", "b"], "caption": texts}), tmp_path / "list.parquet")
    with pytest.raises(UserError, match=r"list\.parquet row 2 is not UTF-8"):
        open_pairs(tmp_path / "list.parquet")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "list.parquet").touch()
    with pytest.raises(UserError, match=r"list\.parquet needs pyarrow: pip install 'dist_contrastive\[parquet\]'"):
        open_pairs(tmp_path / "list.parquet")


def shard(folder: Path) -> Path:
    members = {f"{n}.{suffix}": png(n) if suffix == "png" else b"text" for n in range(3) for suffix in ("png", "txt")}
    return write_tar(folder / "x.tar", members)


def test_a_truncated_shard_is_refused_with_its_member(tmp_path: Path) -> None:
    whole = shard(tmp_path).read_bytes()
    with tarfile.open(tmp_path / "x.tar") as tar:
        members = tar.getmembers()
    for size, message in (
        (members[4].offset_data + 10, "is truncated in its member 2.png"),
        (members[5].offset + 100, "after its member 2.png"),
        (members[4].offset, "is truncated after its member 1.txt"),
        (0, "x.tar"),
    ):
        (tmp_path / "x.tar").write_bytes(whole[:size])
        with pytest.raises(UserError, match=message) as caught:
            open_pairs(tmp_path / "x.tar")
        assert "\n" not in str(caught.value)


def test_a_compressed_shard_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w:gz") as tar:
        tar.add(tmp_path, "folder", recursive=False)
    with pytest.raises(UserError, match=r"x\.tar can't be read as a tar without compression"):
        open_pairs(tmp_path / "x.tar")


def test_labels_or_splits_of_some_members_alone_are_refused(tmp_path: Path) -> None:
    members = {"a.png": png(0), "a.json": b'{"caption": "x", "label": 1}', "b.png": png(1), "b.txt": b"x"}
    write_tar(tmp_path / "x.tar", members)
    with pytest.raises(UserError, match=r"member b has no label in its \.json, and x\.tar member a has one"):
        open_pairs(tmp_path / "x.tar")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pairs:", "no folder after the colon"),
        ("pairs", "unknown source"),
        ("pairs:none.csv", "there is no none.csv"),
        ("pairs:list.xlsx", r"list\.xlsx is no table; give pairs:FILE"),
        ("pairs:empty", r"empty holds no \.tar"),
        ("pairs:x-{0..2}.tar", r"there is no x-1\.tar and 1 more"),
        ("pairs:x-{2..0}.tar", r"there is no x-\{2\.\.0\}\.tar"),
    ],
)
def test_pairs_that_are_not_there_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.xlsx").touch()
    (tmp_path / "x-0.tar").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        open_source(spec)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["pairs:list.csv"], "where to"),
        (["photos", "x.beton", "--image-column", "x"], "--image-column: only pairs"),
        (["photos", "x.beton", "--caption-columns", "x", "y"], "--caption-columns: only pairs"),
        (["photos", "x.beton", "--tokenizer", "x.json"], "--tokenizer: photos has no captions"),
        (["photos", "x.beton", "--max-tokens", "9"], "--max-tokens: photos has no captions"),
        (
            ["photo_captions", "x.beton", "--vocabulary", "999", "--tokenizer", "x.json"],
            "--vocabulary: a given tokenizer",
        ),
        (["photo_captions", "x.beton", "--max-tokens", "2"], "--max-tokens 2: give 3 or more"),
        (["photo_captions", "x.beton", "--vocabulary", "100"], "--vocabulary 100: give 512 or more"),
        (["photo_captions", "x.beton", "--caption-templates", "default"], "has captions of its own"),
        (["photos", "x.beton", "--caption-templates", "none.txt"], r"none\.txt can't be read: No such file"),
        (
            ["pairs:list.csv", "x.beton", "--image-column", "x"],
            "--image-column x: .*list.csv has the columns image, caption",
        ),
        (
            ["pairs:list.csv", "x.beton", "--caption-columns", "x"],
            "--caption-columns x: .*has the columns image, caption",
        ),
        (["pairs:x.tar", "x.beton", "--image-column", "x"], "--image-column x: tar shards have no columns"),
    ],
)
def test_a_wrong_command_line_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], message: str
) -> None:
    monkeypatch.chdir(folder)
    write_csv(folder / "list.csv", [{"image": "images/0.png", "caption": "x"}])
    shard(folder)
    with pytest.raises(UserError, match=message):
        main(argv)


def test_the_command_says_how_many_captions_there_are_and_how_many_were_cut(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[Row] = [{"name": f"images/{n}.png", "de": "x " * (n + 1), "en": "y"} for n in range(4)]
    write_csv(folder / "list.csv", rows)
    main([
        f"pairs:{folder / 'list.csv'}", str(folder / "x.beton"), "--image-column", "name", "--caption-columns", "de", "en",
        "--max-tokens", "4",
    ])  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert "4 samples (3 to train, 1 to test), no labels, 0 left out" in lines[0]
    assert lines[1].startswith("captions: 8, of up to 4 of ")
    assert lines[1].endswith(" tokens; 2 were longer and are cut")
    assert lines[2] == "split: 15 % of the pairs held out for test by a hash of the path"


def classes_folder(folder: Path) -> Path:
    for name in ("polar_bear", "cat"):
        (folder / "classes" / name).mkdir(parents=True)
        for number in range(2):
            Image.fromarray(picture(8, 8, number)).save(folder / "classes" / name / f"{number}.png")
    return folder / "classes"


def test_templates_name_the_class(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classes_folder(folder)
    main([f"folder:{folder / 'classes'}", str(folder / "x.beton"), "--caption-templates", "default"])
    assert f"captions: {4 * len(TEMPLATES)}," in capsys.readouterr().out
    captions = open_dataset(folder / "x.beton").captions
    assert captions is not None
    assert captions.texts(3) == [template.replace("{class}", "polar bear") for template in TEMPLATES]
    (folder / "t.txt").write_text("{class}: große {class}\n\n{class}\n{class}\n", encoding="utf-8")
    main([f"folder:{folder / 'classes'}", str(folder / "x.beton"), "--caption-templates", str(folder / "t.txt")])
    captions = open_dataset(folder / "x.beton").captions
    assert captions is not None
    assert captions.texts(0) == ["cat: große cat", "cat"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n", "is empty"), (b"a {class}\n\na photo\n", r"t\.txt line 3 has no \{class\}"), (b"caf\xe9 {class}", "is not UTF-8"),
    ],
)  # fmt: skip
def test_templates_that_can_not_be_used_are_refused(folder: Path, content: bytes, message: str) -> None:
    (folder / "t.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        main(
            [f"folder:{classes_folder(folder)}", str(folder / "x.beton"), "--caption-templates", str(folder / "t.txt")]
        )
    with pytest.raises(UserError, match="has no classes to name"):
        main([f"images:{folder}", str(folder / "x.beton"), "--caption-templates", "default"])


def test_the_same_table_gives_the_same_bytes_anywhere(folder: Path) -> None:
    rows: list[Row] = [{"image": f"images/{n}.png", "caption": f"caption {n} of {n}"} for n in range(4)]
    write_csv(folder / "list.csv", rows)
    moved = folder / "moved"
    moved.mkdir()
    os.link(folder / "list.csv", moved / "list.csv")
    (moved / "images").symlink_to(folder / "images")
    for place in (folder, moved):
        pack(open_pairs(place / "list.csv"), place / "x.beton")
    for suffix in ("", ".captions"):
        assert (folder / f"x.beton{suffix}").read_bytes() == (moved / f"x.beton{suffix}").read_bytes()
