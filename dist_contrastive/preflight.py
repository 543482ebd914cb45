"""What is checked of a run before what trains is imported and before the ranks connect: a refusal then takes a moment.

Nothing is written, and each rank checks for itself, so all refuse alike. What may be different once the ranks are
connected (the run's folder, which is locked then; the ranks that are there) is checked again by the same functions.
"""

import os

import torch

from dist_contrastive.batch import Share, steps_per_epoch
from dist_contrastive.config import LaunchConfig, TrainConfig, require
from dist_contrastive.data.format import Manifest, find_manifest
from dist_contrastive.methods import method_of
from dist_contrastive.run_folder import start_of

ACCELERATE_NAMES = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
PRECISIONS = {name: precision for precision, name in ACCELERATE_NAMES.items()}


def check(config: TrainConfig) -> None:
    """`UserError` where the run can't start or go on, as far as it can be told from here."""
    if not config.overwrite:
        start_of(config.run_dir, config)
    method_of(config)
    check_dataset(config, find_manifest(config.data.path))
    check_ranks(config, launched_ranks())
    device_and_precision(config.launch)


def check_dataset(config: TrainConfig, manifest: Manifest) -> None:
    """`UserError` where the run can't learn from the dataset with this manifest."""
    steps_per_epoch(manifest.num_train, config.batch.size)
    require(
        not config.method.needs_labels or len(manifest.classes) > 1,
        f"{config.method.name} is to learn from labels, and {config.data.path} has none: all its samples are of one class",
    )


def launched_ranks() -> int:
    """How many ranks the launcher says that it started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def check_ranks(config: TrainConfig, ranks: int) -> None:
    """`UserError` where `ranks` ranks are not the ones asked for, or can't share a global batch."""
    require(
        config.launch.ranks in (0, ranks),
        f"{ranks} rank(s) were launched, --launch.ranks asks for {config.launch.ranks}; use accelerate launch "
        "--config_file launch_configs/… (its --cpu --num_processes N starts a single process)",
    )
    rank_batch, micro = Share(config.batch.size, num_ranks=ranks).rank_batch, config.batch.micro
    require(
        micro == "auto" or micro <= rank_batch,
        f"--batch.micro {micro}: a rank has {rank_batch} samples of a step; give at most that, or auto",
    )


def device_and_precision(wanted: LaunchConfig) -> tuple[str, str]:
    """What to train on, cpu or cuda, and in fp32, bf16 or fp16; `UserError` where this machine has not what is wanted."""
    has_cuda = torch.cuda.is_available()
    require(wanted.device != "cuda" or has_cuda, "--launch.device cuda: torch sees no CUDA device here")
    precision: str = wanted.precision
    if precision == "auto":
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        require(
            launched in PRECISIONS, f"mixed precision {launched} of the launch is not supported; use no, bf16 or fp16"
        )
        precision = PRECISIONS[launched]
    launched_on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if wanted.device == "cpu" or launched_on_cpu or not has_cuda:
        require(precision != "fp16", "fp16 needs a GPU; on a CPU use --launch.precision bf16 or fp32")
        return "cpu", precision
    number, visible = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    require(
        number < visible,
        f"rank {os.environ.get('RANK', 0)} is number {number} (from 0) on its host and sees {visible} GPU(s); start no more "
        "ranks than GPUs, and let each see all of them (Slurm: --gpus-per-node, not --gpus-per-task)",
    )
    require(
        precision != "bf16" or torch.cuda.is_bf16_supported(including_emulation=False),
        "this GPU computes no bf16 (that takes Ampere or newer: A100, RTX 30); use --launch.precision fp16",
    )
    return "cuda", precision
