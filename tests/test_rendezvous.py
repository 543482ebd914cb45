"""Ranks that find one another: who is missing is named, a port that is taken too, and cores are divided once."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dist_contrastive import rendezvous
from dist_contrastive.config import UserError
from dist_contrastive.launch import connect
from dist_contrastive.rendezvous import in_ranges, numbers, share_of_cores
from tests.harness import run_ranks
from tests.runs import tiny_config, write_dataset
from tests.test_command import TIMEOUT_S, options


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def variables(rank: int, world: int, port: int) -> dict[str, str]:
    """What a launcher tells a rank, all ranks on this machine."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in names.items()}}


@contextmanager
def started(arguments: list[str], *ranks: dict[str, str]) -> Iterator[list[subprocess.Popen[str]]]:
    """Ranks of the train command, started by hand."""
    command = [sys.executable, "-m", "dist_contrastive.train", *arguments]
    processes = [
        subprocess.Popen(
            command, env={**os.environ, **one}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for one in ranks
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def outcome(process: subprocess.Popen[str]) -> tuple[int, list[str], str]:
    """Exit status, our lines, and all that was printed."""
    output, _ = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, [line for line in output.splitlines() if line.startswith("error: ")], output


def test_ranks_that_were_started_by_hand_train(dataset: Path, tmp_path: Path) -> None:
    arguments = options(dataset, tmp_path / "run", "--epochs", "1", "--probe.no-enabled")
    port = free_port()
    with started(arguments, *(variables(rank, 2, port) for rank in range(2))) as ranks:
        found = [outcome(rank) for rank in ranks]
    assert [status for status, _, _ in found] == [0, 0], found
    assert "2 rank(s), cpu, gloo, fp32" in found[0][2]


@pytest.mark.parametrize(
    ("rank", "words"),
    [
        (0, "rank(s) 1-2 of 3 did not come within 0.05 min (here: 0 on "),
        (1, "rank 0 has not come within 0.05 min: nothing answers at 127.0.0.1:"),
    ],
)
def test_ranks_that_never_come_are_named(rank: int, words: str, dataset: Path, tmp_path: Path) -> None:
    arguments = options(dataset, tmp_path / "run", "--batch.global", "12", "--launch.timeout-minutes", "0.05")
    one = {**variables(rank, 3, free_port()), "LOCAL_RANK": "0"}
    with started(arguments, one) as (process,):
        status, lines, output = outcome(process)
    assert status == 2, output
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {words}")
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


def test_all_that_came_hear_who_did_not(dataset: Path, tmp_path: Path) -> None:
    arguments = options(dataset, tmp_path / "run", "--batch.global", "12", "--launch.timeout-minutes", "0.5")
    port = free_port()
    # Each as the only one of its host: one line a host.
    here = [{**variables(rank, 3, port), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"} for rank in (0, 2)]
    with started(arguments, *here) as ranks:
        found = [outcome(rank) for rank in ranks]
    for status, lines, output in found:
        assert status == 2, output
        assert len(lines) == 1
        assert f"rank(s) 1 of 3 did not come within 0.5 min (here: 0,2 on {socket.gethostname()})" in lines[0]


def test_a_launch_that_meets_another_one_is_told(dataset: Path, tmp_path: Path) -> None:
    arguments = options(dataset, tmp_path / "run", "--batch.global", "12")
    port = free_port()
    with started([*arguments, "--launch.timeout-minutes", "5"], *(variables(rank, 3, port) for rank in range(2))):
        until = time.monotonic() + TIMEOUT_S
        while not is_called(port, rank=1):
            assert time.monotonic() < until
            time.sleep(0.2)
        other = {**variables(1, 3, port), "LOCAL_RANK": "0"}
        with started([*arguments, "--launch.timeout-minutes", "0.05"], other) as (process,):
            status, lines, output = outcome(process)
    assert status == 2, output
    assert len(lines) == 1
    assert lines[0].startswith(
        f"error: rank 1 is there already, on {socket.gethostname()}: two launches use one MASTER_PORT"
    )


def is_called(port: int, rank: int) -> bool:
    """Whether a rank has answered to the roll call at that port."""
    with contextlib.suppress(dist.DistNetworkError, dist.DistStoreError):
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=5))
        return store.check(["token"]) and store.check([f"{store.get('token').decode()}/{rank}"])
    return False


def test_a_port_that_is_taken_is_named(dataset: Path, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with started(options(dataset, tmp_path / "run"), variables(0, 2, port)) as (process,):
            status, lines, output = outcome(process)
    assert status == 2, output
    assert lines == [
        f"error: port {port} (MASTER_PORT) of 127.0.0.1 is taken, perhaps by another run; give another one to all ranks"
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"MASTER_PORT": "0"}, "MASTER_PORT 0: all ranks need to know the same port"),
        ({"MASTER_PORT": "none"}, "MASTER_PORT none: all ranks need to know the same port"),
        (
            {"MASTER_ADDR": ""},
            "WORLD_SIZE is 2, and MASTER_ADDR is not set; start ranks with accelerate launch or torchrun",
        ),
    ],
)
def test_what_no_ranks_can_meet_by_is_refused(
    changes: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**variables(0, 2, 1), **changes}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        rendezvous.join("gloo", timeout=timedelta(seconds=1), gpu=str)


JOIN = """
import sys
from datetime import timedelta
import torch, torch.distributed as dist
from dist_contrastive import rendezvous
rank = int(sys.argv[1])
rendezvous.join("gloo", timeout=timedelta(seconds=60), gpu=lambda: f"GPU-{rank}")
total = torch.tensor(float(rank + 1))
dist.all_reduce(total)
print(float(total), *(peer.gpu for peer in rendezvous.peers()))
"""


def test_what_an_earlier_attempt_left_in_the_launchers_store_is_not_read() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    old = json.dumps({"id": "of a rank that is gone", "host": "here", "machine": "", "cpus": "0", "gpu": ""})
    for name, value in {"token": "old", "old/0": old, "old/1": old, "old/all": f"[{old}, {old}]"}.items():
        store.set(name, value)
    for _ in range(2):
        environments = [{**os.environ, **variables(rank, 2, store.port)} for rank in range(2)]
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", JOIN, str(rank)],
                env={**environment, "TORCHELASTIC_USE_AGENT_STORE": "True"},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank, environment in enumerate(environments)
        ]
        assert [rank.communicate(timeout=TIMEOUT_S)[0].split() for rank in ranks] == [["3.0", "GPU-0", "GPU-1"]] * 2


# What the ranks tell of themselves


def connect_on(rank: int, masks: list[set[int]], run_dir: Path) -> tuple[list[str], int, int]:
    os.sched_setaffinity(0, masks[rank])
    connect(tiny_config(run_dir, Path("tiny.beton")))
    return [peer.cpus for peer in rendezvous.peers()], rendezvous.fair_cores(), torch.get_num_threads()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="takes two cores")
def test_ranks_know_one_anothers_cores(tmp_path: Path) -> None:
    first, second = sorted(os.sched_getaffinity(0))[:2]
    masks = [{first, second}, {second}]
    told = [in_ranges(mask) for mask in masks]
    assert run_ranks(connect_on, 2, masks, tmp_path) == [(told, 1, 1)] * 2
    assert run_ranks(connect_on, 1, [{first, second}], tmp_path) == [([told[0]], 2, 2)]


@pytest.mark.parametrize(
    ("mine", "everyones", "cores"),
    [
        ("0-7", ["0-7"], 8),
        ("0-7", ["0-7"] * 4, 2),
        ("2-3", ["0-1", "2-3", "4-5", "6-7"], 2),  # each has its own already
        ("0-3", ["0-3", "0-3", "4-7", "4-7"], 2),
        ("0-5", ["0-5", "4-5"], 5),
        ("0-2", ["0-2"] * 3, 1),
        ("0", ["0"] * 9, 1),
        ("8,0-2", ["8,0-2", "9"], 4),
    ],
)
def test_cores_that_several_may_use_are_divided_once(mine: str, everyones: list[str], cores: int) -> None:
    assert share_of_cores(mine, everyones) == cores


@pytest.mark.parametrize(("found", "text"), [([], ""), ([3], "3"), ([9, 1, 0, 2, 7, 8], "0-2,7-9"), ([0, 2], "0,2")])
def test_ranges(found: list[int], text: str) -> None:
    assert in_ranges(found) == text
    assert numbers(text) == set(found)
