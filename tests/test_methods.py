"""What every method promises: where gradient flows and where it stops, teachers, queues, parity and resume of whole runs.

Tests over METHODS find a new method by themselves; STOPPED says where its paper stops the gradient.
"""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dist_contrastive.checkpoint import load_module
from dist_contrastive.config import EncoderConfig, HeadConfig, TrainConfig, UserError
from dist_contrastive.methods import METHODS
from dist_contrastive.methods.base import Embeddings, Method
from dist_contrastive.methods.cpc import CPC, CPCConfig
from dist_contrastive.methods.moco import MoCo, MoCoConfig
from dist_contrastive.methods.simclr import SimCLRConfig
from dist_contrastive.models.teacher import Teacher
from dist_contrastive.schedules import ema_momentum
from dist_contrastive.trainer import build_method
from tests.betons import picture, write_beton
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
from tests.steps import GLOBAL_BATCH, build, gradient_of, large_batch, share_of_batch

GROUP = EncoderConfig(name="resnet10_w16", stem="small", norm="group", dropout=0.1)
BATCH = EncoderConfig(name="resnet10_w16", stem="small", norm="batch")

STOPPED: dict[str, set[str]] = {
    "moco": {"z", "k"}, "mocov3": {"z", "k"}, "byol": {"z", "k"}, "simsiam": {"z"},
}  # fmt: skip
"""Embeddings that no gradient leaves. `z` of methods with a predictor or keys is for the report (in SimSiam also the target);
the papers: MoCo section 3.2, MoCo v3 algorithm 1, BYOL equation 3, SimSiam algorithm 1."""
TEACHERS = sorted(name for name in METHODS if hasattr(build(name, GROUP), "teacher"))

each_method = pytest.mark.parametrize("name", sorted(METHODS))


def teacher_of(method: Method) -> Teacher:
    teacher = method.teacher
    assert isinstance(teacher, Teacher)
    return teacher


def directional_derivative(method: Method, direction: list[Tensor], fixed: Embeddings) -> float:
    """How the loss changes along `direction` in the trained parameters while the embeddings `fixed` stay as they are."""
    batch = share_of_batch(method)
    trained = [p for p in method.parameters() if p.requires_grad]

    def loss_at(step: float) -> float:
        with torch.no_grad():
            for p, d in zip(trained, direction, strict=True):
                p.add_(d, alpha=step)
            loss = method.loss({**method.embed(batch), **fixed}, batch)["loss"].item()
            for p, d in zip(trained, direction, strict=True):
                p.sub_(d, alpha=step)
        return loss

    step = 2e-3
    return (loss_at(step) - loss_at(-step)) / (2 * step)


@each_method
def test_the_gradient_is_that_of_the_loss_with_the_papers_branches_standing_still(name: str) -> None:
    method = build(name, GROUP)
    batch = share_of_batch(method)
    embeddings = method.embed(batch)
    stopped = {key for key, value in embeddings.items() if not value.requires_grad}
    assert stopped == STOPPED.get(name, set())
    method.loss(embeddings, batch)["loss"].backward()
    trained = [p for p in method.parameters() if p.requires_grad]
    # Along the gradient itself, where the change is largest and rounding smallest.
    gradient = [p.grad.clone() for p in trained if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradient)
    direction = [g / norm for g in gradient]
    fixed = {key: embeddings[key].detach() for key in stopped}
    assert directional_derivative(method, direction, fixed) == pytest.approx(float(norm), rel=2e-2)
    if name == "simsiam":  # the target has the student's weights: if it moved, too, it would be another gradient
        moving = directional_derivative(method, direction, {})
        assert abs(moving - float(norm)) > 0.04 * float(norm)


@pytest.mark.parametrize("name", sorted(STOPPED))
def test_the_stopped_branch_matters_to_the_loss_and_gets_no_gradient(name: str) -> None:
    method = build(name, GROUP)
    batch = share_of_batch(method)
    target = "z" if name == "simsiam" else "k"
    leaves = {key: value.detach().requires_grad_() for key, value in method.embed(batch).items()}
    loss = method.loss(leaves, batch)["loss"]
    loss.backward()
    assert leaves["q"].grad is not None
    assert leaves["q"].grad.any()
    assert leaves[target].grad is None
    generator = torch.Generator().manual_seed(2)
    noise = 0.1 * torch.randn(leaves[target].shape, generator=generator)
    perturbed = {**leaves, target: F.normalize(leaves[target].detach() + noise, dim=-1)}
    assert abs(method.loss(perturbed, batch)["loss"].item() - loss.item()) > 1e-4


@pytest.mark.parametrize("name", TEACHERS)
def test_a_teacher_gets_no_gradient_and_moves_only_after_a_step(name: str) -> None:
    method = build(name, GROUP)
    teacher = teacher_of(method)
    before = copy.deepcopy(teacher.state_dict())
    outcome = large_batch(method, 3).step(share_of_batch(method), 0)
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert not any(n.startswith("teacher.") for n in gradient_of(method))
    assert all(torch.equal(value, before[n]) for n, value in teacher.state_dict().items())
    with torch.no_grad():
        for p in method.encoder.parameters():
            p.add_(1.0)
    method.after_step(0.25, outcome.embeddings)
    base: float = METHODS[name].Config().momentum  # type: ignore[attr-defined]
    momentum = base if name == "moco" else ema_momentum(0.25, base)
    for n, p in method.encoder.named_parameters():
        expected = momentum * before[f"module.0.{n}"] + (1 - momentum) * p
        torch.testing.assert_close(teacher.module.get_submodule("0").get_parameter(n), expected)
    assert {f"teacher.{n}" for n in teacher.state_dict()} <= set(method.state_dict())


def test_a_teachers_momentum_rises_to_one_on_a_cosine() -> None:
    """BYOL, section 3.2: τ = 1 - (1 - τ_base)·(cos(πk/K) + 1)/2."""
    found = [ema_momentum(progress, 0.9) for progress in (0.0, 0.25, 0.5, 1.0)]
    assert found == pytest.approx([0.9, 1 - 0.1 * (np.cos(np.pi / 4) + 1) / 2, 0.95, 1.0])


def test_byols_loss_is_the_papers() -> None:
    """Grill et al. 2020, equation 2: |q/|q| - k/|k||², summed over both directions, the mean over samples."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 5, 4, generator=generator), torch.randn(2, 5, 4, generator=generator)
    method = build("byol", GROUP)
    loss = method.loss({"z": q, "q": q, "k": k}, share_of_batch(method))["loss"].item()
    total = 0.0
    for i in range(5):
        for v, w in ((0, 1), (1, 0)):
            one, other = q[v, i].double().numpy(), k[w, i].double().numpy()
            total += np.sum((one / np.linalg.norm(one) - other / np.linalg.norm(other)) ** 2)
    assert loss == pytest.approx(total / 5, rel=1e-5)


def test_simsiams_loss_is_the_papers() -> None:
    """Chen and He 2021, equations 1 and 2: half of D(p1, z2) + D(p2, z1), D the negative cosine."""
    generator = torch.Generator().manual_seed(0)
    q, z = torch.randn(2, 5, 4, generator=generator), torch.randn(2, 5, 4, generator=generator)
    method = build("simsiam", GROUP)
    loss = method.loss({"z": z, "q": q}, share_of_batch(method))["loss"].item()
    total = 0.0
    for i in range(5):
        for v, w in ((0, 1), (1, 0)):
            p, target = q[v, i].double().numpy(), z[w, i].double().numpy()
            total -= 0.5 * p @ target / (np.linalg.norm(p) * np.linalg.norm(target))
    assert loss == pytest.approx(total / 5, rel=1e-5)


def test_mocov3s_loss_is_the_papers() -> None:
    """Chen, Xie and He 2021, algorithm 1: 2 τ CE(q k'/τ) for both directions, summed."""
    generator = torch.Generator().manual_seed(0)
    q, k = (F.normalize(torch.randn(2, 5, 4, generator=generator), dim=-1) for _ in range(2))
    method = build("mocov3", GROUP)
    temperature = method.config.temperature  # type: ignore[union-attr]
    assert isinstance(temperature, float)
    loss = method.loss({"z": q, "q": q, "k": k}, share_of_batch(method))["loss"].item()
    total = 0.0
    for v, w in ((0, 1), (1, 0)):
        for i in range(5):
            scores = [np.exp(float(q[v, i] @ k[w, j]) / temperature) for j in range(5)]
            total -= 2 * temperature * np.log(scores[i] / sum(scores)) / 5
    assert loss == pytest.approx(total, rel=1e-5)


# MoCo's queue and keys.


def small_moco(encoder: EncoderConfig, queue: int = 24) -> MoCo:
    torch.manual_seed(0)
    config = MoCoConfig(projector=HeadConfig(layers=2, hidden_size=32, output_size=16), queue=queue, norm_groups=2)
    return MoCo(config, encoder, image_size=16, seed=0)


def queue_after(rank: int, num_steps: int) -> tuple[np.ndarray, int]:
    method = small_moco(GROUP)
    batch = share_of_batch(method)
    for step in range(num_steps):
        shifted = replace(batch, views=batch.views + step)
        method.after_step(0.5, {name: x.detach() for name, x in method.embed(shifted).items()})
    return method.queue.numpy().copy(), int(method.queue_pointer)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_the_queue_is_the_same_on_all_ranks_and_as_at_one(num_ranks: int) -> None:
    expected, pointer = run_ranks(queue_after, 1, 4)[0]
    for queue, its_pointer in run_ranks(queue_after, num_ranks, 4):
        np.testing.assert_allclose(queue, expected, atol=1e-6)
        assert its_pointer == pointer
    queues = [queue for queue, _ in run_ranks(queue_after, num_ranks, 4)]
    assert all(np.array_equal(queue, queues[0]) for queue in queues), "bit for bit: it is never broadcast"


def test_the_queue_is_a_ring() -> None:
    initial = small_moco(GROUP).queue.numpy()
    two, pointer = queue_after(0, 2)
    assert pointer == 2 * GLOBAL_BATCH
    assert np.array_equal(two[2 * GLOBAL_BATCH :], initial[2 * GLOBAL_BATCH :])
    assert not np.array_equal(two[: 2 * GLOBAL_BATCH], initial[: 2 * GLOBAL_BATCH])
    three, pointer = queue_after(0, 3)
    assert pointer == 0
    four, pointer = queue_after(0, 4)
    assert pointer == GLOBAL_BATCH
    assert np.array_equal(four[GLOBAL_BATCH:], three[GLOBAL_BATCH:])
    np.testing.assert_allclose(np.linalg.norm(four, axis=1), 1, atol=1e-5)


def test_keys_are_normalized_in_groups_of_shuffled_samples_and_come_back_in_order() -> None:
    method = small_moco(BATCH).train()
    batch = share_of_batch(method)
    seen: list[Tensor] = []
    teacher = method.teacher
    hook = teacher.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    keys = method.embed(batch)["k"][0]
    hook.remove()
    assert [len(group) for group in seen] == [GLOBAL_BATCH // 2] * 2
    shuffled = torch.cat(seen)
    order = [next(i for i in range(GLOBAL_BATCH) if torch.equal(batch.views[1, i], image)) for image in shuffled]
    assert sorted(order) == list(range(GLOBAL_BATCH))
    assert order != sorted(order)
    by_hand = torch.cat([teacher(group) for group in seen])
    torch.testing.assert_close(keys[order], F.normalize(by_hand, dim=1))
    together = F.normalize(teacher(batch.views[1]), dim=1)
    assert (keys - together).abs().max() > 1e-3, "one BatchNorm over all keys would tell which batch they are from"


def test_without_batch_statistics_groups_change_nothing() -> None:
    method = small_moco(GROUP)
    batch = share_of_batch(method)
    together = F.normalize(method.teacher(batch.views[1]), dim=1)
    torch.testing.assert_close(method.embed(batch)["k"][0], together, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("queue", "batch", "hint"), [(8, 16, 16), (100, 16, 96), (17, 16, 16)])
def test_a_queue_that_is_no_multiple_of_the_global_batch_is_refused(
    queue: int, batch: int, hint: int, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path, tmp_path)
    assert config.batch.size == batch
    with pytest.raises(UserError, match=rf"^--method.queue {queue}: must be a multiple .* {batch}; give {hint}$"):
        replace(config, method=MoCoConfig(queue=queue))


# CPC's grid.


def small_cpc(**options: Any) -> CPC:
    torch.manual_seed(0)
    projector = HeadConfig(layers=1, output_size=16)
    return CPC(CPCConfig(projector=projector, context_size=16, **options), GROUP, image_size=16, seed=0)


def test_patches_are_the_papers_grid() -> None:
    method = small_cpc()
    assert (method.patch_size, method.patch_stride, method.side) == (4, 2, 7)
    batch = share_of_batch(method)
    embeddings = method.embed(batch)
    assert embeddings["z"].shape == (1, GLOBAL_BATCH, 7, 7, 16)
    assert embeddings["prediction_3"].shape == (1, GLOBAL_BATCH, 4, 7, 16)
    row, column, sample = 4, 1, 2
    patch = batch.views[0, sample : sample + 1, :, 2 * row : 2 * row + 4, 2 * column : 2 * column + 4]
    method.dropout.probability = 0.0
    by_hand = F.normalize(method.projector(method.encoder(patch)), dim=1)[0]
    torch.testing.assert_close(method.embed(batch)["z"][0, sample, row, column], by_hand, rtol=1e-4, atol=1e-5)


def test_a_prediction_sees_the_rows_above_alone() -> None:
    method = small_cpc()
    z = torch.randn(1, 7, 7, 16, requires_grad=True)
    for k, prediction in enumerate(method.predictions(method.context(z)), start=1):
        assert prediction.shape[1] == 7 - k
        made_at = 3  # row of the context; the prediction is about row made_at + k
        (gradient,) = torch.autograd.grad(prediction[0, made_at, 3].sum(), z, retain_graph=True)
        rows = gradient[0].abs().sum((1, 2))
        assert rows[made_at + 1 :].eq(0).all()
        assert rows[: made_at + 1].gt(0).all()
        assert gradient[0].abs().sum((0, 2)).gt(0).all(), "all columns"


def test_a_grid_without_rows_to_predict_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"^--method.steps 3: patches of 16 pixels, 8 apart, make 1 rows of an image of 16"
    ):
        small_cpc(patch_size=16)


def test_cpc_takes_one_view_and_several() -> None:
    method = small_cpc()
    batch = share_of_batch(method)
    two = replace(batch, views=torch.cat([batch.views, batch.views + 1]))
    one_loss, two_loss = (method.loss(method.embed(b), b)["loss"] for b in (batch, two))
    assert method.embed(two)["z"].shape[0] == 2
    assert two_loss > one_loss, "twice as many negatives"


# Whole runs.


def config_of(name: str, run_dir: Path, dataset: Path, **changes: object) -> TrainConfig:
    config = tiny_config(run_dir, dataset, **changes)  # type: ignore[arg-type]
    projector = HeadConfig(layers=2, hidden_size=32, output_size=16)
    return replace(config, method=METHODS[name].Config(projector=projector))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


@each_method
def test_two_ranks_follow_one(name: str, dataset: Path, tmp_path: Path) -> None:
    one = config_of(name, tmp_path / "one", dataset, norm="group", stop_after_steps=20)
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
    config = config_of("byol", tmp_path / "run", dataset, stop_after_steps=2)
    run_ranks(train_on_rank, 1, config)
    wider = replace(config, encoder=replace(config.encoder, name="resnet10_w32"))
    with pytest.raises(RankError, match=r"UserError.*encoder\.name: resnet10_w16 -> resnet10_w32"):
        run_ranks(train_on_rank, 1, wider)
    # A checkpoint whose teacher alone is of another architecture, as an edited or a mixed one would be.
    own = build_method(config)
    foreign = {n: t for n, t in build_method(wider).state_dict().items() if n.startswith("teacher.")}
    tensors = {**newest_checkpoint(config.run_dir).tensors["model"], **foreign}
    with pytest.raises(
        UserError, match=r"the checkpoint is of another model: .*size mismatch for teacher\.module\.0\.body"
    ):
        load_module(own, tensors)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_too_few_or_too_many_views_are_refused(name: str, dataset: Path, tmp_path: Path) -> None:
    config = config_of(name, tmp_path / "run", dataset)
    cls = METHODS[name]
    wrong = [cls.min_views - 1] if cls.min_views > 1 else []
    wrong += [cls.max_views + 1] if cls.max_views else []
    for views in wrong:
        augment = replace(config.augment, num_views=views, blur=(0.5,), solarize=(0.0,))
        with pytest.raises(
            UserError, match=rf"^--augment.num-views {views}: {name} needs (exactly|at least) {cls.min_views}"
        ):
            build_method(replace(config, augment=augment))


def test_labels_are_asked_of_data_that_has_none(tmp_path: Path) -> None:
    images = [picture(20, 20, seed) for seed in range(40)]
    path = write_beton(tmp_path / "one_class.beton", images, num_test=4, num_classes=1)
    config = replace(tiny_config(tmp_path / "run", path), method=SimCLRConfig(positives="labels"))
    with pytest.raises(RankError, match=r"UserError: simclr is to learn from labels, and .*one_class.beton has none"):
        run_ranks(train_on_rank, 1, config)


def test_supcon_learns_from_labels_over_all_ranks(dataset: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "one", dataset, norm="group", stop_after_steps=8)
    config = replace(config, method=SimCLRConfig(projector=config.method.projector, positives="labels"))
    run_ranks(train_on_rank, 1, config)
    run_ranks(train_on_rank, 2, replace(config, run_dir=tmp_path / "two"))
    np.testing.assert_allclose(losses_of(tmp_path / "two"), losses_of(config.run_dir), rtol=0, atol=1e-4)
