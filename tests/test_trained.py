"""`open_run`: what a run leaves, read in one place, whichever method it is of and whether it has ended or not."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dist_contrastive.checkpoint import CheckpointStore, save_module
from dist_contrastive.config import TrainConfig, UserError, to_dict
from dist_contrastive.methods import METHODS, Method
from dist_contrastive.run_folder.trained import FILES, open_run, parts_of
from dist_contrastive.trainer import build_method
from dist_contrastive.weights import read_weights
from tests.runs import tiny_config
from tests.steps import with_small

STEP, SUM = 7, "5" * 64


def leave(config: TrainConfig, *, finished: bool) -> Method:
    """A method whose every weight is a random number, and what a run of it leaves in its folder."""
    torch.manual_seed(3)
    method = build_method(config)
    for tensor in method.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_()
    folder = config.run_dir
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    CheckpointStore(folder / "checkpoints", keep=2).save(
        STEP, {"model": method.state_dict()}, {"dataset_sha256": SUM, "config": to_dict(config)}
    )
    if finished:
        for part, module in parts_of(method).items():
            save_module(folder / FILES[part], module, {"step": str(STEP), "dataset_sha256": SUM})
        (folder / "DONE").touch()
    return method


@pytest.mark.parametrize("name", METHODS)
def test_a_checkpoint_has_the_parts_that_the_run_will_leave(name: str, tmp_path: Path) -> None:
    """Of a method that teaches itself they are the teacher's."""
    config = with_small(tiny_config(tmp_path / "run", Path("data.beton")), name)
    expected = leave(config, finished=True)
    images = torch.randn(2, 3, config.data.image_size, config.data.image_size)
    for run in (open_run(config.run_dir), open_run(config.run_dir, checkpoint=STEP)):
        assert (run.step, run.dataset_sha256, run.view.size) == (STEP, SUM, config.data.image_size)
        found = run.method()
        features = found.exported(images)
        assert torch.equal(features, expected.eval().exported(images))
        assert torch.equal(found.embeddings(features), expected.embeddings(features))
        for part, module in parts_of(expected).items():
            assert all(torch.equal(value, run.tensors(part)[name]) for name, value in module.state_dict().items()), part
    unfinished = read_weights(config.run_dir / "checkpoints" / f"step-{STEP:08d}").tensors
    assert all(torch.equal(value, unfinished[name]) for name, value in expected.exported.body.state_dict().items())


def test_an_unfinished_run_is_refused_unless_its_newest_checkpoint_will_do(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", Path("data.beton"))
    leave(config, finished=False)
    with pytest.raises(UserError, match=rf"holds no finished run; --checkpoint {STEP} takes its newest checkpoint"):
        open_run(config.run_dir)
    assert open_run(config.run_dir, or_newest=True).source.name == f"step-{STEP:08d}"
    with pytest.raises(UserError, match="has no checkpoint of step 3; it has \\[7\\]"):
        open_run(config.run_dir, checkpoint=3)
    other = replace(config, run_dir=tmp_path / "other")
    other.run_dir.mkdir()
    (other.run_dir / "config.json").write_text(json.dumps(to_dict(other)))
    with pytest.raises(UserError, match="is neither finished nor has it a checkpoint"):
        open_run(other.run_dir, or_newest=True)


@pytest.mark.parametrize("part", ["encoder", "projector"])
def test_a_file_that_is_cut_or_gone_is_named(part: str, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", Path("data.beton"))
    leave(config, finished=True)
    path = config.run_dir / FILES[part]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"{FILES[part]} is damaged .*; --checkpoint {STEP} takes"):
        open_run(config.run_dir).method()
    path.unlink()
    with pytest.raises(UserError, match=rf"{FILES[part]} is damaged|holds no finished run"):
        open_run(config.run_dir).method()


def test_a_config_of_another_version_is_told_from_no_config(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", Path("data.beton"))
    leave(config, finished=True)
    path = config.run_dir / "config.json"
    known = json.loads(path.read_text())
    for changed, words in (
        ({**known, "novelty": 1}, "fields that this version does not know: novelty"),
        ({**known, "method": {"name": "mae"}}, "names method mae; this version has"),
        ([1], "is not a config that training wrote"),
    ):
        path.write_text(json.dumps(changed))
        with pytest.raises(UserError, match=words):
            open_run(config.run_dir)
    path.unlink()
    with pytest.raises(UserError, match=r"is no run's folder: it has no config\.json"):
        open_run(config.run_dir)
