"""Files that are written whole or not at all, and one clear line where the disk won't take them."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dist_contrastive.config import UserError


def write_synced(path: Path, data: bytes) -> None:
    """Write `data` and wait until the disk has it."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Within the context a file of the given name is to be written and synced; at its end it replaces `path`, or is gone."""
    temporary = path.with_name(f".{path.name}.incomplete")
    try:
        yield temporary
        temporary.rename(path)
    except BaseException:
        with suppress(OSError):  # where the folder is gone there is none to delete, and the first error tells more
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, whole or not at all."""
    with replacing(path) as temporary:
        write_synced(temporary, data)


@contextmanager
def writing(what: Path | str, goes_on: Callable[[], str]) -> Iterator[None]:
    """Within the context an `OSError` of the disk becomes a `UserError`: `what` can't be written, and how it goes on.

    `goes_on` gives the end of that line ("the same command goes on from step 8").
    """
    try:
        yield
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise UserError(
            f"{what} can't be written ({error.strerror or error}); {'make room' if is_full else 'mend that'}, then {goes_on()}"
        ) from error


def sync_folder(path: Path) -> None:
    """Wait until the disk has the folder's entries (its renames)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
