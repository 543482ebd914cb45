"""An index on disk: a folder of files and `index.json`, which names them with their sums; how it is opened and searched.

    index.json               what it is of, what was measured, and every other file with its size and SHA-256
    vectors-0001.f32         float32 [n, d], unit vectors, as they lie in memory
    items-0001.safetensors   of each vector: id, label, path, where its picture lies, whether it was deleted
    structure-0001.faiss     the graph or the lists (not of kind flat)
    pictures-0001.bin        JPEGs, one behind the other

The number in a name is that of the change that wrote the file. A change writes new files, then puts a new index.json in the old
one's place, then removes what that does not name: whoever opens the folder finds the old index or the new one.

Opening it compares the size and the SHA-256 of every file but the pictures, on threads. Of pictures the sizes of their files are
compared, and a sum of each picture when it is read. Nothing in it is code.
"""

import copy
import hashlib
import json
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from dist_contrastive import __version__
from dist_contrastive.checkpoint import Tensors, read_tensors, sha256_of
from dist_contrastive.config import UserError, require
from dist_contrastive.run_folder.trained import TrainedRun
from dist_contrastive.searching import structures
from dist_contrastive.searching.structures import Kind

FORMAT = 1
INDEX = "index.json"
OF_INDEX = re.compile(r"(vectors-\d{4,}\.f32|items-\d{4,}\.safetensors|structure-\d{4,}\.faiss|pictures-\d{4,}\.bin)")
"""The names of its other files."""
Output = Literal["feature", "embedding"]
MISSING = -1
ANEW = "build it anew, or copy it anew from where it is whole"


@dataclass(frozen=True)
class Encoder:
    """What made the vectors. Vectors of two encoders, or of two outputs of one, can't be compared."""

    method: str
    step: int
    output: Output
    sha256: Mapping[str, str]
    """Of the file of each part's weights that the output comes from."""

    @classmethod
    def of(cls, run: TrainedRun, output: Output) -> "Encoder":
        parts = ("encoder",) if output == "feature" else ("encoder", "projector")
        return cls(run.config.method.name, run.step, output, {part: run.sha256(part) for part in parts})

    def differences(self, other: "Encoder") -> str:
        """In words: what `other` has instead; empty where they are the same."""
        if self.output != other.output:
            return f"{other.output}s, not {self.output}s"
        if self != other:
            return (
                f"another encoder ({other.method}, step {other.step}), not this one ({self.method}, step {self.step})"
            )
        return ""


@dataclass(frozen=True)
class Measured:
    """How good a search is, found while the index was built or last grew."""

    recall_at_10: float
    """Of the ten nearest by exact search, how many are found."""
    p50_ms: float
    """Half of all searches for ten neighbours of one vector, on one thread, take no longer."""
    num_queries: int
    """Vectors looked for, which were not in the index at the time."""
    num_vectors: int
    """Vectors in the index at the time."""


@dataclass(frozen=True)
class Source:
    """A packed dataset, a folder or a table of vectors that was put into the index."""

    name: str
    """The last of its path."""
    identity: str
    """What tells it, with its content, from others; hexadecimal."""


@dataclass(frozen=True)
class File:
    """A file of the index."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Facts:
    """What index.json says."""

    kind: Kind
    parameters: structures.Parameters
    encoder: Encoder
    dimension: int
    num_rows: int
    """Vectors in the files, with those that were deleted."""
    num_vectors: int
    """Those that can be found."""
    effort: int
    """Of a search: candidates in a graph (efSearch), lists that are looked into (nprobe); 0 where all are."""
    asked_recall: float
    measured: Measured
    picture_size: int
    """Pixels of a picture's longer side; 0: there are none."""
    sources: Sequence[Source]
    """What the vectors are of, the first added first."""
    classes: Sequence[str]
    """The names of labels 0, 1, ...; empty where there are none."""
    change: int
    """1 for a new index, one more for each change since."""
    files: Sequence[File]

    def named(self, role: str) -> list[str]:
        """The names of its files of a role: vectors, items, structure or pictures."""
        return [file.name for file in self.files if file.name.startswith(role)]

    def to_json(self) -> bytes:
        facts = json.loads(json.dumps(asdict(self)))
        versions = {"dist_contrastive": __version__, "faiss": structures.load_faiss().__version__}
        page = {"format": FORMAT, "versions": versions, "sha256": _sum(facts), "index": facts}
        return (json.dumps(page, indent=1) + "\n").encode()


class Found(NamedTuple):
    """The neighbours of q vectors, nearest first; k of each."""

    ids: np.ndarray
    """int64 [q, k]; -1 where there are no more."""
    scores: np.ndarray
    """float32 [q, k]: cosines; minus infinity where there are no more."""
    labels: np.ndarray | None
    """int64 [q, k]; -1 where there are no more. None where the index has no labels."""
    paths: list[list[str | None]] | None
    """None where the index has no paths."""


class Items:
    """What an index knows of each of its n rows beside the vector.

    Attributes:
        ids: int64 [n]
        labels: int64 [n], or None
        alive: bool [n]: not deleted
        pictures: int64 [n, 3]: where its JPEG begins in all files of pictures as one, its bytes, its CRC-32; or None
    """

    def __init__(
        self,
        ids: np.ndarray,
        labels: np.ndarray | None = None,
        paths: Sequence[str] | None = None,
        alive: np.ndarray | None = None,
        pictures: np.ndarray | None = None,
    ) -> None:
        self.ids, self.labels, self.pictures = ids, labels, pictures
        self.alive = np.ones(len(ids), bool) if alive is None else alive
        self._paths = None if paths is None else list(paths)
        self._text, self._ends = np.empty(0, np.uint8), np.empty(0, np.int64)

    @property
    def has_paths(self) -> bool:
        return self._paths is not None or len(self._ends) > 0

    def path(self, row: int) -> str | None:
        if self._paths is not None:
            return self._paths[row]
        if not len(self._ends):
            return None
        start = self._ends[row - 1] if row else 0
        return self._text[start : self._ends[row]].tobytes().decode()

    def paths(self) -> list[str] | None:
        return [self.path(row) or "" for row in range(len(self.ids))] if self.has_paths else None

    def taken(self, rows: np.ndarray) -> "Items":
        """Those of `rows`, int64 [m]."""

        def of(values: np.ndarray | None) -> np.ndarray | None:
            return None if values is None else values[rows]

        paths = [self.path(row) or "" for row in rows.tolist()] if self.has_paths else None
        return Items(self.ids[rows], of(self.labels), paths, self.alive[rows], of(self.pictures))

    def joined(self, other: "Items") -> "Items":
        """These and, behind them, those of `other`, which has the same columns."""

        def both(mine: np.ndarray | None, others: np.ndarray | None) -> np.ndarray | None:
            return None if mine is None or others is None else np.concatenate([mine, others])

        ids, alive = np.concatenate([self.ids, other.ids]), np.concatenate([self.alive, other.alive])
        paths = [*(self.paths() or ()), *(other.paths() or ())] if self.has_paths else None
        return Items(ids, both(self.labels, other.labels), paths, alive, both(self.pictures, other.pictures))

    def with_alive(self, alive: np.ndarray) -> "Items":
        changed = copy.copy(self)
        changed.alive = alive
        return changed

    def tensors(self) -> Tensors:
        found = {"ids": self.ids, "alive": self.alive, "labels": self.labels, "pictures": self.pictures}
        arrays = {name: values for name, values in found.items() if values is not None}
        if self._paths is None and self.has_paths:
            arrays |= {"path_ends": self._ends, "path_text": self._text}
        elif self._paths is not None:
            encoded = [path.encode() for path in self._paths]
            arrays["path_ends"] = np.cumsum([len(text) for text in encoded], dtype=np.int64)
            arrays["path_text"] = np.frombuffer(b"".join(encoded) or b"\0", np.uint8)
        return {name: torch.from_numpy(np.array(values)) for name, values in arrays.items()}

    @classmethod
    def of_tensors(cls, tensors: Tensors) -> "Items":
        def get(name: str) -> np.ndarray | None:
            return tensors[name].numpy() if name in tensors else None

        items = cls(tensors["ids"].numpy(), get("labels"), None, tensors["alive"].numpy(), get("pictures"))
        ends, text = get("path_ends"), get("path_text")
        if ends is not None and text is not None:
            items._ends, items._text = ends, text
        return items


class SearchIndex:
    """An index, opened and verified; it stays as it was opened, whatever changes the folder afterwards.

    Attributes:
        path: its folder.
        facts: what index.json says of it.
        items: what is known of each row.
        vectors: float32 [n, d], unit vectors, mapped from their file.
        structure: FAISS's.
    """

    def __init__(self, path: Path) -> None:
        """`UserError` where `path` is no index, or is damaged."""
        self.path = path
        while True:
            self.facts = read_facts(path)
            try:
                self._open()
                return
            except UserError:
                # A change has taken its files away meanwhile: then there is a newer index.json.
                if read_facts(path) == self.facts:
                    raise

    def _open(self) -> None:
        facts = self.facts
        verify(self.path, facts)
        pictures = [file for file in facts.files if file.name.startswith("pictures")]
        try:
            self.items = Items.of_tensors(read_tensors(self.path / facts.named("items")[0]))
            mapped = np.memmap(self.path / facts.named("vectors")[0], np.float32, "r")
            self.vectors: np.ndarray = mapped.reshape(facts.num_rows, facts.dimension).view(np.ndarray)
            if facts.kind == "flat":
                self.structure = structures.all_of(self.vectors)
            else:
                self.structure = structures.read_structure(self.path / facts.named("structure")[0])
            self._pictures = [open(self.path / file.name, "rb") for file in pictures]  # noqa: SIM115
        except (OSError, SafetensorError, ValueError, RuntimeError) as error:
            raise UserError(f"{self.path} can't be read ({error})") from error
        self._picture_starts = np.cumsum([0, *(file.num_bytes for file in pictures)])[:-1]
        only = None if self.items.alive.all() or facts.kind == "ivfpq" else structures.selector(self.items.alive)
        self._finder = structures.Finder(facts.kind, self.structure, facts.effort, only)
        rows = np.flatnonzero(self.items.alive)
        order = np.argsort(self.items.ids[rows], kind="stable")
        self._rows_by_id = rows[order]
        self._ids_in_order = self.items.ids[self._rows_by_id]

    def __len__(self) -> int:
        return self.facts.num_vectors

    def search(self, queries: np.ndarray | Tensor, k: int = 10) -> Found:
        """The `k` nearest neighbours of `queries` [q, d] by cosine, or as many as there are.

        Any number of threads may ask at once; what each asks for is done on that thread alone. `ValueError` where `queries` are
        of another dimension or not finite, or `k` is below 1.
        """
        wanted = unit_vectors(queries, self.facts.dimension)
        if k < 1:
            raise ValueError(f"k is {k}: ask for 1 neighbour or more")
        structures.one_thread()
        rows, scores = nearest(self._finder, self.vectors, wanted, min(k, len(self)))
        ids = self.items.ids[rows]
        labels = None if self.items.labels is None else self.items.labels[rows]
        missing = rows < 0
        if missing.any():
            ids[missing] = MISSING
            if labels is not None:
                labels[missing] = MISSING
        paths = None
        if self.items.has_paths:
            paths = [[None if row < 0 else self.items.path(row) for row in line] for line in rows.tolist()]
        return Found(ids, scores, labels, paths)

    def row(self, item: int) -> int | None:
        """Where the item with this id lies; None where there is none."""
        place = int(np.searchsorted(self._ids_in_order, item))
        is_there = place < len(self._ids_in_order) and self._ids_in_order[place] == item
        return int(self._rows_by_id[place]) if is_there else None

    def picture(self, item: int) -> bytes | None:
        """The JPEG of the item with this id; None where there is none. `UserError` where it is damaged."""
        row = self.row(item)
        if row is None or self.items.pictures is None:
            return None
        start, size, crc = self.items.pictures[row].tolist()
        number = int(np.searchsorted(self._picture_starts, start, side="right")) - 1
        # Reads at a place of its own: threads share the file.
        data = os.pread(self._pictures[number].fileno(), size, start - int(self._picture_starts[number]))
        require(zlib.crc32(data) == crc, f"{self._pictures[number].name} is damaged: the sum of a picture differs")
        return data

    def close(self) -> None:
        """Let go of its files; a second call does nothing."""
        for file in self._pictures:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def nearest(
    finder: structures.Finder, vectors: np.ndarray, queries: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows int64 [q, k] (-1: no more) and cosines float32 [q, k] of the nearest of `vectors` that a structure finds."""
    found_rows = np.empty((len(queries), k), np.int64)
    found_scores = np.empty((len(queries), k), np.float32)
    num = min(structures.num_candidates(finder.kind, k), len(vectors))
    for place, line in enumerate(finder.candidates(queries, num)):
        scores = np.vecdot(vectors[line], queries[place])
        if line[-1] < 0:  # there were fewer
            scores[line < 0] = -np.inf
        best = (-scores).argsort(kind="stable")[:k]
        found_rows[place], found_scores[place] = line[best], scores[best]
    return found_rows, found_scores


def unit_vectors(vectors: np.ndarray | Tensor, dimension: int) -> np.ndarray:
    """`vectors` [n, d] as float32 of length 1; zeros stay zeros.

    `ValueError` where they are of another dimension or not finite.
    """
    values = np.asarray(vectors.detach().cpu() if isinstance(vectors, Tensor) else vectors)
    if values.ndim != 2 or values.shape[1] != dimension:
        raise ValueError(f"vectors are [n, {dimension}], not {list(values.shape)}")
    # In float64 no square of a float32 overflows or vanishes.
    wide = values.astype(np.float32, copy=False).astype(np.float64)
    lengths = np.sqrt(np.vecdot(wide, wide))
    if not np.isfinite(lengths).all():
        raise ValueError("vectors are not finite")
    lengths[lengths == 0] = 1
    return (wide / lengths[:, None]).astype(np.float32)


def is_index(path: Path) -> bool:
    return (path / INDEX).is_file()


def read_facts(path: Path) -> Facts:
    """What the index in `path` says of itself; `UserError` where there is none, and where that was altered."""
    require(is_index(path), f"{path} is no index: it has no {INDEX}")
    try:
        found = json.loads((path / INDEX).read_bytes())
        version, noted = found["format"], found["versions"]["dist_contrastive"]
    except OSError as error:
        raise UserError(f"{path / INDEX} can't be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / INDEX} is damaged (it is not what index writes); {ANEW}") from error
    require(
        version == FORMAT, f"{path} has format {version}, and this version reads {FORMAT}: {noted} wrote it; {ANEW}"
    )
    try:
        require(found["sha256"] == _sum(found["index"]), f"{path / INDEX} is damaged (its sum differs); {ANEW}")
        facts = _facts(found["index"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path / INDEX} is damaged ({error}); {ANEW}") from error
    foreign = [file.name for file in facts.files if not OF_INDEX.fullmatch(file.name)]
    require(not foreign, f"{path / INDEX} names {', '.join(foreign)}, which no index has; {ANEW}")
    return facts


def verify(path: Path, facts: Facts) -> None:
    """`UserError` where a file of the index is missing, or is not what was written. Of pictures sizes alone are looked at."""

    def differs(file: File) -> str:
        try:
            if (path / file.name).stat().st_size != file.num_bytes:
                return f"{path / file.name} is damaged (it has another size); {ANEW}"
            if not file.name.startswith("pictures") and sha256_of(path / file.name) != file.sha256:
                return f"{path / file.name} is damaged (its SHA-256 differs); {ANEW}"
        except OSError as error:
            return f"{path / file.name} can't be read ({error.strerror}); {ANEW}"
        return ""

    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        for problem in pool.map(differs, facts.files):
            require(not problem, problem)


def _facts(found: Mapping[str, Any]) -> Facts:
    made = {
        "parameters": structures.Parameters(**found["parameters"]),
        "encoder": Encoder(**found["encoder"]),
        "measured": Measured(**found["measured"]),
        "files": tuple(File(**file) for file in found["files"]),
        "sources": tuple(Source(**source) for source in found["sources"]),
        "classes": tuple(found["classes"]),
    }
    return Facts(**{**found, **made})


def _sum(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
