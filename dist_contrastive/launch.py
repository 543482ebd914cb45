"""Start-up: connect the ranks, choose device and precision, and check that they are the ones asked for."""

import datetime
import logging
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs

import dist_contrastive
from dist_contrastive import distributed, rendezvous
from dist_contrastive.config import LaunchConfig, TrainConfig, UserError
from dist_contrastive.preflight import (
    ACCELERATE_NAMES,
    ZeroLaunch,
    check_compiled,
    check_device_options,
    check_devices,
    check_ranks,
    device_and_precision,
    device_for_use,
    device_number,
    launched_ranks,
    zero_launch,
)

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
BUCKET = 2**25
"""Numbers that DeepSpeed sends at once: 128 MiB of fp32."""


def connect(config: TrainConfig) -> Accelerator:
    """The Accelerator of this rank, checked; `UserError` where what was launched is not what was asked for."""
    device, precision = device_and_precision(config.launch)
    timeout = datetime.timedelta(minutes=config.launch.timeout_minutes)
    zero = zero_launch(config)
    _join(device, timeout)
    _use(config, device)
    if zero:
        accelerator = _connect_deepspeed(zero, device, timeout)
    else:
        accelerator = Accelerator(
            cpu=device == "cpu",
            mixed_precision=ACCELERATE_NAMES[precision],
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
        )
    _check(config, accelerator, device)
    _open_groups(device, timeout)
    return accelerator


def connect_for_use(asked: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """Connect the ranks of what uses a run and trains nothing, in fp32; where this rank is to compute.

    `UserError` where there is no such device, or none for each rank.
    """
    wanted = LaunchConfig(device=device_for_use(asked), precision="fp32")
    kind, _ = device_and_precision(wanted)
    timeout = datetime.timedelta(minutes=wanted.timeout_minutes)
    _join(kind, timeout)
    device = torch.device(kind, device_number()) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    _open_groups(kind, timeout)
    return device


def _join(device: str, timeout: datetime.timedelta) -> None:
    rendezvous.join(BACKENDS[device], timeout=timeout, gpu=_gpu if device == "cuda" else str)
    check_devices(rendezvous.peers())


def _open_groups(device: str, timeout: datetime.timedelta) -> None:
    distributed.open_groups(timeout)
    if device == "cpu":  # whatever OMP_NUM_THREADS says: torchrun sets it to 1 where the user does not
        torch.set_num_threads(rendezvous.fair_cores())


def _use(config: TrainConfig, device: str) -> None:
    """Let torch compute as the config asks; what it does by default is not what it did in other versions."""
    launch = config.launch
    check_device_options(launch, device)
    check_compiled(config, launched_ranks())
    # By the older setters, which set both: torch refuses to be asked in its older words what was said in the newer, and asks so
    # itself while it exports a model.
    torch.set_float32_matmul_precision("high" if launch.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = launch.tf32
    torch.backends.cudnn.benchmark = launch.cudnn_benchmark
    if launch.expandable_segments:
        # Not by PYTORCH_CUDA_ALLOC_CONF, which is read before anyone has asked for anything; before the first tensor it is
        # early enough.
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def _connect_deepspeed(zero: ZeroLaunch, device: str, timeout: datetime.timedelta) -> Accelerator:
    """The Accelerator of a rank under DeepSpeed, in whose config is what `step.zero` relies on."""
    if device == "cpu":
        # With `cpu=True` accelerate would take DistributedDataParallel without a word.
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # Messages in shared memory would be compiled now, which takes most of a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    optimizer_on = {"device": "cpu", "pin_memory": device == "cuda"} if zero.offload else {"device": "none"}
    # Of which fields the launch config has, accelerate refuses those that a DeepSpeed config has too; they are taken from it.
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
    plugin = DeepSpeedPlugin(
        hf_ds_config={
            "train_micro_batch_size_per_gpu": 1,  # it asks, and the trainer cuts its batches itself
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,  # set before each update
            "fp16": {"enabled": False},  # parameters stay in fp32, under autocast
            "bf16": {"enabled": False},
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {
                "stage": zero.stage,
                "reduce_bucket_size": BUCKET,
                "allgather_bucket_size": BUCKET,
                "overlap_comm": False,  # gradients are averaged in one pass, when all are there
                "offload_optimizer": optimizer_on,
            },
        }
    )
    return Accelerator(
        deepspeed_plugin=plugin, kwargs_handlers=[InitProcessGroupKwargs(backend=BACKENDS[device], timeout=timeout)]
    )


def _check(config: TrainConfig, accelerator: Accelerator, device: str) -> None:
    ranks, launched = accelerator.num_processes, launched_ranks()
    if ranks != launched or distributed.world_size() != ranks:
        raise UserError(f"the launcher started {launched} ranks, but accelerate connected {ranks}; see launch_configs/")
    if accelerator.device.type != device:
        raise UserError(f"the run got device {accelerator.device.type}, not {device}; check the launch config")
    if distributed.is_distributed():
        backend = BACKENDS[device]
        if dist.get_backend() != backend:
            raise UserError(f"the ranks talk over {dist.get_backend()}, not {backend}; check the launch config")
    check_ranks(config, ranks)


def _gpu() -> str:
    """What tells the GPU of this rank from all others."""
    return str(torch.cuda.get_device_properties(device_number()).uuid)


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


def describe_machine(config: TrainConfig, accelerator: Accelerator) -> dict[str, Any]:
    """What the run runs on, for its report: hardware, versions, ranks. Rank 0's names the package's commit, too."""
    zero = zero_launch(config)
    machine: dict[str, Any] = {
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "ranks": accelerator.num_processes,
        "backend": dist.get_backend() if distributed.is_distributed() else "none (one rank)",
        "device": accelerator.device.type,
        "precision": device_and_precision(config.launch)[1],
        "optimizer": zero.describe() if zero else "whole on each rank",
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
