"""When something is due that a run does now and then: a checkpoint, a probe."""

from dist_contrastive.config import CheckpointConfig, ProbeConfig
from dist_contrastive.schedules import Clock


class Cadence:
    """Every so many epochs, steps or minutes, whichever comes first; a 0 leaves one out."""

    def __init__(self, *, epochs: int = 0, steps: int = 0, minutes: float = 0.0) -> None:
        self._epochs, self._steps, self._seconds = epochs, steps, 60 * minutes
        self._done_at = 0.0

    @classmethod
    def of_checkpoints(cls, config: CheckpointConfig) -> "Cadence":
        return cls(epochs=config.every, steps=config.every_steps, minutes=config.every_minutes)

    @classmethod
    def of_probes(cls, config: ProbeConfig) -> "Cadence":
        return cls(epochs=config.every)

    def due(self, clock: Clock) -> bool:
        """Whether it is to be done now, once `clock.step` updates are done."""
        numbers = (self._epochs * clock.steps_per_epoch, self._steps)
        by_count = any(number and clock.step % number == 0 for number in numbers)
        return by_count or (self._seconds > 0 and clock.seconds - self._done_at >= self._seconds)

    def done(self, clock: Clock) -> None:
        """It was done just now, due or not: minutes count from here."""
        self._done_at = clock.seconds
