"""Which layers have to stay in fp32 for an int8 form that is good enough: those that do most damage, as few as possible."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Tried:
    in_fp32: tuple[str, ...]
    scores: Mapping[str, float]
    failures: tuple[str, ...]
    """Why it is not good enough; empty where it is."""


@dataclass(frozen=True)
class Found:
    best: Tried | None
    """With the fewest layers in fp32; None where none is good enough."""
    tried: tuple[Tried, ...]
    """In the order of trying."""


def search(
    layers: Sequence[str],
    measure: Callable[[Sequence[str]], Mapping[str, float]],
    damage: Callable[[str], float],
    failures: Callable[[Mapping[str, float]], Sequence[str]],
) -> Found:
    """`measure` scores the form with these layers in fp32; `damage`: what one layer in int8 does alone, the larger the worse;
    `failures` of scores.

    All in int8 comes first. Where that fails, layers are put in the order of their damage, and the number that stays in fp32 is
    found by halving: at least one layer is in int8.
    """
    tried: list[Tried] = []

    def passes(in_fp32: Sequence[str]) -> bool:
        scores = measure(in_fp32)
        tried.append(Tried(tuple(in_fp32), scores, tuple(failures(scores))))
        return not tried[-1].failures

    if layers and not passes([]):
        worst_first = sorted(layers, key=damage, reverse=True)
        too_few, enough = 0, len(layers)
        while enough - too_few > 1:
            middle = (too_few + enough) // 2
            if passes(worst_first[:middle]):
                enough = middle
            else:
                too_few = middle
    good = [entry for entry in tried if not entry.failures]
    return Found(min(good, key=lambda entry: len(entry.in_fp32), default=None), tuple(tried))
