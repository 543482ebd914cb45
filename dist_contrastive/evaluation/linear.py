"""The linear probe: L2-regularised multinomial logistic regression on frozen features, its strength chosen honestly.

The objective is the mean cross-entropy plus strength / 2 · |weights of standardised features|²; biases are not penalised. It is
convex, so the only question is what an answer costs. Features of images are nearly collinear (the leading direction of raw
pixels holds hundreds of times the variance of the median one), and a plain L-BFGS crawls. Three things make it quick:

- L-BFGS starts each direction from a diagonal in the features' leading principal directions instead of from the
  identity. There the Hessian of class k is about c_k · (eigenvalue) + strength, with c_k the mean of p_k (1 - p_k) under
  the current fit, so the preconditioner follows the fit (Nocedal and Wright 2006, section 7.2, allow it to change at
  every step). Some thousand samples tell these directions well enough.
- Its first step length is nearly always right, so that an iteration costs one pass over the features, in which each piece of
  them serves for the value and for the gradient while it lies in the cache.
- The path of strengths runs from strong to weak, each fit started from the one before, and ends once the accuracy on
  the held-out part has clearly fallen, or no longer grows.

The features lie where they are (`chunks`), in single precision or as bytes, and no second copy of them is made: samples that are
held out have weight 0, the mean is taken off a piece at a time, and the scale is part of the weights. Sums over pieces, weights
and all that L-BFGS remembers are in double precision.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dist_contrastive import rng
from dist_contrastive.config import require
from dist_contrastive.evaluation.chunks import chunks, floats, settle
from dist_contrastive.evaluation.precision import full_precision

MAX_ITERATIONS = 200
TOLERANCE = 2e-5
"""A fit has converged when the estimated gap to the minimum is below this part of the objective, or of `SMALL_OBJECTIVE`."""
SMALL_OBJECTIVE = 0.1
"""In nats: where classes are told apart nearly always, the objective is next to 0, and so fine a part of it changes nothing."""
PATH_TOLERANCE = 1e-3
"""The same for the fits that only choose the strength."""
PATIENCE = 2
"""The path of strengths ends once as many in a row were no better on the held-out part than the best before them."""
HISTORY = 10
EXACT_SIZE = 512
"""Up to this feature size all principal directions precondition the fit; above it, the leading `BASIS_SIZE`."""
BASIS_SIZE = 256
DIRECTION_SAMPLES = 8192
"""Principal directions are those of as many samples, or of `DIRECTION_SAMPLES_PER_FEATURE` a feature where that is more."""
DIRECTION_SAMPLES_PER_FEATURE = 4
FLAT = 0.5
"""A step ends where the slope along it has fallen to this part."""
MAX_TRIALS = 10
"""Step lengths of one direction."""


@dataclass(frozen=True)
class LogisticFit:
    weight: Tensor
    """Of standardised features, float64 [D, K]."""
    bias: Tensor
    """Float64 [K]."""
    standard: "Standard"
    objective: float
    """Mean cross-entropy (nats) + strength / 2 · |weight|²."""
    iterations: int
    evaluations: int
    """How many times all features were passed over."""
    converged: bool

    def predict(self, x: Tensor) -> Tensor:
        """The class int64 [N] of each of `x` [N, D], features as the fit was given them; on the fit's device."""
        found = [torch.empty(0, dtype=torch.int64, device=self.bias.device)]
        with full_precision(self.bias.device):
            weight = (self.standard.scale[:, None] * self.weight).to(floats(x))
            bias, center = self.bias.to(weight), self.standard.center.to(weight)
            for _, piece in chunks(x, self.bias.device):
                found.append(torch.addmm(bias, piece - center, weight).argmax(1))
        return torch.cat(found)


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
class Standard:
    """What standardises features: they less `center`, times `scale`."""

    center: Tensor
    """Their mean, as precise as they are, float64 [D]."""
    scale: Tensor
    """One over their standard deviation, float64 [D]; 0 where they are constant."""


def standard_of(x: Tensor, kept: Tensor, device: torch.device) -> Standard:
    """Of those features `x` [N, D] that are `kept`, float [N] of 0 and 1, computed on `device`."""
    total = x.new_zeros(x.shape[1], dtype=torch.float64, device=device)
    squares, start = total.clone(), total
    num_kept = kept.double().sum()
    for rows, piece in chunks(x, device):
        piece = piece.double()
        if rows.start == 0:
            start = piece.mean(0)
        piece = piece - start  # near the mean: squares cancel no digits
        weights = kept[rows].double()
        total += weights @ piece
        squares += weights @ piece.square_()
    offset = total / num_kept
    mean, std = start + offset, (squares / num_kept - offset.square()).clamp_min(0).sqrt()
    varies = std > 1e-6 * mean.abs() + 1e-30  # below it a feature's spread is rounding
    return Standard(mean.to(floats(x)).double(), torch.where(varies, 1.0 / std.clamp_min(1e-30), 0.0))


@dataclass(frozen=True)
class PrincipalDirections:
    """Leading eigenpairs of XᵀX / N, and the mean of the eigenvalues that are left out; float64."""

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


def principal_directions(x: Tensor, kept: Tensor, standard: Standard) -> PrincipalDirections:
    """The leading principal directions of standardised features `x` [N, D], of a part of those that are `kept`; by subspace
    iteration where D is large (Halko et al. 2011)."""
    # A generator of its own: probing must leave torch's random state alone.
    generator = torch.Generator().manual_seed(0)
    size, device = x.shape[1], standard.center.device
    rows = kept.nonzero().flatten().cpu()
    most = max(DIRECTION_SAMPLES, DIRECTION_SAMPLES_PER_FEATURE * size)
    if len(rows) > most:
        rows = rows[torch.randperm(len(rows), generator=generator)[:most].sort().values]
    some = x[rows.to(x.device)].to(device).to(floats(x))
    some = (some - standard.center.to(some)).mul_(standard.scale.to(some))
    if size <= EXACT_SIZE:
        values, vectors = torch.linalg.eigh((some.T @ some / len(some)).double())
        return PrincipalDirections(vectors, values.clamp_min(0.0), 0.0)
    basis = torch.randn(size, BASIS_SIZE, generator=generator).to(some)
    for _ in range(2):
        basis = torch.linalg.qr(some.T @ (some @ basis)).Q
    projected = some @ basis
    values, rotation = torch.linalg.eigh((projected.T @ projected / len(some)).double())
    values = values.clamp_min(0.0)
    left_out = some.square().sum().double() / len(some) - values.sum()
    vectors = basis.double() @ rotation
    return PrincipalDirections(vectors, values, max(0.0, left_out.item()) / (size - BASIS_SIZE))


def fit_logistic(
    x: Tensor,
    y: Tensor,
    *,
    num_classes: int,
    strength: float,
    kept: Tensor | None = None,
    standard: Standard | None = None,
    directions: PrincipalDirections | None = None,
    start: LogisticFit | None = None,
    tolerance: float = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
) -> LogisticFit:
    """Minimise mean cross-entropy + strength / 2 · |weight|² over features `x` [N, D] (fp32, fp64 or bytes, anywhere), which are
    standardised on the way, and labels `y` int64 [N], on whose device it is computed.

    `kept`, float [N] of 0 and 1, says which samples count; without it all do. `standard` and `directions` are those of the
    features or of some that are distributed alike, where they are known; `start` is a fit to begin from. Stops when the estimated
    gap to the minimum, half of gᵀH⁻¹g with L-BFGS's H, is below `tolerance` times the objective or `SMALL_OBJECTIVE`, when
    rounding leaves no further descent, or after `max_iterations`.
    """
    device = y.device
    with full_precision(device):
        if kept is None:
            kept = torch.ones(len(y), dtype=floats(x), device=device)
        standard = standard or standard_of(x, kept, device)
        directions = directions or principal_directions(x, kept, standard)
        problem = _Problem(x, y, kept, standard, strength)
        if start is None:
            counts = torch.bincount(y, weights=kept.double(), minlength=num_classes)
            theta = counts.new_zeros(x.shape[1] + 1, num_classes)
            theta[-1] = (counts / problem.num_kept).clamp_min(0.5 / problem.num_kept).log()
        else:
            theta = torch.cat([start.weight, start.bias[None]])
        return _minimise(problem, theta, directions, tolerance, max_iterations)


@dataclass(frozen=True)
class _Point:
    """The objective at one theta [D + 1, K], whose last row is the bias; float64."""

    theta: Tensor
    value: float
    gradient: Tensor
    """[D + 1, K]"""
    curvature: Tensor
    """The mean of p (1 - p) for each class, [K]."""


class _Problem:
    """The objective. `evaluations` counts the passes over the features."""

    def __init__(self, x: Tensor, y: Tensor, kept: Tensor, standard: Standard, strength: float) -> None:
        self.x, self.y, self.kept, self.standard, self.strength = x, y, kept.to(floats(x)), standard, strength
        self.num_kept = kept.double().sum().item()
        self.evaluations = 0

    def at(self, theta: Tensor) -> _Point:
        """In one pass."""
        self.evaluations += 1
        scale = self.standard.scale[:, None]
        # Transposed, [K, b], reductions over few classes are sums of long rows.
        weight = (scale * theta[:-1]).T.to(self.kept).contiguous()
        bias, center = theta[-1][:, None].to(weight), self.standard.center.to(weight)
        gradient, loss = torch.zeros_like(theta), theta.new_zeros(())
        curvature = theta.new_zeros(theta.shape[1])
        for rows, piece in chunks(self.x, self.y.device):
            centered = piece - center
            kept, y = self.kept[rows], self.y[None, rows]
            logits = torch.addmm(bias, weight, centered.T)
            normalizer = logits.logsumexp(0)
            loss += ((normalizer - logits.gather(0, y)[0]) * kept).sum(dtype=torch.float64)
            p = logits.sub_(normalizer).exp_().mul_(kept)
            curvature += (p.sum(1) - p.square().sum(1)).double()
            p.scatter_add_(0, y, -kept[None])
            gradient[:-1] += (p @ centered).T
            gradient[-1] += p.sum(1)
        gradient /= self.num_kept
        gradient[:-1] = scale * gradient[:-1] + self.strength * theta[:-1]
        value = (loss / self.num_kept + self.strength / 2 * theta[:-1].square().sum()).item()
        return _Point(theta, value, gradient, (curvature / self.num_kept).clamp_min(1e-4))

    def line_search(self, start: _Point, direction: Tensor) -> _Point | None:
        """A point along `direction` that is lower than `start` and nearly the lowest; None where rounding shows none.

        The objective is convex along the line, so its slope alone says on which side of the minimum a step lies: the secant
        of the slopes, kept in a bracket. `FLAT` of the first slope is close enough (strong Wolfe's curvature condition).
        """
        first = (start.gradient * direction).sum().item()
        low, high, low_slope, high_slope, step = 0.0, float("inf"), first, 0.0, 1.0
        best = None
        for _ in range(MAX_TRIALS):
            trial = self.at(start.theta + step * direction)
            slope = (trial.gradient * direction).sum().item()
            if trial.value < (start if best is None else best).value:
                best = trial
            if abs(slope) <= FLAT * abs(first):
                break
            if slope < 0:
                rise = slope - low_slope
                secant = step - (step - low) * slope / rise if rise > 0 else high
                low, low_slope, step = step, slope, min(max(secant, 1.1 * step), 10.0 * step)
            else:
                high, high_slope = step, slope
            if high < float("inf"):
                width = high - low
                secant = low + width * low_slope / (low_slope - high_slope)
                step = min(max(secant, low + 0.1 * width), high - 0.1 * width)
        return best


def _minimise(
    problem: _Problem, theta: Tensor, directions: PrincipalDirections, tolerance: float, max_iterations: int
) -> LogisticFit:
    """L-BFGS (two-loop recursion) from a preconditioner that follows the fit."""

    def precondition(v: Tensor) -> Tensor:
        return torch.cat([directions.precondition(v[:-1], point.curvature, problem.strength), v[-1:] / point.curvature])

    point = problem.at(theta)
    pairs: deque[tuple[Tensor, Tensor, Tensor]] = deque(
        maxlen=HISTORY
    )  # step, change of the gradient, 1 / their product
    converged, iterations = False, 0
    while True:
        direction = point.gradient.clone()
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
        slope = (point.gradient * direction).sum().item()
        converged = -slope / 2 <= tolerance * max(point.value, SMALL_OBJECTIVE)
        if converged or slope >= 0 or iterations == max_iterations:
            break
        found = problem.line_search(point, direction)
        if found is None:  # rounding leaves no further descent
            break
        moved, turned = found.theta - point.theta, found.gradient - point.gradient
        product = (moved * turned).sum()
        if product > 0:  # always, but for rounding: the objective is convex
            pairs.append((moved, turned, 1.0 / product))
        point = found
        iterations += 1
    theta, standard = point.theta, problem.standard
    return LogisticFit(theta[:-1], theta[-1], standard, point.value, iterations, problem.evaluations, converged)


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
    device: torch.device | None = None,
    tolerance: float = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
) -> LinearScore:
    """Top-1 accuracy of logistic regression on features: float32 or bytes [N, D] and [M, D], with labels int64 [N] and [M].

    The strength is chosen on a held-out part of the training set (`holdout_mask`), the test set is scored once with a
    fit on the whole training set. Features are standardised by the mean and the standard deviation of the part that is
    fitted. Computed on `device`, by default that of `train_x`; where the features don't fit there, they stay where they are, and
    memory on the device is some pieces of them (`chunks`), `DIRECTION_SAMPLES` of them, and twenty times the weights. A test
    sample whose class has no training sample counts as wrong.

    Raises `UserError` where features are not finite.
    """
    device = device or train_x.device
    train_x = settle(train_x, device)
    for name, features in (("training", train_x), ("test", test_x)):
        num_bad = sum(int((~torch.isfinite(piece).all(1)).sum()) for _, piece in chunks(features, device))
        require(
            num_bad == 0,
            f"the features of {num_bad} of {len(features)} {name} samples are not finite: the encoder has diverged; "
            "train with a lower learning rate, or probe an earlier checkpoint",
        )
    classes, train_y = torch.unique(train_y.to(device), return_inverse=True)
    num_classes = len(classes)

    path = sorted(strengths, reverse=True)
    chosen, chosen_fit, best, iterations, num_worse, directions = path[0], None, None, 0, 0, None
    held = holdout_mask(train_y, holdout, seed).to(device)
    if held.any():
        kept, held_y = (~held).to(floats(train_x)), train_y[held]
        with full_precision(device):
            standard = standard_of(train_x, kept, device)
            directions = principal_directions(train_x, kept, standard)
        fit = None
        for strength in path:
            fit = fit_logistic(
                train_x, train_y, num_classes=num_classes, strength=strength, kept=kept, standard=standard,
                directions=directions, start=fit,
                tolerance=max(tolerance, PATH_TOLERANCE), max_iterations=max_iterations,
            )  # fmt: skip
            iterations += fit.iterations
            top1 = _accuracy(fit.predict(train_x)[held], held_y)
            if best is None or top1 > best:
                chosen, chosen_fit, best = strength, fit, top1
                num_worse = 0
            else:
                num_worse += 1
                by_a_standard_error = top1 < best - (best * (1 - best) / len(held_y)) ** 0.5
                if by_a_standard_error or num_worse == PATIENCE:
                    break
    final = fit_logistic(
        train_x, train_y, num_classes=num_classes, strength=chosen, start=chosen_fit, directions=directions,
        tolerance=tolerance, max_iterations=max_iterations,
    )  # fmt: skip
    predictions = classes[final.predict(test_x)]
    return LinearScore(
        top1=_accuracy(predictions, test_y.to(device)),
        strength=chosen,
        holdout_top1=best,
        iterations=iterations + final.iterations,
        converged=final.converged,
        predictions=predictions,
    )
