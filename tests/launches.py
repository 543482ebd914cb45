"""How recipes are launched: the file in launch_configs/ that a recipe's own command names."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

import dist_contrastive
from dist_contrastive.config import TrainConfig


def launch_config_of(recipe: Callable[[], TrainConfig]) -> dict[str, Any]:
    """What is in the launch config of the docstring's command."""
    command = re.search(r"^Command: +(.*)$", inspect.getdoc(recipe) or "", re.MULTILINE)
    assert command
    words = command[1].split()
    assert words[-3:] == ["-m", "dist_contrastive.train", recipe.__name__]
    config_file = Path(dist_contrastive.__file__).parents[1] / words[words.index("--config_file") + 1]
    launch: dict[str, Any] = yaml.safe_load(config_file.read_text())
    return launch
