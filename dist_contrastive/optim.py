"""Parameter groups, optimizers and their learning rate."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import group_parameters
from torch import Tensor, nn
from torch.optim.sgd import sgd

from dist_contrastive import schedules
from dist_contrastive.config import OptimConfig, TrainConfig, require
from dist_contrastive.models.base import Encoder
from dist_contrastive.schedules import Clock

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


def weight_decay(config: OptimConfig, progress: float) -> float:
    """At `progress`, from 0 to 1 over the run."""
    end = config.weight_decay if config.weight_decay_end is None else config.weight_decay_end
    return schedules.cosine(progress, config.weight_decay, end)


Late = tuple[Sequence[nn.Parameter], float]
"""Parameters that stand still at first, and for how many epochs."""


def parameter_groups(module: nn.Module, config: OptimConfig, late: Late = ((), 0.0)) -> list[dict[str, Any]]:
    """Groups of trained parameters, each with what it takes of the learning rate and of weight decay.

    Weight decay is for matrices and kernels, not for biases and normalization parameters (one axis). `scale` is what the rate
    is multiplied with: with `layer_decay` d, d for each of the encoder's layers above a parameter's own (BEiT, Bao et al. 2022,
    appendix), 1 for what is no part of the encoder. A group stands still until `frozen_epochs` are done: its rate is 0.
    """
    late_parameters, late_epochs = late
    scales = _layer_scales(module, config.layer_decay) if config.layer_decay < 1 else {}
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    for parameter in module.parameters():
        if parameter.requires_grad:
            frozen = late_epochs if any(parameter is other for other in late_parameters) else 0.0
            key = (parameter.ndim <= 1, scales.get(id(parameter), 1.0), frozen)
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": 0.0 if is_plain else config.weight_decay,
            "decays": not is_plain,
            "scale": scale,
            "frozen_epochs": frozen,
        }
        for (is_plain, scale, frozen), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def _layer_scales(module: nn.Module, decay: float) -> dict[int, float]:
    """By `id`, what the rate of each of the encoder's parameters is multiplied with; timm says which layer it belongs to."""
    encoder = next(m for m in module.modules() if isinstance(m, Encoder))
    body: Any = encoder.body
    require(
        hasattr(body, "group_matcher"),
        f"--optim.layer-decay {decay:g}: timm does not say which are the layers of {encoder.config.name}; give 1",
    )
    layers = group_parameters(body, body.group_matcher(coarse=False), reverse=True)
    last = max(layers.values())
    return {id(p): decay ** (last - layers[name]) for name, p in body.named_parameters()}


def set_rates(optimizer: torch.optim.Optimizer, config: OptimConfig, rate: float, clock: Clock) -> None:
    """Give each group its learning rate and weight decay for the update at `clock`; `rate` is the run's learning rate there."""
    decay = weight_decay(config, clock.progress)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"] * (clock.epoch >= group["frozen_epochs"])
        group["weight_decay"] = decay * group["decays"]


def build_optimizer(
    config: OptimConfig, module: nn.Module, late: Late = ((), 0.0), *, fused: bool = True
) -> torch.optim.Optimizer:
    """AdamW, SGD or LARS; the loop sets the rates at each step.

    `fused`: one kernel for all parameters, which takes from the device whether the update is to be done (`step_unless`).
    DeepSpeed, which decides that on the host, takes AdamW and SGD without.
    """
    groups = parameter_groups(module, config, late)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=(config.momentum, config.beta2), fused=fused)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, fused=fused)
    return Lars(groups, momentum=config.momentum)


class Lars(torch.optim.Optimizer):
    """Layer-wise adaptive rates (You et al. 2017): SGD with momentum, by gradients that are scaled tensor by tensor.

    The gradient g of a tensor w, with weight decay λ, becomes (g + λw)·η·|w| / (|g| + λ|w|), or stays (g + λw) where |w| or |g|
    is 0. As in SimCLR (appendix B.6) that is for matrices and kernels alone, the groups whose `decays` is set, and also without
    weight decay. Gradients are used up.
    """

    _step_supports_amp_scaling = True
    """It heeds what a loss scaler tells it (`found_inf`), as torch's fused optimizers do."""

    def __init__(self, groups: list[dict[str, Any]], *, momentum: float, trust: float = 0.001) -> None:
        """`trust` is η."""
        super().__init__(groups, {"lr": 0.0, "momentum": momentum, "weight_decay": 0.0, "decays": True, "trust": trust})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        make_momentum(self)
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            gradients = [p.grad for p in parameters]
            if not parameters:
                continue
            if group["decays"]:
                self._adapt(parameters, gradients, group["weight_decay"], group["trust"])
            sgd(
                parameters,
                gradients,
                [self.state[p].get(MOMENTUM) for p in parameters],
                fused=True,
                found_inf=getattr(self, "found_inf", None),
                weight_decay=0.0,
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=0.0,
                nesterov=False,
                maximize=False,
            )

    def _adapt(self, parameters: list[Tensor], gradients: list[Tensor], decay: float, trust: float) -> None:
        """Scale the gradients, in place."""
        of_weights, of_gradients = (torch.stack(torch._foreach_norm(x)) for x in (parameters, gradients))
        ratios = trust * of_weights / (of_gradients + decay * of_weights)
        ratios = ratios.where((of_weights > 0) & (of_gradients > 0), 1.0)
        torch._foreach_add_(gradients, parameters, alpha=decay)
        torch._foreach_mul_(gradients, ratios.unbind())


MOMENTUM = "momentum_buffer"
"""Under what name SGD and LARS keep what they keep."""


def make_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Give SGD and LARS a momentum of zero where there is none yet.

    torch makes it in the first update, by the gradient; were that update left out, it would be whatever lay in memory.
    """
    for group in optimizer.param_groups:
        if group.get("momentum"):
            for parameter in group["params"]:
                if MOMENTUM not in optimizer.state[parameter]:
                    optimizer.state[parameter][MOMENTUM] = torch.zeros_like(parameter)


def step_unless(optimizer: torch.optim.Optimizer, left_out: Tensor) -> None:
    """Let an optimizer update that was built as `fused`, unless `left_out` (bool []) is true, for which no host waits.

    An update that is left out changes neither parameters nor state, whatever the gradient is.
    """
    make_momentum(optimizer)
    optimizer.grad_scale, optimizer.found_inf = None, left_out.float()  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
