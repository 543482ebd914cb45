"""The gradient contract: at W ranks, after DDP's average, the gradient of one rank with the whole batch.

Every method in METHODS is tested; a new one needs no line here.
"""

import numpy as np
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from dist_contrastive.batch import Batch
from dist_contrastive.config import EncoderConfig, HeadConfig
from dist_contrastive.distributed import world_size
from dist_contrastive.methods import METHODS, Method
from tests.harness import run_ranks

GLOBAL_BATCH = 8
ENCODER = EncoderConfig(name="resnet10_w16", stem="small", norm="group", dropout=0.1)


def build(name: str) -> Method:
    torch.manual_seed(0)
    config = METHODS[name].Config(projector=HeadConfig(layers=2, hidden_size=32, output_size=16))
    method = METHODS[name](config, ENCODER, image_size=16, seed=0)
    # timm starts residual branches at zero, which would hide their gradients.
    for parameter in method.parameters():
        if parameter.ndim == 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return method


def gradient_of_share(rank: int, name: str) -> dict[str, np.ndarray]:
    """Every parameter's gradient after a backward pass over this rank's share of one fixed global batch."""
    method = build(name)
    generator = torch.Generator().manual_seed(1)
    views = torch.randn(METHODS[name].min_views, GLOBAL_BATCH, 3, 16, 16, generator=generator)
    indices = torch.randperm(1000, generator=generator)[:GLOBAL_BATCH]
    share = slice(rank * GLOBAL_BATCH // world_size(), (rank + 1) * GLOBAL_BATCH // world_size())
    batch = Batch(views=views[:, share], labels=indices[share] % 3, indices=indices[share], epoch=3)
    model: torch.nn.Module = DistributedDataParallel(method) if world_size() > 1 else method
    losses, report = model(batch)
    losses["loss"].backward()
    assert all(value.ndim == 0 for value in (*losses.values(), *report.values()))
    return {n: p.grad.numpy() for n, p in method.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_gradient_is_that_of_the_global_batch(name: str, num_ranks: int) -> None:
    whole = run_ranks(gradient_of_share, 1, name)[0]
    shares = run_ranks(gradient_of_share, num_ranks, name)
    assert set(whole) == {n for n, p in build(name).named_parameters() if p.requires_grad}
    expected = np.concatenate([whole[n].ravel() for n in sorted(whole)]).astype(np.float64)
    for share in shares:
        found = np.concatenate([share[n].ravel() for n in sorted(share)]).astype(np.float64)
        cosine = found @ expected / (np.linalg.norm(found) * np.linalg.norm(expected))
        assert 1 - cosine < 1e-5
        assert abs(np.linalg.norm(found) / np.linalg.norm(expected) - 1) < 1e-5
        assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 1e-5
