"""Launchers that users have: each file in launch_configs/ gives what it says, several machines need no scheduler, and a
launcher that starts its ranks again after one died ends in the same weights."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from dist_contrastive import preflight
from dist_contrastive.config import LaunchConfig
from dist_contrastive.launch import BACKENDS
from dist_contrastive.train import parse
from tests.harness import run_ranks
from tests.runs import STEPS_PER_EPOCH, assert_same_state, metrics_of, newest_checkpoint, write_dataset
from tests.test_command import TIMEOUT_S, command, options
from tests.test_launch import a_machine_with_gpus
from tests.test_rendezvous import free_port

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "launch_configs").glob("*.yaml"))
ACCELERATE = ["accelerate.commands.launch"]
TORCHRUN = ["torch.distributed.run"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


@contextlib.contextmanager
def launched(*commands: list[str]) -> Iterator[list[subprocess.Popen[str]]]:
    """Launchers beside one another, as on machines of their own; they end with the context, and their ranks with them."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", None)
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", *words], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for words in commands
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def outputs(*commands: list[str]) -> list[str]:
    """What launchers print that end well."""
    with launched(*commands) as processes:
        found = [process.communicate(timeout=TIMEOUT_S)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(found)
    return found


# The files


def parsed(file: Path, *more: str) -> Namespace:
    """What `accelerate launch` makes of the file."""
    arguments = launch_command_parser().parse_args(["--config_file", str(file), *more, "-m", "dist_contrastive.train"])
    return _validate_launch_command(arguments)[0]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_says_when_to_use_it_and_accelerate_knows_all_of_it(file: Path) -> None:
    lines = file.read_text().splitlines()
    assert lines[0].startswith("# ")
    assert any(f"--config_file launch_configs/{file.name}" in line for line in lines if line.startswith("#"))
    told = yaml.safe_load(file.read_text())
    config = load_config_from_file(str(file))
    for name, value in told.items():
        assert getattr(config, name) == value, name


@pytest.mark.parametrize("file", [file for file in FILES if "deepspeed" not in file.stem], ids=lambda file: file.stem)
def test_ranks_get_what_the_file_says(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = yaml.safe_load(file.read_text())
    monkeypatch.setattr(os, "environ", dict(os.environ))
    arguments = parsed(file)
    several = told["distributed_type"] == "MULTI_GPU"
    assert arguments.multi_gpu == several
    if several:
        environment = prepare_multi_gpu_env(arguments)
        assert int(arguments.nproc_per_node) * told["num_machines"] == told["num_processes"]
        # What torchrun tells each of its ranks.
        environment |= {"WORLD_SIZE": str(told["num_processes"]), "LOCAL_RANK": "1"}
    else:
        _, environment = prepare_simple_launcher_cmd_env(arguments)
    # Of a test that ran before, or of who runs the tests, nothing.
    for name in ("WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
        if name in environment:
            monkeypatch.setenv(name, environment[name])
    ranks_of_a_machine = told["num_processes"] // told["num_machines"]
    a_machine_with_gpus(monkeypatch, ranks_of_a_machine, capability=8)
    wanted = LaunchConfig(device="cpu") if told["use_cpu"] else LaunchConfig()
    device, precision = preflight.device_and_precision(wanted)
    assert device == ("cpu" if told["use_cpu"] else "cuda")
    assert preflight.ACCELERATE_NAMES[precision] == told["mixed_precision"]
    assert preflight.launched_ranks() == told["num_processes"]
    assert BACKENDS[device] == ("gloo" if told["use_cpu"] else "nccl")
    assert load_config_from_file(str(file)).distributed_type == DistributedType[told["distributed_type"]]


DEEPSPEED = [file for file in FILES if "deepspeed" in file.stem]


@pytest.mark.parametrize("file", DEEPSPEED, ids=lambda file: file.stem)
def test_ranks_under_deepspeed_get_what_the_file_says(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = yaml.safe_load(file.read_text())
    arguments = parsed(file)
    assert arguments.use_deepspeed
    arguments.deepspeed_fields_from_accelerate_config = list(told["deepspeed_config"])  # as the launcher's command does
    _, environment = prepare_deepspeed_cmd_env(arguments)
    monkeypatch.setattr(os, "environ", {**environment, "WORLD_SIZE": str(told["num_processes"]), "LOCAL_RANK": "1"})
    config = parse(["photos"])
    zero = preflight.zero_launch(config)
    assert zero
    assert zero.stage == told["deepspeed_config"]["zero_stage"]
    assert zero.offload == (told["deepspeed_config"]["offload_optimizer_device"] == "cpu")
    a_machine_with_gpus(monkeypatch, told["num_processes"], capability=8)
    device, precision = preflight.device_and_precision(config.launch)
    assert (device, preflight.ACCELERATE_NAMES[precision]) == ("cuda", told["mixed_precision"])
    assert load_config_from_file(str(file)).distributed_type == DistributedType[told["distributed_type"]]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("deepspeed_zero1", "2 rank(s), cpu, gloo, bf16, ZeRO stage 1; "),
        ("deepspeed_zero2_offload", "2 rank(s), cpu, gloo, fp32, ZeRO stage 2 on the host; "),
    ],
)
def test_deepspeed_on_processors(name: str, words: str, dataset: Path, tmp_path: Path) -> None:
    run_dir, precision = tmp_path / "run", "bf16" if "bf16" in words else "no"
    # Of maps of a single pixel torch's convolution gives wrong gradients on CPUs in bf16.
    more = ("--epochs", "1", "--probe.no-enabled", "--launch.ranks", "2", "--data.image-size", "64")
    arguments = options(dataset, run_dir, *more)
    (found,) = outputs([
        *ACCELERATE, "--config_file", str(ROOT / "launch_configs" / f"{name}.yaml"), "--num_processes", "2",
        "--mixed_precision", precision, "-m", "dist_contrastive.train", *arguments,
    ])  # fmt: skip
    assert words in found
    assert (run_dir / "DONE").exists()


def test_machines_that_are_several_meet_at_a_port_that_all_know() -> None:
    told = [yaml.safe_load(file.read_text()) for file in FILES]
    several = [one for one in told if one["num_machines"] > 1]
    assert several
    for one in several:
        assert one["main_process_port"] > 0
        assert one["rdzv_backend"] == "c10d"
        assert not one["same_network"], "accelerate would take the static rendezvous, which starts no rank again"


def test_two_machines(dataset: Path, tmp_path: Path) -> None:
    run_dir, port = tmp_path / "run", free_port()
    arguments = options(dataset, run_dir, "--epochs", "1", "--probe.no-enabled", "--launch.ranks", "4")

    def machine(number: int) -> list[str]:
        return [
            *ACCELERATE, "--config_file", str(ROOT / "launch_configs" / "multi_node.yaml"), "--num_machines", "2",
            "--num_processes", "4", "--machine_rank", str(number), "--main_process_ip", "127.0.0.1",
            "--main_process_port", str(port), "--mixed_precision", "no", "-m", "dist_contrastive.train", *arguments,
        ]  # fmt: skip

    found = "".join(outputs(machine(0), machine(1)))
    assert "4 rank(s), cpu, gloo, fp32" in found
    assert (run_dir / "DONE").exists()


# torchrun


def test_torchrun_on_two_machines(dataset: Path, tmp_path: Path) -> None:
    run_dir, endpoint = tmp_path / "run", f"127.0.0.1:{free_port()}"
    arguments = options(dataset, run_dir, "--epochs", "1", "--probe.no-enabled", "--launch.ranks", "2")
    machine = [
        *TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint,
        "-m", "dist_contrastive.train", *arguments,
    ]  # fmt: skip
    assert "2 rank(s), cpu, gloo, fp32" in "".join(outputs(machine, machine))
    assert (run_dir / "DONE").exists()


DIES_ONCE = """
import os, signal
from dist_contrastive import distributed, liveness, trainer
from dist_contrastive.train import main

update = trainer.Trainer.update

def dies(self, batch):
    values = update(self, batch)
    if self.step == {step} and distributed.rank() == {rank} and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return values

trainer.Trainer.update = dies
liveness.run_rank(main)
"""


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert run_ranks(command, 2, options(dataset, run_dir, "--probe.no-enabled"))[0][0] == 0
    return run_dir


@pytest.mark.parametrize(
    ("words", "rank"),
    [
        ([*TORCHRUN, "--standalone", "--nproc-per-node", "2", "--max-restarts", "3"], 0),
        ([*ACCELERATE, "--config_file", str(ROOT / "launch_configs" / "cpu.yaml"), "--max_restarts", "3"], 1),
    ],
    ids=["torchrun", "accelerate"],
)
def test_a_rank_that_is_killed_is_started_again_and_the_run_is_the_same(
    words: list[str], rank: int, undisturbed: Path, dataset: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    driver = tmp_path / "dist_contrastive_driver.py"
    driver.write_text(DIES_ONCE.format(rank=rank, step=STEPS_PER_EPOCH + 2))
    (output,) = outputs([*words, str(driver), *options(dataset, run_dir, "--probe.no-enabled")])
    assert f"error: rank {rank} died (rank {1 - rank} waited for it" in output
    assert f"goes on after step {STEPS_PER_EPOCH} of" in output
    assert_same_state(newest_checkpoint(run_dir), newest_checkpoint(undisturbed))
    assert metrics_of(run_dir) == metrics_of(undisturbed)


def test_a_run_that_is_to_stop_is_not_started_again(dataset: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", "--max-restarts", "3", "-m", "dist_contrastive.train"]
    (output,) = outputs([*words, *options(dataset, run_dir, "--probe.no-enabled", "--stop-after-steps", "3")])
    assert output.count("stopped after step 3") == 1
    assert json.loads((run_dir / "status.json").read_text())["state"] == "stopped"


@pytest.mark.parametrize(
    "words",
    [
        [*TORCHRUN, "--nproc-per-node", "2", "--master-port"],
        [
            *ACCELERATE, "--config_file", str(ROOT / "launch_configs" / "multi_node.yaml"), "--num_processes", "4",
            "--mixed_precision", "no", "--main_process_port",
        ],
    ],
    ids=["torchrun", "accelerate"],
)  # fmt: skip
def test_a_port_that_is_taken_ends_the_launcher_which_names_it(words: list[str], tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with launched([*words, str(port), "-m", "dist_contrastive.train"]) as (process,):
            output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode != 0
    assert str(port) in output
