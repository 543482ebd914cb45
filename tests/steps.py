"""Single steps for tests: a small method, one fixed global batch, and the gradient that a step leaves."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from dist_contrastive.batch import Batch, Samples
from dist_contrastive.config import EncoderConfig, HeadConfig, MethodConfig, TextConfig, TrainConfig
from dist_contrastive.distributed import rank, world_size
from dist_contrastive.methods import METHODS, Method
from dist_contrastive.methods.base import Losses, MethodSettings
from dist_contrastive.models.encoders import build_encoder
from dist_contrastive.models.teacher import Teacher
from dist_contrastive.schedules import Clock
from dist_contrastive.step.gradient import Augmentation, StepGradient
from dist_contrastive.step.replicas import DataParallel

GLOBAL_BATCH = 8
PROJECTOR = HeadConfig(layers=2, hidden_size=32, output_size=16)
TEXT = TextConfig(vocabulary=300, context=9, width=16, layers=2, heads=2)
SIDE = 16
DONE = torch.tensor(True)
"""What `after_step` is told of an update that was done."""


def small(name: str, projector: HeadConfig = PROJECTOR) -> MethodConfig:
    """A method's config with few prototypes and a small text tower, where it has any."""
    config = METHODS[name].Config(projector=projector)
    fewer: dict[str, Any] = {key: min(value, 8) for key, value in vars(config).items() if key.endswith("prototypes")}
    text: dict[str, Any] = {"text": TEXT} if METHODS[name].needs_text else {}
    return replace(config, **fewer, **text)


def encoder_for(name: str, encoder: EncoderConfig) -> EncoderConfig:
    """`encoder`, or a vision transformer where the method needs one."""
    return replace(encoder, name="vit_w96_d4", stem="standard") if METHODS[name].needs_patches else encoder


def with_small(config: TrainConfig, name: str, projector: HeadConfig = PROJECTOR) -> TrainConfig:
    """The run of another method, small, with no more views than it takes."""
    groups = config.augment.groups[: METHODS[name].max_views]
    return replace(
        config,
        method=small(name, projector),
        encoder=encoder_for(name, config.encoder),
        augment=replace(config.augment, groups=groups),
    )


def build(name: str, encoder: EncoderConfig) -> Method:
    return build_from(small(name), encoder)


def build_from(config: MethodConfig, encoder: EncoderConfig) -> Method:
    torch.manual_seed(0)
    encoder = encoder_for(config.name, encoder)
    method = METHODS[config.name](MethodSettings(config, build_encoder(encoder, SIDE), seed=0, global_batch=8))
    # timm starts residual branches at zero, which would hide their gradients.
    for parameter in method.parameters():
        if parameter.ndim == 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return method


def share_of_batch(method: Method, seed: int = 1, crops: int = 0) -> Batch:
    """This rank's share of one fixed global batch, already augmented; with `crops` views of half the size beside the others."""
    generator = torch.Generator().manual_seed(seed)
    views = [torch.randn(method.min_views, GLOBAL_BATCH, 3, SIDE, SIDE, generator=generator)]
    indices = torch.randperm(1000, generator=generator)[:GLOBAL_BATCH]
    if crops:
        views.append(torch.randn(crops, GLOBAL_BATCH, 3, SIDE // 2, SIDE // 2, generator=generator))
    lengths = torch.randint(2, TEXT.context + 1, (GLOBAL_BATCH, 1), generator=generator)
    tokens = torch.randint(1, TEXT.vocabulary, (GLOBAL_BATCH, TEXT.context), generator=generator)
    text = tokens * (torch.arange(TEXT.context) < lengths)
    whole = Batch(tuple(views), Samples(labels=indices % 3, indices=indices, epoch=3), text)
    return whole.part(slice(rank() * GLOBAL_BATCH // world_size(), (rank() + 1) * GLOBAL_BATCH // world_size()))


def losses_of(method: Method, batch: Batch) -> Losses:
    """The method's losses on a whole rank batch, in one pass."""
    return method.loss(method.embed_all(batch), batch.samples)


def clock_at(progress: float = 0.0, step: int | None = None) -> Clock:
    """After `step` steps of a run of 100 in epochs of 10, or so far through it."""
    return Clock(step=round(100 * progress) if step is None else step, steps_per_epoch=10, total_steps=100)


def student_of(method: Method) -> nn.Sequential:
    """What a teacher follows."""
    return nn.Sequential(method.encoder, method.projector)


def teacher_of(method: Method) -> Teacher:
    assert method.teacher
    return method.teacher


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
    optimizer = optimizer or torch.optim.SGD(method.parameters(), lr=0.0, fused=True)
    replicas = DataParallel(method, optimizer, Accelerator(cpu=True, mixed_precision=precision))
    return StepGradient(replicas, augmentation, seed=0, micro=micro)


def gradient_of(method: Method) -> dict[str, np.ndarray]:
    return {name: p.grad.numpy().copy() for name, p in method.named_parameters() if p.grad is not None}
