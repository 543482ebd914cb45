"""CLIP and SigLIP: their losses, their learnt scale and bias, their towers."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode

from dist_contrastive import distributed, probe
from dist_contrastive.batch import Samples
from dist_contrastive.config import EncoderConfig, HeadConfig, ProbeConfig
from dist_contrastive.data.beton import open_dataset
from dist_contrastive.data.format import TEST
from dist_contrastive.evaluation import image_text as module
from dist_contrastive.evaluation.image_text import chance_recalls, recalls, zero_shot
from dist_contrastive.losses import blocks
from dist_contrastive.methods.clip import CLIP, CLIPConfig
from dist_contrastive.methods.image_text import ImageText
from dist_contrastive.methods.siglip import SigLIP, SigLIPConfig
from dist_contrastive.models.text import TextEncoder
from dist_contrastive.step.memory import TensorCount
from tests import runs
from tests.harness import RankError, run_ranks
from tests.runs import tiny_config, train_on_rank, write_dataset
from tests.steps import DONE, TEXT, build_from, clock_at, gradient_of, share_of_batch, step_gradient, with_small

GROUP = EncoderConfig(name="resnet10_w16", stem="small", norm="group", dropout=0.1)
PROJECTOR = HeadConfig(layers=1, output_size=6)
CONFIGS = {"clip": CLIPConfig(projector=PROJECTOR, text=TEXT), "siglip": SigLIPConfig(projector=PROJECTOR, text=TEXT)}
each_config = pytest.mark.parametrize("name", CONFIGS)


def built(name: str, **changes: Any) -> ImageText[Any]:
    method = build_from(replace(CONFIGS[name], **changes), GROUP)
    assert isinstance(method, ImageText)
    return method


def by_the_papers_loops(method: ImageText[Any], images: np.ndarray, texts: np.ndarray) -> float:
    """CLIP, figure 3; SigLIP, equation 1; in float64, of [B, E] each."""
    n = len(images)
    scale = math.exp(method.get_parameter("log_scale").item())
    logits = [[scale * float(images[i] @ texts[j]) for j in range(n)] for i in range(n)]
    if isinstance(method, SigLIP):
        pairs = [(1 if i == j else -1) * (logits[i][j] + method.bias.item()) for i in range(n) for j in range(n)]
        return sum(math.log1p(math.exp(-z)) for z in pairs) / n
    of_images = sum(math.log(sum(math.exp(x) for x in logits[i])) - logits[i][i] for i in range(n)) / n
    of_texts = sum(math.log(sum(math.exp(logits[i][j]) for i in range(n))) - logits[j][j] for j in range(n)) / n
    return (of_images + of_texts) / 2


@each_config
def test_the_loss_is_the_papers(name: str) -> None:
    method, batch = built(name), share_of_batch(built(name))
    embeddings = method.embed_all(batch)
    for side in ("z", "text"):
        torch.testing.assert_close(embeddings[side].norm(dim=-1), torch.ones(1, len(batch)))
    arrays = [embeddings[side][0].detach().double().numpy() for side in ("z", "text")]
    expected = by_the_papers_loops(method, *arrays)
    assert method.loss(embeddings, batch.samples)["loss"].item() == pytest.approx(expected, rel=1e-5)


@each_config
def test_a_batch_of_32768_pairs_holds_less_than_a_gigabyte(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings of 512 dimensions and their gradients included; the matrix of logits alone would have 4.3 GB."""
    method, size = built(name), 32768
    # Larger blocks, which hold more, are fewer. Tensors have no values, and count as what they would take.
    monkeypatch.setitem(blocks.PAIRS, "cpu", blocks.MAX_PAIRS["cpu"])
    with FakeTensorMode(allow_non_fake_inputs=True), TensorCount() as tensors:
        images, texts = (torch.empty(size, 512, requires_grad=True) for _ in range(2))
        samples = Samples(labels=torch.zeros(size), indices=torch.arange(size), epoch=0)
        method.loss({"z": images[None], "text": texts[None]}, samples)["loss"].backward()
    assert images.grad is not None
    assert texts.grad is not None
    assert 4 * images.nbytes < tensors.peak < 1e9


def test_scale_and_bias_start_as_configured() -> None:
    clip, siglip = built("clip", temperature=0.05), built("siglip")
    assert clip.get_parameter("log_scale").exp().item() == pytest.approx(20)
    assert siglip.get_parameter("log_scale").exp().item() == pytest.approx(10)
    assert siglip.get_parameter("bias").item() == pytest.approx(-math.log(7))  # of a global batch of 8
    assert built("siglip", bias=-3.0).get_parameter("bias").item() == -3


def test_clips_scale_goes_no_further_than_a_hundred() -> None:
    method = built("clip")
    assert isinstance(method, CLIP)
    batch = share_of_batch(method)
    with torch.no_grad():
        method.log_scale.fill_(math.log(100))
        at_most = method.loss(method.embed_all(batch), batch.samples)["loss"]
        method.log_scale.fill_(math.log(1000))
    beyond = method.loss(method.embed_all(batch), batch.samples)["loss"]
    assert beyond.item() == pytest.approx(at_most.item(), rel=1e-5)
    beyond.backward()
    assert method.log_scale.grad is not None
    assert method.log_scale.grad.any(), "it can come back"
    method.after_step(clock_at(), {}, DONE)
    assert method.log_scale.item() == pytest.approx(math.log(100))


def test_a_scale_that_sinks_is_told_of_and_one_that_rises_is_not() -> None:
    method = built("clip")
    assert "has sunk to 1.05: pairs are not told apart" in method.alarm({"logit_scale": 1.05}, clock_at())
    assert method.alarm({"logit_scale": 100.0}, clock_at()) == ""
    cool = built("clip", temperature=1.0)
    assert cool.alarm({"logit_scale": 0.9}, clock_at()) == ""
    assert "has sunk to 0.40" in cool.alarm({"logit_scale": 0.4}, clock_at())


def test_a_bias_that_does_not_suit_the_global_batch_is_remarked_on() -> None:
    (line,) = SigLIPConfig(bias=-10.0).remarks(1000, 10000, 256)
    assert line.startswith("--method.bias -10: with a global batch of 256 both kinds of pairs weigh the same at -5.54")
    assert SigLIPConfig(bias=-10.0).remarks(1000, 10000, 32768) == []
    assert SigLIPConfig().remarks(1000, 10000, 256) == []


def step_on_rank(rank: int, name: str, micro: int) -> tuple[float, dict[str, np.ndarray]]:
    method = built(name)
    outcome = step_gradient(method, micro).compute(share_of_batch(method), clock_at())
    return distributed.all_gather(outcome.losses["loss"][None]).mean().item(), gradient_of(method)


@each_config
@pytest.mark.parametrize(("num_ranks", "micro"), [(1, 3), (2, 0), (2, 3), (4, 0), (4, 1)])
def test_any_ranks_and_micro_batches_give_one_step_through_both_towers(name: str, num_ranks: int, micro: int) -> None:
    ((loss, gradient),) = run_ranks(step_on_rank, 1, name, 0)
    learnt = {"clip": {"log_scale"}, "siglip": {"log_scale", "bias"}}[name]
    assert learnt | {"text.tokens.weight", "text.positions", "text_projector.weight"} <= gradient.keys()
    for found, of_rank in run_ranks(step_on_rank, num_ranks, name, micro):
        assert found == pytest.approx(loss, rel=1e-5)
        assert of_rank.keys() == gradient.keys()
        for key, value in gradient.items():
            np.testing.assert_allclose(of_rank[key], value, rtol=1e-4, atol=1e-5, err_msg=key)


def test_a_captions_feature_does_not_depend_on_its_padding_and_depends_on_each_token() -> None:
    torch.manual_seed(0)
    tower = TextEncoder(TEXT).eval()
    tokens = torch.tensor([[3, 5, 7, 2, 0, 0, 0, 0, 0]])
    feature = tower(tokens)
    torch.testing.assert_close(tower(tokens[:, :4]), feature)
    for place in range(4):
        other = tokens.clone()
        other[0, place] = 11
        assert (tower(other) - feature).abs().max() > 1e-3
    assert (tower(tokens[:, [1, 0, 2, 3]]) - feature).abs().max() > 1e-4, "order matters"
    with_zero = torch.tensor([[3, 0, 7, 2, 0, 0, 0, 0, 0]])
    torch.testing.assert_close(tower(with_zero[:, :4]), tower(with_zero))
    other = with_zero.clone()
    other[0, 3] = 11
    assert (tower(other) - tower(with_zero)).abs().max() > 1e-3, "its last token is the one before the padding"


# Scores


def test_recalls_are_those_of_sorting_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 150)
    generator = torch.Generator().manual_seed(0)
    images = torch.nn.functional.normalize(torch.randn(20, 5, generator=generator), dim=1)
    pairs = [(i, j) for i in range(20) for j in (2 * i, 2 * i + 1, (7 * i) % 40)]  # some captions are of several images
    owners = torch.arange(20).repeat_interleave(2)
    captions = torch.nn.functional.normalize(images[owners] + 1.5 * torch.randn(40, 5, generator=generator), dim=1)
    found = recalls(images, captions, torch.tensor(pairs))
    similar = (images @ captions.T).numpy()
    for k in (1, 5, 10):
        of_images = [any((i, j) in pairs for j in np.argsort(-similar[i])[:k]) for i in range(20)]
        assert found[f"text_recall_at_{k}"] == pytest.approx(np.mean(of_images))
        of_texts = [any((i, j) in pairs for i in np.argsort(-similar[:, j])[:k]) for j in range(40)]
        assert found[f"image_recall_at_{k}"] == pytest.approx(np.mean(of_texts))
    assert 0 < found["text_recall_at_1"] < found["text_recall_at_10"]


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_towers_that_have_collapsed_find_nothing(value: float) -> None:
    same, pairs = torch.full((20, 5), value), torch.arange(20)[:, None].expand(20, 2)
    assert set(recalls(same, same, pairs).values()) == {0.0}
    apart = torch.eye(20)
    assert set(recalls(apart, apart, pairs).values()) == {1.0}


def test_chance_is_what_candidates_in_a_random_order_score() -> None:
    pairs = torch.tensor([(i, j) for i in range(12) for j in {i, (5 * i) % 12, 3}])
    numbers = np.random.default_rng(0)
    orders = [numbers.permutation(12) for _ in range(4000)]
    found = chance_recalls(pairs, 12, 12)
    for name, column in (("text", 0), ("image", 1)):
        own = [{int(pair[1 - column]) for pair in pairs if pair[column] == query} for query in range(12)]
        for k in (1, 5, 10):
            hits = [np.mean([bool(of_query & set(order[:k])) for of_query in own]) for order in orders]
            assert found[f"{name}_recall_at_{k}"] == pytest.approx(np.mean(hits), abs=0.02)
    few = chance_recalls(torch.tensor([(0, 0), (1, 1)]), 2, 2)
    assert few["text_recall_at_1"] == pytest.approx(0.5)
    assert few["text_recall_at_10"] == 1, "fewer than are looked for"


def test_zero_shot_takes_the_nearest_class() -> None:
    images = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    classes = torch.tensor([[3.0, 0.1], [0.0, 0.2]])
    assert zero_shot(images, classes, torch.tensor([0, 0, 1])) == 1
    assert zero_shot(images, classes, torch.tensor([1, 0, 1])) == pytest.approx(2 / 3)


def test_a_run_scores_both_towers_beside_the_untrained_ones_alike_on_two_ranks(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "one", write_dataset(tmp_path, captions=True), norm="group", epochs=1)
    config = replace(with_small(config, "clip"), probe=ProbeConfig())
    run_ranks(train_on_rank, 1, config)
    run_ranks(train_on_rank, 2, replace(config, run_dir=tmp_path / "two"))
    one, two = (json.loads((tmp_path / run / "probe.json").read_text()) for run in ("one", "two"))
    names = ["zero_shot_top1", *(f"{side}_recall_at_{k}" for side in ("text", "image") for k in (1, 5, 10))]
    for name in (*names, *(f"init_{name}" for name in names), *(f"chance_{name}" for name in names)):
        assert 0 <= one[name] <= 1
        assert two[name] == pytest.approx(one[name], abs=0.07)
    assert "linear_top1" in one
    dataset = open_dataset(config.data.path)
    captions = dataset.captions
    assert captions is not None
    texts = {text for index in dataset.indices(TEST) for text in captions.texts(int(index))}
    assert one["protocol"]["retrieval_captions"] == len(texts)
    assert (tmp_path / "one" / "tokenizer.json").read_bytes() == captions.tokenizer_json
    tower = load_file(tmp_path / "one" / "text.safetensors")
    assert tower["projector.weight"].shape == (16, TEXT.width)


@pytest.mark.parametrize("num_classes", [3, 0])
def test_a_run_is_scored_again_as_training_scored_it(num_classes: int, tmp_path: Path) -> None:
    """With classes, and with captions alone."""
    dataset = write_dataset(tmp_path, num_classes=num_classes, captions=True)
    config = tiny_config(tmp_path / "run", dataset, norm="group", epochs=1)
    config = replace(with_small(config, "clip"), probe=ProbeConfig(knn_k=5 if num_classes else 0, strengths=(1e-2,)))
    run_ranks(train_on_rank, 1, config)
    probe.main([str(config.run_dir), "--device", "cpu"])
    measured = json.loads((config.run_dir / "probe.json").read_text())
    (path,) = (config.run_dir / "probes").iterdir()
    again = json.loads(path.read_text())
    towers = {name for name in measured if "recall" in name or "zero_shot" in name}
    assert len(towers) == (21 if num_classes else 18), "of the trained towers, of untrained ones and by chance"
    for name in towers:
        assert again[name] == pytest.approx(measured[name], abs=1.5 / 60), name
    assert again["protocol"] == measured["protocol"]


def test_a_dataset_without_captions_or_with_more_tokens_is_refused(tmp_path: Path) -> None:
    config = with_small(tiny_config(tmp_path / "run", write_dataset(tmp_path)), "clip")
    with pytest.raises(RankError, match=r"tiny.beton has no captions, which clip learns from: pack pairs"):
        run_ranks(train_on_rank, 1, config)
    folder = tmp_path / "captions"
    folder.mkdir()
    method = replace(config.method, text=replace(TEXT, context=5))  # type: ignore[call-arg]
    config = replace(config, data=replace(config.data, path=write_dataset(folder, captions=True)), method=method)
    with pytest.raises(RankError, match=r"--method.text.context 5: the captions of .* need 9; give at least that"):
        run_ranks(train_on_rank, 1, config)


def test_a_run_does_not_go_on_with_another_tokenizer(tmp_path: Path) -> None:
    path = write_dataset(tmp_path, captions=True)
    config = with_small(tiny_config(tmp_path / "run", path, stop_after_steps=2), "clip")
    run_ranks(train_on_rank, 1, config)
    images = open_dataset(path).manifest.sha256
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "CAPTIONS", replace(runs.CAPTIONS, vocabulary=280))
        write_dataset(tmp_path, captions=True)
    assert open_dataset(path).manifest.sha256 == images, "the captions alone are others"
    with pytest.raises(RankError, match=r"was trained on another dataset than .*tiny.beton; give the same file"):
        run_ranks(train_on_rank, 1, replace(config, stop_after_steps=4))
