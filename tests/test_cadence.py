"""What is due now and then: by epochs, steps and minutes, each by itself and together."""

import pytest

from dist_contrastive.cadence import Cadence, Clock


def due_at(cadence: Cadence, num_steps: int, seconds_per_step: float = 0.0) -> list[int]:
    """The steps of a run with epochs of 6 steps at which it is due, and is done."""
    steps = []
    for step in range(1, num_steps + 1):
        clock = Clock(step, steps_per_epoch=6, total_steps=100, seconds=step * seconds_per_step)
        if cadence.due(clock):
            steps.append(step)
            cadence.done(clock)
    return steps


@pytest.mark.parametrize(
    ("cadence", "expected"),
    [
        (Cadence(), []),
        (Cadence(epochs=1), [6, 12]),
        (Cadence(epochs=2), [12]),
        (Cadence(steps=5), [5, 10, 15]),
        (Cadence(minutes=2), [3, 6, 9, 12, 15]),
        (Cadence(minutes=0.5), list(range(1, 16))),
        (Cadence(epochs=1, steps=4), [4, 6, 8, 12]),
        (Cadence(epochs=1, minutes=4), [6, 12]),
        (Cadence(steps=4, minutes=2), [3, 4, 7, 8, 11, 12, 15]),
    ],
)
def test_when_it_is_due(cadence: Cadence, expected: list[int]) -> None:
    """A step takes 40 s here."""
    assert due_at(cadence, 15, 40.0) == expected


def test_minutes_count_from_whatever_made_it_be_done() -> None:
    cadence = Cadence(minutes=1)
    cadence.done(Clock(1, 6, 100, seconds=50.0))
    assert not cadence.due(Clock(2, 6, 100, seconds=100.0))
    assert cadence.due(Clock(3, 6, 100, seconds=110.0))
