"""The report: pictures and one page that needs nothing else, whatever the run has or lacks, and whose words hold."""

import colorsys
import html
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from dist_contrastive import report
from dist_contrastive.config import to_dict
from dist_contrastive.recipes import RECIPES
from dist_contrastive.report import PLOT_NAMES, SECTIONS, RunReport, write_report
from dist_contrastive.report.captions import retrieval
from dist_contrastive.report.curves import learning_rate, loss, per_class, positive_cosine, throughput
from dist_contrastive.report.images import MAX_HEADS, attention, neighbours
from dist_contrastive.report.inputs import (
    Attention,
    CaptionSearch,
    FoundCaption,
    ImageSearch,
    Retrieval,
    Section,
    spread_over_classes,
    unit_rows,
)
from dist_contrastive.report.style import STYLE
from dist_contrastive.schedules import ema_momentum
from dist_contrastive.schedules import learning_rate as scheduled_rate

CLASSES = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry", "retina")
SIZE = 32
CAT = FoundCaption("a cat", 0.5, 2)


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


def _shares(noise: np.random.Generator, *shape: int) -> np.ndarray:
    """Attention float32 whose last two axes sum to 1."""
    weights = noise.random(shape)
    return (weights / weights.sum((-2, -1), keepdims=True)).astype(np.float32)


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
        schedules={
            "learning_rate": [scheduled_rate(step, 120, 10, 1e-3) for step in range(120)],
            "teacher_momentum": [ema_momentum(step / 120, 0.99) for step in range(1, 121)],
        },
        probe={
            **history[-1], "history": history, "best": history[-1], "raw_linear_top1": 0.372, "init_linear_top1": 0.561,
            "raw_knn_top1": 0.41, "init_knn_top1": 0.52, "protocol": {"linear": "L2, L-BFGS", "knn_k": 200},
            "linear_per_class": [0.9, 0.8, 0.4, 1.0, 0.7, 0.6], "knn_per_class": [0.8, 0.8, 0.3, 0.9, 0.7, 0.6],
        },
        class_names=CLASSES,
        features=(centers[labels] + 0.8 * noise.normal(size=(num_samples, SIZE))).astype(np.float32),
        labels=labels,
        thumbnails=images,
        attention=Attention(images[:8], _shares(noise, 8, 3, 4, 4), _shares(noise, 8, 4, 4)),
        retrieval=Retrieval(
            num_images=num_samples,
            num_captions=2 * num_samples,
            images=[
                ImageSearch(image, [CAT], [FoundCaption("a dog", 0.6, 1), CAT])
                for image in range(10)
            ],
            captions=[CaptionSearch("a cat", [(4, 0.7, True), (3, -0.2, False)])],
        ),
        spectrum=np.logspace(0, -2, SIZE),
        untrained_spectrum=np.logspace(0, -6, SIZE),
        views=[noise.integers(0, 256, size=(8, 2, side, side, 3)).astype(np.uint8) for side in (16, 8)],
        originals=images[:8],
        machine={"cpu": "A processor", "ranks": 2, "dist_contrastive": "0.1.0", "commit": "0123456789ab"},
        starts=[
            {"step": 0, "time": "2026-11-24T10:00:00+00:00"}, {"step": 50, "time": "2026-11-24T11:00:00+00:00"},
            {"step": 50, "time": "2026-11-24T12:00:00+00:00"},
        ],
        seconds=lambda: {"training": 700.0, "probes": 50.0, "report": 4.2},
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
        self.text += data.replace("\u00a0", " ")


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
    in_table = 10 + 2  # of the images that look for captions, and of those that captions find
    assert len(pictures) == len(PLOT_NAMES) + in_table
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
    assert "Left out" not in text


def test_the_page_says_with_what_and_when_the_run_ran(whole: tuple[Path, str]) -> None:
    text = re.sub(r"<[^>]+>", " ", whole[1].replace("</td><td", "</td> <td"))
    for words in (
        "Seed 0", "Resumed twice", "Duration 12 min 34 s", "Version 0.1.0, commit 0123456789ab",
        "started 2026-11-24T10:00:00+00:00",
        "resumed after step 50: 2026-11-24T11:00:00+00:00, after step 50: 2026-11-24T12:00:00+00:00",
        "training 11 min 40 s (93 %)", "probes 50 s (7 %)", "report 4.2 s (1 %)",
    ):  # fmt: skip
        assert words in re.sub(r"\s+", " ", text), words


def test_the_time_counts_the_drawing_of_pictures(tmp_path: Path) -> None:
    pictures: list[str] = []

    def seconds() -> dict[str, float]:
        pictures.extend(path.stem for path in (tmp_path / "plots").glob("*.png"))
        return {"report": 4.2}

    write_report(replace(whole_run(tmp_path), seconds=seconds))
    assert sorted(pictures) == sorted(PLOT_NAMES)


def test_the_protocol_is_short_whatever_the_number_of_classes(tmp_path: Path) -> None:
    inputs = whole_run(tmp_path)
    classes = [f"class number {label}" for label in range(1000)]
    probe = {**(inputs.probe or {}), "protocol": {"knn_k": 200, "classes": classes}}
    text = write_report(replace(inputs, probe=probe)).read_text()
    assert "knn_k" in text
    assert classes[500] not in text


@pytest.mark.parametrize("size", [1e-30, 1e-15, 1.0, 1e30])
def test_directions_do_not_depend_on_the_length_of_features(size: float) -> None:
    features = np.array([[3.0, 4.0], [0.0, 0.0]], np.float32) * np.float32(size)
    np.testing.assert_allclose(unit_rows(features), [[0.6, 0.8], [0.0, 0.0]], rtol=1e-6)


def test_nothing_is_folded(whole: tuple[Path, str]) -> None:
    assert "<details" not in whole[1]
    assert "batch.memory_gib" in whole[1]


def places(text: str) -> list[tuple[str, str, bool]]:
    """Of each word of a page that says where a section stands: the word, the section, and whether that is below the word."""
    return [
        (match[2], match[1], text.index(f'<section id="{match[1]}"') > match.start())
        for match in re.finditer(r'<a href="#(\w+)">(above|below)</a>', text)
    ]


@pytest.mark.parametrize("backwards", [False, True])
def test_what_is_said_to_stand_above_or_below_does(
    backwards: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "SECTIONS", SECTIONS[::-1] if backwards else SECTIONS)
    inputs = whole_run(tmp_path, num_samples=40)
    worse = replace(inputs, probe={**(inputs.probe or {}), "init_linear_top1": 0.9})
    text = write_report(worse).read_text()
    found = places(text)
    assert {section for _, section, _ in found} == {"probe", "map", "loss", "positive_cosine"}
    for word, section, is_below in found:
        assert (word == "below") == is_below, section
    # Whoever writes "the probe below" by hand is found here.
    sections = "|".join(name.replace("_", " ") for name in PLOT_NAMES)
    assert not re.search(rf"\b({sections}) (above|below)\b(?!</a>)", text)
    assert "[[" not in text


def test_what_is_left_out_has_no_place(tmp_path: Path) -> None:
    page = Page(write_report(RunReport(run_dir=tmp_path, metrics=metrics(3))).read_text())
    assert "little about the features: the probe does." in page.text
    assert {reference for reference in page.references if reference.startswith("#")} == {
        f"#{name}" for name in page.ids
    }


HUES = {"orange": (15, 45), "green": (90, 175), "blue": (190, 250), "purple": (260, 345), "red": (-15, 15)}
"""Of the words that captions may use, in degrees."""


def hues(figure: Figure) -> list[float]:
    """The hues of what is drawn in colour, in degrees from -15 to 345."""
    found = []
    for artist in figure.findobj():
        for name in ("get_color", "get_edgecolor", "get_facecolor"):
            try:
                hue, saturation, _ = colorsys.rgb_to_hsv(*to_rgb(getattr(artist, name)()))
            except (AttributeError, ValueError):
                continue
            if saturation > 0.5:
                found.append((360 * hue + 15) % 360 - 15)
    return found


def drawn(inputs: RunReport) -> list[tuple[Section, Figure]]:
    with matplotlib.rc_context(STYLE):
        sections = [drawn for draw in SECTIONS if (drawn := draw(inputs))]
    return [(section, figure) for section, figure in sections if figure is not None]


def test_captions_name_colours_that_are_in_the_picture(tmp_path: Path) -> None:
    named = 0
    for section, figure in drawn(whole_run(tmp_path, num_samples=40)):
        for word in re.findall(rf"\b({'|'.join(HUES)})\b", section.caption.lower()):
            low, high = HUES[word]
            assert any(low <= hue < high for hue in hues(figure)), f"{section.name}: {word}"
            named += 1
    assert named >= 4


def test_captions_name_the_panels_that_are_there(tmp_path: Path) -> None:
    inputs = whole_run(tmp_path)
    words = {1: [], 2: ["Left", "Right"], 3: ["Left", "Middle", "Right"]}
    without_norm = [{k: v for k, v in line.items() if k != "grad_norm"} for line in inputs.metrics]
    for changes, panels in (
        ({}, (3, 2, 2)),
        ({"schedules": {"learning_rate": [0.1, 0.2]}}, (2, 2, 2)),
        ({"schedules": {"learning_rate": [0.1]}, "metrics": without_norm}, (1, 2, 2)),
        ({"metrics": [{"step": 1, "positive_cosine": 0.5, "step_time_ms": 3.0}]}, (2, 1, 1)),
    ):
        for draw, count in zip((learning_rate, positive_cosine, throughput), panels, strict=True):
            section, figure = draw(replace(inputs, **changes))
            assert figure is not None
            assert len(figure.axes) == count
            assert re.findall(r"\b(Left|Middle|Right):", section.caption) == words[count]
            if count == 1:
                assert section.caption[0].isupper()


def test_schedules_are_drawn_step_by_step_whatever_was_logged(tmp_path: Path) -> None:
    inputs = whole_run(tmp_path)
    _, figure = learning_rate(replace(inputs, metrics=[inputs.metrics[0], inputs.metrics[-1]]))
    assert figure is not None
    for ax, name in zip(figure.axes, ("learning_rate", "teacher_momentum"), strict=False):
        (line,) = ax.get_lines()
        np.testing.assert_array_equal(line.get_xdata(), np.arange(1, 121))
        np.testing.assert_array_equal(line.get_ydata(), inputs.schedules[name])


@pytest.mark.parametrize("num_steps", [1, 2, 5, 19, 20, 120, 3000])
def test_no_logged_value_is_out_of_sight(num_steps: int, tmp_path: Path) -> None:
    """No edge cuts a point; a step beyond an axis has a mark at it."""
    inputs = replace(whole_run(tmp_path), metrics=metrics(num_steps))
    for draw, names in (
        (loss, ("loss",)),
        (positive_cosine, ("positive_cosine", "effective_rank")),
        (learning_rate, ("grad_norm",)),
        (throughput, ("images_per_s", "step_time_ms", "loader_wait_ms")),
    ):
        _, figure = draw(inputs)
        assert figure is not None
        seen: set[tuple[int, float]] = set()
        marked: set[int] = set()
        for ax in figure.axes:
            to_axes = ax.transData + ax.transAxes.inverted()
            for curve in ax.get_lines():
                points = np.array(curve.get_data(), dtype=np.float64).T
                if curve.get_marker() == "^":
                    marked.update(int(step) for step, _ in points)
                inside = (np.abs(to_axes.transform(points) - 0.5) < 0.49).all(1)
                seen.update((int(step), float(value)) for step, value in points[inside])
        for line in inputs.metrics:
            for name in names:
                assert (line["step"], line[name]) in seen or line["step"] in marked, (name, line["step"])
        assert marked == ({1} if draw is throughput and num_steps > 2 else set())


def test_a_training_that_did_not_pay_is_called_that(tmp_path: Path) -> None:
    probe = {"linear_top1": 0.5, "raw_linear_top1": 0.3, "init_linear_top1": 0.55}
    assert "The training did not pay" in write_report(RunReport(run_dir=tmp_path, probe=probe)).read_text()


def test_the_best_epoch_stands_beside_the_last_never_instead(tmp_path: Path) -> None:
    probe = {"epoch": 11, "linear_top1": 0.7, "best": {"epoch": 7, "linear_top1": 0.8}}
    text = Page(write_report(RunReport(run_dir=tmp_path, probe=probe)).read_text()).text
    assert "70.0 %" in text
    assert "These are the last epoch's scores. The best linear score was 80.0 %" in text


def test_the_neighbours_stand_there_at_each_k(tmp_path: Path) -> None:
    probe = {"knn_top1": 0.7, "knn_top1_by_k": {"1": 0.6, "20": 0.7, "200": 0.65}}
    text = Page(write_report(RunReport(run_dir=tmp_path, probe=probe)).read_text()).text
    assert "Nearest neighbours at k = 1: 60.0 %, k = 20: 70.0 %, k = 200: 65.0 %." in text


def test_whatever_comes_from_outside_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('&\"')</script>"
    inputs = whole_run(tmp_path, num_samples=40)
    config = {**inputs.config, "recipe": evil, "method": {"name": evil}, "encoder": {"name": evil}}
    report = replace(
        inputs,
        config={**config, "data": {"path": f"{evil}.beton"}, evil: evil},
        class_names=[evil, "$x^2", "a_b{", "\n", "ü", ""],
        machine={evil: evil, "dist_contrastive": evil, "commit": evil},
        starts=[{"step": evil, "time": evil}, {"step": evil, "time": evil}],
        seconds=lambda: {evil: 1.0},
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
            {"loss", "positive_cosine", "throughput", "map", "neighbours"},
        ),
        (
            {"probe": None, "features": None, "spectrum": np.full(SIZE, np.nan)},
            {"probe", "per_class", "map", "neighbours"},
        ),
        ({"schedules": {}, "spectrum": None, "untrained_spectrum": np.zeros(SIZE)}, {"spectrum"}),
        ({"features": None, "views": None}, {"map", "neighbours", "views"}),
    ],
)
def test_what_a_run_lacks_leaves_the_rest_alone(tmp_path: Path, lacking: dict[str, Any], missing: set[str]) -> None:
    (tmp_path / "plots").mkdir()
    for name in PLOT_NAMES:  # of an earlier report, whose pictures must not stay
        (tmp_path / "plots" / f"{name}.png").write_text("old")
    page = write_report(replace(whole_run(tmp_path, num_samples=40), **lacking))
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == set(PLOT_NAMES) - missing
    assert page.read_text().count("<li>") == len(missing)


def test_without_labels_the_page_holds_and_claims_no_classes(tmp_path: Path) -> None:
    free = {"alignment": 0.21, "uniformity": -2.5, "effective_rank": 17.25}
    probe = {**free, **{f"init_{name}": 2 * value for name, value in free.items()}, "epoch": 3, "history": []}
    report = replace(whole_run(tmp_path, num_samples=40), labels=None, class_names=(), probe=probe, retrieval=None)
    text = Page(write_report(report).read_text()).text
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == set(PLOT_NAMES) - {"probe", "per_class"}
    for words in ("The dataset has no labels", "Alignment", "0.21", "−2.50", "17.25", "34.50"):
        assert words in text
    for words in ("classified right", "not probed", "did not pay"):
        assert words not in text
    shown = text[: text.index("Left out")]
    for word in ("class", "Green", "✓", "% of those shown"):
        assert word not in re.sub(r"classif\w+|class token", "", shown), word


@pytest.mark.parametrize(("saw", "words"), [(False, "which training never saw"), (True, "which training saw, too")])
def test_the_map_says_whether_training_saw_the_classes(saw: bool, words: str, tmp_path: Path) -> None:
    inputs = replace(whole_run(tmp_path, num_samples=40), learns_from_labels=saw)
    assert words in write_report(inputs).read_text()


def test_training_images_are_not_called_test_images(tmp_path: Path) -> None:
    inputs = replace(whole_run(tmp_path, num_samples=40), samples="training images", probe=None)
    text = Page(write_report(inputs).read_text()).text
    assert "Map of the training images" in text
    assert "test image" not in text.lower()


def labels_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_yticklabels()]


def test_classes_stand_from_the_best_to_the_worst(tmp_path: Path) -> None:
    section, figure = per_class(whole_run(tmp_path))
    assert figure is not None
    assert labels_of(figure) == [CLASSES[label] for label in (3, 0, 1, 4, 5, 2)]
    assert [bar.get_width() for bar in figure.axes[0].patches] == [1.0, 0.9, 0.8, 0.7, 0.6, 0.4]  # type: ignore[attr-defined]
    assert "Classes, the best first" in section.caption


def test_of_many_classes_the_best_and_the_worst_are_shown(tmp_path: Path) -> None:
    scores = [None if label == 5 else label / 1000 for label in range(1000)]  # no test image is of class 5
    names = [f"name {label}" for label in range(1000)]
    inputs = replace(whole_run(tmp_path), class_names=names, probe={"linear_per_class": scores})
    section, figure = per_class(inputs)
    assert figure is not None
    assert labels_of(figure) == [
        f"name {label}" for label in (*range(999, 979, -1), *range(20, 5, -1), *range(4, -1, -1))
    ]
    assert "The 20 best and the 20 worst of 999 classes" in section.caption
    assert "orange" not in section.caption


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
        originals=grey[:1], views=[grey[:1, None]],
    )  # fmt: skip
    write_report(few)
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == set(PLOT_NAMES) - {"map"}


# What a vision transformer looks at


def test_attention_has_a_picture_for_each_head_the_mean_and_the_untrained_one(tmp_path: Path) -> None:
    inputs = whole_run(tmp_path)
    assert inputs.attention is not None
    for num_heads, shown in ((1, 1), (3, 3), (12, 12), (MAX_HEADS + 4, MAX_HEADS)):
        heads = _shares(np.random.default_rng(0), 8, num_heads, 4, 4)
        section, figure = attention(replace(inputs, attention=replace(inputs.attention, heads=heads))) or (None, None)
        assert section is not None
        assert figure is not None
        (ax,) = figure.axes
        assert len(ax.get_images()) == 8 * (1 + shown + 2)
        titles = {text.get_text() for text in ax.texts if text.get_verticalalignment() == "bottom"}
        assert titles == {"image", *(f"head {head + 1}" for head in range(shown)), "mean", "untrained"}
        words = f"each of the {num_heads} heads" if shown == num_heads else f"the first {shown} of {num_heads} heads"
        assert words in section.caption
        # The columns of one image do not reach into those of the next, nor beyond the edge.
        boxes = np.array([image.get_extent() for image in ax.get_images()])
        assert boxes[:, 0].min() >= 0
        assert boxes[:, 1].max() <= ax.get_xlim()[1]
        corners = {(round(left, 2), round(up, 2)) for left, _, _, up in boxes}
        assert len(corners) == len(boxes)


def test_attention_is_brightest_where_the_class_token_looks_and_a_row_has_one_scale(tmp_path: Path) -> None:
    heads = np.full((1, 2, 4, 4), 1 / 16, np.float32)
    heads[0, 0] = 0.1 / 15
    heads[0, 0, 2, 1] = 0.9
    seen = Attention(np.zeros((1, 8, 8, 3), np.uint8), heads, np.full((1, 4, 4), 1 / 16, np.float32))
    drawn = attention(replace(whole_run(tmp_path), attention=seen))
    assert drawn is not None
    section, figure = drawn
    assert figure is not None
    (ax,) = figure.axes
    _, one, other, mean, untrained = (np.asarray(image.get_array(), float).sum(-1) for image in ax.get_images())
    assert np.unravel_index(one.argmax(), one.shape) == (4, 2), "patch (2, 1) of 2 pixels"
    np.testing.assert_array_equal(other, untrained)
    assert one.max() > mean.max() > other.max()
    assert "0 to 90 %" in {text.get_text() for text in ax.texts}
    assert "4 times the 6.2 % that each patch has if the attention is spread evenly" in section.caption


def test_even_attention_is_not_drawn_as_if_it_looked_everywhere(tmp_path: Path) -> None:
    even = np.full((1, 1, 4, 4), 1 / 16, np.float32)
    seen = Attention(np.full((1, 8, 8, 3), 128, np.uint8), even, even[:, 0])
    _, figure = attention(replace(whole_run(tmp_path), attention=seen)) or (None, None)
    assert figure is not None
    (ax,) = figure.axes
    for image in ax.get_images()[1:]:
        assert np.asarray(image.get_array()).max() < 128, "darker than the image"
    assert "0 to 25 %" in {text.get_text() for text in ax.texts}


def test_attention_that_is_not_finite_is_left_out_with_the_reason(tmp_path: Path) -> None:
    inputs = whole_run(tmp_path, num_samples=40)
    assert inputs.attention is not None
    broken = replace(inputs.attention, heads=np.full_like(inputs.attention.heads, np.nan))
    text = write_report(replace(inputs, attention=broken)).read_text()
    assert "Where the encoder looks: the encoder&#x27;s attention is not finite." in text


def test_what_an_encoder_or_a_method_has_not_is_not_spoken_of(tmp_path: Path) -> None:
    inputs = replace(whole_run(tmp_path, num_samples=40), attention=None, retrieval=None)
    text = Page(write_report(inputs).read_text()).text
    for word in ("Where the encoder looks", "the captions they find", "Left out"):
        assert word not in text
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == set(PLOT_NAMES) - {"attention"}


# Images and captions


def rows_of(text: str) -> list[str]:
    """The rows of the tables of what was found, as HTML without pictures' bytes and headings."""
    tables = re.findall(r'<table class="found">.*?</table>', text, re.DOTALL)
    short = [re.sub(r"data:image/png;base64,[\w+/=]+", "…", table) for table in tables]
    short = [re.sub(r' data-heading="[^"]*"', "", table) for table in short]
    return [row for table in short for row in re.findall(r"<tbody>(.*)</tbody>", table)[0].split("<tr>")[1:]]


def test_the_table_has_own_captions_with_their_places_and_marks_them_where_they_are_found(tmp_path: Path) -> None:
    rows = rows_of(write_report(whole_run(tmp_path, num_samples=40)).read_text())
    assert len(rows) == 11
    for row in rows[:10]:
        assert "<td><p><b>2</b> a cat</p></td>" in row
        assert "<p><b>0.60\u00a0✗</b> a dog</p><p class=right><b>0.50\u00a0✓</b> a cat</p>" in row
    assert rows[10].startswith("<td>a cat</td>")
    assert re.search(r"<p class=right><b>0.70\u00a0✓</b> <img [^>]*></p><p><b>−0.20\u00a0✗</b> <img", rows[10])


def test_the_table_says_among_how_many_captions_and_images_it_looked(tmp_path: Path) -> None:
    inputs = whole_run(tmp_path, num_samples=240)
    drawn = [retrieval(replace(inputs, num_in_split=number)) for number in (240, 50_000)]
    whole, part = (section.caption for section, _ in filter(None, drawn))
    assert "For 10 test images the best 2 of 480 different captions, those of 240 test images, and" in whole
    assert "those of 240 of the 50,000 test images, and" in part


def test_captions_are_escaped_and_their_length_is_bounded(tmp_path: Path) -> None:
    evil = "<script>alert('&\"')</script>\n\u202e" + 300 * "x"
    caption = FoundCaption(evil, 0.5, 1)
    many = [replace(caption, place=place) for place in range(1, 9)]
    found = Retrieval(5, 9, [ImageSearch(0, many, [caption])], [CaptionSearch(evil, [(0, 0.5, True)])])
    text = write_report(replace(whole_run(tmp_path, num_samples=40), retrieval=found)).read_text()
    assert "<script" not in text
    assert html.escape("<script>alert('&\"')</script>") in text
    assert 150 * "x" not in text
    assert "\u202e" not in text
    assert "and 3 more" in Page(text).text


def test_embeddings_that_are_not_finite_leave_the_table_out(tmp_path: Path) -> None:
    nothing = FoundCaption("a", math.nan, 1)
    found = Retrieval(5, 9, [ImageSearch(0, [nothing], [nothing])], [])
    text = write_report(replace(whole_run(tmp_path, num_samples=40), retrieval=found)).read_text()
    assert "Images and the captions they find: the embeddings are not finite." in text


# What sections have in common


def test_examples_are_of_different_classes_and_the_same_in_each_section(tmp_path: Path) -> None:
    labels = np.repeat(np.arange(6), 40)
    chosen = spread_over_classes(labels, 8)
    assert sorted(labels[chosen][:6]) == list(range(6))
    assert len(set(chosen.tolist())) == 8
    np.testing.assert_array_equal(spread_over_classes(labels, 10)[:8], chosen)
    assert len(spread_over_classes(labels[:3], 8)) == 3
    inputs = whole_run(tmp_path)
    assert inputs.thumbnails is not None
    assert inputs.labels is not None
    _, figure = neighbours(inputs)
    assert figure is not None
    drawn = np.asarray(figure.axes[0].get_images()[0].get_array())
    np.testing.assert_array_equal(drawn, inputs.thumbnails[spread_over_classes(inputs.labels, 8)[0]])


def test_a_section_that_fails_is_left_out_and_the_others_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def odd_picture(inputs: RunReport) -> tuple[Section, Figure | None]:
        raise RuntimeError("<no> such colour")

    monkeypatch.setattr(report, "SECTIONS", (odd_picture, *SECTIONS))
    inputs = replace(whole_run(tmp_path, num_samples=40), problems={"retrieval": "it failed (KeyError: 3)"})
    page = Page(write_report(inputs).read_text())
    assert "Odd picture: it failed (RuntimeError: <no> such colour)." in page.text
    assert "Images and the captions they find: it failed (KeyError: 3)." in page.text
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == set(PLOT_NAMES)
