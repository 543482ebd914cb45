"""The configuration of a run: frozen dataclasses that check themselves, and how they are written and read.

A recipe builds one `TrainConfig`; the command line may replace single fields (`--optim.learning-rate 1e-3`); nothing
changes it afterwards. Whatever a value is derived from it (the scaled learning rate, the rank batch), it is derived
once, where it is used.
"""

import dataclasses
import itertools
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

T = TypeVar("T")

LONGEST_TIMEOUT_MINUTES = 60 * 24 * 365  # far from where a library's clocks overflow

PADDING = 0
"""The token that stands where a caption has ended."""


class UserError(ValueError):
    """A user's mistake: its text says in one line what is wrong and what to do. Entry points exit with status 2."""


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def require_positive(option: str, value: float) -> None:
    """`UserError` unless the value of `option` is a finite number above 0."""
    require(0 < value < math.inf, f"{option} {value}: give a positive number")


def require_finite(section: str, config: Any) -> None:
    """`UserError` where a number of `config`, whose options start with `--section.` (or `--`), is infinite or not a number."""
    prefix = f"{section}." if section else ""
    for name, value in vars(config).items():
        for number in value if isinstance(value, tuple) else (value,):
            require(
                not isinstance(number, float) or math.isfinite(number),
                f"--{prefix}{name.replace('_', '-')} {number}: give a finite number",
            )


@dataclass(frozen=True)
class DataConfig:
    """The packed dataset and how it is read."""

    path: Path = Path("data/photos.beton")
    """The packed dataset (`python -m dist_contrastive.pack SOURCE OUT.beton` writes one)."""
    image_size: int = 32
    """Side of a view, in pixels."""
    eval_crop: float = 1.0
    """Side of the centre crop that evaluation sees, as a fraction of the image's shorter side."""
    threads: int = 0
    """Loader threads of each rank; 0 shares the host's cores fairly between its ranks and leaves each one for its loop."""
    batches_ahead: int = 3
    """How many batches are prepared ahead of the step that consumes them."""
    resident: bool = False
    """Keep the training images, decoded, in the memory of each rank's device, and cut the views there: for datasets that fit."""
    timeout_s: float = 120.0
    """The longest wait for one batch, in seconds; after it the run stops with an error instead of hanging."""

    def __post_init__(self) -> None:
        require_finite("data", self)
        require(self.image_size >= 1, f"--data.image-size {self.image_size}: give at least 1 pixel")
        require(0 < self.eval_crop <= 1, f"--data.eval-crop {self.eval_crop}: give a fraction in (0, 1]")
        require(self.threads >= 0, f"--data.threads {self.threads}: give 0 (automatic) or more")
        require(self.batches_ahead >= 1, f"--data.batches-ahead {self.batches_ahead}: give at least 1")
        require(self.timeout_s > 0, f"--data.timeout-s {self.timeout_s}: give a positive number of seconds")


@dataclass(frozen=True)
class ViewConfig:
    """A group of views that are made alike."""

    count: int = 1
    """How many views of each sample; 0 leaves the group out."""
    size: int = 0
    """Side of a view in pixels; 0 takes --data.image-size for it."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Area of the random crop as a fraction of the image's."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect ratio (width over height) of the random crop."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    jitter: float = 0.8
    """Probability of colour jitter (brightness, contrast, saturation and hue in an order drawn for each view)."""
    brightness: float = 0.4
    """Strength s of colour jitter: the factor is drawn from [1 - s, 1 + s]."""
    contrast: float = 0.4
    """As brightness."""
    saturation: float = 0.4
    """As brightness."""
    hue: float = 0.1
    """Strength s of colour jitter: the shift is drawn from [-s, s], where 1 is the whole circle of hues."""
    grayscale: float = 0.2
    """Probability of dropping colour."""
    blur: float = 0.5
    """Probability of a Gaussian blur, whose kernel spans a tenth of the view."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation of the blur in pixels, drawn uniformly."""
    solarize: float = 0.0
    """Probability of solarization: values from the threshold up are inverted."""
    solarize_threshold: float = 0.5
    """As a fraction of the full range."""

    def __post_init__(self) -> None:
        require_finite("augment", self)
        require(self.count >= 0, f"--augment.count {self.count}: give 0 (leaves the group out) or more")
        require(self.size >= 0, f"--augment.size {self.size}: give 0 (as --data.image-size) or pixels")
        for name in ("flip", "jitter", "grayscale", "blur", "solarize"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"--augment.{name} {value}: give a probability in [0, 1]")
        for name in ("brightness", "contrast", "saturation"):
            require(0 <= getattr(self, name) <= 1, f"--augment.{name} {getattr(self, name)}: give a strength in [0, 1]")
        require(0 <= self.hue <= 0.5, f"--augment.hue {self.hue}: give a strength in [0, 0.5]")
        low, high = self.crop_scale
        require(0 < low <= high <= 1, f"--augment.crop-scale {low} {high}: give 0 < low <= high <= 1")
        low, high = self.crop_ratio
        require(0 < low <= high, f"--augment.crop-ratio {low} {high}: give 0 < low <= high")
        low, high = self.blur_sigma
        require(0 < low <= high, f"--augment.blur-sigma {low} {high}: give 0 < low <= high")
        threshold = self.solarize_threshold
        require(0 <= threshold <= 1, f"--augment.solarize-threshold {threshold}: give a brightness in [0, 1]")


class ViewsOfSize(NamedTuple):
    """Consecutive views of one size: one tensor of a batch."""

    size: int
    """Side in pixels."""
    first: int
    """The number of the first of them among all views of a sample."""
    views: tuple[ViewConfig, ...]
    """How each of them is made."""


@dataclass(frozen=True)
class AugmentConfig:
    """Random views, in groups that are made alike; a sample's views are numbered through all groups."""

    groups: Annotated[tuple[ViewConfig, ...], tyro.conf.arg(name="")] = (ViewConfig(count=2),)
    """Groups of one size that follow each other make one tensor of a batch. Where methods tell views apart, the first size is
    what an encoder is used at later, the second that of smaller crops (multi-crop)."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Subtracted from each channel, in units of the full range; evaluation normalizes the same way."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Divides each channel, in units of the full range."""

    def __post_init__(self) -> None:
        require_finite("augment", self)
        require(self.num_views >= 1, f"--augment.count {self.num_views}: give at least 1 view")
        require(min(self.std) > 0, f"--augment.std {self.std}: give positive numbers")

    @property
    def num_views(self) -> int:
        """V: how many views of each sample there are."""
        return sum(group.count for group in self.groups)

    def layout(self, image_size: int) -> tuple[ViewsOfSize, ...]:
        """The tensors of a batch, where a group without a size of its own has `image_size` pixels a side."""
        views = [view for group in self.groups for view in [group] * group.count]
        numbered = enumerate(views)
        of_sizes = []
        for size, run in itertools.groupby(numbered, key=lambda pair: pair[1].size or image_size):
            numbers, alike = zip(*run, strict=True)
            of_sizes.append(ViewsOfSize(size, numbers[0], alike))
        return tuple(of_sizes)

    def with_all(self, **changes: Any) -> "AugmentConfig":
        """The same with `changes` in every group."""
        return replace(self, groups=tuple(replace(group, **changes) for group in self.groups))

    def of_first_size(self, image_size: int) -> "AugmentConfig":
        """The views of the first size alone, as a group each; where there is one, two of its kind."""
        views = [replace(view, count=1) for view in self.layout(image_size)[0].views]
        return replace(self, groups=tuple(views if len(views) > 1 else 2 * views))


@dataclass(frozen=True)
class EncoderConfig:
    """The network from image to feature."""

    name: str = "resnet18"
    """Any timm model by name, or one of this package's small ones (resnet10_w16, resnet10_w32, resnet10_w64, vit_w96_d4,
    vit_w192_d4)."""
    stem: Literal["standard", "small"] = "standard"
    """small: 3×3 convolution, stride 1, no max-pool, for images of about 32 pixels (ResNets)."""
    norm: Literal["batch", "sync", "group"] = "batch"
    """batch: statistics of the rank's own views; sync: of all ranks'; group: GroupNorm, no batch statistics."""
    dropout: float = 0.0
    """Probability of dropping a feature between encoder and projector."""
    drop_path: float = 0.0
    """Stochastic depth: probability of leaving out the encoder's last residual block for a sample; it rises linearly over the
    blocks, from 0 at the first."""
    patch_size: int = 0
    """Side in pixels of the patches that a vision transformer cuts images into; 0 takes the model's own."""

    def __post_init__(self) -> None:
        require_finite("encoder", self)
        require(0 <= self.drop_path < 1, f"--encoder.drop-path {self.drop_path}: give a probability in [0, 1)")
        require(self.patch_size >= 0, f"--encoder.patch-size {self.patch_size}: give 0 (the model's own) or pixels")
        require(0 <= self.dropout < 1, f"--encoder.dropout {self.dropout}: give a probability in [0, 1)")


@dataclass(frozen=True)
class HeadConfig:
    """A multilayer perceptron: the projector from feature to embedding, or a predictor from embedding to embedding."""

    layers: Literal[1, 2, 3] = 2
    """Linear layers; between two of them are a normalization and an activation."""
    activation: Literal["relu", "gelu"] = "relu"
    """Between two layers."""
    hidden_norm: bool = True
    """Normalize between two layers; without it the layers have biases instead."""
    hidden_size: int = 0
    """Width of the hidden layers; 0 takes the size of the head's input."""
    output_size: int = 128
    """Size of what the head gives."""
    output_norm: bool = False
    """Normalize the output too, without scale and shift (MoCo v3's and SimSiam's projectors)."""


@dataclass(frozen=True)
class TextConfig:
    """The transformer over a caption's tokens."""

    vocabulary: int = 8192
    """How many tokens there are; the dataset says how many its captions need."""
    context: int = 32
    """The longest caption, in tokens."""
    width: int = 512
    """Size of a token's embedding."""
    layers: int = 12
    """Blocks."""
    heads: int = 8
    """Of each block's attention."""

    def __post_init__(self) -> None:
        for name in ("vocabulary", "context", "width", "layers", "heads"):
            require(getattr(self, name) >= 1, f"--method.text.{name} {getattr(self, name)}: give at least 1")
        require(
            self.width % self.heads == 0,
            f"--method.text.heads {self.heads}: don't share --method.text.width {self.width} equally; give a divisor of it",
        )


@dataclass(frozen=True)
class MethodConfig:
    """What every method has; a method's own file adds its own fields."""

    name: Annotated[str, tyro.conf.Fixed] = ""
    projector: HeadConfig = field(default_factory=HeadConfig)

    def __post_init__(self) -> None:
        require_finite("method", self)
        for name, head in vars(self).items():
            if isinstance(head, HeadConfig):
                option = f"--method.{name}"
                require(head.hidden_size >= 0, f"{option}.hidden-size {head.hidden_size}: give 0 or more")
                require(head.output_size >= 1, f"{option}.output-size {head.output_size}: give at least 1")

    def check_global_batch(self, size: int) -> None:
        """`UserError` where the method can't learn from global batches of `size` samples."""

    def remarks(self, num_train: int, num_seen: int, global_batch: int) -> list[str]:
        """What may not be meant in a run over `num_train` samples that sees `num_seen` of them, `global_batch` a step."""
        return []

    @property
    def needs_labels(self) -> bool:
        """Whether the loss reads the labels."""
        return False

    @property
    def text_tower(self) -> TextConfig | None:
        """That of captions, where the method learns from captions."""
        return None


MOST_KEPT = 0.1
"""How much of a teacher may be its random start at a run's end, unsaid."""


@dataclass(frozen=True)
class TeacherConfig(MethodConfig):
    """A method with a teacher: a moving average of what is trained, which makes what the loss looks for."""

    momentum: float = 0.996
    """The teacher's at the start; it rises to 1 on a cosine."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.momentum <= 1, f"--method.momentum {self.momentum}: give a number in [0, 1]")

    def remarks(self, num_train: int, num_seen: int, global_batch: int) -> list[str]:
        steps = num_seen // global_batch
        kept = self.momentum**steps
        if kept <= MOST_KEPT:
            return []
        return [
            f"--method.momentum {self.momentum:g}: after the run's {steps:,} steps at least {100 * kept:.0f} % of the teacher is "
            f"still the random one that it began as; {0.01 ** (2 / max(steps, 2)):.2g} leaves next to nothing of it"
        ]


@dataclass(frozen=True)
class BatchConfig:
    """The global batch, and in what pieces it is computed."""

    size: Annotated[int, tyro.conf.arg(name="global")] = 256
    """Samples of one optimizer step over all ranks."""
    micro: int | Literal["auto"] = 0
    """Samples of one forward pass of a rank; the gradient is that of the global batch all the same. 0: all of the rank's;
    auto: as many as the memory holds."""
    memory_gib: float = 0.0
    """What a step of one rank may take under --batch.micro auto; 0: nine tenths of what is free."""

    def __post_init__(self) -> None:
        require_finite("batch", self)
        require(self.size >= 2, f"--batch.global {self.size}: a contrastive step needs at least 2 samples")
        require(
            self.micro == "auto" or self.micro >= 0,
            f"--batch.micro {self.micro}: give 0 (the whole share of a rank), auto, or a number of samples",
        )
        require(self.memory_gib >= 0, f"--batch.memory-gib {self.memory_gib}: give 0 (what is free) or more")
        require(
            self.memory_gib == 0 or self.micro == "auto",
            f"--batch.memory-gib {self.memory_gib:g} is for --batch.micro auto, not for --batch.micro {self.micro}: give "
            "--batch.micro auto with it",
        )


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule: a linear warm-up, then a cosine to zero."""

    name: Literal["adamw", "sgd", "lars"] = "adamw"
    """lars is made for global batches of thousands."""
    learning_rate: float = 3e-4
    """Per 256 samples of the global batch: the peak is this times global batch / 256."""
    weight_decay: float = 1e-4
    """Not applied to biases and normalization parameters."""
    momentum: float = 0.9
    """Of SGD and LARS; AdamW's first beta."""
    beta2: float = 0.999
    """AdamW's second beta; lower where batches are of tens of thousands (CLIP: 0.98)."""
    warmup_epochs: float = 0.0
    """Length of the linear warm-up."""
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """Of the learning rate after the warm-up. cosine: down to 0 over the whole run; constant: it stays; wsd
    (warmup-stable-decay): it stays, and goes down linearly to 0 at the end. A run whose rate has not begun to go down can be
    given more epochs."""
    decay_epochs: float = 0.0
    """Length of the decay at the end of the schedule wsd."""
    clip_norm: float = 0.0
    """Largest norm of the whole gradient, also of parameters that stand still at first (prototypes); 0 does not clip."""
    weight_decay_end: float | None = None
    """What weight decay changes to over the run, on a cosine (DINO: from 0.04 to 0.4); None: it stays."""
    layer_decay: float = 1.0
    """By what the learning rate shrinks from each of the encoder's layers to the one before it (BEiT, DINOv2); 1: it does not."""

    def __post_init__(self) -> None:
        require_finite("optim", self)
        require_positive("--optim.learning-rate", self.learning_rate)
        require(self.weight_decay >= 0, f"--optim.weight-decay {self.weight_decay}: give 0 or more")
        require(0 <= self.momentum < 1, f"--optim.momentum {self.momentum}: give a number in [0, 1)")
        require(0 <= self.beta2 < 1, f"--optim.beta2 {self.beta2}: give a number in [0, 1)")
        require(self.warmup_epochs >= 0, f"--optim.warmup-epochs {self.warmup_epochs}: give 0 or more")
        require(
            self.decay_epochs > 0 if self.schedule == "wsd" else self.decay_epochs == 0,
            f"--optim.decay-epochs {self.decay_epochs}: give a positive number with --optim.schedule wsd, and none with another",
        )
        require(self.clip_norm >= 0, f"--optim.clip-norm {self.clip_norm}: give 0 (off) or more")
        end = self.weight_decay_end
        require(end is None or end >= 0, f"--optim.weight-decay-end {end}: give 0 or more")
        require(0 < self.layer_decay <= 1, f"--optim.layer-decay {self.layer_decay}: give a number in (0, 1]")


@dataclass(frozen=True)
class ProbeConfig:
    """Scores of the frozen encoder: a linear classifier and kNN on its features."""

    enabled: bool = True
    """Without probes a run needs no test split and gives no scores."""
    every: int = 0
    """Epochs between probes; 0 probes at the end only."""
    knn_k: int = 0
    """How many neighbours vote; 0 (automatic): a sixth of the training samples of the median class, at most 200."""
    knn_temperature: float = 0.1
    """A neighbour of cosine s votes with weight exp(s / temperature)."""
    strengths: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    """L2 strengths to choose from, per sample: the penalty is strength / 2 · |weights|² beside the mean loss."""
    holdout: float = 0.1
    """Part of the training set on which the strength is chosen."""

    def __post_init__(self) -> None:
        require_finite("probe", self)
        require(self.every >= 0, f"--probe.every {self.every}: give 0 (only at the end) or more")
        require(self.knn_k >= 0, f"--probe.knn-k {self.knn_k}: give 0 (automatic) or more")
        require_positive("--probe.knn-temperature", self.knn_temperature)
        require(
            len(self.strengths) > 0 and all(0 < strength < math.inf for strength in self.strengths),
            "--probe.strengths: give positive numbers",
        )
        require(0 < self.holdout < 1, f"--probe.holdout {self.holdout}: give a fraction in (0, 1)")


@dataclass(frozen=True)
class CheckpointConfig:
    """What a run can be resumed from."""

    every: int = 1
    """Epochs between checkpoints; the last step always has one."""
    every_steps: int = 0
    """Steps between checkpoints, beside those of epochs; 0: none."""
    every_minutes: float = 0.0
    """Minutes between checkpoints, beside those of epochs and steps; 0: none."""
    keep: int = 2
    """How many checkpoints stay."""

    def __post_init__(self) -> None:
        require_finite("checkpoint", self)
        require(self.every >= 1, f"--checkpoint.every {self.every}: give at least 1")
        require(self.every_steps >= 0, f"--checkpoint.every-steps {self.every_steps}: give 0 (off) or more")
        require(self.every_minutes >= 0, f"--checkpoint.every-minutes {self.every_minutes}: give 0 (off) or more")
        require(self.keep >= 2, f"--checkpoint.keep {self.keep}: keep at least 2, so that one survives a bad disk")


@dataclass(frozen=True)
class LaunchConfig:
    """What the run is asked to run on; it is checked against what was in fact launched."""

    ranks: int = 0
    """Number of ranks that must be there; 0 takes what was launched."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto takes what `accelerate launch` was told (fp32 if nothing)."""
    timeout_minutes: float = 30.0
    """The longest wait of a collective operation."""
    compile: bool = False
    """Train the encoder as compiled code (torch.compile): a graph for each shape of its passes, of which there may be no more
    than the run begins with. The first step takes a minute or more."""
    tf32: bool = False
    """Products and convolutions of fp32 numbers in TensorFloat-32, which has 10 bits of mantissa instead of 23 (Ampere GPUs and
    newer)."""
    cudnn_benchmark: bool = False
    """Let cuDNN try its ways to convolve in the first steps and keep the fastest; another start may find another, so that
    results repeat but for rounding."""
    expandable_segments: bool = False
    """Let the allocator extend the segments of GPU memory that it has, which leaves fewer gaps where sizes vary."""

    def __post_init__(self) -> None:
        require_finite("launch", self)
        require(self.ranks >= 0, f"--launch.ranks {self.ranks}: give 0 (as launched) or more")
        require_positive("--launch.timeout-minutes", self.timeout_minutes)
        require(
            self.timeout_minutes <= LONGEST_TIMEOUT_MINUTES,
            f"--launch.timeout-minutes {self.timeout_minutes:g}: give at most {LONGEST_TIMEOUT_MINUTES} (a year)",
        )


@dataclass(frozen=True)
class TrainConfig:
    method: MethodConfig
    recipe: Annotated[str, tyro.conf.Fixed] = ""
    run_dir: Path = Path("runs/run")
    """Where everything about the run is written."""
    seed: int = 0
    """Of everything random: weights, order, crops, augmentation. The same seed gives the same run."""
    epochs: int = 10
    """Passes over the training split."""
    resume: Literal["auto", "never"] = "auto"
    """auto continues an unfinished run of the same folder; never refuses a folder that holds one."""
    overwrite: bool = False
    """Delete what an earlier run left in the folder, finished or not."""
    init_from: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Start with the weights of another run (its folder or one of its checkpoints) or of a file (a run's
    encoder.safetensors, a timm checkpoint) instead of random ones."""
    init_sha256: Annotated[tuple[str, ...], tyro.conf.Fixed, tyro.conf.Suppress] = ()
    """Of the files that the weights came from; written into config.json by training."""
    stop_after_steps: int = 0
    """Save a checkpoint and stop once this many steps are done, as an interruption would; 0 runs to the end."""
    log_every: int = 10
    """Steps between the metrics that cost (effective rank, times, memory); those that do not are logged at each step."""
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        self.method.check_global_batch(self.batch.size)
        require(self.epochs >= 1, f"--epochs {self.epochs}: give at least 1")
        require(
            self.init_from is None or not self.init_from.resolve().is_relative_to(self.run_dir.resolve()),
            f"--from {self.init_from}: lies in --run-dir {self.run_dir}, which is the new run's; give another --run-dir",
        )
        optim = self.optim
        require(
            optim.schedule != "wsd" or optim.warmup_epochs + optim.decay_epochs <= self.epochs,
            f"--optim.decay-epochs {optim.decay_epochs}: with --optim.warmup-epochs {optim.warmup_epochs} that is more than "
            f"--epochs {self.epochs}",
        )
        require(self.log_every >= 1, f"--log-every {self.log_every}: give at least 1")
        require(self.stop_after_steps >= 0, f"--stop-after-steps {self.stop_after_steps}: give 0 (off) or more")
        require(0 <= self.seed < 2**63, f"--seed {self.seed}: give a number in [0, 2**63)")
        self._check_pairs()

    def _check_pairs(self) -> None:
        """`UserError` where fields that are valid each are not together; what needs data or ranks, `preflight` checks."""
        warmup, epochs = self.optim.warmup_epochs, self.epochs
        require(
            warmup <= epochs,
            f"--optim.warmup-epochs {warmup:g} is longer than the run (--epochs {epochs}), which would never reach its "
            f"learning rate: give fewer than {epochs} warm-up epochs, or more epochs than {warmup:g}",
        )
        for size, _, views in self.augment.layout(self.data.image_size):
            require(
                size > 1 or max(view.blur for view in views) == 0,
                f"--augment.blur {max(view.blur for view in views):g} with {self.size_option(size)}: one pixel can't be blurred; "
                "give --augment.blur 0",
            )

    def size_option(self, size: int) -> str:
        """The option that makes some views as large as `size` pixels."""
        return f"--data.image-size {size}" if size == self.data.image_size else f"--augment.size {size}"


# Fields that say where and how a run is carried out, not what it computes: a resume may change them. The dataset's path
# is among them because the checkpoint holds the dataset's checksum; the micro-batch, because the gradient is the same
# whatever it is, but for the statistics that BatchNorm normalizes with, and memory may force another one at any step.
EXECUTION_FIELDS = (
    "run_dir", "resume", "overwrite", "init_sha256", "stop_after_steps", "batch.micro", "batch.memory_gib", "data.path",
    "data.threads", "data.batches_ahead", "data.timeout_s", "data.resident", "checkpoint.every", "checkpoint.every_steps",
    "checkpoint.every_minutes", "checkpoint.keep", "launch.ranks", "launch.device", "launch.timeout_minutes", "launch.compile",
    "launch.cudnn_benchmark", "launch.expandable_segments",
)  # fmt: skip


def user_path(path: str | Path) -> Path:
    """The path with a leading `~` or `~user` made the home folder; `UserError` where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: there is no such home folder; give the whole path") from error


def with_user_paths(config: T) -> T:
    """The dataclass `config` with each path in it as `user_path` gives it."""
    changed: dict[str, Any] = {}
    for name, value in vars(config).items():
        if dataclasses.is_dataclass(value):
            changed[name] = with_user_paths(value)
        elif isinstance(value, Path):
            changed[name] = user_path(value)
    return dataclasses.replace(config, **changed)  # type: ignore[type-var]


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as nested dicts of JSON values (paths as strings, tuples as lists)."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))


def from_dict(cls: type, data: Mapping[str, Any], method_config: type[MethodConfig]) -> Any:
    """The inverse of `to_dict`: `method_config` is the dataclass that the field `method` was made from."""
    hints = get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    unknown = set(data) - known
    require(not unknown, f"config.json has fields that this version does not know: {', '.join(sorted(unknown))}")

    def build(hint: Any, value: Any) -> Any:
        if hint is MethodConfig:
            hint = method_config
        if dataclasses.is_dataclass(hint):
            return from_dict(hint, value, method_config)  # type: ignore[arg-type]
        if hint is Path:
            return user_path(value)
        if get_origin(hint) in (Union, types.UnionType):
            return None if value is None else build(next(a for a in get_args(hint) if a is not type(None)), value)
        return tuple(build(get_args(hint)[0], item) for item in value) if get_origin(hint) is tuple else value

    return cls(**{name: build(hints[name], value) for name, value in data.items()})


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts, and lists of dicts by number, as one dict with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            value = {str(number): item for number, item in enumerate(value)}
        flat.update(flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value})
    return flat


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`name: old -> new` for each field in which two configs (`to_dict`) compute something different."""
    flat_old, flat_new = flatten(old), flatten(new)
    names = sorted((set(flat_old) | set(flat_new)) - set(EXECUTION_FIELDS))
    return [
        f"{name}: {flat_old.get(name)} -> {flat_new.get(name)}"
        for name in names
        if flat_old.get(name) != flat_new.get(name)
    ]
