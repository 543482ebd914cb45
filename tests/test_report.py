"""The report: pictures and one page that needs nothing else, whatever the run has or lacks."""

import html
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dist_contrastive.config import to_dict
from dist_contrastive.recipes import RECIPES
from dist_contrastive.report import PLOT_NAMES, RunReport, write_report

CLASSES = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry", "retina")
SIZE = 32


def metrics(num_steps: int) -> list[dict[str, Any]]:
    noise = np.random.default_rng(0)
    return [
        {
            "step": step,
            "epoch": step // 10,
            "loss": 3.0 + 4.0 * math.exp(-step / 20) + 0.1 * noise.random(),
            "positive_cosine": 0.9 - 0.6 * math.exp(-step / 30),
            "effective_rank": 5 + 60 * (1 - math.exp(-step / 40)),
            "learning_rate": 1e-3 * min(1, step / 10) * (1 + math.cos(math.pi * step / num_steps)) / 2,
            "grad_norm": 1.0 + noise.random(),
            "images_per_s": 1500.0 + 100 * noise.random(),
            "step_time_ms": 5000.0 if step == 1 else 340.0 + 20 * noise.random(),
            "loader_wait_ms": 2.0 + noise.random(),
            "peak_memory_mib": 812.0,
        }
        for step in range(1, num_steps + 1)
    ]


def whole_run(folder: Path, num_samples: int = 240) -> RunReport:
    """Everything that a run can have, of a run that went well."""
    noise = np.random.default_rng(1)
    labels = noise.integers(len(CLASSES), size=num_samples)
    centers = noise.normal(size=(len(CLASSES), SIZE))
    colors = noise.integers(40, 216, size=(len(CLASSES), 3))
    images = (colors[labels][:, None, None] + noise.integers(-40, 40, size=(num_samples, 16, 16, 3))).astype(np.uint8)
    history = [{"epoch": e, "linear_top1": 0.6 + 0.015 * e, "knn_top1": 0.55 + 0.014 * e} for e in (3, 7, 11)]
    return RunReport(
        run_dir=folder,
        config=to_dict(RECIPES["photos"]()),
        metrics=metrics(120),
        probe={
            **history[-1], "history": history, "best": history[-1], "raw_linear_top1": 0.372, "init_linear_top1": 0.561,
            "raw_knn_top1": 0.41, "init_knn_top1": 0.52, "protocol": {"linear": "L2, L-BFGS", "knn_k": 200},
        },
        class_names=CLASSES,
        features=(centers[labels] + 0.8 * noise.normal(size=(num_samples, SIZE))).astype(np.float32),
        labels=labels,
        thumbnails=images,
        spectrum=np.logspace(0, -2, SIZE),
        untrained_spectrum=np.logspace(0, -6, SIZE),
        views=noise.integers(0, 256, size=(8, 2, 16, 16, 3)).astype(np.uint8),
        originals=images[:8],
        machine={"cpu": "A processor", "ranks": 2, "duration_s": 754.2},
    )  # fmt: skip


class Page(HTMLParser):
    """Checks that tags match and collects what the page refers to, its pictures and its text."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.references += [value for name, value in attrs if name in ("src", "href", "srcset", "data") and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the page of a whole run."""
    folder = tmp_path_factory.mktemp("run")
    page = write_report(whole_run(folder))
    assert page == folder / "report.html"
    return folder, page.read_text(encoding="utf-8")


def test_every_picture_is_there_and_shows_something(whole: tuple[Path, str]) -> None:
    folder, _ = whole
    assert sorted(path.name for path in (folder / "plots").iterdir()) == sorted(f"{name}.png" for name in PLOT_NAMES)
    for name in PLOT_NAMES:
        with Image.open(folder / "plots" / f"{name}.png") as picture:
            assert 1300 <= picture.width <= 1400
            assert np.asarray(picture.convert("L")).std() > 1


def test_the_page_is_one_file_that_needs_nothing_else(whole: tuple[Path, str]) -> None:
    folder, text = whole
    page = Page(text)
    pictures = [reference for reference in page.references if reference.startswith("data:image/png;base64,")]
    anchors = [reference for reference in page.references if reference.startswith("#")]
    assert len(pictures) == len(PLOT_NAMES)
    assert len(pictures) + len(anchors) == len(page.references)
    assert {anchor[1:] for anchor in anchors} == set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    without_pictures = re.sub(r"data:image/png;base64,[\w+/=]+", "", text)
    for word in ("http:", "https:", "file:", "//", "url(", "@import", "<script", "<link", "<iframe", str(folder)):
        assert word not in without_pictures


def test_scores_stand_on_top_beside_their_baselines(whole: tuple[Path, str]) -> None:
    text = Page(whole[1]).text
    sentence = (
        "A linear classifier on the frozen features gets 76.5 % of the test images right, where raw pixels give 37.2 % and "
        "the same network untrained 56.1 %."
    )
    assert sentence in text
    assert "did not pay" not in text
    assert "12 min 34 s" in text
    assert "Left out" not in text


def test_a_training_that_did_not_pay_is_called_that(tmp_path: Path) -> None:
    probe = {"linear_top1": 0.5, "raw_linear_top1": 0.3, "init_linear_top1": 0.55}
    assert "The training did not pay" in write_report(RunReport(run_dir=tmp_path, probe=probe)).read_text()


def test_the_best_epoch_stands_beside_the_last_never_instead(tmp_path: Path) -> None:
    probe = {"epoch": 11, "linear_top1": 0.7, "best": {"epoch": 7, "linear_top1": 0.8}}
    text = Page(write_report(RunReport(run_dir=tmp_path, probe=probe)).read_text()).text
    assert "70.0 %" in text
    assert "These are the last epoch's scores. The best linear score was 80.0 %" in text


def test_whatever_comes_from_outside_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('&\"')</script>"
    inputs = whole_run(tmp_path, num_samples=40)
    config = {**inputs.config, "recipe": evil, "method": {"name": evil}, "encoder": {"name": evil}}
    report = replace(
        inputs,
        config={**config, "data": {"path": f"{evil}.beton"}, evil: evil},
        class_names=[evil, "$x^2", "a_b{", "\n", "ü", ""],
        machine={evil: evil, "duration_s": evil, "images_per_s": evil},
        probe={**(inputs.probe or {}), "protocol": {evil: [evil], "knn_k": evil}},
        metrics=[{"step": 1, "loss": evil}, {"loss": 3.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 2.0}],
    )
    text = write_report(report).read_text()
    assert "<script" not in text
    assert html.escape(evil) in text
    assert evil in Page(text).text


def test_without_anything_every_part_is_left_out_with_a_reason(tmp_path: Path) -> None:
    page = Page(write_report(RunReport(run_dir=tmp_path / "new")).read_text())
    assert list((tmp_path / "new" / "plots").iterdir()) == []
    assert page.references == []
    assert "This run was not probed, so there are no scores." in page.text
    for reason in (
        "the run was not probed", "the run logged no loss", "there are no features of test images",
        "there are no example views", "the run logged no times",
    ):  # fmt: skip
        assert f": {reason}." in page.text


@pytest.mark.parametrize(
    ("lacking", "missing"),
    [
        (
            {"metrics": (), "thumbnails": None, "features": np.ones((40, SIZE), np.float32)},
            {"loss", "positive_cosine", "learning_rate", "throughput", "map", "neighbours"},
        ),
        ({"probe": None, "features": None, "spectrum": np.full(SIZE, np.nan)}, {"probe", "map", "neighbours"}),
        ({"labels": None, "spectrum": None, "untrained_spectrum": np.zeros(SIZE)}, {"map", "neighbours", "spectrum"}),
        ({"features": None, "views": None}, {"map", "neighbours", "views"}),
    ],
)
def test_what_a_run_lacks_leaves_the_rest_alone(tmp_path: Path, lacking: dict[str, Any], missing: set[str]) -> None:
    (tmp_path / "plots").mkdir()
    for name in PLOT_NAMES:  # of an earlier report, whose pictures must not stay
        (tmp_path / "plots" / f"{name}.png").write_text("old")
    page = write_report(replace(whole_run(tmp_path, num_samples=40), **lacking))
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == set(PLOT_NAMES) - missing
    assert Page(page.read_text()).text.count(": there ") + Page(page.read_text()).text.count(": the run ") >= len(
        missing
    )


@pytest.mark.parametrize("num_steps", [1, 20])
def test_any_number_of_logged_steps(tmp_path: Path, num_steps: int) -> None:
    write_report(RunReport(run_dir=tmp_path, metrics=metrics(num_steps)))
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == {
        "loss", "positive_cosine", "learning_rate", "throughput",
    }  # fmt: skip


def test_grey_images_and_few_of_them(tmp_path: Path) -> None:
    inputs = whole_run(tmp_path, num_samples=40)
    assert inputs.thumbnails is not None
    assert inputs.features is not None
    assert inputs.labels is not None
    grey = inputs.thumbnails[..., :1]
    few = replace(
        inputs, thumbnails=grey[:3, ..., 0], features=inputs.features[:3], labels=inputs.labels[:3],
        originals=grey[:1], views=grey[:1, None],
    )  # fmt: skip
    write_report(few)
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == set(PLOT_NAMES) - {"map"}
