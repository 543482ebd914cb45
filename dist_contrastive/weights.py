"""Weights of another run or of a file, for a run that starts from them."""

import argparse
import hashlib
import io
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from dist_contrastive.checkpoint import Tensors
from dist_contrastive.config import EncoderConfig, UserError, require
from dist_contrastive.methods import Method
from dist_contrastive.methods.image_text import ImageText
from dist_contrastive.models.teacher import Teacher
from dist_contrastive.run_folder.names import CHECKPOINTS
from dist_contrastive.run_folder.trained import open_run

MAX_NAMED = 3
"""How many names of a kind a message lists."""
SAVED_BY_TORCH = (b"PK\x03\x04", b"\x80")
"""How files of `torch.save` begin: an archive's first bytes, or, before torch 1.6, a pickle's."""


@dataclass(frozen=True)
class Weights:
    """What `--from` names, in memory, on the CPU."""

    path: Path
    tensors: Tensors
    """By dotted names, in the order of the file (of the alphabet, if it is safetensors): an encoder's, perhaps behind a prefix
    and with others beside them."""
    projector: Tensors | None
    """The projector's, where the source is a run of this package."""
    sha256: tuple[str, ...]
    """Of the files, in the order in which they were read: the encoder's, the projector's if that has its own."""


def read_weights(source: Path) -> Weights:
    """The weights of a run's folder, of one of its checkpoints, or of a file.

    A finished run gives its last weights, an unfinished one those of its newest checkpoint. Files are safetensors, or what
    `torch.save` wrote, of which tensors alone are read: opening one runs no code. `UserError` where there are no weights.
    """
    if not source.is_dir():
        data = _read(source)
        return Weights(source, dict(_flatten(_parse(source, data))), None, (_sha256(data),))
    is_checkpoint = source.name.removeprefix("step-").isdecimal() and source.absolute().parent.name == CHECKPOINTS
    try:
        run = (
            open_run(source.absolute().parents[1], checkpoint=int(source.name.removeprefix("step-")))
            if is_checkpoint
            else open_run(source, or_newest=True)
        )
        encoder, projector = (dict(run.tensors(part)) for part in ("encoder", "projector"))
        sums = tuple(dict.fromkeys(run.sha256(part) for part in ("encoder", "projector")))
    except UserError as error:
        raise UserError(
            f"--from {source}: {error}; give a run's folder, one of its checkpoints, or a file of weights"
        ) from error
    return Weights(run.source, encoder, projector, sums)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"--from: {path} can't be read ({error.strerror})") from error


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _parse(path: Path, data: bytes) -> Any:
    """The file's tensors by name, perhaps nested and among other things; what it is, its first bytes say."""
    is_safetensors = data[8:9] == b"{"  # the header is JSON, after its length
    require(
        is_safetensors or data.startswith(SAVED_BY_TORCH),
        f"--from {path}: neither safetensors nor a file of torch.save; give a run's folder, one of its checkpoints, or a file of "
        "weights",
    )
    try:
        if is_safetensors:
            return dict(sorted(safetensors.torch.load(data).items()))  # which come in no order
        # timm's checkpoints hold the command line that made them, plain values in a Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"--from {path}: it holds more than tensors and plain values, and opening that could run code; save its "
            "state_dict alone"
        ) from error
    except Exception as error:  # of whatever kind damaged bytes provoke
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"--from {path}: neither safetensors nor a file of torch.save ({reason})") from error


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested dicts, by dotted names."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _flatten(item, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(value, Tensor):
        yield prefix, value


def start_from(method: Method, weights: Weights) -> str:
    """Load the weights into the method's encoder, and into its projector where they fit; teachers become its copies.

    Which prefix the names have in the file ("state_dict.module.backbone.") is found by where the encoder's own names are;
    of several such places (a student and its teacher) the first is taken. Only a classifier may be left over.
    Returns a line that says what was taken; `UserError` where the encoder does not match, with each name that does not.
    """
    config, body = method.encoder.config, method.encoder.body
    own = body.state_dict()
    prefix = _prefix(own, weights.tensors)
    found = {name.removeprefix(prefix): t for name, t in weights.tensors.items() if name.startswith(prefix)}
    classifier = _classifier(config, body)
    left_over = [name for name in found if name not in own]
    # Files of older versions of torch lack this count, which nothing reads.
    missing = [name for name in own if name not in found and not name.endswith(".num_batches_tracked")]
    unexpected = [name for name in left_over if not name.startswith(classifier)]
    shapes = [
        f"{name} {list(found[name].shape)}, here {list(own[name].shape)}"
        for name in own
        if name in found and found[name].shape != own[name].shape
    ]
    wrong = [
        f"{kind} {_some(names)}"
        for kind, names in (("missing:", missing), ("of another shape:", shapes), ("unexpected:", unexpected))
        if names
    ]
    require(
        not wrong,
        f"--from {weights.path}: these are not the weights of --encoder.name {config.name} --encoder.stem {config.stem} "
        f"--encoder.norm {config.norm}; {'; '.join(wrong)}",
    )
    body.load_state_dict({**own, **{name: found[name] for name in own if name in found}})
    projector = "new projector"
    if weights.projector is not None and _fits(method.projector, weights.projector):
        method.projector.load_state_dict(weights.projector)
        projector = "its projector, too"
    if isinstance(method, ImageText):  # another dataset's tokens need not mean the same
        projector += ", new text tower"
    for module in method.modules():
        if isinstance(module, Teacher):
            module.copy(method.encoder, method.projector)
    at = f" (names after {prefix})" if prefix else ""
    without = f"; left out: {_some(left_over)}" if left_over else ""
    return f"starts from {weights.path}: encoder{at}, {projector}{without}; sha256 {weights.sha256[0][:12]}"


def _prefix(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """What stands before the encoder's names in the file: the prefix with most of them, the first of equals."""
    counts: dict[str, int] = {}
    last_parts = {name.rpartition(".")[2] for name in own}
    for name in found:
        parts = name.split(".")
        if parts[-1] not in last_parts:
            continue
        for cut in range(len(parts)):
            if ".".join(parts[cut:]) in own:
                prefix = "".join(f"{part}." for part in parts[:cut])
                counts[prefix] = counts.get(prefix, 0) + 1
    return max(counts, key=lambda prefix: counts[prefix], default="")


def _classifier(config: EncoderConfig, body: nn.Module) -> tuple[str, ...]:
    """The start of the names that a timm model of this name has for its classifier, which encoders are built without."""
    with torch.device("meta"):
        whole = timm.create_model(config.name, pretrained=False)
    own = {name for name, _ in body.named_parameters()}
    names = [name for name, _ in whole.named_parameters() if name not in own]
    return tuple({f"{name.rpartition('.')[0]}." for name in names if "." in name})


def _fits(module: nn.Module, tensors: Tensors) -> bool:
    return {name: t.shape for name, t in module.state_dict().items()} == {name: t.shape for name, t in tensors.items()}


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return f"{', '.join(names[:MAX_NAMED])}{more}"
