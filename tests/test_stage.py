"""Copies of datasets on a disk of the node: whole and verified, made once, used again, and none where there is no room."""

import fcntl
import hashlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_contrastive import stage as module
from dist_contrastive.config import UserError
from dist_contrastive.data.format import Manifest, manifest_path
from dist_contrastive.stage import stage
from tests.betons import picture, write_beton

STAGE = [sys.executable, "-m", "dist_contrastive.stage"]
TIMEOUT_S = 60


def write(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_beton(path, [picture(12, 12, seed + number) for number in range(8)], num_test=2)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write(tmp_path / "network" / "tiny.beton")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return tmp_path / "local" / "me"


def names(folder: Path) -> list[str]:
    """What lies there for others to see."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.endswith(".incomplete")]


def test_a_copy_is_whole_and_used_again(dataset: Path, disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    copy = stage(dataset, disk)
    assert copy.parent == disk
    assert copy.read_bytes() == dataset.read_bytes()
    assert Manifest.read(manifest_path(copy)) == Manifest.read(manifest_path(dataset))
    assert not leftovers(disk)
    assert "copied" in capfd.readouterr().err
    before = copy.stat()
    assert stage(dataset, disk) == copy
    assert (copy.stat().st_ino, copy.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert capfd.readouterr().err == ""


def test_another_dataset_of_the_same_name_has_a_copy_of_its_own(dataset: Path, disk: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "elsewhere" / dataset.name, seed=100)
    copies = [stage(dataset, disk), stage(other, disk)]
    assert [copy.read_bytes() for copy in copies] == [dataset.read_bytes(), other.read_bytes()]


@pytest.mark.parametrize("damage", ["cut", "no manifest", "another manifest", "gone"])
def test_what_is_no_whole_copy_is_made_again(damage: str, dataset: Path, disk: Path) -> None:
    copy = stage(dataset, disk)
    if damage == "cut":
        copy.write_bytes(dataset.read_bytes()[:-1])
    elif damage == "no manifest":
        manifest_path(copy).unlink()
        copy.write_bytes(b"x" * dataset.stat().st_size)
    elif damage == "another manifest":
        manifest_path(copy).write_text(manifest_path(dataset).read_text().replace('"tests"', '"others"'))
    else:
        copy.unlink()
    assert stage(dataset, disk) == copy
    assert copy.read_bytes() == dataset.read_bytes()
    assert Manifest.read(manifest_path(copy)) == Manifest.read(manifest_path(dataset))


def test_a_damaged_dataset_is_refused_and_leaves_no_copy(dataset: Path, disk: Path) -> None:
    content = bytearray(dataset.read_bytes())
    content[len(content) // 2] ^= 1
    dataset.write_bytes(content)
    with pytest.raises(UserError, match=r"tiny\.beton is not what its manifest says .*pack it again"):
        stage(dataset, disk)
    assert names(disk) == []
    assert not leftovers(disk)


def test_a_missing_dataset_is_refused(disk: Path, tmp_path: Path) -> None:
    command = [*STAGE, str(tmp_path / "gone.beton"), str(disk)]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("error: no packed dataset at")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("is_told", [True, False])
def test_without_room_the_dataset_is_read_where_it_is(
    is_told: bool, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    images = [picture(64, 64, seed) for seed in range(10)]
    large = write_beton(tmp_path / "large.beton", images, num_test=2)
    if not is_told:  # the room goes while the copy is made
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40))
    assert stage(large, small_disk) == large
    (line,) = capfd.readouterr().err.splitlines()
    assert f"{small_disk} can't hold a copy of {large}" in line
    assert line.endswith("it is read where it is")
    assert names(small_disk) == []
    assert not leftovers(small_disk)


def test_a_folder_that_cannot_be_made_is_no_reason_to_stop(dataset: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert stage(dataset, Path("/dev/null/me")) == dataset
    assert "can't hold a copy" in capfd.readouterr().err


def test_who_comes_while_a_copy_is_made_waits_for_it(dataset: Path, disk: Path) -> None:
    started = [
        subprocess.Popen([*STAGE, str(dataset), str(disk)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    outcomes = [process.communicate(timeout=TIMEOUT_S) for process in started]
    assert [process.returncode for process in started] == [0] * 4
    assert len({path for path, _ in outcomes}) == 1
    assert sum("copied" in said for _, said in outcomes) == 1


def test_a_copy_that_does_not_get_on_is_not_waited_for_for_ever(
    dataset: Path, disk: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "STALL_S", 1.0)
    disk.mkdir(parents=True)
    name = f"{dataset.stem}-{hashlib.sha256(dataset.read_bytes()).hexdigest()[:12]}.beton"
    with open(disk / f".{name}.lock", "wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert stage(dataset, disk) == dataset
    assert "another process copies it" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_an_interrupted_copy_leaves_nothing(number: signal.Signals, tmp_path: Path, disk: Path) -> None:
    dataset = write(tmp_path / "slow.beton")
    script = (
        "import sys, time\n"
        "from dist_contrastive import stage\n"
        "def read(source, file):\n"
        "    print('reading', flush=True)\n"
        "    time.sleep(600)\n"
        "stage._read = read\n"
        "sys.exit(stage.main_guard(stage.main))\n"
    )
    command = [sys.executable, "-c", script, str(dataset), str(disk)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "reading\n"
    assert leftovers(disk)
    process.send_signal(number)
    output, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode not in (0, 2), "a script sees that it was interrupted"
    assert output == ""
    assert "Traceback" not in errors
    assert names(disk) == []
    assert not leftovers(disk)
