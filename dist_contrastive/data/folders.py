"""Folders of images: which files lie below one, each found once, and what the sub-folders stand for.

A sub-folder may be a class, a split (train, test, ...) or nothing of the kind, and its name alone does not say so: `train`
may be a vehicle beside `bus`, `fold1` holds no class of that name. So names and what lies below them are looked at
together, and whatever looks like splits and is not understood is refused with the folders' names: a dataset whose
labels are its splits would train without a word.
"""

import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import NoReturn

from dist_contrastive.config import UserError, require
from dist_contrastive.data.format import NO_LABEL, TEST, TRAIN, LeftOut

IMAGE_SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".ppm", ".pgm",
    ".pbm", ".pnm",
    # Of images that pack does not read: a user who has some hears so.
    ".avif", ".heic", ".heif", ".jp2", ".j2k", ".jxl", ".svg", ".psd", ".exr", ".hdr", ".tga", ".eps", ".ico", ".dng",
    ".cr2", ".nef", ".arw",
})  # fmt: skip
"""What a file's name ends in that calls it an image."""

_MAGIC = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n|RIFF....WEBP|BM|GIF8|II\*\x00|MM\x00\*|P[1-6]\s", re.DOTALL)

TEST_SHARE = 0.15
"""Part of each class (without labels: of all images) that becomes the test split of a folder without one."""


class Role(Enum):
    """What a split is for."""

    TRAIN = "train training trn trainval"
    TEST = "test tests testing tst eval evaluation holdout"
    VAL = "val valid validation validate dev devel"
    EXTRA = "unlabeled unlabelled unsupervised unsup extra"
    """More images, mostly without labels."""
    UNCLEAR = ""
    """Several of the others in one name."""


_ROLES = {word: role for role in Role for word in role.value.split()}
_CONTAINERS = frozenset({"image", "images", "img", "imgs", "jpg", "jpeg", "jpegs", "png"})
"""Names of folders for images of any class."""

_TARGETS = frozenset({"masks", "labels", "annotations", "segmentations"})
"""Names of folders for what belongs to the images of another folder."""

_FILLERS = _CONTAINERS | {
    "set", "sets", "data", "dataset", "datasets", "picture", "pictures", "pic", "pics", "photo", "photos", "split", "splits",
    "folder", "dir", "full", "all", "raw",
}  # fmt: skip
"""What may stand beside a split's name without changing it (train_images), or alone between it and the images."""

_PARTS = frozenset({"fold", "folds", "split", "part", "parts", "subset", "batch", "chunk", "shard", "cv", "kfold"})
"""Names of parts of a dataset that are no classes; they come with a number."""

_SHOWN = 5


@dataclass
class Tree:
    """A folder below the source's folder; links are followed, but to no folder that is there anyway."""

    path: Path
    name: str
    """Path within the source's folder, POSIX; empty for that folder itself."""
    files: list[str] = field(default_factory=list)
    """Names (like `name`) of the files in it, sorted."""
    folders: list["Tree"] = field(default_factory=list)
    links: list["Link"] = field(default_factory=list)
    """Links in it to folders that are in the dataset anyway, or that hold it; they are not followed."""

    @property
    def last(self) -> str:
        return self.name.rpartition("/")[2]

    @property
    def shown(self) -> str:
        """Its name as messages give it."""
        return f"{self.name}/" if self.name else str(self.path)

    @cached_property
    def num_images(self) -> int:
        """Files directly in it that look like images."""
        start = len(self.name) + 1 if self.name else 0
        return sum(looks_like_image(self.path / name[start:]) for name in self.files)

    @cached_property
    def inner(self) -> list["Tree"]:
        """The folders in it below which there are images."""
        return [folder for folder in self.folders if folder.has_images]

    @cached_property
    def has_images(self) -> bool:
        return bool(self.num_images) or bool(self.inner)

    def walk(self) -> Iterator["Tree"]:
        yield self
        for folder in self.folders:
            yield from folder.walk()

    def all_files(self) -> list[str]:
        """The names of all files below it, relative to it, sorted."""
        start = len(self.name) + 1 if self.name else 0
        return sorted(name[start:] for tree in self.walk() for name in tree.files)


@dataclass(frozen=True)
class Link:
    name: str
    target: str
    """Under what name the folder it leads to is there already."""
    target_is_link: bool
    """Whether that name, too, leads over a link: then neither is the folder's own place."""


@dataclass(frozen=True)
class Part:
    """Files that share label and split: all below `tree`."""

    tree: Tree
    label: int
    split: int | None
    """None: a share of them is to be held out for the test split."""


@dataclass(frozen=True)
class Layout:
    """What a folder's sub-folders stand for."""

    classes: tuple[str, ...]
    """Empty without labels."""
    parts: tuple[Part, ...]
    note: str
    """In words: where the splits come from, what is not used, why there are no labels."""


class Walk:
    """Reads a folder: its `tree`, and which of its files have several names (`same_files`).

    Folders are read in two rounds, first those that lie there, then those that links lead to; each is read once, whatever
    the links do. So a link to a folder above, to a sibling or into a circle adds nothing.
    """

    def __init__(self, folder: Path) -> None:
        self.same_files: dict[tuple[int, int], list[tuple[str, bool]]] = {}
        """Of each file with several names: the names, and whether they lead over a link. Own places come first."""
        self._files: dict[tuple[int, int], tuple[str, bool]] = {}
        self._folders: dict[tuple[int, int], tuple[str, bool]] = {}
        for above in folder.resolve().parents:
            self._folders[_identity(above)] = (str(above), False)
        self._linked: list[tuple[Tree, str, bool]] = []
        """Links that wait for the second round: where, their name, and whether they lead to a folder."""
        self.tree = Tree(folder, "")
        self._read(self.tree, over_link=False)
        while self._linked:
            waiting, self._linked = self._linked, []
            for tree, name, is_folder in waiting:
                if is_folder:
                    self._enter(tree, name, over_link=True)
                else:
                    self._add_file(tree, name, over_link=True)
        for tree in self.tree.walk():
            tree.files.sort()
            tree.folders.sort(key=lambda folder: folder.name)

    def _read(self, tree: Tree, *, over_link: bool) -> None:
        self._folders[_identity(tree.path)] = (tree.name or str(tree.path), over_link)
        for entry in _entries(tree.path):
            name = f"{tree.name}/{entry.name}" if tree.name else entry.name
            if entry.is_symlink():
                self._linked.append((tree, name, os.path.isdir(entry.path)))
            elif entry.is_dir():
                self._enter(tree, name, over_link=over_link)
            else:
                self._add_file(tree, name, over_link=over_link)

    def _enter(self, tree: Tree, name: str, *, over_link: bool) -> None:
        folder = Tree(tree.path / name.rpartition("/")[2], name)
        known = self._folders.get(_identity(folder.path))
        if known is not None:
            tree.links.append(Link(name, *known))
        else:
            tree.folders.append(folder)
            self._read(folder, over_link=over_link)

    def _add_file(self, tree: Tree, name: str, *, over_link: bool) -> None:
        try:
            status = (tree.path / name.rpartition("/")[2]).stat()
        except OSError:  # a link to nowhere: packing lists it as unreadable
            tree.files.append(name)
            return
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            return
        identity = status.st_dev, status.st_ino
        first = self._files.setdefault(identity, (name, over_link))
        if first[0] != name:
            self.same_files.setdefault(identity, [first]).append((name, over_link))
        tree.files.append(name)


def recognise(tree: Tree) -> Layout:
    """What the folders in `tree` stand for: splits, classes, or nothing (images without labels).

    Raises `UserError`, with the folders' names and what to do, where that is not clear.
    """
    _require_images(tree)
    splits = _splits(tree)
    if splits:
        return _split_layout(tree, splits)
    if not tree.inner:
        return _unlabelled(tree, "the images lie in one folder")
    if tree.num_images:
        _refuse(tree, f"{tree.path} holds {tree.num_images} images beside folders of images ({_names(tree.inner)})")
    if len(tree.inner) > 1:
        _refuse_hidden_splits(tree)
        return _class_layout(tree)
    # One folder with images: whatever it is called, it is no class. What it holds may be splits or the images.
    only = tree.inner[0]
    while not only.num_images and len(only.inner) == 1 and not _splits(only):
        only = only.inner[0]
    if not only.num_images and _splits(only):
        return _split_layout(only, _splits(only))
    if only.inner:
        _refuse(
            only,
            f"{only.shown} is the only folder of images in {tree.path}; for its folders as classes: folder:{only.path}",
        )
    _require_filled(tree)
    return _unlabelled(only, f"all images lie in one folder, {only.shown}")


def class_folders(tree: Tree) -> Layout:
    """Each folder in `tree` is a class, whatever it is called and whatever it holds."""
    _require_images(tree)
    require(
        len(tree.inner) > 1,
        f"{tree.path} holds {len(tree.inner)} folder(s) with images; classes:DIR takes two or more, images:DIR any number",
    )
    return _class_layout(tree)


def no_labels(tree: Tree) -> Layout:
    """All images below `tree`, whatever the folders."""
    _require_images(tree)
    return _unlabelled(tree, "as asked for")


def split_role(name: str) -> tuple[Role | None, str]:
    """What the name of a folder says about a split, and what else it says.

    `train2017`, `Train_Images` and `trainset` are (TRAIN, ""), `seg_train` is (TRAIN, "seg"), `truck` is (None, "truck").
    """
    roles, rest = set(), []
    for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name):
        word = word.lower()
        short = next((role for role in _ROLES if word[: len(role)] == role and word[len(role) :] in _FILLERS), word)
        if short in _ROLES:
            roles.add(_ROLES[short])
        elif word not in _FILLERS:
            rest.append(word)
    if roles == {Role.TRAIN, Role.VAL}:
        roles = {Role.TRAIN}
    elif Role.EXTRA in roles:
        roles = {Role.EXTRA}
    return (None if not roles else roles.pop() if len(roles) == 1 else Role.UNCLEAR), " ".join(rest)


def _splits(tree: Tree) -> dict[Role, Tree]:
    """The splits among the folders of `tree`, which are all of its folders with images; empty where there are none."""
    said = {folder.name: split_role(folder.last) for folder in tree.inner}
    # Names that say something else beside the split (seg_train) are splits if all say the same beside it.
    rests = {rest for _, rest in said.values()}
    together = len(tree.inner) > 1 and len(rests) == 1 and all(role is not None for role, _ in said.values())
    found = [folder for folder in tree.inner if said[folder.name][0] and (together or not said[folder.name][1])]
    others = [folder for folder in tree.inner if folder not in found]
    if not found:
        return {}
    if others:
        # `train` beside `bus` and `car` is a vehicle, if it holds images as a class does.
        if len(found) == 1 and found[0].last.casefold() == "train" and not found[0].inner:
            return {}
        _refuse(tree, f"{_names(found)} in {tree.path} is named like a split, {_names(others)} is not")
    splits: dict[Role, Tree] = {}
    for folder in found:
        role = said[folder.name][0]
        assert role is not None
        if role is Role.UNCLEAR:
            _refuse(tree, f"{folder.shown} in {tree.path} could be several splits")
        if role in splits:
            _refuse(tree, f"{splits[role].shown} and {folder.shown} in {tree.path} are named like the same split")
        splits[role] = folder
    return splits


def _split_layout(tree: Tree, splits: dict[Role, Tree]) -> Layout:
    """Splits that hold class folders, or images without labels."""
    if Role.TRAIN not in splits:
        hint = "".join(f"; for {folder.shown} alone: folder:{folder.path}" for folder in splits.values())
        _refuse(tree, f"{tree.path} has {_names(list(splits.values()))} and no training split{hint}")
    content = {role: _content(folder) for role, folder in splits.items() if role is not Role.EXTRA}
    train = content[Role.TRAIN]
    labelled = len(train.inner) > 1
    test: Tree | None = None
    unused = [f"{splits[Role.EXTRA].shown} (further images)"] if Role.EXTRA in splits else []
    for role in (Role.TEST, Role.VAL):
        folder = content.get(role)
        if folder is None:
            continue
        if labelled and not folder.inner:
            unused.append(f"{folder.shown} (no class folders)")
        elif test is not None:
            unused.append(f"{folder.shown} ({test.shown} is there)")
        else:
            test = folder
    if tree.num_images:
        unused.append(f"{tree.num_images} image(s) beside the splits")
    used = [train] if test is None else [train, test]
    _refuse_links(tree, *used)
    label_note = ""
    if labelled:
        for folder in used:
            _refuse_hidden_splits(folder)
    else:
        if train.inner and test is not None and {folder.last for folder in test.inner} - {train.inner[0].last}:
            _refuse(
                tree, f"{train.shown} has one class folder only ({train.inner[0].last}) and {test.shown} has others"
            )
        label_note = f"no labels: {train.shown} has {'one class folder only' if train.inner else 'no class folders'}"
        if test is not None and len(test.inner) > 1:
            unused.append(f"the class folders of {test.shown}")
    classes = _common_classes(train, test) if labelled else ()
    parts = [
        part
        for folder, split in zip(used, (TRAIN if test is not None else None, TEST), strict=False)
        for part in _parts(folder, classes, split)
    ]
    note = f"train from {train.shown}, test from {test.shown}" if test else _held_out(labelled, f" in {train.shown}")
    unused_note = f"not used: {', '.join(unused)}" if unused else ""
    return Layout(classes, tuple(parts), "; ".join(text for text in (note, label_note, unused_note) if text))


def _content(split: Tree) -> Tree:
    """The folder below `split` that holds its class folders or its images: train/images/ and train/train/ are no classes."""
    tree = split
    while not tree.num_images and len(tree.inner) == 1:
        role, rest = split_role(tree.inner[0].last)
        if rest and tree.inner[0].last.casefold() != split.last.casefold():
            break
        if role not in (None, split_role(split.last)[0]):
            break
        tree = tree.inner[0]
    if tree.num_images and tree.inner:
        _refuse(tree, f"{tree.shown} holds {tree.num_images} images beside folders of images ({_names(tree.inner)})")
    return tree


def _common_classes(train: Tree, test: Tree | None) -> tuple[str, ...]:
    """The sorted names of the class folders of both splits."""
    of_train, of_test = ({folder.last for folder in tree.folders} if tree else set() for tree in (train, test))
    if test is None:
        return tuple(sorted(of_train))
    if not of_train & {folder.last for folder in test.inner}:
        raise UserError(
            f"{test.shown} holds no class of {train.shown} ({_names(test.inner)}): give its folders the names of the training "
            f"classes; for {train.shown} alone: folder:{train.path}"
        )
    new = {name.casefold(): name for name in of_test - of_train}
    for name in sorted(of_train - of_test):
        if name.casefold() in new:
            raise UserError(
                f"{train.shown}{name} and {test.shown}{new[name.casefold()]} would be two classes: give them one name"
            )
    return tuple(sorted(of_train | of_test))


def _class_layout(tree: Tree) -> Layout:
    _refuse_links(tree)
    _require_filled(tree)
    classes = tuple(sorted(folder.last for folder in tree.folders))
    unused = f"; not used: {tree.num_images} image(s) beside the class folders" if tree.num_images else ""
    return Layout(classes, tuple(_parts(tree, classes, None)), _held_out(True) + unused)


def _unlabelled(tree: Tree, why: str) -> Layout:
    return Layout((), tuple(_parts(tree, (), None)), f"{_held_out(False)}; no labels: {why}")


def _parts(tree: Tree, classes: Sequence[str], split: int | None) -> list[Part]:
    """`tree` as a part of its own, or its class folders as one each."""
    if not classes:
        return [Part(tree, NO_LABEL, split)]
    labels = {name: label for label, name in enumerate(classes)}
    return [Part(folder, labels[folder.last], split) for folder in tree.folders]


def _held_out(labelled: bool, where: str = "") -> str:
    of_what = "each class" if labelled else "the images"
    return f"{100 * TEST_SHARE:g} % of {of_what}{where} held out for test by a hash of the path"


def _refuse_hidden_splits(tree: Tree) -> None:
    """`UserError` where the folders of `tree` do not look like classes but like splits of a kind that is not known here."""
    inner, rename = tree.inner, "; if they are splits, call them train and test"
    said = [split_role(folder.last)[0] for folder in inner]
    roles = {role for role in said if role is not None}
    if len(roles) > 1 and 2 * sum(role is not None for role in said) >= len(inner):
        _refuse(tree, f"{_names(inner)} in {tree.path} look like splits{rename}")
    words = {folder.name: set(re.findall(r"[a-z]+", folder.last.lower())) for folder in inner}
    if all(words[folder.name] & _PARTS for folder in inner):
        _refuse(tree, f"{_names(inner)} in {tree.path} look like parts of a dataset{rename}")
    # images/ beside masks/: two classes would tell pictures from their annotations.
    no_classes = [f for f in inner if words[f.name] and (words[f.name] <= _CONTAINERS or words[f.name] <= _TARGETS)]
    if no_classes:
        of_images = [folder for folder in no_classes if words[folder.name] <= _CONTAINERS]
        alone = f"; for {of_images[0].shown} alone: folder:{of_images[0].path}" if len(of_images) == 1 else ""
        _refuse(tree, f"{_names(no_classes)} in {tree.path} is not named like a class{alone}")
    for folder in inner:
        below = [split_role(below.last) for below in folder.inner]
        if below and not folder.num_images and all(role is not None and not rest for role, rest in below):
            _refuse(tree, f"{folder.shown} in {tree.path} holds splits of its own ({_names(folder.inner)})")
    # Folders whose folders are called the same are splits or other parts of a dataset, and those below them the classes.
    below_each = [{below.last for below in folder.inner} for folder in inner]
    times = Counter(name for names in below_each for name in names)
    shared = {name for name, count in times.items() if count > 1}
    if len(shared) > 1 and all(2 * len(names & shared) >= max(2, len(names)) for names in below_each):
        _refuse(
            tree,
            f"{_names(inner)} in {tree.path} hold folders of the same names ({_list(sorted(shared))}), as splits do{rename}",
        )


def _refuse_links(*trees: Tree) -> None:
    """`UserError` where a class folder or a split is only a link to what is in the dataset anyway."""
    for link in (link for tree in trees for link in tree.links):
        raise UserError(
            f"{link.name} is a link to {link.target}, so the same images would be there twice: remove one of them"
        )


def _require_images(tree: Tree) -> None:
    require(tree.has_images, f"{tree.path} holds no images; put them into it, or into {tree.path}/<class>/")


def _require_filled(tree: Tree) -> None:
    for folder in tree.folders:
        require(bool(folder.all_files()), f"{folder.path} holds no images; fill it or remove it")


def _refuse(tree: Tree, what: str) -> NoReturn:
    raise UserError(
        f"{what}; if the folders are classes all the same, give classes:{tree.path}; to pack all images without labels, "
        f"images:{tree.path}"
    )


def _names(folders: Sequence[Tree]) -> str:
    return _list([folder.shown for folder in folders])


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def files_of(walk: Walk, layout: Layout) -> tuple[list[tuple[Part, list[str]]], list[LeftOut]]:
    """Each part with the files in it (relative to its folder, sorted), and what is left out because it is there twice.

    A link gives way to the file or the folder that it leads to. Raises `UserError` where a file has its place in two
    classes, or to train and to test.
    """
    part_of_folder = {part.tree.name: part for part in layout.parts}

    def part_of(name: str) -> Part | None:
        while name and name not in part_of_folder:
            name = name.rpartition("/")[0]
        return part_of_folder.get(name)

    left_out = []
    for tree in walk.tree.walk():
        for link in tree.links:
            part = part_of(link.name)
            if part is None:
                continue
            if link.target_is_link:
                _require_one_place(link.target, part_of(link.target), link.name, part)
            left_out.append(LeftOut(link.name, f"a link to {link.target}, whose images have their place there"))
    dropped = set()
    for names in walk.same_files.values():
        used = [(name, over_link, part) for name, over_link in names if (part := part_of(name)) is not None]
        for name, over_link, part in used[1:]:
            first, first_over_link, first_part = used[0]
            if first_over_link or not over_link:
                _require_one_place(first, first_part, name, part)
            left_out.append(LeftOut(name, f"the same file as {first}"))
            dropped.add(name)
    parts = []
    for part in layout.parts:
        prefix = f"{part.tree.name}/" if part.tree.name else ""
        parts.append((part, [name for name in part.tree.all_files() if prefix + name not in dropped]))
    return parts, left_out


def _require_one_place(first: str, first_part: Part | None, second: str, second_part: Part) -> None:
    if first_part is None or first_part == second_part:
        return
    places = "in two classes" if first_part.label != second_part.label else "to train on and to test on"
    raise UserError(f"{first} and {second} are the same images, {places}: remove one of them")


def _identity(path: Path) -> tuple[int, int]:
    """Device and inode of what `path` leads to."""
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from error
    return status.st_dev, status.st_ino


def looks_like_image(path: Path) -> bool:
    """Whether the file's suffix or its first bytes say that it is an image; only packing decodes it."""
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return True
    try:
        with open(path, "rb") as file:
            return _MAGIC.match(file.read(12)) is not None
    except OSError:
        return False


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What lies in `folder`, by name, without hidden entries and what macOS packs beside the files."""
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if not entry.name.startswith(".") and entry.name != "__MACOSX"]
    except OSError as error:
        raise UserError(f"{folder} can't be listed: {error.strerror}") from error
    return sorted(found, key=lambda entry: entry.name)
