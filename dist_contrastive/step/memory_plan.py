"""The memory plan (`--batch.micro auto`): the largest micro-batch that this rank's memory holds, found before the first step.

Three small rehearsals of a step, in which every tensor is counted, tell what a step takes for each sample, for the model
and for the loss over the whole batch. From these follows a micro-batch; a rehearsal with it measures the real peak.
"""

from dataclasses import dataclass
from functools import partial

import torch

from dist_contrastive import distributed
from dist_contrastive.batch import Batch, Samples, largest_micro
from dist_contrastive.config import TrainConfig, UserError
from dist_contrastive.data.augment.draws import Drawer
from dist_contrastive.optim import STATES_PER_PARAMETER
from dist_contrastive.step.gradient import WHAT_NEEDS_LESS, StepGradient
from dist_contrastive.step.memory import TensorCount, measure_peak, release_memory, usable_bytes

MIB = 2**20
SMALL = 4
"""Samples of the smaller counted rehearsal; the larger has twice as many."""
MAX_TRIALS = 8
FIRST_TRIAL = 4
"""The first trial has this part of the samples that the count allows."""
TIGHTER = 1.1
"""How much more than before a step is taken to need, at least, after a trial that took more than there is."""


@dataclass(frozen=True)
class StepMemory:
    """What a step takes beyond what is held before the first one, in bytes."""

    fixed: float
    """Gradients, and whatever does not grow with the micro-batch."""
    per_sample: float
    """Of one sample in a micro-batch: its views, activations and what backward needs."""
    whole: float
    """The loss over the whole rank batch and all ranks' embeddings, and the rank batch's embeddings themselves."""
    embeddings: float
    """The embeddings of the rank batch and their gradient."""
    optimizer: float
    """The optimizer's state, which the first update makes."""

    def peak(self, micro: int, rank_batch: int) -> float:
        """Bytes at the worst moment of a step with micro-batches of `micro` samples."""
        passes = self.fixed + self.per_sample * micro
        if micro >= rank_batch:  # the graph of the only forward pass is held while the loss is computed
            return self.optimizer + passes + self.whole
        return self.optimizer + max(passes + self.embeddings, self.fixed + self.whole)

    def largest(self, limit: float, rank_batch: int) -> int:
        """The largest micro-batch whose peak is within `limit` bytes; 0 if there is none."""
        if self.peak(rank_batch, rank_batch) <= limit:
            return rank_batch
        if self.peak(1, rank_batch) > limit:
            return 0
        left = limit - self.optimizer - self.fixed - self.embeddings
        return rounded(min(rank_batch - 1, int(left / self.per_sample)))


@dataclass(frozen=True)
class MemoryPlan:
    """The micro-batch that was found, and why."""

    micro: int
    rank_batch: int
    predicted_mib: float
    measured_mib: float
    """The largest peak of any rank, the optimizer's state included."""
    limit_mib: float
    """What a step may take on the rank that has least."""
    trials: int
    """How many rehearsals were measured."""

    def describe(self) -> str:
        return (
            f"micro-batches of {self.micro} of a rank's {self.rank_batch} samples: a step takes {self.measured_mib:,.0f} MiB "
            f"(measured; {self.predicted_mib:,.0f} predicted) of {self.limit_mib:,.0f} usable"
        )


def make_plan(gradient: StepGradient, config: TrainConfig) -> MemoryPlan:
    """Find the micro-batch. All ranks call it together and get the same plan; nothing of the run is changed.

    `UserError` on all ranks where memory can't be measured, or holds no micro-batch.
    """
    device = gradient.replicas.device
    rank_batch = distributed.share_of(config.batch.size).rank_batch
    limit = -_largest(-distributed.together(lambda: usable_bytes(config, device)), device)
    try:
        memory = predict(gradient, config, rank_batch)
        hidden = 1.0  # how much more than its tensors a step takes: what libraries allocate inside an operation
        for trial in range(MAX_TRIALS):
            held = int(-_largest(-memory.largest(limit / hidden, rank_batch), device))
            micro = largest_micro(rank_batch, held, gradient.fewest)
            if not micro:
                break
            # The first trial is a small one, for what the count did not see.
            micro = max(gradient.fewest, micro // FIRST_TRIAL) if trial == 0 else micro
            predicted = _largest(hidden * memory.peak(micro, rank_batch), device)
            try:
                peak = measure_peak(partial(gradient.rehearse, example(config, micro), rank_batch), device)
            except distributed.RanksFailed:
                release_memory(device)
                hidden *= 2
                continue
            peak = _largest(peak + memory.optimizer, device)
            if trial > 0 and peak <= limit:
                return MemoryPlan(micro, rank_batch, predicted / MIB, peak / MIB, limit / MIB, trial + 1)
            hidden *= max(1.0, peak / predicted) if trial == 0 else max(TIGHTER, peak / predicted)
    except distributed.RanksFailed:
        pass  # not even the rehearsals fit
    raise UserError(
        f"--batch.micro auto: {limit / MIB:,.0f} MiB hold no step of {rank_batch} samples a rank; {WHAT_NEEDS_LESS}"
    )


def predict(gradient: StepGradient, config: TrainConfig, rank_batch: int) -> StepMemory:
    """Count the tensors of three small rehearsals; see `StepMemory`. All ranks call it together."""

    def count(micro: int, batch: int) -> int:
        with TensorCount() as tensors:
            gradient.rehearse(example(config, micro), batch)
        return tensors.peak

    small, large = min(SMALL, rank_batch), min(2 * SMALL, rank_batch)
    # Twice the samples in the batch, so that these are micro-batches, whose graph is not held during the loss.
    of_small, of_large = count(small, 2 * small), count(large, 2 * large)
    per_sample = (of_large - of_small) / (large - small) if large > small else of_small / small
    fixed = max(0.0, of_small - per_sample * small)
    embeddings = 2.0 * gradient.embedding_bytes(example(config, small)) / small * rank_batch
    parameters = sum(p.numel() * p.element_size() for p in gradient.method.parameters() if p.requires_grad)
    states = 0 if gradient.replicas.has_state else STATES_PER_PARAMETER[config.optim.name]
    whole = float(count(small, rank_batch)) if rank_batch > 2 * small else embeddings
    return StepMemory(fixed, per_sample, whole, embeddings, float(states * parameters))


def example(config: TrainConfig, num_samples: int) -> Batch:
    """A batch as the loader would give it, of noise."""
    views = [
        torch.randint(0, 256, (len(views), num_samples, size, size, 3), dtype=torch.uint8)
        for size, _, views in config.augment.layout(config.data.image_size)
    ]
    indices = torch.arange(num_samples)
    tower = config.method.text_tower
    text = torch.randint(1, tower.vocabulary, (num_samples, tower.context)) if tower else None
    samples = Samples(labels=indices // 2, indices=indices, epoch=0)
    return Batch(tuple(views), samples, text, Drawer(config.augment, config.seed).draw(samples))


def rounded(micro: int) -> int:
    """The micro-batch down to a multiple of 8, which tensor cores like, where it has as many."""
    return micro - micro % 8 if micro >= 8 else micro


def _largest(value: float, device: torch.device) -> float:
    """The largest of all ranks' values."""
    return float(distributed.all_gather(torch.tensor([value], dtype=torch.float32, device=device)).max())
