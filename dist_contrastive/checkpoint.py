"""The run's complete state on disk: written atomically, verified when read.

A checkpoint is a folder `step-00000123` with safetensors files, `state.json` and, last, `manifest.json` (SHA-256 sums and
versions). It is written under a temporary name, every file and the folder synced, then renamed; older ones go only after
that. Opening one runs no code: tensors are safetensors, everything else is JSON.

What can't be read is never deleted: a run that goes on from an older checkpoint sets the newer ones aside, and where none
can be read it does not start.
"""

import hashlib
import itertools
import json
import re
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
from dist_contrastive.config import UserError, require

FORMAT = 3
MANIFEST = "manifest.json"
STATE = "state.json"
TEMPORARY = ".incomplete-"
ASIDE = "set-aside-"

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, in memory, on the CPU."""

    step: int
    path: Path
    tensors: dict[str, Tensors]
    """Per file (without ending): tensors by name."""
    state: dict[str, Any]


class Damaged(UserError):
    """A checkpoint whose bytes are gone or altered for good."""


class CheckpointStore:
    """The checkpoints of one run: `root/step-XXXXXXXX`, of which the newest `keep` stay."""

    def __init__(self, root: Path, keep: int) -> None:
        self.root = root
        self.keep = keep
        self._skipped: list[int] = []

    def _names(self) -> list[str]:
        """What lies in the folder; `UserError` where it can't be listed, which is not the same as empty."""
        try:
            return sorted(path.name for path in self.root.iterdir())
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not self.root.is_symlink():
                return []
            raise UserError(f"{self.root} can't be read ({error.strerror}); is its disk there?") from error

    def steps(self) -> list[int]:
        """The steps that have a committed checkpoint, oldest first; none of them verified."""
        return sorted(int(name.removeprefix("step-")) for name in self._names() if re.fullmatch(r"step-\d{8,}", name))

    def path(self, step: int) -> Path:
        return self.root / f"step-{step:08d}"

    def save(self, step: int, tensors: Mapping[str, Tensors], state: Mapping[str, Any]) -> Path:
        """Write a checkpoint and then let the oldest go; returns its folder.

        Those that `newest` skipped and any of a later step did not verify, and must not count among those kept. They are
        set aside under another name: another version or a mended disk may read them still.
        Raises OSError when it cannot be written (a full disk, say); what was there before is untouched.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        for leftover in self.root.glob(f"{TEMPORARY}step-*"):
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
        for other in self.steps():
            if other in self._skipped or other >= step:
                self._set_aside(other)
        self._skipped = []
        temporary.rename(final)
        sync_folder(self.root)
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.path(old))
        return final

    def _set_aside(self, step: int) -> None:
        name = f"{ASIDE}{self.path(step).name}"
        names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        self.path(step).rename(next(free for free in map(self.root.joinpath, names) if not free.exists()))

    def load(self, step: int) -> Checkpoint:
        """The checkpoint of `step`, verified.

        Raises `Damaged` where it is incomplete or its bytes were altered, another `UserError` where it is missing, of another
        format, or where the disk does not give its bytes now.
        """
        path = self.path(step)
        steps = self.steps()
        require(step in steps, f"{self.root} has no checkpoint of step {step}; it has {steps or 'none'}")
        manifest = _read(path / MANIFEST)
        try:
            facts = dict(json.loads(manifest))
            format_found = facts["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise Damaged(f"{path} is incomplete (no manifest: {error})") from error
        # Of another format nothing else is known, not even where it has its versions.
        versions = facts.get("versions")
        version = versions.get("dist_contrastive") if isinstance(versions, dict) else None
        require(
            format_found == FORMAT,
            f"{path} has format {json.dumps(format_found)}, and this version reads {FORMAT}: the version that wrote it "
            f"({version or 'unknown'}) can",
        )
        try:
            sums, step_found = dict(facts["sha256"]), facts["step"]
        except (ValueError, KeyError, TypeError) as error:
            raise Damaged(f"{path} is incomplete (no manifest: {error})") from error
        present = {tensors.name for tensors in path.glob("*.safetensors")}
        contents = {name: _read(path / name) for name in {STATE, *present, *sums}}
        if step_found != step:
            raise Damaged(f"{path} says that it is of step {step_found}")
        for name, data in contents.items():
            if hashlib.sha256(data).hexdigest() != sums.get(name):
                raise Damaged(f"{path / name} was altered (its SHA-256 differs)")
        try:
            tensors = {
                name.removesuffix(".safetensors"): safetensors.torch.load(data)
                for name, data in contents.items()
                if name.endswith(".safetensors")
            }
        except safetensors.SafetensorError as error:
            raise Damaged(f"{path} holds no safetensors ({error})") from error
        try:
            state = dict(json.loads(contents[STATE]))
        except (ValueError, TypeError) as error:
            raise Damaged(f"{path / STATE} is not what a run writes ({error})") from error
        return Checkpoint(step=step, path=path, tensors=tensors, state=state)

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that verifies; None if there never was one.

        Newer ones that are damaged get a warning, and the next `save` sets them aside. One that another version or another
        hour might read (another format, no permission, an error of the disk or the network) is not passed over: an older
        one in its place would throw away work that is still there, and nobody would know. `UserError` then, and where
        there are checkpoints, or what is left of some, and none can be read.
        """
        failed: dict[int, UserError] = {}
        found = None
        for step in reversed(self.steps()):
            try:
                found = self.load(step)
                break
            except UserError as error:
                failed[step] = error
        reasons = "; ".join(map(str, failed.values()))
        if found is None:
            rest = [name for name in self._names() if re.match(rf"step-|{ASIDE}|{TEMPORARY}replaced-", name)]
            require(
                not rest,
                f"{self.root} holds checkpoints and none can be used: {reasons or ', '.join(rest)}; nothing was changed; "
                "put back what is missing, or start anew with another --run-dir, or with --overwrite, which deletes them",
            )
            return None
        require(
            all(isinstance(error, Damaged) for error in failed.values()),
            f"the newest checkpoint can't be read now: {reasons}; nothing was changed; mend that, or move "
            f"{' and '.join(self.path(step).name for step in failed)} elsewhere to go on from step {found.step}",
        )
        for step, reason in failed.items():
            warnings.warn(
                f"skipping a bad checkpoint: {reason}; going on from step {found.step}; the next checkpoint sets it aside "
                f"as {self.root / ASIDE}{self.path(step).name}",
                stacklevel=2,
            )
        self._skipped = list(failed)
        return found


def _read(path: Path) -> bytes:
    """A file of a checkpoint. `Damaged` where it is not there, another `UserError` where the disk does not give it."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise Damaged(f"{path.parent} is incomplete ({path.name}: {error.strerror})") from error
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror})") from error


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
