"""The two logs of a run: one JSON object a line, the same in TensorBoard, and no step twice after a resume."""

import json
import math
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dist_contrastive.metrics import MetricsLog, StepTimer, read_metrics


def write_steps(folder: Path, resumed_after: int, steps: range, loss: float) -> None:
    log = MetricsLog(folder, resumed_after)
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
    log = MetricsLog(tmp_path, 0)
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


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    log.write(1, 0, {"loss": math.nan, "grad_norm": math.inf, "step_time_ms": 2.0})
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "epoch": 0, "loss": null, "grad_norm": null, "step_time_ms": 2.0}\n'


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
