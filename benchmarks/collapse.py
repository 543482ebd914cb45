"""`python -m benchmarks.collapse`: how does self-distillation collapse without centering, and without sharpening?

Trains `photos_dino` as it is, without centering, without sharpening (targets as warm as the predictions) and without both, two
ranks a run, one after the other, and draws what figure 7 of Caron et al. 2021 shows: the entropy of the teacher's targets, and
that of their mean over the batch. Next to ln K every target is the same and uniform; near 0 all are the same one prototype.
A run that is finished already in the folder of runs is not repeated.

    python -m benchmarks.collapse
    python -m benchmarks.collapse --seed 1 --runs runs/collapse_of_seed_1
"""

import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.frame import Options, begin
from benchmarks.methods import TrainingOptions, train
from dist_contrastive import cli
from dist_contrastive.methods.dino import DINOConfig
from dist_contrastive.metrics import read_metrics
from dist_contrastive.models.centering import describe_collapse
from dist_contrastive.recipes import build_recipe

QUESTION = "how does self-distillation collapse without centering, and without sharpening?"
RECIPE = "photos_dino"
SCORES = ("linear_top1", "init_linear_top1", "knn_top1", "init_knn_top1")


@dataclass(frozen=True)
class Command(Options):
    runs: Path = Path("runs/collapse")
    """Runs go to RUNS/VARIANT."""
    seed: int = 0
    """Of all runs."""
    options: str = "--launch.device cpu"
    """Further options of every run, in one string."""


def variants(method: DINOConfig) -> dict[str, str]:
    """Options of each variant: a center that keeps all of itself stays at 0, and a teacher as warm as the student does not
    sharpen."""
    no_centering = "--method.center-momentum 1"
    as_warm = f"{method.temperature:g}"
    no_sharpening = f"--method.teacher-temperature-start {as_warm} --method.teacher-temperature {as_warm}"
    return {
        "both": "",
        "no centering": no_centering,
        "no sharpening": no_sharpening,
        "neither": f"{no_centering} {no_sharpening}",
    }


def table(results: Sequence[dict[str, Any]], num_prototypes: int) -> str:
    """Markdown: a row a variant."""
    lines = [
        f"K = {num_prototypes:,}, ln K = {math.log(num_prototypes):.3f}; entropies are means of the last 10 steps; all measured.",
        "",
        "| centering, sharpening | entropy of targets | of their mean | linear | untrained | kNN | untrained | what is said |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results:
        scores = (row[name] for name in SCORES)
        lines.append(
            f"| {row['variant']} | {row['entropy']:.3f} | {row['entropy_of_mean']:.3f} | "
            f"{' | '.join(f'{score:.3f}' for score in scores)} | {row['alarm'].partition(' (')[0] or 'nothing'} |"
        )
    return "\n".join(lines) + "\n"


def draw(results: Sequence[dict[str, Any]], num_prototypes: int) -> Figure:
    """Both entropies over the steps, a line a variant."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    names = {"target_entropies": "entropy of targets", "mean_target_entropies": "entropy of their mean"}
    for ax, (key, title) in zip(figure.subplots(1, 2, sharey=True), names.items(), strict=True):
        for row in results:
            ax.plot(row["steps"], row[key], label=row["variant"], linewidth=1.2)
        ax.axhline(math.log(num_prototypes), color="0.6", linewidth=0.8, linestyle="--")
        ax.set(title=title, xlabel="step", ylim=(-0.2, math.log(num_prototypes) * 1.05))
    figure.axes[0].set_ylabel("nats; dashed: ln K")
    figure.legend(
        *figure.axes[1].get_legend_handles_labels(), title="centering, sharpening", loc="outside right center"
    )
    return figure


def measure(variant: str, options: str, command: Command, num_prototypes: int) -> dict[str, Any]:
    """Scores, entropies and what the alarm says of them, of one run, trained now unless it is there."""
    folder = command.runs / variant.replace(" ", "_")
    training = TrainingOptions(options=f"{command.options} {options}", ranks=2)
    train(folder, RECIPE, command.seed, training, sorted(os.sched_getaffinity(0)))
    probe = json.loads((folder / "probe.json").read_text())
    steps = [line for line in read_metrics(folder / "metrics.jsonl") if "target_entropy" in line]
    entropies = [line["target_entropy"] for line in steps]
    of_means = [line["mean_target_entropy"] for line in steps]
    entropy, entropy_of_mean = (sum(values[-10:]) / len(values[-10:]) for values in (entropies, of_means))
    return {
        "variant": variant,
        "options": options,
        **{name: probe[name] for name in SCORES},
        "steps": [line["step"] for line in steps],
        "target_entropies": entropies,
        "mean_target_entropies": of_means,
        "entropy": entropy,
        "entropy_of_mean": entropy_of_mean,
        "alarm": describe_collapse(entropy, entropy_of_mean, num_prototypes),
    }


def main(argv: Sequence[str] | None = None) -> None:
    command, record = begin(Command, "collapse", argv, __doc__, question=QUESTION)
    method = build_recipe(RECIPE).method
    assert isinstance(method, DINOConfig)
    command.runs.mkdir(parents=True, exist_ok=True)
    results = []
    for variant, options in variants(method).items():
        results.append(measure(variant, options, command, method.prototypes))
        print(table(results[-1:], method.prototypes).splitlines()[-1], flush=True)
        for score in SCORES:
            record.add("last epoch", variant, score, [results[-1][score]])
    record.details["runs"] = results
    body = f"{table(results, method.prototypes)}\nRecipe `{RECIPE}` on two ranks.\n"
    record.write(
        "Self-distillation without centering or sharpening", body, {"collapse": draw(results, method.prototypes)}
    )


if __name__ == "__main__":
    sys.exit(cli.main_guard(main))
