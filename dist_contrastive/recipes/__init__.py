"""Recipes: functions that return a `TrainConfig`. Each docstring states command, cost, expected score and source.

Costs and scores marked "measured" point to their record under benchmarks/records/; the others are expectations taken
from the named source, not results of this code.
"""

from collections.abc import Callable

from dist_contrastive.cli import nearest
from dist_contrastive.config import TrainConfig, require
from dist_contrastive.recipes import cifar10, imagenet, photos

RECIPES: dict[str, Callable[[], TrainConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        photos.photos,
        photos.photos_margin,
        photos.photos_supcon,
        photos.photos_dcl,
        photos.photos_moco,
        photos.photos_mocov3,
        photos.photos_byol,
        photos.photos_simsiam,
        photos.photos_barlow,
        photos.photos_vicreg,
        photos.photos_cpc,
        cifar10.cifar10_cpu,
        cifar10.cifar10_simclr,
        cifar10.cifar10_simclr_4096,
        cifar10.cifar10_simclr_4096_t4,
        cifar10.cifar10_margin,
        cifar10.cifar10_supcon,
        cifar10.cifar10_dcl,
        cifar10.cifar10_moco,
        cifar10.cifar10_moco_t4,
        cifar10.cifar10_mocov3,
        cifar10.cifar10_byol,
        cifar10.cifar10_simsiam,
        cifar10.cifar10_barlow,
        cifar10.cifar10_vicreg,
        cifar10.cifar10_cpc,
        imagenet.imagenet_simclr_4096,
    )
}
DEFAULT_RECIPE = "photos"


def build_recipe(name: str) -> TrainConfig:
    """The config of the recipe `name`; `UserError` with the nearest name where there is none."""
    require(name in RECIPES, f"unknown recipe {name}{nearest(name, RECIPES)}; recipes: {', '.join(RECIPES)}")
    return RECIPES[name]()
