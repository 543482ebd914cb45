"""Tiny runs for tests: a packed dataset of small pictures, a config over it, and what a run left behind."""

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dist_contrastive import cli
from dist_contrastive.checkpoint import Checkpoint, CheckpointStore, save_module
from dist_contrastive.config import (
    AugmentConfig,
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EncoderConfig,
    HeadConfig,
    OptimConfig,
    ProbeConfig,
    TrainConfig,
    UserError,
    ViewConfig,
    to_dict,
)  # fmt: skip
from dist_contrastive.data.beton import open_dataset
from dist_contrastive.data.captions import CaptionOptions
from dist_contrastive.methods import Method
from dist_contrastive.methods.simclr import SimCLRConfig
from dist_contrastive.metrics import read_metrics
from dist_contrastive.run import train
from dist_contrastive.run_folder.names import CONFIG, DONE, TOKENIZER
from dist_contrastive.run_folder.trained import FILES, parts_of
from dist_contrastive.trainer import build_method
from tests.betons import picture, write_beton

NUM_TRAIN, NUM_TEST, GLOBAL_BATCH = 100, 30, 16
STEPS_PER_EPOCH = NUM_TRAIN // GLOBAL_BATCH
TIMES = {"images_per_s", "step_time_ms", "loader_wait_ms", "peak_memory_mib"}
"""Metrics that differ from run to run."""


CAPTIONS = CaptionOptions(max_tokens=9, vocabulary=300)


def write_dataset(folder: Path, *, num_classes: int = 3, captions: bool = False) -> Path:
    images = [picture(20, 20 + seed % 5, seed) for seed in range(NUM_TRAIN + NUM_TEST)]
    return write_beton(
        folder / "tiny.beton",
        images,
        num_test=NUM_TEST,
        num_classes=num_classes,
        captions=CAPTIONS if captions else None,
    )


def tiny_config(run_dir: Path, dataset: Path, *, norm: str = "batch", **changes: Any) -> TrainConfig:
    """SimCLR with dropout and every augmentation, a few seconds on one core; probing is off."""
    config = TrainConfig(
        recipe="tiny",
        run_dir=run_dir,
        epochs=4,
        log_every=1,
        method=SimCLRConfig(temperature=0.2, projector=HeadConfig(hidden_size=32, output_size=16)),
        data=DataConfig(path=dataset, image_size=16, timeout_s=60.0),
        augment=AugmentConfig((ViewConfig(blur=1.0), ViewConfig(blur=0.1, solarize=0.2))),
        encoder=EncoderConfig(name="resnet10_w16", stem="small", norm=norm, dropout=0.1),  # type: ignore[arg-type]
        batch=BatchConfig(size=GLOBAL_BATCH),
        optim=OptimConfig(learning_rate=1e-2, warmup_epochs=1, clip_norm=1.0),
        probe=ProbeConfig(enabled=False),
        checkpoint=CheckpointConfig(every=1),
    )
    return replace(config, **changes)


def train_on_rank(rank: int, config: TrainConfig) -> bool:
    """`train(config)` for `harness.run_ranks`."""
    return train(config)


class Outcome(NamedTuple):
    """How a rank's run ended."""

    status: int
    """Its exit status."""
    error: str
    """The text of the user's error; empty without one."""
    output: str
    """What stood on stderr."""


def outcome_on_rank(rank: int, config: TrainConfig) -> Outcome:
    """`train(config)` as a command runs it, for `harness.run_ranks`."""
    errors, output = [], io.StringIO()

    def run() -> None:
        try:
            train(config)
        except UserError as error:
            errors.append(str(error))
            raise

    with contextlib.redirect_stderr(output):
        status = cli.main_guard(run)
    return Outcome(status, "".join(errors), output.getvalue())


def assert_one_line(outcomes: list[Outcome], *words: str) -> None:
    """All ranks were refused with one line that has all `words`, and rank 0 alone printed it."""
    for status, error, output in outcomes:
        assert status == 2
        assert error
        assert "\n" not in error
        assert "Traceback" not in output
        assert "Exception in thread" not in output
        for word in words:
            assert word in error
    assert outcomes[0].output.count("error: ") == 1


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what is measured by the clock."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(run_dir / "metrics.jsonl")]


def losses_of(run_dir: Path) -> list[float]:
    return [line["loss"] for line in metrics_of(run_dir) if "loss" in line]


def newest_checkpoint(run_dir: Path) -> Checkpoint:
    checkpoint = CheckpointStore(run_dir / "checkpoints", keep=2).newest()
    assert checkpoint is not None
    return checkpoint


def assert_same_state(one: Checkpoint, other: Checkpoint) -> None:
    """Equal bit for bit: model, optimizer and everything else but paths and times."""
    assert one.step == other.step
    assert one.tensors.keys() == other.tensors.keys()
    for group, tensors in one.tensors.items():
        assert tensors.keys() == other.tensors[group].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, other.tensors[group][name]), f"{group}: {name}"
    for name in one.state.keys() | other.state.keys():
        if name not in ("config", "extra"):
            assert one.state[name] == other.state[name], name
    assert one.state["extra"]["scores"] == other.state["extra"]["scores"]


def leave_untrained(config: TrainConfig) -> Method:
    """What a finished run of `config` leaves for others to use, without the training; returns its method."""
    dataset = open_dataset(config.data.path)
    method = build_method(config)
    config.run_dir.mkdir()
    (config.run_dir / CONFIG).write_text(json.dumps(to_dict(config)))
    for part, module in parts_of(method).items():
        save_module(config.run_dir / FILES[part], module, {"step": "0", "dataset_sha256": dataset.manifest.identity})
    if dataset.captions is not None:
        (config.run_dir / TOKENIZER).write_bytes(dataset.captions.tokenizer_json)
    (config.run_dir / DONE).touch()
    return method.eval()
