"""A run's checkpoint with other bytes, at whatever offset, or with other files: never taken, and the one before is."""

import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_contrastive.checkpoint import Checkpoint, CheckpointStore
from dist_contrastive.config import UserError
from tests.harness import run_ranks
from tests.runs import STEPS_PER_EPOCH, tiny_config, train_on_rank, write_dataset


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> CheckpointStore:
    folder = tmp_path_factory.mktemp("two")
    config = tiny_config(folder / "run", write_dataset(folder), stop_after_steps=STEPS_PER_EPOCH + 2)
    run_ranks(train_on_rank, 1, config)
    return CheckpointStore(config.run_dir / "checkpoints", keep=2)


def newest_or_line(root: Path) -> Checkpoint | str:
    """The checkpoint that is taken, after one line for each that is not; or the line with which none is."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = CheckpointStore(root, keep=2).newest()
    except UserError as error:
        return str(error)
    assert found is not None
    assert ["\n" in str(warning.message) for warning in caught] == [False] * (found.step != max(found_steps(root)))
    return found


def found_steps(root: Path) -> list[int]:
    return CheckpointStore(root, keep=2).steps()


@pytest.mark.parametrize("harm", ["cut short", "a bit flipped"])
def test_at_50_offsets_whatever_is_wrong_is_never_taken(two_checkpoints: CheckpointStore, harm: str) -> None:
    root = two_checkpoints.root
    older, newer = two_checkpoints.steps()
    good = two_checkpoints.load(newer)
    files = sorted(two_checkpoints.path(newer).iterdir())
    assert [path.name for path in files] == [
        "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"
    ]  # fmt: skip
    generator = np.random.default_rng(10)
    num_older = 0
    for number in range(50):
        path = files[number % len(files)]
        content = path.read_bytes()
        # The first and the last byte of each file, and others.
        offset = {0: 0, 1: len(content) - 1}.get(number // len(files), int(generator.integers(len(content))))
        bit = 1 << int(generator.integers(8))
        flipped = content[:offset] + bytes([content[offset] ^ bit]) + content[offset + 1 :]
        path.write_bytes(content[:offset] if harm == "cut short" else flipped)
        found = newest_or_line(root)
        path.write_bytes(content)
        where = f"{path.name}, {harm} at {offset}, bit {bit}"
        if isinstance(found, str):
            assert path.name == "manifest.json", where
            assert "\n" not in found
            assert "nothing was changed" in found
        elif found.step == older:
            num_older += 1
        else:  # a byte of the manifest that nothing is read by: of a version, say
            assert path.name == "manifest.json", where
            assert found.state == good.state
            for group, tensors in good.tensors.items():
                for name, tensor in tensors.items():
                    assert torch.equal(tensor, found.tensors[group][name]), where
    assert num_older >= 37, "each of the other three files"


@pytest.mark.parametrize("name", ["pipe.pkl", "../../pipe.safetensors", "pipe.safetensors", "state.json"])
def test_a_manifest_that_lists_what_no_run_writes_is_refused_unopened(
    two_checkpoints: CheckpointStore, tmp_path: Path, name: str
) -> None:
    root = tmp_path / "run" / "checkpoints"
    shutil.copytree(two_checkpoints.root, root)
    store = CheckpointStore(root, keep=2)
    older, newer = store.steps()
    path = store.path(newer) / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    manifest = json.loads((store.path(newer) / "manifest.json").read_text())
    manifest["sha256"][name] = "0" * 64
    (store.path(newer) / "manifest.json").write_text(json.dumps(manifest))
    with pytest.warns(UserWarning, match="skipping a bad checkpoint"):
        found = store.newest()
    assert found is not None
    assert found.step == older
