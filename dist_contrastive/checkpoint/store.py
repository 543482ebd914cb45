"""The checkpoints of a run on disk: which there are, which one verifies, how another comes to them."""

import hashlib
import itertools
import json
import re
import shutil
import stat
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import safetensors
import torch

from dist_contrastive import __version__
from dist_contrastive.atomic import sync_folder, write_synced
from dist_contrastive.checkpoint.tensor_file import Tensors, read_tensors, sha256_of, write_tensors
from dist_contrastive.config import UserError, require

FORMAT = 4
MANIFEST = "manifest.json"
STATE = "state.json"
TEMPORARY = ".incomplete-"
ASIDE = "set-aside-"
OF_TENSORS = re.compile(r"[a-z]+\.safetensors")
"""The names of files of tensors."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. Its tensors are mapped from their files: take copies of what is to stay."""

    step: int
    path: Path
    tensors: dict[str, Tensors]
    """Per file (without ending): tensors by name."""
    state: dict[str, Any]
    sha256: dict[str, str]
    """Per file (with ending): of its bytes."""


class Damaged(UserError):
    """A checkpoint whose bytes are gone or altered for good."""


class CheckpointStore:
    """The checkpoints of one run: `root/step-XXXXXXXX`, of which the newest `keep` stay."""

    def __init__(self, root: Path, keep: int) -> None:
        self.root = root
        self.keep = keep
        self._skipped: list[int] = []

    def _names(self) -> list[str]:
        """What lies in the folder; `UserError` where it can't be listed, which is not the same as empty."""
        try:
            return sorted(path.name for path in self.root.iterdir())
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not self.root.is_symlink():
                return []
            raise UserError(f"{self.root} can't be read ({error.strerror}); is its disk there?") from error

    def steps(self) -> list[int]:
        """The steps that have a committed checkpoint, oldest first; none of them verified."""
        return sorted(int(name.removeprefix("step-")) for name in self._names() if re.fullmatch(r"step-\d{8,}", name))

    def path(self, step: int) -> Path:
        return self.root / f"step-{step:08d}"

    def begin(self, step: int, token: str = "") -> Path:
        """A new folder for the files of a checkpoint (`write`), not seen as one before `commit`.

        What writers that are gone left half written goes. `token` tells this writer's folder from theirs: one that was cut
        off may not know yet that it is gone. Raises OSError.
        """
        self.root.mkdir(exist_ok=True)  # without its parents: where the run's folder is gone, none is made in its place
        for leftover in self.root.glob(f"{TEMPORARY}step-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        folder = self.root / f"{TEMPORARY}{self.path(step).name}{token and '-'}{token}"
        folder.mkdir()
        return folder

    @staticmethod
    def write(folder: Path, tensors: Mapping[str, Tensors]) -> dict[str, str]:
        """Write files of tensors, by name without ending; returns their sums by name with ending. Raises OSError."""
        return {(name := f"{group}.safetensors"): write_tensors(folder / name, tensors[group]) for group in tensors}

    def commit(self, folder: Path, step: int, sums: Mapping[str, str], state: Mapping[str, Any]) -> Path:
        """Make a checkpoint of `folder`, in which all files of tensors are (`sums`), and then let the oldest go.

        Those that `newest` skipped and any of a later step did not verify, and must not count among those kept. They are
        set aside under another name: another version or a mended disk may read them still.
        Returns the checkpoint's folder. Raises OSError where it cannot be written; what was there before is untouched then.
        """
        written = json.dumps(dict(state), indent=1).encode()
        manifest = {
            "format": FORMAT,
            "step": step,
            "sha256": {**sums, STATE: hashlib.sha256(written).hexdigest()},
            "versions": {
                "dist_contrastive": __version__,
                "torch": torch.__version__,
                "accelerate": accelerate.__version__,
                "numpy": np.__version__,
            },
        }
        write_synced(folder / STATE, written)
        write_synced(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
        sync_folder(folder)
        for other in self.steps():
            if other in self._skipped or other >= step:
                self._set_aside(other)
        self._skipped = []
        final = self.path(step)
        folder.rename(final)
        sync_folder(self.root)
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.path(old))
        return final

    def save(self, step: int, tensors: Mapping[str, Tensors], state: Mapping[str, Any]) -> Path:
        """Write a checkpoint that one process has all of, at once; returns its folder.

        Raises OSError when it cannot be written (a full disk, say); what was there before is untouched.
        """
        folder = self.begin(step)
        try:
            return self.commit(folder, step, self.write(folder, tensors), state)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _set_aside(self, step: int) -> None:
        name = f"{ASIDE}{self.path(step).name}"
        names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        self.path(step).rename(next(free for free in map(self.root.joinpath, names) if not free.exists()))

    def load(self, step: int) -> Checkpoint:
        """The checkpoint of `step`, verified.

        Raises `Damaged` where it is incomplete or its bytes were altered, another `UserError` where it is missing, of another
        format, or where the disk does not give its bytes now.
        """
        path = self.path(step)
        steps = self.steps()
        require(step in steps, f"{self.root} has no checkpoint of step {step}; it has {steps or 'none'}")
        sums = _sums(path, step)
        names = [name for name in sums if name != STATE]
        with ThreadPoolExecutor() as pool:
            found_sums = dict(zip(names, pool.map(_sha256, [path / name for name in names]), strict=True))
        state = _read(path / STATE)
        found_sums[STATE] = hashlib.sha256(state).hexdigest()
        for name, found in found_sums.items():
            if found != sums[name]:
                raise Damaged(f"{path / name} was altered (its SHA-256 differs)")
        try:
            tensors = {name.removesuffix(".safetensors"): read_tensors(path / name) for name in names}
        except safetensors.SafetensorError as error:
            raise Damaged(f"{path} holds no safetensors ({error})") from error
        try:
            return Checkpoint(step, path, tensors, dict(json.loads(state)), sums)
        except (ValueError, TypeError) as error:
            raise Damaged(f"{path / STATE} is not what a run writes ({error})") from error

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that verifies; None if there never was one.

        Newer ones that are damaged get a warning, and the next `save` sets them aside. One that another version or another
        hour might read (another format, no permission, an error of the disk or the network) is not passed over: an older
        one in its place would throw away work that is still there, and nobody would know. `UserError` then, and where
        there are checkpoints, or what is left of some, and none can be read.
        """
        failed: dict[int, UserError] = {}
        found = None
        for step in reversed(self.steps()):
            try:
                found = self.load(step)
                break
            except UserError as error:
                failed[step] = error
        reasons = "; ".join(map(str, failed.values()))
        if found is None:
            rest = [name for name in self._names() if re.match(rf"step-|{ASIDE}|{TEMPORARY}replaced-", name)]
            require(
                not rest,
                f"{self.root} holds checkpoints and none can be used: {reasons or ', '.join(rest)}; nothing was changed; "
                "put back what is missing, or start anew with another --run-dir, or with --overwrite, which deletes them",
            )
            return None
        require(
            all(isinstance(error, Damaged) for error in failed.values()),
            f"the newest checkpoint can't be read now: {reasons}; nothing was changed; mend that, or move "
            f"{' and '.join(self.path(step).name for step in failed)} elsewhere to go on from step {found.step}",
        )
        for step, reason in failed.items():
            warnings.warn(
                f"skipping a bad checkpoint: {reason}; going on from step {found.step}; the next checkpoint sets it aside "
                f"as {self.root / ASIDE}{self.path(step).name}",
                stacklevel=2,
            )
        self._skipped = list(failed)
        return found


def _sums(path: Path, step: int) -> dict[str, str]:
    """The sums of the files of a checkpoint by the manifest in its folder `path`; raises as `CheckpointStore.load` does."""
    manifest = _read(path / MANIFEST)
    try:
        facts = dict(json.loads(manifest))
        format_found = facts["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{path} is incomplete (no manifest: {error})") from error
    # Of another format nothing else is known, not even where it has its versions.
    versions = facts.get("versions")
    version = versions.get("dist_contrastive") if isinstance(versions, dict) else None
    require(
        format_found == FORMAT,
        f"{path} has format {json.dumps(format_found)}, and this version reads {FORMAT}: the version that wrote it "
        f"({version or 'unknown'}) can",
    )
    try:
        sums, step_found = dict(facts["sha256"]), facts["step"]
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{path} is incomplete (no manifest: {error})") from error
    if step_found != step:
        raise Damaged(f"{path} says that it is of step {step_found}")
    # Names alone are looked at: whatever else lies there is not opened.
    foreign = [name for name in sums if name != STATE and not OF_TENSORS.fullmatch(name)]
    unlisted = {file.name for file in path.glob("*.safetensors")} - sums.keys()
    if foreign or unlisted or STATE not in sums:
        raise Damaged(
            f"{path} does not hold what its manifest says ({', '.join([*foreign, *sorted(unlisted)]) or STATE})"
        )
    return sums


def _sha256(path: Path) -> str:
    with _reading(path):
        return sha256_of(path)


def _read(path: Path) -> bytes:
    with _reading(path):
        return path.read_bytes()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """A file of a checkpoint is read. `Damaged` where it is not there, another `UserError` where the disk does not give it."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # another kind (a pipe, say) may have no end
            raise Damaged(f"{path.parent} is incomplete ({path.name} is no file)")
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Damaged(f"{path.parent} is incomplete ({path.name}: {error.strerror})") from error
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror})") from error
