"""What a step takes on GPUs, and where it stands still, without a GPU.

`simulate` runs the real `Trainer.update` as one CUDA rank of any number of ranks: the device's tensors have shapes and no
numbers, the host's part is computed as it is, collectives talk to nobody. It shows memory, operations, collectives, waits of
the host for the device, and tensors on the wrong device, each with the line of code that caused it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import dist_contrastive
from dist_contrastive.cli import EXIT_USER_ERROR
from dist_contrastive.config import TrainConfig, UserError, to_dict
from dist_contrastive.simulate.findings import (
    Collective,
    HostSync,
    Operation,
    Place,
    Precision,
    Simulation,
    WrongDevice,
)

__all__ = ["Collective", "HostSync", "Operation", "Place", "Precision", "Simulation", "WrongDevice", "simulate"]


def simulate(
    config: TrainConfig, *, ranks: int, precision: Precision, micro: int | None = None, logged: bool = False
) -> Simulation:
    """What rank 0 of `ranks` would do in a step of `config` on GPUs, found out in a process of its own; whole copies of the
    method, whatever was launched.

    Args:
        precision: fp32, bf16 or fp16.
        micro: samples of one forward pass, 0 for all of the rank's; None takes the config's, where `auto` is what the memory
            plan predicts for `--batch.memory-gib`.
        logged: whether the step writes a line of metrics.

    Raises `UserError` for a config that such ranks could not run, and `RuntimeError` with the traceback where the step fails.
    """
    request = {"config": to_dict(config), "ranks": ranks, "precision": precision, "micro": micro, "logged": logged}
    paths = [str(Path(dist_contrastive.__file__).parents[1]), os.environ.get("PYTHONPATH")]
    done = subprocess.run(
        [sys.executable, "-m", "dist_contrastive.simulate"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        # Without a GPU also where there is one, and without DeepSpeed: the simulation is the same everywhere.
        env={
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "ACCELERATE_USE_DEEPSPEED": "false",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        },
    )
    if done.returncode == EXIT_USER_ERROR:
        raise UserError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))
    if done.returncode:
        raise RuntimeError(f"the simulation of {config.recipe} on {ranks} rank(s) failed:\n{done.stderr.strip()}")
    return Simulation.from_json(json.loads(done.stdout))
