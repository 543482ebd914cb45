"""The comparison of losses with their peers, which the tests do without: what it makes of a difference, what it says without
peers."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import loss_parity
from benchmarks.loss_parity import COMPARISONS, PEERS, Command
from dist_contrastive.cli import EXIT_USER_ERROR, main_guard

SMALL = Command(samples=4, prototypes=8, size=6, seeds=2)


def test_missing_peers_get_one_line_that_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in PEERS.values():
        monkeypatch.setitem(sys.modules, name, None)
    assert main_guard(lambda: loss_parity.main(["--out", str(tmp_path / "record")])) == EXIT_USER_ERROR
    assert capsys.readouterr().err == "error: the peers are not installed: pip install '.[bench]'\n"
    assert not (tmp_path / "record").exists()


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
