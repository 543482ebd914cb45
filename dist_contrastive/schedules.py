"""Pure functions of progress."""

import math


def learning_rate(step: int, total_steps: int, warmup_steps: int, peak: float) -> float:
    """Of the update that follows `step` others: linear warm-up to `peak`, then a half cosine down to 0 (SGDR without
    restarts, as in SimCLR, appendix B.6).

    The first update already moves: the `warmup_steps`-th is the first at `peak`.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def ema_momentum(progress: float, base: float) -> float:
    """A teacher's momentum from `base` at progress 0 to 1 at progress 1, on a half cosine (BYOL, section 3.2)."""
    return 1.0 - (1.0 - base) * 0.5 * (1.0 + math.cos(math.pi * progress))
