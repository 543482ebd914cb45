"""The two logs of a run: one JSON object a line, the same in TensorBoard, and no step twice after a resume."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from dist_contrastive.metrics import MetricsLog, StepTimer, TimeSplit, read_metrics


def log_of(folder: Path, resumed_after: int = 0, probed: tuple[int, ...] = ()) -> MetricsLog:
    return MetricsLog(folder, resumed_after, lambda: "it goes on", probed)


def write_steps(folder: Path, resumed_after: int, steps: range, loss: float) -> None:
    log = log_of(folder, resumed_after)
    for step in steps:
        log.write(step, step // 4, {"loss": loss + step, "step_time_ms": 0.1})
    log.close()


def tensorboard(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_lines_are_json_and_tensorboard_has_the_same_numbers(tmp_path: Path) -> None:
    write_steps(tmp_path, 0, range(1, 4), 0.5)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": s, "epoch": 0, "loss": 0.5 + s, "step_time_ms": 0.1} for s in (1, 2, 3)]
    assert read_metrics(tmp_path / "metrics.jsonl") == lines
    assert tensorboard(tmp_path, "loss") == [(1, 1.5), (2, 2.5), (3, 3.5)]


def test_a_line_is_on_disk_once_it_is_written(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    log.write(1, 0, {"loss": 1.0})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "epoch": 0, "loss": 1.0}]
    log.close()


def test_after_a_resume_no_step_stands_twice(tmp_path: Path) -> None:
    write_steps(tmp_path, 0, range(1, 8), 0.0)
    write_steps(tmp_path, 4, range(5, 7), 100.0)
    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 105.0), (6, 106.0)]
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path / "metrics.jsonl")] == expected
    assert tensorboard(tmp_path, "loss") == expected


def test_a_fresh_start_in_an_old_folder_begins_anew(tmp_path: Path) -> None:
    write_steps(tmp_path, 0, range(1, 8), 0.0)
    write_steps(tmp_path, 0, range(1, 3), 50.0)
    assert [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [51.0, 52.0]


def test_a_half_line_of_a_killed_run_is_left_out_and_written_over(tmp_path: Path) -> None:
    write_steps(tmp_path, 0, range(1, 4), 0.0)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    write_steps(tmp_path, 3, range(4, 5), 0.0)
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 4]


@pytest.mark.parametrize("damage", [b"\0" * 40, b"\xbc\xff{", b"[2]", b'{"loss": 1.0}', b"7", b""])
def test_lines_behind_a_damaged_one_are_kept(tmp_path: Path, damage: bytes) -> None:
    write_steps(tmp_path, 0, range(1, 6), 0.0)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], damage, *lines[2:], b""]))
    write_steps(tmp_path, 4, range(5, 7), 0.0)
    assert [line["step"] for line in read_metrics(path)] == [1, 3, 4, 5, 6]


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    log.write(1, 0, {"loss": math.nan, "grad_norm": math.inf, "step_time_ms": 2.0})
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "epoch": 0, "loss": null, "grad_norm": null, "step_time_ms": 2.0}\n'


PROBE: dict[str, Any] = {"linear_top1": 0.75, "knn_top1": 0.5, "linear_converged": True, "linear_per_class": [0.5, 1.0]}


def test_a_probes_numbers_follow_their_step_in_both_logs(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    log.write(4, 0, {"loss": 1.0})
    log.write_probe(4, 0, PROBE)
    log.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 4, "epoch": 0, "loss": 1.0},
        {"step": 4, "epoch": 0, "probe/linear_top1": 0.75, "probe/knn_top1": 0.5},
    ]
    assert tensorboard(tmp_path, "probe/linear_top1") == [(4, 0.75)]


@pytest.mark.parametrize(("probed", "left"), [((), 1), ((4,), 2)])
def test_a_probe_that_the_run_has_forgotten_leaves_the_log(tmp_path: Path, probed: tuple[int, ...], left: int) -> None:
    """The last probe comes after the checkpoint of its step: a run that is resumed between the two probes again."""
    log = log_of(tmp_path)
    log.write(4, 0, {"loss": 1.0})
    log.write_probe(4, 0, PROBE)
    log.close()
    log_of(tmp_path, 4, probed).close()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == left


def test_tensorboard_gets_config_and_pictures_without_a_second_run(tmp_path: Path) -> None:
    (tmp_path / "plots").mkdir()
    Image.fromarray(np.full((6, 8, 3), 7, np.uint8)).save(tmp_path / "plots" / "loss.png")
    log = log_of(tmp_path)
    log.write_probe(4, 0, PROBE)
    log.conclude(4, {"seed": 3, "augment.flip": [0.5], "encoder.name": "resnet18", "nothing": None}, tmp_path / "plots")
    log.close()
    assert [path for path in (tmp_path / "tensorboard").iterdir() if path.is_dir()] == []
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (picture,) = events.Images("report/loss")
    assert (picture.step, picture.width, picture.height) == (4, 8, 6)
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    found = HParamsPluginData.FromString(content).session_start_info.hparams
    assert (found["seed"].number_value, found["encoder.name"].string_value) == (3, "resnet18")
    assert found["augment.flip"].string_value == "[0.5]"
    content = events.SummaryMetadata("_hparams_/experiment").plugin_data.content
    names = {metric.name.tag for metric in HParamsPluginData.FromString(content).experiment.metric_infos}
    assert names == {"probe/linear_top1", "probe/knn_top1"}


def test_each_moment_belongs_to_one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 103.0, 105.0, 109.0, 110.0])
    monkeypatch.setattr("dist_contrastive.metrics.time.monotonic", lambda: next(clock))
    times = TimeSplit()
    times.lap("start")
    times.lap("training", {"waiting_for_data": 0.5})
    times.lap("training", {"waiting_for_data": 1.5})
    assert times.seconds == {"start": 3.0, "training": 4.0, "waiting_for_data": 2.0}
    assert times.total == 10.0


def test_no_file_is_no_lines(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_the_timer_counts_samples_of_the_global_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.0, 12.0, 13.0, 13.0])  # started, read (and restarted), read (and restarted)
    monkeypatch.setattr("dist_contrastive.metrics.time.perf_counter", lambda: next(clock))
    timer = StepTimer(256, torch.device("cpu"))
    for wait_ms in (10.0, 20.0, 0.0, 30.0):
        timer.count(wait_ms)
    values = timer.read()
    assert values["images_per_s"] == 4 * 256 / 2.0
    assert values["step_time_ms"] == 500.0
    assert values["loader_wait_ms"] == 15.0
    assert values["peak_memory_mib"] > 1
    timer.count(0.0)
    assert timer.read()["step_time_ms"] == 1000.0
