"""Start-up: connect the ranks, choose device and precision, and check that they are the ones asked for."""

import datetime
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

from dist_contrastive import distributed
from dist_contrastive.config import TrainConfig, UserError, require

ACCELERATE_NAMES = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
PRECISIONS = {name: precision for precision, name in ACCELERATE_NAMES.items()}


def connect(config: TrainConfig) -> Accelerator:
    """The Accelerator of this rank, checked; `UserError` where what was launched is not what was asked for."""
    wanted = config.launch
    use_cpu = wanted.device == "cpu" or (wanted.device == "auto" and not torch.cuda.is_available())
    require(
        wanted.device != "cuda" or torch.cuda.is_available(), "--launch.device cuda: torch sees no CUDA device here"
    )
    precision: str = wanted.precision
    if precision == "auto":
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        require(
            launched in PRECISIONS, f"mixed precision {launched} of the launch is not supported; use no, bf16 or fp16"
        )
        precision = PRECISIONS[launched]
    use_cpu = use_cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if use_cpu:
        require(precision != "fp16", "fp16 needs a GPU; on a CPU use --launch.precision bf16 or fp32")
    else:
        require(
            precision != "bf16" or torch.cuda.is_bf16_supported(), "this GPU has no bf16; use --launch.precision fp16"
        )
    accelerator = Accelerator(
        cpu=use_cpu,
        mixed_precision=ACCELERATE_NAMES[precision],
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=datetime.timedelta(minutes=wanted.timeout_minutes)),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
    )
    _check(config, accelerator, use_cpu)
    cores = len(os.sched_getaffinity(0))
    if use_cpu:
        torch.set_num_threads(max(1, cores // distributed.local_ranks()))
    return accelerator


def _check(config: TrainConfig, accelerator: Accelerator, use_cpu: bool) -> None:
    ranks, launched = accelerator.num_processes, int(os.environ.get("WORLD_SIZE", 1))
    if ranks != launched or distributed.world_size() != ranks:
        raise UserError(f"the launcher started {launched} ranks, but accelerate connected {ranks}; see launch_configs/")
    if config.launch.ranks not in (0, ranks):
        raise UserError(
            f"{ranks} rank(s) were launched, --launch.ranks asks for {config.launch.ranks}; use accelerate launch "
            "--config_file launch_configs/… (its --cpu --num_processes N starts a single process)"
        )
    device = "cpu" if use_cpu else "cuda"
    if accelerator.device.type != device:
        raise UserError(f"the run got device {accelerator.device.type}, not {device}; check the launch config")
    if distributed.is_distributed():
        backend = {"cpu": "gloo", "cuda": "nccl"}[device]
        if dist.get_backend() != backend:
            raise UserError(f"the ranks talk over {dist.get_backend()}, not {backend}; check the launch config")
    rank_batch, micro = distributed.share_of(config.batch.size).rank_batch, config.batch.micro
    if micro != "auto" and micro > rank_batch:
        raise UserError(f"--batch.micro {micro}: a rank has {rank_batch} samples of a step; give at most that, or auto")


def precision_of(accelerator: Accelerator) -> str:
    """fp32, bf16 or fp16."""
    return PRECISIONS[accelerator.mixed_precision]


def describe_machine(accelerator: Accelerator) -> dict[str, Any]:
    """What the run runs on, for its report: hardware, versions, ranks."""
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
    return machine


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
