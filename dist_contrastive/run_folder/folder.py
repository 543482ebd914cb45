"""A run's folder: who may write to it, and whether it starts fresh or goes on.

What writes here raises OSError where the disk won't take it; the run turns that into one line on all ranks.
"""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any, Literal

from dist_contrastive.atomic import write_atomic
from dist_contrastive.config import TrainConfig, UserError, differences, to_dict
from dist_contrastive.folder_lock import lock_folder
from dist_contrastive.run_folder.names import CHECKPOINTS, CONFIG, DONE, OWN_NAMES
from dist_contrastive.run_folder.status import StatusFile


class RunFolder:
    """The folder of one run, locked for this process until `close`. Rank 0 alone makes one.

    Attributes:
        status: what the folder tells of how the run is.
    """

    def __init__(self, path: Path) -> None:
        """Create and lock the folder; `UserError` where it cannot be written or another run holds it."""
        self.path = path
        self.status = StatusFile(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = lock_folder(path)
        except OSError as error:
            raise UserError(f"{path} can't be written ({error.strerror}); choose another --run-dir") from error

    def close(self) -> None:
        self.status.close()
        self._lock.release()

    def check_held(self) -> None:
        """`UserError` where the folder is no longer the one that was locked: deleted, moved, or another in its place."""
        try:
            is_held = self._lock.is_held()
        except OSError as error:
            raise UserError(f"{self.path} can't be read ({error.strerror}); is its disk there?") from error
        if not is_held:
            self.status.close()  # which is not to be told to whatever lies there now
            raise UserError(
                f"{self.path} was deleted, moved or taken over while the run was under way; what was in it is not written "
                "again: put it back and give the same command, or start anew with another --run-dir"
            )

    def open(self, config: TrainConfig) -> Literal["fresh", "resume"]:
        """Decide what to do with what is there (`start_of`; `--overwrite` starts fresh); nothing is changed before `claim`."""
        start = "fresh" if config.overwrite else start_of(self.path, config)
        if start == "resume" and not _has(self.path / DONE):
            self.status.take_over()
        return start

    def claim(self, config: TrainConfig) -> None:
        """Make the folder that of `config`'s run. The first change to it: whatever may refuse the run comes before.

        With `--overwrite` an earlier run's files go; where a finished run goes on, it is no longer finished. Raises OSError
        where config.json can't be written.
        """
        try:
            if config.overwrite:
                self._clear()
            (self.path / DONE).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"{error.filename} can't be deleted ({error.strerror}); choose another --run-dir"
            ) from error
        # Before config.json: a run that has one and no such folder has lost it.
        checkpoints = self.path / CHECKPOINTS
        is_new = not checkpoints.exists()
        checkpoints.mkdir(exist_ok=True)
        try:
            self.write_json(CONFIG, to_dict(config))
        except BaseException:
            if is_new:
                checkpoints.rmdir()
            raise

    def recorded(self, name: str) -> Any:
        """The value of a field of the config that is there; None where there is neither."""
        return (_known_config(self.path) or {}).get(name)

    def _clear(self) -> None:
        # DONE goes first: a folder that is half deleted must not look finished.
        for name in reversed(OWN_NAMES):
            target = self.path / name
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)

    def write_json(self, name: str, value: Any) -> None:
        write_atomic(self.path / name, json.dumps(value, indent=1).encode())

    def finish(self) -> None:
        """Mark the run as complete: everything else is written by now."""
        write_atomic(self.path / DONE, b"")
        with contextlib.suppress(OSError):  # DONE says it already
            self.status.end("done")


def start_of(path: Path, config: TrainConfig) -> Literal["fresh", "resume"]:
    """Whether the run of `config` starts fresh in the folder `path`, which need not be there, or goes on; writes nothing.

    `UserError` where it holds a finished run, one of another config, or what no run left there. A run, finished or not, may
    go on with other `--epochs`, as far as this can tell: whether the steps that are done allow it, their checkpoint tells.
    """
    known, finished = _known_config(path), _has(path / DONE)
    differing = []
    if known is not None:
        try:
            differing = differences(known, to_dict(config))
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path / CONFIG} is no config ({error}); pass --overwrite or another --run-dir") from error
    length_alone = [text.partition(":")[0] for text in differing] == ["epochs"]
    if finished and not (length_alone and config.resume != "never"):
        raise UserError(f"{path} holds a finished run; pass --overwrite or another --run-dir")
    if known is None:
        foreign = next((name for name in OWN_NAMES if _has(path / name)), None)
        if foreign:
            raise UserError(f"{path} holds {foreign} but no {CONFIG}; pass --overwrite or another --run-dir")
        return "fresh"
    if config.resume == "never":
        raise UserError(f"{path} holds an unfinished run; pass --resume auto, --overwrite or another --run-dir")
    if differing and not length_alone:
        raise UserError(
            f"{path} was started with another config ({'; '.join(differing)}); "
            "give the same one, --overwrite or another --run-dir"
        )
    if not _has(path / CHECKPOINTS):
        raise UserError(
            f"{path} has lost its folder {CHECKPOINTS}: going on would start over and cut the metrics; put it back, or pass "
            "--overwrite or another --run-dir"
        )
    return "resume"


def _known_config(path: Path) -> dict[str, Any] | None:
    """The config.json in a run's folder, None if there is none; `UserError` where it can't be read, or is no config."""
    if not _has(path / CONFIG):
        return None
    try:
        return dict(json.loads((path / CONFIG).read_bytes()))
    except OSError as error:
        raise UserError(f"{path / CONFIG} can't be read ({error.strerror}); choose another --run-dir") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{path / CONFIG} is no config ({error}); pass --overwrite or another --run-dir") from error


def _has(path: Path) -> bool:
    """Whether there is an entry of that name, be it a link to nowhere; `UserError` where that can't be told."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}); choose another --run-dir") from error
    return True
