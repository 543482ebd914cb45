"""Scoring the encoder of a run again, one of its checkpoints, or either on another dataset, without training.

What training measured stays what the run's folder says of it: `probe.json`, which the report shows, is written here only
where training left none. Every other score has a file of its own in `probes/`, named by what was scored and on what:
`step-XXXXXXXX.json` on the run's own dataset, `transfer-NAME-SHA256.json` on another one (the finished encoder), and
`transfer-NAME-SHA256-step-XXXXXXXX.json` (a checkpoint). The run's own dataset is the file with the checksum that the
weights were trained on, wherever it lies.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from dist_contrastive.atomic import write_atomic, writing
from dist_contrastive.batch import Share, steps_per_epoch
from dist_contrastive.config import require
from dist_contrastive.data.beton import Dataset, open_dataset
from dist_contrastive.data.compiled import announced_compilation
from dist_contrastive.data.resident import loader_of
from dist_contrastive.evaluation.scorer import Scorer
from dist_contrastive.preflight import device_for_use
from dist_contrastive.progress import print_scores
from dist_contrastive.run_folder.names import PROBE, PROBES
from dist_contrastive.run_folder.trained import TrainedRun, open_run

SUM_DIGITS = 12
"""Of a dataset's SHA-256, how many name a file."""


def probe(
    run: Path, *, checkpoint: int | None, data: Path | None, device_name: Literal["auto", "cpu", "cuda"]
) -> dict[str, Any]:
    """Score the encoder of the run in folder `run`, write the scores there and return them; the options are the command's."""
    trained = open_run(run, checkpoint=checkpoint)
    config = trained.config
    device = torch.device(device_for_use(device_name))
    dataset = open_dataset(data or config.data.path)
    reads_captions = _reads_captions(trained, dataset)
    require(
        dataset.manifest.has_labels or reads_captions,
        f"{dataset.path} {dataset.manifest.describe_labels()}, and probes need some: give a dataset that has with --data",
    )
    transfers = dataset.manifest.identity != trained.dataset_sha256
    require(
        not transfers or data is not None,
        f"{dataset.path} is no longer the dataset that {run} was trained on (its SHA-256 differs): --data PATH names where "
        f"that lies now; --data {dataset.path} scores on this one, as a transfer",
    )
    method = trained.untrained()
    read = replace(config, data=replace(config.data, resident=False))  # each image is seen once
    with announced_compilation(print), loader_of(read, dataset, Share(config.batch.size), device) as loader:
        # A k that was given was given for the run's own classes.
        settings = replace(config.probe, knn_k=0) if transfers else config.probe
        scorer = Scorer(loader, probe=settings, device=device, has_towers=reads_captions)
        baselines = scorer.baselines(method)  # not trained yet
        trained.load(method)
        entry: dict[str, Any] = {"step": trained.step, **scorer.score(method)}
    if not transfers:
        entry = {"epoch": trained.step / steps_per_epoch(dataset.manifest.num_train, config.batch.size), **entry}
    is_result = checkpoint is None and not transfers and not (run / PROBE).exists()
    path = run / (PROBE if is_result else f"{PROBES}/{_name(trained, dataset, checkpoint, transfers)}.json")
    if is_result:
        scores = scorer.summary(baselines, [entry])
    else:
        scores = {**entry, **baselines, "dataset": str(dataset.path), "protocol": scorer.protocol()}
    with writing(path, lambda: "the same command scores it again"):
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, json.dumps(scores, indent=1).encode())
    print_scores(scores)
    print(f"written to {path}{'; report.html was made before and has no scores' if is_result else ''}")
    return scores


def _reads_captions(trained: TrainedRun, dataset: Dataset) -> bool:
    """Whether the run has a text tower to which the dataset's captions mean something: they came from the same tokenizer."""
    if trained.config.method.text_tower is None or dataset.captions is None:
        return False
    return (
        dataset.manifest.identity == trained.dataset_sha256
        or dataset.captions.tokenizer_json == trained.tokenizer_json()
    )


def _name(trained: TrainedRun, dataset: Dataset, checkpoint: int | None, transfers: bool) -> str:
    """The name, without ending, of the file in `probes/`."""
    parts = []
    if transfers:
        parts += ["transfer", re.sub(r"[^\w.-]+", "_", dataset.path.stem), dataset.manifest.identity[:SUM_DIGITS]]
    if checkpoint is not None or not transfers:
        parts.append(f"step-{trained.step:08d}")
    return "-".join(parts)
