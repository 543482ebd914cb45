"""What a machine's GPUs allow, refused in one line where they don't: the facts are given, no GPU is asked."""

from types import SimpleNamespace

import pytest
import torch

from dist_contrastive.config import LaunchConfig, UserError
from dist_contrastive.preflight import check_devices, device_and_precision, device_number
from dist_contrastive.rendezvous import Peer


def a_machine_with_gpus(monkeypatch: pytest.MonkeyPatch, number: int, capability: int) -> None:
    """What torch tells of its devices on such a machine; it would compute bf16 by emulation if asked to."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=capability))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)


def refusal(launch: LaunchConfig) -> str:
    with pytest.raises(UserError) as caught:
        device_and_precision(launch)
    return str(caught.value)


def test_bf16_that_is_only_emulated_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    a_machine_with_gpus(monkeypatch, 1, capability=7)
    assert torch.cuda.is_bf16_supported(), "torch's own answer counts emulation"
    assert "use --launch.precision fp16" in refusal(LaunchConfig(precision="bf16"))


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, number: int, *, visible: str | None) -> None:
    """What a launcher tells rank `rank`, number `number` on its host, whose GPUs are those in `visible`."""
    for name, value in (("RANK", str(rank)), ("LOCAL_RANK", str(number)), ("CUDA_VISIBLE_DEVICES", visible)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)


@pytest.mark.parametrize(("gpus", "visible"), [(1, None), (2, None), (2, "4,5")])
def test_more_ranks_than_gpus_are_refused(gpus: int, visible: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    a_machine_with_gpus(monkeypatch, gpus, capability=8)
    as_rank(monkeypatch, 11, 3, visible=visible)
    text = refusal(LaunchConfig())
    assert text.startswith(f"rank 11 is number 3 (from 0) on its host and sees {gpus} GPU(s)")
    assert "or its own alone" in text


@pytest.mark.parametrize("visible", ["3", "0"])  # a container's or Slurm's numbers begin with 0 for each rank
def test_a_rank_that_sees_its_own_gpu_alone_takes_it(visible: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a_machine_with_gpus(monkeypatch, 1, capability=8)
    as_rank(monkeypatch, 11, 3, visible=visible)
    assert device_and_precision(LaunchConfig()) == ("cuda", "fp32")
    assert device_number() == 0


def test_a_rank_that_sees_all_gpus_takes_the_one_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    a_machine_with_gpus(monkeypatch, 8, capability=8)
    as_rank(monkeypatch, 11, 3, visible=None)
    assert device_and_precision(LaunchConfig()) == ("cuda", "fp32")
    assert device_number() == 3


def peer(host: str, gpu: str) -> Peer:
    return Peer(host=host, machine=host, cpus="0-7", gpu=gpu)


def test_ranks_that_share_a_gpu_are_refused() -> None:
    check_devices([peer("a", "GPU-1"), peer("a", "GPU-2"), peer("b", "GPU-3")])
    check_devices([peer("a", ""), peer("a", "")])
    with pytest.raises(
        UserError, match=r"ranks 0,2-3 have one and the same GPU of a \(GPU-1\); start no more ranks than GPUs"
    ):
        check_devices([peer("a", "GPU-1"), peer("a", "GPU-2"), peer("a", "GPU-1"), peer("a", "GPU-1")])


@pytest.mark.parametrize("launched", ["bf16", "fp16"])
def test_a_launch_for_gpus_does_not_fall_back_to_the_cpu(launched: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    assert f"accelerate was told to use {launched}, as for GPUs" in refusal(LaunchConfig())
    assert device_and_precision(LaunchConfig(device="cpu", precision="bf16")) == ("cpu", "bf16")
