"""What Slurm's tasks are told, as ranks: the notations of Slurm, and when its variables count."""

import socket

import pytest

from dist_contrastive.config import UserError
from dist_contrastive.slurm import FIRST_PORT, NUM_PORTS, adopt_slurm, first_host, step_port, tasks_per_node

TASK = {
    "SLURM_JOB_ID": "71", "SLURM_STEP_ID": "3", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "2",
    "SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_STEP_NODELIST": "gpu[07-09,12]",
}  # fmt: skip
"""The environment of a task of srun, as far as it counts."""


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[1-2]", "n1"),
        ("n[2,4-6]", "n2"),
        ("gpu-[08-11]", "gpu-08"),
        ("gpu-a-7,gpu-b-[1-2]", "gpu-a-7"),
        ("node[0001-1024]", "node0001"),
        ("rack[1-2]n[01-03,07]", "rack1n01"),
        ("rack3n[09-10],rack[4-5]n[01-16]", "rack3n09"),
        ("c[3-4]-ib,c9", "c3-ib"),
        ("a[1,3]b[5]c,d", "a1b5c"),
    ],
)
def test_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


@pytest.mark.parametrize(
    ("counts", "tasks"),
    [("4", [4]), ("2(x3),1", [2, 2, 2, 1]), ("3,1", [3, 1]), ("8(x2),4,8(x2)", [8, 8, 4, 8, 8]), ("1(x12)", [1] * 12)],
)
def test_tasks_per_node(counts: str, tasks: list[int]) -> None:
    assert tasks_per_node(counts) == tasks


def test_a_task_is_a_rank() -> None:
    environ = dict(TASK)
    adopt_slurm(environ)
    assert {name: value for name, value in environ.items() if name not in TASK} == {
        "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "7", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "gpu07",
        "MASTER_PORT": str(step_port(71, 3)),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"RANK": "0"}, "a launcher's rank"),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, "a step of one task"),
        ({"SLURM_STEP_ID": None}, "the batch script"),
        ({"SLURM_PROCID": None}, "no task"),
    ],
)
def test_what_is_no_rank_of_slurms_is_left_alone(changes: dict[str, str | None], why: str) -> None:
    environ = {name: value for name, value in {**TASK, **changes}.items() if value is not None}
    before = dict(environ)
    adopt_slurm(environ)
    assert environ == before, why


def test_an_address_that_is_given_stays() -> None:
    environ = {**TASK, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4711"}
    adopt_slurm(environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("10.0.0.1", "4711")


def test_steps_beside_one_another_meet_at_ports_of_their_own() -> None:
    ports = {step_port(job, step) for job in range(100_000, 100_300) for step in range(20)}
    assert len(ports) == 300 * 20
    assert min(ports) >= FIRST_PORT
    assert max(ports) < FIRST_PORT + NUM_PORTS <= 32768


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_port_in_use_is_refused_by_rank_0_alone(family: socket.AddressFamily) -> None:
    dual = family == socket.AF_INET6
    if dual and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    with socket.create_server(("", 0), family=family, dualstack_ipv6=dual) as taken:
        environ = {**TASK, "MASTER_PORT": str(taken.getsockname()[1])}
        adopt_slurm(dict(environ))
        with pytest.raises(UserError, match=r"port \d+ of gpu07.* in use.*set MASTER_PORT"):
            adopt_slurm({**environ, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"})
