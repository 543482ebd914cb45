"""Checkpoints: bit for bit, verified when read, never fewer than before, and opening one runs no code."""

import hashlib
import json
import os
import pickle
import re
import resource
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from torch import Tensor, nn

from dist_contrastive import __version__
from dist_contrastive.checkpoint import (
    FORMAT,
    CheckpointStore,
    load_module,
    load_optimizer,
    optimizer_tensors,
    save_module,
)
from dist_contrastive.config import EncoderConfig, HeadConfig, OptimConfig, UserError
from dist_contrastive.models.encoders import build_encoder
from dist_contrastive.models.heads import build_head
from dist_contrastive.optim import build_optimizer
from tests.harness import run_ranks

STATE = {
    "step": 7,
    "cursor": 2**62 + 1,
    "loss": 0.1 + 0.2,
    "tiny": 5e-324,
    "text": "naïve “quotes”\n",
    "nested": {"list": [1, None, True, [1.5]], "empty": {}},
}


def tensors(seed: int, size: int = 8) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(size, 4, generator=generator)
    return {"model": {"weight": weight, "count": torch.tensor(seed)}, "optimizer": {"0.momentum": weight * 2}}


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    """A store with the checkpoints of steps 100 and 200."""
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    for step in (100, 200):
        store.save(step, tensors(step), {**STATE, "step": step})
    return store


def files(store: CheckpointStore) -> dict[str, bytes]:
    return {str(p.relative_to(store.root)): p.read_bytes() for p in sorted(store.root.rglob("*")) if p.is_file()}


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


# --- what is written is what is read ----------------------------------------------------------------------------------


def test_tensors_and_state_come_back_bit_for_bit(tmp_path: Path) -> None:
    not_a_number = torch.tensor([0x7FC00001, -0x400000], dtype=torch.int32).view(torch.float32)  # with payload and sign
    values = {
        "float": torch.cat([torch.tensor([-0.0, 1e-45, float("inf")]), not_a_number]),
        "double": torch.randn(3, 0, 2, dtype=torch.float64),
        "half": torch.randn(5).half(),
        "brain": torch.randn(5).bfloat16(),
        "scalar": torch.tensor(2**62 + 1),
        "bytes": torch.arange(256).to(torch.uint8),
        "flags": torch.tensor([True, False]),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "transposed": torch.randn(3, 4).T,
    }
    store = CheckpointStore(tmp_path, keep=2)
    store.save(7, {"model": values, "empty": {}}, STATE)
    loaded = store.newest()
    assert loaded is not None
    assert (loaded.step, loaded.path, loaded.state) == (7, store.path(7), STATE)
    assert loaded.tensors["empty"] == {}
    assert loaded.tensors["model"].keys() == values.keys()
    for name, value in values.items():
        found = loaded.tensors["model"][name]
        assert (found.dtype, found.shape) == (value.dtype, value.shape)
        assert raw(found) == raw(value), name


def build(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(name="resnet10_w16", stem="small"), 16)
    module = nn.Sequential(encoder, build_head(HeadConfig(output_size=16), encoder.feature_size, "batch"))
    optimizer = build_optimizer(OptimConfig(name=name, weight_decay=1e-2), module)  # type: ignore[arg-type]
    return module, optimizer


def update(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (step + 1)
        images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(step))
        module(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_a_restored_run_equals_an_uninterrupted_one_bit_for_bit(name: str, tmp_path: Path) -> None:
    module, optimizer = build(name)
    update(module, optimizer, range(3))
    moments, rest = optimizer_tensors(optimizer)
    store = CheckpointStore(tmp_path, keep=2)
    store.save(3, {"model": module.state_dict(), "optimizer": moments}, {"optimizer": rest})

    other, other_optimizer = build(name)
    update(other, other_optimizer, range(5, 6))  # what was there before must not matter
    loaded = store.newest()
    assert loaded is not None
    load_module(other, loaded.tensors["model"])
    load_optimizer(other_optimizer, loaded.tensors["optimizer"], loaded.state["optimizer"])
    assert_equal(module, optimizer, other, other_optimizer)

    for run in ((module, optimizer), (other, other_optimizer)):
        update(*run, range(3, 5))
    assert_equal(module, optimizer, other, other_optimizer)


def layout(tensor: Tensor) -> list[tuple[int, int]]:
    """Sizes and strides, without axes of size 1, whose stride means nothing."""
    return [(size, step) for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def assert_equal(
    module: nn.Module, optimizer: torch.optim.Optimizer, other: nn.Module, other_optimizer: torch.optim.Optimizer
) -> None:
    for (name, value), found in zip(module.state_dict().items(), other.state_dict().values(), strict=True):
        assert raw(value) == raw(found), name
        assert value.stride() == found.stride(), name
    state, found_state = optimizer.state_dict()["state"], other_optimizer.state_dict()["state"]
    assert state.keys() == found_state.keys()
    for number, values in state.items():
        assert values.keys() == found_state[number].keys()
        for key, value in values.items():
            found = found_state[number][key]
            assert raw(value) == raw(found), (number, key)
            # Another layout takes other vector paths, whose rounding differs.
            assert layout(value) == layout(found), (number, key)


def test_another_architecture_is_a_clear_error() -> None:
    module = build("sgd")[0]
    encoder = build_encoder(EncoderConfig(name="resnet10_w32", stem="small"), 16)
    other = nn.Sequential(encoder, build_head(HeadConfig(layers=3), encoder.feature_size, "batch"))
    with pytest.raises(UserError, match="the checkpoint is of another model") as caught:
        load_module(other, module.state_dict())
    assert "\n" not in str(caught.value)


def test_save_module_writes_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    module = build("sgd")[0]
    save_module(path, module, {"config": '{"a": 1}'})
    before = path.read_bytes()
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"config": '{"a": 1}'}
        for name, value in module.state_dict().items():
            assert raw(file.get_tensor(name)) == raw(value)
    assert run_ranks(save_module_without_room, 1, path) == ["OSError"]
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# --- which one is used ------------------------------------------------------------------------------------------------


def assert_falls_back(store: CheckpointStore) -> None:
    """The checkpoint of step 100 is used, and a one-line warning says why that of step 200 is not, and no more."""
    with pytest.warns(UserWarning, match="skipping a bad checkpoint: .*step-00000200") as caught:
        found = store.newest()
    assert found is not None
    assert (found.step, found.state["step"]) == (100, 100)
    assert raw(found.tensors["model"]["weight"]) == raw(tensors(100)["model"]["weight"])
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    assert "going on from step 100" in str(caught[0].message)
    assert "delete" not in str(caught[0].message)


@pytest.mark.parametrize("position", [0, 0.5, -1], ids=["first", "middle", "last"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_an_altered_byte_and_the_one_before_is_used(store: CheckpointStore, name: str, position: float) -> None:
    path = store.path(200) / name
    data = bytearray(path.read_bytes())
    data[int(position * len(data)) if position >= 0 else -1] ^= 1
    path.write_bytes(data)
    assert_falls_back(store)
    with pytest.raises(UserError, match=f"{name} was altered"):
        store.load(200)


@pytest.mark.parametrize("state", [b"[1, 2]", b"null", b"{"])
def test_a_state_that_no_run_writes_and_the_one_before_is_used(store: CheckpointStore, state: bytes) -> None:
    """Its sums are right: edited with care, or written by something else."""
    path = store.path(200)
    (path / "state.json").write_bytes(state)
    manifest = json.loads((path / "manifest.json").read_bytes())
    manifest["sha256"]["state.json"] = hashlib.sha256(state).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert_falls_back(store)


def test_whichever_byte_of_the_manifest_is_altered_nothing_wrong_is_loaded(store: CheckpointStore) -> None:
    path = store.path(200) / "manifest.json"
    data = path.read_bytes()
    refused = 0
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        try:
            found = store.load(200)
        except UserError:
            refused += 1
        else:  # a byte of the versions, which nothing is read by
            assert found.state == {**STATE, "step": 200}
            assert raw(found.tensors["model"]["weight"]) == raw(tensors(200)["model"]["weight"])
    assert refused > 3 * 64  # each digit of the three sums


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_missing_or_cut_file_and_the_one_before_is_used(store: CheckpointStore, name: str) -> None:
    path = store.path(200) / name
    path.write_bytes(path.read_bytes()[:-5])
    assert_falls_back(store)
    path.unlink()
    assert_falls_back(store)


def test_a_manifest_that_leaves_out_a_file_and_the_one_before_is_used(store: CheckpointStore) -> None:
    path = store.path(200) / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]["model.safetensors"]
    path.write_text(json.dumps(manifest))
    assert_falls_back(store)


def test_a_folder_that_was_never_committed_is_not_seen(store: CheckpointStore) -> None:
    shutil.copytree(store.path(200), store.root / ".incomplete-step-00000300")
    shutil.copytree(store.path(200), store.root / "step-00000200.bak")
    found = store.newest()
    assert found is not None
    assert found.step == 200
    store.save(300, tensors(300), {})
    assert sorted(path.name for path in store.root.iterdir()) == ["step-00000200", "step-00000200.bak", "step-00000300"]


def test_a_renamed_folder_is_not_taken_for_another_step(store: CheckpointStore) -> None:
    store.path(100).rename(store.path(300))
    with pytest.raises(UserError, match="says that it is of step 100"):
        store.load(300)


def test_none_at_all(tmp_path: Path, store: CheckpointStore) -> None:
    assert CheckpointStore(tmp_path / "nowhere", keep=2).newest() is None
    with pytest.raises(UserError, match=r"no checkpoint of step 5; it has \[100, 200\]"):
        store.load(5)
    assert CheckpointStore(tmp_path, keep=2).newest() is None


def refusal(store: CheckpointStore) -> str:
    """The line with which no checkpoint is taken; nothing is changed by it."""
    before = sorted(store.root.rglob("*"))
    with pytest.raises(UserError) as caught:
        store.newest()
    assert sorted(store.root.rglob("*")) == before
    message = str(caught.value)
    assert "\n" not in message
    assert "nothing was changed" in message
    return message


def lose_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def change_format(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({"format": 99, "versions": manifest["versions"]}))


def another_manifest(**facts: Any) -> Callable[[Path], None]:
    """Harm that makes the manifest one of which no more is known than `facts`."""

    def harm(folder: Path) -> None:
        (folder / "manifest.json").write_text(json.dumps(facts))

    return harm


def fail_to_read(folder: Path) -> None:
    # The one file of every Linux whose reading is an I/O error (EIO).
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("/proc/self/mem")


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lose_manifest, "is incomplete (manifest.json: No such file or directory)"),
        (
            change_format,
            f"has format 99, and this version reads {FORMAT}: the version that wrote it ({__version__}) can",
        ),
        (another_manifest(format=str(FORMAT)), f'has format "{FORMAT}", and this version reads {FORMAT}'),
        (another_manifest(format=99, versions=None), "has format 99"),
        (another_manifest(format=99, versions=["0.2"]), "the version that wrote it (unknown) can"),
        (fail_to_read, "can't be read (Input/output error)"),
        (shutil.rmtree, "step-00000200.bak"),
    ],
)
def test_where_none_can_be_read_none_is_taken_and_each_reason_is_named(
    store: CheckpointStore, harm: Callable[[Path], None], reason: str
) -> None:
    shutil.copytree(store.path(200), store.root / "step-00000200.bak")
    for step in (100, 200):
        harm(store.path(step))
    message = refusal(store)
    assert message.count(reason) == (1 if harm is shutil.rmtree else 2)
    if harm is not shutil.rmtree:
        assert str(store.path(100)) in message
        assert str(store.path(200)) in message
    assert "--overwrite" in message


@pytest.mark.parametrize("name", ["set-aside-step-00000200", ".incomplete-replaced-step-00000200", "step-00000200"])
def test_what_is_left_of_checkpoints_is_not_taken_for_none(tmp_path: Path, name: str) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    (tmp_path / name).mkdir()
    assert name in refusal(store)


@pytest.mark.parametrize("harm", [change_format, another_manifest(format=99, versions=None), fail_to_read])
def test_one_that_may_be_read_another_time_is_not_passed_over(
    store: CheckpointStore, harm: Callable[[Path], None]
) -> None:
    harm(store.path(200))
    assert "move step-00000200 elsewhere to go on from step 100" in refusal(store)
    store.path(200).rename(store.root.parent / "elsewhere")
    found = store.newest()
    assert found is not None
    assert found.step == 100


def newest_as_nobody(rank: int, root: Path) -> str:
    root.parent.chmod(0o755)
    os.chdir(root.parent)  # the folders above it may be closed to others
    if os.getuid() == 0:
        os.setuid(65534)
    try:
        found = CheckpointStore(Path(root.name), keep=2).newest()
    except UserError as error:
        return str(error)
    return str(found)


def test_what_may_not_be_read_is_not_taken_for_none(store: CheckpointStore) -> None:
    (store.path(200) / "state.json").chmod(0)
    assert "state.json can't be read (Permission denied)" in run_ranks(newest_as_nobody, 1, store.root)[0]
    store.root.chmod(0)
    expected = "checkpoints can't be read (Permission denied); is its disk there?"
    assert run_ranks(newest_as_nobody, 1, store.root) == [expected]


def test_a_link_to_a_disk_that_is_not_there_is_not_taken_for_none(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").symlink_to(tmp_path / "not mounted")
    with pytest.raises(UserError, match="checkpoints can't be read"):
        CheckpointStore(tmp_path / "checkpoints", keep=2).newest()


# --- which ones stay --------------------------------------------------------------------------------------------------


def test_the_newest_stay(store: CheckpointStore) -> None:
    store.save(300, tensors(300), {})
    assert store.steps() == [200, 300]
    more = CheckpointStore(store.root, keep=3)
    more.save(400, tensors(400), {})
    assert more.steps() == [200, 300, 400]


def test_bad_ones_of_later_steps_do_not_push_out_good_ones(store: CheckpointStore) -> None:
    more = CheckpointStore(store.root, keep=3)
    more.save(300, tensors(300), {})
    for step in (200, 300):
        (store.path(step) / "manifest.json").unlink()
    store.save(150, tensors(150), {})  # by a run that went on from step 100
    assert store.steps() == [100, 150]
    assert store.load(100).step == 100


def test_one_that_was_skipped_does_not_push_out_a_good_one(store: CheckpointStore) -> None:
    (store.path(200) / "manifest.json").unlink()
    assert_falls_back(store)
    store.save(300, tensors(300), {})
    assert store.steps() == [100, 300]


def test_bad_ones_are_set_aside_and_never_deleted(store: CheckpointStore) -> None:
    model = (store.path(200) / "model.safetensors").read_bytes()
    for number in (1, 2):
        (store.path(200) / "manifest.json").unlink()
        store.save(200, tensors(200), {"again": number})
    assert store.load(200).state == {"again": 2}
    for step in (300, 400):
        store.save(step, tensors(step), {})
    assert sorted(path.name for path in store.root.iterdir()) == [
        "set-aside-step-00000200", "set-aside-step-00000200-2", "step-00000300", "step-00000400"
    ]  # fmt: skip
    assert (store.root / "set-aside-step-00000200" / "model.safetensors").read_bytes() == model


def without_room(num_bytes: int) -> None:
    """No file of this process can grow beyond `num_bytes`: writing fails as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def save_module_without_room(rank: int, path: Path) -> str:
    without_room(1000)
    try:
        save_module(path, build("sgd")[0], {})
    except OSError:
        return "OSError"
    return "written"


def save_without_room(rank: int, root: Path, num_bytes: int) -> str:
    without_room(num_bytes)
    try:
        CheckpointStore(root, keep=2).save(300, tensors(300, size=1000), STATE)
    except OSError as error:
        return str(error.strerror)
    return "written"


@pytest.mark.parametrize("num_bytes", [0, 300, 5000], ids=["nothing fits", "the state fits", "a part fits"])
def test_on_a_full_disk_all_is_as_it_was(store: CheckpointStore, num_bytes: int) -> None:
    before = files(store)
    assert run_ranks(save_without_room, 1, store.root, num_bytes) == ["File too large"]
    assert files(store) == before
    assert sorted(path.name for path in store.root.iterdir()) == ["step-00000100", "step-00000200"]
    store.save(300, tensors(300), {})
    assert store.steps() == [200, 300]


def save_for_ever(root: str, step: int) -> None:
    store = CheckpointStore(Path(root), keep=2)
    while True:
        step += 1
        store.save(step, tensors(step, size=20_000), {"step": step})


def half_written(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if not re.fullmatch(r"step-\d{8}", path.name)]


def test_a_killed_process_leaves_good_checkpoints_only(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    newest, num_half_written = 0, 0
    for _ in range(20):
        process = get_context("forkserver").Process(target=save_for_ever, args=(str(tmp_path), newest), daemon=True)
        process.start()
        deadline = time.monotonic() + 60
        while max(store.steps(), default=0) < newest + 2 and time.monotonic() < deadline:
            time.sleep(0.003)
        while not half_written(tmp_path) and time.monotonic() < deadline:
            pass
        process.kill()
        process.join()
        num_half_written += bool(half_written(tmp_path))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = store.newest()
        assert found is not None
        assert found.step >= newest + 2
        newest = found.step
        assert found.state == {"step": newest}
        assert len([step for step in store.steps() if step <= newest]) >= 2
        if num_half_written == 3:
            break
    assert num_half_written == 3, "no kill hit a checkpoint that was being written"
    # The next one to be written clears away what was half written.
    store.save(newest + 1, tensors(newest + 1), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == [store.path(newest).name, store.path(newest + 1).name]


# --- opening one runs no code -----------------------------------------------------------------------------------------


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[bytes]:
    """A pickle that must not be opened; it is checked at the end that nobody did."""
    sprung = tmp_path / "sprung"
    yield pickle.dumps(Trap(sprung))
    assert not sprung.exists()


def test_there_are_tensors_and_json_and_nothing_else(store: CheckpointStore) -> None:
    for name, data in files(store).items():
        if name.endswith(".safetensors"):
            header_size = int.from_bytes(data[:8], "little")
            assert isinstance(json.loads(data[8 : 8 + header_size]), dict)
        else:
            assert Path(name).name in ("state.json", "manifest.json")
            assert isinstance(json.loads(data), dict)


@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin", "optimizer.pkl", "state.pickle"])
def test_a_pickle_beside_the_files_is_not_opened(store: CheckpointStore, trap: bytes, name: str) -> None:
    (store.path(200) / name).write_bytes(trap)
    found = store.newest()
    assert found is not None
    assert found.tensors.keys() == {"model", "optimizer"}


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_pickle_in_place_of_tensors_is_not_opened(store: CheckpointStore, trap: bytes, name: str) -> None:
    (store.path(200) / name).write_bytes(trap)
    manifest = json.loads((store.path(200) / "manifest.json").read_text())
    manifest["sha256"][name] = hashlib.sha256(trap).hexdigest()
    (store.path(200) / "manifest.json").write_text(json.dumps(manifest))
    assert_falls_back(store)


def test_the_trap_would_spring(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").is_dir()
