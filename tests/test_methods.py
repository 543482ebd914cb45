"""What every method promises: where gradient flows and where it stops, teachers, parity and resume of whole runs.

Tests over METHODS find a new method by themselves, and none is named here.
"""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dist_contrastive.checkpoint import load_module
from dist_contrastive.config import (
    AugmentConfig,
    EncoderConfig,
    TeacherConfig,
    TrainConfig,
    UserError,
    ViewConfig,
)
from dist_contrastive.methods import METHODS
from dist_contrastive.methods.base import Embeddings, Method
from dist_contrastive.schedules import ema_momentum
from dist_contrastive.trainer import build_method
from tests.harness import RankError, run_ranks
from tests.runs import (
    STEPS_PER_EPOCH,
    assert_same_state,
    losses_of,
    metrics_of,
    newest_checkpoint,
    tiny_config,
    train_on_rank,
    write_dataset,
)  # fmt: skip
from tests.steps import (
    DONE,
    build,
    clock_at,
    gradient_of,
    share_of_batch,
    step_gradient,
    student_of,
    teacher_of,
    with_small,
)

GROUP = EncoderConfig(name="resnet10_w16", stem="small", norm="group", dropout=0.1)

TARGETS = sorted(name for name in METHODS if METHODS[name].target)
TEACHERS = sorted(name for name in METHODS if issubclass(METHODS[name].Config, TeacherConfig))
TEACHER_ON_RESNETS = next(name for name in TEACHERS if not METHODS[name].needs_patches)

each_method = pytest.mark.parametrize("name", sorted(METHODS))


def directional_derivative(method: Method, direction: list[Tensor], fixed: Embeddings) -> float:
    """How the loss changes along `direction` in the trained parameters while the embeddings `fixed` stay as they are."""
    batch = share_of_batch(method)
    trained = [p for p in method.parameters() if p.requires_grad]

    def loss_at(step: float) -> float:
        with torch.no_grad():
            for p, d in zip(trained, direction, strict=True):
                p.add_(d, alpha=step)
            loss = method.loss({**method.embed_all(batch), **fixed}, batch.samples)["loss"].item()
            for p, d in zip(trained, direction, strict=True):
                p.sub_(d, alpha=step)
        return loss

    step = 2e-3
    return (loss_at(step) - loss_at(-step)) / (2 * step)


@each_method
def test_the_gradient_is_that_of_the_loss_with_the_papers_branches_standing_still(name: str) -> None:
    method = build(name, GROUP)
    batch = share_of_batch(method)
    embeddings = method.embed_all(batch)
    with torch.no_grad():
        method.settle(embeddings, clock_at())
    for key, value in embeddings.items():
        assert value.shape[1] == len(batch), (
            f"{key} is [V, B, ...]: micro-batches are put together along the second axis"
        )
    stopped = {key for key, value in embeddings.items() if not value.requires_grad}
    expected = ({"z", method.target} if method.target else set()) | method.targets(batch).keys()
    assert stopped == expected, "without gradient are the targets and, where `target` names one, `z`; nothing else"
    method.loss(embeddings, batch.samples)["loss"].backward()
    trained = [p for p in method.parameters() if p.requires_grad]
    # Along the gradient itself, where the change is largest and rounding smallest.
    gradient = [p.grad.clone() for p in trained if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradient)
    direction = [g / norm for g in gradient]
    fixed = {key: embeddings[key].detach() for key in stopped}
    assert directional_derivative(method, direction, fixed) == pytest.approx(float(norm), rel=2e-2)
    if method.target and name not in TEACHERS:  # made by the student: if it moved, too, it would be another gradient
        moving = directional_derivative(method, direction, {})
        assert abs(moving - float(norm)) > 0.04 * float(norm)


@pytest.mark.parametrize("name", TARGETS)
def test_the_stopped_branch_matters_to_the_loss_and_gets_no_gradient(name: str) -> None:
    method = build(name, GROUP)
    batch = share_of_batch(method)
    target = method.target
    assert target
    leaves = {key: value.detach().requires_grad_() for key, value in method.embed_all(batch).items()}
    loss = method.loss(leaves, batch.samples)["loss"]
    loss.backward()
    assert "q" in leaves, "the embedding that looks for the target is named q"
    assert leaves["q"].grad is not None
    assert leaves["q"].grad.any()
    assert leaves[target].grad is None, "the loss itself detaches its target"
    generator = torch.Generator().manual_seed(2)
    noise = 0.1 * torch.randn(leaves[target].shape, generator=generator)
    perturbed = {**leaves, target: F.normalize(leaves[target].detach() + noise, dim=-1)}
    assert abs(method.loss(perturbed, batch.samples)["loss"].item() - loss.item()) > 1e-4


@pytest.mark.parametrize("name", TEACHERS)
def test_a_teacher_gets_no_gradient_and_moves_only_after_a_step(name: str) -> None:
    method = build(name, GROUP)
    teacher = teacher_of(method)
    before = copy.deepcopy(teacher.state_dict())
    outcome = step_gradient(method, 3).compute(share_of_batch(method), clock_at())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert not any(n.startswith("teacher.") for n in gradient_of(method))
    assert all(torch.equal(value, before[n]) for n, value in teacher.state_dict().items())
    with torch.no_grad():
        for p in method.encoder.parameters():
            p.add_(1.0)
    method.after_step(clock_at(0.25), outcome.embeddings, DONE)
    # A share of the way to the student, the same for all parameters; which one is each method's own, and tested there.
    shares = []
    for n, p in method.encoder.named_parameters():
        start, found = before[f"encoder.{n}"], teacher.encoder.get_parameter(n)
        shares.append(((found - start) / (p - start)).flatten())
    share = torch.cat(shares)
    assert 0 < share.median() < 0.5
    torch.testing.assert_close(share, share.median().expand_as(share), rtol=1e-2, atol=1e-5)
    assert {f"teacher.{n}" for n in teacher.state_dict()} <= set(method.state_dict())


@each_method
def test_nothing_moves_after_an_update_that_was_left_out(name: str) -> None:
    method = build(name, GROUP)
    batch = share_of_batch(method)
    embeddings = {key: value.detach() for key, value in method.embed_all(batch).items()}
    method.settle(embeddings, clock_at(0.25))
    method.after_step(clock_at(0.25), embeddings, DONE)
    # A student that has moved on, and embeddings that are no numbers: what a step may leave whose update was left out.
    with torch.no_grad():
        for parameter in student_of(method).parameters():
            parameter.add_(1.0)
    before = copy.deepcopy(dict(method.named_buffers()) | dict(method.named_parameters()))
    broken = {key: value * torch.nan if value.is_floating_point() else value for key, value in embeddings.items()}
    method.after_step(clock_at(0.5), broken, ~DONE)
    for key, value in [*method.named_buffers(), *method.named_parameters()]:
        torch.testing.assert_close(value, before[key], rtol=0, atol=0, msg=key)


def test_a_teachers_momentum_rises_to_one_on_a_cosine() -> None:
    """BYOL, section 3.2: τ = 1 - (1 - τ_base)·(cos(πk/K) + 1)/2."""
    found = [ema_momentum(progress, 0.9) for progress in (0.0, 0.25, 0.5, 1.0)]
    assert found == pytest.approx([0.9, 1 - 0.1 * (np.cos(np.pi / 4) + 1) / 2, 0.95, 1.0])


# Whole runs.


def config_of(name: str, run_dir: Path, dataset: Path, **changes: object) -> TrainConfig:
    return with_small(tiny_config(run_dir, dataset, **changes), name)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), captions=True)


@each_method
def test_two_ranks_follow_one(name: str, dataset: Path, tmp_path: Path) -> None:
    one = config_of(name, tmp_path / "one", dataset, norm="group", stop_after_steps=20)
    # AdamW divides a gradient by its own size: where it is nothing but rounding, a weight moves a full step all the same.
    one = replace(one, optim=replace(one.optim, name="sgd", learning_rate=0.2))
    run_ranks(train_on_rank, 1, one)
    run_ranks(train_on_rank, 2, replace(one, run_dir=tmp_path / "two"))
    assert len(losses_of(one.run_dir)) == 20
    assert np.ptp(losses_of(one.run_dir)) > 1e-3
    np.testing.assert_allclose(losses_of(tmp_path / "two"), losses_of(one.run_dir), rtol=1e-4, atol=1e-4)


@each_method
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(name: str, dataset: Path, tmp_path: Path) -> None:
    last = STEPS_PER_EPOCH + 2
    whole = config_of(name, tmp_path / "whole", dataset, stop_after_steps=last)
    run_ranks(train_on_rank, 1, whole)
    parts = replace(whole, run_dir=tmp_path / "parts", stop_after_steps=3)
    run_ranks(train_on_rank, 1, parts)
    run_ranks(train_on_rank, 1, replace(parts, stop_after_steps=last))
    assert_same_state(newest_checkpoint(parts.run_dir), newest_checkpoint(whole.run_dir))
    assert metrics_of(parts.run_dir) == metrics_of(whole.run_dir)


def test_a_teacher_of_another_architecture_is_refused(dataset: Path, tmp_path: Path) -> None:
    config = config_of(TEACHER_ON_RESNETS, tmp_path / "run", dataset, stop_after_steps=2)
    run_ranks(train_on_rank, 1, config)
    wider = replace(config, encoder=replace(config.encoder, name="resnet10_w32"))
    with pytest.raises(RankError, match=r"UserError.*encoder\.name: resnet10_w16 -> resnet10_w32"):
        run_ranks(train_on_rank, 1, wider)
    # A checkpoint whose teacher alone is of another architecture, as an edited or a mixed one would be.
    own = build_method(config)
    foreign = {n: t for n, t in build_method(wider).state_dict().items() if n.startswith("teacher.")}
    tensors = {**newest_checkpoint(config.run_dir).tensors["model"], **foreign}
    with pytest.raises(
        UserError, match=r"the checkpoint is of another model: .*size mismatch for teacher\.encoder\.body"
    ):
        load_module(own, tensors)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_too_few_or_too_many_views_are_refused(name: str, dataset: Path, tmp_path: Path) -> None:
    config = config_of(name, tmp_path / "run", dataset)
    cls = METHODS[name]
    wrong = [cls.min_views - 1] if cls.min_views > 1 else []
    wrong += [cls.max_views + 1] if cls.max_views else []
    for views in wrong:
        augment = AugmentConfig((ViewConfig(count=views),))
        with pytest.raises(
            UserError, match=rf"^--augment.count {views}: {name} needs (exactly|at least) {cls.min_views}"
        ):
            build_method(replace(config, augment=augment))
