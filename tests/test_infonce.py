"""InfoNCE losses against nested-loop pseudocode of their papers, on one rank and on several, in one block and in many."""

import math

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from dist_contrastive import distributed
from dist_contrastive.batch import Samples
from dist_contrastive.config import EncoderConfig
from dist_contrastive.losses import blocks
from dist_contrastive.losses.infonce import indexed_nce, nt_xent, paired_nce, queue_nce, supervised
from dist_contrastive.losses.margin import margin_loss
from dist_contrastive.methods.base import MethodSettings
from dist_contrastive.methods.simclr import SimCLR, SimCLRConfig
from dist_contrastive.models.encoders import build_encoder
from dist_contrastive.step.memory import TensorCount
from tests.harness import run_ranks


def nt_xent_reference(views: np.ndarray, temperature: float) -> float:
    """SimCLR, algorithm 1 and equation 1, written as loops in float64; `views` [V, N, E] of unit length."""
    num_views, num_samples, _ = views.shape
    everyone = [(v, i) for v in range(num_views) for i in range(num_samples)]
    total = 0.0
    for v, i in everyone:
        denominator = sum(
            math.exp(float(views[v, i] @ views[u, k]) / temperature) for u, k in everyone if (u, k) != (v, i)
        )
        positives = [float(views[v, i] @ views[u, i]) / temperature for u in range(num_views) if u != v]
        total += sum(-(s - math.log(denominator)) for s in positives) / len(positives)
    return total / len(everyone)


def supervised_reference(rows: np.ndarray, labels: np.ndarray, temperature: float, *, decoupled: bool) -> float:
    """SupCon's equation 2 as loops in float64; decoupled: DCL's denominator (Yeh et al. 2022, equation 6)."""
    total = 0.0
    for i in range(len(rows)):
        positives = [p for p in range(len(rows)) if p != i and labels[p] == labels[i]]
        others = [a for a in range(len(rows)) if a != i and not (decoupled and a in positives)]
        if not others:
            continue
        denominator = sum(math.exp(float(rows[i] @ rows[a]) / temperature) for a in others)
        total += sum(math.log(denominator) - float(rows[i] @ rows[p]) / temperature for p in positives) / len(positives)
    return total / len(rows)


def embeddings(num_views: int, num_samples: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(num_views, num_samples, 16, generator=generator), dim=-1)


@pytest.mark.parametrize("num_views", [2, 3])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_equals_the_papers_loops(num_views: int, temperature: float) -> None:
    z = embeddings(num_views, 5)
    rows = z.flatten(0, 1)
    loss = nt_xent(rows, rows, offset=0, num_views=num_views, temperature=temperature)
    assert loss.item() == pytest.approx(nt_xent_reference(z.double().numpy(), temperature), rel=1e-5)


@pytest.mark.parametrize("num_views", [2, 3])
def test_decoupled_equals_the_papers_loops(num_views: int) -> None:
    z = embeddings(num_views, 5)
    rows = z.flatten(0, 1)
    loss = nt_xent(rows, rows, offset=0, num_views=num_views, temperature=0.2, decoupled=True)
    samples = np.tile(np.arange(5), num_views)
    expected = supervised_reference(rows.double().numpy(), samples, 0.2, decoupled=True)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("decoupled", [False, True])
def test_supervised_equals_the_papers_loops(decoupled: bool) -> None:
    rows = embeddings(2, 6).flatten(0, 1)
    labels = torch.tensor([0, 1, 1, 2, 0, 1]).repeat(2)
    loss = supervised(rows, rows, labels, offset=0, temperature=0.2, decoupled=decoupled)
    expected = supervised_reference(rows.double().numpy(), labels.numpy(), 0.2, decoupled=decoupled)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_supervised_without_any_negative_stays_finite() -> None:
    rows = embeddings(2, 3).flatten(0, 1).requires_grad_()
    loss = supervised(rows, rows, torch.zeros(6, dtype=torch.int64), offset=0, temperature=0.2, decoupled=True)
    loss.backward()
    assert loss.item() == 0
    assert rows.grad is not None
    assert not rows.grad.any()


def test_the_queues_loss_equals_the_papers_loops() -> None:
    """MoCo, equation 1."""
    queries, keys = embeddings(2, 5).unbind(0)
    queue = embeddings(1, 7, seed=3)[0]
    loss = queue_nce(queries, keys, queue, temperature=0.2)
    q, k, old = (x.double().numpy() for x in (queries, keys, queue))
    total = 0.0
    for i in range(5):
        positive = math.exp(float(q[i] @ k[i]) / 0.2)
        total -= math.log(positive / (positive + sum(math.exp(float(q[i] @ old[j]) / 0.2) for j in range(7))))
    assert loss.item() == pytest.approx(total / 5, rel=1e-5)


def test_no_gradient_reaches_keys_or_queue() -> None:
    queries, keys = (x.clone().requires_grad_() for x in embeddings(2, 5).unbind(0))
    queue = embeddings(1, 7, seed=3)[0].requires_grad_()
    queue_nce(queries, keys, queue, temperature=0.2).backward()
    assert queries.grad is not None
    assert keys.grad is None
    assert queue.grad is None


def test_indexed_equals_the_papers_loops() -> None:
    """CPC, equation 4."""
    anchors, candidates = embeddings(1, 4)[0], embeddings(1, 9, seed=3)[0]
    positives = torch.tensor([3, 0, 8, 3])
    loss = indexed_nce(anchors, candidates, positives, temperature=0.5)
    a, c = anchors.double().numpy(), candidates.double().numpy()
    total = 0.0
    for i in range(4):
        scores = [math.exp(float(a[i] @ c[j]) / 0.5) for j in range(9)]
        total -= math.log(scores[int(positives[i])] / sum(scores))
    assert loss.item() == pytest.approx(total / 4, rel=1e-5)


@pytest.mark.parametrize("pairs", [1 << 20, 20])
def test_the_paired_loss_is_clips_with_a_learnt_scale(pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Radford et al. 2021, figure 3: the scale is in the embeddings, and gets its gradient from there."""
    monkeypatch.setitem(blocks.MAX_PAIRS, "cpu", pairs)
    images, texts = embeddings(1, 7)[0], embeddings(1, 7, seed=3)[0]
    own = torch.arange(7)
    results = []
    for dtype in (torch.float32, torch.float64):
        log_scale = torch.tensor(math.log(1 / 0.07), dtype=dtype, requires_grad=True)
        pair = [x.to(dtype, copy=True).requires_grad_() for x in (images, texts)]
        if dtype == torch.float32:
            means = paired_nce(log_scale.exp() * pair[0], pair[1], offset=0)
        else:
            logits = log_scale.exp() * pair[0] @ pair[1].T
            ways = F.cross_entropy(logits, own), F.cross_entropy(logits.T, own)
            means = ((ways[0] + ways[1]) / 2, *ways)
        (3 * means[0]).backward()
        results.append([*(mean.detach() for mean in means), log_scale.grad, *(x.grad for x in pair)])
    for found, expected in zip(*results, strict=True):
        assert found is not None
        assert expected is not None
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def paired_of_share(rank: int, images: np.ndarray, texts: np.ndarray) -> tuple[list[float], list[np.ndarray]]:
    """This rank's loss and the two means, and the gradients at its share averaged as DDP does."""
    share = len(images) // distributed.world_size()
    mine = slice(rank * share, (rank + 1) * share)
    pair = [torch.from_numpy(x[mine].copy()).requires_grad_() for x in (images, texts)]
    means = paired_nce(5 * pair[0], distributed.gather_with_grad(pair[1]), offset=rank * share)
    means[0].backward()
    assert all(x.grad is not None for x in pair)
    return [mean.item() for mean in means], [
        x.grad.numpy() / distributed.world_size() for x in pair if x.grad is not None
    ]


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_find_the_partners_of_all(num_ranks: int) -> None:
    images, texts = (embeddings(1, 8, seed)[0].numpy() for seed in (0, 3))
    means, gradients = paired_of_share(0, images, texts)
    shares = run_ranks(paired_of_share, num_ranks, images, texts)
    np.testing.assert_allclose(np.mean([found for found, _ in shares], axis=0), means, rtol=1e-6)
    for side in (0, 1):
        found = np.concatenate([of_share[side] for _, of_share in shares])
        np.testing.assert_allclose(found, gradients[side], rtol=1e-5, atol=1e-7)


PAIRWISE = {
    "nt_xent": lambda a, o: nt_xent(a, o, offset=0, num_views=2, temperature=0.2),
    "decoupled": lambda a, o: nt_xent(a, o, offset=0, num_views=2, temperature=0.2, decoupled=True),
    "supervised": lambda a, o: supervised(a, o, torch.arange(14) % 3, offset=0, temperature=0.2),
    "queue": lambda a, o: queue_nce(a, o, o.flip(0), temperature=0.2),
    "indexed": lambda a, o: indexed_nce(a, o, torch.arange(14).flip(0), temperature=0.2),
    "paired": lambda a, o: paired_nce(4 * a, o, offset=0)[0],
    "margin": lambda a, o: margin_loss(a, o, offset=0, num_views=2, margin=1.5),
    "hardest": lambda a, o: margin_loss(a, o, offset=0, num_views=2, margin=1.5, negatives="hardest"),
}


@pytest.mark.parametrize("pairs", [1, 14, 40])
@pytest.mark.parametrize("name", PAIRWISE)
def test_many_blocks_give_what_one_gives(name: str, pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for most in (1 << 20, pairs):
        monkeypatch.setitem(blocks.MAX_PAIRS, "cpu", most)
        anchors, others = (embeddings(2, 7, seed).flatten(0, 1).requires_grad_() for seed in (0, 1))
        loss = PAIRWISE[name](anchors, others)
        (3 * loss).backward()
        results.append((loss.detach(), anchors.grad, others.grad))
    for one, many in zip(*results, strict=True):
        if one is None or many is None:
            assert one is many
        else:
            torch.testing.assert_close(many, one)
            assert one.any()


@pytest.mark.parametrize("name", PAIRWISE)
def test_gradients_equal_finite_differences(name: str) -> None:
    """Blocks take the gradient in the forward pass, by hand: check it from outside."""
    generator = torch.Generator().manual_seed(5)
    anchors, others = (embeddings(2, 7, seed).flatten(0, 1).requires_grad_() for seed in (0, 1))
    direction = torch.randn(anchors.shape, generator=generator)
    PAIRWISE[name](anchors, others).backward()
    assert anchors.grad is not None
    step = 1e-2
    ahead, behind = (PAIRWISE[name](anchors.detach() + s * direction, others.detach()) for s in (step, -step))
    assert ((ahead - behind) / (2 * step)).item() == pytest.approx((anchors.grad * direction).sum().item(), rel=2e-2)


def test_blocks_keep_memory_far_below_the_matrix_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(blocks.MAX_PAIRS, "cpu", 1 << 16)
    rows = torch.randn(2048, 16, requires_grad=True)
    with TensorCount() as tensors:
        nt_xent(rows, rows, offset=0, num_views=2, temperature=0.2).backward()
    assert tensors.peak < 2048 * 2048  # bytes: a quarter of one matrix in float32


@pytest.mark.parametrize(
    ("device", "num_others", "expected"),
    [
        ("cpu", 256, 8192),
        ("cpu", 8192, 256),  # 8 MiB
        ("cpu", 131_072, 64),  # more, for the rows' sake
        ("cpu", 1 << 20, 8),  # as far as that goes: 32 MiB
        ("cpu", 1 << 30, 1),
        ("cuda", 8192, 4096),
        ("cuda", 131_072, 256),
    ],
)
def test_a_block_has_what_its_device_likes(device: str, num_others: int, expected: int) -> None:
    sizes = [rows.stop - rows.start for rows in blocks.blocks(10_000, num_others, torch.device(device))]
    assert sizes[0] == expected
    assert sum(sizes) == 10_000


def test_131072_embeddings_on_a_cpu_take_less_than_a_gigabyte(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside themselves, their gradients included; the matrix of logits alone would have 69 GB."""
    # Larger blocks, which hold more, are fewer. Tensors have no values, and count as what they would take.
    for sizes in (blocks.PAIRS, blocks.MAX_PAIRS):
        monkeypatch.setitem(sizes, "cpu", 1 << 26)
    with FakeTensorMode():
        rows = torch.empty(131_072, 128, requires_grad=True)
        with TensorCount() as tensors:
            nt_xent(rows, rows, offset=0, num_views=2, temperature=0.1).backward()
    assert rows.nbytes < tensors.peak < 1e9


LOSSES = {name: loss for name, loss in PAIRWISE.items() if name not in ("margin", "hardest")}


@pytest.mark.parametrize("name", LOSSES)
def test_float32_inside_autocast(name: str) -> None:
    anchors, others = (embeddings(2, 7, seed).flatten(0, 1).bfloat16() for seed in (0, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = LOSSES[name](anchors, others)
    assert loss.dtype == torch.float32
    assert loss.item() == LOSSES[name](anchors.float(), others.float()).item()


def loss_of_share(rank: int, z: np.ndarray) -> tuple[float, np.ndarray]:
    """This rank's loss over its share of z [V, N, E], and the gradient at its share averaged as DDP does."""
    num_views, num_samples, _ = z.shape
    share = num_samples // distributed.world_size()
    mine = torch.from_numpy(z[:, rank * share : (rank + 1) * share].copy()).requires_grad_()
    rows = mine.flatten(0, 1)
    everyone = distributed.gather_with_grad(rows)
    loss = nt_xent(rows, everyone, offset=rank * len(rows), num_views=num_views, temperature=0.2)
    loss.backward()
    assert mine.grad is not None
    return loss.item(), (mine.grad / distributed.world_size()).numpy()


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_give_the_loss_and_gradient_of_the_whole_batch(num_ranks: int) -> None:
    z = embeddings(2, 8)
    whole = z.clone().requires_grad_()
    rows = whole.flatten(0, 1)
    loss = nt_xent(rows, rows, offset=0, num_views=2, temperature=0.2)
    loss.backward()
    assert whole.grad is not None
    shares = run_ranks(loss_of_share, num_ranks, z.numpy())
    assert np.mean([share_loss for share_loss, _ in shares]) == pytest.approx(loss.item(), rel=1e-6)
    gradient = np.concatenate([gradient for _, gradient in shares], axis=1)
    np.testing.assert_allclose(gradient, whole.grad.numpy(), rtol=1e-5, atol=1e-7)


def simclr_of_share(rank: int, z: np.ndarray, labels: np.ndarray, config: SimCLRConfig) -> tuple[float, np.ndarray]:
    """As `loss_of_share`, through SimCLR's own gathers of embeddings and labels."""
    encoder = build_encoder(EncoderConfig(name="resnet10_w16", stem="small"), 8)
    method = SimCLR(MethodSettings(config, encoder, seed=0, global_batch=8))
    share = z.shape[1] // distributed.world_size()
    mine = slice(rank * share, (rank + 1) * share)
    rows = torch.from_numpy(z[:, mine].copy()).requires_grad_()
    indices = torch.arange(share)
    samples = Samples(torch.from_numpy(labels[mine].copy()), indices, epoch=0)
    loss = method.loss({"z": rows}, samples)["loss"]
    loss.backward()
    assert rows.grad is not None
    return loss.item(), (rows.grad / distributed.world_size()).numpy()


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("positives", ["views", "labels"])
def test_ranks_find_their_positives_among_the_samples_of_all(positives: str, decoupled: bool, num_ranks: int) -> None:
    z = embeddings(3, 8).numpy()
    labels = np.array([0, 1, 1, 2, 0, 1, 3, 2])  # most samples have their label's others on other ranks
    config = SimCLRConfig(temperature=0.2, positives=positives, decoupled=decoupled)  # type: ignore[arg-type]
    groups = np.tile(labels if positives == "labels" else np.arange(8), 3)
    expected = supervised_reference(z.reshape(-1, z.shape[2]).astype(np.float64), groups, 0.2, decoupled=decoupled)
    whole, whole_gradient = simclr_of_share(0, z, labels, config)
    shares = run_ranks(simclr_of_share, num_ranks, z, labels, config)
    assert whole == pytest.approx(expected, rel=1e-5)
    assert np.mean([loss for loss, _ in shares]) == pytest.approx(expected, rel=1e-5)
    gradient = np.concatenate([gradient for _, gradient in shares], axis=1)
    np.testing.assert_allclose(gradient, whole_gradient, rtol=1e-5, atol=1e-7)


def test_only_positives_by_label_need_labels() -> None:
    assert SimCLRConfig(positives="labels").needs_labels
    assert not SimCLRConfig().needs_labels
