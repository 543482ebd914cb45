"""`--to milvus:URI`: the same ids, vectors, labels and paths in Milvus; its embedded form is the real component."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_contrastive.config import UserError
from dist_contrastive.searching import milvus
from dist_contrastive.searching.build import delete
from dist_contrastive.searching.index_file import SearchIndex
from tests.test_index_file import clustered, write

pymilvus = pytest.importorskip("pymilvus")
pytest.importorskip("milvus_lite")


@pytest.fixture
def index_path(tmp_path: Path) -> Path:
    write(tmp_path / "my-index", clustered(1500))
    return tmp_path / "my-index"


def contents(uri: str, name: str) -> dict[int, Any]:
    client = pymilvus.MilvusClient(uri)
    client.load_collection(name)
    found = client.query(name, filter="id >= 0", output_fields=["id", "vector", "label", "path"], limit=5000)
    client.close()
    return {entity["id"]: entity for entity in found}


def test_milvus_holds_what_the_index_holds_and_finds_the_same(index_path: Path, tmp_path: Path) -> None:
    uri, done = str(tmp_path / "vectors.db"), []
    with SearchIndex(index_path) as index:
        name = milvus.send(index, uri, lambda sent, total: done.append((sent, total)))
        there = contents(uri, name)
        assert sorted(there) == list(range(1500))
        for row, item in enumerate(index.items.ids.tolist()):
            np.testing.assert_allclose(there[item]["vector"], index.vectors[row], atol=1e-6)
            assert there[item]["label"] == item % 5
            assert there[item]["path"] == f"ordner/é{item}.png"
        queries = clustered(20, seed=5)
        client = pymilvus.MilvusClient(uri)
        client.load_collection(name)
        theirs = client.search(name, data=queries, limit=5, output_fields=["label"])
        client.close()
        ours = index.search(queries, 5)
    assert (
        np.mean([[hit["id"] for hit in hits] == ids for hits, ids in zip(theirs, ours.ids.tolist(), strict=True)]) > 0.9
    )
    np.testing.assert_allclose([hits[0]["distance"] for hits in theirs], ours.scores[:, 0], atol=1e-4)
    assert done[-1] == (1500, 1500)


def test_sending_again_follows_what_was_added_and_deleted(index_path: Path, tmp_path: Path) -> None:
    uri = str(tmp_path / "vectors.db")
    with SearchIndex(index_path) as index:
        name = milvus.send(index, uri)
    delete(index_path, np.array([7, 8]))
    write(index_path, clustered(30, seed=3), first=1500, to_old=True)
    with SearchIndex(index_path) as index:
        assert milvus.send(index, uri) == name
    assert sorted(contents(uri, name)) == sorted({*range(1530)} - {7, 8})


def test_strangers_in_the_collection_and_wrong_uris_are_one_line(index_path: Path, tmp_path: Path) -> None:
    uri = str(tmp_path / "vectors.db")
    with SearchIndex(index_path) as index:
        name = milvus.send(index, uri)
        client = pymilvus.MilvusClient(uri)
        client.upsert(name, [{"id": 99_999, "vector": index.vectors[0], "label": 0, "path": "x"}])
        client.close()
        with pytest.raises(UserError, match="has 1,501 vectors and the index 1,500"):
            milvus.send(index, uri)
        for wrong in (str(tmp_path / "nowhere" / "x.db"), "hello", "http://127.0.0.1:9"):
            with pytest.raises(UserError, match="--to milvus:") as caught:
                milvus.send(index, wrong)
            assert "\n" not in str(caught.value)
