"""`benchmarks.search` measures what it says: all contenders reach the recall, on vectors of the stated kind."""

import json
from pathlib import Path

import numpy as np

from benchmarks import search


def test_each_contender_reaches_the_recall_or_was_tried_at_its_greatest_effort(tmp_path: Path) -> None:
    words = [
        "--sizes",
        "600",
        "12000",
        "--dimension",
        "32",
        "--queries",
        "100",
        "--rounds",
        "2",
        "--inner-dimension",
        "8",
        "--build-effort",
        "40",
    ]
    search.main([*words, "--out", str(tmp_path)])
    found = json.loads((tmp_path / "search.json").read_text())
    recalls = {
        (one["case"], one["contender"]): one["values"] for one in found["series"] if one["metric"] == search.RECALL
    }
    for case, kind in (("600 × 32", "flat"), ("12,000 × 32", "hnsw")):
        assert found["details"][case]["kind"] == kind
        assert recalls[case, search.EXACT] == [1, 1]
        assert min(recalls[case, search.OURS]) >= 0.95
        assert 2 < found["details"][case]["intrinsic_dimension"] < 16
    assert "intrinsic dimension" in (tmp_path / "README.md").read_text()


def test_vectors_are_clustered_and_have_length_one() -> None:
    vectors = search.embeddings_like(3000, 48, 6)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    noise = np.random.default_rng(0).standard_normal((3000, 48), np.float32)
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    own = search.intrinsic_dimension(vectors[100:], vectors[:100], 20)
    assert own < 0.6 * search.intrinsic_dimension(noise[100:], noise[:100], 20)
