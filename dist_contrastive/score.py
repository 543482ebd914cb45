"""Scoring the encoder of a run again, or of one of its checkpoints, without training."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from dist_contrastive.atomic import write_atomic
from dist_contrastive.checkpoint import CheckpointStore, Tensors, load_module
from dist_contrastive.config import TrainConfig, UserError, require
from dist_contrastive.data.beton import open_dataset
from dist_contrastive.data.loader import announced_compilation, fair_threads
from dist_contrastive.evaluation.protocol import ProbeRunner
from dist_contrastive.progress import print_scores
from dist_contrastive.trainer import build_method


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


def probe(
    run: Path, config: TrainConfig, *, checkpoint: int | None, data: Path | None, device_name: str
) -> dict[str, Any]:
    """Score the encoder of the run in folder `run`, write the scores there and return them.

    `config` is the run's; the options are those of the command.
    """
    tensors, step = encoder_tensors(run, checkpoint)
    require(device_name != "cuda" or torch.cuda.is_available(), "--device cuda: torch sees no CUDA device here")
    on_gpu = device_name != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    dataset = open_dataset(data or config.data.path)
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
    with announced_compilation(print):
        baselines = runner.baselines(encoder)  # not trained yet: its weights are a function of the config
    load_module(encoder, tensors)
    steps_per_epoch = dataset.manifest.num_train // config.batch.size
    done: dict[str, float] = {"epoch": config.epochs, "step": config.epochs * steps_per_epoch}
    if step is not None:
        done = {"epoch": step / steps_per_epoch, "step": step}
    path = run / ("probe.json" if step is None else f"probes/step-{step:08d}.json")
    path.parent.mkdir(exist_ok=True)
    earlier = json.loads(path.read_bytes())["history"] if step is None and path.is_file() else []
    history = [*(entry for entry in earlier if entry["step"] != done["step"]), {**done, **runner.score(encoder)}]
    scores = runner.summary(baselines, history)
    write_atomic(path, json.dumps(scores, indent=1).encode())
    print_scores(scores)
    print(f"written to {path}")
    return scores
