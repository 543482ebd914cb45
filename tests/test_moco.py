"""MoCo v2 and v3: the papers' losses, exact gradients with the keys held constant, the queue, the groups of keys."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dist_contrastive.config import EncoderConfig, HeadConfig, MethodConfig, UserError
from dist_contrastive.methods.base import Method, MethodSettings
from dist_contrastive.methods.moco import MoCo, MoCoConfig
from dist_contrastive.methods.mocov3 import MoCoV3, MoCoV3Config
from dist_contrastive.models.encoders import build_encoder
from dist_contrastive.models.teacher import Teacher
from dist_contrastive.schedules import ema_momentum
from tests.harness import run_ranks
from tests.runs import tiny_config
from tests.steps import DONE, GLOBAL_BATCH, SIDE, build, clock_at, share_of_batch, student_of, teacher_of

GROUP = EncoderConfig(name="resnet10_w16", stem="small", norm="group", dropout=0.1)
BATCH = EncoderConfig(name="resnet10_w16", stem="small", norm="batch")
HEAD = HeadConfig(layers=2, hidden_size=32, output_size=16)


def small_moco(*, seed: int = 0, encoder: EncoderConfig = GROUP, norm_groups: int = 8) -> MoCo:
    torch.manual_seed(seed)
    config = MoCoConfig(projector=HEAD, queue=24, norm_groups=norm_groups)
    return MoCo(MethodSettings(config, build_encoder(encoder, SIDE), seed=0, global_batch=8))


def gradients(method: Method, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [p for p in method.parameters() if p.requires_grad]))


def move(teacher: Teacher) -> None:
    """At the start a teacher is a copy of the student: give it weights of its own, which tell the two apart."""
    generator = torch.Generator().manual_seed(3)
    for parameter in teacher.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def test_mocos_gradient_is_that_of_cross_entropy_with_constant_keys_and_queue() -> None:
    """He et al. 2020, equation 1 and algorithm 1."""
    method = small_moco()
    move(teacher_of(method))
    batch = share_of_batch(method)
    loss = method.loss(method.embed_all(batch), batch.samples)["loss"]
    query = F.normalize(method.project_views(batch.views[0][:1], batch.samples)[0], dim=1)
    with torch.no_grad():
        key = F.normalize(teacher_of(method)(batch.views[0][1]), dim=1)
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ method.queue.T], dim=1) / 0.2
    expected = F.cross_entropy(logits, torch.zeros(GLOBAL_BATCH, dtype=torch.int64))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradients(method, loss), gradients(method, expected), rtol=1e-4, atol=1e-6)


def test_mocov3s_gradient_is_that_of_cross_entropy_with_constant_keys() -> None:
    """Chen, Xie and He 2021, algorithm 1; both views' queries are trained."""
    method = build("mocov3", GROUP)
    assert isinstance(method, MoCoV3)
    move(teacher_of(method))
    batch = share_of_batch(method)
    loss = method.loss(method.embed_all(batch), batch.samples)["loss"]
    queries = F.normalize(method.predict(method.project(batch)), dim=2)
    with torch.no_grad():
        keys = [F.normalize(teacher_of(method)(view), dim=1) for view in batch.views[0]]
    own = torch.arange(GLOBAL_BATCH)
    expected = 2 * (F.cross_entropy(queries[0] @ keys[1].T, own) + F.cross_entropy(queries[1] @ keys[0].T, own))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradients(method, loss), gradients(method, expected), rtol=1e-4, atol=1e-6)


def test_mocov3s_loss_is_the_papers() -> None:
    """Chen, Xie and He 2021, algorithm 1: 2 τ CE(q k'/τ) for both directions, summed."""
    generator = torch.Generator().manual_seed(0)
    q, k = (F.normalize(torch.randn(2, 5, 4, generator=generator), dim=-1) for _ in range(2))
    method = build("mocov3", GROUP)
    assert isinstance(method, MoCoV3)
    temperature = method.config.temperature
    loss = method.loss({"z": q, "q": q, "k": k}, share_of_batch(method).samples)["loss"].item()
    total = 0.0
    for v, w in ((0, 1), (1, 0)):
        for i in range(5):
            scores = [np.exp(float(q[v, i] @ k[w, j]) / temperature) for j in range(5)]
            total -= 2 * temperature * np.log(scores[i] / sum(scores)) / 5
    assert loss == pytest.approx(total, rel=1e-5)


def test_the_queue_is_used_but_not_trained() -> None:
    method = small_moco()
    batch = share_of_batch(method)
    embeddings = method.embed_all(batch)
    before = method.loss(embeddings, batch.samples)["loss"].item()
    assert not method.queue.requires_grad
    method.queue.copy_(embeddings["q"][0].detach().repeat(3, 1))
    assert method.loss(embeddings, batch.samples)["loss"].item() > before + 0.1, (
        "negatives equal to the queries cost most"
    )


def test_the_queue_starts_as_unit_rows_that_torchs_seed_decides() -> None:
    one, same, other = small_moco(), small_moco(), small_moco(seed=1)
    assert one.queue.shape == (24, 16)
    torch.testing.assert_close(one.queue.norm(dim=1), torch.ones(24))
    assert one.queue_pointer.dtype == torch.int64
    assert one.queue_pointer == 0
    assert torch.equal(one.queue, same.queue)
    assert not torch.equal(one.queue, other.queue)


def queue_after(rank: int, num_steps: int) -> tuple[np.ndarray, int]:
    method = small_moco()
    batch = share_of_batch(method)
    for step in range(num_steps):
        shifted = replace(batch, views=(batch.views[0] + step,))
        method.after_step(clock_at(0.5), {name: x.detach() for name, x in method.embed_all(shifted).items()}, DONE)
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
    initial = small_moco().queue.numpy()
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


def test_queue_pointer_and_teacher_come_back_from_the_state() -> None:
    method, restored = small_moco(), small_moco(seed=1)
    batch = share_of_batch(method)
    for _ in range(2):
        method.after_step(clock_at(0.5), {name: x.detach() for name, x in method.embed_all(batch).items()}, DONE)
    restored.load_state_dict(method.state_dict())
    assert restored.queue_pointer == 2 * GLOBAL_BATCH
    losses = []
    for one in (method, restored):
        one.after_step(clock_at(0.5), {name: x.detach() for name, x in one.embed_all(batch).items()}, DONE)
        losses.append(one.loss(one.embed_all(batch), batch.samples)["loss"].item())
    assert losses[0] == losses[1]
    assert torch.equal(restored.queue, method.queue)
    assert restored.queue_pointer == 0


@pytest.mark.parametrize(("name", "momentum"), [("moco", 0.999), ("mocov3", ema_momentum(0.25, 0.99))])
def test_the_teacher_follows_with_its_papers_momentum(name: str, momentum: float) -> None:
    """Constant in MoCo (section 3.2), on a cosine to 1 in MoCo v3 (section 4.3)."""
    method = build(name, GROUP)
    teacher = teacher_of(method)
    assert isinstance(teacher, Teacher)
    embeddings = {key: x.detach() for key, x in method.embed_all(share_of_batch(method)).items()}
    before = [p.clone() for p in teacher.parameters()]
    with torch.no_grad():
        for p in student_of(method).parameters():
            p.add_(1.0)
    method.after_step(clock_at(0.25), embeddings, DONE)
    for mine, start, theirs in zip(teacher.parameters(), before, student_of(method).parameters(), strict=True):
        torch.testing.assert_close(mine, momentum * start + (1 - momentum) * theirs)


def groups_of_keys(method: MoCo, samples: slice, epoch: int) -> list[Tensor]:
    """What the teacher is given, call by call."""
    seen: list[Tensor] = []
    hook = teacher_of(method).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    batch = share_of_batch(method).part(samples)
    method.embed_all(replace(batch, samples=replace(batch.samples, epoch=epoch)))
    hook.remove()
    return seen


@pytest.mark.parametrize(("num_samples", "sizes"), [(2, [2]), (3, [3]), (5, [2, 3]), (7, [2, 2, 3]), (8, [2, 2, 2, 2])])
def test_a_group_has_at_least_two_samples(num_samples: int, sizes: list[int]) -> None:
    seen = groups_of_keys(small_moco(encoder=BATCH), slice(num_samples), 0)
    assert [len(group) for group in seen] == sizes


def test_queries_are_normalized_in_groups_too_in_their_own_order() -> None:
    method = small_moco(encoder=BATCH).train()
    batch = share_of_batch(method)
    seen: list[Tensor] = []
    hook = method.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    method.embed_all(batch)
    hook.remove()
    assert [len(group) for group in seen] == [2] * (GLOBAL_BATCH // 2)
    assert torch.equal(torch.cat(seen), batch.views[0][0])
    keys = torch.cat(groups_of_keys(method, slice(None), batch.samples.epoch))
    order = [next(i for i in range(GLOBAL_BATCH) if torch.equal(batch.views[0][1, i], image)) for image in keys]
    pairs = [set(order[start : start + 2]) for start in range(0, GLOBAL_BATCH, 2)]
    assert sum(pair == {2 * g, 2 * g + 1} for g, pair in enumerate(pairs)) < 4, "the keys' groups are other ones"


def test_keys_are_normalized_in_groups_of_shuffled_samples_and_come_back_in_order() -> None:
    method = small_moco(encoder=BATCH, norm_groups=2).train()
    batch = share_of_batch(method)
    seen: list[Tensor] = []
    teacher = teacher_of(method)
    hook = teacher.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    keys = method.embed_all(batch)["k"][0]
    hook.remove()
    assert [len(group) for group in seen] == [GLOBAL_BATCH // 2] * 2
    shuffled = torch.cat(seen)
    order = [next(i for i in range(GLOBAL_BATCH) if torch.equal(batch.views[0][1, i], image)) for image in shuffled]
    assert sorted(order) == list(range(GLOBAL_BATCH))
    assert order != sorted(order)
    by_hand = torch.cat([teacher(group) for group in seen])
    torch.testing.assert_close(keys[order], F.normalize(by_hand, dim=1))
    together = F.normalize(teacher(batch.views[0][1]), dim=1)
    assert (keys - together).abs().max() > 1e-3, "one BatchNorm over all keys would tell which batch they are from"


def test_without_batch_statistics_groups_change_nothing() -> None:
    method = small_moco()
    batch = share_of_batch(method)
    together = F.normalize(teacher_of(method)(batch.views[0][1]), dim=1)
    torch.testing.assert_close(method.embed_all(batch)["k"][0], together, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("queue", "batch", "hint"), [(8, 16, 16), (100, 16, 96), (17, 16, 16)])
def test_a_queue_that_is_no_multiple_of_the_global_batch_is_refused(
    queue: int, batch: int, hint: int, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path, tmp_path)
    assert config.batch.size == batch
    with pytest.raises(UserError, match=rf"^--method.queue {queue}: must be a multiple .* {batch}; give {hint}$"):
        replace(config, method=MoCoConfig(queue=queue))


def test_the_shuffle_replays_and_is_another_in_each_epoch() -> None:
    method = small_moco()
    first, again, next_epoch = (torch.cat(groups_of_keys(method, slice(None), epoch)) for epoch in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, next_epoch)


def test_mocos_report_compares_queries_with_their_keys() -> None:
    method = small_moco()
    batch = share_of_batch(method)
    embeddings = method.embed_all(batch)
    expected = F.cosine_similarity(embeddings["q"][0], embeddings["k"][0]).mean().item()
    report = method.report(embeddings, logged=True)
    assert report["positive_cosine"].item() == pytest.approx(expected, abs=1e-6)
    assert 1 <= report["effective_rank"] <= GLOBAL_BATCH


@pytest.mark.parametrize("field", ["momentum", "temperature"])
@pytest.mark.parametrize("config", [MoCoConfig, MoCoV3Config])
def test_a_wrong_number_is_refused_by_its_option(config: type[MethodConfig], field: str) -> None:
    wrong: dict[str, Any] = {field: -1.0}
    with pytest.raises(UserError, match=rf"^--method.{field} -1.0: give a "):
        config(**wrong)


@pytest.mark.parametrize("field", ["queue", "norm_groups"])
def test_a_queue_or_groups_of_nothing_are_refused(field: str) -> None:
    wrong: dict[str, Any] = {field: 0}
    with pytest.raises(UserError, match=rf"^--method.{field.replace('_', '-')} 0: give at least "):
        MoCoConfig(**wrong)
