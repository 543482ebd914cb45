"""`index`: from a run and images to neighbours, end to end."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import dist_contrastive
from dist_contrastive import index
from dist_contrastive.config import TrainConfig, UserError
from dist_contrastive.data.beton import open_dataset
from dist_contrastive.searching.index_file import Encoder, SearchIndex, unit_vectors
from tests.betons import open_loader, picture
from tests.harness import run_ranks
from tests.runs import NUM_TEST, NUM_TRAIN, tiny_config, train_on_rank, write_dataset

NUM = NUM_TRAIN + NUM_TEST


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("run")
    config = tiny_config(folder / "run", write_dataset(folder), epochs=1)
    run_ranks(train_on_rank, 1, config)
    return config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(12):
        path = tmp_path / "images" / "ab"[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(20 + number, 30, number)).save(path)
    (tmp_path / "images" / "notes.txt").write_text("no image")
    return tmp_path / "images"


@pytest.fixture
def run_index(config: TrainConfig, tmp_path: Path) -> Callable[..., SearchIndex]:
    def call(source: object, *words: object, out: str = "out") -> SearchIndex:
        index.main([str(word) for word in (config.run_dir, source, tmp_path / out, *words)])
        return SearchIndex(tmp_path / out)

    return call


@pytest.mark.parametrize("output", ["feature", "embedding"])
def test_each_image_of_a_dataset_finds_itself(
    config: TrainConfig, run_index: Callable[..., SearchIndex], output: str
) -> None:
    found = run_index(config.data.path, "--output", output)
    module, dataset = dist_contrastive.load(config.run_dir), open_dataset(config.data.path)
    with open_loader(dataset, config.data, config.augment) as loader:
        squares = next(b.views[0][0].clone() for b in loader.centered(np.arange(NUM), batch_size=NUM))
    features = module.of_squares(squares)
    vectors = features if output == "feature" else module.embeddings(features)
    neighbours = found.search(vectors, 3)
    np.testing.assert_array_equal(neighbours.ids[:, 0], np.arange(NUM))
    np.testing.assert_allclose(neighbours.scores[:, 0], 1, atol=1e-5)
    assert neighbours.labels is not None
    np.testing.assert_array_equal(neighbours.labels[:, 0], np.arange(NUM) % 3)
    assert neighbours.paths is None
    assert list(found.facts.classes) == [f"class {label}" for label in range(3)]
    assert found.facts.encoder == Encoder.of(module.run, output)  # type: ignore[arg-type]
    shown = found.picture(5)
    assert shown is not None
    image = np.asarray(Image.open(io.BytesIO(shown)), np.int16)
    assert np.abs(image - squares[5].numpy()).mean() < 12


def test_a_folder_gives_paths_and_grows_and_shrinks(
    config: TrainConfig,
    run_index: Callable[..., SearchIndex],
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_index(folder, "--pictures", 0).close()
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    module = dist_contrastive.load(config.run_dir)
    more = tmp_path / "more"
    more.mkdir()
    Image.fromarray(picture(33, 22, 77)).save(more / "new.png")
    found = run_index(more, "--add")
    assert len(found) == 13
    images = [*(folder / name for name in names), more / "new.png"]
    neighbours = found.search(module([Image.open(path) for path in images]), 1)
    np.testing.assert_array_equal(neighbours.ids[:, 0], np.arange(13))
    assert neighbours.paths == [[name] for name in [*names, "new.png"]]
    assert found.picture(0) is None
    left = run_index("-", "--delete", 0, 12)
    assert len(left) == 11
    assert not np.isin(left.search(module([Image.open(path) for path in images]), 11).ids, [0, 12]).any()
    assert "2 deleted, 11 left" in capsys.readouterr().out


def table_of(config: TrainConfig, path: Path, *, step: int | None = None) -> Path:
    """What embed writes of the dataset, in two parts."""
    module = dist_contrastive.load(config.run_dir)
    with open_loader(open_dataset(config.data.path), config.data, config.augment) as loader:
        squares = next(b.views[0][0].clone() for b in loader.centered(np.arange(NUM), batch_size=NUM))
    features = module.of_squares(squares)
    about = {
        "run": {"method": "simclr", "encoder": "resnet10_w16", "step": module.run.step if step is None else step},
        "weights": {part: module.run.sha256(part) for part in ("encoder", "projector")},
        "source": {"name": "tiny.beton", "identity": "ab", "split": "all", "items": NUM},
        "classes": ["class 0", "class 1", "class 2"],
    }
    path.mkdir()
    for number, rows in enumerate(np.array_split(np.arange(NUM), 2)):
        columns = {"index": pa.array(rows), "label": pa.array(rows % 3)}
        for name, values in (("feature", features), ("embedding", module.embeddings(features))):
            flat = pa.array(values.numpy()[rows].reshape(-1))
            columns[name] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
        table = pa.table(columns).replace_schema_metadata({"dist_contrastive": json.dumps(about)})
        pq.write_table(table, path / f"part-{number:05d}.parquet")
    return path


def test_vectors_of_embed_give_the_same_index(
    config: TrainConfig, run_index: Callable[..., SearchIndex], tmp_path: Path
) -> None:
    table = table_of(config, tmp_path / "x.parquet")
    of_images = run_index(config.data.path, "--output", "embedding", "--pictures", 0, out="images")
    of_table = run_index(table, "--output", "embedding", out="table")
    np.testing.assert_allclose(
        of_table.vectors[np.argsort(of_table.items.ids)], of_images.vectors[np.argsort(of_images.items.ids)], atol=1e-6
    )
    assert of_table.facts.encoder == of_images.facts.encoder
    np.testing.assert_array_equal(of_table.items.labels, of_table.items.ids % 3)
    with pytest.raises(UserError, match="already: there is nothing to add"):
        run_index(table, "--output", "embedding", "--add", out="table")
    other = table_of(config, tmp_path / "y.parquet", step=99)
    with pytest.raises(UserError, match=r"holds vectors of another encoder \(simclr, step 99\)"):
        run_index(other, out="other")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "z.parquet")
    with pytest.raises(UserError, match="holds no vectors that embed wrote"):
        run_index(tmp_path / "z.parquet", out="other")
    part = table / "part-00001.parquet"
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(UserError, match="can't be read"):
        run_index(table, out="other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("kind", ["hnsw", "ivfpq"])
def test_the_kind_is_said_and_can_be_chosen(
    config: TrainConfig, run_index: Callable[..., SearchIndex], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run_index(config.data.path, "--kind", kind, "--recall", 0.9)
    assert found.facts.kind == kind
    said = capsys.readouterr().out
    assert f"130 vectors of {found.facts.dimension} (feature), {kind}" in said
    assert "recall@10" in said
    assert found.facts.asked_recall == 0.9
    own = found.search(unit_vectors(found.vectors, found.facts.dimension), 1).ids[:, 0]
    assert (own == found.items.ids).mean() > 0.9


def test_every_mistake_is_one_line(
    config: TrainConfig, run_index: Callable[..., SearchIndex], folder: Path, tmp_path: Path
) -> None:
    run_index(folder).close()
    bad = tmp_path / "bad"
    shutil.copytree(folder, bad)
    (bad / "broken.png").write_bytes((folder / "a" / "00.png").read_bytes()[:200])
    for source, words, out, expected in (
        (folder, (), "out", "is an index already: --add adds to it"),
        (folder, ("--add",), "out", "has images already: there is nothing to add"),
        (folder, ("--output", "embedding", "--add"), "out", "is an index of features, not embeddings"),
        (folder / "a", ("--add",), "new", "is no index"),
        (tmp_path / "nothing", (), "new", "there is no"),
        (bad, ("--max-bad", "0"), "new", "broken.png"),
        ("-", (), "out", "then give --delete or --to"),
        ("-", ("--delete", "99"), "out", "has no id 99"),
        ("-", ("--to", "redis:x"), "out", "give milvus:URI"),
        (folder, ("--recall", "2"), "new", "--recall 2"),
        (folder, ("--pictures", "5"), "new", "--pictures 5"),
        (folder, ("--kind", "ivfpq", "--lists", "50"), "new", "--lists 50"),
        (folder, ("--kind", "tree"), "new", "tree"),
    ):
        with pytest.raises(UserError, match=expected) as caught:
            run_index(source, *words, out=out)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    Image.fromarray(picture(9, 9, 9)).save(again / "z.png")
    with pytest.raises(UserError, match=r"has a/00.png already; delete that first"):
        run_index(again, "--add")
    other = tmp_path / "other"
    shutil.copytree(config.run_dir, other)
    encoder = bytearray((other / "encoder.safetensors").read_bytes())
    encoder[-1] ^= 1
    (other / "encoder.safetensors").write_bytes(encoder)
    with pytest.raises(UserError, match="is an index of another encoder"):
        index.main([str(other), str(folder), str(tmp_path / "out"), "--add"])
    (other / "DONE").unlink()
    with pytest.raises(UserError, match="holds no finished run"):
        index.main([str(other), str(folder), str(tmp_path / "new")])
