"""`embed`: the vectors are those of the run, whatever writes them, in whatever form, and however often it is stopped."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import dist_contrastive
from dist_contrastive import cli, embed, signals
from dist_contrastive.config import TrainConfig, UserError
from dist_contrastive.data.beton import open_dataset
from dist_contrastive.embedder import Embedder
from dist_contrastive.evaluation.features import HostRows, extract
from dist_contrastive.folder_lock import lock_folder
from dist_contrastive.vectors import embedding, parts
from dist_contrastive.vectors.options import EmbedOptions
from tests.betons import jpeg, open_loader, picture, write_beton
from tests.harness import run_ranks
from tests.runs import NUM_TEST, NUM_TRAIN, STEPS_PER_EPOCH, tiny_config, train_on_rank, write_dataset

CPU = torch.device("cpu")
NUM = NUM_TRAIN + NUM_TEST
PART = 16
LAUNCH_CONFIG = Path(__file__).parent.parent / "launch_configs" / "cpu.yaml"
TIMEOUT_S = 120


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Of a finished run of one epoch, in whose folder's parent its dataset lies."""
    folder = tmp_path_factory.mktemp("run")
    config = tiny_config(folder / "run", write_dataset(folder), epochs=1)
    config = replace(config, data=replace(config.data, eval_crop=0.8))
    assert run_ranks(train_on_rank, 1, config) == [True]
    return config


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART_ITEMS", PART)


@pytest.fixture(scope="module")
def small_table(config: TrainConfig) -> Path:
    """The data set of `config`'s dataset in small parts."""
    out = config.run_dir.parent / "small.parquet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "PART_ITEMS", PART)
        run(config, config.data.path, out)
    return out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty images of several sizes at two depths."""
    for number in range(40):
        path = tmp_path / "images" / ("below" if number % 3 else "") / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(12 + number, 30, number)).save(path)
    return tmp_path / "images"


def run(config: TrainConfig, source: Path, out: Path, *options: str) -> None:
    embed.main([str(config.run_dir), str(source), str(out), "--device", "cpu", *options])


def rows_of(out: Path) -> dict[str, Any]:
    """The columns of a data set, or the fields of an array, but for names of labels."""
    if out.suffix == ".npy":
        array = np.load(out)
        return {name: array[name] for name in array.dtype.names}
    frame = pd.read_parquet(out).drop(columns="label_name", errors="ignore")
    return {name: np.stack(frame[name].to_numpy()) for name in frame}


def assert_same(one: Path, other: Path) -> None:
    """The same rows in the same order; vectors but for rounding."""
    first, second = rows_of(one), rows_of(other)
    assert first.keys() == second.keys()
    for name in first:
        if name in ("feature", "embedding"):
            np.testing.assert_allclose(first[name], second[name], 1e-4, 1e-5)
        else:
            np.testing.assert_array_equal(first[name], second[name])


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_a_dataset_has_the_vectors_of_evaluation(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(config, config.data.path, tmp_path / "v.parquet")
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(rf"{re.escape(str(tmp_path))}/v.parquet: {NUM} images, [\d,]+ images/s, 0 left out", last)
    dataset, module = open_dataset(config.data.path), dist_contrastive.load(config.run_dir)
    with open_loader(dataset, config.data, config.augment) as loader:
        expected = extract(module.method.exported, loader, np.arange(NUM), CPU)
    table = pq.read_table(tmp_path / "v.parquet")
    assert table.column_names == ["index", "label", "label_name", "feature", "embedding"]
    assert table.schema.field("feature").type.list_size == module.feature_size
    found = rows_of(tmp_path / "v.parquet")
    assert torch.equal(torch.from_numpy(found["feature"]), expected)
    assert torch.equal(torch.from_numpy(found["embedding"]), module.embeddings(expected))
    assert found["index"].tolist() == list(range(NUM))
    assert found["label"].tolist() == dataset.labels.tolist()
    assert table["label_name"].to_pylist() == [f"class {label}" for label in found["label"]]
    assert not list(tmp_path.glob(".*")), "nothing is left beside it"


def test_the_schema_says_of_what_run_and_source_it_is(config: TrainConfig, tmp_path: Path) -> None:
    run(config, config.data.path, tmp_path / "v.parquet", "--split", "test")
    said = json.loads(pq.read_schema(tmp_path / "v.parquet" / "part-00000.parquet").metadata[b"dist_contrastive"])
    trained = dist_contrastive.load(config.run_dir).run
    assert said["run"] == {"method": "simclr", "encoder": "resnet10_w16", "step": STEPS_PER_EPOCH}
    assert said["weights"] == {name: trained.sha256(name) for name in ("encoder", "projector")}
    assert (said["view"]["size"], said["view"]["crop"]) == (16, 0.8)
    assert (said["source"]["name"], said["source"]["split"], said["source"]["items"]) == (
        "tiny.beton",
        "test",
        NUM_TEST,
    )
    assert rows_of(tmp_path / "v.parquet")["index"].tolist() == list(range(NUM_TRAIN, NUM))


@pytest.mark.usefixtures("small_parts")
def test_a_folder_has_the_vectors_of_its_pictures(config: TrainConfig, folder: Path, tmp_path: Path) -> None:
    run(config, folder, tmp_path / "v.npy", "--batch-size", "7")
    array = np.load(tmp_path / "v.npy")
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
    assert array.dtype.names == ("index", "path", "feature", "embedding")
    assert array["path"].tolist() == names
    module = dist_contrastive.load(config.run_dir)
    pictures = [Image.open(folder / name) for name in names]
    np.testing.assert_allclose(array["feature"], module(pictures), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(array["embedding"], module.embed(pictures), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("kind", ["beton", "folder"])
def test_an_array_equals_a_table(kind: str, config: TrainConfig, folder: Path, tmp_path: Path) -> None:
    source = folder if kind == "folder" else config.data.path
    for name in ("v.npy", "v.parquet"):
        run(config, source, tmp_path / name)
    assert_same(tmp_path / "v.npy", tmp_path / "v.parquet")
    assert len(list((tmp_path / "v.parquet").iterdir())) == -(-len(np.load(tmp_path / "v.npy")) // PART)


def test_a_checkpoint_has_vectors_of_its_own(config: TrainConfig, tmp_path: Path) -> None:
    step = str(STEPS_PER_EPOCH)
    run(config, config.data.path, tmp_path / "v.npy")
    run(config, config.data.path, tmp_path / "c.npy", "--checkpoint", step)
    np.testing.assert_array_equal(np.load(tmp_path / "v.npy"), np.load(tmp_path / "c.npy"))  # it ended there
    run(config, config.data.path, tmp_path / "c.npy", "--checkpoint", step)
    with pytest.raises(UserError, match=r"c\.npy holds vectors of another weights"):
        run(config, config.data.path, tmp_path / "c.npy")


# Several ranks, and the same command again


def embed_on_rank(rank: int, config: TrainConfig, source: Path, out: Path, stop_at: int = 0) -> tuple[bool, int]:
    """`embed` with small parts: whether it came to its end, and the chunks that this rank saw. At chunk number `stop_at` it is
    told to stop."""
    seen, before = 0, Embedder.of_squares

    def counting(self: Embedder, squares: torch.Tensor, batch_size: int) -> torch.Tensor:
        nonlocal seen
        seen += 1
        if seen == stop_at:
            signals.request("SIGTERM")
        return before(self, squares, batch_size)

    options = EmbedOptions(run=config.run_dir, source=source, out=out, batch_size=8, threads=1, device="cpu", max_bad=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "PART_ITEMS", PART)
        patch.setattr(Embedder, "of_squares", counting)
        patch.setattr(signals, "_heard", signals._Heard())
        return embedding.embed(options), seen


@pytest.mark.parametrize("kind", ["beton", "folder"])
def test_two_ranks_write_what_one_writes(kind: str, config: TrainConfig, folder: Path, tmp_path: Path) -> None:
    source = folder if kind == "folder" else config.data.path
    ((_, seen),) = run_ranks(embed_on_rank, 1, config, source, tmp_path / "one.parquet")
    shares = run_ranks(embed_on_rank, 2, config, source, tmp_path / "two.parquet")
    assert sum(share for _, share in shares) == seen
    assert all(is_done and share for is_done, share in shares)
    assert_same(tmp_path / "one.parquet", tmp_path / "two.parquet")
    names = [sorted(path.name for path in (tmp_path / f"{name}.parquet").iterdir()) for name in ("one", "two")]
    assert names[0] == names[1]


def test_a_rank_without_a_share_is_no_harm(config: TrainConfig, tmp_path: Path) -> None:
    source = write_beton(tmp_path / "few.beton", [picture(20, 20, seed) for seed in range(5)])
    assert run_ranks(embed_on_rank, 2, config, source, tmp_path / "v.npy") == [(True, 1), (True, 0)]
    assert len(np.load(tmp_path / "v.npy")) == 5


def test_a_signal_stops_all_ranks_and_the_same_command_goes_on(
    config: TrainConfig, small_table: Path, tmp_path: Path
) -> None:
    out, source = tmp_path / "v.parquet", config.data.path
    stopped = run_ranks(embed_on_rank, 2, config, source, out, 4)
    assert [is_done for is_done, _ in stopped] == [False] * 2
    assert not out.exists()
    before = files(tmp_path / ".v.parquet.parts")
    done = {name: seen for name, seen in before.items() if name.endswith(".parquet")}
    assert 0 < len(done) < NUM // PART
    ((_, seen),) = run_ranks(embed_on_rank, 1, config, source, out)  # with another number of ranks
    assert seen == -(-NUM // 8) - 2 * len(done)
    after = files(out)
    assert {name: after[name] for name in done} == done, "what was there is kept as it is"
    assert_same(out, small_table)


SLOW = """
import sys
from dist_contrastive import embed, liveness
from dist_contrastive.vectors import parts
parts.PART_ITEMS = 16
liveness.run_rank(embed.main)
"""
"""The command with small parts."""


def start(config: TrainConfig, source: Path, out: Path) -> subprocess.Popen[str]:
    """In a process of its own, image by image, so that there is time to end it."""
    command = [sys.executable, "-c", SLOW, config.run_dir, source, out, "--device", "cpu", "--batch-size", "1"]
    return subprocess.Popen([str(word) for word in command], stdout=-1, stderr=-1, text=True)


def end_with(process: subprocess.Popen[str], number: signal.Signals, hidden: Path) -> tuple[str, str]:
    """Send the signal once another part is there; stdout and stderr."""
    until, before = time.monotonic() + TIMEOUT_S, len(list(hidden.glob("part-*")))
    while len(list(hidden.glob("part-*"))) <= before:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(number)
    return process.communicate(timeout=TIMEOUT_S)


def test_what_a_process_has_done_stays_done_whatever_ends_it(config: TrainConfig, tmp_path: Path) -> None:
    pictures = [picture(20, 20, seed) for seed in range(10)]
    source, out = write_beton(tmp_path / "many.beton", pictures * 40), tmp_path / "v.npy"
    process = start(config, source, out)
    output, errors = end_with(process, signal.SIGTERM, tmp_path / ".v.npy.parts")
    assert process.returncode == cli.EXIT_STOPPED, errors
    assert "keeps the parts that are done" in errors
    assert "Traceback" not in errors
    assert f"the same command goes on with {out}" in output
    process = start(config, source, out)
    end_with(process, signal.SIGKILL, tmp_path / ".v.npy.parts")
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    process = start(config, source, out)
    output, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, errors
    assert re.search(r"goes on: ([2-9]|\d\d) of 25 parts are there", output)
    array = np.load(out)
    assert array["index"].tolist() == list(range(400))
    np.testing.assert_array_equal(array["feature"], np.tile(array["feature"][:10], (40, 1)))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "many.beton", "many.beton.json", "v.npy", "v.npy.json"
    ]  # fmt: skip


def test_a_launcher_starts_it(config: TrainConfig, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", LAUNCH_CONFIG, "-m", "dist_contrastive.embed",
        config.run_dir, config.data.path, tmp_path / "v.npy",
    ]  # fmt: skip
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("left out") == 1
    assert len(np.load(tmp_path / "v.npy")) == NUM


# What is refused, and what is left out


@pytest.mark.usefixtures("small_parts")
def test_bad_images_are_left_out_named_and_refused_where_they_are_many(
    config: TrainConfig, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = ["05-cut.jpg", "below/05-empty.png", "zz-gone.jpg"]
    (folder / bad[0]).write_bytes(jpeg(picture(40, 40, 0))[:200])
    (folder / bad[1]).touch()
    (folder / bad[2]).symlink_to("nowhere")
    (folder / "notes.txt").write_text("no image")
    with pytest.raises(UserError, match=r"more than 2 images can't be read: 05-cut.jpg.*--max-bad"):
        run(config, folder, tmp_path / "v.npy", "--max-bad", "2")
    run(config, folder, tmp_path / "v.npy", "--max-bad", "3")
    output, errors = capsys.readouterr()
    for name in bad:
        assert re.search(rf"^left out: {name}: \S", errors, re.MULTILINE)
    assert "40 images" in output.splitlines()[-1]
    assert output.endswith("3 left out, 1 file(s) passed over that are no images\n")
    array = np.load(tmp_path / "v.npy")
    assert len(array) == 40
    assert not set(array["path"]) & set(bad)
    names = sorted([*bad, *array["path"]])
    assert [names[index] for index in array["index"]] == array["path"].tolist()
    said = json.loads((tmp_path / "v.npy.json").read_text())
    assert [image["name"] for image in said["left_out"]] == bad


@pytest.mark.usefixtures("small_parts")
def test_bad_images_of_earlier_starts_count(config: TrainConfig, folder: Path, tmp_path: Path) -> None:
    for name in ("00-bad.png", "zz-bad.png"):
        (folder / name).touch()
    out = tmp_path / "v.parquet"
    run(config, folder, out)
    hidden = out.rename(tmp_path / ".v.parquet.parts")
    (hidden / "part-00002.parquet").unlink()
    with pytest.raises(UserError, match=r"more than 1 images.*00-bad.png.*zz-bad.png"):
        run(config, folder, out, "--max-bad", "1")


def test_vectors_that_are_there_stay(config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("v.npy", "v.parquet"):
        run(config, config.data.path, tmp_path / name)
        capsys.readouterr()
        before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
        run(config, config.data.path, tmp_path / name)
        assert "nothing to do" in capsys.readouterr().out
        with pytest.raises(UserError, match=f"{name} holds vectors of another source; give another OUT"):
            run(config, config.data.path, tmp_path / name, "--split", "test")
        assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "part-00001.parquet is damaged"),
        (lambda path: path.write_text("no table"), "part-00001.parquet is damaged"),
        (lambda path: path.write_bytes(path.with_name("part-00002.parquet").read_bytes()), "part-00001.parquet is damaged"),
        (lambda path: pq.write_table(pq.read_table(path, columns=["index"])[:3], path), "is damaged .*has 3 rows"),
        (lambda path: pd.DataFrame({"a": [1]}).to_parquet(path), "something else than vectors"),
    ],
)  # fmt: skip
def test_a_part_that_is_not_what_it_says_is_not_used(
    spoil: Callable[[Path], object], words: str, config: TrainConfig, small_table: Path, tmp_path: Path
) -> None:
    hidden = tmp_path / ".v.parquet.parts"
    shutil.copytree(small_table, hidden)
    spoil(hidden / "part-00001.parquet")
    with pytest.raises(UserError, match=words) as error:
        run(config, config.data.path, tmp_path / "v.parquet")
    assert "\n" not in str(error.value)


def test_one_at_a_time(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / ".v.npy.parts").mkdir()
    lock = lock_folder(tmp_path / ".v.npy.parts")
    with pytest.raises(UserError, match=r"is in use by process .* choose another OUT"):
        run(config, config.data.path, tmp_path / "v.npy")
    lock.release()
    run(config, config.data.path, tmp_path / "v.npy")


@pytest.mark.parametrize(
    ("run_dir", "source", "out", "words"),
    [
        ("run", "tiny.beton", "v.csv", "give a name for OUT that ends in .parquet or .npy"),
        ("run", "tiny.beton", "file/v.npy", "v.npy can't be written"),
        ("run", "tiny.beton", "alien.npy", "holds something else than vectors"),
        ("run", "tiny.beton", "alien.parquet", "holds something else than vectors"),
        ("run", "empty", "v.npy", "empty holds no images"),
        ("run", "bad", "v.npy", "bad has no image that can be read"),
        ("run", "gone", "v.npy", "there is no .*gone"),
        ("unfinished", "tiny.beton", "v.npy", "holds no finished run; --checkpoint"),
        ("empty", "tiny.beton", "v.npy", "is no run's folder"),
    ],
)
def test_what_can_not_be_done_is_one_line(
    run_dir: str, source: str, out: str, words: str, config: TrainConfig, tmp_path: Path
) -> None:
    home = config.run_dir.parent
    for name in ("run", "tiny.beton", "tiny.beton.json"):
        (tmp_path / name).symlink_to(home / name)
    for name in ("empty", "bad", "alien.parquet", "unfinished"):
        (tmp_path / name).mkdir()
    for path in config.run_dir.iterdir():
        if path.name != "DONE":
            (tmp_path / "unfinished" / path.name).symlink_to(path)
    (tmp_path / "bad" / "bad.png").touch()
    for name in ("file", "alien.npy"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=words) as error:
        embed.main([str(tmp_path / run_dir), str(tmp_path / source), str(tmp_path / out), "--device", "cpu"])
    assert "\n" not in str(error.value)


def test_without_pyarrow_a_line_says_what_to_install(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'dist_contrastive\[serve\]'"):
        run(config, config.data.path, tmp_path / "v.npy")


@pytest.mark.usefixtures("small_parts")
def test_what_is_held_does_not_grow_with_the_images(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    squares: weakref.WeakSet[Any] = weakref.WeakSet()
    rooms: weakref.WeakSet[Any] = weakref.WeakSet()
    most = {"images": 0, "rows": 0}
    before = Embedder.of_squares

    def counting(self: Embedder, images: torch.Tensor, batch_size: int) -> torch.Tensor:
        squares.add(images)
        most["images"] = max(most["images"], sum(map(len, squares)))
        most["rows"] = max(most["rows"], sum(len(room.rows) for room in rooms))
        return before(self, images, batch_size)

    class Room(HostRows):
        def __init__(self, num_rows: int, row_shape: tuple[int, ...]) -> None:
            super().__init__(num_rows, row_shape)
            rooms.add(self)

    monkeypatch.setattr(Embedder, "of_squares", counting)
    monkeypatch.setattr(embedding, "HostRows", Room)
    pictures = [picture(20, 20, seed) for seed in range(10)]
    source = write_beton(tmp_path / "many.beton", pictures * 32)
    run(config, source, tmp_path / "v.parquet", "--batch-size", "8")
    assert len(pq.read_table(tmp_path / "v.parquet")) == 320
    assert most["images"] <= 2 * 8
    assert most["rows"] <= 3 * PART
