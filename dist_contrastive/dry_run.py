"""`--dry-run`: everything is built, and what the run would do and take is printed; nothing is written into its folder.

The ranks are those that were launched, or, where a number is given, CUDA ranks that need not be there. What a step takes
is found by simulating rank 0 of as many CUDA ranks (`simulate`): tensors, collectives and operations are those of the real
step; workspaces of libraries and fragmentation are not seen.
"""

import os
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from dist_contrastive import distributed, liveness, preflight, rendezvous
from dist_contrastive.batch import steps_per_epoch
from dist_contrastive.config import TrainConfig, UserError, require
from dist_contrastive.data.beton import open_dataset
from dist_contrastive.data.format import TRAIN, Manifest, find_manifest
from dist_contrastive.launch import BACKENDS, connect
from dist_contrastive.methods import method_of
from dist_contrastive.optim import peak_learning_rate
from dist_contrastive.run_folder.folder import start_of
from dist_contrastive.simulate import Precision, Simulation, simulate
from dist_contrastive.trainer import Trainer
from dist_contrastive.trial import fewest_samples

BYTES = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")
FLOPS = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP")


@dataclass
class Plan:
    """What is shown, in order: a name, and what there is to say of it."""

    rows: list[tuple[str, str]] = field(default_factory=list)

    def add(self, name: str, *parts: str) -> None:
        self.rows.append((name, "; ".join(filter(None, parts))))

    def show(self) -> None:
        print("dry run: nothing was trained or written")
        width = max(len(name) for name, _ in self.rows)
        for name, text in self.rows:
            print(f"  {name.ljust(width)}  {text}", flush=True)


def dry_run(config: TrainConfig, ranks: int | None) -> None:
    """Print the plan of `config` on so many CUDA ranks, or on those that were launched (None); all of these call it.

    `UserError` where the run can't be carried out.
    """
    method_of(config)
    if ranks is None:
        _plan_here(config)
    else:
        require(
            preflight.launched_ranks() == 1,
            "--dry-run with --ranks or --device simulates in one process: start it with python -m, without a launcher",
        )
        _plan_of(config, ranks).show()


def _plan_here(config: TrainConfig) -> None:
    """Of the ranks that were launched; they connect."""
    start = "fresh" if config.overwrite else start_of(config.run_dir, config)
    preflight.check_ranks(config, preflight.launched_ranks())
    fewest = fewest_samples(config)
    accelerator = connect(config)
    with liveness.watch(60 * config.launch.timeout_minutes):
        ranks = distributed.world_size()
        fewest = preflight.check_passes(config, ranks, fewest)
        manifest, why_not = distributed.together(lambda: _dataset(config))
        steps = steps_per_epoch(manifest.num_train, config.batch.size) if manifest else 1
        trainer = Trainer(config, accelerator, steps_per_epoch=steps, dataset_sha256="", fewest=fewest)
        measured = trainer.plan_memory() if config.batch.micro == "auto" else None
        device, precision = preflight.device_and_precision(config.launch)
        zero = preflight.zero_launch(config)

        def show() -> None:
            plan = Plan()
            kept = trainer.store.steps()
            goes_on = f"goes on after step {kept[-1]}" if kept else "goes on, without a checkpoint: from step 1"
            _add_config(plan, config, manifest, why_not, "starts" if start == "fresh" else goes_on)
            where = f"{distributed.local_ranks()} on this host, {rendezvous.fair_cores()} core(s) for each"
            backend = BACKENDS[device] if ranks > 1 else ""
            plan.add("ranks", f"{ranks} on {device} in {precision}, launched", where, backend)
            micro = measured.micro if measured else None
            _add_step(plan, config, simulate(config, ranks=ranks, precision=cast(Precision, precision), micro=micro))
            if zero:
                place = "in the memory of its host" if zero.offload else "on a rank"
                share = f"1/{ranks} of the optimizer's state {place}"
                plan.add("DeepSpeed", f"simulated as whole copies; stage {zero.stage} keeps {share}")
            if measured:
                plan.add("memory plan", measured.describe())
            _add_remarks(plan, config, manifest)
            plan.show()

        distributed.together(lambda: show() if distributed.is_main() else None)


def _plan_of(config: TrainConfig, ranks: int) -> Plan:
    """Of `ranks` CUDA ranks that need not be there."""
    require(ranks >= 1, f"--ranks {ranks}: give at least 1")
    config = replace(config, launch=replace(config.launch, ranks=ranks))
    preflight.check_ranks(config, ranks)
    preflight.check_passes(config, ranks, fewest_samples(config))
    manifest, why_not = _dataset(config)
    try:
        start = "fresh" if config.overwrite else start_of(config.run_dir, config)
        start_here = "would start" if start == "fresh" else "would go on with what is there"
    except UserError as error:  # of this machine's folder, which may not be that of those ranks
        start_here = f"would not start here: {error}"
    precision = config.launch.precision
    if precision == "auto":
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        precision = cast(Precision, preflight.PRECISIONS.get(launched, "fp32"))
    found = simulate(config, ranks=ranks, precision=precision)
    plan = Plan()
    _add_config(plan, config, manifest, why_not, start_here)
    plan.add("ranks", f"{ranks} on cuda in {precision}, simulated", "nccl" if ranks > 1 else "")
    _add_step(plan, config, found)
    _add_remarks(plan, config, manifest)
    return plan


def _dataset(config: TrainConfig) -> tuple[Manifest | None, str]:
    """The dataset's manifest, or None and why there is none yet; `UserError` where the run can't learn from what is there."""
    try:
        manifest = find_manifest(config.data.path)
    except UserError as error:
        return None, str(error)
    preflight.check_dataset(config, manifest)
    dataset = open_dataset(config.data.path, verify=False)
    train = dataset.indices(TRAIN)
    preflight.check_crops(config, dataset.heights[train], dataset.widths[train])
    return manifest, ""


def _add_config(plan: Plan, config: TrainConfig, manifest: Manifest | None, why_not: str, start: str) -> None:
    optim = config.optim
    layout = config.augment.layout(config.data.image_size)
    views = " and ".join(f"{len(views)} of {size}×{size} pixels" for size, _, views in layout)
    plan.add(
        "recipe",
        f"{config.recipe}: {config.method.name}, {config.encoder.name}, views: {views}",
    )
    plan.add("run folder", str(config.run_dir), start)
    peak = f"{optim.learning_rate:g} per 256 samples = {peak_learning_rate(optim, config.batch.size):g} at its peak"
    warmup = f"warm-up of {optim.warmup_epochs:g} epoch(s)" if optim.warmup_epochs else "no warm-up"
    if manifest is None:
        plan.add("dataset", f"not there yet: {why_not}")
        plan.add("steps", f"{config.epochs} epochs; how many steps an epoch has is unknown without the dataset")
    else:
        steps = steps_per_epoch(manifest.num_train, config.batch.size)
        plan.add("dataset", f"{config.data.path}, {manifest.num_train:,} training samples")
        plan.add("steps", f"{config.epochs * steps:,}: {config.epochs} epochs of {steps:,}")
        warmup += f" ({round(optim.warmup_epochs * steps):,} steps)" if optim.warmup_epochs else ""
    plan.add("learning rate", peak, warmup, f"schedule {optim.schedule}, optimizer {optim.name}")


def _add_step(plan: Plan, config: TrainConfig, found: Simulation) -> None:
    """What the simulation shows of a step, and of what is saved."""
    whole = found.micro == found.rank_batch
    passes = "in one forward pass" if whole else f"in micro-batches of {found.micro:,}"
    plan.add("batch", f"{config.batch.size:,} samples = {found.ranks} × {found.rank_batch:,}, {passes}")
    plan.add("parameters", f"{found.parameters / 1e6:.1f} M trained")
    plan.add(
        "memory a rank",
        f"{size(found.peak_bytes)} of tensors at the worst moment of a step (simulated; libraries take more)",
        f"{size(found.held_bytes)} of these are held between steps, the model with {size(found.model_bytes)} among them",
    )
    plan.add("computation", f"{scaled(found.flops, 1000, FLOPS)} a step and rank (simulated)")
    if found.ranks > 1:
        plan.add("sent by devices", f"{_traffic(found, is_message=False)} a step (simulated)")
        plan.add("sent by hosts", f"{_traffic(found, is_message=True)} a step (simulated)")
    count = config.checkpoint.keep + 1
    folder = config.run_dir / "checkpoints"
    needed, free = count * found.checkpoint_bytes, _free_bytes(folder)
    plan.add(
        "checkpoints",
        f"{size(found.checkpoint_bytes)} each (predicted)",
        f"{size(needed)} for {config.checkpoint.keep} that are kept and the one that is being written",
        f"{size(free)} are free here" + (", which is too little" if free < needed else ""),
    )


def _add_remarks(plan: Plan, config: TrainConfig, manifest: Manifest | None) -> None:
    for remark in preflight.remarks(config, manifest.num_train) if manifest else []:
        plan.add("note", remark)


def _traffic(found: Simulation, *, is_message: bool) -> str:
    """Calls and bytes of each kind of collective."""
    kinds: dict[str, tuple[int, int]] = {}
    for one in found.collectives:
        if one.is_message == is_message:
            count, total = kinds.get(one.kind, (0, 0))
            kinds[one.kind] = (count + one.count, total + one.count * one.bytes)
    return ", ".join(f"{count} × {kind} ({size(total)})" for kind, (count, total) in kinds.items()) or "nothing"


def _free_bytes(path: Path) -> int:
    """Of the disk on which `path` lies or would."""
    there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())
    return shutil.disk_usage(there).free


def size(num_bytes: float) -> str:
    """Bytes as in `1.5 GiB`."""
    return scaled(num_bytes, 1024, BYTES)


def scaled(number: float, base: int, units: tuple[str, ...]) -> str:
    """Three digits and the unit, each of which is `base` times the one before."""
    power = 0
    while number >= base and power < len(units) - 1:
        number, power = number / base, power + 1
    return f"{number:.4g} {units[power]}" if number >= 1000 else f"{number:.3g} {units[power]}"
