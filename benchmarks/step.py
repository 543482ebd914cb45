"""`python -m benchmarks.step`: how many images a second does training take in, and where does a step's time go?

The trainer's own steps with its loader, from the packed file to the update, beside the encoder alone (forward and backward on a
batch that is on the device already, the limit) and lightly's SimCLR (its transform, a `DataLoader` with a worker a core, its
loss, a plain torch loop) with the same encoder, projector, batch and precision. Further, of ours: the share of each part of a
step, from steps in which the device is waited for after each part; model FLOPs utilisation (MFU); peak memory.

Encoders: `demo`, the demonstration's; `resnet18` and `resnet50` with a stem for 32 pixels. Every turn is a run of steps whose
batches begin with the turn and are used up in it, after as many as may lie ready have been thrown away.

    python -m benchmarks.step
    python -m benchmarks.step --encoders demo --data data/photos.beton --batch 128 --rounds 3
    accelerate launch --config_file launch_configs/t4.yaml -m benchmarks.step --encoders resnet50
"""

import copy
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.frame import (
    Budget,
    Record,
    Turns,
    at_least,
    bars,
    begin,
    choose_device,
    choose_precision,
    comparison,
    only_known,
    ratios,
    seconds,
    spread,
    take_turns,
    wait_for_device,
)
from benchmarks.loader import PilDataset
from dist_contrastive import distributed
from dist_contrastive.batch import Batch, steps_per_epoch
from dist_contrastive.cli import main_guard
from dist_contrastive.config import BatchConfig, EncoderConfig, LaunchConfig, TrainConfig
from dist_contrastive.data.beton import Dataset, open_dataset
from dist_contrastive.data.format import TRAIN
from dist_contrastive.data.loader import Loader
from dist_contrastive.data.packing import write_dataset
from dist_contrastive.data.resident import loader_of
from dist_contrastive.data.sources import open_source
from dist_contrastive.launch import connect
from dist_contrastive.recipes import build_recipe
from dist_contrastive.simulate.patches import patched
from dist_contrastive.step import gradient as step_gradient
from dist_contrastive.step.memory import measure_peak
from dist_contrastive.step.memory_plan import example
from dist_contrastive.step.replicas import DataParallel
from dist_contrastive.trainer import Trainer, build_method

QUESTION = "how many images a second does training take in, and where does a step's time go?"
IMAGES, SHARE, MFU, MEMORY = "images/s", "% of the step", "MFU, %", "peak MB of a step"
OURS, INSTRUMENTED, ENCODER_ALONE, LIGHTLY = "ours", "ours, timed part by part", "encoder alone", "lightly"
WAIT, AUGMENTATION, ENCODER, LOSS = "waiting for the loader", "augmentation", "encoder and projector", "loss"
COMMUNICATION, OPTIMIZER, REST = "communication", "optimizer", "the rest"
PARTS = (WAIT, AUGMENTATION, ENCODER, LOSS, COMMUNICATION, OPTIMIZER, REST)
TURN_S = 1.5
"""What a turn lasts at least, in seconds."""
ENCODERS = {
    "demo": (build_recipe("photos").encoder, 256),
    "resnet18": (EncoderConfig(name="resnet18", stem="small"), 64),
    "resnet50": (EncoderConfig(name="resnet50", stem="small"), 32),
}
"""Each with the batch that it gets on processors."""
GPU_BATCH = 256
PEAK_TFLOPS: dict[str, dict[str, float]] = {
    "T4": {"fp32": 8.1, "fp16": 65}, "V100": {"fp32": 15.7, "fp16": 125}, "A10": {"fp32": 31.2, "fp16": 125, "bf16": 125},
    "A100": {"fp32": 19.5, "fp16": 312, "bf16": 312}, "L4": {"fp32": 30.3, "fp16": 121, "bf16": 121},
    "H100": {"fp32": 67, "fp16": 989, "bf16": 989}, "H200": {"fp32": 67, "fp16": 989, "bf16": 989},
}  # fmt: skip
"""Dense peaks as NVIDIA's data sheets give them (SXM where there are several), fp32 without TF32."""
MATRIX = {"cpu": 2048, "cuda": 8192}
"""Rows of the matrices whose product tells the peak of other devices."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
Turn = Callable[[], dict[str, float]]


@dataclass(frozen=True)
class Command(Turns):
    encoders: tuple[str, ...] = tuple(ENCODERS)
    """What is trained: demo, resnet18, resnet50."""
    data: Path = Path("data/photos.beton")
    """Packed dataset of 32 pixels; without one, the patches of the demo are packed for it."""
    batch: int = 0
    """Samples of all ranks; 0: 256 for each GPU; on processors 256 for the demo's encoder, 64 and 32 for the others."""
    steps: int = 0
    """Of a turn; 0: as many as last 1.5 s."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: what `accelerate launch` was told; else 16 bits on a GPU and fp32 on processors."""
    compile: bool = False
    """Ours with a compiled encoder (`--launch.compile`), the encoder alone, too."""
    cudnn_benchmark: bool = True
    """On GPUs let cuDNN try its ways to convolve, for all contenders."""
    tf32: bool = False
    """Products and convolutions of fp32 numbers in TensorFloat-32, for all contenders."""

    def __post_init__(self) -> None:
        super().__post_init__()
        only_known(self.encoders, ENCODERS, "--encoders")
        at_least(self, 0, "batch", "steps")


def config_of(name: str, command: Command, data: Path, device: torch.device) -> TrainConfig:
    """The demonstration with another encoder and batch."""
    encoder, on_cpu = ENCODERS[name]
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    batch = command.batch or (on_cpu if device.type == "cpu" else GPU_BATCH * ranks)
    base = build_recipe("photos")
    return replace(
        base,
        epochs=10_000,
        log_every=10_000,
        data=replace(base.data, path=data),
        encoder=encoder,
        batch=BatchConfig(size=batch),
        launch=LaunchConfig(
            device="cuda" if device.type == "cuda" else "cpu",
            precision=choose_precision(command.precision, device),
            compile=command.compile,
            cudnn_benchmark=command.cudnn_benchmark and device.type == "cuda",
            tf32=command.tf32,
        ),
    )


class Sections:
    """Seconds of each part of a step: the device is waited for where a part begins and ends. A part within another one is not
    counted in that."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._open: list[str] = []
        self._since = 0.0

    def _turn_over(self) -> None:
        """Give the time until now to the innermost part."""
        wait_for_device(self.device)
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        self._turn_over()
        self._open.append(name)
        try:
            yield
        finally:
            self._turn_over()
            self._open.pop()

    def around(self, owner: Any, name: str, section: str) -> AbstractContextManager[None]:
        """Within the context all that `owner.name` does counts as `section`."""
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.section(section):
                return original(*args, **kwargs)

        return patched(owner, name, call)


@contextmanager
def instrumented(trainer: Trainer, sections: Sections) -> Iterator[None]:
    """Within the context the trainer's steps are timed part by part."""
    places: list[tuple[Any, str, str]] = [
        (trainer.gradient, "_augmentation", AUGMENTATION),
        (trainer.replicas, "forward", ENCODER),
        (step_gradient, "backward", ENCODER),
        (trainer.gradient, "_loss_gradient", LOSS),
        (trainer.replicas, "norm_and_clip", OPTIMIZER),
        (trainer.gradient, "attempt_update", OPTIMIZER),
    ]
    if distributed.is_distributed():
        questions = ("all_reduce_sum", "all_gather", "reduce_scatter_sum", "any_rank", "small_sum", "gather_numbers")
        places += [(distributed, name, COMMUNICATION) for name in questions]
        assert isinstance(trainer.replicas, DataParallel)
        # Of the average of gradients, what is left to wait for when the backward pass ends.
        places.append((trainer.replicas._buckets, "_wait", COMMUNICATION))
    with ExitStack() as stack:
        for owner, name, section in places:
            stack.enter_context(sections.around(owner, name, section))
        yield


class Ours:
    """Turns of the trainer's own steps."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator, dataset: Dataset) -> None:
        self.config = config
        self.per_epoch = steps_per_epoch(dataset.manifest.num_train, config.batch.size)
        self.trainer = Trainer(config, accelerator, steps_per_epoch=self.per_epoch, dataset_sha256="")
        self.loader: Loader = loader_of(config, dataset, distributed.share_of(config.batch.size), accelerator.device)
        self._epoch = 0

    def most_steps(self) -> int:
        return self.per_epoch - self.config.data.batches_ahead

    def batches(self, steps: int) -> Iterator[Batch]:
        """The last ones of an epoch: those before, which lie ready, are thrown away."""
        ahead = self.config.data.batches_ahead
        batches = self.loader.epoch(self._epoch, self.per_epoch - steps - ahead)
        self._epoch += 1
        for _ in range(ahead):
            next(batches)
        return batches

    def turn(self, steps: int) -> dict[str, float]:
        batches = self.batches(steps)
        took = seconds(lambda: [self.trainer.update(batch) for batch in batches], self.trainer.device)
        return {IMAGES: self.config.batch.size * steps / took}

    def timed_turn(self, steps: int) -> dict[str, float]:
        """The same, part by part."""
        sections = Sections(self.trainer.device)
        batches = self.batches(steps)
        with instrumented(self.trainer, sections), sections.section(REST):
            for _ in range(steps):
                with sections.section(WAIT):
                    batch = next(batches)
                self.trainer.update(batch)
        total = sum(sections.seconds.values())
        shares = {part: 100 * sections.seconds[part] / total for part in PARTS}
        return {IMAGES: self.config.batch.size * steps / total, **shares}


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, DTYPES[precision]) if precision in DTYPES else nullcontext()


def encoder_alone(trainer: Trainer, batch: Batch) -> Callable[[int], dict[str, float]]:
    """Forward and backward of the trainer's own encoder on `batch`, which is augmented already and on the device."""
    device, encoder = trainer.device, trainer.method.encoder
    augment = trainer.gradient._augmentation
    views = augment(batch, device).views[0].flatten(0, 1)
    keys = torch.zeros(len(views), dtype=torch.int64, device=device)
    global_batch = trainer.config.batch.size

    def steps_of(steps: int) -> None:
        trainer.method.train()
        for _ in range(steps):
            with autocast(device, trainer.precision):
                features = encoder(views, keys)
            features.float().square().mean().backward()
            encoder.zero_grad(set_to_none=True)

    return lambda steps: {IMAGES: global_batch * steps / seconds(partial(steps_of, steps), device)}


class LightlyModel(nn.Module):
    """Our encoder and projector, for another one's loop."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        method = build_method(config)
        self.encoder, self.projector = copy.deepcopy(method.encoder), copy.deepcopy(method.projector)

    def forward(self, views: Tensor) -> Tensor:
        keys = torch.zeros(len(views), dtype=torch.int64, device=views.device)
        embeddings: Tensor = self.projector(self.encoder(views, keys))
        return embeddings


def lightly_turns(
    config: TrainConfig, dataset: Dataset, device: torch.device, precision: str
) -> Callable[[int], dict[str, float]]:
    """SimCLR as lightly's examples have it: each view through the model by itself."""
    from lightly.loss import NTXentLoss
    from lightly.transforms import SimCLRTransform

    view = config.augment.groups[0]
    transform = SimCLRTransform(
        input_size=config.data.image_size, cj_prob=view.jitter, cj_strength=1.0, cj_bright=view.brightness,
        cj_contrast=view.contrast, cj_sat=view.saturation, cj_hue=view.hue, min_scale=view.crop_scale[0],
        random_gray_scale=view.grayscale, gaussian_blur=view.blur, hf_prob=view.flip,
        normalize={"mean": list(config.augment.mean), "std": list(config.augment.std)},
    )  # fmt: skip
    model = LightlyModel(config).to(device).train()
    criterion = NTXentLoss(temperature=config.method.temperature)  # type: ignore[attr-defined]
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optim.learning_rate, weight_decay=1e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    images = PilDataset(dataset, dataset.indices(TRAIN), transform)
    workers = len(os.sched_getaffinity(0))
    ahead = 2 * workers
    size = config.batch.size

    def loader_of_turn(steps: int) -> DataLoader[Any]:
        sampler = RandomSampler(images, replacement=True, num_samples=(steps + ahead) * size)
        return DataLoader(
            images, batch_size=size, sampler=sampler, num_workers=workers, multiprocessing_context="fork",
            pin_memory=device.type == "cuda",
        )  # fmt: skip

    def update(views: Sequence[Tensor]) -> None:
        with autocast(device, precision):
            one, other = (model(x.to(device, non_blocking=True)) for x in views)
            loss = criterion(one.float(), other.float())
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    def turn(steps: int) -> dict[str, float]:
        batches = iter(loader_of_turn(steps))
        for _ in range(ahead):
            next(batches)

        def updates() -> None:
            for views, _ in batches:
                update(views)

        took = seconds(updates, device)
        return {IMAGES: size * steps / took}

    return turn


def known_peak(gpu: str, precision: str) -> float | None:
    """TFLOP/s of a GPU by the name that its driver gives it."""
    words = gpu.replace("-", " ").split()
    return next((peaks.get(precision) for name, peaks in PEAK_TFLOPS.items() if name in words), None)


def peak_tflops(device: torch.device, precision: str) -> tuple[float, str]:
    """Of one rank's device in TFLOP/s, and where it comes from."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = known_peak(gpu, precision)
    if peak is not None:
        return peak, f"the data sheet of {gpu}"
    size = MATRIX[device.type]
    one = torch.randn(size, size, device=device, dtype=DTYPES.get(precision, torch.float32))
    best = min(seconds(lambda: one @ one, device) for _ in range(5))
    source = f"the best of five products of {size} × {size} matrices here"
    # A convolution by Winograd's algorithm does less than half of the multiplications that are counted.
    return 2 * size**3 / best / 1e12, f"{source}, which fast convolutions may exceed"


def flops_of_step(trainer: Trainer, batch: Batch) -> int:
    """Of this rank's forward and backward passes, in FLOP: a multiplication and an addition are two."""
    with FlopCounterMode(display=False) as counter:
        trainer.gradient.compute(batch, trainer.clock, logged=False)
    trainer.method.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def measure(
    name: str, command: Command, config: TrainConfig, accelerator: Accelerator, dataset: Dataset, budget: Budget, record: Record
) -> None:  # fmt: skip
    ours = Ours(config, accelerator, dataset)
    device, precision = accelerator.device, ours.trainer.precision
    case = f"{name}, batch {config.batch.size}, {precision}"
    batch = example(config, config.batch.size // distributed.world_size())

    def update() -> None:
        ours.trainer.update(batch)

    for _ in range(2):
        update()  # compiles; the optimizer makes its state
    took = max(distributed.gather_objects(seconds(update, device)))
    steps = min(command.steps or max(1, round(TURN_S / took)), ours.most_steps())
    flops = flops_of_step(ours.trainer, batch)
    contenders: dict[str, Callable[[int], dict[str, float]]] = {
        OURS: ours.turn,
        INSTRUMENTED: ours.timed_turn,
        ENCODER_ALONE: encoder_alone(ours.trainer, batch),
    }
    if distributed.world_size() > 1:
        record.leave_out(LIGHTLY, "it is compared at one rank")
    elif record.has_peer("lightly", "lightly.loss"):
        contenders[LIGHTLY] = lightly_turns(config, dataset, device, precision)
    turns: dict[str, Turn] = {contender: partial(turn, steps) for contender, turn in contenders.items()}
    found = take_turns(turns, command.rounds, budget=budget)
    peak, source = peak_tflops(device, precision)
    for contender, results in found.items():
        record.add(case, contender, IMAGES, [result[IMAGES] for result in results])
    for part in PARTS:
        record.add(case, part, SHARE, [result[part] for result in found[INSTRUMENTED]])
    rates = record.values(case, OURS, IMAGES)
    used = [100 * flops * rate / config.batch.size / 1e12 / peak for rate in rates]
    record.add(case, OURS, MFU, used)
    record.add(case, OURS, MEMORY, [measure_peak(update, device) / 1e6])
    record.details[case] = {
        "steps_of_a_turn": steps, "flops_of_a_step_and_rank": flops, "peak_tflops": peak, "peak_from": source,
        "parameters": ours.trainer.num_parameters,
    }  # fmt: skip
    ours.loader.close()


def summary(record: Record) -> str:
    """Markdown: a row a case, what is to be aimed at."""
    lines = [
        "| case, all measured | ours ÷ encoder alone | ours ÷ lightly | timing part by part takes, % | MFU, % | peak MB |",
        f"|{'---|' * 6}",
    ]
    for case in record.details:
        rates = {one.contender: one.values for one in record.of(IMAGES, case)}
        others = (
            spread(ratios(rates[OURS], rates[name])).format() if name in rates else ""
            for name in (ENCODER_ALONE, LIGHTLY)
        )
        slowdown = [100 * (ratio - 1) for ratio in ratios(rates[OURS], rates[INSTRUMENTED])]
        numbers = (spread(record.values(case, OURS, metric)).format() for metric in (MFU, MEMORY))
        lines.append(f"| {' | '.join([case, *others, spread(slowdown).format(2), *numbers])} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    command, record = begin(
        Command, "step", argv, __doc__, question=QUESTION, packages=("torchvision", "timm", "accelerate", "ffcv")
    )
    device = choose_device(command.device)
    budget = Budget(command.minutes)
    with tempfile.TemporaryDirectory() as folder:
        data = command.data
        if not data.exists():  # each rank packs its own: the same
            data = Path(folder) / "patches.beton"
            write_dataset(open_source("photos"), data)
        dataset = open_dataset(data)
        accelerator = connect(config_of(command.encoders[0], command, data, device))
        for name in command.encoders:
            config = config_of(name, command, data, device)
            if budget.is_over() and record.series:
                record.leave_out(f"the encoder {name}", "the time was over")
                continue
            measure(name, command, config, accelerator, dataset, budget, record)
    cases = "\n".join(
        f"- {case}: {found['parameters'] / 1e6:.2f} M parameters, {found['steps_of_a_turn']} steps a turn, "
        f"{found['flops_of_a_step_and_rank'] / 1e9:,.0f} GFLOP a step and rank (counted); peak {found['peak_tflops']:.3g} "
        f"TFLOP/s by {found['peak_from']}"
        for case, found in record.details.items()
    )
    body = (
        f"{distributed.world_size()} rank(s) on {device.type}; two views of {build_recipe('photos').data.image_size} pixels an "
        f"image.\n\n{summary(record)}\n{comparison(record, (IMAGES,), OURS)}\n"
        f"{comparison(record, (SHARE,), ENCODER)}\n{cases}\n\n"
        "Shares are of steps that are timed part by part, which are slower, as the table says. Ours draws, augments and "
        "communicates; the encoder alone does none of it, and has no projector, loss or optimizer.\n"
    )
    figures = {"images": bars(record, IMAGES), "shares": bars(record, SHARE)}
    record.write("Where a training step's time goes", body, figures)
    distributed.shut_down()


if __name__ == "__main__":
    sys.exit(main_guard(main))
