"""Recipes: functions that return a `TrainConfig`. Each docstring states command, cost, expected score and source.

Costs and scores marked "measured" point to their record under benchmarks/records/; the others are expectations taken
from the named source, not results of this code.
"""

from collections.abc import Callable

from dist_contrastive.config import TrainConfig
from dist_contrastive.recipes.cifar10 import cifar10_cpu, cifar10_simclr, cifar10_simclr_4096
from dist_contrastive.recipes.imagenet import imagenet_simclr_4096
from dist_contrastive.recipes.photos import photos

RECIPES: dict[str, Callable[[], TrainConfig]] = {
    recipe.__name__: recipe
    for recipe in (photos, cifar10_cpu, cifar10_simclr, cifar10_simclr_4096, imagenet_simclr_4096)
}
DEFAULT_RECIPE = "photos"
