"""SwAV: its loss with assignments over all ranks, and its queue."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_contrastive import distributed
from dist_contrastive.config import EncoderConfig, HeadConfig, UserError
from dist_contrastive.methods.swav import SwAV, SwAVConfig
from dist_contrastive.models.centering import SinkhornKnopp
from tests.harness import run_ranks
from tests.runs import assert_same_state, newest_checkpoint, tiny_config, train_on_rank, write_dataset
from tests.steps import DONE, GLOBAL_BATCH, build_from, clock_at, gradient_of, share_of_batch, step_gradient

GROUP = EncoderConfig(name="resnet10_w16", stem="small", norm="group", dropout=0.1)
CROPS = 3
CONFIG = SwAVConfig(projector=HeadConfig(layers=2, hidden_size=24, output_size=6), prototypes=5, queue_epochs=1.0)


def swav(**changes: Any) -> SwAV:
    method = build_from(replace(CONFIG, **changes), GROUP)
    assert isinstance(method, SwAV)
    return method


def sinkhorn(scores: np.ndarray, epsilon: float, iterations: int) -> np.ndarray:
    """The algorithm of the paper's appendix A: scores [B, K], assignments [B, K] that sum to 1 for each sample."""
    q = np.exp(scores / epsilon).T
    q /= q.sum()
    num_prototypes, num_samples = q.shape
    for _ in range(iterations):
        q /= q.sum(1, keepdims=True) * num_prototypes
        q /= q.sum(0, keepdims=True) * num_samples
    return (q * num_samples).T


def by_the_papers_loops(q: np.ndarray, prototypes: np.ndarray, queue: np.ndarray) -> float:
    """Equation 2 and section 3.3 in float64: q [V, B, E], queue [2, Q, E]."""
    total = 0.0
    for w in range(2):
        rows = np.concatenate([queue[w], q[w]])
        assignments = sinkhorn(rows @ prototypes.T, CONFIG.epsilon, CONFIG.iterations)[len(queue[w]) :]
        others = [v for v in range(len(q)) if v != w]
        for v in others:
            logits = q[v] @ prototypes.T / CONFIG.temperature
            log_q = logits - np.log(np.exp(logits).sum(1, keepdims=True))
            total -= float((assignments * log_q).sum(1).mean()) / len(others) / 2
    return total


@pytest.mark.parametrize("crops", [0, CROPS])
@pytest.mark.parametrize("queue", [0, 16])
def test_the_loss_is_the_papers(crops: int, queue: int) -> None:
    method = swav(queue=queue)
    batch = share_of_batch(method, crops=crops)
    with torch.no_grad():
        method.queue.normal_(generator=torch.Generator().manual_seed(3))
        method.queue.div_(method.queue.norm(dim=-1, keepdim=True))
    embeddings = method.embed_all(batch)
    method.settle(embeddings, clock_at(step=90))
    arrays = (embeddings["q"].detach(), method.projector.prototypes().detach(), method.queue)
    expected = by_the_papers_loops(*(x.double().numpy() for x in arrays))
    assert method.loss(embeddings, batch.samples)["loss"].item() == pytest.approx(expected, rel=1e-5)


def steps_on_rank(rank: int, micro: int) -> tuple[list[float], dict[str, np.ndarray], np.ndarray]:
    """Losses of steps before and after the queue begins to fill and is full, the last gradient, and the queue."""
    method = swav(queue=2 * GLOBAL_BATCH)
    losses = []
    for step in range(9, 14):
        method.zero_grad(set_to_none=True)
        batch = share_of_batch(method, seed=step, crops=CROPS)
        outcome = step_gradient(method, micro).compute(batch, clock_at(step=step))
        losses.append(distributed.all_gather(outcome.losses["loss"][None]).mean().item())
        method.after_step(clock_at(step=step + 1), outcome.embeddings, DONE)
    return losses, gradient_of(method), method.queue.numpy()


@pytest.mark.parametrize(("num_ranks", "micro"), [(1, 3), (2, 0), (2, 3), (4, 0), (4, 1)])
def test_any_ranks_and_micro_batches_give_one_run(num_ranks: int, micro: int) -> None:
    ((losses, gradient, queue),) = run_ranks(steps_on_rank, 1, 0)
    assert queue.any(-1).all()
    for found, of_rank, of_queue in run_ranks(steps_on_rank, num_ranks, micro):
        assert found == pytest.approx(losses, abs=1e-5)
        # The order of samples in the queue makes no difference: the batch is in rank order.
        np.testing.assert_allclose(of_queue, queue, rtol=0, atol=1e-5)
        assert of_rank.keys() == gradient.keys()
        for name, value in gradient.items():
            np.testing.assert_allclose(of_rank[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_the_queue_holds_the_last_steps_from_its_epoch_on_and_is_used_once_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method = swav(queue=2 * GLOBAL_BATCH)
    seen: list[int] = []
    settle = SinkhornKnopp.settle

    def note(self: SinkhornKnopp, targets: Tensor, *rest: Any) -> None:
        seen.append(len(targets))
        settle(self, targets, *rest)

    monkeypatch.setattr(SinkhornKnopp, "settle", note)
    kept = []
    for step in range(9, 14):
        embeddings = {name: x.detach() for name, x in method.embed_all(share_of_batch(method, seed=step)).items()}
        method.settle(embeddings, clock_at(step=step))
        method.after_step(clock_at(step=step + 1), embeddings, DONE)
        kept.append(embeddings["z"])
    # Epochs have ten steps, and the queue begins after one: it is full after steps 11 and 12.
    assert seen[::2] == [8, 8, 8, 24, 24]
    assert torch.equal(method.queue, torch.cat([kept[-2], kept[-1]], dim=1))


def test_a_run_with_a_queue_goes_on_bit_for_bit(tmp_path: Path) -> None:
    method = replace(CONFIG, queue=32, queue_epochs=0.2)
    whole = tiny_config(tmp_path / "whole", write_dataset(tmp_path), stop_after_steps=8, method=method)
    run_ranks(train_on_rank, 1, whole)
    parts = replace(whole, run_dir=tmp_path / "parts", stop_after_steps=3)
    run_ranks(train_on_rank, 1, parts)
    run_ranks(train_on_rank, 1, replace(parts, stop_after_steps=8))
    assert_same_state(newest_checkpoint(parts.run_dir), newest_checkpoint(whole.run_dir))


def test_a_queue_that_a_step_does_not_divide_is_refused_and_so_are_prototypes_that_would_stay_without_samples() -> None:
    with pytest.raises(UserError, match=r"^--method.queue 100: must be a multiple of --batch.global 64; give 64, or 0"):
        SwAVConfig(prototypes=16, queue=100).check_global_batch(64)
    with pytest.raises(
        UserError, match=r"^--method.prototypes 300: a step shares out 64 samples.*--method.queue 256 is enough"
    ):
        SwAVConfig(prototypes=300).check_global_batch(64)
    SwAVConfig(prototypes=300, queue=256).check_global_batch(64)
    SwAVConfig(prototypes=64).check_global_batch(64)
