"""Losses without negatives and the two methods on them, BYOL and SimSiam: the papers' loops, ranks, stopped branches, teacher."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_contrastive import distributed
from dist_contrastive.config import EncoderConfig, HeadConfig, UserError
from dist_contrastive.losses.regression import cross_view_cosine
from dist_contrastive.methods.base import Method, MethodSettings
from dist_contrastive.methods.byol import BYOL, BYOLConfig
from dist_contrastive.methods.simsiam import SimSiam, SimSiamConfig
from dist_contrastive.models.encoders import build_encoder
from dist_contrastive.schedules import ema_momentum
from tests.harness import run_ranks
from tests.steps import DONE, build, clock_at, losses_of, share_of_batch, teacher_of

GROUP = EncoderConfig(name="resnet10_w16", stem="small", norm="group", dropout=0.1)
BATCH = EncoderConfig(name="resnet10_w16", stem="small", norm="batch")

TARGETS = {"byol": "k", "simsiam": "z"}
"""The embeddings that predictions are compared with and no gradient reaches."""

each_method = pytest.mark.parametrize("name", TARGETS)


def cosine_reference(q: np.ndarray, k: np.ndarray) -> float:
    """The mean of SimSiam's -D (Chen and He 2021, equation 1) over samples and ordered pairs of views, as loops; [V, N, E]."""
    num_views, num_samples, _ = q.shape
    cosines = [
        float(q[v, i] @ k[w, i]) / (np.linalg.norm(q[v, i]) * np.linalg.norm(k[w, i]))
        for i in range(num_samples)
        for v in range(num_views)
        for w in range(num_views)
        if v != w
    ]
    return float(np.mean(cosines))


def pair(num_views: int, num_samples: int) -> tuple[Tensor, Tensor]:
    """Predictions and targets [V, N, E] of any length."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(num_views, num_samples, 6, generator=generator) for _ in range(2))
    return q, 3 * k


# The loss.


@pytest.mark.parametrize("num_views", [2, 3])
def test_equals_the_papers_loops(num_views: int) -> None:
    q, k = pair(num_views, 5)
    expected = cosine_reference(q.double().numpy(), k.double().numpy())
    assert cross_view_cosine(q, k).item() == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_targets_count_and_get_no_gradient() -> None:
    q, k = (x.requires_grad_() for x in pair(2, 5))
    value = cross_view_cosine(q, k)
    value.backward()
    assert k.grad is None
    constants = q.detach().clone().requires_grad_()
    cross_view_cosine(constants, k.detach()).backward()
    assert q.grad is not None
    assert constants.grad is not None
    assert torch.equal(q.grad, constants.grad)
    assert q.grad.any()
    assert abs(cross_view_cosine(q, k + 0.5).item() - value.item()) > 1e-3


def test_embeddings_of_length_zero_stay_finite() -> None:
    q = torch.zeros(2, 3, 4, requires_grad=True)
    value = cross_view_cosine(q, torch.zeros(2, 3, 4))
    value.backward()
    assert value.item() == 0
    assert q.grad is not None
    assert torch.isfinite(q.grad).all()


def test_float32_inside_autocast() -> None:
    q, k = (x.bfloat16() for x in pair(2, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = cross_view_cosine(q, k)
    assert value.dtype == torch.float32
    assert value.item() == cross_view_cosine(q.float(), k.float()).item()


def value_of_share(rank: int, q: np.ndarray, k: np.ndarray) -> tuple[float, np.ndarray]:
    """This rank's value over its share of q and k [V, N, E], and the gradient at its share of q averaged as DDP does."""
    share = q.shape[1] // distributed.world_size()
    mine, targets = (torch.from_numpy(x[:, rank * share : (rank + 1) * share].copy()) for x in (q, k))
    value = cross_view_cosine(mine.requires_grad_(), targets)
    value.backward()
    assert mine.grad is not None
    return value.item(), (mine.grad / distributed.world_size()).numpy()


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_give_the_value_and_gradient_of_the_whole_batch(num_ranks: int) -> None:
    q, k = (x.numpy() for x in pair(2, 8))
    value, gradient = value_of_share(0, q, k)
    shares = run_ranks(value_of_share, num_ranks, q, k)
    assert np.mean([share_value for share_value, _ in shares]) == pytest.approx(value, rel=1e-5, abs=1e-7)
    np.testing.assert_allclose(np.concatenate([g for _, g in shares], axis=1), gradient, rtol=1e-5, atol=1e-7)


# Both methods.


def trained_gradient(method: Method) -> dict[str, Tensor]:
    """The gradient of every parameter that has one."""
    losses_of(method, share_of_batch(method))["loss"].backward()
    return {name: p.grad for name, p in method.named_parameters() if p.grad is not None}


@each_method
@pytest.mark.parametrize("num_views", [2, 3])
def test_a_methods_loss_equals_the_papers_loops(name: str, num_views: int) -> None:
    """BYOL's equation 2 summed over both directions (with more views: twice the mean over pairs); SimSiam's equation 2."""
    q, k = pair(num_views, 5)
    method = build(name, GROUP)
    loss = method.loss({"z": k, "q": q, "k": k}, share_of_batch(method).samples)["loss"].item()
    cosine = cosine_reference(q.double().numpy(), k.double().numpy())
    assert loss == pytest.approx(2 * (2 - 2 * cosine) if name == "byol" else -cosine, rel=1e-5, abs=1e-7)


@each_method
def test_the_loss_is_a_mean_over_samples(name: str) -> None:
    method = build(name, GROUP)
    assert not method.couples_samples
    samples = share_of_batch(method).samples
    q, k = pair(2, 8)
    parts = [slice(i, i + 1) for i in range(8)]
    alone = [method.loss({"z": k[:, p], "q": q[:, p], "k": k[:, p]}, samples.part(p))["loss"].item() for p in parts]
    assert method.loss({"z": k, "q": q, "k": k}, samples)["loss"].item() == pytest.approx(np.mean(alone), rel=1e-5)


@each_method
@pytest.mark.parametrize("encoder", [GROUP, BATCH], ids=["group", "batch"])
def test_every_trained_parameter_gets_a_gradient_with_either_norm(name: str, encoder: EncoderConfig) -> None:
    method = build(name, encoder).train()
    gradient = trained_gradient(method)
    assert gradient.keys() == {n for n, p in method.named_parameters() if p.requires_grad}
    assert all(g.any() and torch.isfinite(g).all() for g in gradient.values())


@each_method
def test_all_views_share_one_forward_pass(name: str) -> None:
    method = build(name, GROUP)
    passes = {part: 0 for part, _ in method.named_children()}

    def count(part: str) -> Any:
        def hook(*_: Any) -> None:
            passes[part] += 1

        return hook

    for part, module in method.named_children():
        module.register_forward_hook(count(part))
    method.embed_all(share_of_batch(method))
    assert set(passes.values()) == {1}


@each_method
def test_the_prediction_has_the_size_of_the_embedding(name: str) -> None:
    batch = share_of_batch(build(name, GROUP))
    embeddings = build(name, GROUP).embed_all(batch)
    assert all(x.shape == (2, 8, 16) and x.dtype == torch.float32 for x in embeddings.values())
    assert set(embeddings) == {"z", "q", TARGETS[name]}


def test_default_heads_are_the_papers() -> None:
    """BYOL, section 3.2; SimSiam, section 3, baseline settings."""
    assert BYOLConfig().projector == HeadConfig(layers=2, hidden_size=4096, output_size=256)
    assert (BYOLConfig().predictor.layers, BYOLConfig().predictor.hidden_size) == (2, 4096)
    assert SimSiamConfig().projector == HeadConfig(layers=3, hidden_size=2048, output_size=2048, output_norm=True)
    assert (SimSiamConfig().predictor.layers, SimSiamConfig().predictor.hidden_size) == (2, 512)
    assert BYOLConfig().momentum == 0.996


@pytest.mark.parametrize(("method", "config"), [(BYOL, BYOLConfig), (SimSiam, SimSiamConfig)])
def test_initial_weights_depend_on_torchs_seed_alone(method: Any, config: Any) -> None:
    states = []
    for seed in (0, 1):
        torch.manual_seed(7)
        head = HeadConfig(hidden_size=32, output_size=16)
        built = method(MethodSettings(config(projector=head), build_encoder(GROUP, 16), seed, global_batch=8))
        states.append(built.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


# BYOL's teacher.


def build_byol() -> BYOL:
    method = build("byol", GROUP)
    assert isinstance(method, BYOL)
    return method


def student_of(method: BYOL) -> list[Tensor]:
    """What the teacher follows, in its own order: encoder, then projector."""
    return [*method.encoder.parameters(), *method.projector.parameters()]


def test_the_teacher_counts() -> None:
    method = build_byol()
    batch = share_of_batch(method)
    loss = losses_of(method, batch)["loss"].item()
    with torch.no_grad():
        for p in teacher_of(method).parameters():
            p.add_(0.1)
    assert abs(losses_of(method, batch)["loss"].item() - loss) > 1e-3


@pytest.mark.parametrize("progress", [0.0, 0.25, 1.0])
def test_the_teacher_moves_after_a_step_by_the_schedules_momentum(progress: float) -> None:
    """Equation 1 for encoder and projector, with the momentum of section 3.2."""
    method = build_byol()
    start = [p.clone() for p in teacher_of(method).parameters()]
    with torch.no_grad():
        for p in method.parameters():
            if p.requires_grad:
                p.add_(1.0)
    method.after_step(clock_at(progress), {}, DONE)
    momentum = ema_momentum(progress, 0.996)
    found = list(teacher_of(method).parameters())
    for mine, before, theirs in zip(found, start, student_of(method), strict=True):
        torch.testing.assert_close(mine, momentum * before + (1 - momentum) * theirs)
    assert (progress == 1.0) == all(torch.equal(mine, before) for mine, before in zip(found, start, strict=True))


def test_the_teachers_state_is_the_methods() -> None:
    method = build_byol()
    with torch.no_grad():
        for p in teacher_of(method).parameters():
            p.add_(1.0)
    other = build_byol()
    other.load_state_dict(method.state_dict())
    for mine, theirs in zip(teacher_of(other).parameters(), teacher_of(method).parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_teacher_has_no_dropout() -> None:
    method = build_byol().train()
    batch = share_of_batch(method)
    whole = method.embed_all(batch)
    method.dropout.probability = 0.9
    dropped = method.embed_all(batch)
    assert torch.equal(dropped["k"], whole["k"])
    assert not torch.allclose(dropped["z"], whole["z"])


@pytest.mark.parametrize("momentum", [-0.1, 1.5])
def test_a_momentum_outside_of_0_and_1_is_refused(momentum: float) -> None:
    with pytest.raises(UserError, match=rf"^--method.momentum {momentum}: give "):
        BYOLConfig(momentum=momentum)
