"""A run that starts from the weights of another, or of a file: what is taken, and what is refused."""

import argparse
import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor

from dist_contrastive.config import EncoderConfig, ProbeConfig, TrainConfig, UserError
from dist_contrastive.methods import Method
from dist_contrastive.methods.byol import BYOL, BYOLConfig
from dist_contrastive.run_folder.config import read_config
from dist_contrastive.trainer import build_method
from dist_contrastive.weights import read_weights, start_from
from tests.harness import RankError, run_ranks
from tests.runs import assert_same_state, newest_checkpoint, tiny_config, train_on_rank, write_dataset
from tests.steps import teacher_of

TIMM = EncoderConfig(name="resnet18")
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    config = tiny_config(tmp_path_factory.mktemp("runs") / "finished", dataset, epochs=1)
    run_ranks(train_on_rank, 1, config)
    return config


def method_of(encoder: EncoderConfig = TIMM) -> Method:
    return build_method(replace(tiny_config(Path("unused"), Path("unused")), encoder=encoder))


@pytest.fixture(scope="module")
def resnet18() -> Tensors:
    """A timm checkpoint's tensors, classifier included; the weights are of nobody else."""
    torch.manual_seed(1)
    model = timm.create_model("resnet18", pretrained=False)
    return {name: t + 1 if t.is_floating_point() else t for name, t in model.state_dict().items()}


def assert_taken(method: Method, expected: Tensors) -> None:
    for name, value in method.encoder.body.state_dict().items():
        assert torch.equal(value, expected[name]), name


# --- files --------------------------------------------------------------------------------------------------------------


def save_safetensors(tensors: Tensors, path: Path) -> None:
    path.write_bytes(safetensors.torch.save(tensors))


def prefixed(tensors: Tensors, prefix: str) -> Tensors:
    return {f"{prefix}{name}": value for name, value in tensors.items()}


def zeros(tensors: Tensors) -> Tensors:
    return {name: torch.zeros_like(value) for name, value in tensors.items()}


WRAPPERS: dict[str, Callable[[Tensors], Any]] = {
    "bare": lambda t: t,
    "timm's": lambda t: {
        "epoch": 3, "args": argparse.Namespace(model="resnet18"), "state_dict": t, "state_dict_ema": zeros(t),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}},
    },
    "DDP's": lambda t: {"state_dict": prefixed(t, "module.")},
    "a backbone and a head": lambda t: {"model": {**prefixed(t, "backbone."), "projector.0.weight": torch.ones(3, 3)}},
    "MoCo's": lambda t: {"state_dict": {**prefixed(t, "module.encoder_q."), **prefixed(zeros(t), "module.encoder_k.")}},
    "without a classifier": lambda t: {name: value for name, value in t.items() if not name.startswith("fc.")},
    "of an old torch": lambda t: {name: v for name, v in t.items() if not name.endswith("num_batches_tracked")},
    "half": lambda t: {name: value.half().float() for name, value in t.items()},
}  # fmt: skip


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_file_of_torch_save(wrapper: str, resnet18: Tensors, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    tensors = {name: t.half().float() if wrapper == "half" else t for name, t in resnet18.items()}
    torch.save(WRAPPERS[wrapper](resnet18), path)
    method = method_of()
    weights = read_weights(path)
    said = start_from(method, weights)
    assert weights.sha256 == (hashlib.sha256(path.read_bytes()).hexdigest(),)
    counts = {name: t for name, t in method.encoder.body.state_dict().items() if name.endswith("num_batches_tracked")}
    assert_taken(method, {**tensors, **(counts if wrapper == "of an old torch" else {})})
    assert ("left out: fc.weight, fc.bias" in said) == (wrapper != "without a classifier")
    assert "\n" not in said


def test_a_file_of_safetensors_by_any_name(resnet18: Tensors, tmp_path: Path) -> None:
    for name in ("model.safetensors", "weights.bin"):
        save_safetensors(resnet18, tmp_path / name)
        method = method_of()
        start_from(method, read_weights(tmp_path / name))
        assert_taken(method, resnet18)


@pytest.mark.parametrize(
    ("encoder", "words"),
    [
        (EncoderConfig(name="resnet18", stem="small"), ["of another shape: conv1.weight [64, 3, 7, 7], here [64, 3, 3, 3]"]),
        (EncoderConfig(name="resnet34"), ["missing: layer1.2.conv1.weight", "more"]),
        (EncoderConfig(name="resnet10_w64"), ["missing: conv1.0.weight", "unexpected: conv1.weight, layer1.1."]),
        (EncoderConfig(name="resnet18", norm="group"), ["unexpected: bn1.num_batches_tracked, bn1.running_mean"]),
        (EncoderConfig(name="vit_tiny_patch16_224"), ["missing: cls_token"]),
    ],
)  # fmt: skip
def test_weights_of_another_encoder_are_refused_with_what_differs(
    encoder: EncoderConfig, words: list[str], resnet18: Tensors, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    save_safetensors(resnet18, path)
    method = method_of(encoder)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    with pytest.raises(UserError) as caught:
        start_from(method, read_weights(path))
    assert all(word in str(caught.value) for word in ["these are not the weights of --encoder.name", *words])
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[name], value) for name, value in method.state_dict().items())


def test_a_deeper_encoder_does_not_pass_for_a_shallower_one(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_safetensors(timm.create_model("resnet34", pretrained=False).state_dict(), path)
    with pytest.raises(UserError, match=r"unexpected: layer1\.2\."):
        start_from(method_of(), read_weights(path))


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (Path(self.path),)


@pytest.mark.parametrize(
    "content", [b"", b"no weights", b"PK\x03\x04", b"\x80\x02junk", b"\x08" + bytes(7) + b"{bad json"]
)
def test_what_holds_no_weights_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError, match="--from") as caught:
        read_weights(tmp_path / "file")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("save", [lambda value, path: path.write_bytes(pickle.dumps(value)), torch.save])
def test_opening_a_file_runs_no_code(save: Callable[[Any, Path], None], tmp_path: Path) -> None:
    save({"state_dict": Trap(tmp_path / "sprung")}, tmp_path / "file")
    with pytest.raises(UserError, match="could run code"):
        read_weights(tmp_path / "file")
    assert not (tmp_path / "sprung").exists()


# --- runs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["run", "checkpoint", "file", "unfinished"])
def test_a_run_of_this_package(source: str, finished: TrainConfig, tmp_path: Path) -> None:
    path = {
        "run": finished.run_dir,
        "checkpoint": newest_checkpoint(finished.run_dir).path,
        "file": finished.run_dir / "encoder.safetensors",
        "unfinished": tmp_path / "copy",
    }[source]
    if source == "unfinished":
        shutil.copytree(finished.run_dir, path)
        (path / "DONE").unlink()
    method = build_method(replace(finished, seed=5))
    said = start_from(method, read_weights(path))
    model = newest_checkpoint(finished.run_dir).tensors["model"]
    for name, value in method.state_dict().items():
        if name.startswith("encoder.") or source != "file":
            assert torch.equal(value, model[name]), name
    assert ("its projector, too" in said) == (source != "file")


def test_a_projector_of_another_shape_is_new_and_teachers_are_copies(finished: TrainConfig) -> None:
    method = build_method(replace(finished, method=BYOLConfig()))
    assert isinstance(method, BYOL)
    assert "new projector" in start_from(method, read_weights(finished.run_dir))
    assert any(value.any() for name, value in method.encoder.state_dict().items() if name.endswith("running_mean"))
    for theirs, mine in (
        (method.encoder, teacher_of(method).encoder),
        (method.projector, teacher_of(method).projector),
    ):
        copied = mine.state_dict()
        assert all(torch.equal(value, copied[name]) for name, value in theirs.state_dict().items())


def test_a_run_from_weights_starts_there_says_so_and_goes_on_without_the_source(
    finished: TrainConfig, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(finished.run_dir, source)
    probe = ProbeConfig(knn_k=5, strengths=(1e-2,))
    config = replace(finished, run_dir=tmp_path / "run", init_from=source, epochs=2, seed=1, probe=probe)
    run_ranks(train_on_rank, 2, replace(config, stop_after_steps=2))
    written = read_config(config.run_dir)
    sums = [hashlib.sha256((source / f"{n}.safetensors").read_bytes()).hexdigest() for n in ("encoder", "projector")]
    assert (written.init_from, written.init_sha256) == (source, tuple(sums))
    scores = newest_checkpoint(config.run_dir).state["extra"]["scores"]
    assert [(entry["epoch"], entry["step"]) for entry in scores["history"]] == [(0, 0)]
    whole = replace(config, run_dir=tmp_path / "whole", stop_after_steps=4)
    run_ranks(train_on_rank, 2, whole)
    shutil.rmtree(source)
    run_ranks(train_on_rank, 2, replace(config, stop_after_steps=4))
    assert_same_state(newest_checkpoint(config.run_dir), newest_checkpoint(whole.run_dir))
    assert json.loads((config.run_dir / "config.json").read_text())["init_sha256"] == sums


def test_before_its_first_checkpoint_it_starts_again_from_the_same_weights_alone(
    finished: TrainConfig, tmp_path: Path
) -> None:
    source = tmp_path / "encoder.safetensors"
    shutil.copy(finished.run_dir / "encoder.safetensors", source)
    config = replace(finished, run_dir=tmp_path / "run", init_from=source, stop_after_steps=2)
    run_ranks(train_on_rank, 1, config)
    for checkpoint in (config.run_dir / "checkpoints").iterdir():
        shutil.rmtree(checkpoint)
    content = bytearray(source.read_bytes())
    content[-1] ^= 1
    source.write_bytes(content)
    with pytest.raises(RankError, match="its SHA-256 is no longer that with which this run was started"):
        run_ranks(train_on_rank, 1, config)


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n" + bytes(40), b"hello world", b'{"a": 1}', b"hi", b""])
def test_what_torch_did_not_save_is_not_said_to_run_code(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_weights(path)
    assert str(caught.value) == (
        f"--from {path}: neither safetensors nor a file of torch.save; give a run's folder, one of its checkpoints, or a file of "
        "weights"
    )


def test_a_run_does_not_overwrite_its_source(finished: TrainConfig) -> None:
    for source in (finished.run_dir, finished.run_dir / "encoder.safetensors"):
        with pytest.raises(UserError, match=r"--from .*: lies in --run-dir"):
            replace(finished, init_from=source, overwrite=True)
