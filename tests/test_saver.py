"""Saving while the run goes on: the state at the call, one after the other, whole or not at all."""

import resource
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_contrastive import distributed
from dist_contrastive.checkpoint import CheckpointStore, Saver, Tensors
from dist_contrastive.config import UserError
from tests.harness import RankError, run_ranks

TIMEOUT_S = 60.0


class SlowStore(CheckpointStore):
    """A store on a disk that takes as long as it is told to."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, keep=9)
        self.disk = threading.Event()
        self.disk.set()
        self.num_at_once = 0
        self.most_at_once = 0

    def write(self, folder: Path, tensors: Mapping[str, Tensors]) -> dict[str, str]:  # type: ignore[override]
        self.num_at_once += 1
        self.most_at_once = max(self.most_at_once, self.num_at_once)
        assert self.disk.wait(TIMEOUT_S)
        sums = super().write(folder, tensors)
        self.num_at_once -= 1
        return sums


def saver_of(store: CheckpointStore) -> Saver:
    return Saver(store, lambda: "it goes on")


def state_at(step: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return {"step": step, "list": [step]}, {"weight": torch.full((3, 5), float(step)), "count": torch.tensor(step)}


def assert_holds(store: CheckpointStore, step: int) -> None:
    state, tensors = state_at(step)
    found = store.load(step)
    assert found.state == state
    for name, tensor in tensors.items():
        assert torch.equal(found.tensors["model"][name], tensor)


def test_what_is_saved_is_the_state_at_the_call(tmp_path: Path) -> None:
    store = SlowStore(tmp_path)
    saver = saver_of(store)
    store.disk.clear()
    state, tensors = state_at(1)
    saver.save(1, state, {"model": tensors})
    assert store.steps() == []  # it returned before anything was written
    state["list"].append("later")
    for tensor in tensors.values():
        tensor.zero_()
    store.disk.set()
    saver.settle()
    assert_holds(store, 1)


def test_one_after_the_other_and_at_most_one_at_once(tmp_path: Path) -> None:
    store = SlowStore(tmp_path)
    saver = saver_of(store)
    for step in range(1, 6):
        state, tensors = state_at(step)
        store.disk.clear()
        threading.Timer(0.05, store.disk.set).start()
        saver.save(step, state, {"model": tensors})
        assert store.steps() == list(range(1, step))
    saver.settle()
    saver.settle()  # which has nothing to wait for
    assert store.most_at_once == 1
    for step in range(1, 6):
        assert_holds(store, step)


def test_a_buffer_takes_another_shape(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=9)
    saver = saver_of(store)
    for step, tensor in enumerate([torch.ones(3), torch.ones(4), torch.ones(4).half()], 1):
        saver.save(step, {}, {"model": {"a": tensor}})
        saver.settle()
        found = store.load(step).tensors["model"]["a"]
        assert (found.shape, found.dtype) == (tensor.shape, tensor.dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_is_saved_from_a_gpu_is_the_state_at_the_call(tmp_path: Path) -> None:
    store = SlowStore(tmp_path)
    saver = saver_of(store)
    for step in (1, 2):
        state, tensors = state_at(step)
        on_gpu = {name: tensor.cuda() for name, tensor in tensors.items()}
        store.disk.clear()
        saver.save(step, state, {"model": on_gpu})
        for tensor in on_gpu.values():
            tensor.zero_()
        store.disk.set()
        saver.settle()
        assert_holds(store, step)


# --- several ranks ----------------------------------------------------------------------------------------------------


def save_where_ranks_differ(rank: int, root: Path) -> None:
    saver = saver_of(CheckpointStore(root, keep=2))
    for step in (1, 2):
        state, tensors = state_at(step if rank == 0 else 100 * step)
        saver.save(step, state, {"model": tensors})
    saver.settle()


def test_rank_0s_state_is_saved(tmp_path: Path) -> None:
    run_ranks(save_where_ranks_differ, 3, tmp_path)
    store = CheckpointStore(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]
    for step in (1, 2):
        assert_holds(store, step)


def save_on_a_full_disk(rank: int, root: Path) -> tuple[str, bool]:
    """The error of the second save, which rank 0 can't write, and whether this rank knew before the others."""
    saver = saver_of(CheckpointStore(root, keep=2))
    saver.save(1, {}, {"model": {"weight": torch.ones(5000)}})
    saver.settle()
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    saver.save(2, {}, {"model": {"weight": torch.ones(5000)}})
    saver.wait()
    knew = saver.has_failed
    try:
        saver.settle()
    except UserError as error:
        return str(error), knew
    return "", knew


def test_a_full_disk_stops_all_ranks_with_the_same_line(tmp_path: Path) -> None:
    outcomes = run_ranks(save_on_a_full_disk, 3, tmp_path)
    line = f"{tmp_path}/step-00000002, the checkpoint of step 2, can't be written (File too large); make room, then it goes on"
    assert outcomes == [(line, rank == 0) for rank in range(3)]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


# --- what goes wrong --------------------------------------------------------------------------------------------------


def save_where_the_thread_breaks(rank: int, root: Path) -> None:
    store = CheckpointStore(root, keep=2)

    def broken(*arguments: Any) -> None:
        raise ZeroDivisionError("a fault of the writer")

    store.commit = broken  # type: ignore[method-assign,assignment]
    saver = saver_of(store)
    saver.save(1, {}, {})
    saver.settle()


def test_an_internal_fault_in_the_thread_is_raised_as_itself(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="ZeroDivisionError: a fault of the writer"):
        run_ranks(save_where_the_thread_breaks, 1, tmp_path)


def test_the_next_save_raises_what_the_last_one_met(tmp_path: Path) -> None:
    store = SlowStore(tmp_path / "checkpoints")
    saver = saver_of(store)
    store.disk.clear()
    saver.save(1, {}, {})
    (folder,) = store.root.iterdir()
    folder.rename(tmp_path / "elsewhere")
    store.disk.set()
    with pytest.raises(UserError, match=r"can't be written \(No such file or directory\); mend that, then it goes on"):
        saver.save(2, {}, {})
    assert not saver.has_failed
    saver.save(2, {}, {})
    saver.settle()
    assert store.steps() == [2]


def test_a_checkpoint_makes_no_runs_folder_in_place_of_one_that_is_gone(tmp_path: Path) -> None:
    saver = saver_of(CheckpointStore(tmp_path / "gone" / "checkpoints", keep=2))
    with pytest.raises(UserError, match=r"can't be written \(No such file or directory\)"):
        saver.save(1, {}, {})
    assert list(tmp_path.iterdir()) == []


def wait_and_return(rank: int, root: Path) -> float:
    """How long `wait` took, of a writer that has not come to its end when the wait is over."""
    store = SlowStore(root)
    saver = saver_of(store)
    store.disk.clear()
    saver.save(1, {}, {})
    began = time.monotonic()
    saver.wait(0.2)
    took = time.monotonic() - began
    assert distributed.is_main()
    store.disk.set()
    saver.settle()
    return took


def test_a_wait_may_have_a_bound(tmp_path: Path) -> None:
    assert 0.2 <= run_ranks(wait_and_return, 1, tmp_path)[0] < TIMEOUT_S
