"""The comparison of losses with their peers, which the tests do without: what it makes of a difference, what it says without
peers."""

import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import loss_parity
from benchmarks.loss_parity import COMPARISONS, ParityBenchmark
from dist_contrastive.cli import EXIT_USER_ERROR, main_guard

SMALL = ParityBenchmark(samples=4, prototypes=8, size=6, seeds=2)


@pytest.mark.parametrize("peer", ["lightly", "open_clip"])
def test_a_missing_peer_gets_one_line_that_says_what_to_install(
    peer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("lightly", "open_clip"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(sys, "argv", ["loss_parity"])
    assert main_guard(loss_parity.main) == EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert error.startswith("error: the peers are not installed: pip install lightly open_clip_torch (")
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_loss_is_itself_and_not_another(name: str) -> None:
    """With our own loss in the peer's place, and with a wrong one."""
    comparison = replace(COMPARISONS[name], theirs=COMPARISONS[name].ours)
    same = loss_parity.compare(comparison, SMALL)
    assert set(same["ours_theirs"]) == {"value", *comparison.learnt}
    assert set(same["ours_theirs"].values()) == {0.0}
    wrong = loss_parity.compare(replace(comparison, theirs=lambda x: 1.01 * comparison.ours(x)), SMALL)
    for difference in wrong["ours_theirs"].values():
        assert difference == pytest.approx(0.01 / 1.01, rel=1e-3)


def test_a_difference_is_relative_to_the_largest_number() -> None:
    assert loss_parity.difference(torch.tensor([4.0, 1.0]), torch.tensor([4.0, 0.0])) == 0.25
