"""Recipes: functions that return a `TrainConfig`. Each docstring states command, cost, expected score and source.

Costs and scores marked "measured" point to their record under benchmarks/records/; the others are expectations taken
from the named source, not results of this code.
"""

from collections.abc import Callable

from dist_contrastive.config import TrainConfig
from dist_contrastive.recipes.cifar10 import cifar10_cpu, cifar10_simclr, cifar10_simclr_4096
from dist_contrastive.recipes.imagenet import imagenet_simclr_4096
from dist_contrastive.recipes.photos import (
    photos,
    photos_barlow,
    photos_byol,
    photos_cpc,
    photos_dcl,
    photos_margin,
    photos_moco,
    photos_mocov3,
    photos_simsiam,
    photos_supcon,
    photos_vicreg,
)

RECIPES: dict[str, Callable[[], TrainConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        photos,
        photos_margin,
        photos_supcon,
        photos_dcl,
        photos_moco,
        photos_mocov3,
        photos_byol,
        photos_simsiam,
        photos_barlow,
        photos_vicreg,
        photos_cpc,
        cifar10_cpu,
        cifar10_simclr,
        cifar10_simclr_4096,
        imagenet_simclr_4096,
    )
}
DEFAULT_RECIPE = "photos"
