"""The files that vectors go to: parts in Parquet, which become a data set (`.parquet`) or one array (`.npy`) when all are there.

A part holds a fixed range of a source's items, so that whoever writes it, at whichever start, writes the same. Parts lie in a
folder beside OUT, `.OUT.parts`, each written whole or not at all; OUT appears when the last is there. Each part says of which
run and source it is, and is checked for it before it is used again.

Parquet: columns index, path, label and label_name where there are such, feature and embedding (lists of fixed size, float32);
what is known of the run and the source is JSON under the key `dist_contrastive` of the schema. Array: fields index, label, path,
feature and embedding, and beside it, in OUT.npy.json, that JSON and which images were left out.
"""

import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_contrastive.atomic import replacing, sync_folder, write_atomic, writing
from dist_contrastive.config import UserError
from dist_contrastive.data.format import LeftOut
from dist_contrastive.folder_lock import LOCK, FolderLock, lock_folder

PART_ITEMS = 4096
"""Items of a part: what is done again, at most, after a stop."""
KEY, PART_KEY = b"dist_contrastive", b"dist_contrastive.part"
"""Where in the schema stands, as JSON, what is known of the run and the source, and what a part says of itself."""
AGAIN = "the same command goes on with the parts that are there"


def require_parquet() -> tuple[Any, Any]:
    """`pyarrow` and `pyarrow.parquet`; `UserError` where they are missing."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("tables of vectors need pyarrow: pip install 'dist_contrastive[serve]'") from error
    return pyarrow, pyarrow.parquet


def ranges_of_parts(num_items: int) -> list[range]:
    """The items of each part."""
    return [range(num_items)[start : start + PART_ITEMS] for start in range(0, num_items, PART_ITEMS)]


@dataclass(frozen=True)
class PartNote:
    """What a part says of itself."""

    start: int
    stop: int
    """Its items are those from `start` to before `stop`."""
    num_rows: int
    bad: tuple[LeftOut, ...] = ()
    """Images that could not be read."""
    num_passed_over: int = 0
    """Files that turned out to be no images."""


@dataclass(frozen=True)
class Vectors:
    """The rows of a part. n"""

    note: PartNote
    indices: np.ndarray
    """int64 [n]"""
    paths: Sequence[str] | None
    labels: np.ndarray | None
    """int64 [n]"""
    rows: np.ndarray
    """float32 [n, D + E]: features and, behind them, embeddings"""


class Parts:
    """The parts of the vectors that are to become `out`.

    `about` is what tells these vectors from others: all of it must be the same for a part to be used again. `classes` are the
    names of labels 0, 1, ...; empty where there are none.
    """

    def __init__(
        self, out: Path, about: Mapping[str, Any], *, num_items: int, classes: Sequence[str], feature_size: int
    ) -> None:
        assert out.suffix in (".parquet", ".npy"), "the command line is checked"
        self.pyarrow, self.parquet = require_parquet()
        self.out, self.about = out, json.loads(json.dumps(about))
        self.classes, self.feature_size = tuple(classes), feature_size
        self.ranges = ranges_of_parts(num_items)
        self.folder = out.with_name(f".{out.name}.parts")
        self._lock: FolderLock | None = None

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Within the context an error of the disk is one line."""
        with writing(self.out, lambda: AGAIN):
            yield

    def is_done(self) -> bool:
        """Whether `out` is there already, with these vectors; `UserError` where something else is."""
        if not (self.out.exists() or self.out.is_symlink()):
            return False
        found: Any = None
        if self.out.suffix == ".npy" and self._beside.is_file():
            found = _json(self._beside.read_bytes())
        elif self.out.suffix == ".parquet" and (self.out / self._name(0)).is_file():
            found = self._about_of(self._schema(self.out / self._name(0)))
        self._require_same(found, self.out)
        return True

    def open(self) -> dict[int, PartNote]:
        """Make and lock the folder; the parts that are there already, by number.

        `UserError` where it can't be written, where another process is at it, and where its parts are of other vectors.
        """
        with writing(self.out, lambda: "the same command begins"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock_folder(self.folder, "OUT")
        numbers = [number for number in range(len(self.ranges)) if (self.folder / self._name(number)).exists()]
        return {number: self._check(number) for number in numbers}

    def close(self) -> None:
        """Let go of the folder; a second call does nothing."""
        if self._lock:
            self._lock.release()
            self._lock = None

    def write(self, number: int, vectors: Vectors) -> None:
        """Write a part, whole or not at all."""
        pa, size = self.pyarrow, self.feature_size
        columns: dict[str, Any] = {"index": pa.array(vectors.indices)}
        if vectors.paths is not None:
            columns["path"] = pa.array(vectors.paths, pa.string())
        if vectors.labels is not None:
            columns["label"] = pa.array(vectors.labels)
            columns["label_name"] = pa.array([self.classes[label] for label in vectors.labels], pa.string())
        for name, rows in (("feature", vectors.rows[:, :size]), ("embedding", vectors.rows[:, size:])):
            values = pa.array(np.ascontiguousarray(rows).reshape(-1))
            columns[name] = pa.FixedSizeListArray.from_arrays(values, rows.shape[1])
        note = {KEY: json.dumps(self.about), PART_KEY: json.dumps(asdict(vectors.note))}
        table = pa.table(columns).replace_schema_metadata(note)
        with self.writing(), replacing(self.folder / self._name(number)) as temporary, open(temporary, "wb") as file:
            # Vectors are as good as random: nothing makes them smaller.
            self.parquet.write_table(
                table, file, compression="none", use_dictionary=["label_name"], write_statistics=["index", "label"]
            )
            file.flush()
            os.fsync(file.fileno())

    def finish(self, notes: Mapping[int, PartNote]) -> None:
        """Make `out` of all parts, whole or not at all, and remove what is not needed any more."""
        assert len(notes) == len(self.ranges), "parts are missing"
        with self.writing():
            if self.out.suffix == ".parquet":
                self.close()
                (self.folder / LOCK).unlink(missing_ok=True)
                self.folder.rename(self.out)
                sync_folder(self.out.parent)
                return
            self._join(notes.values())
            self.close()
            shutil.rmtree(self.folder)

    def _join(self, notes: Collection[PartNote]) -> None:
        """Write the array, part by part."""
        with replacing(self.out) as temporary, open(temporary, "wb") as file:
            dtype = self._dtype()
            shape = (sum(note.num_rows for note in notes),)
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_2_0(file, header)
            for table in self._tables():
                rows = np.zeros(len(table), dtype)
                for name in dtype.names or ():
                    rows[name] = _values(table.column(name), dtype[name])
                file.write(rows.data)
            file.flush()
            os.fsync(file.fileno())
            left_out = [asdict(image) for note in notes for image in note.bad]
            write_atomic(self._beside, (json.dumps({**self.about, "left_out": left_out}, indent=1) + "\n").encode())

    def _dtype(self) -> np.dtype:
        schema = self._schema(self.folder / self._name(0))
        fields: list[tuple[Any, ...]] = [("index", "<i8")]
        if "label" in schema.names:
            fields.append(("label", "<i8"))
        if "path" in schema.names:
            paths = (path for table in self._tables(["path"]) for path in table.column("path").to_pylist())
            fields.append(("path", f"<U{max(map(len, paths), default=1)}"))
        fields += [(name, "<f4", (schema.field(name).type.list_size,)) for name in ("feature", "embedding")]
        return np.dtype(fields)

    def _tables(self, columns: list[str] | None = None) -> Iterator[Any]:
        for number in range(len(self.ranges)):
            yield self.parquet.read_table(self.folder / self._name(number), columns=columns)

    @property
    def _beside(self) -> Path:
        return self.out.with_name(self.out.name + ".json")

    def _name(self, number: int) -> str:
        return f"part-{number:05d}.parquet"

    def _check(self, number: int) -> PartNote:
        """What a part that is there says of itself, once it is known to be of these vectors and whole."""
        path, items = self.folder / self._name(number), self.ranges[number]
        file = self._file(path)
        schema = file.schema_arrow
        self._require_same(self._about_of(schema), self.folder)
        found = _json((schema.metadata or {}).get(PART_KEY, b""))
        try:
            note = PartNote(**{**found, "bad": tuple(LeftOut(**bad) for bad in found["bad"])})
        except (TypeError, KeyError) as error:
            raise _damaged(path, "it does not say which part it is") from error
        left_out = len(note.bad) + note.num_passed_over
        if (note.start, note.stop) != (items.start, items.stop) or note.num_rows != len(items) - left_out:
            raise _damaged(path, f"it says that it has {note.num_rows} rows of items {note.start} to {note.stop}")
        if file.metadata.num_rows != note.num_rows:
            raise _damaged(path, f"it has {file.metadata.num_rows} rows and says that it has {note.num_rows}")
        return note

    def _file(self, path: Path) -> Any:
        try:
            return self.parquet.ParquetFile(path)
        except (self.pyarrow.ArrowException, OSError) as error:
            raise _damaged(path, str(error).splitlines()[0]) from error

    def _schema(self, path: Path) -> Any:
        return self._file(path).schema_arrow

    def _about_of(self, schema: Any) -> Any:
        return _json((schema.metadata or {}).get(KEY, b""))

    def _require_same(self, found: Any, where: Path) -> None:
        """`UserError` where what a file says is not `about`."""
        if not isinstance(found, dict):
            raise UserError(
                f"{where} holds something else than vectors that embed wrote; give another OUT, or remove it"
            )
        differ = [name for name in self.about if found.get(name) != self.about[name]]
        if differ:
            names = " and ".join(differ)
            raise UserError(f"{where} holds vectors of another {names}; give another OUT, or remove it")


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"{path} is damaged ({why}); remove it, and {AGAIN}")


def _json(text: bytes) -> Any:
    """What is in it; None where it is no JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def _values(column: Any, dtype: np.dtype) -> np.ndarray:
    """A column of a table as an array of `dtype`, [n] or [n, its shape]."""
    column = column.combine_chunks()
    if not dtype.shape:
        return np.asarray(column.to_pylist() if dtype.kind == "U" else column.to_numpy(zero_copy_only=False), dtype)
    values: np.ndarray = column.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(-1, *dtype.shape)


def merged(notes: Iterable[Mapping[int, PartNote]]) -> dict[int, PartNote]:
    """The notes of all ranks, by number of the part, in order."""
    return dict(sorted((number, note) for one in notes for number, note in one.items()))
