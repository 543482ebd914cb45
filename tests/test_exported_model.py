"""`ExportedModel`: an export in use, without torch."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dist_contrastive
from dist_contrastive.config import TrainConfig, UserError
from dist_contrastive.exporting import model
from dist_contrastive.exporting.model import ExportedModel
from dist_contrastive.exporting.write import export
from tests.betons import picture
from tests.runs import leave_untrained, tiny_config, write_dataset
from tests.steps import with_small

SHAPES = [(8, 8), (5, 31), (40, 9), (1, 1), (8, 8), (16, 16), (57, 23)]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    place = tmp_path_factory.mktemp("run")
    config = with_small(tiny_config(place / "run", write_dataset(place, captions=True)), "clip")
    leave_untrained(config)
    export(config.run_dir, checkpoint=None, data=None, out=None, int8=False, max_images=100, say=lambda line: None)
    return config


@pytest.fixture
def folder(config: TrainConfig, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    copy = tmp_path / "export"
    copy.mkdir()
    for path in (config.run_dir / "export").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    (folder / "export.json").write_text(json.dumps({**facts, "sha256": model.sum_of(facts)}))


def test_it_gives_what_torch_gives_for_pictures_of_any_sizes_and_for_texts(config: TrainConfig) -> None:
    exported, module = ExportedModel(config.run_dir / "export"), dist_contrastive.load(config.run_dir)
    pictures = [picture(*shape, seed=number) for number, shape in enumerate(SHAPES)]
    features, embeddings = exported.embed(pictures)
    assert features.dtype == embeddings.dtype == np.float32
    np.testing.assert_allclose(features, module(pictures).numpy(), atol=1e-4)
    np.testing.assert_allclose(embeddings, module.embed(pictures).numpy(), atol=1e-4)
    texts = ["1 of 2", "", "something that was never seen, at a length that is beyond the limit of the context"]
    np.testing.assert_allclose(exported.embed_texts(texts), module.embed_texts(texts).numpy(), atol=1e-4)
    assert exported.embed([])[0].shape == (0, exported.feature_size)
    assert exported.embed_texts([]).shape == (0, exported.embedding_size)
    assert exported.provider.endswith("ExecutionProvider")
    assert not exported.is_int8
    many = [pictures[0]] * (model.BATCH_SIZE + 3)
    np.testing.assert_allclose(exported.embed(many)[0], np.repeat(features[:1], len(many), 0), atol=1e-5)


def test_torch_is_not_imported(config: TrainConfig) -> None:
    program = (
        "import sys, numpy, pathlib\n"
        "from dist_contrastive.exporting.model import ExportedModel\n"
        "model = ExportedModel(pathlib.Path(sys.argv[1]))\n"
        "model.embed([numpy.zeros((4, 5, 3), numpy.uint8)]), model.embed_texts(['a'])\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program, str(config.run_dir / "export")], check=True, timeout=60)


@pytest.mark.parametrize("name", ["model.onnx", "text.onnx", "tokenizer.json", "encoder.safetensors"])
def test_a_changed_byte_and_a_missing_file_are_one_clear_line(name: str, folder: Path) -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} was changed since it was exported"):
        ExportedModel(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"has no {name}, which its export.json names"):
        ExportedModel(folder)


def test_facts_with_a_changed_byte_are_refused_wherever_it_is(folder: Path) -> None:
    content = (folder / "export.json").read_bytes()
    facts = json.loads(content)
    seen = 0
    for place in np.random.default_rng(0).choice(len(content), 200, replace=False):
        changed = bytearray(content)
        changed[place] ^= 1
        try:
            if json.loads(changed) == facts:  # white space, or another spelling of a number
                continue
        except ValueError:
            pass
        seen += 1
        (folder / "export.json").write_bytes(changed)
        with pytest.raises(UserError, match=r"export\.json (was changed|is damaged|is of another version)"):
            model.read_facts(folder)
    assert seen > 100


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "is damaged"), ("[]", "is damaged"), ("{}", "is damaged"), ('{"version": 99}', "is of another version")],
)
def test_facts_that_can_not_be_read(content: str, words: str, folder: Path) -> None:
    (folder / "export.json").write_text(content)
    with pytest.raises(UserError, match=words):
        ExportedModel(folder)


def test_a_name_that_leads_out_of_the_folder_is_no_file_of_an_export(folder: Path) -> None:
    facts = model.read_facts(folder)
    facts["files"]["../secret"] = facts["files"]["model.onnx"]
    write_facts(folder, facts)
    with pytest.raises(UserError, match=r"has no \.\./secret"):
        ExportedModel(folder)


def test_what_is_not_there_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no export: it has no export\.json"):
        ExportedModel(tmp_path)
    with pytest.raises(UserError, match=r"has no model.int8.onnx: it was not asked for"):
        ExportedModel(folder, int8=True)
    for wrong in (np.zeros((4, 4)), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"a picture is uint8 \[h, w, 3\]"):
            ExportedModel(folder).embed([wrong])


def test_a_run_without_captions_has_no_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And int8 is taken by itself only where it is of use."""
    config = tiny_config(tmp_path / "run", write_dataset(tmp_path))
    leave_untrained(config)
    monkeypatch.setattr("dist_contrastive.exporting.write.failures", lambda scores, reference: [])
    export(config.run_dir, checkpoint=None, data=None, out=None, int8=True, max_images=100, say=lambda line: None)
    folder = config.run_dir / "export"
    with pytest.raises(UserError, match="has no text tower: simclr learns from images alone"):
        ExportedModel(folder).embed_texts(["a"])
    pictures = [picture(20, 30, seed) for seed in range(4)]
    fp32, int8 = (ExportedModel(folder, int8=chosen) for chosen in (False, True))
    assert (fp32.is_int8, int8.is_int8) == (False, True)
    assert (
        0
        < np.abs(fp32.embed(pictures)[0] - int8.embed(pictures)[0]).max()
        < 0.5 * np.abs(fp32.embed(pictures)[0]).max()
    )
    for instructions, full_range, expected in (("avx512_vnni", True, True), ("", False, True), ("", True, False)):
        facts = model.read_facts(folder)
        facts["int8"]["full_range"] = full_range
        write_facts(folder, facts)
        monkeypatch.setattr(model, "int8_instructions", lambda found=instructions: found)
        assert ExportedModel(folder).is_int8 == expected
