"""The linear probe: L2-regularised multinomial logistic regression on frozen features, its strength chosen honestly.

The objective is the mean cross-entropy plus strength / 2 · |weights|²; biases are not penalised. It is convex, so the
only question is what an answer costs. Features of images are nearly collinear (the leading direction of raw pixels holds
hundreds of times the variance of the median one), and a plain L-BFGS crawls. Three things make it quick:

- L-BFGS starts each direction from a diagonal in the features' leading principal directions instead of from the
  identity. There the Hessian of class k is about c_k · (eigenvalue) + strength, with c_k the mean of p_k (1 - p_k) under
  the current fit, so the preconditioner follows the fit (Nocedal and Wright 2006, section 7.2, allow it to change at
  every step).
- Logits are linear along a direction, so a line search over cached logits touches the features not once. One iteration
  costs two passes over the features, however many trial steps it takes.
- The path of strengths runs from strong to weak, each fit started from the one before, and ends once the accuracy on
  the held-out part has clearly fallen, or no longer grows.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from dist_contrastive import rng, signals
from dist_contrastive.config import require
from dist_contrastive.evaluation.precision import full_precision

MAX_ITERATIONS = 200
TOLERANCE = 1e-4
"""A fit has converged when the estimated gap to the minimum is below this part of the objective."""
PATH_TOLERANCE = 1e-3
"""The same for the fits that only choose the strength."""
PATIENCE = 2
"""The path of strengths ends once as many in a row were no better on the held-out part than the best before them."""
HISTORY = 10
EXACT_SIZE = 512
"""Up to this feature size all principal directions precondition the fit; above it, the leading `BASIS_SIZE`."""
BASIS_SIZE = 256


@dataclass(frozen=True)
class LogisticFit:
    weight: Tensor
    """[D, K], in the dtype of the features."""
    bias: Tensor
    """[K]"""
    objective: float
    """Mean cross-entropy (nats) + strength / 2 · |weight|²."""
    iterations: int
    converged: bool

    def predict(self, x: Tensor) -> Tensor:
        """The class int64 [N] of each of `x` [N, D], standardised as the features of the fit were."""
        return (x @ self.weight + self.bias).argmax(1)


@dataclass(frozen=True)
class LinearScore:
    top1: float
    """Accuracy on the test set, a fraction."""
    strength: float
    """The L2 strength that was chosen on the held-out part of the training set."""
    holdout_top1: float | None
    """Accuracy of the chosen strength on the held-out part; None where no class had a sample to spare."""
    iterations: int
    """L-BFGS iterations over all fits, the final one included."""
    converged: bool
    """Whether the final fit reached its tolerance."""
    predictions: Tensor = field(compare=False)
    """The class of each test sample, int64 [M]."""


@dataclass(frozen=True)
class PrincipalDirections:
    """Leading eigenpairs of XᵀX / N, and the mean of the eigenvalues that are left out."""

    vectors: Tensor
    """[D, Q], orthonormal columns."""
    values: Tensor
    """[Q]"""
    remainder: float

    def precondition(self, gradient: Tensor, curvature: Tensor, strength: float) -> Tensor:
        """(curvature_k · XᵀX / N + strength)⁻¹ applied to column k of `gradient` [D, K], with curvature [K]."""
        rest = 1.0 / (curvature * self.remainder + strength)
        inner = 1.0 / (curvature * self.values[:, None] + strength)
        return gradient * rest + self.vectors @ ((self.vectors.T @ gradient) * (inner - rest))


def principal_directions(x: Tensor) -> PrincipalDirections:
    """The leading principal directions of `x` [N, D], by subspace iteration where D is large (Halko et al. 2011)."""
    num_samples, size = x.shape
    if size <= EXACT_SIZE:
        values, vectors = torch.linalg.eigh(x.T @ x / num_samples)
        return PrincipalDirections(vectors, values.clamp_min(0.0), 0.0)
    # A generator of its own: probing must leave torch's random state alone.
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(size, BASIS_SIZE, generator=generator).to(x)
    for _ in range(2):
        basis = torch.linalg.qr(x.T @ (x @ basis)).Q
    projected = x @ basis
    values, rotation = torch.linalg.eigh(projected.T @ projected / num_samples)
    values = values.clamp_min(0.0)
    left_out = x.square().sum() / num_samples - values.sum()
    return PrincipalDirections(basis @ rotation, values, max(0.0, left_out.item()) / (size - BASIS_SIZE))


def fit_logistic(
    x: Tensor,
    y: Tensor,
    *,
    num_classes: int,
    strength: float,
    start: LogisticFit | None = None,
    directions: PrincipalDirections | None = None,
    tolerance: float = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
) -> LogisticFit:
    """Minimise mean cross-entropy + strength / 2 · |weight|² over `x` [N, D] (fp32 or fp64) and labels `y` int64 [N].

    `x` should be standardised. `start` is a fit to begin from, `directions` what `principal_directions` gave for `x` or
    for features that are distributed alike. Stops when the estimated gap to the minimum, half of gᵀH⁻¹g with L-BFGS's H,
    is below `tolerance` times the objective, when rounding leaves no further descent, or after `max_iterations`.
    """
    with full_precision(x.device):
        directions = directions or principal_directions(x)
        problem = _Problem(x, y, num_classes, strength)
        if start is None:
            counts = torch.bincount(y, minlength=num_classes).to(x)
            theta = x.new_zeros(x.shape[1] + 1, num_classes)
            theta[-1] = (counts / len(y)).clamp_min(0.5 / len(y)).log()
        else:
            theta = torch.cat([start.weight, start.bias[None]])
        return _minimise(problem, theta, directions, tolerance, max_iterations)


class _Problem:
    """The objective over theta [D + 1, K], whose last row is the bias."""

    def __init__(self, x: Tensor, y: Tensor, num_classes: int, strength: float) -> None:
        self.x, self.y, self.num_classes, self.strength = x, y, num_classes, strength
        self.rows = torch.arange(len(y), device=y.device)

    def logits(self, theta: Tensor) -> Tensor:
        return torch.addmm(theta[-1], self.x, theta[:-1])

    def value(self, logits: Tensor, square: float) -> float:
        """The objective at `logits` [N, K] where |weight|² is `square`."""
        return F.cross_entropy(logits, self.y).item() + self.strength / 2 * square

    def gradient(self, logits: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient [D + 1, K], and the mean of p (1 - p) for each class [K]."""
        p = torch.softmax(logits, 1)
        curvature = (p.mean(0) - p.square().mean(0)).clamp_min(1e-4)
        p[self.rows, self.y] -= 1.0
        p /= len(p)
        gradient = torch.cat([torch.addmm(theta[:-1], self.x.T, p, beta=self.strength), p.sum(0)[None]])
        return gradient, curvature

    def line_search(self, logits: Tensor, change: Tensor, theta: Tensor, direction: Tensor, slope: float) -> float:
        """A step size along `direction`, at which logits change by `change` [N, K]: Newton's method, kept in a bracket.

        The objective is convex along the line, so its slope alone says on which side of the minimum a step lies. A
        tenth of the first slope is close enough (strong Wolfe's curvature condition).
        """
        inner = (theta[:-1] * direction[:-1]).sum().item()
        square = direction[:-1].square().sum().item()
        change_of_label = change[self.rows, self.y].mean().item()
        low, high, step = 0.0, float("inf"), 1.0
        for _ in range(10):
            p = torch.softmax(logits + step * change, 1)
            mean_change = (p * change).sum(1)
            first = mean_change.mean().item() - change_of_label + self.strength * (inner + step * square)
            if abs(first) <= 0.1 * abs(slope):
                break
            second = ((p * change.square()).sum(1) - mean_change.square()).mean().item() + self.strength * square
            low, high = (step, high) if first < 0 else (low, step)
            newton = step - first / max(second, 1e-30)
            step = newton if low < newton < min(high, 10.0 * step) else (low + high) / 2 if high < 1e30 else 2.0 * step
        return step


def _minimise(
    problem: _Problem, theta: Tensor, directions: PrincipalDirections, tolerance: float, max_iterations: int
) -> LogisticFit:
    """L-BFGS (two-loop recursion) from a preconditioner that follows the fit."""

    def precondition(v: Tensor) -> Tensor:
        return torch.cat([directions.precondition(v[:-1], curvature, problem.strength), v[-1:] / curvature])

    logits = problem.logits(theta)
    value = problem.value(logits, theta[:-1].square().sum().item())
    gradient, curvature = problem.gradient(logits, theta)
    pairs: deque[tuple[Tensor, Tensor, Tensor]] = deque(
        maxlen=HISTORY
    )  # step, change of the gradient, 1 / their product
    converged, iterations = False, 0
    while True:
        signals.give_way()
        direction = gradient.clone()
        coefficients = []
        for moved, turned, inverse in reversed(pairs):
            coefficient = inverse * (moved * direction).sum()
            direction -= coefficient * turned
            coefficients.append(coefficient)
        direction = precondition(direction)
        if pairs:
            _, turned, inverse = pairs[-1]
            direction /= inverse * (turned * precondition(turned)).sum()
        for (moved, turned, inverse), coefficient in zip(pairs, reversed(coefficients), strict=True):
            direction += moved * (coefficient - inverse * (turned * direction).sum())
        direction.neg_()
        slope = (gradient * direction).sum().item()
        converged = -slope / 2 <= tolerance * value
        if converged or slope >= 0 or iterations == max_iterations:
            break
        change = problem.x @ direction[:-1] + direction[-1]
        step = problem.line_search(logits, change, theta, direction, slope)
        new_theta = theta + step * direction
        new_logits = logits + step * change
        new_value = problem.value(new_logits, new_theta[:-1].square().sum().item())
        if not new_value < value:  # rounding leaves no further descent
            break
        new_gradient, curvature = problem.gradient(new_logits, new_theta)
        moved, turned = new_theta - theta, new_gradient - gradient
        product = (moved * turned).sum()
        if product > 0:  # always, but for rounding: the objective is convex
            pairs.append((moved, turned, 1.0 / product))
        theta, logits, value, gradient = new_theta, new_logits, new_value, new_gradient
        iterations += 1
    return LogisticFit(theta[:-1], theta[-1], value, iterations, converged)


def holdout_mask(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Which training samples are held out: bool [N] on the CPU for `labels` int64 [N], about `fraction` of each class.

    The choice is a pure function of (seed, position, class sizes). Every class with at least two samples has one in each
    part; a class with a single sample stays in the part that is fitted.
    """
    labels = labels.cpu()
    keys = rng.fold(rng.fold(torch.tensor(seed, dtype=torch.int64), int(rng.Stream.SPLIT)), torch.arange(len(labels)))
    by_key = torch.argsort(keys, stable=True)
    order = by_key[torch.argsort(labels[by_key], stable=True)]  # by class, then by key
    counts = torch.bincount(labels)
    place = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[order]]  # within the class
    quota = torch.minimum((counts * fraction).round().long().clamp_min(1), (counts - 1).clamp_min(0))
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[order] = place < quota[labels[order]]
    return mask


def _standardise(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """`x` and `others` less the mean of `x` and divided by its standard deviation; constant features become 0."""
    mean, std = x.double().mean(0), x.double().std(0, correction=0)
    varies = std > 1e-6 * mean.abs() + 1e-30  # below it a feature's spread is rounding
    mean, scale = mean.to(x), torch.where(varies, 1.0 / std.clamp_min(1e-30), 0.0).to(x)
    return tuple((part - mean) * scale for part in (x, *others))


def _predict(fit: LogisticFit, x: Tensor) -> Tensor:
    with full_precision(x.device):
        return fit.predict(x)


def _accuracy(predictions: Tensor, y: Tensor) -> float:
    return (predictions == y).double().mean().item()


def linear_probe(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    strengths: Sequence[float],
    holdout: float = 0.1,
    seed: int = 0,
    tolerance: float = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
) -> LinearScore:
    """Top-1 accuracy of logistic regression on features: float32 [N, D] and [M, D], with labels int64 [N] and [M].

    The strength is chosen on a held-out part of the training set (`holdout_mask`), the test set is scored once with a
    fit on the whole training set. Features are standardised by the mean and the standard deviation of the part that is
    fitted. Runs on the features' device; memory there is one more copy of the features and about six floats a sample
    and class. A test sample whose class has no training sample counts as wrong.

    Raises `UserError` where features are not finite.
    """
    for name, features in (("training", train_x), ("test", test_x)):
        num_bad = int((~torch.isfinite(features).all(1)).sum())
        require(
            num_bad == 0,
            f"the features of {num_bad} of {len(features)} {name} samples are not finite: the encoder has diverged; "
            "train with a lower learning rate, or probe an earlier checkpoint",
        )
    classes, train_y = torch.unique(train_y.to(train_x.device), return_inverse=True)
    num_classes = len(classes)

    path = sorted(strengths, reverse=True)
    chosen, chosen_fit, best, iterations, num_worse = path[0], None, None, 0, 0
    held = holdout_mask(train_y, holdout, seed).to(train_x.device)
    if held.any():
        fit_x, held_x = _standardise(train_x[~held], train_x[held])
        fit_y, held_y = train_y[~held], train_y[held]
        directions = _directions_of(fit_x)
        fit = None
        for strength in path:
            fit = fit_logistic(
                fit_x, fit_y, num_classes=num_classes, strength=strength, start=fit, directions=directions,
                tolerance=max(tolerance, PATH_TOLERANCE), max_iterations=max_iterations,
            )  # fmt: skip
            iterations += fit.iterations
            top1 = _accuracy(_predict(fit, held_x), held_y)
            if best is None or top1 > best:
                chosen, chosen_fit, best = strength, fit, top1
                num_worse = 0
            else:
                num_worse += 1
                by_a_standard_error = top1 < best - (best * (1 - best) / len(held_y)) ** 0.5
                if by_a_standard_error or num_worse == PATIENCE:
                    break
        del fit_x, held_x
    train_x, test_x = _standardise(train_x, test_x)
    final = fit_logistic(
        train_x, train_y, num_classes=num_classes, strength=chosen, start=chosen_fit,
        tolerance=tolerance, max_iterations=max_iterations,
    )  # fmt: skip
    predictions = classes[_predict(final, test_x)]
    return LinearScore(
        top1=_accuracy(predictions, test_y.to(predictions.device)),
        strength=chosen,
        holdout_top1=best,
        iterations=iterations + final.iterations,
        converged=final.converged,
        predictions=predictions,
    )


def _directions_of(x: Tensor) -> PrincipalDirections:
    with full_precision(x.device):
        return principal_directions(x)
