"""`python -m dist_contrastive.stage FILE.beton FOLDER`: copy a packed dataset to a disk of this machine, once.

Prints the path to train on: the copy in FOLDER, or FILE itself where FOLDER has no room for one (a line on stderr says so).
A copy counts once it is whole and has the size and the SHA-256 of its manifest; it is used again by whoever asks for the
same dataset, and who asks while it is being made waits for it. Other datasets of the same name have copies of their own.
A shell gives the path to a training by `--data.path "$(python -m dist_contrastive.stage FILE FOLDER)"`.

    python -m dist_contrastive.stage data/photos.beton /local/me
    python -m dist_contrastive.stage /network/cifar10.beton "$TMPDIR"
"""

import fcntl
import hashlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tyro.conf import Positional

from dist_contrastive.atomic import sync_folder, write_atomic
from dist_contrastive.cli import main_guard, parse
from dist_contrastive.config import UserError, require
from dist_contrastive.data.format import Manifest, captions_path, find_manifest, manifest_path, pack_again

PROG = "python -m dist_contrastive.stage"
BLOCK_BYTES = 1 << 23
STALL_S = 300.0
"""How long somebody else's copy may stand still until it is no longer waited for."""
SUM_DIGITS = 12
"""Of a dataset's identity, how many are part of its copy's name."""


@dataclass(frozen=True)
class StageConfig:
    """Copy a packed dataset to a disk of this machine, once."""

    file: Positional[Path]
    """The packed dataset, *.beton."""
    folder: Positional[Path]
    """Where the copy is to lie; it is created."""


def stage(file: Path, folder: Path) -> Path:
    """Where to read the dataset `file` from here: its copy in `folder`, which is made where there is none, or `file` itself.

    `UserError` where `file` is no whole dataset.
    """
    manifest = find_manifest(file)
    copy = folder.absolute() / f"{file.stem}-{manifest.identity[:SUM_DIGITS]}{file.suffix}"
    partial = copy.with_name(f".{copy.name}.incomplete")
    start = time.monotonic()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(copy.with_name(f".{copy.name}.lock"), partial):
            if not _holds(copy, manifest):
                free = shutil.disk_usage(folder).free
                if free < manifest.total_bytes:
                    raise OSError(f"{free / 1e9:.1f} GB are free")
                _copy(file, copy, partial, manifest)
                _say(f"copied {manifest.total_bytes / 1e9:.1f} GB to {copy} in {time.monotonic() - start:.0f} s")
    except OSError as error:
        reason = error.strerror or error
        _say(
            f"{folder} can't hold a copy of {file} ({manifest.total_bytes / 1e9:.1f} GB): {reason}; it is read where it is"
        )
        return file.absolute()
    return copy


def _say(line: str) -> None:
    print(f"{os.uname().nodename}: {line}", file=sys.stderr, flush=True)


@contextmanager
def _lock(path: Path, partial: Path) -> Iterator[None]:
    """Within the context no other process copies this dataset. OSError where another one does, and `partial` does not grow."""
    with open(path, "ab") as file:
        size, since = -1, time.monotonic()
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                now = partial.stat().st_size if partial.exists() else 0
                if now != size:
                    size, since = now, time.monotonic()
                if time.monotonic() - since > STALL_S:
                    raise OSError(f"another process copies it, and has not got on for {STALL_S:.0f} s") from None
                time.sleep(0.2)
        yield


def _holds(copy: Path, manifest: Manifest) -> bool:
    """Whether `copy` is there, whole, and of the dataset with this manifest."""
    try:
        return find_manifest(copy) == manifest
    except UserError:
        return False


def _copy(file: Path, copy: Path, partial: Path, manifest: Manifest) -> None:
    """Write `copy`, its captions if it has any and then its manifest, each whole or not at all.

    `UserError` where `file` can't be read, or is not what its manifest says; OSError where the copy can't be written.
    """
    manifest_path(copy).unlink(missing_ok=True)
    if manifest.captions is not None:
        _copy_file(captions_path(file), captions_path(copy), partial, manifest.captions.sha256, file)
    _copy_file(file, copy, partial, manifest.sha256, file)
    sync_folder(copy.parent)
    write_atomic(manifest_path(copy), manifest.to_json().encode())


def _copy_file(file: Path, copy: Path, partial: Path, sha256: str, dataset: Path) -> None:
    """Write `copy` of a file of `dataset` whose checksum is known, by way of `partial`."""
    found = hashlib.sha256()
    try:
        with _opened(file) as source, open(partial, "wb") as target:
            while block := _read(source, file):
                found.update(block)
                target.write(block)
            target.flush()
            os.fsync(target.fileno())
        require(
            found.hexdigest() == sha256,
            f"{file} is not what its manifest says (its SHA-256 differs); {pack_again(dataset)}",
        )
        partial.rename(copy)
    finally:
        partial.unlink(missing_ok=True)


def _opened(file: Path) -> BinaryIO:
    try:
        return open(file, "rb")
    except OSError as error:
        raise UserError(f"{file} can't be read ({error.strerror})") from error


def _read(source: BinaryIO, file: Path) -> bytes:
    try:
        return source.read(BLOCK_BYTES)
    except OSError as error:
        raise UserError(f"{file} can't be read ({error.strerror})") from error


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(StageConfig, argv, prog=PROG, about=__doc__)
    for number in (signal.SIGTERM, signal.SIGUSR1):  # a polite end removes the unfinished file as Ctrl-C does
        signal.signal(number, signal.default_int_handler)
    print(stage(config.file, config.folder))


if __name__ == "__main__":
    sys.exit(main_guard(main))
