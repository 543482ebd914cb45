"""A step of rank 0 of many, in this process: the real trainer on a device that has no numbers."""

from dataclasses import replace

from accelerate.state import AcceleratorState
from torch import Tensor

from dist_contrastive.batch import Batch
from dist_contrastive.config import TrainConfig, require
from dist_contrastive.launch import connect
from dist_contrastive.methods.base import Embeddings
from dist_contrastive.schedules import Clock
from dist_contrastive.simulate.device import fake_cuda, pin
from dist_contrastive.simulate.findings import Precision, Simulation
from dist_contrastive.simulate.watch import Watch
from dist_contrastive.step.gradient import WHAT_NEEDS_LESS
from dist_contrastive.step.memory import TensorCount
from dist_contrastive.step.memory_plan import example, predict
from dist_contrastive.trainer import Trainer

UPDATES = 3
"""The first one makes the optimizer's state and the loss scaler's, and all ranks take its order of gradients. It is logged, so
that the third is the first to read what another one has left under way."""


def simulate_here(
    config: TrainConfig, *, ranks: int, precision: Precision, micro: int | None, logged: bool
) -> Simulation:
    """`simulate` in this process, which must have nothing else to do meanwhile: what it patches is the whole process's."""
    size = config.batch.micro if micro is None else micro
    require(
        size != "auto" or config.batch.memory_gib > 0,
        "--batch.micro auto depends on a GPU's memory; to simulate, give --batch.memory-gib as well, or --batch.micro N",
    )
    config = replace(
        config,
        batch=replace(config.batch, micro=size),
        log_every=UPDATES if logged else UPDATES + 1,
        launch=replace(config.launch, ranks=ranks, device="cuda", precision=precision, compile=False),
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    watch, memory = Watch("cuda"), TensorCount("cuda")
    with fake_cuda(ranks, watch.sync), memory:
        with watch:
            accelerator = connect(config)
            trainer = Trainer(config, accelerator, steps_per_epoch=100, dataset_sha256="")
            if size == "auto":
                trainer.gradient.micro = _predicted_micro(trainer, config.batch.size // ranks)
                memory.peak = memory.live
            embedding_bytes = _note_embeddings(trainer)
            batch = _batch(config, config.batch.size // ranks)
            for _ in range(UPDATES):
                unlogged_syncs = watch.host_syncs
                watch.clear()
                trainer.update(batch)
        held, peak = memory.live, memory.peak  # what a checkpoint takes is no part of a step
        model = [*trainer.method.parameters(), *trainer.method.buffers()]
        saved = [*trainer.method.state_dict().values(), *trainer.replicas.state().tensors.values()]
    AcceleratorState._reset_state(reset_partial_state=True)
    return Simulation(
        ranks=ranks,
        rank_batch=len(batch),
        micro=min(trainer.gradient.micro or len(batch), len(batch)),
        precision=precision,
        parameters=sum(p.numel() for p in trainer.method.parameters() if p.requires_grad),
        model_bytes=sum(_size(x) for x in model),
        embedding_bytes=embedding_bytes[-1],
        held_bytes=held,
        checkpoint_bytes=sum(_size(x) for x in saved),
        peak_bytes=peak,
        operations=watch.operations,
        collectives=watch.collectives,
        host_syncs=watch.host_syncs,
        unlogged_syncs=unlogged_syncs,
        wrong_devices=watch.wrong_devices,
    )


def _predicted_micro(trainer: Trainer, rank_batch: int) -> int:
    """The micro-batch that the memory plan would try first."""
    config = trainer.config
    memory = predict(trainer.gradient, config, rank_batch)
    micro = memory.largest(config.batch.memory_gib * 2**30, rank_batch)
    require(
        micro > 0,
        f"--batch.memory-gib {config.batch.memory_gib:g} holds no step of {rank_batch} samples a rank; {WHAT_NEEDS_LESS}",
    )
    return micro


def _batch(config: TrainConfig, num_samples: int) -> Batch:
    """A batch as the loader gives it to a GPU: in pinned memory."""
    batch = example(config, num_samples)
    samples = replace(batch.samples, labels=pin(batch.samples.labels), indices=pin(batch.samples.indices))
    text, draws = (None if x is None else pin(x) for x in (batch.text, batch.draws))
    return Batch(tuple(map(pin, batch.views)), samples, text, draws)


def _note_embeddings(trainer: Trainer) -> list[int]:
    """A list that gets the size in bytes of each update's embeddings."""
    sizes: list[int] = []
    after_step = trainer.method.after_step

    def note(clock: Clock, embeddings: Embeddings, done: Tensor) -> None:
        sizes.append(sum(_size(x) for x in embeddings.values()))
        after_step(clock, embeddings, done)

    trainer.method.after_step = note  # type: ignore[method-assign]
    return sizes


def _size(x: Tensor) -> int:
    return x.numel() * x.element_size()
