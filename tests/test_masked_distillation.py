"""iBOT and DINOv2: masks, the loss of masked patches, Sinkhorn-Knopp and KoLeo over all ranks."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_contrastive import distributed
from dist_contrastive.config import EncoderConfig, HeadConfig, UserError
from dist_contrastive.methods.base import MethodSettings
from dist_contrastive.methods.dinov2 import DINOv2, DINOv2Config
from dist_contrastive.methods.ibot import IBOT, IBOTConfig
from dist_contrastive.methods.masked_distillation import MaskedDistillation
from dist_contrastive.models.encoders import build_encoder
from dist_contrastive.models.heads import PrototypeHead
from dist_contrastive.models.masks import block_masks, masked_places, most_masked
from dist_contrastive.rng import sample_keys
from tests.harness import run_ranks
from tests.steps import DONE, build_from, clock_at, gradient_of, share_of_batch, step_gradient

VIT = EncoderConfig(name="vit_w96_d4", norm="group", dropout=0.1, drop_path=0.2)
CROPS = 3
HEAD = HeadConfig(layers=3, hidden_size=24, output_size=8, activation="gelu", hidden_norm=False)
CONFIGS = {
    "ibot": IBOTConfig(projector=HEAD, prototypes=13),
    "ibot with two heads": IBOTConfig(projector=HEAD, prototypes=13, patch_prototypes=7, patch_weight=0.5),
    "dinov2": DINOv2Config(projector=HEAD, prototypes=13, patch_prototypes=7),
}
each_config = pytest.mark.parametrize("name", CONFIGS)


def built(name: str) -> IBOT | DINOv2:
    method = build_from(CONFIGS[name], VIT)
    assert isinstance(method, IBOT | DINOv2)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        for centering in (method.centering, method.patch_centering):
            for center in centering.buffers():
                center.normal_(std=0.05, generator=generator)
        for parameter in method.own_teacher.parameters():  # as if it had followed for a while
            parameter.mul_(1.1).add_(0.01)
    return method


# Masks

SIDE = 8


def masks(num: int, **changes: Any) -> Tensor:
    keys = sample_keys(3, 1, torch.arange(num), 0)
    return block_masks(keys, SIDE, **{"probability": 1.0, "ratio": (0.1, 0.5), **changes})


def test_masks_keep_to_their_share_and_come_in_blocks() -> None:
    mask = masks(2000)
    counts = mask.sum(1)
    assert 1 <= counts.min() <= counts.max() <= most_masked(SIDE, (0.1, 0.5)) == 32
    # Uniform between a tenth and a half of 64 patches: 19.2 on average, less what no block fitted into.
    assert 17 < counts.float().mean() < 19.3
    grid = mask.view(-1, SIDE, SIDE)
    neighbours = (grid[:, 1:] & grid[:, :-1]).sum() + (grid[:, :, 1:] & grid[:, :, :-1]).sum()
    scattered = torch.rand(2000, SIDE**2, generator=torch.Generator().manual_seed(0)).argsort(1) < counts[:, None]
    alone = scattered.view(-1, SIDE, SIDE)
    by_chance = (alone[:, 1:] & alone[:, :-1]).sum() + (alone[:, :, 1:] & alone[:, :, :-1]).sum()
    assert neighbours > 1.8 * by_chance
    # No place is left out; blocks cover corners less often than the middle.
    share = mask.float().mean(0)
    assert 0.05 < share.min() < share.max() < 0.5


def test_so_many_views_are_masked_as_the_probability_says() -> None:
    masked = masks(4000, probability=0.3).any(1).float().mean().item()
    assert masked == pytest.approx(0.3, abs=5 * math.sqrt(0.3 * 0.7 / 4000))
    few = masks(500, ratio=(0.001, 0.001))
    assert (few.sum(1) == 1).all(), "a masked view has a masked patch"


def test_a_mask_is_a_function_of_the_samples_key() -> None:
    keys = sample_keys(3, 1, torch.arange(50), 0)
    mask = block_masks(keys, SIDE, probability=0.5, ratio=(0.1, 0.5))
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    again = block_masks(keys[order][:20], SIDE, probability=0.5, ratio=(0.1, 0.5))
    assert torch.equal(again, mask[order][:20])
    other = block_masks(sample_keys(3, 2, torch.arange(50), 0), SIDE, probability=0.5, ratio=(0.1, 0.5))
    assert not torch.equal(other, mask)


def test_places_are_those_that_are_masked_and_weigh_the_same_for_each_image() -> None:
    mask = masks(100, probability=0.6)
    places, weights = masked_places(mask, 32)
    for row in range(100):
        chosen = places[row][weights[row] > 0]
        assert sorted(chosen.tolist()) == mask[row].nonzero().flatten().tolist()
        assert weights[row].sum().item() == pytest.approx(float(mask[row].any()))


# The loss


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def sinkhorn(scores: np.ndarray, temperature: float, iterations: int) -> np.ndarray:
    """SwAV's and DINOv2's algorithm: scores [n, K], assignments [n, K]."""
    q = np.exp(scores / temperature).T
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(1, keepdims=True) * q.shape[0]
        q /= q.sum(0, keepdims=True) * q.shape[1]
    return (q * q.shape[1]).T


def prototypes_of(head: PrototypeHead | None) -> np.ndarray:
    assert head is not None
    return head.prototypes().detach().double().numpy()


def assigned(method: MaskedDistillation[Any], scores: np.ndarray, center: np.ndarray | None) -> np.ndarray:
    temperature = method.target_temperature
    return sinkhorn(scores, temperature, 3) if center is None else softmax((scores - center) / temperature)


@each_config
@pytest.mark.parametrize("crops", [0, CROPS])
def test_the_loss_is_the_papers(name: str, crops: int) -> None:
    """iBOT, equations 1 and 2; DINOv2, section 4, in float64."""
    method = built(name)
    batch = share_of_batch(method, crops=crops)
    embeddings = method.embed_all(batch)
    method.settle(embeddings, clock_at())
    arrays = {key: value.detach().double().numpy() for key, value in embeddings.items()}
    q, k, patch_q, patch_k, weight = (arrays[key] for key in ("q", "k", "patch_q", "patch_k", "patch_weight"))
    student, teacher = method.projector, method.own_teacher.projector
    assert isinstance(teacher, PrototypeHead)
    centers = [dict(c.named_buffers()).get("center") for c in (method.centering, method.patch_centering)]
    of_views, of_patches = (None if c is None else c.double().numpy() for c in centers)

    num_samples = len(batch)
    targets = assigned(method, k.reshape(-1, 8) @ prototypes_of(teacher).T, of_views).reshape(2, num_samples, -1)
    log_q = np.log(softmax(q @ prototypes_of(student).T / 0.1))
    pairs = [(v, w) for v in range(len(q)) for w in range(2) if v != w]
    expected = -sum(float((targets[w] * log_q[v]).sum(-1).mean()) for v, w in pairs) / len(pairs)

    chosen = weight > 0
    scores = patch_k[chosen] @ prototypes_of(teacher.of_patches or teacher).T
    log_p = np.log(softmax(patch_q[chosen] @ prototypes_of(student.of_patches or student).T / 0.1))
    cross = -(assigned(method, scores, of_patches) * log_p).sum(-1)
    # Over the masked patches of a view, then over all views.
    views = np.argwhere(chosen)[:, :2]
    per_view = [
        cross[(views == (w, b)).all(1)].mean() for w in range(2) for b in range(num_samples) if chosen[w, b].any()
    ]
    expected += method.config.patch_weight * sum(per_view) / (2 * num_samples)

    losses = method.loss(embeddings, batch.samples)
    if isinstance(method, DINOv2):
        spread = 0.0
        for view in arrays["feature"]:
            distances = np.linalg.norm(view[:, None] - view[None], axis=-1) + np.eye(num_samples) * 1e9
            spread -= float(np.log(distances.min(1) + 1e-8).mean()) / 2
        assert losses["koleo"].item() == pytest.approx(spread, rel=1e-4)
        expected += 0.1 * spread
    assert losses["loss"].item() == pytest.approx(expected, rel=1e-4)


@each_config
def test_masked_patches_are_hidden_from_the_student_and_seen_by_the_teacher(name: str) -> None:
    method = built(name).eval()
    batch = share_of_batch(method)
    views = batch.views[0]
    mask = method.masks(views, batch.samples).view(2, len(batch), 4, 4)
    assert mask.any()
    hidden = mask.repeat_interleave(4, 2).repeat_interleave(4, 3)[:, :, None]
    changed = replace(batch, views=(torch.where(hidden, views + 3.0, views),))
    before, after = method.embed_all(batch), method.embed_all(changed)
    for key in ("q", "patch_q", "patch_weight"):
        torch.testing.assert_close(after[key], before[key])
    assert (after["patch_k"] - before["patch_k"]).abs().max() > 1e-4


def step_on_rank(rank: int, name: str, micro: int) -> tuple[float, dict[str, np.ndarray], np.ndarray]:
    """Loss, averaged gradient and the biases after a step with multi-crop, dropout and drop path."""
    method = built(name)
    outcome = step_gradient(method, micro).compute(share_of_batch(method, crops=CROPS), clock_at(step=20))
    method.after_step(clock_at(step=21), outcome.embeddings, DONE)
    loss = distributed.all_gather(outcome.losses["loss"][None]).mean().item()
    state = [x.flatten() for c in (method.centering, method.patch_centering) for x in c.buffers()]
    return loss, gradient_of(method), torch.cat(state).numpy()


@each_config
@pytest.mark.parametrize(("num_ranks", "micro"), [(1, 3), (2, 0), (2, 3), (4, 0), (4, 1)])
def test_any_ranks_and_micro_batches_give_one_step(name: str, num_ranks: int, micro: int) -> None:
    ((loss, gradient, state),) = run_ranks(step_on_rank, 1, name, 0)
    norm = np.sqrt(sum(float(np.square(value).sum()) for value in gradient.values()))
    for found, of_rank, settled in run_ranks(step_on_rank, num_ranks, name, micro):
        assert found == pytest.approx(loss, rel=1e-5)
        np.testing.assert_allclose(settled, state, rtol=1e-4, atol=1e-4)
        assert of_rank.keys() == gradient.keys()
        assert "mask_token" in gradient
        off = np.sqrt(sum(float(np.square(of_rank[key] - value).sum()) for key, value in gradient.items()))
        assert off <= 2e-5 * norm


def test_an_encoder_without_patches_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"^--encoder.name resnet10_w16 has no patches; choose a vision transformer"):
        IBOT(
            MethodSettings(
                IBOTConfig(projector=HEAD),
                build_encoder(EncoderConfig(name="resnet10_w16"), 16),
                seed=0,
                global_batch=8,
            )
        )


@pytest.mark.parametrize("ratio", [(0.0, 0.5), (0.5, 1.0), (0.5, 0.4)])
def test_a_mask_ratio_that_hides_nothing_or_all_is_refused(ratio: tuple[float, float]) -> None:
    with pytest.raises(UserError, match=r"^--method.mask-ratio .*give 0 < low <= high < 1"):
        IBOTConfig(mask_ratio=ratio)
    with pytest.raises(UserError, match=r"^--method.mask-probability 0: .*dino learns without masks"):
        IBOTConfig(mask_probability=0.0)


@each_config
def test_patches_that_collapse_are_told_of(name: str) -> None:
    method = built(name)
    batch = share_of_batch(method)
    embeddings = method.embed_all(batch)
    method.settle(embeddings, clock_at())
    report = method.report(embeddings, logged=True)
    entropies = [report[name].item() for name in ("patch_target_entropy", "mean_patch_target_entropy")]
    assert 0 < entropies[0] <= entropies[1] < math.log(method.num_patch_prototypes) + 1e-5
    healthy = {"target_entropy": 1.0, "mean_target_entropy": 2.3}
    later, largest = clock_at(step=20), math.log(method.num_patch_prototypes)
    uniform = healthy | {"patch_target_entropy": 0.999 * largest, "mean_patch_target_entropy": largest}
    assert method.alarm(uniform, later).startswith("of patches: all targets are uniform")
    single = healthy | {"patch_target_entropy": 0.001, "mean_patch_target_entropy": 0.001}
    assert method.alarm(single, later).startswith("of patches: 1.0 of")
    unmasked = healthy | {"patch_target_entropy": 0.0, "mean_patch_target_entropy": 0.0}
    assert method.alarm(unmasked, later) == ""
    assert method.alarm(uniform, clock_at(step=9)) == ""
