"""`python -m benchmarks.scaling`: how does a step's time grow with ranks, and what would it be on machines that are not here?

Measured: the trainer's steps on 1, 2, 4 … ranks as far as there are processors (gloo) or GPUs (NCCL), each rank with as much of
the machine as at any other number; with the same batch a rank (weak scaling) and with the same global batch (strong). Bytes and
collectives of a step are counted in the process group. Projected: the same for a T4, and for 8, 8 × 8 and 32 × 8 H100s, from the
computation and the collectives of that rank (simulated: the real step on tensors without values) and a model of the links. The
model is checked against the ranks that were measured, with latency and bandwidth measured between them.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --recipe photos --rank-batch 32 --rounds 1 --project none
    python -m benchmarks.scaling --project imagenet_simclr_4096 --mfu 0.35 --overlap 0.5
"""

import math
import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from queue import Empty
from typing import Any, Literal

import torch
import torch.distributed as dist

from benchmarks.frame import (
    Budget,
    Record,
    Turns,
    at_least,
    begin,
    choose_device,
    choose_precision,
    comparison,
    curves,
    ratios,
    seconds,
    spread,
    take_turns,
)
from benchmarks.step import PEAK_TFLOPS, known_peak
from dist_contrastive import distributed
from dist_contrastive.cli import main_guard
from dist_contrastive.config import BatchConfig, LaunchConfig, TrainConfig, require
from dist_contrastive.launch import connect
from dist_contrastive.preflight import launched_ranks
from dist_contrastive.recipes import build_recipe
from dist_contrastive.simulate import Collective, Precision, Simulation, simulate
from dist_contrastive.simulate.watch import Watch
from dist_contrastive.step.memory_plan import example
from dist_contrastive.trainer import Trainer

QUESTION = "how does a step's time grow with ranks, and what would it be on machines that are not here?"
MS, IMAGES, EFFICIENCY = "ms a step", "images/s", "% of perfect scaling"
MODEL, ERROR = "ms a step by the model", "% off"
COUNT, SENT, MESSAGES, MEMORY = "collectives a step", "MB in them", "questions between hosts", "GB a rank"
HERE = "this machine"
SCALINGS = ("weak", "strong")
ASSUMED_MFU = 0.3
STEPS = 4
"""Timed at a time, at least; as many as last `TURN_S`."""
TURN_S = 1.0
PROBE_BYTES = (4, 1 << 24)
"""Of the all-reduces that tell latency and bandwidth."""


@dataclass(frozen=True)
class Link:
    """What connects ranks."""

    bandwidth: float
    """Bytes a second out of one rank, while as many come in."""
    latency: float
    """Seconds until a message of no size has come from one rank to the next."""


@dataclass(frozen=True)
class Machine:
    """GPUs that are not here."""

    name: str
    gpu: str
    """A name in `PEAK_TFLOPS`."""
    ranks: int
    precision: Precision
    link: Link | None
    """The slowest on the way round; none where there is one rank."""


# Effective rates, as collectives of some 100 MB reach them: about two thirds of NVLink's 450 GB/s each way and four fifths of a
# 400 Gb/s adapter for each GPU. None was measured here.
NVLINK, INFINIBAND = Link(300e9, 5e-6), Link(40e9, 10e-6)
HOSTS = Link(1e9, 50e-6)
"""Between hosts, for questions; over TCP."""
MACHINES = (
    Machine("1 T4", "T4", 1, "fp16", None),
    Machine("1 H100", "H100", 1, "bf16", None),
    Machine("8 H100, NVLink", "H100", 8, "bf16", NVLINK),
    Machine("8 × 8 H100, InfiniBand", "H100", 64, "bf16", INFINIBAND),
    Machine("32 × 8 H100, InfiniBand", "H100", 256, "bf16", INFINIBAND),
)


@dataclass(frozen=True)
class Command(Turns):
    recipe: str = ""
    """What is measured; without one: photos on processors, cifar10_simclr_4096 on GPUs."""
    rank_batch: int = 64
    """Samples of a rank in weak scaling; in strong scaling, of a rank at the largest number of ranks."""
    most: int = 0
    """The largest number of ranks to measure; 0: as many as there are cores or GPUs."""
    rounds: int = 2
    """How often each number of ranks is launched; they take turns."""
    project: str = "cifar10_simclr_4096"
    """The recipe to project; none projects nothing."""
    projected_batch: int = 256
    """Samples of a rank in the projection of weak scaling, and the most in one forward pass of either."""
    mfu: float = 0.0
    """Part of a GPU's peak that the computation is assumed to reach in the projection; 0: what one rank reached here, on GPUs
    whose peak is known, and 0.3 elsewhere."""
    overlap: float = 0.0
    """Part of the collectives that is assumed to hide behind computation in the projection, from 0 to 1."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What the measured ranks run on."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """What they compute in; auto: 16 bits on a GPU and fp32 on processors."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 2, "rank_batch", "projected_batch")
        at_least(self, 0, "most")
        require(0 <= self.mfu < 1, f"--mfu {self.mfu:g}: give a part of 1, or 0")
        require(0 <= self.overlap <= 1, f"--overlap {self.overlap:g}: give a number from 0 to 1")


def collective_s(kind: str, size: int, ranks: int, link: Link) -> float:
    """Seconds of one collective among `ranks` over `link`, by the usual model of rings: each rank passes its part of the `size`
    bytes (all that goes in or comes out of a rank, whichever is more) to the next one, (n - 1) / n of them, twice where they come
    back; the way through all ranks costs the latency log2(n) times, as trees do."""
    if ranks == 1:
        return 0.0
    passes = 2.0 if "allreduce" in kind else 1.0
    return passes * ((ranks - 1) / ranks * size / link.bandwidth + math.ceil(math.log2(ranks)) * link.latency)


def communication_s(
    collectives: Sequence[Collective], ranks: int, link: Link, hosts: Link, overlap: float = 0.0
) -> float:
    """Seconds that a step takes longer for its collectives, one after the other; `overlap` of those between devices cost none."""
    return sum(
        one.count * collective_s(one.kind, one.bytes, ranks, hosts)
        if one.is_message
        else (1 - overlap) * one.count * collective_s(one.kind, one.bytes, ranks, link)
        for one in collectives
    )


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def rank_config(recipe: str, batch: int, device: str, precision: Precision) -> TrainConfig:
    launch = LaunchConfig(device="cuda" if device == "cuda" else "cpu", precision=precision)
    base = build_recipe(recipe)
    return replace(base, batch=BatchConfig(size=batch), log_every=10_000, epochs=10_000, launch=launch)


@dataclass(frozen=True)
class Launch:
    """What so many ranks are to do."""

    ranks: int
    recipe: str
    batches: dict[str, int]
    """The global batch of each scaling."""
    device: str
    precision: Precision
    threads: int
    """Of a rank, on processors."""


def run_rank(rank: int, port: int, job: Launch, results: Any) -> None:
    """One rank, in its own process: times and counts of each global batch, and of the link; rank 0 reports."""
    if job.ranks > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job.ranks, "LOCAL_WORLD_SIZE": job.ranks}
        os.environ.update({name: str(value) for name, value in names.items()})
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    accelerator = connect(rank_config(job.recipe, job.batches["weak"], job.device, job.precision))
    if job.device == "cpu":
        torch.set_num_threads(job.threads)
    found: dict[str, Any] = {"link": measured_link(accelerator.device)}
    for name, batch in job.batches.items():
        found[name] = steps_of(rank_config(job.recipe, batch, job.device, job.precision), accelerator)
    if rank == 0:
        results.put(found)
    distributed.barrier()
    distributed.shut_down()


def steps_of(config: TrainConfig, accelerator: Any) -> dict[str, Any]:
    """Seconds of a step, and its collectives."""
    trainer = Trainer(config, accelerator, steps_per_epoch=100, dataset_sha256="")
    batch = example(config, config.batch.size // distributed.world_size())
    watch = Watch(accelerator.device.type)

    def update() -> None:
        trainer.update(batch)

    for _ in range(2):
        update()
    took = max(distributed.gather_objects(seconds(update, trainer.device)))
    steps = max(STEPS, round(TURN_S / took))

    def updates() -> None:
        for _ in range(steps):
            update()

    distributed.barrier()
    total = seconds(updates, trainer.device)
    with watch:
        update()
    return {"step_s": total / steps, "collectives": watch.collectives}


def measured_link(device: torch.device) -> dict[str, float]:
    """Seconds of an all-reduce of each of `PROBE_BYTES`; nothing at one rank."""
    if distributed.world_size() == 1:
        return {}
    found = {}
    for size in PROBE_BYTES:
        numbers = torch.ones(size // 4, device=device)
        calls = 20 if size < 1024 else 4

        def reduce(numbers: torch.Tensor = numbers, calls: int = calls) -> None:
            for _ in range(calls):
                dist.all_reduce(numbers)

        reduce()
        found[str(size)] = seconds(reduce, device) / calls
    return found


def launch(job: Launch) -> dict[str, Any]:
    """What rank 0 reports."""
    context = get_context("spawn")
    results = context.Queue()
    port = free_port()
    processes = [context.Process(target=run_rank, args=(r, port, job, results), daemon=True) for r in range(job.ranks)]
    for process in processes:
        process.start()
    try:
        while True:
            try:
                found: dict[str, Any] = results.get(timeout=0.5)
                break
            except Empty:
                codes = [process.exitcode for process in processes]
                if any(codes):
                    raise RuntimeError(f"of {job.ranks} rank(s) of {job.recipe} one failed: {codes}") from None
        for process in processes:
            process.join(30)
        return found
    finally:
        for process in processes:
            process.kill()


def link_of(probes: dict[str, float], ranks: int) -> Link:
    """The link with which `collective_s` gives the times of the probes."""
    small, large = (probes[str(size)] for size in PROBE_BYTES)
    moved = 2 * (ranks - 1) / ranks * PROBE_BYTES[1]
    latency = small / (2 * math.ceil(math.log2(ranks)))
    return Link(moved / max(large - small, 1e-9), latency)


def measure(command: Command, device: torch.device, budget: Budget, record: Record) -> None:
    precision = choose_precision(command.precision, device)
    recipe = command.recipe or ("photos" if device.type == "cpu" else "cifar10_simclr_4096")
    available = len(os.sched_getaffinity(0)) if device.type == "cpu" else torch.cuda.device_count()
    most = min(command.most or available, available)
    numbers = [2**power for power in range(int(math.log2(most)) + 1)]
    threads = max(1, available // numbers[-1])
    batches = {n: {"weak": n * command.rank_batch, "strong": numbers[-1] * command.rank_batch} for n in numbers}
    calls: dict[str, Callable[[], dict[str, Any]]] = {
        str(n): partial(launch, Launch(n, recipe, batches[n], device.type, precision, threads)) for n in numbers
    }
    found = take_turns(calls, command.rounds, warmup=0, budget=budget)
    record.details["launches"] = {name: [plain(run) for run in runs] for name, runs in found.items()}
    record.details["measured"] = {
        "recipe": recipe, "precision": precision, "threads_of_a_rank": threads, "batches": batches
    }  # fmt: skip
    for scaling in SCALINGS:
        alone = [run[scaling]["step_s"] for run in found["1"]]
        for n in numbers:
            case, runs, here = f"{recipe}, {scaling}, {n} rank(s)", found[str(n)], f"{scaling}, {HERE}"
            times = [run[scaling]["step_s"] for run in runs]
            record.add(case, here, MS, [1e3 * took for took in times])
            record.add(case, here, IMAGES, [batches[n][scaling] / took for took in times])
            perfect = alone if scaling == "weak" else [took / n for took in alone]
            record.add(case, here, EFFICIENCY, [100 * share for share in ratios(perfect, times)])
            collectives = runs[0][scaling]["collectives"]
            add_counts(record, case, here, collectives)
            if n > 1:
                # A model of ranks that do not wait for one another but in collectives.
                links = [link_of(run["link"], n) for run in runs]
                modelled = [
                    took + communication_s(collectives, n, link, link)
                    for took, link in zip(perfect, links, strict=True)
                ]
                record.add(case, here, MODEL, [1e3 * took for took in modelled], "projected")
                record.add(case, here, ERROR, [100 * (r - 1) for r in ratios(modelled, times)], "projected")


def plain(run: dict[str, Any]) -> dict[str, Any]:
    """What a launch found, as JSON values."""
    return {
        "link": run["link"],
        **{
            scaling: {
                "step_s": run[scaling]["step_s"],
                "collectives": [[c.kind, c.count, c.bytes, c.is_message] for c in run[scaling]["collectives"]],
            }
            for scaling in SCALINGS
        },
    }


def add_counts(
    record: Record, case: str, contender: str, collectives: Sequence[Collective], *, simulated: bool = False
) -> None:
    kind: Literal["simulated", "measured"] = "simulated" if simulated else "measured"
    ours = [one for one in collectives if not one.is_message]
    record.add(case, contender, COUNT, [sum(one.count for one in ours)], kind)
    record.add(case, contender, SENT, [sum(one.count * one.bytes for one in ours) / 1e6], kind)
    record.add(case, contender, MESSAGES, [sum(one.count for one in collectives if one.is_message)], kind)


def reached_mfu(command: Command, record: Record) -> float:
    """The part of the peak that computation is taken to reach: as asked, as one rank did here, or assumed."""
    measured = record.details["measured"]
    recipe, precision = measured["recipe"], measured["precision"]
    peak = known_peak(record.machine.get("gpu", ""), precision)
    if command.mfu or peak is None:
        return command.mfu or ASSUMED_MFU
    config = replace(build_recipe(recipe), batch=BatchConfig(size=command.rank_batch))
    found = simulate(config, ranks=1, precision=precision)
    took = spread(record.values(f"{recipe}, weak, 1 rank(s)", f"weak, {HERE}", MS)).median / 1e3
    return found.flops / took / 1e12 / peak


def project(command: Command, budget: Budget, record: Record) -> None:
    base = build_recipe(command.project)
    mfu = reached_mfu(command, record)
    rates: dict[str, float] = {}
    done: dict[tuple[int, int, str], Simulation] = {}
    for scaling in SCALINGS:
        for machine in MACHINES:
            case = f"{command.project}, {scaling}, {machine.name} ({machine.ranks} rank(s))"
            if budget.is_over():
                record.leave_out(case, "the time was over")
                continue
            batch = command.projected_batch * machine.ranks if scaling == "weak" else base.batch.size
            if batch % machine.ranks or batch // machine.ranks < 2:
                record.leave_out(case, f"a batch of {batch} can't be shared among {machine.ranks} ranks")
                continue
            micro = min(command.projected_batch, batch // machine.ranks)
            key = (machine.ranks, batch, machine.precision)
            if key not in done:
                config = replace(base, batch=BatchConfig(size=batch))
                done[key] = simulate(config, ranks=machine.ranks, precision=machine.precision, micro=micro)
            found = done[key]
            computation = found.flops / (mfu * 1e12 * PEAK_TFLOPS[machine.gpu][machine.precision])
            exposed = 0.0
            if machine.link:
                exposed = communication_s(found.collectives, machine.ranks, machine.link, HOSTS, command.overlap)
            rate = batch / (computation + exposed)
            alone = rates.setdefault(f"{scaling}, {machine.gpu}", rate / machine.ranks)
            name = f"{scaling}, {machine.gpu}"
            record.add(case, name, MS, [1e3 * (computation + exposed)], "projected")
            record.add(case, name, IMAGES, [rate], "projected")
            record.add(case, name, EFFICIENCY, [100 * rate / machine.ranks / alone], "projected")
            record.add(case, name, MEMORY, [found.peak_bytes / 1e9], "simulated")
            add_counts(record, case, name, found.collectives, simulated=True)
            record.details[case] = {
                "batch": batch, "micro": micro, "flops_a_rank": found.flops, "computation_s": computation,
                "exposed_communication_s": exposed,
            }  # fmt: skip
    record.details["assumptions"] = {
        "mfu": mfu, "overlap": command.overlap, "peaks_tflops": PEAK_TFLOPS,
        "links": {name: vars(link) for name, link in (("NVLink", NVLINK), ("InfiniBand", INFINIBAND), ("hosts", HOSTS))},
    }  # fmt: skip


def assumptions(command: Command, mfu: float) -> str:
    def of(name: str, link: Link) -> str:
        return f"{name} {link.bandwidth / 1e9:g} GB/s out of a GPU and {1e6 * link.latency:g} µs"

    h100, t4 = PEAK_TFLOPS["H100"]["bf16"], PEAK_TFLOPS["T4"]["fp16"]
    return (
        f"Projected with these assumptions: computation reaches {mfu:.0%} of a GPU's peak (as asked; as one GPU did here, where "
        f"its peak is known; {ASSUMED_MFU:.0%} otherwise; H100 {h100:g} TFLOP/s in bf16, T4 {t4:g} in fp16), loader and "
        f"augmentation hide behind it; {of('NVLink', NVLINK)}, {of('InfiniBand', INFINIBAND)}, questions between hosts "
        f"{1e6 * HOSTS.latency:g} µs, behind which nothing hides; collectives are rings with a latency of log2(ranks) hops, "
        f"{command.overlap:.0%} of them behind computation. FLOP, bytes, collectives and memory of a rank are simulated: the "
        "real step on tensors without values, workspaces of libraries not included. Micro-batches of at most "
        f"{command.projected_batch}.\n"
    )


def ranks_of(case: str) -> float:
    """The number in `… 8 rank(s)`."""
    return float(case.replace("(", " ").replace(")", " ").split()[-3])


def main(argv: Sequence[str] | None = None) -> None:
    command, record = begin(Command, "scaling", argv, __doc__, question=QUESTION, packages=("accelerate", "timm"))
    require(launched_ranks() == 1, "the benchmark starts its ranks itself: use python -m, without a launcher")
    for recipe in (command.recipe, command.project):
        if recipe not in ("", "none"):
            build_recipe(recipe)  # a mistyped name is refused before the first measurement
    device = choose_device(command.device)
    budget = Budget(command.minutes)
    measure(command, device, budget, record)
    if command.project != "none":
        project(command, budget, record)
    measured = record.details["measured"]
    errors = [value for one in record.of(ERROR) for value in one.values]
    checked = (
        f"The model is {spread(errors).format(2)} % off what was measured. It knows of messages alone: what ranks of one machine "
        "take from one another (the memory's bandwidth, caches, the units of a core that has two threads) is not in it.\n\n"
        if errors
        else ""
    )
    projected = f"{assumptions(command, record.details['assumptions']['mfu'])}\n" if command.project != "none" else ""
    body = (
        f"{comparison(record, (MS, IMAGES, EFFICIENCY, MEMORY), None)}\n{comparison(record, (COUNT, SENT, MESSAGES), None)}\n"
        f"{comparison(record, (MODEL, ERROR), None)}\n{checked}"
        f"Measured: `{measured['recipe']}` on {device.type}, {measured['threads_of_a_rank']} thread(s) a rank on processors, on "
        f"a batch of noise that is there already; the model takes the time of one rank and adds each collective.\n\n{projected}"
    )
    record.write("How a step scales", body, {"images": curves(record, IMAGES, ranks_of, xlabel="ranks")})


if __name__ == "__main__":
    sys.exit(main_guard(main))
