"""A run's folder: who may write to it, and whether it starts fresh or goes on."""

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
    "probe.json", "plots", "report.html", "machine.json", "DONE",
)  # fmt: skip
LOCK = ".lock"


class RunFolder:
    """The folder of one run, locked for this process until `close`. Rank 0 alone makes one."""

    def __init__(self, path: Path) -> None:
        """Create and lock the folder; `UserError` where it cannot be written or another run holds it."""
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock: IO[str] = open(path / LOCK, "a+")  # noqa: SIM115 - held open: closing it gives the lock away
        except OSError as error:
            raise UserError(f"{path} can't be written ({error.strerror}); choose another --run-dir") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "another process"
            self._lock.close()
            raise UserError(f"{path} is in use by {holder}; wait for it or choose another --run-dir") from error
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._lock.flush()

    def close(self) -> None:
        self._lock.close()

    def open(self, config: TrainConfig) -> Literal["fresh", "resume"]:
        """Decide what to do with what is there, and write config.json.

        A finished run is kept unless `--overwrite` is given; an unfinished one goes on if its config computes the same.
        """
        if config.overwrite:
            self._clear()
        if (self.path / "DONE").exists():
            raise UserError(f"{self.path} holds a finished run; pass --overwrite or another --run-dir")
        config_path = self.path / "config.json"
        if config_path.exists():
            if config.resume == "never":
                raise UserError(f"{self.path} holds an unfinished run; pass --resume auto, --overwrite or another --run-dir")
            try:
                old = json.loads(config_path.read_bytes())
            except ValueError as error:
                raise UserError(f"{config_path} is no JSON ({error}); pass --overwrite or another --run-dir") from error
            differing = differences(old, to_dict(config))
            if differing:
                raise UserError(
                    f"{self.path} was started with another config ({'; '.join(differing)}); "
                    "give the same one, --overwrite or another --run-dir"
                )
            self._write_config(config)
            return "resume"
        foreign = [name for name in OWN_NAMES if (self.path / name).exists()]
        if foreign:
            raise UserError(f"{self.path} holds {foreign[0]} but no config.json; pass --overwrite or another --run-dir")
        self._write_config(config)
        return "fresh"

    def _clear(self) -> None:
        # DONE goes first: a folder that is half deleted must not look finished.
        for name in reversed(OWN_NAMES):
            target = self.path / name
            if target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)

    def _write_config(self, config: TrainConfig) -> None:
        self.write_json("config.json", to_dict(config))

    def write_json(self, name: str, value: Any) -> None:
        write_atomic(self.path / name, json.dumps(value, indent=1).encode())

    def finish(self) -> None:
        """Mark the run as complete: everything else is written by now."""
        write_atomic(self.path / "DONE", b"")
