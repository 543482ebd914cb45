"""`python -m benchmarks.search`: how fast are the ten nearest neighbours found, at which recall?

One query at a time on one thread, as a server asks: all vectors one by one (exact), this package's index, opened from a folder,
and, where they are installed, hnswlib and usearch with as many links and the same effort of building. Each contender gets the
least effort that reaches the recall; with it they take turns. The queries are in none of the indices.

The vectors have the shape of embeddings, not of noise, for which every graph is slow: 1,000 clusters of uneven size in a space of
few dimensions, bent by a random two-layer network into all of them, with a little noise, of unit length. Their local intrinsic
dimension (maximum likelihood, Levina and Bickel 2004, 100 neighbours) stands in the record.

    python -m benchmarks.search
    python -m benchmarks.search --sizes 10000 --rounds 3 --out records/search
"""

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.frame import Budget, Record, Turns, at_least, begin, comparison, curves, take_turns
from dist_contrastive.cli import main_guard
from dist_contrastive.config import require
from dist_contrastive.searching import structures
from dist_contrastive.searching.build import SAME, IndexWriter, Settings, exact_scores
from dist_contrastive.searching.index_file import Encoder, SearchIndex, unit_vectors
from dist_contrastive.searching.structures import Parameters

QUESTION = "how fast are the ten nearest neighbours found, at which recall?"
K = 10
EFFORTS = (10, 15, 20, 26, 34, 45, 60, 80, 110, 150, 200, 280, 400, 560, 800)
EXACT, OURS = "exact", "this package"
QUERIES, MEDIAN, RECALL = "queries/s", "p50 ms", "recall@10"
BUILD, OPEN = "s to build", "s to open"
EXACT_QUERIES = 50
"""How many queries all vectors are compared with one by one: each takes long."""
Found = Callable[[np.ndarray], np.ndarray]
"""Ids int64 [K] of the neighbours of one query float32 [1, d]."""


@dataclass(frozen=True)
class Command(Turns):
    sizes: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    """Numbers of vectors."""
    dimension: int = 128
    """Of a vector."""
    inner_dimension: int = 24
    """Of the space that the vectors are bent from."""
    queries: int = 1000
    """Vectors looked for."""
    recall: float = 0.95
    """What each contender has to reach."""
    links: int = 16
    """Of a vector in each graph."""
    build_effort: int = 100
    """Candidates while inserting."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 200, "sizes")
        at_least(self, 2, "dimension", "inner_dimension", "links")
        at_least(self, 1, "queries", "build_effort")
        require(0 < self.recall <= 1, f"--recall {self.recall:g}: give more than 0, up to 1")


class Contender(NamedTuple):
    """A way to find neighbours: by effort, how one query is answered."""

    with_effort: Callable[[int], Found]
    efforts: Sequence[int]
    build_s: float
    open_s: float | None = None


class Timed(NamedTuple):
    """Of one pass over the queries."""

    queries_per_s: float
    p50_ms: float
    recall: float


def embeddings_like(num: int, dimension: int, inner: int, seed: int = 0) -> np.ndarray:
    """Unit vectors float32 [num, dimension], as the page above says."""
    rng = np.random.default_rng(seed)
    first = rng.standard_normal((inner, 2 * inner), np.float32) / np.sqrt(inner)
    second = rng.standard_normal((2 * inner, dimension), np.float32) / np.sqrt(2 * inner)
    sizes = rng.dirichlet(np.full(1000, 0.5))
    centers = 1.5 * rng.standard_normal((1000, inner), np.float32)
    found = np.empty((num, dimension), np.float32)
    for start in range(0, num, 50_000):
        part = found[start : start + 50_000]
        inside = centers[rng.choice(1000, len(part), p=sizes)] + rng.standard_normal((len(part), inner), np.float32)
        part[:] = np.tanh(inside @ first) @ second + 0.02 * rng.standard_normal(part.shape, np.float32)
        part[:] = unit_vectors(part, dimension)
    return found


def intrinsic_dimension(vectors: np.ndarray, queries: np.ndarray, k: int = 100) -> float:
    """Median over `queries` of the local estimate from the distances to their `k` nearest."""
    faiss = structures.load_faiss()
    squared = np.maximum(faiss.knn(queries, vectors, k)[0], 1e-12)
    logs = 0.5 * np.log(squared[:, -1:] / squared[:, :-1])
    return float(np.median(1 / logs.mean(1)))


def ours(vectors: np.ndarray, command: Command, folder: Path) -> tuple[Contender, SearchIndex]:
    encoder = Encoder("none", 0, "feature", {})
    settings = Settings("auto", command.recall, 1e6, Parameters(command.links, command.build_effort))
    start = time.perf_counter()
    with IndexWriter(folder, encoder, vectors.shape[1], settings) as writer:
        for first in range(0, len(vectors), 100_000):
            part = vectors[first : first + 100_000]
            writer.add(np.arange(first, first + len(part)), part)
        facts = writer.commit()
    build_s = time.perf_counter() - start
    start = time.perf_counter()
    index = SearchIndex(folder)
    open_s = time.perf_counter() - start

    def with_effort(effort: int) -> Found:
        index.facts = replace(facts, effort=effort)
        return lambda query: index.search(query, K).ids[0]

    return Contender(with_effort, structures.efforts(facts.kind, index.structure), build_s, open_s), index


def of_hnswlib(vectors: np.ndarray, command: Command) -> Contender:
    import hnswlib

    start = time.perf_counter()
    index = hnswlib.Index("ip", vectors.shape[1])
    index.init_index(len(vectors), ef_construction=command.build_effort, M=command.links)
    index.add_items(vectors)
    build_s = time.perf_counter() - start
    index.set_num_threads(1)

    def with_effort(effort: int) -> Found:
        index.set_ef(effort)
        return lambda query: index.knn_query(query, K)[0][0].astype(np.int64)

    return Contender(with_effort, EFFORTS, build_s)


def of_usearch(vectors: np.ndarray, command: Command) -> Contender:
    from usearch.index import Index

    start = time.perf_counter()
    index = Index(
        ndim=vectors.shape[1], metric="ip", dtype="f32",
        connectivity=command.links, expansion_add=command.build_effort,
    )  # fmt: skip
    index.add(np.arange(len(vectors)), vectors)
    build_s = time.perf_counter() - start

    def with_effort(effort: int) -> Found:
        index.expansion_search = effort
        return lambda query: index.search(query[0], K, threads=1).keys.astype(np.int64)

    return Contender(with_effort, EFFORTS, build_s)


def of_exact(vectors: np.ndarray) -> Contender:
    structure = structures.all_of(vectors)

    def find(query: np.ndarray) -> np.ndarray:
        structures.one_thread()
        found: np.ndarray = structure.search(query, K)[1][0]
        return found

    return Contender(lambda effort: find, (0,), 0.0)


def measure(find: Found, vectors: np.ndarray, queries: np.ndarray, kth: np.ndarray) -> Timed:
    """One pass over the queries, whose K-th highest cosines are `kth`."""
    times, hits = [], 0
    for query, worst in zip(queries, kth, strict=True):
        start = time.perf_counter()
        ids = find(query[None])
        times.append(time.perf_counter() - start)
        hits += int((vectors[ids[ids >= 0]] @ query >= worst - SAME).sum())
    return Timed(len(times) / sum(times), float(np.median(times)) * 1e3, hits / (K * len(times)))


def measure_size(record: Record, command: Command, num: int, budget: Budget) -> None:
    case = f"{num:,} × {command.dimension}"
    every = embeddings_like(num + command.queries, command.dimension, command.inner_dimension)
    vectors, queries = every[:num], every[num:]
    kth = exact_scores(vectors, queries, K, np.ones(num, bool))
    with tempfile.TemporaryDirectory() as folder:
        own, index = ours(vectors, command, Path(folder) / "index")
        contenders = {EXACT: of_exact(vectors), OURS: own}
        peers: dict[str, Callable[[np.ndarray, Command], Contender]] = {"hnswlib": of_hnswlib, "usearch": of_usearch}
        for name, build in peers.items():
            if record.has_peer(name, name):
                contenders[name] = build(vectors, command)
        ladders: dict[str, list[dict[str, Any]]] = {}
        chosen: dict[str, Callable[[], Timed]] = {}
        for name, contender in contenders.items():
            few = slice(EXACT_QUERIES) if name == EXACT else slice(None)
            ladders[name] = []
            for effort in contender.efforts:
                timed = measure(contender.with_effort(effort), vectors, queries[few], kth[few])
                ladders[name].append({"effort": effort, **timed._asdict()})
                if timed.recall >= command.recall:
                    break
            chosen[name] = partial(measure, contender.with_effort(effort), vectors, queries[few], kth[few])
        found = take_turns(chosen, command.rounds, budget=budget)
        index.close()
    for name, passes in found.items():
        record.add(case, name, QUERIES, [one.queries_per_s for one in passes])
        record.add(case, name, MEDIAN, [one.p50_ms for one in passes])
        record.add(case, name, RECALL, [one.recall for one in passes])
        if name != EXACT:
            record.add(case, name, BUILD, [contenders[name].build_s])
    if own.open_s is not None:
        record.add(case, OURS, OPEN, [own.open_s])
    record.details[case] = {
        "kind": index.facts.kind,
        "intrinsic_dimension": intrinsic_dimension(vectors, queries[:200]),
        "ladders": ladders,
    }


def page(record: Record, command: Command) -> str:
    reference = "hnswlib" if any(one.contender == "hnswlib" for one in record.series) else EXACT
    dimensions = ", ".join(f"{case}: {facts['intrinsic_dimension']:.1f}" for case, facts in record.details.items())
    return (
        f"Ten neighbours of one query at a time, one thread; the least effort with recall@10 of {command.recall:g} or more.\n\n"
        f"{comparison(record, [QUERIES, MEDIAN, RECALL], reference)}\n"
        f"{comparison(record, [BUILD, OPEN], None)}\n"
        f"Local intrinsic dimension of the vectors: {dimensions}.\n"
    )


def main(argv: Sequence[str] | None = None) -> None:
    command, record = begin(Command, "search", argv, __doc__, question=QUESTION, packages=("faiss-cpu",))
    budget = Budget(command.minutes)
    for num in command.sizes:
        if budget.is_over():
            record.leave_out(f"{num:,} vectors", "--minutes were over")
            continue
        measure_size(record, command, num, budget)
    figure = curves(record, QUERIES, lambda case: float(case.split(" ")[0].replace(",", "")), xlabel="vectors")
    record.write("Nearest neighbours", page(record, command), {"queries_per_second": figure})


if __name__ == "__main__":
    sys.exit(main_guard(main))
