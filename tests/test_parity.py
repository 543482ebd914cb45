"""The contract of a step: at W ranks, in micro-batches or not, gradient and state are those of one rank with the whole batch.

Every method in METHODS is tested; a new one needs no line here.
"""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch

from dist_contrastive.batch import Batch
from dist_contrastive.config import EncoderConfig
from dist_contrastive.methods import METHODS
from dist_contrastive.methods.base import Method
from tests.harness import run_ranks
from tests.steps import DONE, build, clock_at, gradient_of, share_of_batch, step_gradient

GROUP = EncoderConfig(name="resnet10_w16", stem="small", norm="group", dropout=0.1)
BATCH = replace(GROUP, norm="batch")
SYNC = replace(GROUP, norm="sync")
# Which batch: in some a ReLU of CPC's many patches lies so near zero that rounding decides whether its gradient passes.
SEED = {"group": 1, "batch": 3, "sync": 3}


def share_for(method: Method, encoder: EncoderConfig) -> Batch:
    """With smaller crops for a method that takes them."""
    return share_of_batch(method, SEED[encoder.norm], crops=3 if method.multi_crop else 0)


def direct_gradient(rank: int, name: str, encoder: EncoderConfig) -> dict[str, np.ndarray]:
    """Every parameter's gradient after one backward pass through the loss of the whole batch."""
    method = build(name, encoder)
    batch = share_for(method, encoder)
    embeddings = method.embed_all(batch)
    with torch.no_grad():
        method.settle(embeddings, clock_at())
    losses, report = method.loss(embeddings, batch.samples), method.report(embeddings, logged=True)
    losses["loss"].backward()
    assert all(value.ndim == 0 and value.dtype == torch.float32 for value in losses.values())
    assert all(value.ndim == 0 and not value.requires_grad for value in report.values())
    assert report["effective_rank"] > 1
    assert -1 <= report["positive_cosine"] <= 1
    return gradient_of(method)


def gradient_of_share(rank: int, name: str, encoder: EncoderConfig, micro: int) -> dict[str, np.ndarray]:
    """The same as the trainer computes it, from this rank's share."""
    method = build(name, encoder)
    step_gradient(method, micro).compute(share_for(method, encoder), clock_at())
    return gradient_of(method)


@functools.cache
def whole(name: str, encoder: EncoderConfig = GROUP) -> dict[str, np.ndarray]:
    gradient: dict[str, np.ndarray] = run_ranks(direct_gradient, 1, name, encoder)[0]
    return gradient


def assert_same_gradient(share: dict[str, np.ndarray], whole: dict[str, np.ndarray]) -> None:
    assert share.keys() == whole.keys()
    expected = np.concatenate([whole[n].ravel() for n in sorted(whole)]).astype(np.float64)
    found = np.concatenate([share[n].ravel() for n in sorted(share)]).astype(np.float64)
    cosine = found @ expected / (np.linalg.norm(found) * np.linalg.norm(expected))
    assert 1 - cosine < 1e-5
    assert abs(np.linalg.norm(found) / np.linalg.norm(expected) - 1) < 1e-5
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 1e-5


# At 1, 2 and 4 ranks a rank has 8, 4 and 2 samples: micro-batches that hold all, that divide them and that do not.
@pytest.mark.parametrize(("num_ranks", "micro"), [(1, 0), (1, 4), (1, 3), (2, 0), (2, 2), (2, 3), (4, 0), (4, 1)])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_gradient_is_that_of_the_global_batch(name: str, num_ranks: int, micro: int) -> None:
    for share in run_ranks(gradient_of_share, num_ranks, name, GROUP, micro):
        assert_same_gradient(share, whole(name))


# MoCo keeps its batch statistics within groups of samples (shuffling BN), whose number grows with the ranks.
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"moco"}))
def test_synchronised_batch_norm_is_batch_norm_of_the_global_batch(name: str, num_ranks: int) -> None:
    for share in run_ranks(gradient_of_share, num_ranks, name, SYNC, 0):
        assert_same_gradient(share, whole(name, BATCH))


def state_after_a_step(rank: int, name: str, micro: int) -> dict[str, np.ndarray]:
    """What a step changes without a gradient: centers, queues, the teacher."""
    method = build(name, GROUP)
    outcome = step_gradient(method, micro).compute(share_for(method, GROUP), clock_at(step=20))
    method.after_step(clock_at(step=20), outcome.embeddings, DONE)
    trained = {n for n, p in method.named_parameters() if p.requires_grad}
    return {n: value.numpy() for n, value in method.state_dict().items() if n not in trained}


@functools.cache
def state_of_one_rank(name: str) -> dict[str, np.ndarray]:
    state: dict[str, np.ndarray] = run_ranks(state_after_a_step, 1, name, 0)[0]
    return state


@pytest.mark.parametrize(("num_ranks", "micro"), [(1, 3), (2, 0), (4, 1)])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_step_leaves_the_same_state_on_every_rank(name: str, num_ranks: int, micro: int) -> None:
    """A method's own state must not need the broadcast that DDP's buffers get: it is equal without."""
    for state in run_ranks(state_after_a_step, num_ranks, name, micro):
        assert state.keys() == state_of_one_rank(name).keys()
        for n, value in state.items():
            np.testing.assert_allclose(value, state_of_one_rank(name)[n], rtol=1e-4, atol=1e-5, err_msg=n)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_trained_parameter_gets_a_gradient(name: str) -> None:
    trained = {n for n, p in build(name, GROUP).named_parameters() if p.requires_grad}
    assert whole(name).keys() == trained
    assert all(np.abs(gradient).max() > 0 for gradient in whole(name).values())
