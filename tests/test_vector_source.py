"""What `embed` and `index` see of a packed dataset and of a folder: the squares of evaluation, in a fixed order."""

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dist_contrastive.config import TrainConfig, UserError
from dist_contrastive.data.beton import open_dataset
from dist_contrastive.data.eval_view import EvalView
from dist_contrastive.data.format import LeftOut
from dist_contrastive.vectors import source as source_module
from dist_contrastive.vectors.source import BadImages, Chunk, FolderSource, VectorSource, open_vector_source
from tests.betons import jpeg, open_loader, picture, write_beton
from tests.runs import tiny_config

SHAPES = [(16, 16), (40, 9), (1, 1), (23, 57), (90, 70)]
NUM = 40


def image_of(number: int) -> np.ndarray:
    return picture(*SHAPES[number % len(SHAPES)], number)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return tiny_config(tmp_path / "run", tmp_path / "unused.beton")


def view_of(config: TrainConfig) -> EvalView:
    return EvalView.of(config.data, config.augment)


@pytest.fixture
def beton(tmp_path: Path) -> Path:
    images = [jpeg(image_of(number)) if number % 2 else image_of(number) for number in range(NUM)]
    return write_beton(tmp_path / "some.beton", images, num_test=10)


def png(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """PNGs at several depths, whose names are in another order than they are written in."""
    for number in range(NUM):
        png(tmp_path / "images" / ("deep/er" if number % 3 else "") / f"{number:02d}.png", image_of(number))
    return tmp_path / "images"


def joined(chunks: Iterable[Chunk]) -> Chunk:
    """All in one."""
    found = list(chunks)
    paths = None if found[0].paths is None else [path for chunk in found for path in chunk.paths or ()]
    labels = [chunk.labels for chunk in found if chunk.labels is not None]
    return Chunk(
        range(found[0].items.start, found[-1].items.stop),
        np.concatenate([chunk.indices for chunk in found]),
        torch.cat([chunk.squares for chunk in found]),
        paths,
        np.concatenate(labels) if labels else None,
        [bad for chunk in found for bad in chunk.bad],
        sum(chunk.num_passed_over for chunk in found),
    )


@pytest.mark.parametrize("split", ["all", "train", "test"])
def test_a_dataset_gives_what_evaluation_sees(beton: Path, config: TrainConfig, split: str) -> None:
    wanted = {"all": range(NUM), "train": range(NUM - 10), "test": range(NUM - 10, NUM)}[split]
    with open_loader(open_dataset(beton), config.data, config.augment) as loader:
        expected = torch.cat([batch.views[0][0] for batch in loader.centered(np.array(wanted), batch_size=NUM)])
    with open_vector_source(beton, config, split=split) as source:  # type: ignore[arg-type]
        assert (source.num_items, source.has_paths) == (len(wanted), False)
        assert source.classes == ("class 0", "class 1", "class 2")
        found = joined(source.chunks(range(len(wanted)), 7))
    assert torch.equal(found.squares, expected)
    assert found.indices.tolist() == list(wanted)
    assert found.labels is not None
    assert found.labels.tolist() == [index % 3 for index in wanted]
    assert found.paths is None


def test_a_dataset_without_classes_has_no_labels(tmp_path: Path, config: TrainConfig) -> None:
    path = write_beton(tmp_path / "plain.beton", [image_of(number) for number in range(4)], num_classes=0)
    with open_vector_source(path, config) as source:
        assert (source.classes, joined(source.chunks(range(4), 3)).labels) == ((), None)


def test_a_folder_gives_what_evaluation_sees_by_the_order_of_paths(folder: Path, config: TrainConfig) -> None:
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
    with open_vector_source(folder, config) as source:
        found = joined(source.chunks(range(NUM), 7))
        assert source.has_paths
    assert found.paths == names
    assert (found.indices.tolist(), found.labels) == (list(range(NUM)), None)
    pictures = [image_of(int(Path(name).stem)) for name in names]
    assert torch.equal(found.squares, view_of(config).cut(pictures))


@pytest.mark.parametrize("kind", ["beton", "folder"])
def test_any_ranges_have_the_same_images_whatever_the_threads(
    kind: str, config: TrainConfig, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(kind)
    with open_vector_source(path, config, threads=1) as source:
        whole = joined(source.chunks(range(NUM), NUM))
        identity = source.identity
    with open_vector_source(path, config, threads=3) as source:
        assert source.identity == identity
        chunks = list(source.chunks_of([range(30, 37), range(8, 20), range(3)], 5))
    assert [chunk.items for chunk in chunks] == [
        range(30, 35), range(35, 37), range(8, 13), range(13, 18), range(18, 20), range(3),
    ]  # fmt: skip
    for chunk in chunks:
        assert torch.equal(chunk.squares, whole.squares[chunk.items.start : chunk.items.stop])
        assert chunk.indices.tolist() == list(chunk.items)


def test_what_is_no_image_is_passed_over_and_what_is_bad_is_named(folder: Path, config: TrainConfig) -> None:
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "poem").write_text("GIF8 is no format")  # begins as one does
    (folder / "unnamed").write_bytes(jpeg(image_of(3)))
    (folder / "cut.jpg").write_bytes(jpeg(image_of(4))[:300])
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "circle").symlink_to(folder)
    with open_vector_source(folder, config) as source:
        assert (source.num_items, source.num_passed_over) == (NUM + 4, 1)
        found = joined(source.chunks(range(source.num_items), 9))
    assert len(found.squares) == len(found.indices) == len(found.paths or ()) == NUM + 1
    assert "unnamed" in (found.paths or ())
    assert found.num_passed_over == 1
    assert [bad.name for bad in found.bad] == ["cut.jpg", "gone.png"]
    assert all(bad.reason for bad in found.bad)


def test_too_many_bad_images_are_named_in_one_line() -> None:
    images = BadImages(at_most=2)
    images.add([LeftOut("a.png", "empty file"), LeftOut("b.png", "empty file")])
    with pytest.raises(UserError, match=r"more than 2 images can't be read: a.png \(empty file\).*c.png.*--max-bad"):
        images.add([LeftOut("c.png", "empty file")])


def test_another_content_is_another_source(folder: Path, beton: Path, config: TrainConfig) -> None:
    def identity(path: Path, split: str = "all") -> str:
        with open_vector_source(path, config, split=split) as source:  # type: ignore[arg-type]
            return source.identity

    first = identity(folder)
    assert identity(folder) == first
    png(folder / "00.png", image_of(7))
    changed = identity(folder)
    png(folder / "new.png", image_of(7))
    assert len({first, changed, identity(folder), identity(beton), identity(beton, "test")}) == 5


def test_only_so_many_images_are_decoded_ahead(
    tmp_path: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = io.BytesIO()
    Image.fromarray(picture(20, 20, 0)).save(content, "PNG")
    for number in range(400):
        (tmp_path / f"{number:03d}.png").write_bytes(content.getvalue())
    read: list[Path] = []

    def counting(path: Path) -> Image.Image:
        read.append(path)
        return Image.open(path).convert("RGB")

    monkeypatch.setattr(source_module, "read_rgb", counting)
    with open_vector_source(tmp_path, config, threads=2) as source:
        assert isinstance(source, FolderSource)
        ahead = source_module.PIECE * source_module.PIECES_AHEAD * 2
        for chunk in source.chunks(range(source.num_items), 32):
            source._pool.submit(int).result()  # whatever was begun before has been read now, or nearly
            assert len(read) <= chunk.items.stop + ahead
    assert len(read) == 400


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("none", {}, "there is no .*none; give a .beton"),
        ("gone.beton", {}, "no packed dataset at"),
        ("notes.txt", {}, "is neither a .beton nor a folder"),
        ("empty", {}, "empty holds no images"),
        ("images", {"split": "test"}, "--split test: .* has no splits"),
        ("plain.beton", {"split": "test"}, "--split test: .* no such images"),
    ],
)
def test_what_can_not_be_embedded_is_refused_in_one_line(
    name: str, options: dict[str, str], words: str, tmp_path: Path, folder: Path, config: TrainConfig
) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    write_beton(tmp_path / "plain.beton", [image_of(0)])
    with pytest.raises(UserError, match=words) as error:
        open_vector_source(tmp_path / name, config, **options)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_an_end_before_the_last_chunk_leaves_nothing_under_way(folder: Path, config: TrainConfig) -> None:
    source: VectorSource
    with open_vector_source(folder, config, threads=2) as source:
        next(source.chunks(range(NUM), 4))
    source.close()
