"""What is answered before anything heavy is imported: help, mistakes, and what a look at the files can refuse."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dist_contrastive.config import to_dict
from tests.runs import tiny_config, write_dataset

HEAVY = {
    "accelerate", "ffcv", "timm", "torchvision", "matplotlib", "sklearn", "torch._dynamo", "torch.utils.tensorboard",
}  # fmt: skip

PROGRAM = """
import runpy, sys
try:
    runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
finally:
    print("LOADED", *sys.modules)
"""


def run(module: str, *arguments: str, environment: dict[str, str] | None = None) -> tuple[int, str, str, set[str]]:
    """Exit status, what was printed, the errors and the names of all modules that were imported."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, f"dist_contrastive.{module}", *arguments],
        capture_output=True, text=True, timeout=120, check=False, env={"PATH": "/usr/bin:/bin", **(environment or {})},
    )  # fmt: skip
    printed, _, loaded = done.stdout.rpartition("LOADED ")
    return done.returncode, printed, done.stderr, set(loaded.split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tiny.beton`, a finished run of recipe photos (`finished`) and an unfinished one (`other`)."""
    folder = tmp_path_factory.mktemp("start")
    dataset = write_dataset(folder)
    for name in ("finished", "other"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(to_dict(tiny_config(folder / name, dataset))))
    (folder / "finished" / "DONE").touch()
    (folder / "train" / "cat").mkdir(parents=True)
    return folder


TRAIN = ["--data.path", "{}/tiny.beton", "--run-dir", "{}/new", "--batch.global", "16"]
LAUNCHED = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}


@pytest.mark.parametrize(
    ("module", "arguments", "status", "words"),
    [
        ("train", ["--help"], 0, "--batch.global"),
        ("train", ["--list"], 0, "photos_byol"),
        ("train", ["photo"], 2, "did you mean photos"),
        ("train", ["nothing_like_it"], 2, "train --list"),
        ("train", ["photos", "--epoch", "1"], 2, "did you mean --epochs"),
        ("train", ["photos", "--epochs", "0"], 2, "--epochs 0"),
        ("train", [*TRAIN, "--data.path", "{}/gone.beton"], 2, "no packed dataset"),
        ("train", [*TRAIN, "--run-dir", "{}/finished"], 2, "holds a finished run"),
        ("train", [*TRAIN, "--run-dir", "{}/other"], 2, "was started with another config"),
        ("train", [*TRAIN, "--run-dir", "{}/other", "--resume", "never"], 2, "holds an unfinished run"),
        ("train", [*TRAIN, "--batch.global", "104"], 2, "100 training samples"),
        ("train", [*TRAIN, "--augment.count", "1"], 2, "simclr needs at least 2 views"),
        ("train", [*TRAIN, "--launch.precision", "fp16", "--launch.device", "cpu"], 2, "fp16 needs a GPU"),
        ("probe", ["--help"], 0, "--checkpoint"),
        ("probe", ["{}/gone"], 2, "no run's folder"),
        ("export", ["{}/gone"], 2, "no run's folder"),
        ("index", ["{}/gone", "{}/tiny.beton", "{}/index"], 2, "no run's folder"),
        ("pack", ["--help"], 0, "--max-side"),
        ("pack", ["photos", "x.bet"], 2, "ends in .beton"),
        ("pack", ["folder:{}/gone", "x.beton"], 2, "there is no folder"),
        ("pack", ["{}/train", "x.beton"], 2, "for a folder write folder:"),
    ],
)
def test_it_is_said_before_anything_heavy_is_imported(
    folder: Path, module: str, arguments: list[str], status: int, words: str
) -> None:
    before = sorted(folder.rglob("*"))
    returned, printed, errors, loaded = run(module, *(argument.replace("{}", str(folder)) for argument in arguments))
    assert returned == status, errors
    assert words in (errors if status else printed)
    assert status == 0 or errors.count("\n") == 1
    assert not loaded & HEAVY
    assert sorted(folder.rglob("*")) == before, "nothing is written before the ranks are connected"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*TRAIN, "--launch.ranks", "4"], "2 rank(s) were launched"),
        ([*TRAIN, "--batch.global", "15"], "can't be shared equally by 2 ranks"),
        ([*TRAIN, "--batch.micro", "9"], "a rank has 8 samples"),
        ([*TRAIN, "--run-dir", "{}/finished"], "holds a finished run"),
    ],
)
@pytest.mark.parametrize("local_rank", ["0", "1"])
def test_each_of_several_ranks_refuses_before_it_connects(
    folder: Path, arguments: list[str], words: str, local_rank: str
) -> None:
    environment = {**LAUNCHED, "RANK": local_rank, "LOCAL_RANK": local_rank}  # no address: connecting would fail
    given = [argument.replace("{}", str(folder)) for argument in arguments]
    status, _, errors, loaded = run("train", *given, environment=environment)
    assert status == 2
    assert (words in errors) == (local_rank == "0"), "one line a host"
    assert not loaded & HEAVY


@pytest.mark.parametrize("arguments", [["--help"], ["folder:no/such/folder", "x.beton"]])
def test_pack_needs_no_torch_for_it(arguments: list[str]) -> None:
    assert "torch" not in run("pack", *arguments)[3]
