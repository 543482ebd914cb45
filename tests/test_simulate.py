"""A GPU's rank of many, simulated: what it shows is what real ranks do, and no recipe does anything new on a device unseen."""

import inspect
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dist_contrastive import distributed
from dist_contrastive.batch import Batch, Samples
from dist_contrastive.config import BatchConfig, EncoderConfig, TrainConfig, UserError
from dist_contrastive.dry_run import dry_run
from dist_contrastive.launch import connect
from dist_contrastive.methods import METHODS
from dist_contrastive.methods.base import Embeddings, Losses
from dist_contrastive.methods.simclr import SimCLR
from dist_contrastive.models.sync_norm import SyncBatchNorm
from dist_contrastive.optim import STATES_PER_PARAMETER
from dist_contrastive.preflight import PRECISIONS
from dist_contrastive.recipes import RECIPES
from dist_contrastive.simulate import Collective, HostSync, Place, Precision, Simulation, simulate
from dist_contrastive.simulate.autograd import python_engine
from dist_contrastive.simulate.patches import attribute, patched
from dist_contrastive.simulate.rank import simulate_here
from dist_contrastive.simulate.watch import Watch
from dist_contrastive.step.memory import TensorCount
from dist_contrastive.step.memory_plan import example
from dist_contrastive.trainer import Trainer, build_method
from tests.harness import run_ranks
from tests.launches import launch_config_of
from tests.runs import tiny_config
from tests.steps import build, clock_at, gradient_of, share_of_batch, step_gradient, with_small

BATCH = EncoderConfig(name="resnet10_w16", stem="small", norm="batch")


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    """Processes that may be patched; what runs in one of them has nothing to do with what ran there before."""
    with ProcessPoolExecutor(2, mp_context=get_context("forkserver")) as pool:
        yield pool


# The walk


def gradient_and_peak(name: str, encoder: EncoderConfig, micro: int) -> tuple[dict[str, np.ndarray], int]:
    method = build(name, encoder)
    step = step_gradient(method, micro)
    with TensorCount() as tensors:
        step.compute(share_of_batch(method), clock_at())
    return gradient_of(method), tensors.peak


@pytest.mark.parametrize("micro", [0, 3])
@pytest.mark.parametrize(
    ("name", "norm"),
    [*((name, "batch") for name in METHODS), ("simclr", "sync"), ("moco", "sync"), ("simclr", "group")],
)
def test_the_walk_gives_the_engines_gradients_and_its_peak(name: str, norm: Any, micro: int) -> None:
    encoder = replace(BATCH, norm=norm, dropout=0.1)
    gradients, peak = gradient_and_peak(name, encoder, micro)
    with python_engine():
        walked, walked_peak = gradient_and_peak(name, encoder, micro)
    assert walked.keys() == gradients.keys()
    for parameter, gradient in gradients.items():
        np.testing.assert_array_equal(walked[parameter], gradient, err_msg=parameter)
    # A few numbers a channel or a scalar may be let go a node earlier or later.
    # SyncBatchNorm's statistics and a mask token's gradient, a few numbers a channel, are let go at another moment.
    loose = norm == "sync" or METHODS[name].needs_patches
    assert walked_peak == pytest.approx(peak, rel=1e-3 if loose else 0, abs=0)


def test_the_walk_takes_gradients_of_inputs_and_adds_to_those_that_are_there() -> None:
    def run() -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        x, w = (torch.randn(3, 3, generator=generator).requires_grad_() for _ in range(2))
        y = (x @ w).relu()
        inner = torch.autograd.grad((y * x).sum(), [x, y, w], retain_graph=True)
        (y + y.T).square().sum().backward()
        (x * w).sum().backward(torch.tensor(0.5))
        assert x.grad is not None
        assert w.grad is not None
        return [*inner, x.grad, w.grad]

    expected = run()
    with python_engine():
        torch.testing.assert_close(run(), expected, rtol=0, atol=0)


def test_a_name_that_torch_has_lost_is_named() -> None:
    with pytest.raises(
        RuntimeError, match=rf"torch._no_such_name, which torch {re.escape(torch.__version__)} does not have"
    ):
        attribute(torch, "_no_such_name")


# Collectives


def tiny(method: str, *, norm: str = "batch", **changes: Any) -> TrainConfig:
    config = tiny_config(Path("runs/tiny"), Path("tiny.beton"), norm=norm)
    return replace(with_small(config, method, config.method.projector), **changes)


def simulated(config: TrainConfig, ranks: int, *, logged: bool = True, precision: Precision = "fp32") -> Simulation:
    torch.set_num_threads(1)
    return simulate_here(config, ranks=ranks, precision=precision, micro=None, logged=logged)


def bytes_of(collectives: list[Collective], kind: str, file: str, function: str) -> list[tuple[int, int]]:
    """(count, bytes) of the collectives that a line in `function` of `file`, or what it called in `distributed`, made."""
    ends = (f"dist_contrastive/{file}", function)
    return [
        (c.count, c.bytes)
        for c in collectives
        if c.kind == kind and ends in [(p.file, p.function) for p in (c.where, c.caller) if p]
    ]


def test_collectives_are_those_of_the_closed_form(pool: ProcessPoolExecutor) -> None:
    ranks, config = 4, tiny("simclr", norm="sync")
    found = pool.submit(simulated, config, ranks, logged=False).result()
    norms = [m.num_features for m in build_method(config).modules() if isinstance(m, SyncBatchNorm)]
    embeddings = config.augment.num_views * config.batch.size * config.method.projector.output_size * 4
    small_sum = 8 * (2 * max(norms) + 1)
    question = 8 * ranks
    left = list(found.collectives)
    assert all(c.is_message == (c.bytes in (question, 2 * question)) for c in left), "questions go from host to host"

    def take(kind: str, file: str, function: str) -> list[tuple[int, int]]:
        taken = bytes_of(left, kind, file, function)
        left[:] = [c for c in left if not bytes_of([c], kind, file, function)]
        return taken

    assert take("allreduce", "models/sync_norm.py", "_global_statistics") == [(len(norms), small_sum)]
    assert take("allreduce", "models/sync_norm.py", "backward") == [(len(norms), small_sum)]
    assert take("allgather_base", "methods/simclr.py", "loss") == [(1, embeddings)]
    # Of the gradient at all ranks' embeddings each rank gets its own rows.
    assert take("reduce_scatter_base", "step/replicas.py", "backward") == [(1, embeddings)]
    # Are all there? Before the gather, before its backward pass, and at the end of each of a step's five attempts.
    assert take("allreduce", "methods/simclr.py", "loss") == [(1, question)]
    assert take("allreduce", "step/replicas.py", "backward") == [(1, question)]
    assert take("allreduce", "step/gradient.py", "_attempt") == [(5, question)]
    # loss and positive cosine, and whose loss is finite; the time, and whether to stop, are questions between hosts.
    assert sorted(take("allreduce", "trainer.py", "_agree")) == sorted([(1, 4 * (2 + ranks)), (1, 2 * question)])
    buckets = take("allreduce", "step/buckets.py", "_send_complete")
    assert sum(count * size for count, size in buckets) == 4 * found.parameters
    assert left == []


def collectives_of_a_real_step(rank: int, config: TrainConfig) -> tuple[Collective, ...]:
    trainer = Trainer(replace(config, log_every=1), connect(config), steps_per_epoch=100, dataset_sha256="")
    batch = example(config, config.batch.size // distributed.world_size())
    watch = Watch("cpu")
    for _ in range(2):
        trainer.update(batch)
    with watch:
        trainer.update(batch)
    return watch.collectives


def comparable(collectives: tuple[Collective, ...]) -> list[tuple[str, int, int, bool, Place, Place | None]]:
    """Without where the process itself began."""
    rows = []
    for c in collectives:
        caller = c.caller if c.caller and c.caller.file.startswith("dist_contrastive") else None
        rows.append((c.kind, c.count, c.bytes, c.is_message, c.where, caller))
    return rows


@pytest.mark.parametrize(
    ("method", "norm", "micro"),
    [("simclr", "sync", 3), ("moco", "batch", 3), ("mocov3", "batch", 0), ("barlow", "sync", 0)],
)
def test_collectives_are_those_of_two_real_ranks(pool: ProcessPoolExecutor, method: str, norm: str, micro: int) -> None:
    config = tiny(method, norm=norm, batch=BatchConfig(size=16, micro=micro))
    found = pool.submit(simulated, config, 2)
    real = run_ranks(collectives_of_a_real_step, 2, config)
    assert comparable(found.result().collectives) == comparable(real[0]) == comparable(real[1])


# Memory


def test_memory_between_steps_is_model_optimizer_and_buckets(pool: ProcessPoolExecutor) -> None:
    config = tiny("moco")
    for ranks in (1, 2):
        found = pool.submit(simulated, config, ranks).result()
        method = build_method(config)
        assert found.parameters == sum(p.numel() for p in method.parameters() if p.requires_grad)
        model = sum(x.numel() * x.element_size() for x in (*method.parameters(), *method.buffers()))
        assert found.model_bytes == model
        of_parameters = STATES_PER_PARAMETER[config.optim.name] + (1 if ranks > 1 else 0)
        counters = 4 * sum(p.requires_grad for p in method.parameters())  # AdamW's, of each parameter's updates
        assert found.held_bytes == model + 4 * found.parameters * of_parameters + counters
        # z and q of the queries, k of the keys
        assert found.embedding_bytes == 3 * config.batch.size // ranks * config.method.projector.output_size * 4
        assert found.peak_bytes > found.held_bytes
        assert found.beyond_model_bytes == found.peak_bytes - model


def test_micro_batches_take_less_and_compute_more(pool: ProcessPoolExecutor) -> None:
    whole, parts = (
        pool.submit(simulated, tiny("simclr", norm="group", batch=BatchConfig(size=64, micro=micro)), 1)
        for micro in (0, 16)
    )
    assert (whole.result().micro, parts.result().micro) == (64, 16)
    assert parts.result().peak_bytes < 0.6 * whole.result().peak_bytes
    forward = {f.result().micro: {o.name: o for o in f.result().operations}["aten.convolution"] for f in (whole, parts)}
    assert forward[16].flops == 2 * forward[64].flops, "gradient caching encodes twice"


def real_peak(rank: int, config: TrainConfig) -> int:
    os.environ.pop("ACCELERATE_USE_CPU")
    trainer = Trainer(config, connect(config), steps_per_epoch=100, dataset_sha256="")
    for _ in range(2):
        trainer.update(example(config, config.batch.size))
    return torch.cuda.max_memory_allocated()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("norm", ["batch", "sync"])
def test_a_gpus_peak_is_the_simulated_one(norm: Any) -> None:
    config = RECIPES["cifar10_simclr"]()
    config = replace(config, encoder=replace(config.encoder, norm=norm))
    config = replace(config, launch=replace(config.launch, device="cuda", precision="fp16"))
    found = simulate(config, ranks=1, precision="fp16")
    assert found.peak_bytes == pytest.approx(run_ranks(real_peak, 1, config)[0], rel=0.1)


# What goes wrong on a device


def reads_an_item(self: SimCLR, embeddings: Embeddings, samples: Samples) -> Losses:
    return {"loss": embeddings["z"].sum() * embeddings["z"].max().item()}


def asks_a_question(self: SimCLR, embeddings: Embeddings, samples: Samples) -> Losses:
    return {"loss": embeddings["z"].sum() if embeddings["z"].sum() > 0 else embeddings["z"].mean()}


def makes_a_list(self: SimCLR, embeddings: Embeddings, samples: Samples) -> Losses:
    return {"loss": embeddings["z"].sum() * sum(samples.labels.tolist())}


def looks_for_positions(self: SimCLR, embeddings: Embeddings, samples: Samples) -> Losses:
    return {"loss": embeddings["z"].sum() + samples.labels.nonzero().sum()}


def indexes_by_a_mask(self: SimCLR, embeddings: Embeddings, samples: Samples) -> Losses:
    return {"loss": embeddings["z"].sum() + embeddings["z"][embeddings["z"] > 0].sum()}


def indexes_from_the_host(self: SimCLR, embeddings: Embeddings, samples: Samples) -> Losses:
    return {"loss": embeddings["z"].sum() + embeddings["z"][:, torch.tensor([0, 1])].sum()}


def copies_to_the_host(self: SimCLR, embeddings: Embeddings, samples: Samples) -> Losses:
    return {"loss": embeddings["z"].sum() + float(samples.labels.cpu().numpy().sum())}


def copies_to_the_device(self: SimCLR, embeddings: Embeddings, samples: Samples) -> Losses:
    return {"loss": embeddings["z"].sum() * torch.arange(3.0).to(samples.labels.device).sum()}


def copies_what_is_not_pinned(self: SimCLR, embeddings: Embeddings, samples: Samples) -> Losses:
    return {"loss": embeddings["z"].sum() * torch.arange(3.0).to(samples.labels.device, non_blocking=True).sum()}


def waits(self: SimCLR, embeddings: Embeddings, samples: Samples) -> Losses:
    torch.cuda.synchronize()
    return {"loss": embeddings["z"].sum()}


def takes_eigenvalues(self: SimCLR, embeddings: Embeddings, samples: Samples) -> Losses:
    return {"loss": embeddings["z"].sum() + torch.linalg.eigvalsh(embeddings["z"][0].T @ embeddings["z"][0]).sum()}


def adds_from_the_host(self: SimCLR, embeddings: Embeddings, samples: Samples) -> Losses:
    return {"loss": (embeddings["z"] + torch.ones(embeddings["z"].shape[-1])).sum()}


def multiplies_from_the_host(self: SimCLR, embeddings: Embeddings, samples: Samples) -> Losses:
    return {"loss": (embeddings["z"] @ torch.ones(embeddings["z"].shape[-1], 2)).sum()}


def sums_the_hosts(self: SimCLR, embeddings: Embeddings, samples: Samples) -> Losses:
    return {"loss": embeddings["z"].sum() + distributed.all_reduce_sum(torch.ones(3)).sum().item()}


def harmless(self: SimCLR, embeddings: Embeddings, samples: Samples) -> Losses:
    return {"loss": (embeddings["z"] * torch.tensor(2.0)).sum() + torch.arange(3, device=samples.labels.device).sum()}


Loss = Callable[[SimCLR, Embeddings, Samples], Losses]


def with_loss(loss: Loss) -> Simulation:
    with patched(SimCLR, "loss", loss):
        return simulated(tiny("simclr"), 2, logged=False)


def places_of(loss: Loss, found: Simulation) -> tuple[dict[Place, str], dict[Place, str]]:
    """Host syncs and wrong devices in the lines of `loss`: place to what."""

    def of(rows: Any) -> dict[Place, str]:
        pairs = [(place, row.what) for row in rows for place in (row.where, row.caller) if place]
        return {place: what for place, what in pairs if place.function == loss.__name__}

    return of(found.host_syncs), of(found.wrong_devices)


def line_of(loss: Loss) -> Place:
    return Place("tests/test_simulate.py", inspect.getsourcelines(loss)[1] + 1, loss.__name__)


@pytest.mark.parametrize(
    ("loss", "what"),
    [
        (reads_an_item, "item"),
        (asks_a_question, "item"),
        (makes_a_list, "tolist"),
        (looks_for_positions, "nonzero"),
        (indexes_by_a_mask, "boolean index"),
        (indexes_from_the_host, "index on the host"),
        (copies_to_the_host, "copy to the host"),
        (copies_to_the_device, "copy to the device, blocking"),
        (copies_what_is_not_pinned, "copy to the device, not pinned"),
        (waits, "synchronize"),
        (takes_eigenvalues, "linalg"),
    ],
)
def test_a_wait_for_the_device_is_named_with_its_line(pool: ProcessPoolExecutor, loss: Loss, what: str) -> None:
    assert places_of(loss, pool.submit(with_loss, loss).result()) == ({line_of(loss): what}, {})


@pytest.mark.parametrize(
    ("loss", "what"),
    [
        (adds_from_the_host, "aten.add of tensors on cpu and cuda"),
        (multiplies_from_the_host, "aten.mm of tensors on cpu and cuda"),
        (sums_the_hosts, "allreduce of a tensor that is not on the cuda device"),
    ],
)
def test_a_tensor_on_the_wrong_device_is_named_with_its_line(pool: ProcessPoolExecutor, loss: Loss, what: str) -> None:
    _, wrong = places_of(loss, pool.submit(with_loss, loss).result())
    assert wrong == {line_of(loss): what}


def test_what_a_gpu_does_by_itself_is_no_wait(pool: ProcessPoolExecutor) -> None:
    assert places_of(harmless, pool.submit(with_loss, harmless).result()) == ({}, {})


class _Forgotten(nn.Module):
    """Its tensor is no buffer, so it stays where it was made."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.ones(16)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def with_forgotten_tensor() -> Simulation:
    init = SimCLR.__init__

    def build_more(self: SimCLR, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.projector = nn.Sequential(self.projector, _Forgotten())

    with patched(SimCLR, "__init__", build_more):
        return simulated(tiny("simclr"), 1, logged=False)


def test_a_tensor_that_does_not_move_with_its_module_is_named(pool: ProcessPoolExecutor) -> None:
    found = pool.submit(with_forgotten_tensor).result()
    assert {w.where.function for w in found.wrong_devices} >= {"forward"}
    assert all(w.where.file == "tests/test_simulate.py" for w in found.wrong_devices if w.where.function == "forward")


# Recipes


class Launch(NamedTuple):
    ranks: int
    precision: Precision


def launch_of(recipe: str) -> Launch:
    """Ranks and precision of the launch config that the recipe's docstring names; CPU recipes as if on as many GPUs."""
    launch = launch_config_of(RECIPES[recipe])
    return Launch(launch["num_processes"], PRECISIONS[launch["mixed_precision"]])  # type: ignore[arg-type]


T4_GIB = 13.0
"""For a step: nine tenths of what a GPU of 16 GB has free."""


def config_of(recipe: str) -> TrainConfig:
    """As it is, with a T4's memory where the micro-batch depends on it."""
    config = RECIPES[recipe]()
    return replace(config, batch=replace(config.batch, memory_gib=T4_GIB)) if config.batch.micro == "auto" else config


@pytest.fixture(scope="module")
def of_recipes(pool: ProcessPoolExecutor, request: pytest.FixtureRequest) -> dict[str, Any]:
    """What simulating each recipe that a selected test asks for shows, and `photos`; under way at once, two at a time."""
    calls = [item.callspec for item in request.session.items if hasattr(item, "callspec")]
    asked = {"photos", *(call.params.get("recipe") for call in calls)}
    launches = {recipe: launch_of(recipe) for recipe in RECIPES if recipe in asked}
    return {
        recipe: pool.submit(simulated, config_of(recipe), launch.ranks, precision=launch.precision)
        for recipe, launch in launches.items()
    }


each_recipe = pytest.mark.parametrize("recipe", RECIPES)


@each_recipe
def test_a_recipe_passes_at_its_world_size_and_precision(of_recipes: dict[str, Any], recipe: str) -> None:
    found: Simulation = of_recipes[recipe].result()
    launch, config = launch_of(recipe), config_of(recipe)
    assert (found.ranks, found.precision) == launch
    assert found.rank_batch * found.ranks == config.batch.size
    assert found.wrong_devices == ()
    assert found.flops > 0
    assert (len(found.collectives) > 0) == (launch.ranks > 1)


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if RECIPES[recipe]().batch.micro == "auto"])
def test_the_planned_micro_batch_fits_and_is_as_large_as_can_be(of_recipes: dict[str, Any], recipe: str) -> None:
    found: Simulation = of_recipes[recipe].result()
    usable = T4_GIB * 2**30
    assert found.beyond_model_bytes <= usable
    passes = math.ceil(found.rank_batch / found.micro)  # of balanced micro-batches; one fewer would not fit
    assert passes == 1 or found.beyond_model_bytes * passes / (passes - 1) > usable


@each_recipe
def test_a_recipe_has_a_plan_at_its_world_size(
    of_recipes: dict[str, Any], recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch, found = launch_of(recipe), of_recipes[recipe].result()
    monkeypatch.setattr("dist_contrastive.dry_run.simulate", lambda *args, **kwargs: found)
    config = replace(config_of(recipe), data=replace(config_of(recipe).data, path=Path("gone.beton")))
    dry_run(replace(config, launch=replace(config.launch, precision=launch.precision)), launch.ranks)
    plan = capsys.readouterr().out
    for words in (
        f" {launch.ranks} on cuda in {launch.precision}, simulated",
        f"= {launch.ranks} × {config.batch.size // launch.ranks:,}, in ",
        f"{found.parameters / 1e6:.1f} M trained",
        "not there yet: no packed dataset at gone.beton",
    ):
        assert words in plan


# Where the host waits for the device in a step that is logged, and why it may: (what, file, function). In one that is not,
# nowhere but where it reads the numbers of the step before, when the device has this one to do.
Wait = tuple[str, str, str]
READING: Wait = ("event", "trainer.py", "read")
LOGGING: dict[Wait, str] = {
    READING: "the numbers of the step before, and where a step is logged its own",
    ("linalg", "losses/statistics.py", "_gram_spectrum"): "the solver reports whether it converged",
}
OF_RECIPES: dict[str, dict[Wait, str]] = {}
"""Of one recipe alone."""


def waits_of(syncs: Iterable[HostSync]) -> set[Wait]:
    return {(w.what, w.where.file.removeprefix("dist_contrastive/"), w.where.function) for w in syncs}


@each_recipe
def test_the_host_waits_nowhere_else(of_recipes: dict[str, Any], recipe: str) -> None:
    found: Simulation = of_recipes[recipe].result()
    allowed = {**LOGGING, **OF_RECIPES.get(recipe, {})}
    assert waits_of(found.host_syncs) == allowed.keys(), (
        "a new wait needs a reason here, or to go; one that has gone leaves the list"
    )
    assert found.unlogged_syncs == (), "a step that is not logged has no reason to wait"


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
def test_a_step_that_is_not_logged_reads_the_one_before_and_nothing_else(
    pool: ProcessPoolExecutor, optimizer: Any, precision: Precision
) -> None:
    config = tiny("byol", norm="sync")
    config = replace(config, optim=replace(config.optim, name=optimizer))
    found = pool.submit(simulated, config, 2, logged=False, precision=precision).result()
    assert waits_of(found.host_syncs) == {READING}
    assert [sync.count for sync in found.host_syncs] == [1]
    assert found.unlogged_syncs == ()


def steps_without_waiting(rank: int, config: TrainConfig) -> list[int]:
    """Real steps on a GPU, the later ones under torch's own eyes; of which there are reports."""
    os.environ.pop("ACCELERATE_USE_CPU")
    trainer = Trainer(config, connect(config), steps_per_epoch=100, dataset_sha256="")
    batch = example(config, config.batch.size)
    samples = replace(
        batch.samples, labels=batch.samples.labels.pin_memory(), indices=batch.samples.indices.pin_memory()
    )
    text, draws = (None if x is None else x.pin_memory() for x in (batch.text, batch.draws))
    batch = Batch(tuple(views.pin_memory() for views in batch.views), samples, text, draws)
    reports = [report for _ in range(2) for report in trainer.update(batch)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        reports += [report for _ in range(3) for report in trainer.update(batch)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [report.step for report in [*reports, *trainer.settle()]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(
    "recipe", ["cifar10_simclr", "cifar10_moco_t4", "cifar10_simclr_4096_t4", "cifar10_dino", "cifar10_clip"]
)
def test_torch_sees_a_gpu_wait_nowhere_in_a_step_that_is_not_logged(recipe: str, precision: Precision) -> None:
    config = RECIPES[recipe]()
    config = replace(config, log_every=100, batch=replace(config.batch, size=64, micro=0))
    config = replace(config, launch=replace(config.launch, device="cuda", precision=precision))
    assert run_ranks(steps_without_waiting, 1, config) == [[1, 2, 3, 4, 5]]


# The process of its own


def test_a_process_of_its_own_finds_the_same(of_recipes: dict[str, Any]) -> None:
    launch = launch_of("photos")
    found = simulate(config_of("photos"), ranks=launch.ranks, precision=launch.precision, logged=True)
    assert found == of_recipes["photos"].result()
    assert Simulation.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_mistakes_get_one_line() -> None:
    with pytest.raises(UserError, match=r"^--batch.global 256 can't be shared .*by 3 ranks; give a multiple of 3$"):
        simulate(config_of("photos"), ranks=3, precision="fp32")
    with pytest.raises(UserError, match=r"^--batch.micro auto depends on a GPU's memory; .* --batch.memory-gib"):
        simulate(RECIPES["cifar10_moco_t4"](), ranks=1, precision="fp16")
