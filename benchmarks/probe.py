"""`python -m benchmarks.probe`: does the linear probe find scikit-learn's optimum, and how fast?

The same standardised features, objective and strength for both: this package's fit as a score takes it, scikit-learn's
`LogisticRegression` (L-BFGS) as it comes, and the optimum itself, by scikit-learn in double precision at a hundredth of its
tolerance, untimed and begun near it. Features are synthetic, nearly collinear as an encoder's are, of classes told apart hardly
(untrained), mostly (trained) or nearly always (separable). With --run also those of a finished run's encoder, and of the same
one untrained.

    python -m benchmarks.probe
    python -m benchmarks.probe --run runs/demo --sizes 2000x64x5
    python -m benchmarks.probe --sizes 7600x256x19 --strengths 0.001 --rounds 2
"""

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional as F

from benchmarks.frame import (
    Budget,
    Record,
    Turns,
    at_least,
    bars,
    begin,
    choose_device,
    comparison,
    ratios,
    spread,
    timed_turns,
)
from dist_contrastive.batch import Share
from dist_contrastive.checkpoint import load_module
from dist_contrastive.cli import main_guard
from dist_contrastive.config import require
from dist_contrastive.data.beton import open_dataset
from dist_contrastive.data.format import TEST, TRAIN
from dist_contrastive.data.resident import loader_of
from dist_contrastive.evaluation.features import extract
from dist_contrastive.evaluation.linear import LogisticFit, fit_logistic, standard_of
from dist_contrastive.run_folder.trained import open_run

QUESTION = "does the linear probe find scikit-learn's optimum, and how fast?"
SECONDS, GAP, POINTS = "s", "objective above the optimum's, parts of a million", "accuracy less the optimum's, points"
OURS, SKLEARN = "ours", "scikit-learn"
POINTS_ALLOWED = 0.2
SEPARATIONS = {"untrained": 0.3, "trained": 1.1, "separable": 2.0}
"""How far centres of classes are apart, in standard deviations of each direction."""
DECAY = 0.7
"""Direction i of the features has a standard deviation like i to the power of minus this."""
NUM_TEST = 10_000
OPTIMUM_TOLERANCE = 1e-8
MAX_ITERATIONS = 100_000
"""Of scikit-learn: it ends by its tolerance."""


@dataclass(frozen=True)
class Command(Turns):
    sizes: tuple[str, ...] = ("7600x256x19", "50000x512x10")
    """Synthetic features, each as samples x features x classes."""
    run: Path | None = None
    """Folder of a finished run whose encoder's features are fitted as well."""
    strengths: tuple[float, ...] = (1e-2, 1e-4)
    """L2 strengths, per sample."""
    tolerance: float = 1e-4
    """Of scikit-learn's fit that is timed; its default."""
    case_seconds: float = 120.0
    """Take fewer rounds of a case where all of them would take longer than this."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where our fit is computed; scikit-learn computes on processors."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for size in self.sizes:
            numbers = size.split("x")
            require(
                len(numbers) == 3 and all(number.isdigit() for number in numbers) and int(numbers[2]) > 2,
                f"--sizes {size}: give samples x features x classes, three or more of these, as in 7600x256x19",
            )
            require(int(numbers[0]) >= 10 * int(numbers[2]), f"--sizes {size}: give ten samples a class or more")
        for option in ("strengths", "tolerance"):
            at_least(self, 1e-12, option)
        require(self.case_seconds > 0, f"--case-seconds {self.case_seconds:g}: give a positive number")


@dataclass(frozen=True)
class Problem:
    """Features float32 [N, D] and [M, D] on the host, with labels int64."""

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def num_classes(self) -> int:
        return int(self.train_y.max()) + 1


def synthetic(size: str, kind: str) -> Problem:
    """Of a given size; features are of any sign and then cut off below, as by a last ReLU."""
    num_samples, num_features, num_classes = map(int, size.split("x"))
    generator = torch.Generator().manual_seed(0)
    spreads = torch.arange(1, num_features + 1).float().pow(-DECAY)
    rotation = torch.linalg.qr(torch.randn(num_features, num_features, generator=generator)).Q
    # Centres differ in few directions, so that more features make no easier classes.
    centers = torch.randn(num_classes, num_features, generator=generator) * (torch.arange(num_features) < 32)

    def draw(num: int) -> tuple[Tensor, Tensor]:
        y = torch.randint(num_classes, (num,), generator=generator)
        x = SEPARATIONS[kind] / 2 * centers[y] + torch.randn(num, num_features, generator=generator)
        return ((x * spreads) @ rotation + 0.1).relu_(), y

    return Problem(
        f"{num_samples:,} × {num_features}, {num_classes} classes, {kind}", *draw(num_samples), *draw(NUM_TEST)
    )


def of_run(run: Path) -> list[Problem]:
    """The features that the encoder of a finished run, and the same untrained, have of its dataset."""
    trained = open_run(run)
    config = trained.config
    dataset = open_dataset(config.data.path)
    # Of two classes scikit-learn's objective is another one: it weighs the difference of their weights.
    require(len(dataset.manifest.classes) > 2, f"--run {run}: its dataset has less than three classes")
    cpu = torch.device("cpu")
    encoder = trained.untrained().exported
    splits = [dataset.indices(split) for split in (TRAIN, TEST)]
    labels = [torch.from_numpy(dataset.labels[indices]) for indices in splits]
    problems = []
    with loader_of(config, dataset, Share(config.batch.size), cpu) as loader:
        for kind in ("untrained", "trained"):
            if kind == "trained":
                load_module(encoder.body, trained.tensors("encoder"))
            (train_x, test_x) = (extract(encoder, loader, indices, cpu) for indices in splits)
            name = f"{run.name}: {len(train_x):,} × {train_x.shape[1]}, {len(dataset.manifest.classes)} classes, {kind}"
            problems.append(Problem(name, train_x, labels[0], test_x, labels[1]))
    return problems


class Case:
    """One problem at one strength."""

    def __init__(self, problem: Problem, strength: float, device: torch.device) -> None:
        self.problem, self.strength = problem, strength
        self.name = f"{problem.name}, strength {strength:g}"
        self._x, self._y = problem.train_x.to(device), problem.train_y.to(device)
        standard = standard_of(problem.train_x, torch.ones(len(problem.train_y)), torch.device("cpu"))
        self._standard_x, self._standard_test_x = (
            (x.double() - standard.center) * standard.scale for x in (problem.train_x, problem.test_x)
        )
        self._single_x = self._standard_x.float().numpy()

    def fit_ours(self) -> LogisticFit:
        """From features as they come: what standardises them is part of it."""
        return fit_logistic(self._x, self._y, num_classes=self.problem.num_classes, strength=self.strength)

    def fit_sklearn(self, tolerance: float) -> LogisticRegression:
        """scikit-learn's, in single precision, from features that are standardised already."""
        return self._model(tolerance).fit(self._single_x, self.problem.train_y.numpy())

    def optimum(self, tolerance: float) -> LogisticRegression:
        """scikit-learn's, in double precision, begun where ours ends in double precision: the objective is convex, so that the
        start is a matter of time alone."""
        near = fit_logistic(
            self.problem.train_x.double(), self.problem.train_y, num_classes=self.problem.num_classes,
            strength=self.strength, tolerance=OPTIMUM_TOLERANCE,
        )  # fmt: skip
        model = self._model(tolerance)
        model.coef_, model.intercept_ = near.weight.T.contiguous().numpy(), near.bias.numpy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # its line search sees no descent at the optimum itself
            return model.set_params(warm_start=True).fit(self._standard_x.numpy(), self.problem.train_y.numpy())

    def _model(self, tolerance: float) -> LogisticRegression:
        """Its objective is the sum over samples."""
        return LogisticRegression(C=1 / (self.strength * len(self._y)), tol=tolerance, max_iter=MAX_ITERATIONS)

    def judge(self, weight: Tensor, bias: Tensor) -> tuple[float, float]:
        """The objective in double precision and the accuracy on the test split, in points, of `weight` [D, K]."""
        weight, bias = weight.double().cpu(), bias.double().cpu()
        loss = F.cross_entropy(self._standard_x @ weight + bias, self.problem.train_y)
        objective = loss + self.strength / 2 * weight.square().sum()
        found = (self._standard_test_x @ weight + bias).argmax(1)
        return objective.item(), 100 * (found == self.problem.test_y).double().mean().item()


def weights_of(model: LogisticRegression) -> tuple[Tensor, Tensor]:
    """[D, K] and [K]."""
    return torch.from_numpy(model.coef_.T), torch.from_numpy(model.intercept_)


def measure(case: Case, command: Command, device: torch.device, budget: Budget, record: Record) -> None:
    contenders: dict[str, Callable[[], object]] = {
        OURS: case.fit_ours,
        SKLEARN: lambda: case.fit_sklearn(command.tolerance),
    }
    times = timed_turns(
        contenders, device, command.rounds, at_least_s=0.1, at_most_s=command.case_seconds, budget=budget
    )
    ours, theirs, best = case.fit_ours(), case.fit_sklearn(command.tolerance), case.optimum(command.tolerance / 100)
    objective, accuracy = case.judge(*weights_of(best))
    for name, weights in ((OURS, (ours.weight, ours.bias)), (SKLEARN, weights_of(theirs))):
        value, points = case.judge(*weights)
        record.add(case.name, name, SECONDS, times[name])
        record.add(case.name, name, GAP, [1e6 * (value / objective - 1)])
        record.add(case.name, name, POINTS, [points - accuracy])
    record.details[case.name] = {
        "optimum": objective,
        "optimum_accuracy": accuracy,
        "our_passes": ours.evaluations,
        "our_iterations": ours.iterations,
        "sklearn_iterations": int(theirs.n_iter_[0]),
    }


def verdict(record: Record) -> str:
    """What was promised, and what came of it."""
    cases = list(record.details)
    slower = [
        case
        for case in cases
        if spread(ratios(record.values(case, OURS, SECONDS), record.values(case, SKLEARN, SECONDS))).median > 1
    ]
    far = [case for case in cases if abs(record.values(case, OURS, POINTS)[0]) > POINTS_ALLOWED]
    said = [
        " ".join([f"{len(found)} of {len(cases)} cases", *(f"({case})" for case in found)]) for found in (slower, far)
    ]
    return (
        f"Ours is slower in {said[0]}, and more than {POINTS_ALLOWED} points from the optimum's accuracy in {said[1]}."
    )


def main(argv: Sequence[str] | None = None) -> None:
    command, record = begin(Command, "probe", argv, __doc__, question=QUESTION, packages=("scikit-learn",))
    device = choose_device(command.device)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    budget = Budget(command.minutes)
    problems: list[Callable[[], list[Problem]]] = []
    for size in command.sizes:
        problems += [lambda size=size, kind=kind: [synthetic(size, kind)] for kind in SEPARATIONS]  # type: ignore[misc]
    if command.run is not None:
        run = command.run
        problems.append(lambda: of_run(run))
    for make in problems:
        for problem in make():
            for strength in command.strengths:
                case = Case(problem, strength, device)
                if record.series and budget.is_over():
                    record.leave_out(case.name, "the time was over")
                    continue
                measure(case, command, device, budget, record)
    passes = "\n".join(
        f"| {case} | {found['optimum_accuracy']:.2f} | {found['our_passes']} | {found['sklearn_iterations']} |"
        for case, found in record.details.items()
    )
    body = (
        f"On {device.type}. {verdict(record)}\n\n{comparison(record, (SECONDS, GAP, POINTS), OURS)}\n"
        f"| case | accuracy of the optimum, % | our passes over the features | iterations of scikit-learn |\n|---|---|---|---|\n"
        f"{passes}\n\nOurs begins with features as they come, scikit-learn with standardised ones, in single precision. The "
        f"optimum: scikit-learn's at a tolerance of {command.tolerance / 100:g} in double precision. Accuracy: on {NUM_TEST:,} "
        "samples of synthetic features, on the test split of a run's dataset.\n"
    )
    record.write("The linear probe beside scikit-learn", body, {"seconds": bars(record, SECONDS)})


if __name__ == "__main__":
    sys.exit(main_guard(main))
