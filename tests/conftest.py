"""Shapes in signatures are checked in tests: jaxtyping's annotations by beartype, in this process and in the ranks."""

import multiprocessing
import re

import pytest
import torch
from jaxtyping import install_import_hook

# Before anything imports these: the hook changes modules as they are imported.
CHECKED = ["dist_contrastive.losses", "dist_contrastive.models"]
install_import_hook(CHECKED, "beartype.beartype")

from dist_contrastive import cli  # noqa: E402
from dist_contrastive.recipes import DEFAULT_RECIPE, RECIPES  # noqa: E402
from tests import harness  # noqa: E402, F401 - it sets its own preload, which the next line replaces
from tests.processes import starts_processes  # noqa: E402

# The server that ranks are forked from imports this file before the modules that it checks.
multiprocessing.get_context("forkserver").set_forkserver_preload(
    ["torch", "tests.conftest", "dist_contrastive.methods", "dist_contrastive.models.encoders", "tests.harness"]
)

# Threads that share the work of tensors as small as these mostly wait for one another.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        assert isinstance(item, pytest.Function)
        if any(starts_processes(item.path, name) for name in (item.originalname, *item.fixturenames)):
            item.add_marker("processes")
    # Those that wait longest for others come first, so that nobody waits for them at the end.
    items.sort(key=lambda item: item.get_closest_marker("slurm") is None)


@pytest.fixture
def known_options(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> set[str]:
    """The long options of the default recipe, as its help page spells them."""
    monkeypatch.setenv("COLUMNS", "200")  # so that no name is cut
    with pytest.raises(SystemExit):
        cli.parse(RECIPES[DEFAULT_RECIPE](), ["--help"])
    return set(re.findall(r"(?<!\S)--[a-z][\w.-]*", capsys.readouterr().out))
