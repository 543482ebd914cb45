"""What a run's modules and optimizer hold, as tensors by name and JSON values, and back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_contrastive.atomic import replacing
from dist_contrastive.checkpoint.tensor_file import Tensors, write_tensors
from dist_contrastive.config import UserError


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[Tensors, list[dict[str, Any]]]:
    """The optimizer's state as tensors named `<parameter number>.<key>` and, as JSON values, the rest.

    The rest is one dict a parameter: its state that is no tensor (in timm's and torch's optimizers: nothing, or numbers).
    """
    tensors: Tensors = {}
    rest: list[dict[str, Any]] = []
    state = optimizer.state_dict()["state"]
    for number in range(sum(len(group["params"]) for group in optimizer.param_groups)):
        values = state.get(number, {})
        tensors.update({f"{number}.{key}": value for key, value in values.items() if isinstance(value, Tensor)})
        rest.append({key: value for key, value in values.items() if not isinstance(value, Tensor)})
    return tensors, rest


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors, rest: list[dict[str, Any]]) -> None:
    """The inverse of `optimizer_tensors`, for an optimizer built over the same parameters in the same order.

    State that has a parameter's shape takes its memory layout too: another layout would take other vector paths, whose
    rounding may differ, and a resumed run must equal an uninterrupted one bit for bit.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    # Fused optimizers count steps on the device, others on the host.
    devices = [p.device if group.get("fused") else "cpu" for group in optimizer.param_groups for p in group["params"]]
    for number, (parameter, values) in enumerate(zip(parameters, rest, strict=True)):
        restored: dict[str, Any] = dict(values)
        prefix = f"{number}."
        for name, value in tensors.items():
            if not name.startswith(prefix):
                continue
            key = name.removeprefix(prefix)
            # AdamW's step counter is no moment, even where a parameter is a scalar as well.
            is_alike = value.shape == parameter.shape and key != "step"
            # A copy in any case: what is mapped from a file would keep that file's room on the disk.
            if is_alike:
                restored[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
            else:
                restored[key] = value.clone().to(devices[number])
        if restored:
            optimizer.state[parameter] = restored


def load_module(module: nn.Module, tensors: Tensors) -> None:
    """Copy the tensors into the module's parameters and buffers, in place; names must match exactly."""
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"the checkpoint is of another model: {' '.join(str(error).split())[:300]}") from error


def save_module(path: Path, module: nn.Module, metadata: Mapping[str, str]) -> None:
    """Write a module's state as one safetensors file, whole or not at all; `metadata` lies in its header."""
    with replacing(path) as temporary:
        write_tensors(temporary, module.state_dict(), metadata)
