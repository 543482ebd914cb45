"""How a source of images is named, and what can be said of a name without opening what it names."""

from pathlib import Path

from dist_contrastive.config import UserError, require, user_path

SOURCES = "photos, cifar10[:DIR], folder:DIR, classes:DIR or images:DIR"
FOLDER_KINDS = ("folder", "classes", "images")
CIFAR10_FOLDER = Path("data/cifar10-source")


def read_spec(spec: str) -> tuple[str, Path]:
    """The kind of the source that `spec` names, and its folder (of photos, none: the current one).

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
    if kind == "photos" and not colon:
        return kind, folder
    hint = f"; for a folder write folder:{spec}" if Path(spec).is_dir() else ""
    raise UserError(f"unknown source {spec!r}{hint}: give {SOURCES}")
