"""Parameter groups, optimizers and their learning rate."""

import torch
from timm.optim import Lars
from torch import nn

from dist_contrastive import schedules
from dist_contrastive.config import OptimConfig, TrainConfig

REFERENCE_BATCH = 256  # learning rates are given per this many samples (Goyal et al. 2017)
STATES_PER_PARAMETER = {"adamw": 2, "sgd": 1, "lars": 1}
"""How many tensors of a parameter's size each optimizer keeps."""


def peak_learning_rate(config: OptimConfig, global_batch: int) -> float:
    """The configured rate, which is per 256 samples, scaled linearly to the global batch. The one place that scales."""
    return config.learning_rate * global_batch / REFERENCE_BATCH


def learning_rate(config: TrainConfig, steps_per_epoch: int, step: int) -> float:
    """The rate of the update that follows `step` others in the run of `config`."""
    optim = config.optim
    return schedules.learning_rate(
        step,
        steps_per_epoch * config.epochs,
        round(optim.warmup_epochs * steps_per_epoch),
        peak_learning_rate(optim, config.batch.size),
        optim.schedule,
        round(optim.decay_epochs * steps_per_epoch),
    )


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: matrices and kernels with weight decay; biases and normalization parameters (one axis) without."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def build_optimizer(config: OptimConfig, module: nn.Module) -> torch.optim.Optimizer:
    """AdamW and SGD from torch, LARS from timm (You et al. 2017); the loop sets the learning rate at each step."""
    groups = parameter_groups(module, config.weight_decay)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=(config.momentum, 0.999))
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum)
    # SimCLR (appendix B.6) adapts the rate of matrices and kernels alone. timm's LARS would adapt wherever there is
    # weight decay, and so nowhere without any.
    groups[0]["always_adapt"] = True
    return Lars(groups, lr=0.0, momentum=config.momentum)
