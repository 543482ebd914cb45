"""The linear probe against scikit-learn's logistic regression, and how its strength is chosen."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from dist_contrastive.config import UserError
from dist_contrastive.evaluation.linear import fit_logistic, holdout_mask, linear_probe

CLASSES = 4


def problem(
    num_samples: int, *, size: int = 20, seed: int = 0, noise: float = 2.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping classes in nearly collinear features, as an encoder's are: fp32 [N, D] and labels [N]."""
    centers = torch.randn(CLASSES, size, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (num_samples,), generator=generator)
    x = centers[y] + noise * torch.randn(num_samples, size, generator=generator)
    scales = torch.logspace(0, -2, size)
    return (x * scales + 3 * x[:, :1]).float(), y


def standardised(x: torch.Tensor) -> torch.Tensor:
    return ((x.double() - x.double().mean(0)) / x.double().std(0, correction=0)).float()


def objective(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, strength: float
) -> torch.Tensor:
    """Mean cross-entropy + strength / 2 · |weight|²; weight [D, K]."""
    logits = x @ weight + bias
    cross_entropy = logits.logsumexp(1) - logits[torch.arange(len(y)), y]
    return cross_entropy.mean() + strength / 2 * weight.square().sum()


def sklearn(strength: float, num_samples: int) -> LogisticRegression:
    """scikit-learn's model of the same objective, which it states as a sum over samples, by Newton's method."""
    return LogisticRegression(C=1 / (strength * num_samples), solver="newton-cholesky", tol=1e-10, max_iter=200)


@pytest.mark.parametrize("strength", [1e-4, 1e-2, 1.0])
def test_finds_sklearns_minimum(strength: float) -> None:
    x, y = problem(300)
    x = standardised(x).double()
    reference = sklearn(strength, len(y)).fit(x.numpy(), y.numpy())
    weight, bias = (torch.from_numpy(part) for part in (reference.coef_.T, reference.intercept_))
    best = objective(x, y, weight, bias, strength).item()
    fit = fit_logistic(x, y, num_classes=CLASSES, strength=strength, tolerance=1e-9)
    assert fit.converged
    assert fit.objective == pytest.approx(best, rel=1e-7)
    assert (fit.predict(x).numpy() == reference.predict(x.numpy())).mean() >= 0.99


@pytest.mark.parametrize("size", [20, 520])  # above 512 features the preconditioner takes a part of the directions
@pytest.mark.parametrize("strength", [1e-4, 1e-1])
def test_the_gradient_vanishes_at_the_fit(strength: float, size: int) -> None:
    x, y = problem(300, size=size)
    x = standardised(x).double()
    fit = fit_logistic(x, y, num_classes=CLASSES, strength=strength, tolerance=1e-10, max_iterations=1000)
    weight, bias = fit.weight.clone().requires_grad_(), fit.bias.clone().requires_grad_()
    value = objective(x, y, weight, bias, strength)
    value.backward()
    assert fit.converged
    assert fit.objective == pytest.approx(value.item(), rel=1e-9)
    assert weight.grad is not None
    assert bias.grad is not None
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 1e-5
    # What the probe uses: single precision, and an estimated gap to the minimum of a ten-thousandth.
    single = fit_logistic(x.float(), y, num_classes=CLASSES, strength=strength)
    assert single.converged
    assert single.objective == pytest.approx(value.item(), rel=1e-3)


def test_scores_as_sklearn_does() -> None:
    (train_x, train_y), (test_x, test_y) = problem(1500), problem(1000, seed=1)
    mean, std = train_x.mean(0), train_x.std(0, correction=0)
    reference = sklearn(1e-2, len(train_y)).fit(((train_x - mean) / std).double().numpy(), train_y.numpy())
    expected = reference.score(((test_x - mean) / std).numpy(), test_y.numpy())
    exact = linear_probe(train_x.double(), train_y, test_x.double(), test_y, strengths=[1e-2], tolerance=1e-9)
    assert exact.converged
    assert exact.top1 == pytest.approx(expected, abs=0.001)
    # At the probe's own tolerance a few samples on the border of two classes fall to the other side.
    score = linear_probe(train_x, train_y, test_x, test_y, strengths=[1e-2])
    assert score.converged
    assert score.top1 == pytest.approx(expected, abs=0.01)


STRENGTHS = (1e-5, 1e-3, 1e-1, 10.0)


def test_the_test_set_has_no_say_in_the_strength() -> None:
    (train_x, train_y), (test_x, test_y) = problem(150, noise=3.0), problem(300, seed=1)
    score = linear_probe(train_x, train_y, test_x, test_y, strengths=STRENGTHS, holdout=0.3)
    shuffled = test_y[torch.randperm(len(test_y), generator=torch.Generator().manual_seed(0))]
    other = linear_probe(train_x, train_y, -test_x, shuffled, strengths=STRENGTHS, holdout=0.3)
    assert (other.strength, other.holdout_top1) == (score.strength, score.holdout_top1)
    assert other.top1 != score.top1


def test_the_strength_is_the_best_on_the_held_out_part() -> None:
    train_x, train_y = problem(150, noise=3.0)
    score = linear_probe(train_x, train_y, train_x[:9], train_y[:9], strengths=STRENGTHS, holdout=0.3)
    held = holdout_mask(train_y, 0.3, seed=0)
    fit_x = train_x[~held]
    mean, std = fit_x.mean(0), fit_x.std(0, correction=0)
    accuracies = {}
    for strength in STRENGTHS:
        fit = fit_logistic((fit_x - mean) / std, train_y[~held], num_classes=CLASSES, strength=strength, tolerance=1e-7)
        accuracies[strength] = (fit.predict((train_x[held] - mean) / std) == train_y[held]).double().mean().item()
    # A fit that stops at another tolerance may decide two or three of the 45 samples the other way.
    assert accuracies[score.strength] >= max(accuracies.values()) - 3 / int(held.sum())
    assert score.holdout_top1 == pytest.approx(accuracies[score.strength], abs=3 / int(held.sum()))


def test_the_order_of_the_strengths_does_not_matter() -> None:
    (train_x, train_y), (test_x, test_y) = problem(150, noise=3.0), problem(100, seed=1)
    one, other = (
        linear_probe(train_x, train_y, test_x, test_y, strengths=order) for order in (STRENGTHS, STRENGTHS[::-1])
    )
    assert one == other


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_the_held_out_part_holds_a_fraction_of_every_class(fraction: float) -> None:
    labels = torch.tensor([0] * 100 + [1] * 10 + [2] * 2 + [3])
    held = holdout_mask(labels, fraction, seed=5)
    counts = [int(held[labels == label].sum()) for label in range(4)]
    assert counts == [round(100 * fraction), round(10 * fraction), 1, 0]
    assert torch.equal(held, holdout_mask(labels, fraction, seed=5))
    assert not torch.equal(held, holdout_mask(labels, fraction, seed=6))


@pytest.mark.parametrize("where", ["training", "test"])
def test_features_that_are_not_finite_are_a_clear_error(where: str) -> None:
    (train_x, train_y), (test_x, test_y) = problem(50), problem(20, seed=1)
    {"training": train_x, "test": test_x}[where][3, 2] = float("nan")
    with pytest.raises(UserError, match=f"1 of .* {where} samples are not finite"):
        linear_probe(train_x, train_y, test_x, test_y, strengths=[1e-2])


def test_a_class_without_training_samples_counts_as_wrong() -> None:
    train_x, train_y = problem(400, noise=0.1)
    test_x, test_y = problem(100, seed=1, noise=0.1)
    kept = train_y != 1  # classes 0, 2 and 3 stay: labels with a gap
    score = linear_probe(train_x[kept], train_y[kept], test_x, test_y, strengths=[1e-4])
    assert score.top1 == pytest.approx((test_y != 1).double().mean().item(), abs=0.02)
    # Class 9 lies beyond every class of the training set.
    beyond = torch.where(test_y == 3, 9, test_y)
    score = linear_probe(train_x[train_y < 3], train_y[train_y < 3], test_x, beyond, strengths=[1e-4])
    assert score.top1 == pytest.approx((test_y != 3).double().mean().item(), abs=0.02)


def test_one_sample_a_class_leaves_nothing_to_hold_out() -> None:
    x, y = torch.eye(CLASSES), torch.arange(CLASSES)
    score = linear_probe(x, y, x, y, strengths=STRENGTHS)
    assert score.holdout_top1 is None
    assert score.strength == max(STRENGTHS)
    assert score.top1 == 1.0


def test_constant_features_do_no_harm() -> None:
    (train_x, train_y), (test_x, test_y) = problem(300), problem(300, seed=1)
    plain = linear_probe(train_x, train_y, test_x, test_y, strengths=[1e-2])
    pad = torch.full((300, 2), 0.1)
    padded = linear_probe(torch.cat([train_x, pad], 1), train_y, torch.cat([test_x, pad], 1), test_y, strengths=[1e-2])
    assert padded.top1 == pytest.approx(plain.top1, abs=0.01)


def test_probing_leaves_torchs_random_state_alone() -> None:
    (train_x, train_y), (test_x, test_y) = problem(60, size=600), problem(20, size=600, seed=1)
    before = torch.get_rng_state()
    linear_probe(train_x, train_y, test_x, test_y, strengths=[1e-2])
    assert torch.equal(torch.get_rng_state(), before)
