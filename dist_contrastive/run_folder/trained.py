"""What a run leaves for those who use it: its config, how it sees images, its weights. Whatever reads a run does so here."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from dist_contrastive.checkpoint import Checkpoint, CheckpointStore, Tensors, load_module, read_tensors, sha256_of
from dist_contrastive.config import TrainConfig, UserError, require
from dist_contrastive.data.eval_view import EvalView
from dist_contrastive.data.tokenizing import CaptionTokenizer, read_tokenizer
from dist_contrastive.methods import Method
from dist_contrastive.methods.image_text import ImageText
from dist_contrastive.run_folder.config import read_config
from dist_contrastive.run_folder.names import CHECKPOINTS, DONE, ENCODER, PROJECTOR, TEXT, TOKENIZER
from dist_contrastive.trainer import build_method

FILES = {"encoder": ENCODER, "projector": PROJECTOR, "text": TEXT}
"""Of a finished run, by what is in them: encoder (with timm's own names) and projector to use, which may be a teacher's, and the
text tower of an image-text run. These are the parts of a `TrainedRun`."""


@dataclass(frozen=True)
class TrainedRun:
    """A run and its weights, those that it ended with or those of one of its checkpoints. Its parts are named by `FILES`."""

    path: Path
    """Its folder."""
    config: TrainConfig
    step: int
    """After how many updates the weights are."""
    dataset_sha256: str
    """Of the dataset that it was trained on (`Manifest.identity`)."""
    source: Path
    """Where the weights lie: a file, or a checkpoint's folder."""
    tensors: Callable[[str], Tensors]
    """The weights of a part, on the CPU, by the names that they have in it; `UserError` where they can't be read. They are mapped
    from their file: take copies of what is to stay."""
    sha256: Callable[[str], str]
    """Of the file that a part's weights lie in."""

    @property
    def view(self) -> EvalView:
        return EvalView.of(self.config.data, self.config.augment)

    def untrained(self) -> Method:
        """The method as it was before the first step: its weights are a function of the config."""
        return build_method(self.config)

    def method(self) -> Method:
        """The method with its trained parts, on the CPU and frozen; whatever else it has is as before the first step."""
        method = self.untrained()
        self.load(method)
        return method.eval().requires_grad_(False)

    def load(self, method: Method) -> None:
        """Put the trained parts into a method of this run."""
        for part, module in parts_of(method).items():
            load_module(module, self.tensors(part))

    def tokenizer(self) -> CaptionTokenizer:
        """Of an image-text run's captions; `UserError` where it can't be read."""
        text = self.config.method.text_tower
        assert text is not None, "it learns from captions"
        return read_tokenizer(self.tokenizer_json(), max_tokens=text.context, name=str(self.path / TOKENIZER))

    def tokenizer_json(self) -> bytes:
        """The tokenizer's own JSON; `UserError` where it can't be read."""
        path = self.path / TOKENIZER
        require(path.is_file(), f"{self.path} has no {TOKENIZER}, which training writes at its end")
        return path.read_bytes()


def parts_of(method: Method) -> Mapping[str, nn.Module]:
    """The modules of a method that are used after training, under the names of `FILES`."""
    parts: dict[str, nn.Module] = {"encoder": method.exported.body, "projector": method.exported_projector}
    return parts | ({"text": method.text_tower} if isinstance(method, ImageText) else {})


def open_run(path: Path, *, checkpoint: int | None = None, or_newest: bool = False) -> TrainedRun:
    """The run in the folder `path`, with the weights of the checkpoint of that step, or without one those that it ended with.

    `or_newest`: of an unfinished run take its newest checkpoint. `UserError` where `path` is no run's folder, where there are no
    such weights, and where they are damaged.
    """
    config = read_config(path)
    store = CheckpointStore(path / CHECKPOINTS, keep=2)
    if checkpoint is None and or_newest and not (path / DONE).exists():
        newest = store.newest()
        require(newest is not None, f"{path} is neither finished nor has it a checkpoint")
        assert newest is not None
        return _of_checkpoint(path, config, newest)
    if checkpoint is not None:
        return _of_checkpoint(path, config, store.load(checkpoint))
    return _finished(path, config, store.steps())


def _finished(run: Path, config: TrainConfig, steps: list[int]) -> TrainedRun:
    hint = f"; --checkpoint {steps[-1]} takes its newest checkpoint" if steps else ""
    source = run / ENCODER
    require((run / DONE).exists() and source.is_file(), f"{run} holds no finished run{hint}")

    @contextmanager
    def reading(part: str) -> Iterator[Path]:
        path = run / FILES[part]
        try:
            yield path
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged ({error}){hint}") from error

    def tensors(part: str) -> Tensors:
        with reading(part) as path:
            return read_tensors(path)

    def sha256(part: str) -> str:
        with reading(part) as path:
            return sha256_of(path)

    with reading("encoder"), safe_open(source, framework="pt") as file:
        noted = file.metadata() or {}
    require(
        {"step", "dataset_sha256"} <= noted.keys(),
        f"{source} does not say on which dataset it was trained: an earlier version wrote it{hint}",
    )
    return TrainedRun(run, config, int(noted["step"]), noted["dataset_sha256"], source, tensors, sha256)


def _of_checkpoint(run: Path, config: TrainConfig, checkpoint: Checkpoint) -> TrainedRun:
    with torch.device("meta"):
        method = build_method(config)
    names = {id(tensor): name for name, tensor in method.state_dict(keep_vars=True).items()}
    parts, model = parts_of(method), checkpoint.tensors["model"]

    def tensors(part: str) -> Tensors:
        """A part's modules need not be one module of the method, nor be called in it as in the part."""
        own = {name: names[id(tensor)] for name, tensor in parts[part].state_dict(keep_vars=True).items()}
        return {name: model[there] for name, there in own.items() if there in model}

    return TrainedRun(
        run, config, checkpoint.step, checkpoint.state["dataset_sha256"], checkpoint.path,
        tensors, lambda part: checkpoint.sha256["model.safetensors"],
    )  # fmt: skip
