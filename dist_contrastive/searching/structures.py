"""The three ways in which neighbours are looked for, each over FAISS: all vectors, a graph, or lists of coded vectors.

A structure finds candidates. Which of them are nearest is decided by the vectors themselves, so a code may be small.
"""

import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dist_contrastive.config import UserError, require

Kind = Literal["flat", "hnsw", "ivfpq"]
Rows = np.ndarray
"""int64: positions of vectors in the index's files, which is what FAISS calls ids."""

FLAT_UP_TO = 10_000
"""So many vectors are compared one by one in less than a millisecond."""
GRAPH_CANDIDATES = 1.5
"""Candidates for each neighbour asked for: the graph compares codes of 8 bits a dimension, which seldom confuse neighbours."""
LIST_CANDIDATES = 10.0
"""The same for product quantisation, whose codes are coarser."""
LEAST_CANDIDATES = 15
TRAINING_ROWS = 200_000
"""What codes and lists are trained on at most."""
PIECE = 20_000
"""Vectors inserted between two reports of progress."""


@dataclass(frozen=True)
class Parameters:
    """Of a structure; zeros stand for what follows from the number of vectors and their dimension."""

    links: int = 16
    """HNSW: links of a vector on each level; twice as many on the lowest."""
    build_effort: int = 100
    """HNSW: candidates while inserting (efConstruction)."""
    lists: int = 0
    """IVF-PQ: how many lists. 0: four times the square root of the number of vectors."""
    code_bytes: int = 0
    """IVF-PQ: bytes of a code; divides the dimension. 0: about a quarter of the dimension."""

    def __post_init__(self) -> None:
        require(2 <= self.links <= 256, f"--links {self.links}: give 2 to 256")
        require(self.build_effort >= 1, f"--build-effort {self.build_effort}: give at least 1")
        require(self.lists >= 0, f"--lists {self.lists}: give at least 1, or 0 for a number that follows")
        require(self.code_bytes >= 0, f"--code-bytes {self.code_bytes}: give at least 1, or 0 for what follows")


def load_faiss() -> Any:
    """The package, which is optional."""
    try:
        import faiss
    except ImportError as error:
        raise UserError("nearest neighbours need faiss: pip install 'dist_contrastive[serve]'") from error
    return faiss


def one_thread() -> None:
    """Let FAISS use one OpenMP thread for what this thread asks of it from now on: requests share the cores among themselves, and
    teams of threads that wait for each other make single searches late."""
    load_faiss().omp_set_num_threads(1)


def bytes_of(kind: Kind, num: int, dimension: int, parameters: Parameters) -> int:
    """Memory that searching takes, beside vectors that are mapped from their file."""
    if kind == "flat":
        return num * dimension * 4
    if kind == "hnsw":
        return num * (dimension + parameters.links * 9 + 16)
    return num * (_code_bytes(dimension, parameters) + 8) + _num_lists(num, parameters) * dimension * 4


def choose_kind(num: int, dimension: int, memory_gib: float, parameters: Parameters) -> tuple[Kind, str]:
    """The kind for so many vectors, and why, in words."""
    if num <= FLAT_UP_TO:
        return "flat", f"up to {FLAT_UP_TO:,} vectors are compared one by one"
    need = bytes_of("hnsw", num, dimension, parameters) / 2**30
    if need <= memory_gib:
        return "hnsw", f"its {need:.2g} GiB fit into {memory_gib:.3g} GiB of memory (--memory-gib)"
    return "ivfpq", f"a graph's {need:.2g} GiB do not fit into {memory_gib:.3g} GiB of memory (--memory-gib)"


def num_candidates(kind: Kind, k: int) -> int:
    """How many candidates are compared exactly to find `k` neighbours."""
    if kind == "flat":
        return k
    return max(LEAST_CANDIDATES, math.ceil((GRAPH_CANDIDATES if kind == "hnsw" else LIST_CANDIDATES) * k))


def efforts(kind: Kind, structure: Any) -> list[int]:
    """What a search's effort may be, least first: candidates in the graph (efSearch), or lists that are looked into (nprobe)."""
    if kind == "flat":
        return [0]
    if kind == "hnsw":
        return [15, 17, 20, 23, 26, 30, 34, 39, 45, 52, 60, 70, 80, 95, 110, 130, 150, 200, 280, 400, 560, 800]
    ladder = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    return [*(number for number in ladder if number < structure.nlist), structure.nlist]


def new_structure(kind: Kind, vectors: np.ndarray, parameters: Parameters, seed: int = 0) -> Any:
    """An empty graph or empty lists for vectors like `vectors` float32 [n, d], whose codes are trained on some of them."""
    faiss = load_faiss()
    num, dimension = vectors.shape
    chosen = np.random.default_rng(seed).permutation(num)[:TRAINING_ROWS]
    sample = np.ascontiguousarray(vectors[np.sort(chosen)])
    if kind == "hnsw":
        made = faiss.IndexHNSWSQ(dimension, faiss.ScalarQuantizer.QT_8bit, parameters.links, faiss.METRIC_INNER_PRODUCT)
        made.hnsw.efConstruction = parameters.build_effort
    else:
        num_lists, code_bytes = _num_lists(num, parameters), _code_bytes(dimension, parameters)
        require(dimension % code_bytes == 0, f"--code-bytes {code_bytes} does not divide the dimension, {dimension}")
        require(num_lists <= num, f"--lists {num_lists}: there are but {num} vectors")
        coarse = faiss.IndexFlatIP(dimension)
        bits = 8 if len(sample) >= 256 else 4
        require(len(sample) >= 16, f"--kind ivfpq is for many vectors, not for {num}; leave it out")
        made = faiss.IndexIVFPQ(coarse, dimension, num_lists, code_bytes, bits, faiss.METRIC_INNER_PRODUCT)
        # It warns of fewer; what comes of it is measured.
        made.cp.min_points_per_centroid = made.pq.cp.min_points_per_centroid = 1
    made.train(sample)
    return made


def all_of(vectors: np.ndarray) -> Any:
    """The structure of kind flat, which is `vectors` float32 [n, d] themselves."""
    made = load_faiss().IndexFlatIP(vectors.shape[1])
    made.add(vectors)
    return made


def insert(kind: Kind, structure: Any, vectors: np.ndarray, first: int, stop: int, tell: Callable[[int], None]) -> None:
    """Put rows `first` to `stop` of `vectors` into a structure, on all usable cores; `tell` hears of each piece's number."""
    if kind == "flat":
        return
    load_faiss().omp_set_num_threads(len(os.sched_getaffinity(0)))
    for start in range(first, stop, PIECE):
        end = min(stop, start + PIECE)
        piece = np.ascontiguousarray(vectors[start:end])
        if kind == "hnsw":
            structure.add(piece)
        else:  # it has fewer than there are rows once some were removed
            structure.add_with_ids(piece, np.arange(start, end))
        tell(end - start)


def remove(kind: Kind, structure: Any, rows: Rows) -> bool:
    """Take rows out of a structure; False where it keeps them, and whoever searches has to leave them out."""
    if kind != "ivfpq":
        return False
    faiss = load_faiss()
    structure.remove_ids(faiss.IDSelectorBatch(rows))
    return True


def selector(alive: np.ndarray) -> Any:
    """What lets FAISS see those rows alone that are true in `alive`, bool [n]."""
    return load_faiss().IDSelectorBitmap(np.packbits(alive, bitorder="little"))


class Finder:
    """Finds candidates in a structure, with one effort. Threads may share it."""

    def __init__(self, kind: Kind, structure: Any, effort: int, only: Any = None) -> None:
        """`only`: a `selector` of the rows that are seen; None: all."""
        self.kind, self.structure = kind, structure
        self._effort, self._only = effort, only
        self._parameters: dict[int, Any] = {}  # making them takes as long as a search among few

    def candidates(self, queries: np.ndarray, num: int) -> Rows:
        """Rows int64 [q, num] that may be the nearest of `queries` float32 [q, d]; -1 where there are no more."""
        if num not in self._parameters:
            self._parameters[num] = self._made(num)
        found: Rows = self.structure.search(queries, num, params=self._parameters[num])[1]
        return found

    def _made(self, num: int) -> Any:
        faiss = load_faiss()
        if self.kind == "flat":
            return faiss.SearchParameters(sel=self._only)
        if self.kind == "hnsw":
            return faiss.SearchParametersHNSW(sel=self._only, efSearch=max(self._effort, num))
        return faiss.SearchParametersIVF(nprobe=self._effort)


def write_structure(structure: Any, path: Path) -> str:
    """Write it, wait until the disk has it, and return the SHA-256 of the file. Raises OSError."""
    faiss = load_faiss()
    digest, failed = hashlib.sha256(), []
    with open(path, "wb") as file:

        def write(data: bytes) -> int:
            try:  # FAISS tells of what fails in here in words of its own
                digest.update(data)
                file.write(data)
            except OSError as error:
                failed.append(error)
                return 0
            return len(data)

        try:
            faiss.write_index(structure, faiss.PyCallbackIOWriter(write))
        except RuntimeError:
            if failed:
                raise failed[0] from None
            raise
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def read_structure(path: Path) -> Any:
    return load_faiss().read_index(str(path))


def _num_lists(num: int, parameters: Parameters) -> int:
    # FAISS asks for 39 vectors a list to train on.
    return parameters.lists or max(1, min(round(4 * math.sqrt(num)), min(num, TRAINING_ROWS) // 39))


def _code_bytes(dimension: int, parameters: Parameters) -> int:
    if parameters.code_bytes:
        return parameters.code_bytes
    return max(size for size in range(1, max(1, dimension // 4) + 1) if dimension % size == 0)
