"""A run's folder: who may write to it, and whether it starts fresh or goes on."""

import contextlib
import fcntl
import json
import os
import shutil
import socket
from pathlib import Path
from typing import IO, Any, Literal

from dist_contrastive.atomic import write_atomic
from dist_contrastive.config import TrainConfig, UserError, differences, to_dict

# Everything a run writes; `--overwrite` deletes these and nothing else.
OWN_NAMES = (
    "config.json", "metrics.jsonl", "tensorboard", "checkpoints", "encoder.safetensors", "projector.safetensors",
    "probe.json", "probes", "plots", "report.html", "machine.json", "DONE",
)  # fmt: skip
LOCK = ".lock"


class RunFolder:
    """The folder of one run, locked for this process until `close`. Rank 0 alone makes one."""

    def __init__(self, path: Path) -> None:
        """Create and lock the folder; `UserError` where it cannot be written or another run holds it."""
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            # Held open: closing it gives the lock away.
            self._lock: IO[bytes] = open(path / LOCK, "ab+", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise UserError(f"{path} can't be written ({error.strerror}); choose another --run-dir") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.seek(0)
            holder = self._lock.read().decode(errors="replace").strip() or "another process"
            self._lock.close()
            raise UserError(f"{path} is in use by {holder}; wait for it or choose another --run-dir") from error
        except OSError as error:
            self._lock.close()
            raise UserError(f"{path} can't be locked ({error.strerror}); choose another --run-dir") from error
        # Who holds it is a courtesy that a full disk may deny.
        with contextlib.suppress(OSError):
            self._lock.truncate(0)
            self._lock.write(f"process {os.getpid()} on {socket.gethostname()}".encode())

    def close(self) -> None:
        self._lock.close()

    def open(self, config: TrainConfig) -> Literal["fresh", "resume"]:
        """Decide what to do with what is there, and write config.json.

        A finished run is kept unless `--overwrite` is given; an unfinished one goes on if its config computes the same.
        """
        if config.overwrite:
            self._clear()
        start = start_of(self.path, config)
        self.write_json("config.json", to_dict(config))
        return start

    def _clear(self) -> None:
        # DONE goes first: a folder that is half deleted must not look finished.
        for name in reversed(OWN_NAMES):
            target = self.path / name
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)

    def write_json(self, name: str, value: Any) -> None:
        self._write(name, json.dumps(value, indent=1).encode())

    def finish(self) -> None:
        """Mark the run as complete: everything else is written by now."""
        self._write("DONE", b"")

    def _write(self, name: str, data: bytes) -> None:
        try:
            write_atomic(self.path / name, data)
        except OSError as error:
            raise UserError(f"{self.path / name} can't be written ({error.strerror})") from error


def start_of(path: Path, config: TrainConfig) -> Literal["fresh", "resume"]:
    """Whether the run of `config` starts fresh in the folder `path`, which need not be there, or goes on; writes nothing.

    `UserError` where it holds a finished run, one of another config, or what no run left there.
    """
    try:
        if (path / "DONE").exists():
            raise UserError(f"{path} holds a finished run; pass --overwrite or another --run-dir")
        config_path = path / "config.json"
        if not config_path.exists():
            foreign = [name for name in OWN_NAMES if (path / name).exists()]
            if foreign:
                raise UserError(f"{path} holds {foreign[0]} but no config.json; pass --overwrite or another --run-dir")
            return "fresh"
        written = config_path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}); choose another --run-dir") from error
    if config.resume == "never":
        raise UserError(f"{path} holds an unfinished run; pass --resume auto, --overwrite or another --run-dir")
    try:
        differing = differences(dict(json.loads(written)), to_dict(config))
    except (ValueError, TypeError) as error:
        raise UserError(f"{config_path} is no config ({error}); pass --overwrite or another --run-dir") from error
    if differing:
        raise UserError(
            f"{path} was started with another config ({'; '.join(differing)}); "
            "give the same one, --overwrite or another --run-dir"
        )
    return "resume"
