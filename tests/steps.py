"""Single steps for tests: a small method, one fixed global batch, and the gradient that a step leaves."""

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from dist_contrastive.batch import Batch, Samples
from dist_contrastive.config import EncoderConfig, HeadConfig
from dist_contrastive.distributed import rank, world_size
from dist_contrastive.methods import METHODS, Method
from dist_contrastive.methods.base import Losses, MethodSettings
from dist_contrastive.models.encoders import build_encoder
from dist_contrastive.step.gradient import Augmentation, StepGradient
from dist_contrastive.step.replicas import DataParallel

GLOBAL_BATCH = 8
SIDE = 16


def build(name: str, encoder: EncoderConfig) -> Method:
    torch.manual_seed(0)
    config = METHODS[name].Config(projector=HeadConfig(layers=2, hidden_size=32, output_size=16))
    method = METHODS[name](MethodSettings(config, build_encoder(encoder, SIDE), seed=0))
    # timm starts residual branches at zero, which would hide their gradients.
    for parameter in method.parameters():
        if parameter.ndim == 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return method


def share_of_batch(method: Method, seed: int = 1) -> Batch:
    """This rank's share of one fixed global batch, already augmented."""
    generator = torch.Generator().manual_seed(seed)
    views = torch.randn(method.min_views, GLOBAL_BATCH, 3, SIDE, SIDE, generator=generator)
    indices = torch.randperm(1000, generator=generator)[:GLOBAL_BATCH]
    whole = Batch((views,), Samples(labels=indices % 3, indices=indices, epoch=3))
    return whole.part(slice(rank() * GLOBAL_BATCH // world_size(), (rank() + 1) * GLOBAL_BATCH // world_size()))


def losses_of(method: Method, batch: Batch) -> Losses:
    """The method's losses on a whole rank batch, in one pass."""
    return method.loss(method.embed_all(batch), batch.samples)


def as_it_is(batch: Batch, device: torch.device) -> Batch:
    """No augmentation."""
    return batch


def step_gradient(
    method: Method,
    micro: int,
    precision: str = "no",
    augmentation: Augmentation = as_it_is,
    optimizer: torch.optim.Optimizer | None = None,
) -> StepGradient:
    AcceleratorState._reset_state(
        reset_partial_state=True
    )  # another test of this process may have had another precision
    optimizer = optimizer or torch.optim.SGD(method.parameters(), lr=0.0)
    replicas = DataParallel(method, optimizer, Accelerator(cpu=True, mixed_precision=precision))
    return StepGradient(replicas, augmentation, seed=0, micro=micro)


def gradient_of(method: Method) -> dict[str, np.ndarray]:
    return {name: p.grad.numpy().copy() for name, p in method.named_parameters() if p.grad is not None}
