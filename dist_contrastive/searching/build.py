"""How an index comes to be and changes: written whole or not at all, measured while it is built."""

import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self

import numpy as np
import psutil
from torch import Tensor

from dist_contrastive.atomic import sync_folder, write_atomic, writing
from dist_contrastive.checkpoint import sha256_of
from dist_contrastive.checkpoint.tensor_file import write_tensors
from dist_contrastive.config import require
from dist_contrastive.folder_lock import LOCK, FolderLock, lock_folder
from dist_contrastive.searching import structures
from dist_contrastive.searching.index_file import (
    INDEX,
    OF_INDEX,
    Encoder,
    Facts,
    File,
    Items,
    Measured,
    SearchIndex,
    Source,
    is_index,
    nearest,
    read_facts,
    unit_vectors,
)  # fmt: skip
from dist_contrastive.searching.structures import Kind, Parameters

HELD_OUT = 1000
"""Vectors that recall is measured with."""
FEWEST_HELD_OUT = 100
"""Where so few are new, what was measured before still holds."""
K = 10
SAME = 1e-6
"""Cosines that differ by less are the same: equal images have equal vectors, and any of them will do."""
AGAIN = "give the same command again"


@dataclass(frozen=True)
class Settings:
    """How an index is built."""

    kind: Kind | Literal["auto"] = "auto"
    recall: float = 0.95
    """Of the ten nearest neighbours, how many are to be found; searching takes the least effort that does."""
    memory_gib: float = 0.0
    """What the index may take when it is searched; 0: half of what is free now."""
    parameters: Parameters = field(default_factory=Parameters)
    picture_size: int = 0
    """Pixels of a picture's longer side; 0: no pictures."""

    def __post_init__(self) -> None:
        require(0 < self.recall <= 1, f"--recall {self.recall:g}: give more than 0, up to 1")
        require(
            self.memory_gib >= 0, f"--memory-gib {self.memory_gib:g}: give more than 0, or 0 for half of what is free"
        )
        require(
            self.picture_size == 0 or 16 <= self.picture_size <= 1024,
            f"--pictures {self.picture_size}: give 16 to 1024, or 0 for none",
        )


class IndexWriter:
    """Writes a new index, or more vectors into one: use it in a `with` block, `add` what there is, and `commit`.

    Without a commit, or where the process ends before, the folder stays as it was but for files that the next writer removes.
    What follows from the vectors (kind, effort) is found when committed; vectors are on disk until then, not in memory.
    """

    def __init__(
        self,
        path: Path,
        encoder: Encoder,
        dimension: int,
        settings: Settings,
        *,
        source: Source | None = None,
        classes: Sequence[str] = (),
        to_old: bool = False,
    ) -> None:
        """`source` is what is put into it, `classes` are the names of its labels.

        `to_old`: add to the index that is there, with its own kind and parameters; of settings none counts then.

        `UserError` where `path` is something else than an index or nothing, where another process writes it, where the index is
        damaged, of another encoder or of labels with other names, and where the same source was put into it before.
        """
        structures.load_faiss()
        self.path, self.encoder, self.dimension, self.settings = path, encoder, dimension, settings
        self._sources, self._classes = (source,) if source else (), tuple(classes)
        self.old: SearchIndex | None = None
        self._lock = _locked(path, exists=to_old)
        try:
            if to_old:
                self.old = SearchIndex(path)
                old = self.old.facts
                require_same(old, encoder, path)
                require(self._classes == old.classes, f"{path} has labels of other classes; build another index")
                again = [known.name for known in old.sources if known in self._sources]
                require(not again, f"{path} has {', '.join(again)} already: there is nothing to add")
                self._sources = (*old.sources, *self._sources)
            self.change = self.old.facts.change + 1 if self.old else 1
            self._ids: list[np.ndarray] = []
            self._labels: list[np.ndarray | None] = []
            self._paths: list[Sequence[str] | None] = []
            self._picture_places: list[np.ndarray] = []
            self.num_new = 0
            with self._writing():
                _remove_leftovers(path)
                self._vectors: IO[bytes] = open(self._name("vectors", "f32"), "w+b")  # noqa: SIM115
                self._pictures: IO[bytes] = open(self._name("pictures", "bin"), "wb")  # noqa: SIM115
                if self.old:
                    with open(path / self.old.facts.named("vectors")[0], "rb") as file:
                        shutil.copyfileobj(file, self._vectors, 2**24)
        except BaseException:
            _unlock(path, self._lock)
            raise
        self._old_pictures = [f for f in self.old.facts.files if f.name.startswith("pictures")] if self.old else []
        self._pictures_end = sum(file.num_bytes for file in self._old_pictures)

    @property
    def next_id(self) -> int:
        """One more than the highest id that was ever given here."""
        ids = [*([self.old.items.ids] if self.old else []), *self._ids]
        return max((int(part.max()) + 1 for part in ids if len(part)), default=0)

    @property
    def picture_size(self) -> int:
        """Of the pictures that this index has or is to have; 0: none."""
        return self.old.facts.picture_size if self.old else self.settings.picture_size

    def known_paths(self) -> set[str]:
        """Of what was in the index before."""
        if not self.old or not self.old.items.has_paths:
            return set()
        return {self.old.items.path(row) or "" for row in np.flatnonzero(self.old.items.alive).tolist()}

    def add(
        self,
        ids: np.ndarray,
        vectors: np.ndarray | Tensor,
        labels: np.ndarray | None = None,
        paths: Sequence[str] | None = None,
        pictures: Sequence[bytes] | None = None,
    ) -> None:
        """Add n vectors [n, d] of any length, their ids int64 [n], and what else is known, either of all in an index or of none.

        `ValueError` where the numbers differ or vectors are of another dimension or not finite.
        """
        values = unit_vectors(vectors, self.dimension)
        for name, given in (("ids", ids), ("labels", labels), ("paths", paths), ("pictures", pictures)):
            if given is not None and len(given) != len(values):
                raise ValueError(f"{len(given)} {name} of {len(values)} vectors")
        self._ids.append(np.asarray(ids, np.int64))
        self._labels.append(None if labels is None else np.asarray(labels, np.int64))
        self._paths.append(paths)
        with self._writing():
            self._vectors.write(values.data)
            if pictures is not None:
                sizes = np.array([len(picture) for picture in pictures], np.int64)
                starts = self._pictures_end + np.cumsum(sizes) - sizes
                sums = np.array([zlib.crc32(picture) for picture in pictures], np.int64)
                self._pictures.write(b"".join(pictures))
                self._pictures_end += int(sizes.sum())
                self._picture_places.append(np.stack([starts, sizes, sums], 1).reshape(-1, 3))
        self.num_new += len(values)

    def commit(
        self, say: Callable[[str], object] = str, tell: Callable[[int, int], None] = lambda done, all: None
    ) -> Facts:
        """Build, measure, and put the index in place. `say` gets lines for people; `tell` how many vectors are inserted so far,
        and of how many.

        `UserError` where there are no vectors, where two have one id, and where the disk won't take it.
        """
        require(self.num_new > 0, "there is nothing to put into an index")
        items = self._items()
        num, old_num = len(items.ids), len(items.ids) - self.num_new
        # Few new ones tell little, and change little.
        measures = self.old is None or self.num_new >= FEWEST_HELD_OUT
        num_held_out = min(HELD_OUT, max(1, self.num_new // 10)) if measures else 0
        stop, done = num - num_held_out, 0

        def told(inserted: int) -> None:
            nonlocal done
            done += inserted
            tell(done, self.num_new)

        with self._writing():
            self._vectors.flush()
            mapped = np.memmap(self._vectors, np.float32, "r+", shape=(num, self.dimension))
            vectors = mapped.view(np.ndarray)
            kind, parameters = self._kind(num, say)
            chosen = np.random.default_rng(num).choice(self.num_new, num_held_out, replace=False) + old_num
            items = _held_out_last(vectors, items, chosen)
            mapped.flush()
            os.fsync(self._vectors.fileno())
            structure = self._structure(kind, vectors[:stop], parameters)
            structures.insert(kind, structure, vectors, old_num, stop, told)
            if measures:
                effort, measured = measure(
                    kind, structure, vectors[:stop], vectors[stop:], items.alive[:stop], self.recall
                )
            else:
                assert self.old is not None
                effort, measured = self.old.facts.effort, self.old.facts.measured
            structures.insert(kind, structure, vectors, stop, num, told)
            facts = self._write(kind, parameters, structure, items, effort, measured)
        if measured.recall_at_10 < self.recall:
            say(
                f"warning: recall@10 is {measured.recall_at_10:.3f}, below --recall {self.recall:g}, whatever the effort; "
                "give --kind hnsw or flat, or more --links or --code-bytes"
            )
        return facts

    @property
    def recall(self) -> float:
        return self.old.facts.asked_recall if self.old else self.settings.recall

    def _items(self) -> Items:
        """Old and new rows."""
        has_labels = [labels is not None for labels in self._labels]
        has_paths = [paths is not None for paths in self._paths]
        has_pictures = [bool(self._picture_places)]
        if self.old:
            items = self.old.items
            has_labels.append(items.labels is not None)
            has_paths.append(items.has_paths)
            has_pictures.append(items.pictures is not None)
        for name, has in (("labels", has_labels), ("paths", has_paths), ("pictures", has_pictures)):
            require(len(set(has)) == 1, f"{self.path}: either all of an index have {name}, or none; build another one")
        new = Items(
            np.concatenate(self._ids),
            np.concatenate([labels for labels in self._labels if labels is not None]) if has_labels[0] else None,
            [path for paths in self._paths for path in paths or ()] if has_paths[0] else None,
            None,
            np.concatenate(self._picture_places) if self._picture_places else None,
        )
        joined = self.old.items.joined(new) if self.old else new
        ids = joined.ids[joined.alive]
        values, counts = np.unique(ids, return_counts=True)
        require(
            len(values) == len(ids),
            f"{self.path}: id {values[counts > 1][0] if len(values) < len(ids) else ''} is there twice; ids must differ",
        )
        return joined

    def _kind(self, num: int, say: Callable[[str], object]) -> tuple[Kind, Parameters]:
        if self.old:
            return self.old.facts.kind, self.old.facts.parameters
        parameters = self.settings.parameters
        if self.settings.kind != "auto":
            return self.settings.kind, parameters
        memory = self.settings.memory_gib or psutil.virtual_memory().available / 2**31
        kind, why = structures.choose_kind(num, self.dimension, memory, parameters)
        say(f"kind {kind}: {why}")
        return kind, parameters

    def _structure(self, kind: Kind, vectors: np.ndarray, parameters: Parameters) -> Any:
        if kind == "flat":
            return structures.all_of(vectors)
        return self.old.structure if self.old else structures.new_structure(kind, vectors, parameters)

    def _write(
        self, kind: Kind, parameters: Parameters, structure: Any, items: Items, effort: int, measured: Measured
    ) -> Facts:
        self._pictures.flush()
        os.fsync(self._pictures.fileno())
        files = [_file(self._name("vectors", "f32")), *self._old_pictures]
        if self._picture_places:
            files.append(_file(self._name("pictures", "bin")))
        facts = Facts(
            kind=kind, parameters=parameters, encoder=self.encoder, dimension=self.dimension, num_rows=len(items.ids),
            num_vectors=int(items.alive.sum()), effort=effort, asked_recall=self.recall, measured=measured,
            picture_size=self.picture_size,
            sources=self._sources, classes=self._classes, change=self.change, files=files,
        )  # fmt: skip
        return put_in_place(self.path, facts, items, structure)

    def _name(self, role: str, ending: str) -> Path:
        return self.path / f"{role}-{self.change:04d}.{ending}"

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with writing(self.path, lambda: AGAIN):
            yield

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._vectors.close()
        self._pictures.close()
        if self.old:
            self.old.close()
        with suppress(OSError):
            _remove_leftovers(self.path)
        _unlock(self.path, self._lock)


def delete(path: Path, ids: np.ndarray) -> Facts:
    """Take the vectors with these ids, int64 [n], out of an index, without building it anew.

    Whoever opens it from now on does not find them; the room that they take in its files comes back when it is built anew.
    `UserError` where one of them is not there, or all are meant, and where `path` is no index.
    """
    lock = _locked(path, exists=True)
    try:
        with SearchIndex(path) as index:
            wanted = np.unique(ids)
            rows = [index.row(item) for item in wanted.tolist()]
            unknown = [int(item) for item, row in zip(wanted, rows, strict=True) if row is None]
            require(
                not unknown, f"{path} has no id {', '.join(map(str, unknown[:5]))}{' ...' if len(unknown) > 5 else ''}"
            )
            gone = np.array(rows, np.int64)
            require(len(gone) < len(index), f"{path} would be empty: remove the folder instead")
            alive = index.items.alive.copy()
            alive[gone] = False
            items = index.items.with_alive(alive)
            structure = index.structure if structures.remove(index.facts.kind, index.structure, gone) else None
            facts = replace(index.facts, num_vectors=int(alive.sum()), change=index.facts.change + 1)
            with writing(path, lambda: AGAIN):
                _remove_leftovers(path)
                return put_in_place(path, facts, items, structure)
    finally:
        _unlock(path, lock)


def put_in_place(path: Path, facts: Facts, items: Items, structure: Any) -> Facts:
    """Write items and, where it changed, the structure; then index.json in the old one's place; then remove what that does not
    name.

    Raises OSError.
    """
    number = f"{facts.change:04d}"
    kept = [file for file in facts.files if not file.name.startswith("items")]
    name = f"items-{number}.safetensors"
    sha256 = write_tensors(path / name, items.tensors())
    kept.append(File(name, (path / name).stat().st_size, sha256))
    if structure is not None and facts.kind != "flat":
        kept = [file for file in kept if not file.name.startswith("structure")]
        name = f"structure-{number}.faiss"
        sha256 = structures.write_structure(structure, path / name)
        kept.append(File(name, (path / name).stat().st_size, sha256))
    facts = replace(facts, files=tuple(kept))
    sync_folder(path)
    write_atomic(path / INDEX, facts.to_json())
    _remove_leftovers(path)
    return facts


def measure(
    kind: Kind, structure: Any, vectors: np.ndarray, queries: np.ndarray, alive: np.ndarray, recall: float
) -> tuple[int, Measured]:
    """The least effort whose recall@10 is `recall` or more (the greatest, where none is), and what was measured with it.

    `queries` [q, d] are not among `vectors` [n, d], of which those are looked at that are `alive`.
    """
    num_vectors = int(alive.sum())
    k = min(K, num_vectors)
    if k == 0:
        return 0, Measured(1.0, 0.0, 0, 0)
    only = None if alive.all() or kind == "ivfpq" else structures.selector(alive)
    exact = exact_scores(vectors, queries, k, alive)
    structures.one_thread()
    effort, found = 0, 0.0
    times: list[float] = []
    for effort in structures.efforts(kind, structure):
        finder = structures.Finder(kind, structure, effort, only)
        times, hits = [], 0
        for query, expected in zip(queries, exact, strict=True):
            begin = time.perf_counter()
            _, scores = nearest(finder, vectors, query[None], k)
            times.append(time.perf_counter() - begin)
            hits += int((scores[0] >= expected - SAME).sum())
        found = hits / (k * len(queries))
        if found >= recall:
            break
    return effort, Measured(found, float(np.median(times)) * 1e3, len(queries), num_vectors)


def exact_scores(vectors: np.ndarray, queries: np.ndarray, k: int, alive: np.ndarray) -> np.ndarray:
    """The k-th highest cosine of each query, float32 [q], by comparing it with all that are alive."""
    faiss = structures.load_faiss()
    faiss.omp_set_num_threads(len(os.sched_getaffinity(0)))
    best = np.full((len(queries), k), -np.inf, np.float32)
    for start in range(0, len(vectors), structures.PIECE):
        part = vectors[start : start + structures.PIECE][alive[start : start + structures.PIECE]]
        if len(part):
            scores = faiss.knn(queries, part, min(k, len(part)), metric=faiss.METRIC_INNER_PRODUCT)[0]
            best = -np.sort(-np.concatenate([best, scores], 1), axis=1)[:, :k]
    return best[:, -1]


def require_same(facts: Facts, encoder: Encoder, path: Path) -> None:
    """`UserError` where an index is of another encoder, or of the other output."""
    differ = encoder.differences(facts.encoder)
    require(not differ, f"{path} is an index of {differ}; build one for this")


def _held_out_last(vectors: np.ndarray, items: Items, chosen: np.ndarray) -> Items:
    """Swap the rows `chosen` of vectors and items with the last ones, so that they can be inserted last."""
    num, count = len(vectors), len(chosen)
    last = np.arange(num - count, num)
    wanted, places = np.setdiff1d(chosen, last), np.setdiff1d(last, chosen)
    order = np.arange(num)
    order[wanted], order[places] = places, wanted
    vectors[wanted], vectors[places] = vectors[places].copy(), vectors[wanted].copy()
    return items.taken(order) if len(wanted) else items


def _file(path: Path) -> File:
    return File(path.name, path.stat().st_size, sha256_of(path))


def _locked(path: Path, *, exists: bool) -> FolderLock:
    """The folder of an index, or an empty one to make it in, locked."""
    if exists:
        require(is_index(path), f"{path} is no index: it has no {INDEX}")
    else:
        require(not is_index(path), f"{path} is an index already: --add adds to it; or remove it, or give another OUT")
        require(path.is_dir() or not (path.exists() or path.is_symlink()), f"{path} is no folder; give another OUT")
    with writing(path, lambda: AGAIN):
        path.mkdir(parents=True, exist_ok=True)
        foreign = [file.name for file in path.iterdir() if not _is_own(file.name)]
        require(not foreign, f"{path} holds something else ({min(foreign, default='')}); give another OUT")
        return lock_folder(path, "OUT")


def _unlock(path: Path, lock: FolderLock) -> None:
    if not is_index(path):  # nothing came of it
        with suppress(OSError):
            (path / LOCK).unlink(missing_ok=True)
            path.rmdir()
    lock.release()


def _is_own(name: str) -> bool:
    return name == INDEX or name.startswith((LOCK, f".{INDEX}")) or OF_INDEX.fullmatch(name) is not None


def _remove_leftovers(path: Path) -> None:
    """Remove files of an index that its index.json does not name: a change that did not come to its end left them."""
    named = {file.name for file in read_facts(path).files} if is_index(path) else set()
    for file in path.iterdir():
        if OF_INDEX.fullmatch(file.name) and file.name not in named:
            file.unlink()
