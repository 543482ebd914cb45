"""What is checked of a run before what trains is imported and before the ranks connect: a refusal then takes a moment.

Nothing is written, and each rank checks for itself, so all refuse alike. What may be different once the ranks are
connected (the run's folder, which is locked then; the ranks that are there) is checked again by the same functions.
"""

import importlib.util
import math
import os
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from dist_contrastive.batch import Share, smallest_part, steps_per_epoch
from dist_contrastive.config import LaunchConfig, TrainConfig, UserError, require
from dist_contrastive.data.format import Manifest, find_manifest
from dist_contrastive.methods import method_of
from dist_contrastive.rendezvous import Peer, in_ranges
from dist_contrastive.run_folder.folder import start_of

ACCELERATE_NAMES = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
AMPERE = 8
"""Major compute capability of the first GPUs with TensorFloat-32."""
PRECISIONS = {name: precision for precision, name in ACCELERATE_NAMES.items()}


def check(config: TrainConfig) -> None:
    """`UserError` where the run can't start or go on, as far as it can be told from here."""
    if not config.overwrite:
        start_of(config.run_dir, config)
    method_of(config)
    check_dataset(config, find_manifest(config.data.path))
    check_ranks(config, launched_ranks())
    device, _ = device_and_precision(config.launch)
    check_device_options(config.launch, device)
    check_compiled(config, launched_ranks())
    zero_launch(config)


def check_dataset(config: TrainConfig, manifest: Manifest) -> None:
    """`UserError` where the run can't learn from the dataset with this manifest."""
    steps = steps_per_epoch(manifest.num_train, config.batch.size)
    total, warmup = steps * config.epochs, config.optim.warmup_epochs
    require(
        warmup == 0 or round(warmup * steps) > 0,
        f"--optim.warmup-epochs {warmup:g} is less than a step: an epoch has {steps} of --batch.global {config.batch.size}; "
        f"give 0, or at least {1 / steps:g}",
    )
    require(
        config.stop_after_steps <= total,
        f"--stop-after-steps {config.stop_after_steps}: the run has {total} steps ({config.epochs} epochs of {steps}); give at "
        "most that, or 0",
    )
    require(
        not config.method.needs_labels or manifest.has_labels,
        f"{config.method.name} is to learn from labels, and {config.data.path} {manifest.describe_labels()}",
    )
    if tower := config.method.text_tower:
        captions = manifest.captions
        if captions is None:
            raise UserError(
                f"{config.data.path} has no captions, which {config.method.name} learns from: pack pairs of images and "
                "captions, or give pack --caption-templates"
            )
        for option, has, wants in (
            ("vocabulary", tower.vocabulary, captions.vocabulary_size),
            ("context", tower.context, captions.max_tokens),
        ):
            require(
                has >= wants,
                f"--method.text.{option} {has}: the captions of {config.data.path} need {wants}; give at least that",
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


def device_for_use(asked: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    """Where what uses a run and trains nothing computes, by its `--device`; `UserError` where this machine has no such."""
    has_cuda = torch.cuda.is_available()
    require(asked != "cuda" or has_cuda, "--device cuda: torch sees no CUDA device here")
    return "cuda" if has_cuda and asked != "cpu" else "cpu"


def device_and_precision(wanted: LaunchConfig) -> tuple[str, str]:
    """What to train on, cpu or cuda, and in fp32, bf16 or fp16; `UserError` where this machine has not what is wanted."""
    has_cuda = torch.cuda.is_available()
    require(wanted.device != "cuda" or has_cuda, "--launch.device cuda: torch sees no CUDA device here")
    precision: str = wanted.precision
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    launched_on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    require(
        has_cuda or launched_on_cpu or wanted.device == "cpu" or launched == "no",
        f"accelerate was told to use {launched}, as for GPUs, and torch sees no CUDA device here; to train on the CPU all the "
        "same add --launch.device cpu",
    )
    if precision == "auto":
        require(
            launched in PRECISIONS, f"mixed precision {launched} of the launch is not supported; use no, bf16 or fp16"
        )
        precision = PRECISIONS[launched]
    if wanted.device == "cpu" or launched_on_cpu or not has_cuda:
        require(precision != "fp16", "fp16 needs a GPU; on a CPU use --launch.precision bf16 or fp32")
        return "cpu", precision
    number, visible = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    # A rank that sees a single GPU may have it for itself; whether it has, the ranks find out together (`check_devices`).
    has_own = visible == 1 and "CUDA_VISIBLE_DEVICES" in os.environ
    require(
        number < visible or has_own,
        f"rank {os.environ.get('RANK', 0)} is number {number} (from 0) on its host and sees {visible} GPU(s); start no more "
        "ranks than GPUs, and let each see all of them or its own alone",
    )
    require(
        precision != "bf16" or torch.cuda.is_bf16_supported(including_emulation=False),
        "this GPU computes no bf16 (that takes Ampere or newer: A100, RTX 30); use --launch.precision fp16",
    )
    return "cuda", precision


def check_device_options(launch: LaunchConfig, device: str) -> None:
    """`UserError` where the run is to use what `device`, cpu or cuda, has not."""
    for option, is_asked in (
        ("--launch.tf32", launch.tf32),
        ("--launch.cudnn-benchmark", launch.cudnn_benchmark),
        ("--launch.expandable-segments", launch.expandable_segments),
    ):
        require(not is_asked or device == "cuda", f"{option} is for GPUs, and the run is on the CPU; leave it out")
    require(
        not launch.tf32 or torch.cuda.get_device_capability()[0] >= AMPERE,
        "--launch.tf32: this GPU has no TensorFloat-32 (that takes Ampere or newer: A100, RTX 30); leave it out",
    )


def check_compiled(config: TrainConfig, ranks: int) -> None:
    """`UserError` where the run is to be compiled, and its forward passes would not keep the shapes of the first step."""
    if not config.launch.compile:
        return
    rank_batch, micro = Share(config.batch.size, num_ranks=ranks).rank_batch, config.batch.micro
    option = "--launch.compile"
    require(
        config.encoder.norm != "sync",
        f"{option} with --encoder.norm sync: what ranks tell one another within a pass can't be compiled; give batch or group",
    )
    require(
        not method_of(config).needs_patches,
        f"{option} with {config.method.name}: passes with masked patches are not compiled; leave it out",
    )
    if micro == "auto":
        raise UserError(f"{option} with --batch.micro auto, which may take any size: give --batch.micro a number")
    if 0 < micro < rank_batch:
        require(
            rank_batch % micro == 0,
            f"{option} with --batch.micro {micro}: a rank's {rank_batch} samples would make passes of two sizes; give a divisor",
        )
        require(
            config.encoder.norm == "group",
            f"{option} with --batch.micro {micro} and --encoder.norm batch: each micro-batch moves the running statistics by "
            "another share, and would be compiled by itself; give --encoder.norm group or --batch.micro 0",
        )


def device_number() -> int:
    """Which of the GPUs that this rank sees is its own."""
    return int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()


def check_devices(peers: list[Peer]) -> None:
    """`UserError` where ranks have the same GPU. `peers`: what each rank has told, in rank order."""
    users: dict[str, list[int]] = {}
    for rank, peer in enumerate(peers):
        users.setdefault(peer.gpu, []).append(rank)
    for gpu, ranks in users.items():
        require(
            not gpu or len(ranks) == 1,
            f"ranks {in_ranges(ranks)} have one and the same GPU of {peers[ranks[0]].host} ({gpu}); start no more ranks than "
            "GPUs, and let each see all of them, or its own alone (CUDA_VISIBLE_DEVICES; Slurm: --gpus-per-task=1)",
        )


@dataclass(frozen=True)
class ZeroLaunch:
    """What a launch config of DeepSpeed asks for."""

    stage: int
    """1 or 2."""
    offload: bool
    """Whether the optimizer's state lies in the host's memory."""

    def describe(self) -> str:
        return f"ZeRO stage {self.stage}{' on the host' if self.offload else ''}"


def zero_launch(config: TrainConfig) -> ZeroLaunch | None:
    """What was launched under DeepSpeed, None where nothing was; `UserError` where the run can't be computed so."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() not in ("1", "true", "yes"):
        return None
    for package in ("deepspeed", "transformers"):
        require(
            importlib.util.find_spec(package) is not None,
            f"the launch config asks for DeepSpeed, and {package} is not installed: pip install 'dist_contrastive[deepspeed]'",
        )
    asked = {
        "deepspeed_config_file": os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none"),
        "zero_stage": os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"),
        "offload_optimizer_device": os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none"),
        "offload_param_device": os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none"),
        "gradient_accumulation_steps": os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"),
        "gradient_clipping": os.environ.get("ACCELERATE_GRADIENT_CLIPPING", "none"),
    }
    can_be = {
        "deepspeed_config_file": (
            ("none",),
            "the trainer makes DeepSpeed's config; give zero_stage in the launch config",
        ),
        "zero_stage": (
            ("1", "2"),
            "stage 3 splits parameters, which methods with teachers and queues read whole; give 1 or 2",
        ),
        "offload_optimizer_device": (("none", "cpu"), "give none or cpu"),
        "offload_param_device": (("none",), "parameters are whole on each rank under stages 1 and 2; give none"),
        "gradient_accumulation_steps": (("1", "auto"), "give 1, and --batch.micro to the trainer"),
        "gradient_clipping": (("none", "auto", "0", "0.0"), "leave it out, and give --optim.clip-norm to the trainer"),
    }
    for name, (values, advice) in can_be.items():
        require(
            asked[name].lower() in values,
            f"{name}: {asked[name]} of the launch config can't be computed here: {advice}",
        )
    require(
        config.optim.name != "lars",
        "--optim.name lars under DeepSpeed: each rank sees flat shares of the gradient, and LARS needs the norm of each "
        "parameter; launch without DeepSpeed, or take adamw or sgd",
    )
    return ZeroLaunch(int(asked["zero_stage"]), asked["offload_optimizer_device"] == "cpu")


def check_crops(config: TrainConfig, heights: np.ndarray, widths: np.ndarray) -> None:
    """`UserError` where images of these sizes [N], in pixels, have no crops as configured: the loader would take others."""
    heights, widths = heights.astype(np.float64), widths.astype(np.float64)
    smallest, aspects = (heights * widths).min(), widths / heights
    for group in config.augment.groups:
        (low, high), (narrow, wide) = group.crop_scale, group.crop_ratio
        require(
            low * smallest >= 1,
            f"--augment.crop-scale {low:g} {high:g}: of an image of {smallest:.0f} pixels that is less than one pixel; give at "
            f"least {1 / smallest:.2g} {max(high, 1 / smallest):.2g}",
        )
        # A crop of aspect r fits into an image of aspect a up to an area of min(a / r, r / a).
        nearest = np.clip(aspects, narrow, wide)
        largest = np.minimum(aspects / nearest, nearest / aspects).max()
        require(
            low <= largest,
            f"--augment.crop-scale {low:g} {high:g} with --augment.crop-ratio {narrow:g} {wide:g}: no image has such; "
            f"give a smaller scale, at most {math.floor(100 * largest) / 100:g}, or ratios nearer to the images' own",
        )
    shortest = np.minimum(heights, widths).min()
    require(
        config.data.eval_crop * shortest >= 1,
        f"--data.eval-crop {config.data.eval_crop:g}: of an image of {shortest:.0f} pixels that is less than one; give at least "
        f"{1 / shortest:.2g}",
    )


def check_passes(config: TrainConfig, ranks: int, fewest: int) -> int:
    """`UserError` where a forward pass of a rank would have fewer samples than the method can take; how few those are.

    `fewest` is what `trial.fewest_samples` gave.
    """
    size, micro = config.batch.size, config.batch.micro
    rank_batch = Share(size, num_ranks=ranks).rank_batch
    sync = config.encoder.norm == "sync"
    fewest = math.ceil(fewest / ranks) if sync else fewest
    other_norm = "--encoder.norm group" if sync or ranks == 1 else "--encoder.norm sync or group"
    needs = f"{config.method.name} with --encoder.norm {config.encoder.norm} needs {fewest} for its batch statistics"
    require(
        rank_batch >= fewest,
        f"--batch.global {size} gives each of {ranks} rank(s) {rank_batch} sample(s) of a step, and {needs}; give at least "
        f"{fewest * ranks}, or {other_norm}",
    )
    least = rank_batch if micro == "auto" else smallest_part(rank_batch, micro)
    if least < fewest:
        valid = [m for m in range(1, rank_batch) if smallest_part(rank_batch, m) >= fewest]
        fits = min(valid, key=lambda m: abs(m - int(micro)), default=0)
        raise UserError(
            f"--batch.micro {micro} cuts a rank's {rank_batch} samples into forward passes of {least} at the least, and {needs}; "
            f"give {f'{fits}, or ' if fits else ''}0 (all at once), or {other_norm}"
        )
    return fewest


def remarks(config: TrainConfig, num_train: int) -> list[str]:
    """What works with so many training samples and still may not be what was meant, one line each."""
    steps = steps_per_epoch(num_train, config.batch.size)
    total, epochs = steps * config.epochs, config.epochs
    lines = []
    if config.optim.warmup_epochs and round(config.optim.warmup_epochs * steps) >= total:
        lines.append(
            f"--optim.warmup-epochs {config.optim.warmup_epochs:g} is all of --epochs {epochs}: the rate rises to the end"
        )
    if config.probe.enabled and config.probe.every > epochs:
        lines.append(
            f"--probe.every {config.probe.every} is more than --epochs {epochs}: there is one probe, at the end"
        )
    checkpoints = config.checkpoint
    if checkpoints.every > epochs and not checkpoints.every_steps and not checkpoints.every_minutes:
        lines.append(
            f"--checkpoint.every {config.checkpoint.every} is more than --epochs {epochs}: there is one checkpoint, at the end"
        )
    return lines + config.method.remarks(num_train, total * config.batch.size, config.batch.size)
