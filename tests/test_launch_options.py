"""What a run may ask of torch beside its precision: compiled passes, whose shapes are fixed, and what only GPUs have."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx
from torch._dynamo.backends.registry import lookup_backend

from dist_contrastive import launch, preflight
from dist_contrastive.config import BatchConfig, EncoderConfig, LaunchConfig, TrainConfig, UserError
from dist_contrastive.evaluation.precision import full_precision
from dist_contrastive.models import base
from dist_contrastive.run import train
from tests.harness import run_ranks
from tests.runs import metrics_of, tiny_config, train_on_rank, write_dataset
from tests.steps import build, clock_at, gradient_of, share_of_batch, step_gradient, with_small

compiled: list[fx.GraphModule] = []


def note(graph: fx.GraphModule, inputs: Any) -> Any:
    """A backend that runs a graph as it is."""
    compiled.append(graph)
    return graph.forward


def gradients(rank: int, name: str, encoder: EncoderConfig, micro: int) -> tuple[Any, Any, list[int]]:
    """The gradient of a third step, compiled and not, and how many graphs there are after each step and a pass in evaluation."""
    base.BACKEND = note  # type: ignore[assignment]
    found, counts = [], []
    for compiles in (False, True):
        method = build(name, encoder)
        for module in method.modules():
            if isinstance(module, base.Encoder) and compiles:
                module.compile_training()
        batch = share_of_batch(method, crops=2 if method.multi_crop else 0)
        steps = step_gradient(method, micro)
        for step in range(3):
            method.zero_grad(set_to_none=True)
            steps.compute(batch, clock_at(step=step))
            counts.append(len(compiled))
        found.append(gradient_of(method))
        method.eval()
        method.encoder(batch.views[0][0, :3])
    return found[0], found[1], [*counts, len(compiled)]


@pytest.mark.parametrize(
    ("name", "norm", "micro"),
    [("simclr", "group", 4), ("moco", "batch", 0), ("dino", "group", 0)],
    ids=["with gradient and without", "a teacher", "smaller crops"],
)
def test_the_first_step_compiles_every_shape_and_later_ones_none(name: str, norm: Any, micro: int) -> None:
    encoder = EncoderConfig(name="resnet10_w16", stem="small", norm=norm, dropout=0.1)
    ((expected, found, counts),) = run_ranks(gradients, 1, name, encoder, micro)
    assert counts[:3] == [0, 0, 0]
    assert counts[3] > 0
    assert counts[3:] == [counts[3]] * 4
    for key, gradient in expected.items():
        np.testing.assert_allclose(found[key], gradient, rtol=1e-4, atol=1e-6, err_msg=key)


def train_compiled(rank: int, config: TrainConfig, backend: str) -> int:
    """How many graphs are compiled."""
    compile_graph = note if backend == "as it is" else lookup_backend(backend)

    def counted(graph: fx.GraphModule, inputs: Any) -> Any:
        compiled.append(graph)
        return compile_graph(graph, inputs)

    base.BACKEND = counted  # type: ignore[assignment]
    train(config)
    return len(compiled)


@pytest.mark.parametrize(
    "backend",
    [
        "as it is",
        pytest.param("inductor", marks=pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")),
    ],
)
def test_a_run_whose_passes_are_compiled_has_the_losses_of_one_whose_are_not(backend: str, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "plain", write_dataset(tmp_path), norm="group", stop_after_steps=3)
    run_ranks(train_on_rank, 1, config)
    other = replace(config, run_dir=tmp_path / "compiled", launch=replace(config.launch, compile=True))
    assert run_ranks(train_compiled, 1, other, backend)[0] > 0
    for one, same in zip(metrics_of(config.run_dir), metrics_of(other.run_dir), strict=True):
        assert one == pytest.approx(same, abs=1e-4)


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        ("simclr", {"norm": "sync"}, "--encoder.norm sync: what ranks tell one another"),
        ("ibot", {}, "with ibot: passes with masked patches"),
        ("simclr", {"batch": BatchConfig(size=16, micro="auto")}, "give --batch.micro a number"),
        ("simclr", {"norm": "group", "batch": BatchConfig(size=16, micro=3)}, "passes of two sizes; give a divisor"),
        ("simclr", {"batch": BatchConfig(size=16, micro=4)}, "another share"),
    ],
)
def test_passes_that_would_change_their_shape_or_can_not_be_compiled_are_refused(
    method: str, changes: dict[str, Any], words: str
) -> None:
    config = with_small(tiny_config(Path("run"), Path("data.beton"), **changes), method)
    preflight.check_compiled(config, 2)
    with pytest.raises(UserError, match=r"^--launch.compile ") as caught:
        preflight.check_compiled(replace(config, launch=LaunchConfig(compile=True)), 2)
    assert words in str(caught.value)


@pytest.mark.parametrize("option", ["tf32", "cudnn_benchmark", "expandable_segments"])
def test_what_only_gpus_have_is_refused_on_a_cpu(option: str) -> None:
    asked = replace(LaunchConfig(), **{option: True})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f"^--launch.{option.replace('_', '-')} is for GPUs"):
        preflight.check_device_options(asked, "cpu")


def test_tf32_that_a_gpu_has_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(UserError, match=r"^--launch.tf32: this GPU has no TensorFloat-32"):
        preflight.check_device_options(LaunchConfig(tf32=True), "cuda")
    preflight.check_device_options(LaunchConfig(), "cuda")


def use(rank: int, options: LaunchConfig) -> tuple[str, bool, bool, bool]:
    torch.cuda.get_device_capability = lambda *device: (8, 0)
    launch._use(replace(tiny_config(Path("run"), Path("data.beton")), launch=options), "cuda")
    return (
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cudnn.allow_tf32,  # which raises where torch was told two things
        torch.backends.cudnn.benchmark,
        "expandable_segments:True" in torch._C._accelerator_getAllocatorSettings(),
    )


def precisions_of_a_probe(rank: int) -> list[tuple[str, bool]]:
    use(rank, LaunchConfig(tf32=True))

    def now() -> tuple[str, bool]:
        return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.allow_tf32

    with full_precision(torch.device("cpu")):
        within = now()
    return [within, now()]


def test_a_probe_is_in_whole_fp32_and_training_goes_on_as_it_was_asked() -> None:
    assert run_ranks(precisions_of_a_probe, 1) == [[("ieee", False), ("tf32", True)]]


def test_torch_does_what_is_asked_for_and_nothing_by_itself() -> None:
    assert run_ranks(use, 1, LaunchConfig()) == [("ieee", False, False, False)]
    asked = LaunchConfig(tf32=True, cudnn_benchmark=True, expandable_segments=True)
    assert run_ranks(use, 1, asked) == [("tf32", True, True, True)]
