"""Scoring a run after training: what is scored on what, and in which file its scores end up."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_contrastive.config import ProbeConfig, UserError
from dist_contrastive.data.format import manifest_path
from dist_contrastive.probe import main
from tests.betons import picture, write_beton
from tests.harness import run_ranks
from tests.runs import NUM_TEST, STEPS_PER_EPOCH, tiny_config, train_on_rank, write_dataset

LAST_STEP = 2 * STEPS_PER_EPOCH


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset, `tiny.beton`, and the run of two epochs on it, `run`."""
    folder = tmp_path_factory.mktemp("trained")
    probe = ProbeConfig(every=1, knn_k=7, strengths=(1e-2,))
    config = tiny_config(folder / "run", write_dataset(folder), epochs=2, probe=probe)
    assert run_ranks(train_on_rank, 1, config, timeout_s=480) == [True]
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run, whose config names the dataset in the original folder."""
    shutil.copytree(trained / "run", tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another dataset: five classes, larger images of several sizes, fewer samples."""
    images = [picture(30 + 7 * (seed % 3), 40, 1000 + seed) for seed in range(72)]
    return write_beton(tmp_path_factory.mktemp("other") / "other set.beton", images, num_test=22, num_classes=5)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def score(run: Path, *options: str) -> dict[str, dict[str, Any]]:
    """Run the command; what it wrote, by name. Everything that was there must be as it was."""
    before = files(run)
    main([str(run), "--device", "cpu", *options])
    after = files(run)
    assert {name: after[name] for name in before} == before
    return {name: json.loads(content) for name, content in after.items() if name not in before}


def test_a_finished_run_is_scored_again_beside_what_training_measured(run: Path) -> None:
    measured = json.loads((run / "probe.json").read_text())
    ((name, again),) = score(run).items()
    assert name == f"probes/step-{LAST_STEP:08d}.json"
    for key in ("linear_top1", "knn_top1", "raw_linear_top1", "init_linear_top1", "raw_knn_top1", "init_knn_top1"):
        assert again[key] == pytest.approx(measured[key], abs=1.5 / NUM_TEST)
    assert again["protocol"] == measured["protocol"]
    assert (again["epoch"], again["step"]) == (2, LAST_STEP)


def test_a_checkpoint_is_scored(run: Path) -> None:
    ((name, scores),) = score(run, "--checkpoint", str(STEPS_PER_EPOCH)).items()
    assert name == f"probes/step-{STEPS_PER_EPOCH:08d}.json"
    first = json.loads((run / "probe.json").read_text())["history"][0]
    assert scores["linear_top1"] == pytest.approx(first["linear_top1"], abs=1.5 / NUM_TEST)
    assert (scores["epoch"], scores["step"]) == (1, STEPS_PER_EPOCH)


def test_what_training_did_not_measure_becomes_its_result(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "probe.json").unlink()
    ((name, scores),) = score(run).items()
    assert name == "probe.json"
    assert [entry["step"] for entry in scores["history"]] == [scores["step"]] == [LAST_STEP]
    assert "report.html" in capsys.readouterr().out, "which does not know of these scores"


def test_the_same_file_at_another_place_is_the_runs_own(trained: Path, run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved.beton"
    shutil.copy(trained / "tiny.beton", moved)
    shutil.copy(manifest_path(trained / "tiny.beton"), manifest_path(moved))
    assert list(score(run, "--data", str(moved))) == [f"probes/step-{LAST_STEP:08d}.json"]


@pytest.mark.parametrize("step", [None, STEPS_PER_EPOCH])
def test_another_dataset_has_a_file_of_its_own(run: Path, other: Path, step: int | None) -> None:
    options = [] if step is None else ["--checkpoint", str(step)]
    ((name, scores),) = score(run, "--data", str(other), *options).items()
    sha256 = json.loads(manifest_path(other).read_text())["sha256"]
    of_step = "" if step is None else f"-step-{step:08d}"
    assert name == f"probes/transfer-other_set-{sha256[:12]}{of_step}.json"
    assert scores["dataset"] == str(other)
    assert scores["step"] == (step or LAST_STEP)
    protocol = scores["protocol"]
    assert (protocol["dataset_sha256"], protocol["num_train"], protocol["num_test"]) == (sha256, 50, 22)
    assert protocol["classes"] == [f"class {label}" for label in range(5)]
    # The run's k was given for the run's classes; ten samples a class here.
    assert (protocol["knn_k"], protocol["knn_k_chosen"].split(":")[0]) == (1, "automatic")
    for kind in ("linear", "knn"):
        for prefix in ("", "init_", "raw_"):
            score_of = scores[f"{prefix}{kind}_top1"] * 22
            assert score_of == pytest.approx(round(score_of)), "a fraction of this dataset's test split"
        assert len(scores[f"{kind}_per_class"]) == 5
    assert not scores.keys() & {"epoch", "history", "best"}, "which would be of the run's own dataset"


def test_a_dataset_that_was_replaced_is_not_taken_for_the_runs(trained: Path, run: Path, other: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    config["data"]["path"] = str(other)
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"no longer the dataset.*--data PATH"):
        score(run)
    assert list(score(run, "--data", str(trained / "tiny.beton"))) == [f"probes/step-{LAST_STEP:08d}.json"]


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: write_beton(path, [picture(20, 20, 0)] * 9), "no test split"),
        (lambda path: write_beton(path, [picture(20, 20, 0)] * 9, num_test=9), "no training split"),
        (
            lambda path: write_beton(path, [picture(20, 20, 0)] * 9, num_test=3, num_classes=1),
            "has one class only .*, and probes need some",
        ),
    ],
)
def test_a_dataset_without_anything_to_tell_apart_is_refused(
    run: Path, tmp_path: Path, write: Callable[[Path], Path], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        score(run, "--data", str(write(tmp_path / "poor.beton")))
    assert not (run / "probes").exists()


def test_an_encoder_of_unknown_origin_is_refused(run: Path) -> None:
    content = (run / "encoder.safetensors").read_bytes()
    (run / "encoder.safetensors").write_bytes(content.replace(b"dataset_sha256", b"dataset_sha__6"))
    with pytest.raises(UserError, match=f"does not say on which dataset.*--checkpoint {LAST_STEP}"):
        score(run)


def test_accuracies_of_classes_add_up_to_the_whole(run: Path, tmp_path: Path) -> None:
    measured = json.loads((run / "probe.json").read_text())
    assert not any("per_class" in name for entry in measured["history"] for name in entry)
    for kind in ("linear", "knn"):
        # The test split's 30 samples are ten of each class.
        assert sum(measured[f"{kind}_per_class"]) / 3 == pytest.approx(measured[f"{kind}_top1"])
    images = [picture(20, 20, seed) for seed in range(42)]
    few = write_beton(tmp_path / "few.beton", images, num_test=2, num_classes=4)  # samples 40 and 41: classes 0 and 1
    (scores,) = score(run, "--data", str(few)).values()
    for kind in ("linear", "knn"):
        first, second, *none = scores[f"{kind}_per_class"]
        assert none == [None, None]
        assert (first + second) / 2 == pytest.approx(scores[f"{kind}_top1"])


def test_more_neighbours_than_samples_are_refused_before_training(trained: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", trained / "tiny.beton", probe=ProbeConfig(knn_k=101))
    with pytest.raises(AssertionError, match=r"--probe.knn-k 101: .* 100 training samples"):
        run_ranks(train_on_rank, 1, config)
