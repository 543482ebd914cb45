"""Assignments to prototypes against nested-loop pseudocode of their papers, on one rank and on several, in one block and in
many: DINO's and iBOT's cross entropy, Sinkhorn-Knopp, and what tells that they collapse."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dist_contrastive import distributed
from dist_contrastive.losses import blocks
from dist_contrastive.losses.prototypes import (
    assignment_entropies,
    other_views,
    prototype_cross_entropy,
    sinkhorn_bias,
)
from dist_contrastive.step.memory import TensorCount
from tests.harness import run_ranks

SIZE = 8  # of embeddings
STUDENT, TARGET = 0.1, 0.07  # temperatures
EPSILON = 0.05  # Sinkhorn's


def unit(*shape: int, seed: int) -> Tensor:
    """float32 of unit length in the last dimension."""
    return F.normalize(torch.randn(*shape, SIZE, generator=torch.Generator().manual_seed(seed)), dim=-1)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Of a vector."""
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


class Case:
    """Three views of a student, two of a teacher, of five samples; 11 prototypes, more than samples."""

    def __init__(
        self, num_views: int = 3, num_targets: int = 2, num_samples: int = 5, num_prototypes: int = 11
    ) -> None:
        self.student = unit(num_views, num_samples, seed=1)
        self.prototypes = unit(num_prototypes, seed=2)
        self.targets = unit(num_targets, num_samples, seed=3)
        self.target_prototypes = unit(num_prototypes, seed=4)
        self.bias = torch.linspace(-1, 1, num_prototypes)
        self.pairs = other_views(num_views, num_targets)

    def loss(
        self, student: Tensor, prototypes: Tensor, weights: Tensor | None = None, samples: slice = slice(None)
    ) -> Tensor:
        """Of `samples` alone; `student` has no others."""
        return prototype_cross_entropy(
            student,
            prototypes,
            self.targets[:, samples],
            self.target_prototypes,
            pairs=self.pairs,
            bias=self.bias,
            temperature=STUDENT,
            target_temperature=TARGET,
            weights=weights,
        )

    def with_gradients(self, weights: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The loss and its gradients for the student's embeddings and its prototypes."""
        student, prototypes = (x.clone().requires_grad_() for x in (self.student, self.prototypes))
        loss = self.loss(student, prototypes, weights)
        (3 * loss).backward()
        assert student.grad is not None
        assert prototypes.grad is not None
        return loss.detach(), student.grad / 3, prototypes.grad / 3

    def samples_losses(self, student: np.ndarray, prototypes: np.ndarray) -> list[float]:
        """DINO, equation 3, as loops in float64: of each sample the mean of H(p_w, q_v), weighted with the pairs."""
        targets, target_prototypes, bias, pairs = (
            x.double().numpy() for x in (self.targets, self.target_prototypes, self.bias, self.pairs)
        )
        losses = []
        for b in range(student.shape[1]):
            total = 0.0
            for v in range(len(student)):
                q = softmax(prototypes @ student[v, b] / STUDENT)
                for w in range(len(targets)):
                    p = softmax(target_prototypes @ targets[w, b] / TARGET + bias)
                    total -= pairs[v, w] * sum(p[k] * math.log(q[k]) for k in range(len(q)))
            losses.append(total / float(pairs.sum()))
        return losses

    def reference(self, weights: Tensor) -> tuple[float, np.ndarray, np.ndarray]:
        """The loops' loss and its gradients by central differences, in float64."""
        inputs = [self.student.double().numpy(), self.prototypes.double().numpy()]

        def loss() -> float:
            return sum(w * x for w, x in zip(weights.tolist(), self.samples_losses(*inputs), strict=True))

        gradients = []
        for x in inputs:
            gradient = np.zeros_like(x)
            for place in np.ndindex(*x.shape):
                kept, step = x[place], 1e-6
                x[place] = kept + step
                ahead = loss()
                x[place] = kept - step
                gradient[place] = (ahead - loss()) / (2 * step)
                x[place] = kept
            gradients.append(gradient)
        return loss(), gradients[0], gradients[1]


def test_dinos_pairs_are_all_but_a_view_with_itself() -> None:
    assert other_views(3, 2).tolist() == [[0, 1], [1, 0], [1, 1]]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("num_views", "num_targets"), [(3, 2), (1, 1), (2, 3)])
def test_value_and_gradients_equal_the_papers_loops(num_views: int, num_targets: int, weighted: bool) -> None:
    case = Case(num_views, num_targets, num_samples=3, num_prototypes=7)
    case.pairs = 0.5 + torch.arange(float(num_views * num_targets)).view(num_views, num_targets)
    weights = torch.tensor([0.3, 0.0, 1.2]) if weighted else None
    found = case.with_gradients(weights)
    expected = case.reference(torch.full((3,), 1 / 3, dtype=torch.float64) if weights is None else weights)
    assert found[0].item() == pytest.approx(expected[0], rel=1e-5)
    for gradient, reference in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(gradient.numpy(), reference, rtol=1e-4, atol=1e-5 * np.abs(reference).max())


def test_a_view_without_a_partner_gets_no_gradient() -> None:
    case = Case(num_views=1, num_targets=2)
    loss, gradient, _ = case.with_gradients()
    case.student = torch.cat([case.student, unit(1, 5, seed=9)])
    case.pairs = torch.cat([case.pairs, torch.zeros(1, 2)])
    both, of_both, _ = case.with_gradients()
    assert both.item() == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(of_both[0], gradient[0])
    assert not of_both[1].any()


def test_padding_changes_nothing() -> None:
    case = Case()
    loss, of_student, of_prototypes = case.with_gradients(torch.tensor([0.5, 0.0, 0.25, 0.0, 0.25]))
    kept = [0, 2, 4]
    case.student, case.targets = case.student[:, kept], case.targets[:, kept]
    without = case.with_gradients(torch.tensor([0.5, 0.25, 0.25]))
    assert loss.item() == pytest.approx(without[0].item(), rel=1e-6)
    torch.testing.assert_close(of_student[:, kept], without[1])
    assert not of_student[:, [1, 3]].any()
    torch.testing.assert_close(of_prototypes, without[2])


def test_the_teacher_gets_no_gradient() -> None:
    case = Case()
    case.targets.requires_grad_()
    case.target_prototypes.requires_grad_()
    case.bias.requires_grad_()
    assert not case.loss(case.student, case.prototypes).requires_grad
    case.loss(case.student.requires_grad_(), case.prototypes).backward()
    assert case.student.grad is not None
    assert case.targets.grad is case.target_prototypes.grad is case.bias.grad is case.prototypes.grad is None


@pytest.mark.parametrize("most", [1, 40, 70])
def test_many_blocks_give_what_one_gives(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    rows = case.targets.flatten(0, 1)
    weights = (torch.arange(len(rows)) % 3 != 0).float()
    results = []
    for pairs in (1 << 20, most):
        monkeypatch.setitem(blocks.MAX_PAIRS, "cpu", pairs)
        bias = sinkhorn_bias(rows, case.prototypes, temperature=EPSILON, iterations=3, weights=weights)
        entropies = assignment_entropies(rows, case.prototypes, bias=bias, temperature=EPSILON, weights=weights)
        results.append((*case.with_gradients(), bias, *entropies))
    for one, many in zip(*results, strict=True):
        torch.testing.assert_close(many, one, rtol=1e-5, atol=1e-6)
        assert one.any()


def test_float32_inside_autocast() -> None:
    case = Case()
    student, prototypes, targets = (x.bfloat16() for x in (case.student, case.prototypes, case.targets))
    rows = targets.flatten(0, 1)

    def results() -> list[Tensor]:
        bias = sinkhorn_bias(rows, prototypes, temperature=EPSILON, iterations=2)
        entropies = assignment_entropies(rows, prototypes, bias=bias, temperature=EPSILON)
        return [case.loss(student, prototypes), bias, *entropies]

    case.targets = targets
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = results()
    student, prototypes, targets = student.float(), prototypes.float(), targets.float()
    case.targets, rows = targets, targets.flatten(0, 1)
    for x, outside in zip(inside, results(), strict=True):
        assert x.dtype == torch.float32
        assert torch.equal(x, outside)


def sinkhorn_reference(logits: np.ndarray, iterations: int) -> np.ndarray:
    """SwAV's code (Caron et al. 2020, appendix A) in float64: assignments [B, K] of a whole batch's logits [B, K]."""
    q = np.exp(logits).T
    q /= q.sum()
    num_prototypes, num_samples = q.shape
    for _ in range(iterations):
        q *= (1 / num_prototypes / q.sum(1))[:, None]
        q *= (1 / num_samples / q.sum(0))[None]
    return q.T * num_samples if iterations else (q / q.sum(0)).T


def assignments(targets: Tensor, prototypes: Tensor, temperature: float, iterations: int) -> Tensor:
    bias = sinkhorn_bias(targets, prototypes, temperature=temperature, iterations=iterations)
    return (targets @ prototypes.T / temperature + bias).softmax(1)


@pytest.mark.parametrize("num_prototypes", [7, 40])
@pytest.mark.parametrize("iterations", [0, 1, 3, 20])
def test_the_bias_gives_sinkhorns_assignments(iterations: int, num_prototypes: int) -> None:
    """Fewer prototypes than samples, and more."""
    targets, prototypes = unit(12, seed=1), unit(num_prototypes, seed=2)
    found = assignments(targets, prototypes, EPSILON, iterations)
    expected = sinkhorn_reference((targets.double() @ prototypes.double().T / EPSILON).numpy(), iterations)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_prototypes", [5, 30])
def test_many_iterations_give_each_prototype_its_share(num_prototypes: int) -> None:
    targets, prototypes = unit(16, seed=1), unit(num_prototypes, seed=2)
    few, many = (assignments(targets, prototypes, 0.2, iterations).mean(0) for iterations in (1, 3000))
    share = torch.full((num_prototypes,), 1 / num_prototypes)
    torch.testing.assert_close(many, share, rtol=1e-4, atol=0.0)
    assert (few - share).abs().max() > 0.01 / num_prototypes
    bias = sinkhorn_bias(targets, prototypes, temperature=0.2, iterations=3000)
    assert bias.mean().item() == pytest.approx(0.0, abs=1e-4)  # it does not grow with iterations


def test_a_prototype_that_all_samples_are_nearest_to_gets_no_more_than_its_share() -> None:
    prototypes = unit(4, seed=2)
    targets = F.normalize(prototypes[0] + 0.1 * unit(32, seed=1), dim=1)
    plain = (targets @ prototypes.T / EPSILON).softmax(1).mean(0)
    assert plain[0] > 0.99
    assert assignments(targets, prototypes, EPSILON, 3).mean(0).max() < 0.3


@pytest.mark.parametrize("iterations", [1, 3, 50])
def test_logits_of_ten_thousand_do_not_overflow(iterations: int) -> None:
    targets, prototypes = 100 * torch.eye(4).repeat(2, 1), 100 * torch.cat([torch.eye(4), -torch.eye(4)])
    logits = targets @ prototypes.T
    assert (logits.max().item(), logits.min().item()) == (1e4, -1e4)
    bias = sinkhorn_bias(targets, prototypes, temperature=1.0, iterations=iterations)
    assert torch.isfinite(bias).all()
    student = targets[None].clone().requires_grad_()
    loss = prototype_cross_entropy(
        student,
        prototypes,
        targets[None],
        prototypes,
        pairs=torch.ones(1, 1),
        bias=torch.zeros(8),
        temperature=1.0,
        target_temperature=1.0,
    )
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    for entropy in assignment_entropies(targets, prototypes, bias=bias, temperature=1.0):
        assert torch.isfinite(entropy)


def test_padding_has_no_part_in_sinkhorn_and_entropies() -> None:
    targets, prototypes = unit(12, seed=1), unit(7, seed=2)
    weights = torch.tensor([1.0, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1])
    padded = targets.masked_fill(weights[:, None] == 0, 50.0)
    bias = sinkhorn_bias(padded, prototypes, temperature=EPSILON, iterations=3, weights=weights)
    expected = sinkhorn_bias(targets[weights == 1], prototypes, temperature=EPSILON, iterations=3)
    torch.testing.assert_close(bias, expected)
    # Weights of a loss do for statistics, too: they count whom a weight lets in.
    assert torch.equal(bias, sinkhorn_bias(padded, prototypes, temperature=EPSILON, iterations=3, weights=weights / 7))
    found = assignment_entropies(padded, prototypes, bias=bias, temperature=EPSILON, weights=weights / 7)
    without = assignment_entropies(targets[weights == 1], prototypes, bias=bias, temperature=EPSILON)
    torch.testing.assert_close(found, without)


def test_a_batch_of_padding_alone_gives_no_bias_and_no_entropy() -> None:
    targets, prototypes, weights = unit(3, seed=1), unit(7, seed=2), torch.zeros(3)
    assert not sinkhorn_bias(targets, prototypes, temperature=EPSILON, iterations=3, weights=weights).any()
    found = assignment_entropies(targets, prototypes, bias=torch.zeros(7), temperature=EPSILON, weights=weights)
    assert [x.item() for x in found] == [0, 0]


def test_entropies_equal_the_definition() -> None:
    targets, prototypes, bias = unit(9, seed=1), unit(7, seed=2), torch.linspace(-1, 1, 7)
    each = [
        softmax(prototypes.double().numpy() @ target / 0.3 + bias.double().numpy())
        for target in targets.double().numpy()
    ]
    expected = [np.mean([-sum(p * np.log(p)) for p in each]), -sum(np.mean(each, 0) * np.log(np.mean(each, 0)))]
    found = assignment_entropies(targets, prototypes, bias=bias, temperature=0.3)
    assert [x.item() for x in found] == pytest.approx(expected, rel=1e-5)


def test_entropies_tell_both_ways_to_collapse() -> None:
    prototypes = unit(16, seed=2)
    uniform = assignment_entropies(torch.zeros(32, SIZE), prototypes, bias=torch.zeros(16), temperature=0.1)
    assert [x.item() for x in uniform] == pytest.approx([math.log(16)] * 2, rel=1e-6)
    one = assignment_entropies(prototypes[:1].repeat(32, 1), prototypes, bias=torch.zeros(16), temperature=1e-4)
    assert [x.item() for x in one] == [0, 0]
    spread = assignment_entropies(prototypes, prototypes, bias=torch.zeros(16), temperature=1e-4)
    assert [x.item() for x in spread] == pytest.approx([0, math.log(16)], abs=1e-5)


def results_of_share(rank: int, num_samples: int) -> tuple[float, np.ndarray, np.ndarray, np.ndarray, list[float]]:
    """This rank's loss on its share of a batch, whose last sample is padding, with Sinkhorn's bias of all ranks: the loss, the
    gradients averaged as DDP does, the bias, the entropies."""
    case = Case(num_samples=num_samples)
    share = num_samples // distributed.world_size()
    mine = slice(rank * share, (rank + 1) * share)
    counted = (torch.arange(num_samples) < num_samples - 1).float()[mine]
    targets = case.targets[:, mine].flatten(0, 1)
    options = {"temperature": TARGET, "weights": counted.repeat(2)}
    case.bias = sinkhorn_bias(targets, case.target_prototypes, iterations=3, **options)  # type: ignore[arg-type]
    entropies = assignment_entropies(targets, case.target_prototypes, bias=case.bias, **options)  # type: ignore[arg-type]
    student, prototypes = case.student[:, mine].clone().requires_grad_(), case.prototypes.clone().requires_grad_()
    # The average over ranks is to be the mean over the samples that count.
    weights = counted * distributed.world_size() / (num_samples - 1)
    loss = case.loss(student, prototypes, weights, mine)
    loss.backward()
    assert student.grad is not None
    assert prototypes.grad is not None
    of_student = (student.grad / distributed.world_size()).numpy()
    of_prototypes = distributed.all_reduce_sum(prototypes.grad).div(distributed.world_size()).numpy()
    return loss.item(), of_student, of_prototypes, case.bias.numpy(), [x.item() for x in entropies]


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_give_the_results_of_the_whole_batch(num_ranks: int) -> None:
    loss, of_student, of_prototypes, bias, entropies = results_of_share(0, 8)
    shares = run_ranks(results_of_share, num_ranks, 8)
    assert np.mean([share[0] for share in shares]) == pytest.approx(loss, rel=1e-5)
    found = np.concatenate([share[1] for share in shares], axis=1)
    np.testing.assert_allclose(found, of_student, rtol=1e-5, atol=1e-5 * np.abs(of_student).max())
    for _, _, gradient, rank_bias, rank_entropies in shares:
        np.testing.assert_allclose(gradient, of_prototypes, rtol=1e-5, atol=1e-5 * np.abs(of_prototypes).max())
        np.testing.assert_allclose(rank_bias, bias, rtol=1e-5, atol=1e-5)
        assert rank_entropies == pytest.approx(entropies, rel=1e-5)


def test_memory_stays_far_below_the_matrix_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    num_prototypes, num_samples = 65536, 512
    monkeypatch.setitem(blocks.MAX_PAIRS, "cpu", 1 << 20)
    student = unit(2, num_samples // 2, seed=1).requires_grad_()
    targets, prototypes = unit(2, num_samples // 2, seed=3), unit(num_prototypes, seed=2).requires_grad_()
    rows = targets.flatten(0, 1)
    with TensorCount() as tensors:
        bias = sinkhorn_bias(rows, prototypes, temperature=EPSILON, iterations=2)
        assignment_entropies(rows, prototypes, bias=bias, temperature=EPSILON)
        prototype_cross_entropy(
            student,
            prototypes,
            targets,
            prototypes,
            pairs=other_views(2, 2),
            bias=bias,
            temperature=STUDENT,
            target_temperature=TARGET,
        ).backward()
    # Bytes: a fifth of one matrix in float32. A block takes a thirty-second of one.
    assert tensors.peak < 4 * num_samples * num_prototypes / 5
