"""How a source of images is named, and what can be said of a name without opening what it names."""

import itertools
import re
from pathlib import Path

from dist_contrastive.config import UserError, require, user_path

SOURCES = "photos, cifar10[:DIR], folder:DIR, classes:DIR, images:DIR, pairs:FILE or photo_captions"
FOLDER_KINDS = ("folder", "classes", "images")
EMBEDDED_KINDS = ("photos", "photo_captions")
"""Sources that are named without a place: they come with the installed packages."""
CIFAR10_FOLDER = Path("data/cifar10-source")

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
PAIRS = f"give pairs:FILE with a {', '.join(TABLE_SUFFIXES)} or .tar, a folder of .tar, or a pattern (shard-{{000..009}}.tar)"
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def read_spec(spec: str) -> tuple[str, Path]:
    """The kind of the source that `spec` names, and its folder (of pairs, its file or pattern; of what is embedded, none: the
    current folder).

    Raises `UserError` where it is no source, or its folder is not there; CIFAR-10's may be made by its download.
    """
    kind, colon, name = spec.partition(":")
    folder = user_path(name)
    require(not colon or bool(name), f"source {spec!r} has no folder after the colon; give {SOURCES}")
    if kind == "cifar10":
        return kind, folder if name else CIFAR10_FOLDER
    if kind in FOLDER_KINDS and colon:
        require(folder.exists(), f"there is no folder {folder}; {SOURCES}")
        require(folder.is_dir(), f"{folder} is not a folder; give {kind}:DIR with a folder of images")
        return kind, folder
    if kind == "pairs" and colon:
        require(bool(shards_of(folder)) or folder.suffix.lower() in TABLE_SUFFIXES, f"{folder} is no table; {PAIRS}")
        return kind, folder
    if kind in EMBEDDED_KINDS and not colon:
        return kind, folder
    hint = f"; for a folder write folder:{spec}" if Path(spec).is_dir() else ""
    raise UserError(f"unknown source {spec!r}{hint}: give {SOURCES}")


def shards_of(path: Path) -> list[Path]:
    """The tar shards that `path` stands for: those in a folder, a single one, or those of a pattern; none for a table.

    Raises `UserError` where there are no such files.
    """
    pieces = _RANGE.split(str(path))
    ranges = [
        [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
        for first, last in zip(pieces[1::3], pieces[2::3], strict=True)
    ]
    names = [
        "".join(map("".join, zip(pieces[::3], (*chosen, ""), strict=True))) for chosen in itertools.product(*ranges)
    ]
    paths = [Path(name) for name in names]
    missing = [file for file in paths if not file.exists()]
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    require(not missing and bool(paths), f"there is no {missing[0] if missing else path}{more}; {PAIRS}")
    if path.is_dir():
        paths = sorted(file for file in path.iterdir() if file.suffix.lower() == ".tar")
        require(bool(paths), f"{path} holds no .tar; {PAIRS}")
    return paths if all(file.suffix.lower() == ".tar" for file in paths) else []
