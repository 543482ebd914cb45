"""The command line as a user meets it: a run under the launcher, what it leaves behind, and one line for each mistake."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dist_contrastive import cli, preflight
from dist_contrastive.config import UserError
from dist_contrastive.metrics import read_metrics
from dist_contrastive.report import PLOT_NAMES
from dist_contrastive.run import train
from dist_contrastive.run_folder.config import read_config
from dist_contrastive.train import parse
from tests.harness import run_ranks
from tests.runs import NUM_TEST, NUM_TRAIN, STEPS_PER_EPOCH, newest_checkpoint, write_dataset

LAUNCH_CONFIG = Path(__file__).parent.parent / "launch_configs" / "cpu.yaml"
TIMEOUT_S = 240


def options(dataset: Path, run_dir: Path, *more: str) -> list[str]:
    """A command line for a run of a few seconds; later options win over earlier ones."""
    return [
        "photos", "--data.path", str(dataset), "--run-dir", str(run_dir), "--batch.global", "16", "--epochs", "2",
        "--data.image-size", "16", "--encoder.stem", "standard", "--probe.knn-k", "5", "--launch.device", "cpu",
        "--log-every", "1", "--checkpoint.every", "1", *more,
    ]  # fmt: skip


def run_module(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that `accelerate launch` took to its end with two ranks."""
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    launched = run_module(
        "accelerate.commands.launch", "--config_file", str(LAUNCH_CONFIG), "-m", "dist_contrastive.train",
        *options(dataset, run_dir, "--launch.ranks", "2", "--probe.every", "1"),
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr
    assert "2 rank(s), cpu, gloo, fp32" in launched.stdout
    assert "learning rate 0.002 per 256 samples = 0.000125" in launched.stdout
    assert re.search(r"linear\D+0\.\d{3}\D+0\.\d{3}\D+0\.\d{3}", launched.stdout), "the three scores stand side by side"
    return run_dir


def test_a_finished_run_has_everything(finished: Path) -> None:
    for name in ("config.json", "machine.json", "report.html", "DONE"):
        assert (finished / name).is_file(), name
    assert {path.stem for path in (finished / "plots").glob("*.png")} == set(PLOT_NAMES) - {"attention"}
    assert load_file(finished / "encoder.safetensors")
    assert load_file(finished / "projector.safetensors")
    assert [path.name for path in sorted((finished / "checkpoints").iterdir())] == [
        f"step-{STEPS_PER_EPOCH:08d}", f"step-{2 * STEPS_PER_EPOCH:08d}"
    ]  # fmt: skip


def test_metrics_carry_their_units(finished: Path) -> None:
    every = read_metrics(finished / "metrics.jsonl")
    lines = [line for line in every if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 2 * STEPS_PER_EPOCH + 1))
    assert set(lines[0]) == {
        "step", "epoch", "loss", "positive_cosine", "effective_rank", "learning_rate", "grad_norm", "images_per_s",
        "step_time_ms", "loader_wait_ms", "peak_memory_mib",
    }  # fmt: skip
    events = EventAccumulator(str(finished / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [line["step"] for line in lines]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([line["loss"] for line in lines])
    assert [event.step for event in events.Scalars("probe/linear_top1")] == [STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH]
    history = json.loads((finished / "probe.json").read_text())["history"]
    for name in ("linear_top1", "knn_top1"):
        found = [(line["step"], line[f"probe/{name}"]) for line in every if f"probe/{name}" in line]
        assert found == [(entry["step"], entry[name]) for entry in history]
    assert {tag.removeprefix("report/") for tag in events.Tags()["images"]} == {
        path.stem for path in (finished / "plots").iterdir()
    }


def test_the_machine_says_when_the_run_started_and_where_its_time_went(finished: Path) -> None:
    machine = json.loads((finished / "machine.json").read_text())
    assert [start["step"] for start in machine["starts"]] == [0]
    assert set(machine["seconds"]) == {
        "start", "first_step", "training", "waiting_for_data", "probes", "checkpoints", "report",
    }  # fmt: skip
    assert min(machine["seconds"].values()) >= 0


def test_probe_json_has_scores_baselines_and_protocol(finished: Path) -> None:
    probe = json.loads((finished / "probe.json").read_text())
    for name in ("linear_top1", "knn_top1", "raw_linear_top1", "raw_knn_top1", "init_linear_top1", "init_knn_top1"):
        assert 0 <= probe[name] <= 1
        assert probe[name] * NUM_TEST == pytest.approx(round(probe[name] * NUM_TEST)), "a fraction of the test split"
    assert [entry["epoch"] for entry in probe["history"]] == [1, 2]
    assert probe["linear_top1"] == probe["history"][-1]["linear_top1"]
    assert (probe["protocol"]["num_train"], probe["protocol"]["num_test"]) == (NUM_TRAIN, NUM_TEST)
    assert (probe["protocol"]["knn_k"], probe["protocol"]["knn_k_chosen"]) == (5, "given")
    assert list(probe["knn_top1_by_k"]) == ["1", "5", "10", "20", "50", "100"], "none larger than the training set"
    assert probe["knn_top1_by_k"]["5"] == probe["knn_top1"]


@pytest.mark.parametrize("content", ["no JSON", "[]", "{}", '{"method": {"name": "simclr"}, "epochs": "three"}'])
def test_probe_refuses_what_is_no_config(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json is not a config that training wrote"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no-such-run"], ["no-such-run", "no run's folder"]),
        (["{finished}", "--checkpoint", "99"], ["no checkpoint of step 99"]),
        (["{finished}", "--chekpoint", "1"], ["--chekpoint", "--checkpoint"]),
    ],
)
def test_probes_mistakes(finished: Path, arguments: list[str], words: list[str]) -> None:
    result = run_module("dist_contrastive.probe", *(argument.format(finished=finished) for argument in arguments))
    assert_one_line(result.returncode, result.stderr, words)


def assert_one_line(status: int, errors: str, words: list[str]) -> None:
    """Exit status 2 and one line on stderr that starts with `error:` and holds `words`; no traceback."""
    assert status == 2, errors
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, errors
    assert "Traceback" not in errors
    for word in words:
        assert word in lines[0]


def start(argv: list[str]) -> None:
    """What `main` does on a rank that the harness has connected already."""
    config = parse(argv)
    preflight.check(config)
    train(config)


def command(rank: int, argv: list[str]) -> tuple[int, str]:
    """The train command on one of several ranks: its exit status and what it wrote to stderr."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        status = cli.main_guard(lambda: start(argv))
    return status, errors.getvalue()


@pytest.mark.parametrize(
    ("arguments", "num_ranks", "words"),
    [
        (["photo"], 1, ["unknown recipe photo", "did you mean photos"]),
        (["photos", "--optim.learing-rate", "1"], 1, ["--optim.learing-rate", "--optim.learning-rate"]),
        (["photos", "--epochs", "many"], 1, ["many"]),
        (["photos", "--augment.flip", "1.5"], 1, ["--augment.flip", "give a probability"]),
        (["--data.path", "gone.beton"], 2, ["gone.beton", "dist_contrastive.pack"]),
        (["--batch.global", "104"], 1, ["--batch.global 104", f"{NUM_TRAIN} training samples"]),
        (["--batch.global", "15"], 2, ["--batch.global 15", "2 ranks"]),
        (["--launch.ranks", "4"], 2, ["2 rank(s) were launched", "--launch.ranks asks for 4"]),
        (["--launch.device", "cuda"], 1, ["no CUDA device"]),
        (["--launch.precision", "fp16"], 1, ["fp16 needs a GPU"]),
        (["--encoder.name", "resnet19"], 1, ["timm has no such model", "did you mean resnet18"]),
        (["--augment.count", "1"], 1, ["simclr needs at least 2 views"]),
        (["--run-dir", "/dev/null/run"], 2, ["/dev/null/run", "can't be written"]),
        (["--run-dir", "{finished}"], 2, ["holds a finished run", "--overwrite"]),
    ],
)
def test_mistakes(
    arguments: list[str], num_ranks: int, words: list[str], dataset: Path, finished: Path, tmp_path: Path
) -> None:
    given = [argument.format(finished=finished) for argument in arguments]
    argv = given if given[0].startswith("photo") else options(dataset, tmp_path / "run", *given)
    outcomes = run_ranks(command, num_ranks, argv)
    status, errors = outcomes[0]
    assert_one_line(status, errors, words)
    for status, errors in outcomes[1:]:
        assert status == 2
        assert "error:" not in errors, "one line a host"


def test_a_run_goes_on_only_with_its_own_config(dataset: Path, tmp_path: Path) -> None:
    argv = options(dataset, tmp_path / "run", "--stop-after-steps", "2")
    ((status, _),) = run_ranks(command, 1, argv)
    assert status == 0
    ((status, errors),) = run_ranks(command, 1, [*argv, "--optim.weight-decay", "0.5"])
    assert_one_line(status, errors, ["another config", "optim.weight_decay: 0.0001 -> 0.5"])
    ((status, errors),) = run_ranks(command, 1, [*argv, "--resume", "never"])
    assert_one_line(status, errors, ["unfinished run"])


def test_a_signal_ends_the_run_with_a_checkpoint(dataset: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = options(dataset, run_dir, "--epochs", "100000", "--checkpoint.every", "100000", "--probe.no-enabled")
    process = subprocess.Popen(
        [sys.executable, "-m", "dist_contrastive.train", *arguments], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    deadline = time.monotonic() + TIMEOUT_S
    while not read_metrics(run_dir / "metrics.jsonl"):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == cli.EXIT_STOPPED
    assert "the same command goes on from there" in output
    assert newest_checkpoint(run_dir).step >= 1
