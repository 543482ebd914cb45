"""The frame of the benchmarks: turns, statistics, names, and what a record holds."""

import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from accelerate import Accelerator

from benchmarks import all as everything
from benchmarks import frame, scaling, step, time_to_accuracy
from benchmarks.frame import (
    Budget,
    Options,
    Peak,
    Record,
    Turns,
    begin,
    comparison,
    ratios,
    short_name,
    spread,
    take_turns,
)
from dist_contrastive.config import BatchConfig, UserError
from dist_contrastive.recipes import build_recipe
from dist_contrastive.simulate import Collective, Place
from dist_contrastive.step.memory_plan import example
from dist_contrastive.trainer import Trainer


@dataclass(frozen=True)
class Command(Turns):
    size: int = 4
    data: Path = Path("some.beton")


def start(argv: list[str], command_type: type[Options] = Command) -> tuple[Any, Record]:
    return begin(command_type, "example", argv, "What it is.", question="how fast is it?")


def filled(folder: Path, *more: str) -> Record:
    """Three rounds of two contenders, and a third number that is projected."""
    _, record = start(["--out", str(folder), *more])
    record.add("32 px", "ours", "images/s", [200.0, 300.0, 240.0])
    record.add("32 px", "theirs", "images/s", [100.0, 200.0, 60.0])
    record.add("32 px", "ours", "GB", [1.5])
    record.add("32 px", "a T4", "images/s", [900.0] * 3, "projected")
    return record


def test_contenders_take_turns_and_the_order_rotates() -> None:
    calls: list[str] = []
    numbers = itertools.count()

    def contender(name: str) -> Callable[[], int]:
        def call() -> int:
            calls.append(name)
            return next(numbers)

        return call

    found = take_turns({name: contender(name) for name in "abc"}, 3, warmup=1)
    assert "".join(calls) == "cababcbcacab"
    assert found == {"a": [3, 8, 10], "b": [4, 6, 11], "c": [5, 7, 9]}, "the first round warms up"


def test_a_budget_ends_the_rounds_but_not_the_first() -> None:
    calls: list[int] = []
    over = Budget(1e-9)
    assert over.is_over()
    assert take_turns({"a": lambda: calls.append(1)}, 5, warmup=2, budget=over) == {"a": [None]}
    assert len(calls) == 3
    assert not Budget(0).is_over()


def test_statistics() -> None:
    assert spread([3.0, 1.0, 2.0, 10.0]) == (2.5, 1.0, 10.0, 4)
    assert ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    with pytest.raises(ValueError, match="zip"):
        ratios([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (180_214, "180,000"), (1.2345, "1.23"), (0.012345, "0.0123"), (0.99961, "1.00"), (1e-5, "1e-05")],
)  # fmt: skip
def test_a_number_has_three_digits(value: float, text: str) -> None:
    assert frame.number(value) == text


@pytest.mark.parametrize(
    ("gpu", "ranks", "name"),
    [
        (None, 1, "2cpu"),
        (None, 2, "2cpu"),
        ("Tesla T4", 1, "t4"),
        ("NVIDIA H100 80GB HBM3", 8, "8xh100"),
        ("NVIDIA A100-SXM4-40GB", 1, "a100"),
        ("NVIDIA GeForce RTX 4090", 2, "2xrtx4090"),
        ("AMD Instinct MI300X", 1, "mi300x"),
    ],
)
def test_a_machine_has_a_short_name(gpu: str | None, ranks: int, name: str) -> None:
    machine = {"device": "cpu" if gpu is None else "cuda", "usable_cores": 2, "ranks": ranks, "gpu": gpu}
    assert short_name(machine) == name


def test_a_call_is_repeated_until_there_is_enough_to_time() -> None:
    calls: list[int] = []
    once = frame.seconds(lambda: calls.append(1), torch.device("cpu"))
    assert len(calls) == 1
    many = frame.seconds(lambda: calls.append(1), torch.device("cpu"), at_least_s=0.01)
    assert len(calls) > 10
    assert many * (len(calls) - 1) >= 0.01
    assert once > 0


def test_slow_cases_get_fewer_rounds() -> None:
    calls: list[int] = []

    def call() -> None:
        calls.append(1)
        time.sleep(0.02)

    for at_most_s, num, most in ((0.01, 1, 1), (60.0, 4, 5)):
        calls.clear()
        cpu = torch.device("cpu")
        assert len(frame.timed_turns({"a": call}, cpu, 4, at_least_s=0, at_most_s=at_most_s)["a"]) == num
        assert len(calls) == most, "one to warm up, where there is time for it"


def test_a_peak_is_of_this_process_and_its_own_processes() -> None:
    hold = "import time; held = bytearray(b'1' * 40_000_000); print(flush=True); time.sleep(60)"
    with Peak() as peak:
        held = bytearray(b"1" * 30_000_000)
        with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE) as process:
            assert process.stdout
            process.stdout.readline()
            time.sleep(0.6)
            process.kill()
        del held
    assert 60 < peak.mb < 140
    with Peak() as nothing:
        pass
    assert nothing.mb < 10


def test_a_record_has_every_repetition_and_all_that_is_needed_to_judge_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "record"
    record = filled(folder, "--size", "8")
    record.details["more"] = {"a": 1}
    record.leave_out("the rest", "there was no time")
    record.write(
        "How fast it is", comparison(record, ("images/s", "GB"), "ours"), {"speed": frame.bars(record, "images/s")}
    )
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "example.json", "speed.png"]
    found = json.loads((folder / "example.json").read_text())
    assert [(s["contender"], s["metric"], s["values"], s["kind"]) for s in found["series"]] == [
        ("ours", "images/s", [200.0, 300.0, 240.0], "measured"),
        ("theirs", "images/s", [100.0, 200.0, 60.0], "measured"),
        ("ours", "GB", [1.5], "measured"),
        ("a T4", "images/s", [900.0] * 3, "projected"),
    ]
    assert found["command"] == "python -m benchmarks.example --size 8"
    assert found["settings"] == {"size": 8, "data": "some.beton", "rounds": 5, "minutes": 0.0}
    assert found["details"] == {"more": {"a": 1}}
    assert found["left_out"] == ["the rest is left out: there was no time"]
    assert found["hardware"].keys() >= {"cpu", "usable_cores", "memory_gib", "load_average_1min", "device", "ranks"}
    assert found["versions"].keys() >= {"python", "torch", "numpy", "dist_contrastive"}
    assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?", found["commit"])
    page = (folder / "README.md").read_text()
    assert page.startswith("# How fast it is\n\nHow fast is it?\n")
    for part in (found["command"], found["commit"], "![speed](speed.png)", "the rest is left out", "`example.json`"):
        assert part in page
    assert "| 32 px | theirs | 100 (60.0 to 200) |" in capsys.readouterr().out


def test_the_table_says_what_is_not_measured_and_compares_round_by_round(tmp_path: Path) -> None:
    lines = comparison(filled(tmp_path), ("images/s", "GB"), "ours").splitlines()
    assert lines == [
        "| case | contender | images/s | GB | images/s ÷ ours | rounds |",
        "|---|---|---|---|---|---|",
        "| 32 px | ours | 240 (200 to 300) | 1.50 | 1.00 | 3 |",
        # The ratios are 0.5, 0.67 and 0.25: their median, not the ratio of medians.
        "| 32 px | theirs | 100 (60.0 to 200) |  | 0.500 (0.250 to 0.667) | 3 |",
        "| 32 px | a T4 | 900, projected |  |  | 3 |",
    ]


def test_what_was_not_found_is_neither_in_a_table_nor_drawn(tmp_path: Path) -> None:
    record = filled(tmp_path)
    assert comparison(record, ("s",), "ours") == ""
    no_plots = {
        "bars": frame.bars(record, "s"),
        "curves": frame.curves(record, "images/s", lambda case: None, xlabel="x"),
    }
    record.write("How fast it is", comparison(record, ("GB",), None), no_plots)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "example.json"]
    assert "![" not in (tmp_path / "README.md").read_text()


def test_a_missing_peer_gets_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, record = start(["--out", str(tmp_path)])
    assert record.has_peer("torchvision", "torchvision.transforms")
    assert "torchvision" in record.versions
    for _ in range(2):
        assert not record.has_peer("a_peer", "no_such_module")
    line = "a_peer is left out: it is not installed (pip install '.[bench]')"
    assert capsys.readouterr().out == f"{line}\n"
    assert record.left_out == [line]


def test_only_one_rank_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = filled(tmp_path / "record")
    monkeypatch.setenv("RANK", "1")
    record.write("How fast it is", "", {})
    assert not (tmp_path / "record").exists()


def test_without_a_folder_a_record_goes_where_all_are() -> None:
    _, record = start([])
    assert record.folder.parent == frame.RECORDS
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}_[a-z0-9]+_example", record.folder.name)


def test_mistakes_are_refused_before_anything_is_measured(tmp_path: Path) -> None:
    for words, message in (
        (["--rounds", "0"], "--rounds 0: give at least 1"),
        (["--minutes", "-1"], "--minutes -1: give 0"),
        (["--sizes", "3"], "unknown option --sizes"),
    ):
        with pytest.raises(UserError, match=message):
            start(words)
    (tmp_path / "example.json").touch()
    with pytest.raises(UserError, match="has a record already"):
        start(["--out", str(tmp_path)])


def test_a_steps_time_is_given_to_its_parts() -> None:
    config = replace(build_recipe("photos"), batch=BatchConfig(size=8))
    trainer = Trainer(config, Accelerator(cpu=True), steps_per_epoch=10, dataset_sha256="")
    batch = example(config, 8)
    trainer.update(batch)
    sections = step.Sections(torch.device("cpu"))
    start = time.perf_counter()
    with step.instrumented(trainer, sections), sections.section(step.REST):
        trainer.update(batch)
    took = time.perf_counter() - start
    parts = (step.AUGMENTATION, step.ENCODER, step.LOSS, step.OPTIMIZER, step.REST)
    assert all(sections.seconds[part] > 0 for part in parts), sections.seconds
    assert sections.seconds[step.WAIT] == sections.seconds[step.COMMUNICATION] == 0
    assert 0.5 * took < sum(sections.seconds.values()) <= took, "a part within another one counts once"
    before = sum(sections.seconds.values())
    trainer.update(batch)
    assert sum(sections.seconds.values()) == before, "outside of the context nothing is timed"


def test_the_model_of_collectives() -> None:
    link, hosts = scaling.Link(bandwidth=1e9, latency=1e-3), scaling.Link(bandwidth=1e6, latency=1e-2)
    assert scaling.collective_s("allreduce", 8 * 10**9, 1, link) == 0
    # 7/8 of 8 GB there and back, and three hops each way; a gather goes one way.
    assert scaling.collective_s("allreduce", 8 * 10**9, 8, link) == pytest.approx(14 + 2 * 3e-3)
    assert scaling.collective_s("allgather", 8 * 10**9, 8, link) == pytest.approx(7 + 3e-3)
    place = Place("a.py", 1, "f")
    collectives = [
        Collective("allgather", 2, 8 * 10**9, place, None, False),
        Collective("allreduce", 1, 0, place, None, True),
    ]
    assert scaling.communication_s(collectives, 8, link, hosts) == pytest.approx(2 * 7.003 + 0.06)
    assert scaling.communication_s(collectives, 8, link, hosts, overlap=0.5) == pytest.approx(7.003 + 0.06)


def test_a_link_is_that_of_its_probes() -> None:
    link = scaling.Link(bandwidth=2e9, latency=1e-4)
    probes = {str(size): scaling.collective_s("allreduce", size, 4, link) for size in scaling.PROBE_BYTES}
    found = scaling.link_of(probes, 4)
    assert found.bandwidth == pytest.approx(link.bandwidth, rel=1e-3)
    assert found.latency == pytest.approx(link.latency, rel=1e-3)


@pytest.mark.parametrize(
    ("gpu", "precision", "peak"),
    [("Tesla T4", "fp16", 65), ("NVIDIA A100-SXM4-40GB", "bf16", 312), ("GTX 1080", "fp16", None)],
)
def test_peaks_of_gpus(gpu: str, precision: str, peak: float | None) -> None:
    assert step.known_peak(gpu, precision) == peak


def test_time_to_accuracy_accounts_for_warm_up_training_and_evaluation() -> None:
    history = [{"epoch": n, "step": 10 * n, "knn_top1": score} for n, score in ((1, 0.3), (2, 0.6), (3, 0.5), (4, 0.7))]
    entry = time_to_accuracy.reached(history, "knn_top1", 0.6)
    assert entry == history[1]
    assert time_to_accuracy.reached(history, "knn_top1", 0.8) is None
    seconds = {
        "start": 3.0,
        "first_step": 2.0,
        "training": 30.0,
        "waiting_for_data": 6.0,
        "checkpoints": 4.0,
        "probes": 8.0,
    }
    assert time_to_accuracy.account(
        sum(seconds.values()) + 9.0 + 2.5, {**seconds, "report": 9.0}, history, history[1]
    ) == {
        time_to_accuracy.TRAINING: 20.0,
        time_to_accuracy.WARMUP: 7.5,
        time_to_accuracy.EVALUATION: 4.0,
        time_to_accuracy.EPOCHS: 2.0,
    }


def test_parts_without_enough_time_leave_it_to_the_others() -> None:
    part = everything.Part
    parts = {"a": part("a", 1.0, 20), "b": part("b", 1.0, 40), "c": part("c", 2.0, 600)}
    assert everything.chosen(parts, 1200) == ["a", "b", "c"]
    assert everything.chosen(parts, 1199) == ["a", "b"]
    assert everything.chosen(parts, 79) == ["a"]
    assert everything.chosen(parts, 19) == []


def test_all_puts_records_on_one_page_and_says_what_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In place of the benchmarks, which take long, something that leaves records like theirs."""

    def stand_in(words: Sequence[str], output: Path, limit_s: float, environment: Mapping[str, str]) -> int | None:
        output.write_text("said this\n")
        name, folder = words[2].removeprefix("benchmarks."), Path(words[-1])
        assert 0 < float(words[words.index("--minutes") + 1]) < 7
        assert environment["CUDA_VISIBLE_DEVICES"] == "", "asked for processors"
        if name == "loss":
            return 1
        if name == "scaling":
            return None
        record = Record(
            name, "how fast?", {}, folder, frame.hardware(torch.device("cpu")), "", {f"peer of {name}": "1.0"}
        )
        record.add("32 px", "ours", "images/s", [200.0, 300.0])
        record.leave_out("the rest", "there was no time")
        plot = {"speed": frame.bars(record, "images/s")}
        record.write(f"How fast {name} is", comparison(record, ("images/s",), "ours"), plot)
        return 0

    monkeypatch.setattr(everything, "run", stand_in)
    everything.main(["--minutes", "7", "--device", "cpu", "--out", str(tmp_path)])
    page, found = (tmp_path / "README.md").read_text(), json.loads((tmp_path / "all.json").read_text())
    links = re.findall(r"\]\((.*?)\)", page)
    assert links == ["augment/speed.png", "step/speed.png", "loader/speed.png"]
    assert all((tmp_path / link).exists() for link in links)
    assert "## How fast augment is" in page
    assert [(one["case"], one["values"]) for one in found["series"]] == [
        (f"{name}: 32 px", [200.0, 300.0]) for name in ("augment", "step", "loader")
    ]
    assert found["versions"]["peer of step"] == "1.0"
    assert set(found["left_out"]) == {
        "time_to_accuracy is left out: it takes at least 80 s, more than its share of 7 min",
        "loss is left out: it failed: said this",
        "scaling is left out: it took longer than its share",
        *(f"{name}: the rest is left out: there was no time" for name in ("augment", "step", "loader")),
    }


def test_a_benchmark_that_takes_too_long_ends_with_all_that_it_started(tmp_path: Path) -> None:
    start, output = time.monotonic(), tmp_path / "output.txt"
    assert everything.run(["bash", "-c", "sleep 60 & echo $!; sleep 60"], output, 0.5, os.environ) is None
    assert time.monotonic() - start < 30
    deadline = time.monotonic() + 10
    while psutil.pid_exists(int(output.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert time.monotonic() < deadline
    assert everything.run(["bash", "-c", "exit 3"], tmp_path / "output.txt", 20, os.environ) == 3
