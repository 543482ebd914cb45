"""Pure functions of progress."""

import math
from typing import Literal

Schedule = Literal["cosine", "constant", "wsd"]


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


def ema_momentum(progress: float, base: float) -> float:
    """A teacher's momentum from `base` at progress 0 to 1 at progress 1, on a half cosine (BYOL, section 3.2)."""
    return 1.0 - (1.0 - base) * 0.5 * (1.0 + math.cos(math.pi * progress))
