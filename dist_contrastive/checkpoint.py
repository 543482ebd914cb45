"""The run's complete state on disk: written atomically, verified when read.

A checkpoint is a folder `step-00000123` with safetensors files, `state.json` and, last, `manifest.json` (SHA-256 sums and
versions). It is written under a temporary name, every file and the folder synced, then renamed; older ones go only after
that. Opening one runs no code: tensors are safetensors, everything else is JSON.
"""

import hashlib
import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from dist_contrastive import __version__
from dist_contrastive.atomic import sync_folder, write_atomic, write_synced
from dist_contrastive.config import UserError

FORMAT = 3
MANIFEST = "manifest.json"
STATE = "state.json"
TEMPORARY = ".incomplete-"

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, in memory, on the CPU."""

    step: int
    path: Path
    tensors: dict[str, Tensors]
    """Per file (without ending): tensors by name."""
    state: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run: `root/step-XXXXXXXX`, of which the newest `keep` stay."""

    def __init__(self, root: Path, keep: int) -> None:
        self.root = root
        self.keep = keep

    def steps(self) -> list[int]:
        """The steps that have a committed checkpoint, oldest first; none of them verified."""
        numbers = (path.name.removeprefix("step-") for path in self.root.glob("step-*") if path.is_dir())
        return sorted(int(number) for number in numbers if number.isdecimal())

    def path(self, step: int) -> Path:
        return self.root / f"step-{step:08d}"

    def save(self, step: int, tensors: Mapping[str, Tensors], state: Mapping[str, Any]) -> Path:
        """Write a checkpoint and then let the oldest go, and any of a later step; returns its folder.

        A later one is what the run could not resume from: it did not verify, and must not count among those kept.
        Raises OSError when it cannot be written (a full disk, say); what was there before is untouched.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        for leftover in self.root.glob(f"{TEMPORARY}*"):
            shutil.rmtree(leftover)
        final = self.path(step)
        temporary = self.root / f"{TEMPORARY}{final.name}"
        temporary.mkdir()
        try:
            contents = {f"{name}.safetensors": _serialize(group) for name, group in tensors.items()}
            contents[STATE] = json.dumps(dict(state), indent=1).encode()
            manifest = {
                "format": FORMAT,
                "step": step,
                "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()},
                "versions": {
                    "dist_contrastive": __version__,
                    "torch": torch.__version__,
                    "accelerate": accelerate.__version__,
                    "numpy": np.__version__,
                },
            }
            for name, data in contents.items():
                write_synced(temporary / name, data)
            write_synced(temporary / MANIFEST, json.dumps(manifest, indent=1).encode())
            sync_folder(temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        replaced = self.root / f"{TEMPORARY}replaced-{final.name}"
        if final.exists():  # a checkpoint that did not verify, written again after resuming from an older one
            final.rename(replaced)
        temporary.rename(final)
        sync_folder(self.root)
        shutil.rmtree(replaced, ignore_errors=True)
        steps = self.steps()
        kept = [known for known in steps if known <= step][-self.keep :]
        for known in steps:
            if known not in kept:
                shutil.rmtree(self.path(known))
        return final

    def load(self, step: int) -> Checkpoint:
        """The checkpoint of `step`, verified. Raises `UserError` where it is missing or its bytes were altered."""
        path = self.path(step)
        if not path.is_dir():
            raise UserError(f"{self.root} has no checkpoint of step {step}; it has {self.steps() or 'none'}")
        try:
            manifest = json.loads((path / MANIFEST).read_bytes())
            sums = dict(manifest["sha256"])
            contents = {name: (path / name).read_bytes() for name in {STATE, *sums}}
            format_found, step_found = manifest["format"], manifest["step"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is incomplete ({error}); delete it to use an older checkpoint") from error
        if format_found != FORMAT:
            raise UserError(
                f"{path} has format {format_found}, this version reads {FORMAT}; use the version that wrote it"
            )
        if step_found != step:
            raise UserError(f"{path} says that it is of step {step_found}; delete it to use an older checkpoint")
        for name, data in contents.items():
            if hashlib.sha256(data).hexdigest() != sums.get(name):
                raise UserError(f"{path / name} was altered (its SHA-256 differs); delete {path} to use an older one")
        try:
            tensors = {
                name.removesuffix(".safetensors"): safetensors.torch.load(data)
                for name, data in contents.items()
                if name.endswith(".safetensors")
            }
        except safetensors.SafetensorError as error:
            raise UserError(f"{path} holds no safetensors ({error}); delete it to use an older checkpoint") from error
        return Checkpoint(step=step, path=path, tensors=tensors, state=json.loads(contents[STATE]))

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that verifies, with a warning for each newer one that does not; None if there is none."""
        for step in reversed(self.steps()):
            try:
                return self.load(step)
            except UserError as error:
                warnings.warn(f"skipping a bad checkpoint: {error}", stacklevel=2)
        return None


def _serialize(tensors: Tensors) -> bytes:
    return safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


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
    for number, (parameter, values) in enumerate(zip(parameters, rest, strict=True)):
        restored: dict[str, Any] = dict(values)
        prefix = f"{number}."
        for name, value in tensors.items():
            if not name.startswith(prefix):
                continue
            key = name.removeprefix(prefix)
            # AdamW keeps its step counter on the CPU, even where a parameter is a scalar as well.
            if value.shape == parameter.shape and key != "step":
                value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
            restored[key] = value
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
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    write_atomic(path, safetensors.torch.save(tensors, metadata=dict(metadata)))
