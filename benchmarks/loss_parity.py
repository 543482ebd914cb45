"""`python -m benchmarks.loss_parity`: do the losses give the values and gradients of lightly's and open_clip's?

DINO's loss, iBOT's of patches, KoLeo, Sinkhorn-Knopp, CLIP's loss and SigLIP's, each on the same random inputs in one
process: ours, the peer's, and the peer's in float64, which tells whose rounding a difference is. Every difference is the
largest over all numbers and seeds, relative to the largest number of the float64 result. Beside them, two inputs that are not
random: equal rows for KoLeo, a low temperature for Sinkhorn-Knopp.

The peers are no part of this project's dependencies: `pip install '.[bench]'`. Losses of a missing one are left out.

    python -m benchmarks.loss_parity
    python -m benchmarks.loss_parity --samples 16 --prototypes 512 --seeds 1 --out records/loss_parity
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.frame import Options, at_least, bars, begin
from dist_contrastive.cli import main_guard
from dist_contrastive.config import require
from dist_contrastive.losses.infonce import paired_nce
from dist_contrastive.losses.koleo import koleo
from dist_contrastive.losses.prototypes import other_views, prototype_cross_entropy, sinkhorn_bias
from dist_contrastive.losses.sigmoid import sigmoid_loss

QUESTION = "do the losses give the values and gradients of lightly's and open_clip's?"
PEERS = {"lightly": "lightly", "open_clip_torch": "open_clip"}
"""The module of each package."""
LARGEST = "largest difference"
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
class Command(Options):
    samples: int = 64
    """Samples (iBOT: images)."""
    prototypes: int = 4096
    """How many prototypes DINO, iBOT and Sinkhorn-Knopp have."""
    size: int = 256
    """Dimensions of embeddings."""
    seeds: int = 3
    """How many random inputs of each kind."""

    def __post_init__(self) -> None:
        at_least(self, 4, "samples")
        at_least(self, 2, "prototypes", "size")
        at_least(self, 1, "seeds")


@dataclass(frozen=True)
class Comparison:
    """One loss, written twice."""

    package: str
    """The peer's."""
    peer: str
    inputs: Callable[[Command, torch.Generator], Inputs]
    learnt: tuple[str, ...]
    """Inputs whose gradients are compared."""
    ours: Callable[[Inputs], Tensor]
    theirs: Callable[[Inputs], Tensor]


def unit(generator: torch.Generator, *shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


def prototype_inputs(config: Command, generator: torch.Generator) -> Inputs:
    """Of a student and its teacher, whose logits have a center."""
    return {
        "student": unit(generator, VIEWS, config.samples, config.size),
        "prototypes": unit(generator, config.prototypes, config.size),
        "targets": unit(generator, GLOBAL_VIEWS, config.samples, config.size),
        "target_prototypes": unit(generator, config.prototypes, config.size),
        "center": 0.1 * torch.randn(config.prototypes, generator=generator),
    }


def patch_inputs(config: Command, generator: torch.Generator) -> Inputs:
    """The masked patches of images; images have different numbers of them, the first has none."""
    inputs = prototype_inputs(config, generator)
    share = torch.linspace(0, 0.3, config.samples)[:, None, None]
    mask = torch.rand(config.samples, SIDE, SIDE, generator=generator) < share
    masked = int(mask.sum())
    embeddings = {name: unit(generator, masked, config.size) for name in ("student", "targets")}
    return inputs | embeddings | {"mask": mask}


def pair_inputs(config: Command, generator: torch.Generator, *, log_scale: float, bias: float) -> Inputs:
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


def koleo_inputs(config: Command, generator: torch.Generator) -> Inputs:
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
    return paired_nce(x["log_scale"].exp() * x["images"], x["texts"], offset=0)[0]


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
    "DINO": Comparison("lightly", "`DINOLoss`", prototype_inputs, ("student", "prototypes"), our_dino, their_dino),
    "iBOT, patches": Comparison(
        "lightly", "`IBOTPatchLoss`", patch_inputs, ("student", "prototypes"), our_ibot, their_ibot
    ),
    "KoLeo": Comparison("lightly", "`KoLeoLoss`", koleo_inputs, ("rows",), our_koleo, their_koleo),
    "Sinkhorn-Knopp": Comparison("lightly", "`sinkhorn`", prototype_inputs, (), our_sinkhorn, their_sinkhorn),
    "CLIP": Comparison("open_clip_torch", "`ClipLoss`", CLIP, ("images", "texts", "log_scale"), our_clip, their_clip),
    "SigLIP": Comparison(
        "open_clip_torch", "`SigLipLoss`", SIGLIP, ("images", "texts", "log_scale", "bias"), our_siglip, their_siglip
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


def compare(comparison: Comparison, config: Command) -> dict[str, Any]:
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
    return {"peer": f"{comparison.package} {comparison.peer}", **largest}


def at_the_edges(config: Command, *, with_peer: bool) -> dict[str, dict[str, float]]:
    """Three equal rows in KoLeo: the largest gradient. A low temperature in Sinkhorn-Knopp: which part of numbers is finite."""
    generator = torch.Generator().manual_seed(0)
    rows = koleo_inputs(config, generator)["rows"]
    rows[1:3] = rows[0]
    # At a low temperature what overflows is the exponential of the largest logit: a target that is its prototype.
    targets = prototype_inputs(config, generator)
    targets["target_prototypes"][0] = targets["targets"][0, 0]
    result: dict[str, dict[str, float]] = {"equal_rows_gradient": {}, "low_temperature_finite": {}}
    both = (("ours", our_koleo, our_sinkhorn), ("lightly", their_koleo, their_sinkhorn))
    for name, koleo_, sinkhorn_ in both if with_peer else both[:1]:
        gradient = result_of(koleo_, {"rows": rows}, ("rows",), torch.float32)["rows"]
        result["equal_rows_gradient"][name] = float(gradient[:3].abs().max())
        assignments = sinkhorn_(targets, epsilon=LOW_EPSILON)
        result["low_temperature_finite"][name] = float(torch.isfinite(assignments).float().mean())
    return result


def table(losses: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row a loss."""
    lines = [
        "| loss, all measured | peer | value | gradients | ours from float64 | the peer from float64 |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in losses.items():
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


def body(command: Command, details: dict[str, Any]) -> str:
    gradient, finite = (details["edges"][name] for name in ("equal_rows_gradient", "low_temperature_finite"))
    of_equal_rows = ", ".join(f"{value:.1e} ({who})" for who, value in gradient.items())
    are_finite = ", ".join(f"{share:.0%} ({who})" for who, share in finite.items())
    return (
        f"On the CPU: {command.samples} samples (iBOT: images of {SIDE} × {SIDE} patches), {command.size} dimensions, "
        f"{command.prototypes} prototypes, {command.seeds} seeds, one process.\n\n{table(details['losses'])}\n"
        "Each number is the largest difference over all numbers and seeds, relative to the largest number of the result: ours "
        "from the peer's, both in float32; then each from the peer's own code in float64, value and gradients together, which "
        "tells whose rounding a difference is.\n\nWhere a peer is not its paper, or not ours:\n\n"
        "- DINO: equation 3 is a sum over pairs of views; lightly, the authors' code and ours take the mean. lightly moves the "
        "center within the loss; ours gets it as an input.\n"
        "- iBOT: lightly, DINOv2's code and ours average over an image's masked patches, then over images; an image without "
        "masked patches counts as 0.\n"
        "- KoLeo: the paper has no ε. lightly, DINOv2's code and ours add 1e-8 to the distance; the first two add it to each "
        "coordinate of the neighbours' difference, too, which gives equal rows a direction, the same for all. With three equal "
        f"rows among the {command.samples} the largest gradient is {of_equal_rows}. "
        "lightly looks for neighbours on its own rank, ours on all ranks.\n"
        "- Sinkhorn-Knopp: SwAV's code and lightly's take exp(logit / ε) itself, ours logarithms. With ε = "
        f"{LOW_EPSILON} and a target that is a prototype, of the assignments are finite: {are_finite}. lightly takes this rank's "
        "samples unless `gather_distributed` is set; ours takes all ranks'.\n"
        "- CLIP: by open_clip's default on several ranks (`local_loss` and `gather_with_grad` off) a gradient comes through a "
        "rank's own rows alone, so that DDP's average is that of the whole batch divided by the number of ranks; ours is that of "
        "the whole batch at any number. In one process, as here, they are the same.\n"
        "- SigLIP: open_clip passes texts from rank to rank, ours gathers them; both divide by the images of a rank, so that the "
        "average over ranks is equation 1.\n"
    )


def main(argv: Sequence[str] | None = None) -> None:
    command, record = begin(Command, "loss_parity", argv, __doc__, question=QUESTION)
    present = [package for package, module in PEERS.items() if record.has_peer(package, module)]
    require(bool(present), "the peers are not installed: pip install '.[bench]'")
    losses = {name: compare(one, command) for name, one in COMPARISONS.items() if one.package in present}
    record.details = {"losses": losses, "edges": at_the_edges(command, with_peer="lightly" in present)}
    for name, found in losses.items():
        for kind in ("ours_exact", "theirs_exact"):
            record.add(name, kind.replace("_", " from "), LARGEST, [max(found[kind].values())])
    title = "Losses beside lightly's and open_clip's"
    record.write(title, body(command, record.details), {"differences": bars(record, LARGEST)})


if __name__ == "__main__":
    sys.exit(main_guard(main))
