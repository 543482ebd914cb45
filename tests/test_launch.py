"""What a machine's GPUs allow, refused in one line where they don't: the facts are given, no GPU is asked."""

from types import SimpleNamespace

import pytest
import torch

from dist_contrastive.config import LaunchConfig, UserError
from dist_contrastive.preflight import device_and_precision


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


def test_a_rank_that_sees_none_of_its_hosts_gpus_but_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    a_machine_with_gpus(monkeypatch, 1, capability=8)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("RANK", "11")
    text = refusal(LaunchConfig())
    assert text.startswith("rank 11 is number 3 (from 0) on its host and sees 1 GPU(s)")
    assert "--gpus-per-node, not --gpus-per-task" in text
