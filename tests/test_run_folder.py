"""A run's folder: one run at a time, nothing overwritten unasked, a resume only of the same run."""

import json
import os
import resource
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from dist_contrastive.config import TrainConfig, UserError, to_dict
from dist_contrastive.recipes import RECIPES
from dist_contrastive.run_folder.folder import RunFolder
from dist_contrastive.run_folder.names import OWN_NAMES
from tests.harness import run_ranks

CONFIG = RECIPES["photos"]()


def open_once(path: Path, config: TrainConfig = CONFIG) -> str:
    """What a run that starts in the folder and ends at once finds."""
    folder = RunFolder(path)
    try:
        start = folder.open(config)
        folder.claim(config)
        return start
    finally:
        folder.close()


def error_of(path: Path, config: TrainConfig = CONFIG) -> str:
    with pytest.raises(UserError) as caught:
        open_once(path, config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def finish(path: Path) -> None:
    folder = RunFolder(path)
    folder.open(CONFIG)
    folder.claim(CONFIG)
    folder.status.begin(step=0, total_steps=1, ranks=1)
    folder.finish()
    folder.close()


def contents(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name != ".lock"}


def test_a_new_folder_starts_fresh_and_holds_the_config(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "new"
    assert open_once(path) == "fresh"
    assert json.loads((path / "config.json").read_text()) == to_dict(CONFIG)


def test_an_unfinished_run_goes_on_with_the_same_config(tmp_path: Path) -> None:
    assert open_once(tmp_path) == "fresh"
    assert open_once(tmp_path) == "resume"


def test_where_and_how_it_runs_may_differ(tmp_path: Path) -> None:
    open_once(tmp_path)
    moved = replace(
        CONFIG,
        run_dir=Path("elsewhere"),
        stop_after_steps=9,
        data=replace(CONFIG.data, path=Path("moved.beton"), threads=7, batches_ahead=5, timeout_s=3.0),
        checkpoint=replace(CONFIG.checkpoint, every=5, every_steps=7, every_minutes=1.5, keep=9),
        launch=replace(CONFIG.launch, ranks=2, device="cpu", timeout_minutes=1.0),
    )
    assert open_once(tmp_path, moved) == "resume"
    assert json.loads((tmp_path / "config.json").read_text()) == to_dict(moved)


def test_another_config_is_refused_with_the_fields_that_differ(tmp_path: Path) -> None:
    open_once(tmp_path)
    before = contents(tmp_path)
    other = replace(CONFIG, seed=3, batch=replace(CONFIG.batch, size=64))
    message = error_of(tmp_path, other)
    assert f"batch.size: {CONFIG.batch.size} -> 64; seed: 0 -> 3" in message
    assert "--overwrite" in message
    assert contents(tmp_path) == before


@pytest.mark.parametrize("change", [{"overwrite": True}, {"log_every": CONFIG.log_every, "stop_after_steps": 3}])
def test_nothing_is_changed_before_the_folder_is_claimed(tmp_path: Path, change: dict[str, Any]) -> None:
    open_once(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("of the old run")
    before = contents(tmp_path)
    folder = RunFolder(tmp_path)
    folder.open(replace(CONFIG, **change))
    assert contents(tmp_path) == before
    folder.close()


def test_a_finished_run_may_be_given_other_epochs_and_is_unfinished_then(tmp_path: Path) -> None:
    finish(tmp_path)
    longer = replace(CONFIG, epochs=CONFIG.epochs + 1)
    assert "finished run" in error_of(tmp_path, replace(longer, resume="never"))
    assert "finished run" in error_of(tmp_path, replace(longer, seed=3))
    assert (tmp_path / "DONE").exists()
    assert open_once(tmp_path, longer) == "resume"
    assert not (tmp_path / "DONE").exists()
    assert json.loads((tmp_path / "config.json").read_text())["epochs"] == longer.epochs


def test_resume_never_refuses_an_unfinished_run(tmp_path: Path) -> None:
    open_once(tmp_path)
    assert "unfinished run" in error_of(tmp_path, replace(CONFIG, resume="never"))
    assert open_once(tmp_path / "new", replace(CONFIG, resume="never")) == "fresh"


def test_a_finished_run_is_kept(tmp_path: Path) -> None:
    finish(tmp_path)
    before = contents(tmp_path)
    assert "holds a finished run; pass --overwrite or another --run-dir" in error_of(tmp_path)
    assert contents(tmp_path) == before


def test_overwrite_deletes_what_runs_write_and_nothing_else(tmp_path: Path) -> None:
    finish(tmp_path)
    outside = tmp_path / "big disk"
    outside.mkdir()
    (outside / "kept").write_text("")
    (tmp_path / "checkpoints").rmdir()
    for name in OWN_NAMES:
        path = tmp_path / name
        if name == "checkpoints":
            path.symlink_to(outside)
        elif "." in name or name == "DONE":
            path.write_text("of the old run")
        else:
            path.mkdir()
            (path / "file").write_text("of the old run")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "my plots").mkdir()
    assert open_once(tmp_path, replace(CONFIG, overwrite=True)) == "fresh"
    anew = {".lock", "config.json", "checkpoints"}
    assert {path.name for path in tmp_path.iterdir()} == anew | {"notes.txt", "my plots", "big disk"}
    assert not any((tmp_path / "checkpoints").iterdir())
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (outside / "kept").exists()


def test_a_run_that_has_lost_its_checkpoints_folder_does_not_start_over(tmp_path: Path) -> None:
    assert open_once(tmp_path) == "fresh"
    assert open_once(tmp_path) == "resume"
    (tmp_path / "checkpoints").rmdir()
    (tmp_path / "metrics.jsonl").write_text("kept")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"has lost its folder checkpoints: .*; put it back, or pass --overwrite"):
        open_once(tmp_path)
    assert contents(tmp_path) == before
    assert open_once(tmp_path, replace(CONFIG, overwrite=True)) == "fresh"


def test_overwrite_takes_an_empty_or_new_folder_as_well(tmp_path: Path) -> None:
    assert open_once(tmp_path / "new", replace(CONFIG, overwrite=True)) == "fresh"


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints"])
def test_leftovers_without_a_config_are_not_touched(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    assert f"holds {name} but no config.json" in error_of(tmp_path)
    assert (tmp_path / name).exists()


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", "\x00"])
def test_a_broken_config_is_a_clear_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert "config.json is no config" in error_of(tmp_path)
    assert open_once(tmp_path, replace(CONFIG, overwrite=True)) == "fresh"


# --- who may write ----------------------------------------------------------------------------------------------------


def hold(path: str, pipe: Connection) -> None:
    """Another run: open the folder, say so, and hold it until told to end."""
    folder = RunFolder(Path(path))
    folder.open(CONFIG)
    folder.claim(CONFIG)
    pipe.send(os.getpid())
    pipe.recv()


@pytest.mark.parametrize("end", ["closed", "killed"])
def test_two_processes_cannot_share_a_folder(tmp_path: Path, end: str) -> None:
    context = get_context("forkserver")
    mine, others = context.Pipe()
    process = context.Process(target=hold, args=(str(tmp_path), others), daemon=True)
    process.start()
    assert mine.poll(120)
    pid = mine.recv()
    for config in (CONFIG, replace(CONFIG, overwrite=True)):
        assert f"is in use by process {pid} on " in error_of(tmp_path, config)
    if end == "killed":
        process.kill()
    else:
        mine.send("end")
    process.join(60)
    assert open_once(tmp_path) == "resume"


def test_the_folder_is_locked_until_it_is_closed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert f"process {os.getpid()} on " in error_of(tmp_path)
    folder.close()
    assert open_once(tmp_path) == "fresh"


def test_a_path_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "can't be written (Not a directory); choose another --run-dir" in error_of(tmp_path / "file" / "run")
    assert "can't be written (File exists)" in error_of(tmp_path / "file")


def open_as_nobody(rank: int, path: Path) -> str:
    if os.getuid() == 0:
        os.setuid(65534)
    try:
        return RunFolder(path).open(CONFIG)
    except UserError as error:
        return str(error)


def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    expected = f"{tmp_path} can't be written (Permission denied); choose another --run-dir"
    assert run_ranks(open_as_nobody, 1, tmp_path) == [expected]


def claim_without_room(rank: int, path: Path) -> str | None:
    folder = RunFolder(path)
    folder.open(CONFIG)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))  # writing fails as on a full disk
    try:
        folder.claim(CONFIG)
    except OSError as error:
        return error.strerror
    return "claimed"


def test_a_full_disk(tmp_path: Path) -> None:
    assert run_ranks(claim_without_room, 1, tmp_path) == ["File too large"]
    assert contents(tmp_path) == {}
    assert open_once(tmp_path) == "fresh"


def errors_of_nobody(rank: int, path: Path) -> list[str]:
    """What one who may not read the config.json nor empty the folder is told: on a resume, and on overwriting."""
    os.chdir(path)
    if os.getuid() == 0:
        os.setuid(65534)
    errors = []
    for config in (CONFIG, replace(CONFIG, overwrite=True)):
        folder = RunFolder(Path())
        try:
            folder.open(config)
            folder.claim(config)
        except UserError as error:
            errors.append(str(error))
        folder.close()
    return errors


def test_files_of_another_user(tmp_path: Path) -> None:
    open_once(tmp_path)
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "config.json").chmod(0)
    (tmp_path / ".lock").chmod(0o666)
    (tmp_path / "checkpoints").chmod(0o555)
    tmp_path.chmod(0o777)
    (errors,) = run_ranks(errors_of_nobody, 1, tmp_path)
    assert len(errors) == 2
    assert errors[0] == "config.json can't be read (Permission denied); choose another --run-dir"
    assert "can't be deleted (Permission denied); choose another --run-dir" in errors[1]
    assert (tmp_path / "checkpoints" / "step-00000001").exists()
