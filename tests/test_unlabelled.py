"""Runs on images without labels: what they train, what they report, and what they say they can't."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_contrastive.config import AugmentConfig, DataConfig, ProbeConfig, TrainConfig, UserError, ViewConfig
from dist_contrastive.data.beton import open_dataset
from dist_contrastive.data.format import TEST
from dist_contrastive.evaluation.features import extract, extract_views
from dist_contrastive.evaluation.protocol import FREE_SCORES, LABEL_SCORES, PER_CLASS, ProbeRunner
from dist_contrastive.losses.statistics import alignment, effective_rank, uniformity
from dist_contrastive.methods import METHODS
from dist_contrastive.methods.simclr import SimCLRConfig
from dist_contrastive.models.base import Encoder
from dist_contrastive.models.encoders import build_encoder
from dist_contrastive.probe import main as probe_main
from dist_contrastive.report import PLOT_NAMES
from dist_contrastive.run import train
from tests.betons import open_loader, picture, write_beton
from tests.harness import run_ranks
from tests.runs import NUM_TEST, NUM_TRAIN, tiny_config, train_on_rank, write_dataset
from tests.steps import with_small

DATA, CPU = DataConfig(image_size=16), torch.device("cpu")


@pytest.fixture(scope="module", params=[0, 1], ids=["no labels", "one class"])
def dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), num_classes=request.param)


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), num_classes=0, captions=True)


def train_and_listen(rank: int, config: TrainConfig) -> str:
    """What a rank prints while it trains."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        train(config)
    return output.getvalue()


@pytest.fixture(scope="module")
def finished(unlabelled: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run of two ranks, and what rank 0 printed."""
    config = tiny_config(tmp_path_factory.mktemp("runs") / "run", unlabelled, epochs=2, probe=ProbeConfig(every=1))
    return config.run_dir, run_ranks(train_and_listen, 2, config)[0]


def encoder() -> Encoder:
    torch.manual_seed(0)
    return build_encoder(tiny_config(Path("x"), Path("x")).encoder, 16)


def test_a_run_gives_what_needs_no_labels_and_says_what_does(finished: tuple[Path, str]) -> None:
    run_dir, output = finished
    said = [line for line in output.splitlines() if "no linear probe and no kNN, which need classes" in line]
    assert len(said) == 1
    scores = json.loads((run_dir / "probe.json").read_text())
    assert [entry["epoch"] for entry in scores["history"]] == [1, 2]
    for name in FREE_SCORES:
        assert scores[name] == scores["history"][-1][name]
        assert np.isfinite(scores[f"init_{name}"])
        assert name.replace("_", " ") in output
    assert not any("top1" in name for name in scores)
    assert "best" not in scores
    assert (scores["protocol"]["num_train"], scores["protocol"]["num_test"]) == (NUM_TRAIN, NUM_TEST)
    assert {path.stem for path in (run_dir / "plots").iterdir()} == set(PLOT_NAMES) - {
        "probe",
        "per_class",
        "attention",
    }
    assert (run_dir / "DONE").exists()


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_trains_without_labels(unlabelled: Path, tmp_path: Path, name: str) -> None:
    config = with_small(tiny_config(tmp_path / "run", unlabelled, epochs=1, stop_after_steps=1), name)
    assert run_ranks(train_on_rank, 1, config) == [False]


def test_what_learns_from_labels_is_refused(dataset: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", dataset, method=SimCLRConfig(positives="labels"))
    with pytest.raises(AssertionError, match=r"is to learn from labels, and .*beton has (no labels|one class only)"):
        run_ranks(train_on_rank, 1, config)
    assert not (tmp_path / "run").exists()


def test_the_probe_command_is_refused(finished: tuple[Path, str], dataset: Path) -> None:
    run_dir, _ = finished
    before = (run_dir / "probe.json").read_bytes()
    with pytest.raises(
        UserError, match=r"tiny\.beton has (no labels|one class only \(class 0\)), and probes need some"
    ):
        probe_main([str(run_dir), "--data", str(dataset), "--device", "cpu"])
    assert (run_dir / "probe.json").read_bytes() == before


@pytest.mark.parametrize("num_classes", [0, 1, 3])
def test_the_scores_are_those_of_the_test_images(tmp_path: Path, num_classes: int) -> None:
    dataset = open_dataset(write_dataset(tmp_path, num_classes=num_classes))
    loader = open_loader(dataset, DATA, seed=3)
    runner = ProbeRunner(loader, probe=ProbeConfig(knn_k=5), device=CPU)
    found = runner.score(encoder())
    test = dataset.indices(TEST)
    features = extract(encoder(), loader, test, CPU)
    views = extract_views(encoder(), loader, test, CPU)
    assert views.shape == (2, NUM_TEST, features.shape[1])
    expected = [alignment(views).item(), uniformity(features).item(), effective_rank(features).item()]
    assert [found[name] for name in FREE_SCORES] == pytest.approx(expected, rel=1e-6)
    assert all((name in found) == (num_classes > 1) for name in LABEL_SCORES)
    baselines = runner.baselines(encoder())
    assert {name for name in baselines if name.startswith("init_")} == {
        f"init_{name}" for name in found if name not in PER_CLASS
    }
    assert any(name.startswith("raw_") for name in baselines) == (num_classes > 1)


def views_on_rank(rank: int, path: Path, num_views: int) -> np.ndarray:
    loader = open_loader(open_dataset(path), DATA, AugmentConfig((ViewConfig(count=num_views),)), seed=1)
    return extract_views(encoder(), loader, np.arange(7), CPU).numpy()


@pytest.mark.parametrize(("num_views", "expected"), [(1, 2), (2, 2), (4, 4)])
def test_views_are_the_same_at_any_number_of_ranks_and_differ_from_each_other(
    tmp_path: Path, num_views: int, expected: int
) -> None:
    path = write_beton(tmp_path / "x.beton", [picture(20, 24, seed) for seed in range(9)], num_test=3)
    (alone,) = run_ranks(views_on_rank, 1, path, num_views)
    assert alone.shape[:2] == (expected, 7)
    assert np.abs(alone[0] - alone[1]).max() > 1e-3
    shared, elsewhere = run_ranks(views_on_rank, 2, path, num_views)
    np.testing.assert_allclose(shared, alone, rtol=1e-4, atol=1e-5)
    assert elsewhere.shape == (expected, 0, alone.shape[2])


def test_features_that_are_not_finite_are_refused(unlabelled: Path) -> None:
    runner = ProbeRunner(open_loader(open_dataset(unlabelled), DATA), probe=ProbeConfig(), device=CPU)
    broken = encoder()
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        runner.score(broken)
