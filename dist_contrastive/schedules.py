"""Where a run is, and pure functions of it."""

import math
from dataclasses import dataclass
from typing import Literal

Schedule = Literal["cosine", "constant", "wsd"]


@dataclass(frozen=True)
class Clock:
    """Where a run is; equal on all ranks, so that each can tell for itself what is due."""

    step: int
    """How many updates are done."""
    steps_per_epoch: int
    total_steps: int
    seconds: float = 0.0
    """Since this process began, by rank 0's monotonic clock."""

    @property
    def epoch(self) -> float:
        """How many epochs are done, a part of one included."""
        return self.step / self.steps_per_epoch

    @property
    def progress(self) -> float:
        """From 0 to 1 over the run."""
        return self.step / self.total_steps


def learning_rate(
    step: int, total_steps: int, warmup_steps: int, peak: float, schedule: Schedule = "cosine", decay_steps: int = 0
) -> float:
    """Of the update that follows `step` others: linear warm-up to `peak`, then what `schedule` says.

    cosine: a half cosine down to 0 at the end (SGDR without restarts, as in SimCLR, appendix B.6). constant: `peak`.
    wsd: `peak`, but for the last `decay_steps` updates, which go down linearly to 0 (warmup-stable-decay; Hu et al. 2024,
    "MiniCPM", section 4; Haegele et al. 2024). The last two say nothing of the run's length before the decay.
    The first update already moves: the `warmup_steps`-th is the first at `peak`.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant" or (schedule == "wsd" and step <= total_steps - decay_steps):
        return peak
    if schedule == "wsd":
        return peak * (total_steps - step) / decay_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def linear(now: float, length: float, start: float, end: float) -> float:
    """From `start` at 0 to `end` at `length`, and `end` from then on."""
    return end if now >= length else start + (end - start) * now / length


def cosine(progress: float, start: float, end: float) -> float:
    """From `start` at progress 0 to `end` at progress 1, on a half cosine."""
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))


def ema_momentum(progress: float, base: float) -> float:
    """A teacher's momentum from `base` at progress 0 to 1 at progress 1, on a half cosine (BYOL, section 3.2)."""
    return cosine(progress, base, 1.0)
