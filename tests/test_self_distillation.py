"""DINO: its loss, its centering over all ranks, its schedules, and multi-crop."""

import contextlib
import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_contrastive import distributed
from dist_contrastive.config import EncoderConfig, HeadConfig, OptimConfig, TrainConfig
from dist_contrastive.methods.dino import DINO, DINOConfig
from dist_contrastive.models.centering import MeanCentering
from dist_contrastive.optim import build_optimizer, set_rates
from dist_contrastive.run import train
from dist_contrastive.schedules import Clock
from tests.harness import run_ranks
from tests.runs import tiny_config, write_dataset
from tests.steps import DONE, build_from, clock_at, gradient_of, share_of_batch, step_gradient

GROUP = EncoderConfig(name="resnet10_w16", stem="small", norm="group", dropout=0.1)
CROPS = 3
HEAD = HeadConfig(layers=3, hidden_size=24, output_size=8, activation="gelu", hidden_norm=False)
CONFIG = DINOConfig(projector=HEAD, prototypes=13, teacher_temperature=0.06, teacher_temperature_epochs=4)


def dino(**changes: Any) -> DINO:
    method = build_from(DINOConfig(**{**vars(CONFIG), **changes}), GROUP)
    assert isinstance(method, DINO)
    assert isinstance(method.centering, MeanCentering)
    with torch.no_grad():
        method.centering.center.normal_(std=0.05, generator=torch.Generator().manual_seed(5))
        for parameter in method.own_teacher.parameters():  # as if it had followed for a while
            parameter.mul_(1.1).add_(0.01)
    return method


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def by_the_papers_loops(method: DINO, q: Tensor, k: Tensor, temperature: float) -> float:
    """Algorithm 1 and equation 3 in float64: for each teacher's view of the first size all the student's other views."""
    student, teacher = (
        x.detach().double().numpy() for x in (method.projector.prototypes(), method.teacher_prototypes())
    )
    center = method.centering.get_buffer("center").double().numpy()
    total, pairs = 0.0, 0
    for w in range(len(k)):
        for v in range(len(q)):
            if v == w:
                continue
            pairs += 1
            for b in range(q.shape[1]):
                p = softmax((teacher @ k[w, b].double().numpy() - center) / temperature)
                log_q = np.log(softmax(student @ q[v, b].detach().double().numpy() / method.config.temperature))
                total -= float(p @ log_q)
    return total / pairs / q.shape[1]


@pytest.mark.parametrize("crops", [0, CROPS])
@pytest.mark.parametrize("epoch", [0, 1, 4, 9])
def test_the_loss_is_the_papers_at_every_teacher_temperature(crops: int, epoch: int) -> None:
    method = dino()
    batch = share_of_batch(method, crops=crops)
    embeddings = method.embed_all(batch)
    assert embeddings["q"].shape == (2 + crops, len(batch), HEAD.output_size)
    method.settle(embeddings, clock_at(step=10 * epoch))
    temperature = {0: 0.04, 1: 0.045, 4: 0.06, 9: 0.06}[epoch]
    expected = by_the_papers_loops(method, embeddings["q"], embeddings["k"], temperature)
    assert method.loss(embeddings, batch.samples)["loss"].item() == pytest.approx(expected, rel=1e-5)


def test_embeddings_and_prototypes_have_unit_length_whatever_the_head_gives() -> None:
    method = dino()
    with torch.no_grad():
        method.projector.directions.mul_(1e4)
    embeddings = method.embed_all(share_of_batch(method, crops=CROPS))
    for rows in (embeddings["q"], embeddings["k"], method.projector.prototypes()):
        torch.testing.assert_close(rows.norm(dim=-1), torch.ones(rows.shape[:-1]))


def step_on_rank(rank: int, micro: int) -> tuple[float, dict[str, np.ndarray], np.ndarray]:
    """Loss, averaged gradient and the center after a step with multi-crop, dropout included."""
    method = dino()
    outcome = step_gradient(method, micro).compute(share_of_batch(method, crops=CROPS), clock_at(step=20))
    method.after_step(clock_at(step=21), outcome.embeddings, DONE)
    loss = distributed.all_gather(outcome.losses["loss"][None]).mean().item()
    return loss, gradient_of(method), method.centering.get_buffer("center").numpy()


@pytest.mark.parametrize(("num_ranks", "micro"), [(1, 3), (2, 0), (2, 3), (4, 0), (4, 1)])
def test_any_ranks_and_micro_batches_give_one_step(num_ranks: int, micro: int) -> None:
    ((loss, gradient, center),) = run_ranks(step_on_rank, 1, 0)
    for found, of_rank, centered in run_ranks(step_on_rank, num_ranks, micro):
        assert found == pytest.approx(loss, abs=1e-5)
        np.testing.assert_allclose(centered, center, rtol=0, atol=1e-6)
        assert of_rank.keys() == gradient.keys()
        assert "projector.directions" in gradient
        for name, value in gradient.items():
            np.testing.assert_allclose(of_rank[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_the_center_follows_the_mean_of_the_teachers_logits_before_it_moves() -> None:
    """Equation 4."""
    method = dino()
    batch = share_of_batch(method)
    embeddings = {name: value.detach() for name, value in method.embed_all(batch).items()}
    before = method.centering.get_buffer("center").clone()
    logits = embeddings["k"].flatten(0, 1) @ method.teacher_prototypes().T
    method.after_step(clock_at(0.5), embeddings, DONE)
    expected = 0.9 * before + 0.1 * logits.mean(0)
    torch.testing.assert_close(method.centering.get_buffer("center"), expected)
    off = dino(center_momentum=1.0)
    start = off.centering.get_buffer("center").clone()
    off.after_step(clock_at(0.5), embeddings, DONE)
    assert torch.equal(off.centering.get_buffer("center"), start)


def test_prototypes_stand_still_in_the_first_epochs_and_are_not_decayed_then() -> None:
    method = dino(freeze_epochs=1.5)
    config = OptimConfig(learning_rate=0.1, weight_decay=0.5)
    optimizer = build_optimizer(config, method, method.late_parameters)
    directions, other = method.projector.directions, next(method.encoder.parameters())
    for step in range(20):
        clock = Clock(step=step, steps_per_epoch=10, total_steps=100)
        before, before_other = directions.detach().clone(), other.detach().clone()
        for parameter in method.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        set_rates(optimizer, config, 0.1, clock)
        optimizer.step()
        assert torch.equal(directions, before) == (step < 15)
        assert not torch.equal(other, before_other)


def test_the_teacher_is_what_a_run_gives() -> None:
    method = dino()
    assert method.exported is method.own_teacher.encoder
    assert method.exported_projector is method.own_teacher.projector


def test_uniform_targets_are_reported_as_the_logarithm_of_the_prototypes() -> None:
    method = dino()
    batch = share_of_batch(method)
    embeddings = {name: value.detach() for name, value in method.embed_all(batch).items()}
    method.settle(embeddings, clock_at())
    spread = method.report(embeddings, logged=True)
    assert 0 < spread["target_entropy"] <= spread["mean_target_entropy"] <= math.log(13)
    method.centering.bias.zero_()
    method.target_temperature = 1e6
    uniform = method.report(embeddings, logged=True)
    assert uniform["target_entropy"].item() == pytest.approx(math.log(13), abs=1e-4)
    assert "target_entropy" not in method.report(embeddings, logged=False)


def test_collapse_is_told_from_health_and_from_the_first_epoch() -> None:
    largest, later = math.log(13), clock_at(step=20)
    uniform = {"target_entropy": 0.995 * largest, "mean_target_entropy": largest}
    single = {"target_entropy": 0.01, "mean_target_entropy": 0.01}
    healthy = {"target_entropy": 0.4 * largest, "mean_target_entropy": 0.9 * largest}
    method = dino()
    assert method.alarm(uniform, later).startswith("all targets are uniform (entropy 2.55 of ln 13 = 2.56)")
    assert method.alarm(single, later).startswith("1.0 of 13 prototypes have nearly all samples")
    assert method.alarm(healthy, later) == ""
    same = {"target_entropy": 0.60 * largest, "mean_target_entropy": 0.61 * largest}
    assert method.alarm(same, later).startswith("all targets are the same (entropy 1.54 of ln 13 = 2.56)")
    assert method.alarm(uniform, clock_at(step=9)) == ""


def what_is_said(rank: int, config: TrainConfig) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        train(config)
    return output.getvalue()


def test_a_run_without_sharpening_says_once_that_its_targets_are_uniform(tmp_path: Path) -> None:
    method = replace(CONFIG, teacher_temperature=1000.0, teacher_temperature_start=1000.0)
    config = tiny_config(tmp_path / "run", write_dataset(tmp_path), epochs=2, method=method)
    (said,) = run_ranks(what_is_said, 1, config)
    assert said.count("warning: step 6: all targets are uniform") == said.count("warning") == 1
