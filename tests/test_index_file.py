"""An index on disk: it finds what exact search finds, and whatever becomes of a change, it is the old one or the new one."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_contrastive.config import UserError
from dist_contrastive.searching import structures
from dist_contrastive.searching.build import IndexWriter, Settings, delete, measure
from dist_contrastive.searching.index_file import Encoder, SearchIndex, read_facts, unit_vectors
from dist_contrastive.searching.structures import Kind, Parameters

ENCODER = Encoder("simclr", 7, "feature", {"encoder": "ab"})
KINDS: list[Kind] = ["flat", "hnsw", "ivfpq"]
D = 24


def clustered(num: int, dimension: int = D, seed: int = 0) -> np.ndarray:
    """Vectors float32 [num, dimension] around 40 points in 8 of the dimensions, with some noise in all."""
    rng = np.random.default_rng(seed)
    basis = np.random.default_rng(1).standard_normal((8, dimension))
    centers = np.random.default_rng(2).standard_normal((40, 8))
    inner = centers[rng.integers(0, 40, num)] + 0.5 * rng.standard_normal((num, 8))
    return (np.tanh(inner) @ basis + 0.05 * rng.standard_normal((num, dimension))).astype(np.float32)


def write(
    path: Path, vectors: np.ndarray, kind: Kind = "flat", first: int = 0, to_old: bool = False, **more: int
) -> None:
    """Vector i has id first + i, a label and a path that follow from it, and where `picture_size` is given, a picture."""
    picture_size = more.pop("picture_size", 0)
    settings = Settings(kind, parameters=Parameters(**more), picture_size=picture_size)
    ids = np.arange(first, first + len(vectors))
    with IndexWriter(path, ENCODER, vectors.shape[1], settings, to_old=to_old) as writer:
        for part in np.array_split(np.arange(len(vectors)), 3):
            names = [f"ordner/é{number}.png" for number in ids[part]]
            pictures = [picture_of(number) for number in ids[part]] if picture_size else None
            writer.add(ids[part], vectors[part], ids[part] % 5, names, pictures)
        writer.commit()


def picture_of(item: int) -> bytes:
    return b"picture" * int(item % 4) + str(item).encode()


def exact(vectors: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    """Positions of the nearest by nested loops' arithmetic, in float64."""
    unit = vectors / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    wanted = queries / np.linalg.norm(queries.astype(np.float64), axis=1, keepdims=True)
    return np.argsort(-(wanted @ unit.T), axis=1)[:, :k]


def recall(found: np.ndarray, expected: np.ndarray) -> float:
    return float(
        np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), expected.tolist(), strict=True)])
    )


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_are_those_of_exact_search_with_all_that_is_known_of_them(tmp_path: Path, kind: Kind) -> None:
    vectors, queries = clustered(4000), clustered(100, seed=9)
    write(tmp_path / "x", vectors * np.linspace(0.1, 9, 4000, dtype=np.float32)[:, None], kind, first=100)
    with SearchIndex(tmp_path / "x") as index:
        found = index.search(queries, 10)
        facts = index.facts
    expected = exact(vectors, queries, 10)
    assert recall(found.ids - 100, expected) >= (1 if kind == "flat" else 0.93)
    assert facts.measured.recall_at_10 >= (1 if kind == "flat" else 0.95)
    assert abs(facts.measured.recall_at_10 - recall(found.ids - 100, expected)) < 0.04
    assert facts.measured.num_queries == 400
    assert facts.measured.num_vectors == 3600
    assert facts.measured.p50_ms > 0
    assert facts.kind == kind
    assert len(index) == 4000
    assert found.labels is not None
    assert found.paths is not None
    np.testing.assert_array_equal(found.labels, found.ids % 5)
    assert found.paths == [[f"ordner/é{item}.png" for item in line] for line in found.ids.tolist()]
    cosines = np.einsum("qkd,qd->qk", unit_vectors(vectors, D)[found.ids - 100], unit_vectors(queries, D))
    np.testing.assert_allclose(found.scores, cosines, atol=1e-6)
    assert (np.diff(found.scores) <= 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_added_is_found_and_what_is_deleted_is_not(tmp_path: Path, kind: Kind) -> None:
    path, vectors = tmp_path / "x", clustered(3000)
    write(path, vectors[:2000], kind)
    with SearchIndex(path) as before:
        write(path, vectors[2000:], first=2000, to_old=True)
        gone = np.arange(0, 3000, 3)
        delete(path, gone)
        write(path, vectors[:1], first=0, to_old=True)  # its id is free again
        left = np.setdiff1d(np.arange(3000), gone[1:])
        with SearchIndex(path) as index:
            assert len(index) == len(left)
            found = index.search(vectors, 5).ids
            assert not np.isin(found, gone[1:]).any()
            assert recall(found, left[exact(vectors[left], vectors, 5)]) > (0.999 if kind == "flat" else 0.9)
            assert (found[left, 0] == left).mean() > (0.999 if kind == "flat" else 0.95)
            assert sorted(file.name for file in path.iterdir() if file.name != ".lock") == sorted(
                ["index.json", *(file.name for file in index.facts.files)]
            )
        # Who had opened it before has what it had.
        assert (before.search(vectors[:2000], 1).ids[:, 0] == np.arange(2000)).mean() > 0.95


def test_parallel_insertion_costs_no_recall(tmp_path: Path) -> None:
    vectors, queries = unit_vectors(clustered(6000), D), unit_vectors(clustered(300, seed=9), D)
    found = {}
    for threads in (1, 4):
        structure = structures.new_structure("hnsw", vectors, Parameters())
        structures.load_faiss().omp_set_num_threads(threads)
        structure.add(vectors)
        alive = np.ones(len(vectors), bool)
        _, measured = measure("hnsw", structure, vectors, queries, alive, 0.0)
        found[threads] = measured.recall_at_10
    assert found[4] > found[1] - 0.02
    assert found[4] > 0.9


def test_threads_may_search_at_once(tmp_path: Path) -> None:
    vectors = clustered(3000)
    write(tmp_path / "x", vectors, "hnsw")
    with SearchIndex(tmp_path / "x") as index:
        expected = index.search(vectors, 10)
        wrong, threads_used = [], []

        def search(offset: int) -> None:
            for row in range(offset, 3000, 8):
                if (index.search(vectors[row : row + 1], 10).ids[0] != expected.ids[row]).any():
                    wrong.append(row)
            threads_used.append(structures.load_faiss().omp_get_max_threads())

        workers = [threading.Thread(target=search, args=(offset,)) for offset in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not wrong
    assert threads_used == [1] * 8


def test_pictures_come_back_by_id(tmp_path: Path) -> None:
    path, vectors = tmp_path / "x", clustered(400)
    write(path, vectors[:300], picture_size=64)
    write(path, vectors[300:], first=300, to_old=True, picture_size=64)
    delete(path, np.array([7]))
    with SearchIndex(path) as index:
        assert index.facts.picture_size == 64
        assert all(index.picture(item) == picture_of(item) for item in range(400) if item != 7)
        assert index.picture(7) is None
        assert index.picture(400) is None
        name = next(file.name for file in index.facts.files if file.name.startswith("pictures"))
    data = bytearray((path / name).read_bytes())
    data[-1] ^= 1
    (path / name).write_bytes(data)
    last = int(index.items.ids[index.items.pictures[:300, 0].argmax()])  # type: ignore[index]
    with SearchIndex(path) as index, pytest.raises(UserError, match="a picture differs"):
        index.picture(last)


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_byte_or_a_missing_file_is_one_line(tmp_path: Path, kind: Kind) -> None:
    path = tmp_path / "x"
    write(path, clustered(600), kind)
    files = [file for file in path.iterdir() if file.name != ".lock"]
    assert len(files) == (3 if kind == "flat" else 4)
    for file in files:
        content = file.read_bytes()
        for place in {0, len(content) // 2, len(content) - 2}:
            changed = bytearray(content)
            changed[place] ^= 1
            file.write_bytes(changed)
            if file.name != "index.json" or json_differs(bytes(changed), content):
                with pytest.raises(UserError, match=f"{file.name} is damaged|format"):
                    SearchIndex(path)
        file.write_bytes(content[:-1])
        if file.name != "index.json":
            with pytest.raises(UserError, match="another size"):
                SearchIndex(path)
        file.unlink()
        with pytest.raises(UserError, match=r"can't be read \(No such file|is no index"):
            SearchIndex(path)
        file.write_bytes(content)
    SearchIndex(path).close()


def json_differs(one: bytes, other: bytes) -> bool:
    try:
        return bool(json.loads(one)["index"] != json.loads(other)["index"])
    except (ValueError, KeyError):
        return True


def test_what_is_no_index_or_of_another_encoder_is_refused_and_left_alone(tmp_path: Path) -> None:
    vectors, path = clustered(50), tmp_path / "x"
    with pytest.raises(UserError, match=r"is no index: it has no index\.json"):
        SearchIndex(tmp_path / "nothing")
    with pytest.raises(UserError, match="is no index"):
        write(tmp_path / "nothing", vectors, to_old=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "diary.txt").write_text("mine")
    with pytest.raises(UserError, match=r"something else \(diary.txt\)"):
        write(tmp_path / "other", vectors)
    assert [file.name for file in (tmp_path / "other").iterdir()] == ["diary.txt"]
    with pytest.raises(UserError, match="is no folder"):
        write(tmp_path / "other" / "diary.txt", vectors)
    write(path, vectors)
    with pytest.raises(UserError, match="is an index already: --add adds to it"):
        write(path, vectors)
    before = (path / "index.json").read_bytes()
    for other, words in (
        (Encoder("simclr", 8, "feature", {"encoder": "cd"}), "another encoder"),
        (Encoder("simclr", 7, "embedding", {"encoder": "ab"}), "features, not embeddings"),
    ):
        with pytest.raises(UserError, match=words):
            IndexWriter(path, other, D, Settings(), to_old=True)
    with pytest.raises(UserError, match="id 3 is there twice"):
        write(path, vectors[:1], first=3, to_old=True)
    with pytest.raises(UserError, match="all of an index have pictures, or none"):
        write(path, vectors, first=100, to_old=True, picture_size=32)
    with pytest.raises(UserError, match="has no id 50, 90"):
        delete(path, np.array([90, 50, 3]))
    with pytest.raises(UserError, match="would be empty"):
        delete(path, np.arange(50))
    assert (path / "index.json").read_bytes() == before
    SearchIndex(path).close()


def test_wrong_questions_are_value_errors(tmp_path: Path) -> None:
    write(tmp_path / "x", clustered(30))
    with SearchIndex(tmp_path / "x") as index:
        for wrong in (np.zeros(D), np.zeros((1, D + 1)), np.full((1, D), np.nan)):
            with pytest.raises(ValueError, match="vectors are"):
                index.search(wrong)
        with pytest.raises(ValueError, match="1 neighbour or more"):
            index.search(np.ones((1, D)), 0)
        assert index.search(np.ones((2, D)), 99).ids.shape == (2, 30)
        assert index.search(np.empty((0, D)), 5).ids.shape == (0, 5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=3, max_size=3))
def test_any_finite_vector_has_length_one_or_zero(values: list[float]) -> None:
    (unit,) = unit_vectors(np.array([values], np.float32), 3)
    length = np.linalg.norm(unit.astype(np.float64))
    assert length == 0 if not any(values) else abs(length - 1) < 1e-5


def test_the_kind_follows_from_number_and_memory() -> None:
    assert structures.choose_kind(10_000, 128, 1e-3, Parameters())[0] == "flat"
    assert structures.choose_kind(1_000_000, 128, 4, Parameters())[0] == "hnsw"
    assert structures.choose_kind(1_000_000, 128, 0.1, Parameters())[0] == "ivfpq"


CRASHES = """
import itertools, os, shutil, sys
from pathlib import Path
import numpy as np
from dist_contrastive.searching.build import delete
from dist_contrastive.searching.index_file import SearchIndex
from tests.test_index_file import clustered, write

vectors = clustered(450)

def child(work):
    pid = os.fork()
    if not pid:
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def dying(change, calls):
    # What reaches the disk, what is renamed and what is removed: the process ends just before the given one.
    def counting(function):
        def counted(*args, **options):
            nonlocal calls
            calls -= 1
            if calls < 0:
                os._exit(9)
            return function(*args, **options)
        return counted
    os.fsync, Path.rename, Path.unlink = map(counting, (os.fsync, Path.rename, Path.unlink))
    change()

def expect(path, *sizes):
    with SearchIndex(path) as index:
        assert len(index) in sizes, (len(index), sizes)
        assert index.search(vectors[:50], 1).ids.shape == (50, 1)
        os._exit(sizes.index(len(index)))

changes = {"add": (lambda path: write(path, vectors[300:], first=300, to_old=True), 450),
           "delete": (lambda path: delete(path, np.arange(100)), 200)}
for kind, (name, (change, size)) in itertools.product(sys.argv[2:], changes.items()):
    base, found = Path(sys.argv[1]) / kind, []
    assert base.exists() or child(lambda: write(base, vectors[:300], kind)) == 0
    for calls in range(100):
        path = base.with_name(f"{kind}-{name}-{calls}")
        shutil.copytree(base, path)
        status = child(lambda: dying(lambda: change(path), calls))
        assert status in (0, 9)
        found.append(child(lambda: expect(path, 300, size)))
        if status == 9 and not found[-1]:  # the same command does it
            assert child(lambda: change(path)) == 0
            assert child(lambda: expect(path, size)) == 0
        if status == 0:
            break
    print(kind, name, found)
    assert found == sorted(found) and {0, 1} == set(found) and calls < 99
"""


def test_a_crash_at_any_moment_leaves_the_old_index_or_the_new_one(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", CRASHES, str(tmp_path), *KINDS], cwd=root, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_writer_that_does_not_commit_leaves_nothing(tmp_path: Path) -> None:
    with IndexWriter(tmp_path / "new", ENCODER, D, Settings()) as writer:
        writer.add(np.arange(5), clustered(5))
    assert not (tmp_path / "new").exists()
    write(tmp_path / "old", clustered(20))
    names = sorted(file.name for file in (tmp_path / "old").iterdir())
    with IndexWriter(tmp_path / "old", ENCODER, D, Settings(), to_old=True) as writer:
        with pytest.raises(ValueError, match="4 ids of 5 vectors"):
            writer.add(np.arange(20, 24), clustered(5))
        writer.add(np.arange(20, 25), clustered(5))
    assert sorted(file.name for file in (tmp_path / "old").iterdir()) == names
    assert read_facts(tmp_path / "old").change == 1
