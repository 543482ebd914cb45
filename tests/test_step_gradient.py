"""Gradient caching and what surrounds it: BatchNorm, replayed randomness, one communication, memory that runs out."""

import functools
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor, nn

from dist_contrastive import distributed
from dist_contrastive.batch import Batch, Samples
from dist_contrastive.config import BatchConfig, EncoderConfig, UserError
from dist_contrastive.methods.base import Embeddings, Losses, Report
from dist_contrastive.methods.simclr import SimCLR
from dist_contrastive.models.sync_norm import SyncBatchNorm
from dist_contrastive.models.teacher import Teacher
from dist_contrastive.step import buckets
from dist_contrastive.step.gradient import StepGradient, split
from dist_contrastive.step.replicas import DataParallel
from tests.harness import RankError, run_ranks
from tests.runs import (
    STEPS_PER_EPOCH,
    assert_same_state,
    losses_of,
    metrics_of,
    newest_checkpoint,
    tiny_config,
    train_on_rank,
    write_dataset,
)
from tests.steps import (
    DONE,
    GLOBAL_BATCH,
    build,
    clock_at,
    gradient_of,
    share_of_batch,
    step_gradient,
    student_of,
    teacher_of,
)

GROUP = EncoderConfig(name="resnet10_w16", stem="small", norm="group", dropout=0.1)
BATCH = EncoderConfig(name="resnet10_w16", stem="small", norm="batch")
SYNC = EncoderConfig(name="resnet10_w16", stem="small", norm="sync")


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    one = np.concatenate([found[n].ravel() for n in sorted(found)]).astype(np.float64)
    other = np.concatenate([expected[n].ravel() for n in sorted(expected)]).astype(np.float64)
    assert np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other)


@pytest.mark.parametrize(("num_samples", "micro"), [(8, 0), (8, 8), (8, 3), (8, 4), (7, 3), (5, 2), (3, 9), (4, 1)])
def test_split_is_balanced_and_covers_all(num_samples: int, micro: int) -> None:
    parts = split(num_samples, micro)
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(num_samples))
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) - min(sizes) <= 1
    if micro:
        assert max(sizes) <= micro
        assert len(parts) == -(-num_samples // micro)


@pytest.mark.parametrize("micro", [4, 3])
def test_batch_norm_takes_the_micro_batchs_statistics_in_both_passes(micro: int) -> None:
    """The gradient is that of the function in which each micro-batch is embedded by itself and the loss sees all."""
    method = build("simclr", BATCH).train()
    batch = share_of_batch(method)
    parts = [method.embed(batch.part(part)) for part in split(GLOBAL_BATCH, micro)]
    method.loss({"z": torch.cat([part["z"] for part in parts], dim=1)}, batch.samples)["loss"].backward()
    expected = gradient_of(method)
    again = build("simclr", BATCH)
    step_gradient(again, micro).compute(batch, clock_at())
    assert_close(gradient_of(again), expected)
    whole = build("simclr", BATCH)
    step_gradient(whole, 0).compute(batch, clock_at())
    with pytest.raises(AssertionError):  # with batch statistics it is another function than without micro-batches
        assert_close(gradient_of(whole), expected, tolerance=1e-2)


@pytest.mark.parametrize("micro", [8, 4, 3])
@pytest.mark.parametrize("norm", [BATCH, SYNC], ids=["batch", "sync"])
@pytest.mark.parametrize("name", ["simclr", "byol"])
def test_running_statistics_take_each_sample_once_and_move_as_far_as_without_micro_batches(
    name: str, micro: int, norm: EncoderConfig
) -> None:
    method = build(name, norm)
    bn = next(m for m in method.encoder.modules() if isinstance(m, nn.BatchNorm2d | SyncBatchNorm))
    assert bn.running_mean is not None
    assert bn.running_var is not None
    assert bn.momentum == 0.1
    bn.running_mean.fill_(0.7)
    seen: list[Tensor] = []
    bn.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    batch = share_of_batch(method)
    step_gradient(method, micro).compute(batch, clock_at())
    parts = split(GLOBAL_BATCH, micro)
    first = seen[: len(parts)]
    means = [x.mean((0, 2, 3)) for x in first]
    variances = [x.var((0, 2, 3), unbiased=True) for x in first]
    shares = [(part.stop - part.start) / GLOBAL_BATCH for part in parts]
    mean = 0.9 * 0.7 + 0.1 * sum(share * m for share, m in zip(shares, means, strict=True))
    var = 0.9 * 1.0 + 0.1 * sum(share * v for share, v in zip(shares, variances, strict=True))
    torch.testing.assert_close(bn.running_mean, mean)
    torch.testing.assert_close(bn.running_var, var)
    assert bn.num_batches_tracked == len(parts)
    assert bn.momentum == 0.1
    assert bn.track_running_stats


def test_a_teacher_takes_part_once_and_its_running_statistics_move_as_far_as_the_students() -> None:
    method = build("mocov3", BATCH)
    teacher = teacher_of(method)
    assert isinstance(teacher, Teacher)
    teacher.copy(method.encoder, method.projector)
    seen: list[Tensor] = []
    teacher.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    batch = share_of_batch(method)
    step_gradient(method, 3).compute(batch, clock_at())
    assert [len(views) for views in seen] == [2 * (part.stop - part.start) for part in split(GLOBAL_BATCH, 3)]
    # Both have the same weights and have seen the same images.
    for (name, one), other in zip(teacher.named_buffers(), student_of(method).buffers(), strict=True):
        torch.testing.assert_close(one, other, msg=name)
    assert teacher.get_buffer("encoder.body.bn1.running_mean").any()


class Noisy(SimCLR):
    """Draws from torch's own generator inside its forward pass, as stochastic depth does."""

    draws: list[Tensor]

    def embed(self, batch: Batch) -> Embeddings:
        noise = torch.rand(len(batch))
        self.draws.append(noise)
        return {"z": super().embed(batch)["z"] * noise[None, :, None]}


def test_what_a_library_draws_is_replayed_in_the_second_pass() -> None:
    method = build("simclr", GROUP)
    method.__class__ = Noisy
    assert isinstance(method, Noisy)
    method.draws = []
    step_gradient(method, 3).compute(share_of_batch(method), clock_at(step=5))
    first, second = method.draws[:3], method.draws[3:]
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert len({float(x[0]) for x in first}) == 3, "each micro-batch has numbers of its own"


def test_bf16_with_micro_batches_follows_bf16_without() -> None:
    one, other = build("simclr", GROUP), build("simclr", GROUP)
    outcomes = [
        step_gradient(m, micro, "bf16").compute(share_of_batch(m), clock_at()) for m, micro in ((one, 0), (other, 3))
    ]
    assert outcomes[0].embeddings["z"].dtype == torch.float32
    assert_close(gradient_of(other), gradient_of(one), tolerance=2e-2)
    exact = build("simclr", GROUP)
    step_gradient(exact, 0).compute(share_of_batch(exact), clock_at())
    with pytest.raises(AssertionError):
        assert_close(gradient_of(one), gradient_of(exact), tolerance=1e-4)


# Buckets


def small_buckets() -> None:
    """So that the small encoder has many."""
    buckets.FIRST_BYTES = buckets.BYTES = 4096


def averages(rank: int, name: str, micro: int) -> tuple[list[list[int]], list[int], int]:
    """Over three steps: how many numbers each bucket has, how many other messages the ranks have sent, how many are trained."""
    small_buckets()
    method = build(name, GROUP)
    steps = step_gradient(method, micro)
    sent: list[int] = []
    start = distributed.start_average

    def note(x: Tensor) -> Any:
        sent.append(x.numel())
        return start(x)

    buckets.distributed.start_average = note
    sizes, others = [], []
    for step in range(3):
        before = distributed.arrivals()
        steps.compute(share_of_batch(method), clock_at(step=step))
        sizes.append(list(sent))
        others.append(distributed.arrivals() - before - len(sent))
        sent.clear()
        method.zero_grad(set_to_none=True)
    return sizes, others, sum(p.numel() for p in method.parameters() if p.requires_grad)


@pytest.mark.parametrize(("name", "micro"), [("simclr", 1), ("byol", 1), ("simclr", 0), ("clip", 2)])
def test_each_gradient_is_sent_once_and_ranks_speak_of_their_order_once(name: str, micro: int) -> None:
    (sizes, others, trained), again = run_ranks(averages, 2, name, micro)
    assert again[0] == sizes, "the same buckets on all ranks"
    assert sizes[1] == sizes[2]
    assert others[1] == others[0] + 1, "before the second step, by one message"
    assert others[2] == others[0]
    for of_step in sizes:
        assert len(of_step) > 10
        assert trained <= sum(of_step) <= 1.01 * trained, "but for what aligns them"


def sent_so_far(rank: int, name: str, micro: int, watched: str) -> tuple[list[int], int]:
    """In each of two steps, how many buckets are sent when the last backward pass comes to a parameter; how many there are."""
    small_buckets()
    method = build(name, GROUP)
    steps = step_gradient(method, micro)
    assert isinstance(steps.replicas, DataParallel)
    own = steps.replicas._buckets
    assert own
    sent: list[int] = []
    method.get_parameter(watched).register_post_accumulate_grad_hook(lambda p: sent.append(len(own._works)))
    found = []
    for step in range(2):
        steps.compute(share_of_batch(method), clock_at(step=step))
        found.append(sent[-1])
        method.zero_grad(set_to_none=True)
    return found, len(own._buckets)


@pytest.mark.parametrize("micro", [0, 1])
@pytest.mark.parametrize("name", ["simclr", "clip"])
def test_buckets_are_sent_while_the_last_backward_pass_goes_on(name: str, micro: int) -> None:
    first_layer = "encoder.body.conv1.weight"  # the last one to get its gradient from images
    for sent, number in run_ranks(sent_so_far, 2, name, micro, first_layer):
        # In the first step the parameters of CLIP's loss, which that pass does not reach, may keep the others waiting.
        assert name == "clip" or sent[0] > number / 2
        assert sent[1] > number / 4


def gradients_lie_in_buckets(rank: int, micro: int) -> bool:
    method = build("simclr", BATCH).to(memory_format=torch.channels_last)
    steps = step_gradient(method, micro)
    steps.compute(share_of_batch(method), clock_at())
    trained = [p for p in method.parameters() if p.requires_grad]
    return len({p.grad.untyped_storage().data_ptr() for p in trained if p.grad is not None}) == 1 and all(
        p.grad is not None and p.grad.stride() == p.stride() for p in trained
    )


@pytest.mark.parametrize("micro", [0, 1])
def test_gradients_have_one_piece_of_memory_and_lie_as_their_parameters(micro: int) -> None:
    assert run_ranks(gradients_lie_in_buckets, 2, micro) == [True, True]


def offsets(steps: StepGradient) -> list[int]:
    assert isinstance(steps.replicas, DataParallel)
    assert steps.replicas._buckets
    return [int(view.storage_offset()) for view in steps.replicas._buckets._views]


def layouts(rank: int, num_steps: int) -> tuple[list[int], list[int], list[int]]:
    """Where gradients lie at first, in the step after some, and in that step in a run that was resumed before it."""
    small_buckets()
    going_on, resumed = (step_gradient(build("clip", GROUP), 2) for _ in range(2))
    first = offsets(going_on)
    for step in range(num_steps):
        going_on.compute(share_of_batch(going_on.method), clock_at(step=step))
        going_on.method.zero_grad(set_to_none=True)
    resumed.replicas.load(replace(going_on.replicas.state(), tensors={}))
    for steps in (going_on, resumed):
        steps.compute(share_of_batch(steps.method), clock_at(step=num_steps))
    return first, offsets(going_on), offsets(resumed)


@pytest.mark.parametrize("num_steps", [1, 2])
def test_a_run_that_goes_on_adds_gradients_up_in_the_order_in_which_it_did(num_steps: int) -> None:
    for first, going_on, resumed in run_ranks(layouts, 2, num_steps):
        assert going_on == resumed != first


def start_from_other_weights(rank: int) -> list[np.ndarray]:
    method = build("byol", BATCH)
    with torch.no_grad():
        for x in (*method.parameters(), *method.buffers()):
            x += rank
    step_gradient(method, 0)
    return [x.detach().numpy() for x in method.state_dict().values()]


def test_all_ranks_start_from_rank_0s_weights_and_buffers() -> None:
    for one, other in zip(*run_ranks(start_from_other_weights, 2), strict=True):
        np.testing.assert_array_equal(one, other)


# Memory that runs out.


class Failing(SimCLR):
    """Out of memory on one rank, at one moment, whenever more than `fits` samples are embedded at once."""

    moment: str
    fits: int
    failing_rank: int
    largest = 0
    calls = 0

    def fail(self, moment: str) -> None:
        self.calls += moment == "embed"
        if distributed.rank() == self.failing_rank and self.largest > self.fits and moment == self.moment:
            raise torch.OutOfMemoryError("injected")

    def embed(self, batch: Batch) -> Embeddings:
        self.largest = len(batch)
        self.fail("second pass" if torch.is_grad_enabled() else "embed")
        return super().embed(batch)

    def fail_between_layers(self) -> None:
        """Let it fail inside the encoder, too."""

        def on_the_way(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.fail("second pass, between layers" if torch.is_grad_enabled() else "between layers")
            if inputs[0].requires_grad:
                inputs[0].register_hook(lambda gradient: self.fail("backward between layers"))

        self.encoder.body.layer3.register_forward_pre_hook(on_the_way)  # type: ignore[union-attr]

    def loss(self, embeddings: Embeddings, samples: Samples) -> Losses:
        distributed.gather_with_grad(embeddings["z"])
        self.fail("between two collectives")
        losses = super().loss(embeddings, samples)
        losses["loss"].register_hook(lambda gradient: self.fail("backward of the loss"))
        return losses

    def report(self, embeddings: Embeddings, *, logged: bool) -> Report:
        self.fail("report")
        return super().report(embeddings, logged=logged)


def fail_at(rank: int, moment: str, norm: EncoderConfig) -> tuple[int, list[str], dict[str, np.ndarray], list[float]]:
    """A step of which rank 1 can do only micro-batches of 1; what the micro-batch became, what was said, the gradient."""
    small_buckets()
    method = build("simclr", norm)
    method.__class__ = Failing
    assert isinstance(method, Failing)
    method.moment, method.fits, method.failing_rank = moment, 1, 1
    method.fail_between_layers()
    steps = step_gradient(method, 3)
    said: list[str] = []
    steps.say = said.append
    steps.compute(share_of_batch(method), clock_at())
    return steps.micro, said, gradient_of(method), [float(b.double().sum()) for b in method.buffers()]


def fail_in_the_second_step(rank: int) -> tuple[int, list[str], dict[str, np.ndarray]]:
    """Rank 1 is out of memory on its way to the second step's first forward pass, which rank 0 enters."""
    method = build("simclr", GROUP)
    failed = False

    def augmentation(batch: Batch, device: torch.device) -> Batch:
        nonlocal failed
        if rank == 1 and second and not failed:
            failed = True
            raise torch.OutOfMemoryError("injected")
        return batch

    steps = step_gradient(method, 0, augmentation=augmentation)
    said: list[str] = []
    steps.say = said.append
    second = False
    steps.compute(share_of_batch(method), clock_at())
    method.zero_grad(set_to_none=True)
    second = True
    steps.compute(share_of_batch(method), clock_at(step=1))
    return steps.micro, said, gradient_of(method)


def second_step(rank: int) -> dict[str, np.ndarray]:
    method = build("simclr", GROUP)
    step_gradient(method, 2).compute(share_of_batch(method), clock_at(step=1))
    return gradient_of(method)


def test_out_of_memory_in_the_second_step_before_which_buckets_are_ordered() -> None:
    for (micro, said, gradient), clean in zip(
        run_ranks(fail_in_the_second_step, 2), run_ranks(second_step, 2), strict=True
    ):
        assert micro == 2
        assert said == [
            "step 2: out of memory on rank(s) [1] (injected); repeated with micro-batches of 2 samples instead of 4"
        ]
        assert_close(gradient, clean, tolerance=1e-6)


def undisturbed(rank: int, norm: EncoderConfig) -> tuple[dict[str, np.ndarray], list[float]]:
    method = build("simclr", norm)
    step_gradient(method, 1).compute(share_of_batch(method), clock_at())
    return gradient_of(method), [float(b.double().sum()) for b in method.buffers()]


@functools.cache
def expected_of(norm: EncoderConfig) -> list[tuple[dict[str, np.ndarray], list[float]]]:
    return run_ranks(undisturbed, 2, norm)


@pytest.mark.parametrize(
    "moment",
    [
        "embed", "between layers", "between two collectives", "backward of the loss", "second pass",
        "second pass, between layers", "backward between layers", "report",
    ],
)  # fmt: skip
@pytest.mark.parametrize("norm", [BATCH, SYNC], ids=["batch", "sync"])
def test_out_of_memory_on_one_rank_of_two_makes_both_halve_and_repeat(norm: EncoderConfig, moment: str) -> None:
    shares = run_ranks(fail_at, 2, moment, norm)
    expected = expected_of(norm)
    for (micro, said, gradient, buffers), (clean_gradient, clean_buffers) in zip(shares, expected, strict=True):
        assert micro == 1
        assert said == [
            "step 1: out of memory on rank(s) [1] (injected); repeated with micro-batches of 1 samples instead of 3"
        ]
        assert_close(gradient, clean_gradient, tolerance=1e-6)
        assert buffers == clean_buffers, "the failed attempt left running statistics behind"


def never_fits(rank: int) -> str:
    method = build("simclr", GROUP)
    method.__class__ = Failing
    assert isinstance(method, Failing)
    method.moment, method.fits, method.failing_rank = "between two collectives", 0, 0
    with pytest.raises(UserError) as caught:
        step_gradient(method, 0).compute(share_of_batch(method), clock_at())
    return str(caught.value)


def test_where_no_micro_batch_fits_the_message_names_the_queue() -> None:
    for message in run_ranks(never_fits, 2):
        assert message.startswith("step 1: out of memory on rank(s) [0] even at one sample at a time (injected); ")
        assert "--method.queue" in message


def fits_two(rank: int, fits: int) -> tuple[int, str]:
    """A step that may not go below two samples a pass, of which rank 1 can do `fits`: what the micro-batch became."""
    method = build("simclr", BATCH)
    method.__class__ = Failing
    assert isinstance(method, Failing)
    method.moment, method.fits, method.failing_rank = "second pass", fits, 1
    steps = step_gradient(method, 0)
    steps.fewest = 2
    try:
        steps.compute(share_of_batch(method), clock_at())
    except UserError as error:
        return steps.micro, str(error)
    return steps.micro, ""


def test_halving_ends_at_the_fewest_samples_that_a_pass_can_take() -> None:
    assert run_ranks(fits_two, 2, 2) == [(2, "")] * 2
    for micro, message in run_ranks(fits_two, 2, 1):
        assert micro == 2
        assert message.startswith("step 1: out of memory on rank(s) [1] even at 2 samples at a time")


def test_halving_takes_what_is_left_where_half_would_leave_a_part_too_small() -> None:
    steps = step_gradient(build("simclr", BATCH), 0)
    steps.fewest = 2
    steps._quoted = "injected"
    steps._halve(5, 0, [0])  # 2 + 2 + 1 has a part of one sample, 3 + 2 has not
    assert steps.micro == 3


class HungryOptimizer(torch.optim.SGD):
    """Out of memory when it makes its state, on one rank."""

    def step(self, closure: Any = None) -> Any:
        if distributed.rank() == 1:
            raise torch.OutOfMemoryError("injected")
        return super().step(closure)


def update_without_memory(rank: int) -> tuple[str, bool]:
    """What an update says that fails on rank 1, and whether the ranks can talk after it."""
    method = build("simclr", GROUP)
    steps = step_gradient(method, 0, optimizer=HungryOptimizer(method.parameters(), lr=0.1, momentum=0.9, fused=True))
    steps.compute(share_of_batch(method), clock_at())
    with pytest.raises(UserError) as caught:
        steps.attempt_update(0, ~DONE)
    return str(caught.value), distributed.gather_objects(rank) == [0, 1]


def test_out_of_memory_in_the_optimizers_first_update_ends_all_ranks_with_one_line() -> None:
    for message, together in run_ranks(update_without_memory, 2):
        assert message.startswith("step 1: out of memory on rank(s) [1] in the optimizer's update (injected); ")
        assert together


def other_error(rank: int) -> None:
    method = build("simclr", GROUP)
    method.loss = None  # type: ignore[assignment, method-assign]
    step_gradient(method, 2).compute(share_of_batch(method), clock_at())


def test_an_error_that_is_none_of_memory_is_not_repeated() -> None:
    with pytest.raises(RankError, match="TypeError"):
        run_ranks(other_error, 1)


class Hungry(SimCLR):
    """Asks for memory by the sample, which the process's limit does not allow for more than two."""

    def embed(self, batch: Batch) -> Embeddings:
        torch.empty(len(batch) * 2**28).fill_(0)  # a GiB a sample
        return super().embed(batch)


def really_out_of_memory(rank: int) -> tuple[int, dict[str, np.ndarray]]:
    method = build("simclr", GROUP)
    steps = step_gradient(method, 0)
    batch = share_of_batch(method)
    two = batch.part(slice(0, 2))
    method.loss(method.embed(two), two.samples)  # threads and libraries are there
    method.__class__ = Hungry
    if rank == 1:
        limit = psutil.Process().memory_info().vms + 5 * 2**29
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    steps.compute(batch, clock_at())
    return steps.micro, gradient_of(method)


def test_memory_that_really_runs_out_on_one_rank() -> None:
    shares = run_ranks(really_out_of_memory, 2)
    assert [micro for micro, _ in shares] == [2, 2]
    whole = build("simclr", GROUP)
    step_gradient(whole, 0).compute(share_of_batch(whole), clock_at())
    for _, gradient in shares:
        assert_close(gradient, gradient_of(whole))


# Whole runs.


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


def test_a_run_in_micro_batches_follows_one_without(dataset: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "whole", dataset, norm="group", stop_after_steps=12)
    run_ranks(train_on_rank, 1, config)
    micro = replace(config, run_dir=tmp_path / "micro", batch=replace(config.batch, micro=3))
    run_ranks(train_on_rank, 2, micro)
    np.testing.assert_allclose(losses_of(micro.run_dir), losses_of(config.run_dir), rtol=0, atol=1e-4)


def test_a_run_in_micro_batches_resumes_bit_for_bit(dataset: Path, tmp_path: Path) -> None:
    last = STEPS_PER_EPOCH + 3
    whole = tiny_config(tmp_path / "whole", dataset, stop_after_steps=last)
    whole = replace(whole, batch=replace(whole.batch, micro=3))
    run_ranks(train_on_rank, 2, whole)
    parts = replace(whole, run_dir=tmp_path / "parts", stop_after_steps=4)
    run_ranks(train_on_rank, 2, parts)
    run_ranks(train_on_rank, 2, replace(parts, stop_after_steps=last))
    assert_same_state(newest_checkpoint(parts.run_dir), newest_checkpoint(whole.run_dir))
    assert metrics_of(parts.run_dir) == metrics_of(whole.run_dir)


def test_a_micro_batch_larger_than_a_ranks_share_is_refused(dataset: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", dataset)
    with pytest.raises(RankError, match=r"--batch.micro 9: a rank has 8 samples of a step; give at most that"):
        run_ranks(train_on_rank, 2, replace(config, batch=replace(config.batch, micro=9)))


@pytest.mark.parametrize("micro", [-1])
def test_a_negative_micro_batch_is_refused(micro: int) -> None:
    with pytest.raises(UserError, match=r"^--batch.micro -1: give 0"):
        BatchConfig(micro=micro)
