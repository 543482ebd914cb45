"""The command line: one clear line and status 2 for a user's mistake, a traceback for a fault of ours."""

import io
import operator
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dist_contrastive import cli
from dist_contrastive.config import TrainConfig, UserError
from dist_contrastive.data.sources import open_source
from dist_contrastive.pack import PackConfig
from dist_contrastive.probe import ProbeCommand
from dist_contrastive.recipes import RECIPES


def parse(*args: str) -> TrainConfig:
    return cli.parse(RECIPES["photos"](), list(args), prog="train photos")


def error_of(*args: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(*args)
    message = str(caught.value)
    assert "\n" not in message
    assert "─" not in message
    return message


def test_without_arguments_the_recipe_stays_as_it_is() -> None:
    assert parse() == RECIPES["photos"]()


@pytest.mark.parametrize(
    ("arguments", "flips", "scales"),
    [
        (["--augment.flip", "0.1"], [0.1, 0.1], [(0.08, 1.0), (0.08, 1.0)]),
        (["--augment.1.flip=0.1"], [0.5, 0.1], [(0.08, 1.0), (0.08, 1.0)]),
        (["--augment.crop_scale", "0.2", "0.5", "--augment.flip=0"], [0.0, 0.0], [(0.2, 0.5), (0.2, 0.5)]),
        (["--augment.flip=0.3", "--augment.0.flip", "0.1", "--seed", "1"], [0.1, 0.3], [(0.08, 1.0), (0.08, 1.0)]),
        (["--augment.0.crop-scale", "0.3", "1", "--augment.flip", "1"], [1.0, 1.0], [(0.3, 1.0), (0.08, 1.0)]),
    ],
)
def test_an_option_of_a_group_without_its_number_is_for_all_groups(
    arguments: list[str], flips: list[float], scales: list[tuple[float, float]]
) -> None:
    groups = cli.parse(RECIPES["cifar10_simclr"](), arguments).augment.groups
    assert [group.flip for group in groups] == flips
    assert [group.crop_scale for group in groups] == scales
    assert [group.solarize for group in groups] == [0.0, 0.2]


def test_a_single_group_needs_no_number() -> None:
    short, numbered = parse("--augment.flip", "0.1"), parse("--augment.0.flip", "0.1")
    assert short == numbered
    assert error_of("--augment.1.flip", "0.1").startswith("unknown option --augment.1.flip")


def test_values_replace_single_fields() -> None:
    config = parse(
        "--batch.global", "64", "--optim.learning-rate=1e-2", "--run-dir", "some/where", "--augment.flip", "0.1",
        "--overwrite", "--method.temperature", "0.3", "--method.projector.layers", "3",
    )  # fmt: skip
    assert (config.batch.size, config.optim.learning_rate, config.run_dir) == (64, 0.01, Path("some/where"))
    assert config.augment.groups == (replace(RECIPES["photos"]().augment.groups[0], flip=0.1),)
    assert config.overwrite
    assert config.method == type(config.method)(
        name="simclr",
        projector=type(config.method.projector)(layers=3, hidden_size=256, output_size=128),
        temperature=0.3,
    )  # type: ignore[call-arg]
    assert config.encoder == RECIPES["photos"]().encoder


@pytest.mark.parametrize(
    ("mistyped", "meant"),
    [
        ("--epoch", "--epochs"),
        ("--optim.learnin-rate", "--optim.learning-rate"),
        ("--batch.globl=3", "--batch.global"),
        ("--batchglobal", "--batch.global"),
        ("--probe.enable", "--probe.enabled"),
    ],
)
def test_an_unknown_option_gets_the_nearest_name(mistyped: str, meant: str) -> None:
    assert f"unknown option {mistyped.partition('=')[0]} (did you mean {meant}?)" in error_of(mistyped, "3")


def test_a_wrong_option_of_a_small_section_gets_the_section() -> None:
    message = error_of("--batch.size", "3")
    assert "unknown option --batch.size (there are --batch.global, --batch.memory-gib, --batch.micro)" in message


def test_an_option_like_no_other_gets_no_wrong_hint() -> None:
    assert "did you mean" not in error_of("--zzz", "1")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize(
    ("args", "part"),
    [
        (("--epochs", "many"), "--epochs"),
        (("--epochs",), "Missing value for argument '--epochs'"),
        (("--augment.crop-scale", "0.5"), "--augment.crop-scale"),
        (("--encoder.stem", "tiny"), "'standard', 'small'"),
        (("--recipe", "other"), "--recipe is fixed to 'photos'"),
        (("unexpected",), "unexpected argument 'unexpected'"),
        (("--overwrite", "yes"), "unexpected argument 'yes'"),
    ],
)
def test_what_cannot_be_read(args: tuple[str, ...], part: str, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # tyro draws its boxes by what the terminal's encoding allows; the line must not depend on it.
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    message = error_of(*args)
    assert part in message
    assert message.endswith("`train photos --help` lists the options")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--batch.global", "1"), "--batch.global 1: a contrastive step needs at least 2 samples"),
        (("--epochs", "0"), "--epochs 0: give at least 1"),
        (("--method.temperature", "-1"), "--method.temperature -1.0: give a positive number"),
        (("--checkpoint.keep", "1"), "--checkpoint.keep 1: keep at least 2, so that one survives a bad disk"),
    ],
)
def test_what_validation_refuses_is_said_in_its_own_words(args: tuple[str, ...], message: str) -> None:
    assert error_of(*args) == message


@pytest.mark.parametrize(
    ("entry", "args", "field", "expected"),
    [
        (RECIPES["photos"](), ["--run-dir", "~/x"], "run_dir", "/home/somebody/x"),
        (RECIPES["photos"](), ["--run-dir=~/x"], "run_dir", "/home/somebody/x"),
        (RECIPES["photos"](), ["--data.path=~/x.beton"], "data.path", "/home/somebody/x.beton"),
        (replace(RECIPES["photos"](), run_dir=Path("~/runs")), [], "run_dir", "/home/somebody/runs"),
        (RECIPES["photos"](), ["--run-dir", "a/~/b"], "run_dir", "a/~/b"),
        (ProbeCommand, ["~/x", "--data=~/y.beton"], "data", "/home/somebody/y.beton"),
        (ProbeCommand, ["~/x"], "run", "/home/somebody/x"),
        (ProbeCommand, ["x"], "data", "None"),
        (PackConfig, ["photos", "~/x.beton"], "out_path", "/home/somebody/x.beton"),
    ],
)
def test_a_tilde_is_the_home_folder_in_every_path(
    entry: Any, args: list[str], field: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert str(operator.attrgetter(field)(cli.parse(entry, args))) == expected


@pytest.mark.parametrize(
    "parsed",
    [lambda: parse("--run-dir", "~no-such-user/x"), lambda: open_source("folder:~no-such-user/x")],
    ids=["option", "source"],
)
def test_the_home_folder_of_nobody_is_refused(parsed: Callable[[], object]) -> None:
    with pytest.raises(UserError, match=r"^~no-such-user/x: there is no such home folder; give the whole path$"):
        parsed()


def test_help_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    assert "--batch.global" in capsys.readouterr().out


def test_main_guard_returns_the_status(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise UserError("two\nlines")

    def interrupt() -> None:
        raise KeyboardInterrupt

    def fault() -> None:
        raise ValueError("ours")

    assert cli.main_guard(lambda: None) == 0
    assert cli.main_guard(fail) == 2
    assert cli.main_guard(interrupt) == 130
    assert capsys.readouterr().err == "error: two lines\nerror: interrupted\n"
    with pytest.raises(ValueError, match="ours"):
        cli.main_guard(fault)


@pytest.mark.parametrize(("local_rank", "lines"), [("0", 1), ("1", 0)])
def test_one_rank_of_a_host_says_it_for_all(
    local_rank: str, lines: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise UserError("the same on all")

    monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert cli.main_guard(fail) == 2
    assert capsys.readouterr().err.count("\n") == lines


PROGRAM = """
import sys
from dist_contrastive import cli
from dist_contrastive.config import BatchConfig

def main():
    config = cli.parse(BatchConfig, prog="program")
    assert config.size != 7, "a fault of ours"

sys.exit(cli.main_guard(main))
"""
HINT = "`program --help` lists the options"


@pytest.mark.parametrize(
    ("args", "encoding", "status", "errors"),
    [
        (["--global", "4"], "utf-8", 0, ""),
        (["--help"], "utf-8", 0, ""),
        (["--global", "1"], "utf-8", 2, "error: --batch.global 1: a contrastive step needs at least 2 samples\n"),
        (["--globl", "4"], "utf-8", 2, f"error: unknown option --globl (did you mean --global?); {HINT}\n"),
        (["--global"], "ascii", 2, f"error: Missing value for argument '--global'. Expected 1 values; {HINT}\n"),
    ],
)  # fmt: skip
def test_a_process_ends_with_one_line_and_its_status(args: list[str], encoding: str, status: int, errors: str) -> None:
    done = run_program(args, encoding)
    assert (done.returncode, done.stderr) == (status, errors)


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    done = run_program(["--global", "7"], "utf-8")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "a fault of ours" in done.stderr


def run_program(args: list[str], encoding: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *args],
        capture_output=True, text=True, timeout=60, check=False,
        cwd=Path(cli.__file__).parents[1],
        env={"PATH": "/usr/bin:/bin", "PYTHONIOENCODING": encoding, "COLUMNS": "80"},
    )  # fmt: skip
