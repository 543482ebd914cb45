"""Start-up: connect the ranks, choose device and precision, and check that they are the ones asked for."""

import datetime
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

import dist_contrastive
from dist_contrastive import distributed
from dist_contrastive.config import TrainConfig, UserError
from dist_contrastive.preflight import ACCELERATE_NAMES, PRECISIONS, check_ranks, device_and_precision, launched_ranks


def connect(config: TrainConfig) -> Accelerator:
    """The Accelerator of this rank, checked; `UserError` where what was launched is not what was asked for."""
    device, precision = device_and_precision(config.launch)
    timeout = datetime.timedelta(minutes=config.launch.timeout_minutes)
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision=ACCELERATE_NAMES[precision],
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timeout),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
    )
    _check(config, accelerator, device)
    distributed.open_messages(timeout)
    cores = len(os.sched_getaffinity(0))
    if device == "cpu":
        torch.set_num_threads(max(1, cores // distributed.local_ranks()))
    return accelerator


def _check(config: TrainConfig, accelerator: Accelerator, device: str) -> None:
    ranks, launched = accelerator.num_processes, launched_ranks()
    if ranks != launched or distributed.world_size() != ranks:
        raise UserError(f"the launcher started {launched} ranks, but accelerate connected {ranks}; see launch_configs/")
    if accelerator.device.type != device:
        raise UserError(f"the run got device {accelerator.device.type}, not {device}; check the launch config")
    if distributed.is_distributed():
        backend = {"cpu": "gloo", "cuda": "nccl"}[device]
        if dist.get_backend() != backend:
            raise UserError(f"the ranks talk over {dist.get_backend()}, not {backend}; check the launch config")
    check_ranks(config, ranks)


def precision_of(accelerator: Accelerator) -> str:
    """fp32, bf16 or fp16."""
    return PRECISIONS[accelerator.mixed_precision]


def source_commit() -> str | None:
    """The commit of this package's checkout, with `-dirty` where files were changed; None where it is no checkout of git."""
    root = Path(dist_contrastive.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*", "--abbrev=12"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def describe_machine(accelerator: Accelerator) -> dict[str, Any]:
    """What the run runs on, for its report: hardware, versions, ranks. Rank 0's names the package's commit, too."""
    machine: dict[str, Any] = {
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "ranks": accelerator.num_processes,
        "backend": dist.get_backend() if distributed.is_distributed() else "none (one rank)",
        "device": accelerator.device.type,
        "precision": precision_of(accelerator),
    }
    if accelerator.device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
        machine["gpu_memory_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
    machine["python"] = platform.python_version()
    machine.update(
        {name: version(name) for name in ("torch", "accelerate", "ffcv", "timm", "numba", "dist_contrastive")}
    )
    if distributed.is_main() and (commit := source_commit()):
        machine["commit"] = commit
    return machine


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
