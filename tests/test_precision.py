"""Training in lower precision: bf16 on the CPU, and on a GPU bf16, fp16 with loss scaling, and SyncBatchNorm at one rank."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_contrastive.config import LaunchConfig
from dist_contrastive.metrics import read_metrics
from tests.harness import run_ranks
from tests.runs import losses_of, newest_checkpoint, tiny_config, train_on_rank, write_dataset


def test_bf16_follows_fp32(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path)
    config = tiny_config(tmp_path / "fp32", dataset, stop_after_steps=8)
    run_ranks(train_on_rank, 1, config)
    low = replace(config, run_dir=tmp_path / "bf16", launch=LaunchConfig(precision="bf16"))
    run_ranks(train_on_rank, 1, low)
    losses = losses_of(low.run_dir)
    assert losses != losses_of(config.run_dir), "autocast was on"
    np.testing.assert_allclose(losses, losses_of(config.run_dir), rtol=0.05)
    assert newest_checkpoint(low.run_dir).state["precision"] == "bf16"
    assert all(t.dtype != torch.bfloat16 for t in newest_checkpoint(low.run_dir).tensors["model"].values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("norm", ["batch", "sync"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_gpu_follows_the_cpu(precision: str, norm: str, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path)
    common = [
        "photos", "--data.path", str(dataset), "--batch.global", "16", "--data.image-size", "16", "--probe.no-enabled",
        "--log-every", "1",
        "--stop-after-steps", "8",
    ]  # fmt: skip

    def losses(name: str, *options: str) -> list[float]:
        command = [sys.executable, "-m", "dist_contrastive.train", *common, "--run-dir", str(tmp_path / name), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 75, done.stderr
        return [line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl")]

    on_gpu = losses("gpu", "--launch.device", "cuda", "--launch.precision", precision, "--encoder.norm", norm)
    np.testing.assert_allclose(on_gpu, losses("cpu", "--launch.device", "cpu"), rtol=0.05)
