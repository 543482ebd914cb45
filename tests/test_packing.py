"""Packing: what is stored, what is left out, and that a dataset is whole or not there."""

import json
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import ffcv
import ffcv.reader
import numpy as np
import pytest
from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder
from PIL import Image

from dist_contrastive.cli import parse
from dist_contrastive.config import DataConfig, UserError
from dist_contrastive.data.beton import Dataset, open_dataset
from dist_contrastive.data.format import NO_LABEL, TEST, TRAIN, manifest_path
from dist_contrastive.data.packing import write_dataset
from dist_contrastive.data.pictures import BadImageError, read_rgb
from dist_contrastive.data.sources import Sample, Source, open_source
from dist_contrastive.pack import PackConfig, main
from tests.betons import open_loader, picture


def make_folder(folder: Path, *, side: int = 16, num: int = 4) -> Path:
    """Two classes with `num` square PNG files each."""
    for label, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        for number in range(num):
            Image.fromarray(picture(side, side, 10 * label + number)).save(folder / name / f"{number}.png")
    return folder


def pack_folder(folder: Path, out: Path, *, max_side: int = 512, max_bad: int = 0, workers: int = 0) -> Dataset:
    write_dataset(open_source(f"folder:{folder}"), out, max_side=max_side, max_bad=max_bad, workers=workers)
    return open_dataset(out)


def array_source(*images: np.ndarray) -> Source:
    """Images in two classes, the last of them in the test split."""
    last = len(images) - 1
    samples = [Sample(f"image {n}", n % 2, TEST if n == last else TRAIN, image) for n, image in enumerate(images)]
    return Source("arrays", ("even", "odd"), tuple(samples), "the last one to test")


def stored(dataset: Dataset, index: int) -> bytes:
    start = dataset.pointers[index]
    return dataset.file_bytes[start : start + dataset.sizes[index]].tobytes()


def test_the_loader_gives_the_pixels_and_labels_that_were_packed(tmp_path: Path) -> None:
    images = [picture(32, 32, seed) for seed in range(9)]
    manifest = write_dataset(array_source(*images), tmp_path / "x.beton")
    dataset = open_dataset(tmp_path / "x.beton")
    assert dataset.manifest == manifest
    assert (manifest.num_samples, manifest.num_train, manifest.num_test, manifest.num_jpeg) == (9, 8, 1, 0)
    assert list(dataset.indices(TEST)) == [8]
    with open_loader(dataset, DataConfig(image_size=32)) as loader:
        (batch,) = loader.centered(np.arange(9), batch_size=9)
    assert np.array_equal(batch.views[0][0].numpy(), np.stack(images))
    assert batch.samples.labels.tolist() == [n % 2 for n in range(9)]


def test_mean_and_std_are_those_of_the_training_pixels(tmp_path: Path) -> None:
    images = [picture(8, 20, 1), picture(30, 9, 2), picture(5, 5, 3)]
    manifest = write_dataset(array_source(*images), tmp_path / "x.beton")
    pixels = np.concatenate([image.reshape(-1, 3) for image in images[:2]]) / 255
    np.testing.assert_allclose(manifest.mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(manifest.std, pixels.std(0), rtol=1e-12)


def test_small_images_are_raw_and_others_jpegs_of_at_most_the_given_side(tmp_path: Path) -> None:
    images = [picture(64, 64, 1), picture(64, 65, 2), picture(300, 150, 3), picture(40, 400, 4)]
    write_dataset(array_source(*images), tmp_path / "x.beton", max_side=200)
    dataset = open_dataset(tmp_path / "x.beton")
    assert dataset.is_jpeg.tolist() == [0, 1, 1, 0]
    shapes = list(zip(dataset.heights.tolist(), dataset.widths.tolist(), strict=True))
    assert shapes == [(64, 64), (64, 65), (200, 100), (20, 200)]
    assert stored(dataset, 0) == images[0].tobytes()


def test_jpegs_look_like_their_source_and_quality_counts(tmp_path: Path) -> None:
    image = np.asarray(Image.fromarray(picture(4, 4, 1)).resize((96, 96)))
    sizes = {}
    for quality in (50, 90):
        write_dataset(array_source(image, image), tmp_path / "x.beton", quality=quality)
        dataset = open_dataset(tmp_path / "x.beton")
        sizes[quality] = int(dataset.sizes[0])
        with open_loader(dataset, DataConfig(image_size=96)) as loader:
            difference = next(loader.centered(np.arange(2), batch_size=2)).views[0][0, 0].numpy().astype(int) - image
        assert np.abs(difference).mean() < 3
    assert sizes[50] < sizes[90]


def test_one_pixel_images_go_through_packing_and_loader(tmp_path: Path) -> None:
    pixel = np.array([[[10, 200, 30]]], np.uint8)
    write_dataset(array_source(pixel, pixel, pixel), tmp_path / "x.beton")
    dataset = open_dataset(tmp_path / "x.beton")
    with open_loader(dataset, DataConfig(image_size=4)) as loader:
        views = next(loader.centered(np.arange(3), batch_size=3)).views[0].numpy()
    assert np.array_equal(views, np.broadcast_to(pixel, (1, 3, 4, 4, 3)))


def test_the_bytes_do_not_depend_on_workers_or_run(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "images", side=80, num=40)
    for name, workers in (("a", 1), ("b", 4), ("c", 4)):
        pack_folder(folder, tmp_path / f"{name}.beton", workers=workers)
    contents = [(tmp_path / f"{name}.beton").read_bytes() for name in "abc"]
    manifests = [manifest_path(tmp_path / f"{name}.beton").read_text() for name in "abc"]
    assert contents[0] == contents[1] == contents[2]
    assert manifests[0] == manifests[1] == manifests[2]


def test_photos_are_packed_in_full(tmp_path: Path) -> None:
    source = open_source("photos")
    manifest = write_dataset(source, tmp_path / "x.beton")
    dataset = open_dataset(tmp_path / "x.beton")
    assert (manifest.num_train, manifest.num_test, manifest.num_jpeg, manifest.left_out) == (7600, 1900, 0, ())
    assert manifest.classes == source.classes
    for index in range(0, 9500, 97):
        sample = source.samples[index]
        assert isinstance(sample.image, np.ndarray)
        assert stored(dataset, index) == sample.image.tobytes()
        assert (dataset.labels[index], dataset.splits[index]) == (sample.label, sample.split)


def test_ffcv_itself_opens_the_file(tmp_path: Path) -> None:
    dataset = pack_folder(make_folder(tmp_path / "images"), tmp_path / "x.beton")
    reader = ffcv.reader.Reader(str(dataset.path))
    assert reader.num_samples == 8
    assert list(reader.handlers) == ["image", "label", "split"]


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16", 25700, (100, 100, 100)),
        ("RGBA", (200, 100, 0, 0), (255, 255, 255)),
        ("RGBA", (200, 100, 0, 255), (200, 100, 0)),
        ("LA", (0, 0), (255, 255, 255)),
    ],
)
def test_modes_become_rgb(tmp_path: Path, mode: str, value: int | tuple[int, ...], expected: tuple[int, ...]) -> None:
    Image.new(mode, (5, 3), value).save(tmp_path / "x.png")
    image = read_rgb(tmp_path / "x.png")
    assert (image.mode, image.size) == ("RGB", (5, 3))
    assert image.getpixel((2, 1)) == expected


def test_cmyk_palettes_and_16_bit_tiff_become_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (32, 32), (255, 0, 0, 0)).save(tmp_path / "x.jpg", quality=100)
    cyan = read_rgb(tmp_path / "x.jpg")
    assert cyan.mode == "RGB"
    np.testing.assert_allclose(np.asarray(cyan)[9, 9], (0, 255, 255), atol=2)

    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "opaque.png")
    palette.save(tmp_path / "clear.gif", transparency=1)
    assert read_rgb(tmp_path / "opaque.png").getpixel((0, 0)) == (10, 20, 30)
    assert read_rgb(tmp_path / "clear.gif").getpixel((0, 0)) == (255, 255, 255)

    Image.new("I;16", (4, 4), 32896).save(tmp_path / "x.tiff")
    assert read_rgb(tmp_path / "x.tiff").getpixel((0, 0)) == (128, 128, 128)


def pnm(kind: str, maximum: int, values: np.ndarray) -> bytes:
    """A portable pixmap of `values` [H, W] or [H, W, 3]: binary (P5, P6) or in words (P2)."""
    header = f"{kind}\n{values.shape[1]} {values.shape[0]}\n{maximum}\n".encode()
    if kind == "P2":
        return header + " ".join(str(value) for value in values.ravel()).encode()
    return header + values.astype(">u1" if maximum < 256 else ">u2").tobytes()


@pytest.mark.parametrize(
    ("kind", "maximum", "value", "expected"),
    [
        ("P5", 65535, 25700, 100),
        ("P2", 65535, 65535, 255),
        ("P5", 1000, 500, 128),
        ("P5", 255, 100, 100),
        ("P6", 65535, 25700, 100),
    ],
)
def test_portable_pixmaps_of_any_depth_become_rgb(
    tmp_path: Path, kind: str, maximum: int, value: int, expected: int
) -> None:
    shape = (3, 5, 3) if kind == "P6" else (3, 5)
    (tmp_path / "x.ppm").write_bytes(pnm(kind, maximum, np.full(shape, value)))
    image = read_rgb(tmp_path / "x.ppm")
    assert (image.mode, image.size) == ("RGB", (5, 3))
    assert image.getpixel((2, 1)) == (expected, expected, expected)


UPRIGHT = {
    1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip


@pytest.mark.parametrize(
    ("suffix", "options", "mode"),
    [("webp", {"lossless": True}, "RGB")]
    + [("png", {}, mode) for mode in ("RGB", "L", "I;16", "P", "LA", "RGBA", "1")]
    + [("tiff", {}, mode) for mode in ("RGB", "L", "I;16", "CMYK", "P", "LA", "RGBA", "1")]
    + [("tiff", {"compression": "tiff_lzw"}, mode) for mode in ("RGB", "I;16", "CMYK")],
)
def test_exif_orientation_turns_the_image_upright(
    tmp_path: Path, suffix: str, options: dict[str, object], mode: str
) -> None:
    grey = np.arange(24, dtype=np.uint8).reshape(6, 4) * 10
    image = {
        "I;16": lambda: Image.fromarray(grey.astype(np.uint16) * 257),
        "CMYK": lambda: Image.fromarray(np.stack([grey] * 4, axis=-1), "CMYK"),
    }.get(mode, lambda: Image.fromarray(grey).convert(mode))()
    image.save(tmp_path / "plain", suffix, **options)
    plain = read_rgb(tmp_path / "plain")
    for orientation, turn in UPRIGHT.items():
        exif = Image.Exif()
        exif[0x0112] = orientation  # how the camera lay
        image.save(tmp_path / "turned", suffix, exif=exif, **options)
        expected = plain if turn is None else plain.transpose(turn)
        assert np.array_equal(np.asarray(read_rgb(tmp_path / "turned")), np.asarray(expected)), orientation


@pytest.mark.parametrize("suffix", ["gif", "webp", "tiff", "png"])
def test_of_several_frames_the_first_is_taken(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (4, 6), (level,) * 3) for level in (100, 1)]
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / "x", suffix, save_all=True, append_images=frames[1:], **options)
    assert read_rgb(tmp_path / "x").getpixel((1, 1)) == (100, 100, 100)


def test_a_colour_that_is_declared_transparent_becomes_white(tmp_path: Path) -> None:
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "bytes.png", transparency=bytes([255, 0]))
    palette.save(tmp_path / "other.png", transparency=bytes([0, 255]))
    Image.new("I;16", (4, 4), 25700).save(tmp_path / "deep.png", transparency=25700)
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "colour.png", transparency=(1, 2, 3))
    found = [read_rgb(tmp_path / f"{name}.png").getpixel((0, 0)) for name in ("bytes", "other", "deep", "colour")]
    assert found == [(255, 255, 255), (10, 20, 30), (255, 255, 255), (255, 255, 255)]


def truncated_jpeg(path: Path) -> None:
    Image.fromarray(picture(64, 64, 0)).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:-200])


def truncated_png(path: Path) -> None:
    Image.fromarray(picture(64, 64, 0)).save(path, "PNG")
    path.write_bytes(path.read_bytes()[:2000])


def bomb(path: Path) -> None:
    """A few bytes that say they are 400 million pixels."""
    Image.new("RGB", (1, 1)).save(path, "BMP")
    content = bytearray(path.read_bytes())
    content[18:26] = struct.pack("<ii", 20000, 20000)  # width and height
    path.write_bytes(content)


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.touch(), "empty file"),
    "text": (lambda path: path.write_text("notes"), "not an image"),
    "truncated_jpeg": (truncated_jpeg, "unreadable: image file is truncated"),
    "truncated_png": (truncated_png, "unreadable: "),
    "header_only": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n"), "unreadable: |not an image"),
    "dangling_link": (lambda path: path.symlink_to("nowhere"), "unreadable: No such file"),
    "bomb": (bomb, "more than 178956970 pixels"),
    "float_tiff": (lambda path: Image.new("F", (4, 4)).save(path, "TIFF"), "no fixed range"),
    "postscript": (lambda path: Image.new("RGB", (4, 4)).save(path, "EPS"), "not an image"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_has_a_reason(tmp_path: Path, kind: str) -> None:
    write, reason = BAD_FILES[kind]
    write(tmp_path / "x")
    with pytest.raises(BadImageError, match=reason):
        read_rgb(tmp_path / "x")


def test_bad_images_are_left_out_and_listed(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "images")
    good = pack_folder(folder, tmp_path / "good.beton")
    (folder / "cat" / "notes.jpg").write_text("notes")
    truncated_jpeg(folder / "dog" / "broken.jpg")
    dataset = pack_folder(folder, tmp_path / "x.beton", max_bad=2)
    listed = {bad.name: bad.reason for bad in dataset.manifest.left_out}
    assert set(listed) == {"cat/notes.jpg", "dog/broken.jpg"}
    assert "truncated" in listed["dog/broken.jpg"]
    assert dataset.num_samples == good.num_samples


def test_what_never_was_an_image_is_counted_and_is_not_bad(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "images")
    (folder / "cat" / "0.txt").write_text("a caption")
    (folder / "cat" / "1.TXT").touch()
    (folder / "dog" / "Thumbs.db").write_bytes(bytes(100))
    (folder / "dog" / "LICENSE").write_text("text")
    (folder / "dog" / "gone.json").symlink_to("nowhere")
    (folder / "dog" / "4").write_bytes((folder / "dog" / "3.png").read_bytes())  # an image without a suffix is one
    dataset = pack_folder(folder, tmp_path / "x.beton", max_bad=0)
    assert dataset.num_samples == 9
    assert dataset.manifest.left_out == ()
    assert dataset.manifest.not_images == {"": 1, ".db": 1, ".json": 1, ".txt": 2}


def heic(path: Path) -> None:
    path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))


@pytest.mark.parametrize(
    "write",
    [
        lambda folder, name: (folder / f"{name}.txt").write_text("a caption"),
        lambda folder, name: (folder / f"{name}b.jpg").touch(),
        lambda folder, name: truncated_jpeg(folder / f"{name}b.jpg"),
        lambda folder, name: heic(folder / f"{name}b.heic"),
        lambda folder, name: (folder / f"{name}b.png").symlink_to("nowhere"),
        lambda folder, name: (folder / f"{name}b.png").hardlink_to(folder / f"{name}.png"),
    ],
    ids=["captions", "empty", "truncated", "heic", "links to nowhere", "second names"],
)
@pytest.mark.parametrize("labels", [True, False])
def test_the_test_split_is_chosen_among_readable_images(
    tmp_path: Path, write: Callable[[Path, str], object], labels: bool
) -> None:
    names = [f"class{number:02}" for number in range(12)]
    for kind in ("plain", "mixed"):
        for seed, name in enumerate(names):
            folder = tmp_path / kind / name
            folder.mkdir(parents=True)
            for number in range(3):
                Image.fromarray(picture(8, 8, 3 * seed + number)).save(folder / f"{number}.png")
                if kind == "mixed":
                    write(folder, str(number))
    datasets = []
    for kind in ("plain", "mixed"):
        source = open_source(f"{'folder' if labels else 'images'}:{tmp_path / kind}")
        for workers in (1, 3):
            write_dataset(source, tmp_path / f"{kind}{workers}.beton", workers=workers)
        datasets.append(open_dataset(tmp_path / f"{kind}1.beton"))
        same = [(tmp_path / f"{kind}{workers}.beton").read_bytes() for workers in (1, 3)]
        assert same[0] == same[1]
    plain, mixed = datasets
    if labels:
        assert np.array_equal(np.sort(plain.labels[plain.indices(TEST)]), np.arange(12)), "every class has a test image"
    assert np.array_equal(plain.splits, mixed.splits), "what is no image changes no choice"
    assert (plain.manifest.num_train, plain.manifest.num_test) == (mixed.manifest.num_train, mixed.manifest.num_test)
    assert plain.manifest.mean == mixed.manifest.mean


def test_a_dataset_without_labels_opens_here_and_in_ffcv(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "images", num=10)
    write_dataset(open_source(f"images:{folder}"), tmp_path / "x.beton")
    dataset = open_dataset(tmp_path / "x.beton")
    assert dataset.manifest.classes == ()
    assert not dataset.manifest.has_labels
    assert set(dataset.labels) == {NO_LABEL}
    assert (dataset.manifest.num_train, dataset.manifest.num_test) == (17, 3)
    assert dataset.manifest.split.startswith("15 % of the images held out for test")
    loader = ffcv.Loader(
        str(dataset.path), batch_size=20, num_workers=1,
        pipelines={"image": [CenterCropRGBImageDecoder((16, 16), 1.0)], "label": [IntDecoder()], "split": [IntDecoder()]},
    )  # fmt: skip
    ((images, labels, splits),) = list(loader)
    assert images.shape == (20, 16, 16, 3)
    assert set(labels.ravel()) == {NO_LABEL}
    assert np.array_equal(splits.ravel(), dataset.splits)


def test_a_manifest_of_an_older_version_opens(tmp_path: Path) -> None:
    dataset = pack_folder(make_folder(tmp_path / "images"), tmp_path / "x.beton")
    beside = manifest_path(dataset.path)
    content = json.loads(beside.read_text())
    del content["split"], content["not_images"]
    beside.write_text(json.dumps(content))
    assert open_dataset(dataset.path).manifest.has_labels


@pytest.mark.parametrize("label", [-1, 2])
def test_labels_of_no_class_are_refused(tmp_path: Path, label: int) -> None:
    image = picture(8, 8, 0)
    source = Source("x", ("a", "b"), tuple(Sample(str(n), n, TRAIN, image) for n in range(2)), "")
    write_dataset(source, tmp_path / "x.beton")
    content = json.loads(manifest_path(tmp_path / "x.beton").read_text())
    content["classes"] = [] if label == -1 else ["a"]
    manifest_path(tmp_path / "x.beton").write_text(json.dumps(content))
    with pytest.raises(UserError, match="belong to no class"):
        open_dataset(tmp_path / "x.beton")


def test_more_bad_images_than_allowed_write_nothing(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "images")
    for number in range(9):
        (folder / "cat" / f"bad{number}.jpg").touch()
    with pytest.raises(UserError, match=r"more than 8 images.*cat/bad\d\.jpg \(empty file\); .*--max-bad"):
        pack_folder(folder, tmp_path / "out" / "x.beton", max_bad=8)
    assert list((tmp_path / "out").iterdir()) == []
    assert pack_folder(folder, tmp_path / "out" / "x.beton", max_bad=9).num_samples == 8


def test_a_class_without_a_readable_image_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "images")
    (folder / "docs").mkdir()
    (folder / "cat" / "bad.png").touch()
    (folder / "docs" / "README.md").write_text("notes")
    with pytest.raises(UserError, match=r"class docs .*no readable image.*docs/README.md, not an image"):
        pack_folder(folder, tmp_path / "x.beton", max_bad=2)


def test_no_image_to_train_on_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "images")
    (folder / "train").mkdir()
    (folder / "test").mkdir()
    for name in ("cat", "dog"):
        (folder / name).rename(folder / "test" / name)
    with pytest.raises(UserError, match="no training split"):
        pack_folder(folder, tmp_path / "x.beton")
    for name in ("cat", "dog"):
        (folder / "train" / name).mkdir()
        (folder / "train" / name / "bad.jpg").touch()
    with pytest.raises(UserError, match="no readable image to train on"):
        pack_folder(folder, tmp_path / "x.beton", max_bad=2)
    (folder / "train").rename(folder / "t")
    (folder / "test").rename(folder / "train")
    (folder / "t").rename(folder / "test")
    with pytest.raises(UserError, match="no readable image to test on"):
        pack_folder(folder, tmp_path / "x.beton", max_bad=2)


def test_an_interruption_leaves_what_was_there_before(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "images")
    out = tmp_path / "out" / "x.beton"
    calls = 0

    def interrupt() -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(open_source(f"folder:{folder}"), out, on_sample=interrupt)
    assert list(out.parent.iterdir()) == []

    before = pack_folder(folder, out).manifest
    calls = 0
    with pytest.raises(KeyboardInterrupt):
        write_dataset(open_source(f"folder:{folder}"), out, max_side=8, on_sample=interrupt)
    assert open_dataset(out).manifest == before
    assert sorted(path.name for path in out.parent.iterdir()) == ["x.beton", "x.beton.json"]


def test_packing_again_replaces_the_dataset(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "images")
    out = tmp_path / "x.beton"
    before = pack_folder(folder, out)
    kept = stored(before, 0)
    assert pack_folder(folder, out, max_side=8).manifest.largest_width == 8
    assert stored(before, 0) == kept  # who has the old file open keeps it


def test_a_new_file_is_never_beside_the_old_manifest(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "images")
    out = tmp_path / "x.beton"
    pack_folder(folder, out)
    old = out.read_bytes()
    (tmp_path / ".x.beton.json.incomplete").mkdir()  # where the new manifest would be written
    with pytest.raises(UserError, match="can't be written"):
        pack_folder(folder, out, max_side=8)
    assert out.read_bytes() != old
    with pytest.raises(UserError, match="no manifest"):
        open_dataset(out)


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    source = array_source(*(picture(64, 64, seed) for seed in range(64)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((8 << 20) + 100_000, limits[1]))  # images start at 8 MiB
    try:
        with pytest.raises(UserError, match=r"x\.beton can't be written: .*make room"):
            write_dataset(source, tmp_path / "x.beton")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_can_not_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "x.beton", Path("/proc/x.beton")):
        with pytest.raises(UserError, match="can't be written"):
            write_dataset(array_source(picture(4, 4, 0), picture(4, 4, 1)), out)


def damage_missing(path: Path) -> None:
    path.unlink()


def damage_truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def damage_altered(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2000] ^= 1
    path.write_bytes(content)


def damage_no_manifest(path: Path) -> None:
    manifest_path(path).unlink()


def damage_foreign_manifest(path: Path) -> None:
    other = pack_folder(make_folder(path.parent / "others", side=20), path.with_name("other.beton"))
    shutil.copy(manifest_path(other.path), manifest_path(path))


def damage_format(path: Path) -> None:
    beside = manifest_path(path)
    beside.write_text(json.dumps(json.loads(beside.read_text()) | {"format": 0}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_missing, "no packed dataset at"),
        (damage_truncated, "truncated or replaced"),
        (damage_altered, "was altered"),
        (damage_no_manifest, "no manifest"),
        (damage_foreign_manifest, "its manifest"),
        (damage_format, "format 0"),
    ],
)
def test_a_dataset_that_is_not_what_was_packed_is_refused(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    path = pack_folder(make_folder(tmp_path / "images"), tmp_path / "x.beton").path
    damage(path)
    with pytest.raises(UserError, match=message) as caught:
        open_dataset(path)
    assert "\n" not in str(caught.value)
    assert "dist_contrastive.pack" in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["photos", "x.jpg"], r"ends in \.beton"),
        (["folder:images"], "where to"),
        (["images:images"], "where to"),
        (["photos", "x.beton", "--quality", "0"], "--quality"),
        (["photos", "x.beton", "--max-side", "0"], "--max-side"),
        (["photos", "x.beton", "--max-bad", "-1"], "--max-bad"),
        (["photos", "x.beton", "--workers", "-1"], "--workers"),
        (["photos", "x.beton", "more"], "unexpected argument"),
        (["photos", "x.beton", "--qualty", "9"], r"did you mean --quality"),
    ],
)
def test_a_wrong_command_line_is_refused(argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(argv)


def test_the_place_follows_the_source_where_none_is_given() -> None:
    assert parse(PackConfig, []).out_path == Path("data/photos.beton")
    assert parse(PackConfig, ["cifar10:somewhere"]).out_path == Path("data/cifar10.beton")


def test_the_command_packs_and_says_what(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(tmp_path / "images")
    (folder / "cat" / "notes.txt").write_text("notes")
    (folder / "cat" / "bad.png").write_text("notes")
    (folder / "cat" / "up").symlink_to("..")
    main([f"folder:{folder}", str(tmp_path / "x.beton"), "--max-bad", "1"])
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert lines[0] == "passed over, not an image: 1 files (1 .txt)"
    assert "8 samples (6 to train, 2 to test), 2 classes, 2 left out" in lines[1]
    assert lines[2] == "split: 15 % of each class held out for test by a hash of the path"
    assert output.err.splitlines() == [
        f"left out: cat/up: a link to {folder}, whose images have their place there",
        "left out: cat/bad.png: not an image (JPEG, PNG, WEBP, BMP, GIF, TIFF, PPM)",
    ]
    assert open_dataset(tmp_path / "x.beton").num_samples == 8


@pytest.mark.parametrize(
    ("sizes", "missing"),
    [
        ({"a": 4, "b": 1, "c": 1}, "; no image to test of 2 class(es): b, c"),
        ({"a": 1, "b": 1}, "; no image to test: too few"),
        ({"train/a": 2, "train/b": 2, "test/a": 1, "test/c": 1},
         "; no image to train of 1 class(es): c; no image to test of 1 class(es): b"),
        ({"a": 4, "b": 4}, ""),
    ],
)  # fmt: skip
def test_the_note_on_the_splits_says_which_classes_one_lacks(
    tmp_path: Path, sizes: dict[str, int], missing: str
) -> None:
    for name, size in sizes.items():
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(size):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "images" / name / f"{number}.png")
    source = open_source(f"folder:{tmp_path / 'images'}")
    assert write_dataset(source, tmp_path / "x.beton").split == source.split_note + missing


def test_the_command_lists_a_bounded_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(tmp_path / "images")
    for number in range(30):
        (folder / "cat" / f"bad{number}.png").touch()
    main([f"images:{folder}", str(tmp_path / "x.beton")])
    output = capsys.readouterr()
    assert "no labels, 30 left out" in output.out
    errors = output.err.splitlines()
    assert len(errors) == 21
    assert errors[-1] == f"left out: 10 more, see {tmp_path / 'x.beton.json'}"


def test_help_names_the_forms_of_source() -> None:
    command = [sys.executable, "-m", "dist_contrastive.pack", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    for form in ("photos", "cifar10[:DIR]", "folder:DIR", "classes:DIR", "images:DIR"):
        assert form in done.stdout


def test_missing_ffcv_ends_the_command_with_status_2_and_one_line(tmp_path: Path) -> None:
    program = (
        "import runpy, sys\n"
        "sys.modules['ffcv'] = None\n"
        f"sys.argv[1:] = ['photos', {str(tmp_path / 'x.beton')!r}]\n"
        "runpy.run_module('dist_contrastive.pack', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: FFCV can't be loaded")
    assert done.stderr.count("\n") == 1
    assert "apt-get install libopencv-dev libturbojpeg0-dev" in done.stderr
    assert list(tmp_path.iterdir()) == []
