"""Ranks that Slurm started, one a task: `srun python -m dist_contrastive.train …`, without another launcher.

srun tells its tasks who they are in variables of its own; `adopt_slurm` says the same in those that torch reads. Source of
their meaning: srun(1), "OUTPUT ENVIRONMENT VARIABLES".
"""

import os
import re
from collections.abc import MutableMapping

FIRST_PORT, NUM_PORTS = 20000, 12000
"""Where the ranks meet: below the ports that Linux gives to outgoing connections (from 32768)."""


def adopt_slurm(environ: MutableMapping[str, str] = os.environ) -> None:
    """In a step of several tasks set RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    Nothing is changed where a launcher has set RANK, in a step of one task (a shell, a launcher that is yet to start its
    ranks), and outside of a step. A MASTER_ADDR or MASTER_PORT that is there stays.
    """
    step_id, num_tasks = environ.get("SLURM_STEP_ID"), int(environ.get("SLURM_STEP_NUM_TASKS", 1))
    if step_id is None or "SLURM_PROCID" not in environ or "RANK" in environ or num_tasks < 2:
        return
    environ["RANK"] = environ["SLURM_PROCID"]
    environ["LOCAL_RANK"] = environ["SLURM_LOCALID"]
    environ["WORLD_SIZE"] = str(num_tasks)
    environ["LOCAL_WORLD_SIZE"] = str(
        tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])[int(environ["SLURM_NODEID"])]
    )
    environ.setdefault("MASTER_ADDR", first_host(environ["SLURM_STEP_NODELIST"]))
    environ.setdefault("MASTER_PORT", str(step_port(int(environ["SLURM_JOB_ID"]), int(step_id))))


def first_host(nodelist: str) -> str:
    """The first host of Slurm's notation, on which its first task runs: `rack1n01` of `rack[1-2]n[01-03,07],login`."""
    names = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodelist)
    assert names
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", names[0])


def tasks_per_node(counts: str) -> list[int]:
    """The number of tasks on each node of Slurm's notation: [2, 2, 2, 1] of `2(x3),1`."""
    found = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in counts.split(",")]
    return [int(part[1]) for part in found if part for _ in range(int(part[2] or 1))]


def step_port(job: int, step: int) -> int:
    """The port at which a step's ranks meet: the same on all of them, and another one for jobs and steps beside it."""
    return FIRST_PORT + (31 * job + step) % NUM_PORTS
