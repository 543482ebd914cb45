"""What the report shows of single images: where a vision transformer looks in them, and which captions they find."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_contrastive.batch import Share
from dist_contrastive.config import EncoderConfig, TrainConfig
from dist_contrastive.data.beton import Dataset, open_dataset
from dist_contrastive.data.format import TEST
from dist_contrastive.data.resident import loader_of
from dist_contrastive.methods.clip import CLIP
from dist_contrastive.models.attention import last_attention
from dist_contrastive.models.base import Encoder
from dist_contrastive.report import collect as module
from dist_contrastive.report.collect import collect_report, search
from dist_contrastive.report.inputs import RunReport, spread_over_classes
from dist_contrastive.trainer import build_method
from tests.harness import run_ranks
from tests.runs import NUM_TEST, tiny_config, train_on_rank, write_dataset
from tests.steps import with_small

VIT = EncoderConfig(name="vit_w96_d4")


def collected(config: TrainConfig, dataset: Dataset) -> RunReport:
    """Of a run that has not begun."""
    cpu = torch.device("cpu")
    with loader_of(config, dataset, Share(config.batch.size), cpu) as loader:
        report = collect_report(
            config, loader, method=build_method(config), untrained=build_method(config).exported, device=cpu, schedules={},
            probe=None, machine={}, starts=(), seconds=dict,
        )  # fmt: skip
    assert report is not None
    return report


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run on images with captions."""
    folder = tmp_path_factory.mktemp("data")
    return tiny_config(folder / "run", write_dataset(folder, captions=True))


@pytest.fixture(scope="module")
def dataset(config: TrainConfig) -> Dataset:
    return open_dataset(config.data.path)


# Attention


def test_attention_is_that_of_what_evaluation_shows_the_encoder(
    config: TrainConfig, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, encoder=VIT, data=replace(config.data, eval_crop=0.7))
    seen: list[Tensor] = []
    shown: list[Tensor] = []

    def extract(encoder: Encoder, *args: Any, **settings: Any) -> Tensor:
        hook = encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        features: Tensor = real(encoder, *args, **settings)
        hook.remove()
        return features

    def attend(encoder: Any, images: Tensor) -> Tensor | None:
        assert not encoder.training
        shown.append(images)
        return last_attention(encoder, images)

    real = module.extract
    monkeypatch.setattr(module, "extract", extract)
    monkeypatch.setattr(module, "last_attention", attend)
    report = collected(config, dataset)
    assert report.attention is not None
    chosen = spread_over_classes(dataset.labels[dataset.indices(TEST)], len(report.attention.images))
    for images in shown:
        assert torch.equal(images, seen[0][chosen])
    assert report.thumbnails is not None
    np.testing.assert_array_equal(report.attention.images, report.thumbnails[chosen])
    found = last_attention(build_method(config).exported.eval(), shown[0])
    assert found is not None
    shares = (found / found.sum(-1, keepdim=True)).view(8, 3, 4, 4)
    np.testing.assert_allclose(report.attention.heads, shares.numpy(), rtol=1e-5)
    np.testing.assert_allclose(report.attention.heads.sum((-2, -1)), 1, rtol=1e-5)
    np.testing.assert_allclose(report.attention.untrained, shares.mean(1).numpy(), rtol=1e-5)


def test_an_encoder_without_tokens_has_no_attention(config: TrainConfig, dataset: Dataset) -> None:
    report = collected(config, dataset)
    assert report.attention is None
    assert report.retrieval is None, "SimCLR has no text tower"
    assert report.problems == {}


# Captions


def test_an_image_finds_the_captions_that_are_nearest_and_its_own_have_their_places(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = np.random.default_rng(0)
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in generator.normal(size=(2, 12, 5))]
    images, captions = unit[0], unit[1][:9]
    texts = [f"caption {number}" for number in range(9)]
    own = [[texts[image % 9], texts[(image + 4) % 9]] for image in range(12)]  # most belong to several images
    monkeypatch.setattr(module, "NUM_FOUND", 4)
    monkeypatch.setattr(module, "NUM_CAPTION_SEARCHES", 2)
    found = search(images, captions, texts, own, np.array([0, 9, 7, 11]))
    assert (found.num_images, found.num_captions) == (12, 9)
    cosines = [[sum(a * b for a, b in zip(image, caption, strict=True)) for caption in captions] for image in images]
    assert [row.image for row in found.images] == [0, 9, 7, 11]
    for row in found.images:
        of_row = cosines[row.image]
        order = sorted(range(9), key=lambda number: -of_row[number])
        assert [caption.text for caption in row.nearest] == [texts[number] for number in order[:4]]
        assert [caption.place for caption in row.nearest] == [1, 2, 3, 4]
        assert [caption.cosine for caption in row.nearest] == pytest.approx([of_row[number] for number in order[:4]])
        places = sorted((1 + order.index(texts.index(text)), text) for text in own[row.image])
        assert [(caption.place, caption.text) for caption in row.own] == places
    # The first caption of image 9 is that of image 0: it is asked once.
    assert [row.text for row in found.captions] == ["caption 0", "caption 7"]
    for caption in found.captions:
        of_images = [row[texts.index(caption.text)] for row in cosines]
        order = sorted(range(12), key=lambda image: -of_images[image])[:4]
        assert [(image, is_own) for image, _, is_own in caption.nearest] == [
            (image, caption.text in own[image]) for image in order
        ]


def test_towers_that_know_every_caption_find_each_images_own_first(
    config: TrainConfig, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With embeddings that are known: an image's is that of its own captions."""
    config = with_small(config, "clip")
    assert dataset.captions is not None
    indices = dataset.indices(TEST)
    owners = {text: place for place, index in enumerate(indices) for text in dataset.captions.texts(int(index))}
    eye = torch.eye(len(indices))
    monkeypatch.setattr(CLIP, "embeddings", lambda self, features: eye)
    monkeypatch.setattr(
        module, "embed_texts", lambda method, captions, texts, device: eye[[owners[text] for text in texts]]
    )
    found = collected(config, dataset).retrieval
    assert found is not None
    assert (found.num_images, found.num_captions, len(found.images)) == (NUM_TEST, 2 * NUM_TEST, 10)
    for row in found.images:
        texts = dataset.captions.texts(int(indices[row.image]))
        assert [caption.text for caption in row.own] == texts
        assert [caption.text for caption in row.nearest[:2]] == texts
        assert [caption.place for caption in row.nearest] == [1, 1, 3]
        assert [caption.cosine for caption in row.nearest] == [1, 1, 0]
    for caption in found.captions:
        assert [(cosine, own) for _, cosine, own in caption.nearest] == [(1, True), (0, False), (0, False)]
        assert caption.nearest[0][0] == owners[caption.text]


def test_of_many_images_a_part_looks_for_the_captions_of_that_part(
    config: TrainConfig, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_SAMPLES", 12)
    report = collected(with_small(config, "clip"), dataset)
    assert report.retrieval is not None
    assert (report.retrieval.num_images, report.retrieval.num_captions) == (12, 24)
    assert report.num_in_split == NUM_TEST


# Runs


def test_what_fails_leaves_its_section_out_and_the_rest_alone(
    config: TrainConfig, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("no room\nfor that")

    monkeypatch.setattr(module, "last_attention", fail)
    monkeypatch.setattr(module, "embed_texts", fail)
    report = collected(replace(with_small(config, "clip"), encoder=VIT), dataset)
    assert report.problems == dict.fromkeys(("attention", "retrieval"), "it failed (RuntimeError: no room for that)")
    assert report.features is not None
    assert len(report.originals if report.originals is not None else []) == 8


@pytest.mark.parametrize(
    ("name", "encoder", "has"),
    [("simclr", VIT, {"attention"}), ("clip", None, {"retrieval"})],
)
def test_a_runs_page_has_what_the_run_has(
    name: str, encoder: EncoderConfig | None, has: set[str], config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(
        with_small(config, name), run_dir=tmp_path / "run", epochs=1, optim=replace(config.optim, warmup_epochs=0)
    )
    config = replace(config, encoder=encoder or config.encoder)
    run_ranks(train_on_rank, 1, config)
    text = (config.run_dir / "report.html").read_text()
    assert {name for name in ("attention", "retrieval") if f'<section id="{name}">' in text} == has
    assert "it failed" not in text
    assert (config.run_dir / "plots" / "attention.png").exists() == ("attention" in has)
    assert (config.run_dir / "DONE").exists()
    if "retrieval" in has:
        assert f"{2 * NUM_TEST} different captions, those of {NUM_TEST} test images" in text
