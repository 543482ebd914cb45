"""`python -m benchmarks.loss_parity`: do the losses give the values and gradients of lightly's and open_clip's?

DINO's loss, iBOT's of patches, KoLeo, Sinkhorn-Knopp, CLIP's loss and SigLIP's, each on the same random inputs in one
process: ours, the peer's, and the peer's in float64, which tells whose rounding a difference is. Every difference is the
largest over all numbers and seeds, relative to the largest number of the float64 result. Beside them, two inputs that are not
random: equal rows for KoLeo, a low temperature for Sinkhorn-Knopp.

The peers are no part of this project's dependencies: `pip install lightly open_clip_torch`.

    python -m benchmarks.loss_parity
    python -m benchmarks.loss_parity --samples 16 --prototypes 512 --seeds 1 --out loss_parity
"""

import json
import math
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.loader import hardware
from dist_contrastive.atomic import write_atomic
from dist_contrastive.cli import main_guard, parse
from dist_contrastive.config import UserError, require
from dist_contrastive.losses.infonce import indexed_nce
from dist_contrastive.losses.koleo import koleo
from dist_contrastive.losses.prototypes import other_views, prototype_cross_entropy, sinkhorn_bias
from dist_contrastive.losses.sigmoid import sigmoid_loss

ROOT = Path(__file__).resolve().parent.parent
TEMPERATURE, TARGET_TEMPERATURE = 0.1, 0.04  # DINO's student's and teacher's
VIEWS, GLOBAL_VIEWS = 6, 2
SIDE = 14  # patches of an image
EPSILON, LOW_EPSILON, ITERATIONS = (
    0.05,
    0.01,
    3,
)  # of Sinkhorn-Knopp: SwAV's, and one with which exp(1 / ε) is no float32

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class ParityBenchmark:
    samples: int = 64
    """Samples (iBOT: images)."""
    prototypes: int = 4096
    """How many prototypes DINO, iBOT and Sinkhorn-Knopp have."""
    size: int = 256
    """Dimensions of embeddings."""
    seeds: int = 3
    """How many random inputs of each kind."""
    out: Path | None = None
    """Where to write the record; a folder of today in benchmarks/records if none is given."""

    def __post_init__(self) -> None:
        for name, least in (("samples", 4), ("prototypes", 2), ("size", 2), ("seeds", 1)):
            require(getattr(self, name) >= least, f"--{name} {getattr(self, name)}: give at least {least}")


@dataclass(frozen=True)
class Comparison:
    """One loss, written twice."""

    peer: str
    inputs: Callable[[ParityBenchmark, torch.Generator], Inputs]
    learnt: tuple[str, ...]
    """Inputs whose gradients are compared."""
    ours: Callable[[Inputs], Tensor]
    theirs: Callable[[Inputs], Tensor]


def unit(generator: torch.Generator, *shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


def prototype_inputs(config: ParityBenchmark, generator: torch.Generator) -> Inputs:
    """Of a student and its teacher, whose logits have a center."""
    return {
        "student": unit(generator, VIEWS, config.samples, config.size),
        "prototypes": unit(generator, config.prototypes, config.size),
        "targets": unit(generator, GLOBAL_VIEWS, config.samples, config.size),
        "target_prototypes": unit(generator, config.prototypes, config.size),
        "center": 0.1 * torch.randn(config.prototypes, generator=generator),
    }


def patch_inputs(config: ParityBenchmark, generator: torch.Generator) -> Inputs:
    """The masked patches of images; images have different numbers of them, the first has none."""
    inputs = prototype_inputs(config, generator)
    share = torch.linspace(0, 0.3, config.samples)[:, None, None]
    mask = torch.rand(config.samples, SIDE, SIDE, generator=generator) < share
    masked = int(mask.sum())
    embeddings = {name: unit(generator, masked, config.size) for name in ("student", "targets")}
    return inputs | embeddings | {"mask": mask}


def pair_inputs(config: ParityBenchmark, generator: torch.Generator, *, log_scale: float, bias: float) -> Inputs:
    """Images and texts, half of whose direction they share."""
    shared = unit(generator, config.samples, config.size)
    images, texts = (
        F.normalize(shared + unit(generator, config.samples, config.size), dim=1) for _ in ("images", "texts")
    )
    return {"images": images, "texts": texts, "log_scale": torch.tensor([log_scale]), "bias": torch.tensor([bias])}


def our_dino(x: Inputs) -> Tensor:
    return prototype_cross_entropy(
        x["student"],
        x["prototypes"],
        x["targets"],
        x["target_prototypes"],
        pairs=other_views(VIEWS, GLOBAL_VIEWS),
        bias=-x["center"] / TARGET_TEMPERATURE,
        temperature=TEMPERATURE,
        target_temperature=TARGET_TEMPERATURE,
    )


def their_dino(x: Inputs) -> Tensor:
    from lightly.loss import DINOLoss

    loss = DINOLoss(len(x["center"]), teacher_temp=TARGET_TEMPERATURE, student_temp=TEMPERATURE)
    loss.center = x["center"].expand(1, 1, -1)
    teacher = list((x["targets"] @ x["target_prototypes"].T).unbind(0))
    value: Tensor = loss(teacher, list((x["student"] @ x["prototypes"].T).unbind(0)))
    return value


def our_ibot(x: Inputs) -> Tensor:
    mask = x["mask"].flatten(1)
    weights = (1 / (len(mask) * mask.sum(1, keepdim=True))).expand_as(mask)[mask]
    return prototype_cross_entropy(
        x["student"][None],
        x["prototypes"],
        x["targets"][None],
        x["target_prototypes"],
        pairs=torch.ones(1, 1),
        bias=-x["center"] / TARGET_TEMPERATURE,
        temperature=TEMPERATURE,
        target_temperature=TARGET_TEMPERATURE,
        weights=weights,
    )


def their_ibot(x: Inputs) -> Tensor:
    from lightly.loss import IBOTPatchLoss

    loss = IBOTPatchLoss(len(x["center"]), teacher_temp=TARGET_TEMPERATURE, student_temp=TEMPERATURE)
    loss.center.center = x["center"][None]
    value: Tensor = loss(x["targets"] @ x["target_prototypes"].T, x["student"] @ x["prototypes"].T, x["mask"])
    return value


def koleo_inputs(config: ParityBenchmark, generator: torch.Generator) -> Inputs:
    return {"rows": torch.randn(config.samples, config.size, generator=generator)}


def our_koleo(x: Inputs) -> Tensor:
    rows = F.normalize(x["rows"], dim=1)
    return koleo(rows, rows, offset=0)


def their_koleo(x: Inputs) -> Tensor:
    from lightly.loss import KoLeoLoss

    value: Tensor = KoLeoLoss()(x["rows"])
    return value


@torch.no_grad()
def our_sinkhorn(x: Inputs, epsilon: float = EPSILON) -> Tensor:
    targets, prototypes = x["targets"].flatten(0, 1), x["target_prototypes"]
    bias = sinkhorn_bias(targets, prototypes, temperature=epsilon, iterations=ITERATIONS)
    return (targets @ prototypes.T / epsilon + bias).softmax(1)


@torch.no_grad()
def their_sinkhorn(x: Inputs, epsilon: float = EPSILON) -> Tensor:
    from lightly.loss.swav_loss import sinkhorn

    logits = x["targets"].flatten(0, 1) @ x["target_prototypes"].T
    value: Tensor = sinkhorn(logits, iterations=ITERATIONS, epsilon=epsilon)
    return value


def our_clip(x: Inputs) -> Tensor:
    scale, own = x["log_scale"].exp(), torch.arange(len(x["images"]))
    to_text = indexed_nce(scale * x["images"], x["texts"], own, temperature=1.0)
    return (to_text + indexed_nce(scale * x["texts"], x["images"], own, temperature=1.0)) / 2


def their_clip(x: Inputs) -> Tensor:
    from open_clip.loss import ClipLoss

    value: Tensor = ClipLoss()(x["images"], x["texts"], x["log_scale"].exp())
    return value


def our_siglip(x: Inputs) -> Tensor:
    images = torch.cat([x["log_scale"].exp() * x["images"], x["bias"].expand(len(x["images"]), 1)], dim=1)
    return sigmoid_loss(images, F.pad(x["texts"], (0, 1), value=1.0), offset=0)


def their_siglip(x: Inputs) -> Tensor:
    from open_clip.loss import SigLipLoss

    value: Tensor = SigLipLoss()(x["images"], x["texts"], x["log_scale"].exp(), x["bias"])
    return value


# The papers' first scales and SigLIP's bias.
CLIP = partial(pair_inputs, log_scale=math.log(1 / 0.07), bias=0.0)
SIGLIP = partial(pair_inputs, log_scale=math.log(10), bias=-10.0)
COMPARISONS = {
    "DINO": Comparison("lightly `DINOLoss`", prototype_inputs, ("student", "prototypes"), our_dino, their_dino),
    "iBOT, patches": Comparison(
        "lightly `IBOTPatchLoss`", patch_inputs, ("student", "prototypes"), our_ibot, their_ibot
    ),
    "KoLeo": Comparison("lightly `KoLeoLoss`", koleo_inputs, ("rows",), our_koleo, their_koleo),
    "Sinkhorn-Knopp": Comparison("lightly `sinkhorn`", prototype_inputs, (), our_sinkhorn, their_sinkhorn),
    "CLIP": Comparison("open_clip `ClipLoss`", CLIP, ("images", "texts", "log_scale"), our_clip, their_clip),
    "SigLIP": Comparison(
        "open_clip `SigLipLoss`", SIGLIP, ("images", "texts", "log_scale", "bias"), our_siglip, their_siglip
    ),
}


def result_of(loss: Callable[[Inputs], Tensor], inputs: Inputs, learnt: Sequence[str], dtype: torch.dtype) -> Inputs:
    """What a loss gives for inputs in that precision: its `value`, and the gradients of those that are learnt."""
    leaves = {name: x.to(dtype, copy=True) if x.is_floating_point() else x for name, x in inputs.items()}
    for name in learnt:
        leaves[name].requires_grad_()
    value = loss(leaves)
    gradients = torch.autograd.grad(value, [leaves[name] for name in learnt]) if learnt else ()
    return {"value": value.detach(), **dict(zip(learnt, gradients, strict=True))}


def difference(found: Tensor, exact: Tensor) -> float:
    """The largest one, relative to the largest number."""
    return float((found.double() - exact.double()).abs().max() / exact.double().abs().max())


def compare(comparison: Comparison, config: ParityBenchmark) -> dict[str, Any]:
    """For ours and theirs in float32: the largest differences over all seeds, of the value and of each gradient."""
    largest: dict[str, dict[str, float]] = {"ours_theirs": {}, "ours_exact": {}, "theirs_exact": {}}
    for seed in range(config.seeds):
        inputs = comparison.inputs(config, torch.Generator().manual_seed(seed))
        ours, theirs, exact = (
            result_of(loss, inputs, comparison.learnt, dtype)
            for loss, dtype in (
                (comparison.ours, torch.float32),
                (comparison.theirs, torch.float32),
                (comparison.theirs, torch.float64),
            )
        )
        for kind, one, other in (
            ("ours_theirs", ours, theirs),
            ("ours_exact", ours, exact),
            ("theirs_exact", theirs, exact),
        ):
            for name in ours:
                largest[kind][name] = max(largest[kind].get(name, 0.0), difference(one[name], other[name]))
    return {"peer": comparison.peer, **largest}


def at_the_edges(config: ParityBenchmark) -> dict[str, dict[str, float]]:
    """Three equal rows in KoLeo: the largest gradient. A low temperature in Sinkhorn-Knopp: which part of numbers is finite."""
    generator = torch.Generator().manual_seed(0)
    rows = koleo_inputs(config, generator)["rows"]
    rows[1:3] = rows[0]
    # At a low temperature what overflows is the exponential of the largest logit: a target that is its prototype.
    targets = prototype_inputs(config, generator)
    targets["target_prototypes"][0] = targets["targets"][0, 0]
    result: dict[str, dict[str, float]] = {"equal_rows_gradient": {}, "low_temperature_finite": {}}
    for name, koleo_, sinkhorn_ in (("ours", our_koleo, our_sinkhorn), ("theirs", their_koleo, their_sinkhorn)):
        gradient = result_of(koleo_, {"rows": rows}, ("rows",), torch.float32)["rows"]
        result["equal_rows_gradient"][name] = float(gradient[:3].abs().max())
        assignments = sinkhorn_(targets, epsilon=LOW_EPSILON)
        result["low_temperature_finite"][name] = float(torch.isfinite(assignments).float().mean())
    return result


def table(record: dict[str, Any]) -> str:
    """Markdown: a row a loss."""
    lines = [
        "| loss | peer | value | gradients | ours from float64 | the peer from float64 |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in record["losses"].items():
        gradients = [x for key, x in result["ours_theirs"].items() if key != "value"]
        cells = [
            name,
            result["peer"],
            f"{result['ours_theirs']['value']:.1e}",
            f"{max(gradients):.1e}" if gradients else "none",
            *(f"{max(result[kind].values()):.1e}" for kind in ("ours_exact", "theirs_exact")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def page(record: dict[str, Any]) -> str:
    settings, versions, edges = record["settings"], record["versions"], record["edges"]
    gradient, finite = edges["equal_rows_gradient"], edges["low_temperature_finite"]
    return (
        "# Losses beside lightly's and open_clip's\n\n"
        f"`python -m benchmarks.loss_parity` with lightly {versions['lightly']}, open_clip {versions['open_clip_torch']} and "
        f"torch {versions['torch']} on the CPU; {settings['samples']} samples (iBOT: images of {SIDE} × {SIDE} patches), "
        f"{settings['size']} dimensions, {settings['prototypes']} prototypes, {settings['seeds']} seeds, one process.\n\n"
        f"{table(record)}\n"
        "Each number is the largest difference over all numbers and seeds, relative to the largest number of the result: ours "
        "from the peer's, both in float32; then each from the peer's own code in float64, value and gradients together, which "
        "tells whose rounding a difference is. Raw numbers: `loss_parity.json`.\n\n"
        "Where a peer is not its paper, or not ours:\n\n"
        "- DINO: equation 3 is a sum over pairs of views; lightly, the authors' code and ours take the mean. lightly moves the "
        "center within the loss; ours gets it as an input.\n"
        "- iBOT: lightly, DINOv2's code and ours average over an image's masked patches, then over images; an image without "
        "masked patches counts as 0.\n"
        "- KoLeo: the paper has no ε. lightly, DINOv2's code and ours add 1e-8 to the distance; the first two add it to each "
        "coordinate of the neighbours' difference, too, which gives equal rows a direction, the same for all. With three equal "
        f"rows among the {settings['samples']} the largest gradient is {gradient['theirs']:.1e}, ours {gradient['ours']:.1e}. "
        "lightly looks for neighbours on its own rank, ours on all ranks.\n"
        "- Sinkhorn-Knopp: SwAV's code and lightly's take exp(logit / ε) itself, ours logarithms. With ε = "
        f"{LOW_EPSILON} and a target that is a prototype, {finite['theirs']:.0%} of lightly's assignments are finite, of ours "
        f"{finite['ours']:.0%}. lightly takes this rank's samples unless `gather_distributed` is set; ours takes all ranks'.\n"
        "- CLIP: by open_clip's default on several ranks (`local_loss` and `gather_with_grad` off) a gradient comes through a "
        "rank's own rows alone, so that DDP's average is that of the whole batch divided by the number of ranks; ours is that of "
        "the whole batch at any number. In one process, as here, they are the same.\n"
        "- SigLIP: open_clip passes texts from rank to rank, ours gathers them; both divide by the images of a rank, so that the "
        "average over ranks is equation 1.\n"
    )


def versions_of_peers() -> dict[str, str]:
    """`UserError` where one is missing."""
    try:
        for module in ("lightly.loss", "open_clip.loss"):
            import_module(module)
    except ImportError as error:
        raise UserError(f"the peers are not installed: pip install lightly open_clip_torch ({error})") from None
    return {name: version(name) for name in ("lightly", "open_clip_torch")}


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(ParityBenchmark, argv, prog="python -m benchmarks.loss_parity", about=__doc__)
    machine = hardware()  # before this program makes a load of its own
    peers = versions_of_peers()
    out = config.out or ROOT / "benchmarks" / "records" / f"{date.today()}_{machine['usable_cores']}cpu_loss_parity"
    record: dict[str, Any] = {
        "question": "do the losses give the values and gradients of lightly's and open_clip's?",
        "settings": {name: x for name, x in asdict(config).items() if name != "out"},
        "losses": {name: compare(comparison, config) for name, comparison in COMPARISONS.items()},
        "edges": at_the_edges(config),
        "hardware": machine,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, **peers},
    }
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "loss_parity.json", (json.dumps(record, indent=1) + "\n").encode())
    write_atomic(out / "README.md", page(record).encode())
    print(f"{table(record)}\nwritten: {out}")


if __name__ == "__main__":
    sys.exit(main_guard(main))
