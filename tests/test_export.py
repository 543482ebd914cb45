"""`export`: graphs that equal torch on images of any size, an int8 form that passes its gate or is not there, timm's weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch

import dist_contrastive
from dist_contrastive import cli
from dist_contrastive.config import DataConfig, EncoderConfig, TrainConfig, UserError
from dist_contrastive.data.beton import open_dataset
from dist_contrastive.data.eval_view import EvalView
from dist_contrastive.export import main
from dist_contrastive.exporting import measure
from dist_contrastive.exporting.measure import Form, failures, likeness
from dist_contrastive.exporting.model import ExportedModel
from dist_contrastive.exporting.names import EMBEDDING, FEATURE
from dist_contrastive.exporting.search import search
from dist_contrastive.exporting.write import export
from dist_contrastive.trainer import build_method
from tests.runs import leave_untrained, tiny_config, write_dataset
from tests.steps import with_small


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("run")
    config = tiny_config(folder / "run", write_dataset(folder))
    config = replace(config, data=replace(config.data, eval_crop=0.8))
    leave_untrained(config)
    return config


def test_an_export_says_what_it_is_and_how_good(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    folder = config.run_dir / "export"
    main([str(config.run_dir)])
    said = capsys.readouterr().out
    assert "model.onnx equals torch to" in said
    facts = json.loads((folder / "export.json").read_text())
    module = dist_contrastive.load(config.run_dir)
    assert facts["run"] == {
        "method": "simclr", "encoder": {**vars(config.encoder)}, "step": module.run.step,
        "weights_sha256": {part: module.run.sha256(part) for part in ("encoder", "projector")},
        "dataset_sha256": module.run.dataset_sha256,
    }  # fmt: skip
    assert (facts["feature_size"], facts["embedding_size"]) == (module.feature_size, 16)
    assert facts["view"] == {
        "size": 16, "crop": 0.8, "mean": list(module.view.mean), "std": list(module.view.std)
    }  # fmt: skip
    assert max(facts["onnx_differs_from_torch"].values()) < 1e-4
    assert facts["scores"]["onnx"]["linear_top1"] == facts["scores"]["torch"]["linear_top1"]
    assert set(facts["files"]) == {path.name for path in folder.iterdir()} - {"export.json"}
    dataset = open_dataset(config.data.path)
    size = zip(dataset.pointers, dataset.heights, dataset.widths, strict=True)
    pictures = [dataset.file_bytes[start:][: 3 * h * w].reshape(h, w, 3) for start, h, w in size]
    features = module(pictures[: dataset.manifest.num_train])
    for output, vectors in (("feature", features), ("embedding", module.embeddings(features))):
        units = torch.nn.functional.normalize(vectors, dim=1)
        of_all = (units @ units.T)[~torch.eye(len(units), dtype=torch.bool)]
        assert facts["cosines"][output]["random"][500] == pytest.approx(float(of_all.median()), abs=0.01)
        for pairs in ("random", "positive"):
            values = facts["cosines"][output][pairs]
            assert len(values) == 1001
            assert sorted(values) == values
    assert facts["int8"]["offered"] == ("model.int8.onnx" in facts["files"])
    if facts["int8"]["offered"]:
        assert not failures(facts["scores"]["int8"], facts["scores"]["torch"])
        assert f"{facts['int8']['layers'] - len(facts['int8']['in_fp32'])} of {facts['int8']['layers']} layers" in said
        assert all(name in said for name in facts["int8"]["in_fp32"])
    else:
        assert "int8 is not offered" in said
        assert "too much is lost" in said


def test_where_no_int8_form_is_good_enough_there_is_fp32_alone_and_a_table_that_shows_why(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "MIN_RECALL", 1.01)  # more than any has
    main([str(config.run_dir), "--out", str(tmp_path / "export")])
    said = capsys.readouterr().out
    assert "below 1.01. The export has fp32 alone" in said
    facts = json.loads((tmp_path / "export" / "export.json").read_text())
    assert not facts["int8"]["offered"]
    assert "below 1.01" in facts["int8"]["why"]
    assert "int8" not in facts["scores"]
    # From all layers in int8 to a single one, each with its scores.
    layers = [entry["in_fp32"] for entry in facts["int8"]["tried"]]
    assert layers[0] == 0
    assert max(layers) == facts["int8"]["layers"] - 1
    assert said.count("too much is lost") == len(layers)
    assert not (tmp_path / "export" / "model.int8.onnx").exists()
    assert not ExportedModel(tmp_path / "export").is_int8


def test_an_export_replaces_an_older_one_whole_and_nothing_else(config: TrainConfig, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    for _ in range(2):
        export(config.run_dir, checkpoint=None, data=None, out=out, int8=False, max_images=100, say=lambda line: None)
        assert not (out / "model.int8.onnx").exists()
        (out / "model.int8.onnx").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").touch()
    with pytest.raises(UserError, match="is there and no export"):
        export(config.run_dir, checkpoint=None, data=None, out=other, int8=False, max_images=100)
    assert (other / "thesis.txt").exists()


def test_another_dataset_is_refused(config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_dataset(tmp_path, num_classes=2)
    assert cli.main_guard(lambda: main([str(config.run_dir), "--data", str(other), "--out", str(tmp_path / "x")])) == 2
    assert "is not the dataset that" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_two_towers_without_labels(tmp_path: Path) -> None:
    config = with_small(tiny_config(tmp_path / "run", write_dataset(tmp_path, num_classes=0, captions=True)), "clip")
    leave_untrained(config)
    folder = export(
        config.run_dir, checkpoint=None, data=None, out=None, int8=True, max_images=100, say=lambda line: None
    )
    facts = json.loads((folder / "export.json").read_text())
    assert {"text.onnx", "tokenizer.json"} <= facts["files"].keys()
    assert "linear_top1" not in facts["scores"]["torch"]
    assert facts["onnx_differs_from_torch"]["text"] < 1e-4
    assert len(facts["cosines"]["caption"]["positive"]) == 1001


def build(config: TrainConfig) -> Any:
    torch.manual_seed(0)
    return build_method(config).eval().requires_grad_(False)


@pytest.mark.parametrize("name", ["resnet18", "vit_w96_d4"])
def test_plain_timm_takes_the_encoder_by_its_json(name: str, tmp_path: Path) -> None:
    from dist_contrastive.checkpoint import save_module
    from dist_contrastive.exporting.timm_config import timm_config

    config = tiny_config(tmp_path, Path("data.beton"), encoder=EncoderConfig(name=name), data=DataConfig(image_size=48))
    method, view = build(config), EvalView.of(config.data, config.augment)
    save_module(tmp_path / "encoder.safetensors", method.exported.body, {})
    facts = timm_config(method.exported, view)
    assert not facts["changes"]
    body = timm.create_model(facts["architecture"], num_classes=0, **facts["model_args"])
    body.load_state_dict(safetensors.torch.load_file(tmp_path / "encoder.safetensors"))
    assert facts["pretrained_cfg"]["input_size"] == [3, 48, 48]
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(body.eval()(images), method.exported(images))


def test_as_few_layers_as_possible_stay_in_fp32_the_worst_first() -> None:
    damages = {"a": 1.0, "b": 9.0, "c": 5.0, "d": 3.0, "e": 2.0}
    asked = []

    def measure(in_fp32: Any) -> dict[str, float]:
        asked.append(list(in_fp32))
        return {"left": sum(damages.values()) - sum(damages[name] for name in in_fp32)}

    for allowed, expected in (
        (20.0, []),
        (6.0, ["b", "c"]),
        (3.0, ["b", "c", "d"]),
        (1.0, ["b", "c", "d", "e"]),
        (0.5, None),
    ):
        asked.clear()
        found = search(list(damages), measure, damages.__getitem__, lambda scores: ["bad"] * (scores["left"] > allowed))  # noqa: B023
        assert (found.best and list(found.best.in_fp32)) == expected
        assert [list(entry.in_fp32) for entry in found.tried] == asked
        assert len(asked) <= 4


def test_the_gate_refuses_what_lost_too_much() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = {split: torch.randn(300, 8, generator=generator) for split in ("train", "test")}

    def form(noise: float) -> Form:
        noisy = {split: x + noise * torch.randn(x.shape, generator=generator) for split, x in vectors.items()}
        return Form(*({FEATURE: noisy[split], EMBEDDING: noisy[split]} for split in ("train", "test")))

    exact = form(0.0)
    same, near, far = (likeness(form(noise), exact, seed=0) for noise in (0.0, 1e-3, 0.3))
    assert all(value == pytest.approx(1) for value in same.values())
    assert not failures(near, near)
    assert len(failures(far, far)) == 4
    scores = {**same, "linear_top1": 0.8, "knn_top1": 0.7}
    assert not failures({**scores, "linear_top1": 0.79}, scores)
    assert failures({**scores, "knn_top1": 0.689}, scores) == ["knn_top1 loses 1.1 points of 70.0"]
    assert failures({**scores, "embedding_spearman": float("nan")}, scores)
