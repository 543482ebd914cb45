"""`--dry-run`: the plan of a run on the ranks at hand, or on GPUs that are not there; nothing is written."""

import re
import subprocess
from pathlib import Path

import pytest

from dist_contrastive.config import UserError
from dist_contrastive.dry_run import dry_run, size
from dist_contrastive.run import train
from dist_contrastive.simulate import simulate
from dist_contrastive.train import DryRun, parse, take_dry_run
from tests.runs import STEPS_PER_EPOCH, newest_checkpoint, tiny_config, write_dataset
from tests.test_command import LAUNCH_CONFIG, assert_one_line, options, run_module


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


def rows(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """The plan, by the names of its lines; there is one of it."""
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("dry run: nothing was trained or written") == 1
    lines = re.findall(r"^  (\w[\w ]*?)  +(.*)$", done.stdout, re.MULTILINE)
    assert len(dict(lines)) == len(lines)
    return dict(lines)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_ranks_that_were_launched(dataset: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    plan = rows(
        run_module(
            "accelerate.commands.launch", "--config_file", str(LAUNCH_CONFIG), "-m", "dist_contrastive.train",
            *options(dataset, run_dir, "--dry-run"),
        )
    )  # fmt: skip
    assert plan["ranks"].startswith("2 on cpu in fp32, launched; 2 on this host, ")
    assert plan["batch"] == "16 samples = 2 × 8, in one forward pass"
    assert plan["steps"] == f"{2 * STEPS_PER_EPOCH}: 2 epochs of {STEPS_PER_EPOCH}"
    assert plan["run folder"] == f"{run_dir}; starts"
    assert "allreduce" in plan["sent by devices"]
    assert "simulated" in plan["memory a rank"]
    assert not run_dir.exists()


def test_ranks_under_deepspeed(dataset: Path, tmp_path: Path) -> None:
    launch_config = LAUNCH_CONFIG.with_name("deepspeed_zero2.yaml")
    plan = rows(
        run_module(
            "accelerate.commands.launch", "--config_file", str(launch_config), "--num_processes", "2",
            "--mixed_precision", "no", "-m", "dist_contrastive.train",
            *options(dataset, tmp_path / "run", "--dry-run", "--optim.name", "adamw"),
        )
    )  # fmt: skip
    assert plan["ranks"].startswith("2 on cpu in fp32, launched")
    assert plan["DeepSpeed"] == "simulated as whole copies; stage 2 keeps 1/2 of the optimizer's state on a rank"
    assert plan["batch"] == "16 samples = 2 × 8, in one forward pass"
    assert "simulated" in plan["memory a rank"]


def test_a_run_that_would_go_on_is_left_as_it_is(dataset: Path, tmp_path: Path) -> None:
    arguments = options(dataset, tmp_path / "run", "--probe.no-enabled")
    run_module("dist_contrastive.train", *arguments, "--stop-after-steps", "3")
    before = contents(tmp_path)
    plan = rows(run_module("dist_contrastive.train", *arguments, "--dry-run"))
    assert plan["run folder"] == f"{tmp_path / 'run'}; goes on after step 3"
    assert plan["ranks"].startswith("1 on cpu in fp32, launched; 1 on this host, ")
    assert contents(tmp_path) == before


def test_gpus_that_are_not_there_and_a_dataset_that_is_not_yet(tmp_path: Path) -> None:
    arguments = options(tmp_path / "gone.beton", tmp_path / "run", "--dry-run", "--ranks", "8", "--device", "cuda")
    plan = rows(run_module("dist_contrastive.train", *arguments, "--launch.precision", "bf16"))
    assert plan["ranks"] == "8 on cuda in bf16, simulated; nccl"
    assert plan["dataset"].startswith("not there yet: no packed dataset at ")
    assert "unknown without the dataset" in plan["steps"]
    assert "allgather" in plan["sent by devices"]
    assert not (tmp_path / "run").exists()


def test_a_mistake_gets_one_line(dataset: Path, tmp_path: Path) -> None:
    done = run_module("dist_contrastive.train", *options(dataset, tmp_path / "run", "--dry-run", "--device", "cpu"))
    assert_one_line(done.returncode, done.stderr, ["--device with --dry-run", "CPU ranks are to be launched"])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--ranks", "3"], "--batch.global 16 can't be shared .* give a multiple of 3"),
        (["--ranks", "0"], "--ranks 0: give at least 1"),
        (["--ranks", "many"], "--ranks with --dry-run: .*many"),
        (["--launch.ranks", "2"], r"1 rank\(s\) were launched, --launch.ranks asks for 2"),
        (["--method.projector.output-size", "0", "--ranks", "2"], "--method.projector.output-size 0"),
        (["--encoder.name", "vit_tiny_patch16_224", "--data.image-size", "40", "--ranks", "2"], "--data.image-size 40"),
        (["--stop-after-steps", "99", "--ranks", "2"], "--stop-after-steps 99: the run has 12 steps"),
    ],
)
def test_what_can_not_run_is_refused(more: list[str], words: str, dataset: Path, tmp_path: Path) -> None:
    arguments = options(dataset, tmp_path / "run", "--dry-run", *more)
    with pytest.raises(UserError, match=words):
        plan_of(arguments)
    assert not (tmp_path / "run").exists()


def plan_of(arguments: list[str]) -> None:
    """What `main` does, in this process."""
    rest, dry = take_dry_run(arguments)
    assert dry
    dry_run(parse(rest), dry.ranks)


def test_it_takes_one_process_to_simulate(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without a launcher"):
        plan_of(options(dataset, tmp_path / "run", "--dry-run", "--ranks", "2"))


def test_a_checkpoint_is_as_large_as_predicted(dataset: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", dataset, epochs=1)
    train(config)
    saved = newest_checkpoint(config.run_dir).tensors
    found = simulate(config, ranks=2, precision="fp32")
    assert found.checkpoint_bytes == sum(
        x.numel() * x.element_size() for group in saved.values() for x in group.values()
    )


def test_options_that_go_with_it_are_taken_out() -> None:
    assert take_dry_run(["photos", "--epochs", "3"]) == (["photos", "--epochs", "3"], None)
    assert take_dry_run(["photos", "--dry-run", "--epochs", "3"]) == (["photos", "--epochs", "3"], DryRun(None))
    assert take_dry_run(["--dry-run", "--ranks=4", "--epochs", "3"]) == (["--epochs", "3"], DryRun(4))
    assert take_dry_run(["photos", "--device", "cuda", "--dry-run"]) == (["photos"], DryRun(1))
    with pytest.raises(UserError, match="--device with --dry-run"):
        take_dry_run(["--dry-run", "--device", "tpu"])


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (2**30, "1 GiB"), (1000 * 2**20, "1000 MiB")],
)
def test_sizes(num_bytes: int, text: str) -> None:
    assert size(num_bytes) == text
