"""Images with captions as they are distributed: a table with a row for each caption or image, or tar shards.

A table (CSV, TSV, JSON lines, Parquet) names an image file in each row, relative to its own folder; rows that lead to the
same file are one pair. A shard is a tar whose members of one stem belong together: an image and its captions in a `.txt`, a
`.json` or both. Neither is unpacked: pairs are listed, and packing reads their images later.

What is wrong with one pair (no caption, no image) leaves it out with its row or member; what is wrong with the file (its
columns, its encoding, a truncated shard) is refused.
"""

import csv
import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal

from dist_contrastive.config import UserError, require
from dist_contrastive.data.folders import IMAGE_SUFFIXES
from dist_contrastive.data.format import LeftOut
from dist_contrastive.data.spec import TABLE_SUFFIXES, shards_of

IMAGE_NAMES = frozenset({
    "image", "img", "path", "file", "filename", "filepath", "imagepath", "imgpath", "imagefile", "imagefilename",
})  # fmt: skip
URL_NAMES = frozenset({"url", "imageurl", "uri", "link"})
LABEL_NAMES = frozenset({"label", "class"})
SPLIT_NAMES = frozenset({"split"})
_CAPTION_NAME = re.compile(r"(caption|text|title|sentence|comment)s?\d*")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")

END_OF_TAR = bytes(2 * tarfile.BLOCKSIZE)

Rows = Iterator[tuple[int, Mapping[str, object]]]
"""Numbers of rows as their file counts them, from 1, a header included; and what they hold."""


@dataclass(frozen=True)
class Columns:
    """Which columns to take; the usual names where nothing is given."""

    image: str = ""
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Member:
    """A file within a tar that is not compressed."""

    tar: Path
    name: str
    start: int
    """Where in the tar its bytes begin."""
    size: int

    def read(self) -> bytes:
        with open(self.tar, "rb") as file:
            file.seek(self.start)
            return file.read(self.size)

    def open(self, mode: Literal["rb"]) -> BinaryIO:
        """A file to read it from, as a path opens its own."""
        return io.BytesIO(self.read())


@dataclass
class Pair:
    """An image and what is said of it."""

    name: str
    image: Path | Member
    where: str
    """Its first row, or its shard, for messages."""
    captions: list[str]
    label: str | None
    split: str | None


@dataclass
class Listing:
    pairs: list[Pair] = field(default_factory=list)
    bad: list[LeftOut] = field(default_factory=list)
    """Pairs that lack something."""
    passed_over: Counter[str] = field(default_factory=Counter)
    """Members of shards that are neither images nor captions, by suffix."""


class _BadPairError(Exception):
    """A pair that is left out; the text is the reason."""


def list_pairs(path: Path, columns: Columns) -> Listing:
    """The pairs of a table or of tar shards (a folder of them, one, or a pattern such as shard-{000..009}.tar).

    Raises `UserError` where it is neither, or can't be understood as a whole.
    """
    try:
        shards = shards_of(path)
        require(
            not (shards and columns.image), f"--image-column {columns.image}: tar shards have no columns; leave it out"
        )
        return _of_shards(shards, columns) if shards else _of_table(path, columns)
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}") from error


def _of_table(path: Path, columns: Columns) -> Listing:
    names, read = TABLES[path.suffix.lower()](path)
    chosen = _choose(names, columns, str(path))
    listing = Listing()
    found: dict[object, Pair] = {}
    number = 0
    for number, row in read(chosen.all()):
        where = f"{path.name} row {number}"
        try:
            place = _image_of(row.get(chosen.image), where)
            image = path.parent / place
            pair = Pair(place, image, where, chosen.captions_of(row), chosen.label_of(row), chosen.split_of(row))
        except _BadPairError as error:
            listing.bad.append(LeftOut(where, str(error)))
            continue
        first = found.setdefault(_identity(image), pair)
        if first is pair:
            listing.pairs.append(pair)
            continue
        for what, one, other in (("label", first.label, pair.label), ("split", first.split, pair.split)):
            require(
                one == other,
                f"{first.where} and row {number} are of the same image, {place}, and give it the {what} {one} and {other}: "
                "correct one of them",
            )
        first.captions += [caption for caption in pair.captions if caption not in first.captions]
    require(number > 0, f"{path} has no rows; give a table with an image and a caption in each")
    return listing


def _identity(image: Path) -> object:
    """What two rows of one image have in common: links and other spellings of its path are the same file."""
    try:
        status = image.stat()
    except (OSError, ValueError):  # packing says that it is not there
        return str(image)
    return status.st_dev, status.st_ino


def _image_of(value: object, where: str) -> str:
    """The path that a row gives for its image."""
    if value is None or value == "":
        raise _BadPairError("no image")
    if not isinstance(value, str):
        raise UserError(
            f"{where}: the image is no path but {_kind(value)}; write the images to files, or to tar shards"
        )
    require(
        not _URL.match(value),
        f"{where}: the image is a URL ({value}); download the images first (img2dataset writes tar shards that pack reads)",
    )
    return str(PurePosixPath(value))


@dataclass(frozen=True)
class _Chosen:
    """The names of the columns that are read."""

    image: str
    captions: tuple[str, ...]
    label: str | None
    split: str | None

    def all(self) -> list[str]:
        return [name for name in (self.image, *self.captions, self.label, self.split) if name]

    def captions_of(self, row: Mapping[str, object]) -> list[str]:
        """The captions in a row, each once."""
        captions: dict[str, None] = {}
        for name in self.captions:
            value = row.get(name)
            for text in value if isinstance(value, list) else [value]:
                if text is None:
                    continue
                if not isinstance(text, str):
                    raise _BadPairError(f"{name} is no text but {_kind(text)}")
                try:
                    text.encode()
                except UnicodeEncodeError as error:
                    raise _BadPairError(f"{name} is not text that UTF-8 can hold ({error.reason})") from error
                if text.strip():
                    captions[text.strip()] = None
        if not captions:
            raise _BadPairError("empty caption")
        return list(captions)

    def label_of(self, row: Mapping[str, object]) -> str | None:
        return _text_of(row, self.label)

    def split_of(self, row: Mapping[str, object]) -> str | None:
        return _text_of(row, self.split)


def _text_of(row: Mapping[str, object], name: str | None) -> str | None:
    """What a column holds, as text; None without such a column."""
    if name is None:
        return None
    value = row.get(name)
    if value is None or str(value).strip() == "":
        raise _BadPairError(f"no {name}")
    return str(value).strip()


def _kind(value: object) -> str:
    return {dict: "a record", list: "a list", bytes: "bytes", bool: "a truth value"}.get(type(value), "a number")


def _choose(names: Sequence[str], columns: Columns, where: str) -> _Chosen:
    """Which of the columns `names` hold what; `UserError` where that is not clear."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    require(not twice, f"{where} has several columns of the name {_list(twice)}: give each its own name")
    shown = f"{where} has the columns {_list(names)}"
    for option, given in (
        ("--image-column", (columns.image,) * bool(columns.image)),
        ("--caption-columns", columns.captions),
    ):
        for name in given:
            require(name in names, f"{option} {name}: {shown}; give one of them")

    def one_of(usual: frozenset[str], what: str, advice: str) -> str | None:
        found = [name for name in names if _plain(name) in usual]
        require(len(found) < 2, f"{shown}, of which {_list(found)} could all be the {what}; {advice}")
        return found[0] if found else None

    image = columns.image or one_of(IMAGE_NAMES, "image", "give --image-column")
    if not image:
        is_url = any(_plain(name) in URL_NAMES for name in names)
        advice = (
            "download the images first (img2dataset writes tar shards that pack reads)"
            if is_url
            else "give --image-column"
        )
        raise UserError(f"{shown}, none of which is a path of an image; {advice}")
    captions = columns.captions or tuple(name for name in names if _CAPTION_NAME.fullmatch(_plain(name)))
    require(bool(captions), f"{shown}, none of which is a caption; give --caption-columns")
    label, split = (
        one_of(usual, what, "rename one of them") for usual, what in ((LABEL_NAMES, "label"), (SPLIT_NAMES, "split"))
    )
    return _Chosen(image, captions, label, split)


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)


Table = tuple[list[str], Callable[[Sequence[str]], Rows]]
"""The names of a table's columns, and its rows with the given ones of them."""


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file, without a byte order mark; `UserError` with the line that is not UTF-8."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path} line {number} is not UTF-8 ({error.reason}); convert the file: iconv -f ENCODING -t UTF-8"
                ) from error


def _delimited(delimiter: str) -> Callable[[Path], Table]:
    def table(path: Path) -> Table:
        def cells() -> Iterator[list[str]]:
            reader = csv.reader(_lines(path), delimiter=delimiter, strict=True)
            try:
                yield from reader
            except csv.Error as error:
                raise UserError(
                    f"{path} line {reader.line_num} is no {path.suffix[1:]} ({error}); put fields that hold quotes in quotes, "
                    "and write theirs twice"
                ) from error

        lines = cells()
        header = [name.strip() for name in next(lines, [])]
        require(bool(header), f"{path} has no header; its first row names the columns")

        def rows(_: Sequence[str]) -> Rows:
            for number, values in enumerate(lines, 2):
                if not values:
                    continue
                require(
                    len(values) == len(header),
                    f"{path} row {number} has {len(values)} fields and the header {len(header)}; put fields that hold a "
                    f"{'tab' if delimiter == chr(9) else 'comma'} in quotes",
                )
                yield number, dict(zip(header, values, strict=True))

        return header, rows

    return table


def _record(text: str | bytes, where: str) -> dict[str, object]:
    """The JSON object `text`; `UserError` where it is none, or names a field twice."""

    def unique(items: list[tuple[str, object]]) -> dict[str, object]:
        twice = [name for name, count in Counter(name for name, _ in items).items() if count > 1]
        require(not twice, f"{where} has several fields of the name {_list(twice)}: give each its own name")
        return dict(items)

    try:
        record = json.loads(text, object_pairs_hook=unique)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}); repair it") from error
    if not isinstance(record, dict):
        raise UserError(f"{where} is no JSON object; give one with an image and a caption")
    return record


def _json_lines(path: Path) -> Table:
    records = [
        (number, _record(line, f"{path} row {number}")) for number, line in enumerate(_lines(path), 1) if line.strip()
    ]
    names = list(dict.fromkeys(name for _, record in records for name in record))
    require(bool(names), f"{path} has no rows; give one JSON object a line")
    return names, lambda _: iter(records)


def _parquet(path: Path) -> Table:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path} needs pyarrow: pip install 'dist_contrastive[parquet]'") from error
    broken = (pyarrow.ArrowException, OSError)
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except broken as error:
        raise UserError(f"{path} is not a Parquet file ({' '.join(str(error).split())})") from error

    def rows(names: Sequence[str]) -> Rows:
        number = 0
        try:
            for batch in file.iter_batches(columns=list(names)):
                columns = {name: batch.column(name) for name in names}
                for place in range(len(batch)):
                    number += 1
                    yield number, {name: column[place].as_py() for name, column in columns.items()}
        except UnicodeDecodeError as error:
            raise UserError(f"{path} row {number} is not UTF-8 ({error.reason}); write its texts as UTF-8") from error
        except broken as error:
            raise UserError(f"{path} can't be read after row {number} ({' '.join(str(error).split())})") from error

    return list(file.schema_arrow.names), rows


TABLES: dict[str, Callable[[Path], Table]] = {
    ".csv": _delimited(","),
    ".tsv": _delimited("\t"),
    ".jsonl": _json_lines,
    ".parquet": _parquet,
}
assert tuple(TABLES) == TABLE_SUFFIXES


def _of_shards(shards: Sequence[Path], columns: Columns) -> Listing:
    """The pairs of tar shards, in the order of the shards and of their members."""
    listing = Listing()
    for shard in shards:
        for stem, members in _by_stem(shard, listing.passed_over).items():
            where = f"{shard.name} member {stem}"
            try:
                listing.pairs.append(_of_members(members, where, columns))
            except _BadPairError as error:
                listing.bad.append(LeftOut(where, str(error)))
    require(bool(listing.pairs or listing.bad), f"{shards[0]} has no images with captions beside them")
    for what in ("label", "split"):
        having: list[Pair] = []
        lacking: list[Pair] = []
        for pair in listing.pairs:
            (lacking if getattr(pair, what) is None else having).append(pair)
        if having and lacking:
            raise UserError(
                f"{lacking[0].where} has no {what} in its .json, and {having[0].where} has one: give all of them one, or none"
            )
    return listing


def _by_stem(shard: Path, passed_over: Counter[str]) -> dict[str, list[Member]]:
    """The images and captions in a shard by their stem."""
    found: dict[str, list[Member]] = {}
    total, last = shard.stat().st_size, "its beginning"
    again = "fetch or write the shard again"
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                require(
                    member.offset_data + member.size <= total,
                    f"{shard} is truncated in its member {member.name}; {again}",
                )
                last = member.name
                if not member.isfile():
                    continue
                place = PurePosixPath(member.name)
                suffix = place.suffix.lower()
                if suffix not in IMAGE_SUFFIXES and suffix not in (".txt", ".json"):
                    passed_over[suffix] += 1
                    continue
                of_stem = found.setdefault(str(place.with_suffix("")), [])
                of_stem.append(Member(shard, member.name, member.offset_data, member.size))
    except (tarfile.TarError, EOFError) as error:
        raise UserError(
            f"{shard} can't be read as a tar without compression after {last} ({error}); {again}"
        ) from error
    with open(shard, "rb") as file:
        file.seek(max(0, total - len(END_OF_TAR)))
        require(file.read() == END_OF_TAR, f"{shard} is truncated after its member {last}: it has no end; {again}")
    return found


def _of_members(members: Sequence[Member], where: str, columns: Columns) -> Pair:
    """The pair that the members of one stem are."""
    suffixes = Counter(PurePosixPath(member.name).suffix.lower() for member in members)
    images = [member for member in members if PurePosixPath(member.name).suffix.lower() in IMAGE_SUFFIXES]
    if len(images) != 1:
        raise _BadPairError("no image" if not images else f"several images: {_list([image.name for image in images])}")
    if max(suffixes.values()) > 1:
        raise _BadPairError(f"several members with the suffix {max(suffixes, key=suffixes.__getitem__)}")
    row: dict[str, object] = {}
    names: list[str] = []
    for member in members:
        suffix = PurePosixPath(member.name).suffix.lower()
        if suffix in IMAGE_SUFFIXES:
            continue
        try:
            text = member.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise _BadPairError(f"{member.name} is not UTF-8 ({error.reason})") from error
        if suffix == ".json":
            try:
                record = _record(text, member.name)
            except UserError as error:
                raise _BadPairError(str(error)) from error
            row |= record
            wanted = columns.captions or tuple(name for name in record if _plain(name) in ("caption", "captions"))
            names += [name for name in wanted if name in record]
        else:
            row[""] = text  # no field of a JSON object that anybody wrote
            names.insert(0, "")
    if not names:
        raise _BadPairError("no caption, neither in a .txt nor in a .json")
    label, split = (next((name for name in row if _plain(name) in usual), None) for usual in (LABEL_NAMES, SPLIT_NAMES))
    chosen = _Chosen("", tuple(names), label, split)
    image = images[0]
    return Pair(
        f"{image.tar.name}/{image.name}",
        image,
        where,
        chosen.captions_of(row),
        chosen.label_of(row),
        chosen.split_of(row),
    )
