"""`python -m dist_contrastive.probe RUN [--checkpoint STEP]`: score the encoder of a run, without training.

A finished run's encoder is scored as training scored it and `probe.json` is written anew; a checkpoint's scores go to
`probes/step-XXXXXXXX.json`.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
import torch
import tyro
from safetensors import SafetensorError

from dist_contrastive import cli
from dist_contrastive.atomic import write_atomic
from dist_contrastive.checkpoint import CheckpointStore, Tensors, load_module
from dist_contrastive.config import MethodConfig, TrainConfig, UserError, from_dict, require
from dist_contrastive.data.beton import open_dataset
from dist_contrastive.data.loader import fair_threads
from dist_contrastive.evaluation.protocol import ProbeRunner
from dist_contrastive.methods import METHODS
from dist_contrastive.progress import print_scores
from dist_contrastive.trainer import build_method

PROG = "python -m dist_contrastive.probe"


@dataclass(frozen=True)
class ProbeCommand:
    run: Annotated[Path, tyro.conf.Positional]
    """A run's folder."""
    checkpoint: int | None = None
    """Score this step's checkpoint instead of the finished encoder."""
    data: Path | None = None
    """The packed dataset, where it is no longer at the path of the run's config."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


def read_config(run: Path) -> TrainConfig:
    """The config of a run's folder; `UserError` where there is none that this version reads."""
    path = run / "config.json"
    require(path.is_file(), f"{run} is no run's folder: it has no config.json")
    try:
        data = json.loads(path.read_bytes())
        name = data["method"]["name"]
        require(name in METHODS, f"{path} names method {name}; this version has {', '.join(METHODS)}")
        method: type[MethodConfig] = METHODS[name].Config
        config: TrainConfig = from_dict(TrainConfig, data, method)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a config that training wrote ({error})") from error
    return config


def encoder_tensors(run: Path, checkpoint: int | None) -> tuple[Tensors, int | None]:
    """The encoder's state of a finished run, or of one of its checkpoints, and the step (None: the end of the run)."""
    if checkpoint is not None:
        model = CheckpointStore(run / "checkpoints", keep=2).load(checkpoint).tensors["model"]
        prefix = "encoder."
        return {name.removeprefix(prefix): t for name, t in model.items() if name.startswith(prefix)}, checkpoint
    path = run / "encoder.safetensors"
    steps = CheckpointStore(run / "checkpoints", keep=2).steps()
    hint = f"; --checkpoint {steps[-1]} scores its newest checkpoint" if steps else ""
    require((run / "DONE").exists() and path.is_file(), f"{run} holds no finished run{hint}")
    try:
        return safetensors.torch.load(path.read_bytes()), None
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}){hint}") from error


def probe(command: ProbeCommand) -> dict[str, Any]:
    """Score the encoder that `command` names, write the scores into the run's folder and return them."""
    config = read_config(command.run)
    tensors, step = encoder_tensors(command.run, command.checkpoint)
    require(command.device != "cuda" or torch.cuda.is_available(), "--device cuda: torch sees no CUDA device here")
    on_gpu = command.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    dataset = open_dataset(command.data or config.data.path)
    runner = ProbeRunner(
        dataset,
        data=config.data,
        augment=config.augment,
        probe=config.probe,
        seed=config.seed,
        device=device,
        threads=fair_threads(config.data.threads, local_ranks=1),
    )
    encoder = build_method(config).encoder.to(device)
    baselines = runner.baselines(encoder)  # not trained yet: its weights are a function of the config
    load_module(encoder, tensors)
    steps_per_epoch = dataset.manifest.num_train // config.batch.size
    done: dict[str, float] = {"epoch": config.epochs, "step": config.epochs * steps_per_epoch}
    if step is not None:
        done = {"epoch": step / steps_per_epoch, "step": step}
    path = command.run / ("probe.json" if step is None else f"probes/step-{step:08d}.json")
    path.parent.mkdir(exist_ok=True)
    earlier = json.loads(path.read_bytes())["history"] if step is None and path.is_file() else []
    history = [*(entry for entry in earlier if entry["step"] != done["step"]), {**done, **runner.score(encoder)}]
    scores = runner.summary(baselines, history)
    write_atomic(path, json.dumps(scores, indent=1).encode())
    print_scores(scores)
    print(f"written to {path}")
    return scores


def main(argv: Sequence[str] | None = None) -> None:
    probe(cli.parse(ProbeCommand, argv, prog=PROG))


if __name__ == "__main__":
    sys.exit(cli.main_guard(main))
