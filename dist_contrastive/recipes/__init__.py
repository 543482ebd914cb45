"""Recipes: functions that return a `TrainConfig`. Each docstring says what it is, then command, cost, score and source.

What precedes the first semicolon of Cost, Measured and Expected is what the list of recipes shows. A score under Measured
points to its record under benchmarks/records/; one under Expected is taken from the named source, no result of this code.
"""

import inspect
import re
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
        photos.photos_dino,
        photos.photos_ibot,
        photos.photos_dinov2,
        photos.photos_swav,
        photos.photo_captions,
        photos.photo_captions_siglip,
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
        cifar10.cifar10_dino,
        cifar10.cifar10_ibot,
        cifar10.cifar10_dinov2,
        cifar10.cifar10_swav,
        cifar10.cifar10_clip,
        cifar10.cifar10_siglip,
        imagenet.imagenet_simclr_4096,
        imagenet.imagenet_dino,
        imagenet.imagenet_ibot,
        imagenet.imagenet_dinov2,
        imagenet.imagenet_swav,
        imagenet.imagenet_clip,
        imagenet.imagenet_siglip,
    )
}
DEFAULT_RECIPE = "photos"


def build_recipe(name: str) -> TrainConfig:
    """The config of the recipe `name`; `UserError` with the nearest name where there is none."""
    require(
        name in RECIPES,
        f"unknown recipe {name}{nearest(name, RECIPES)}; `python -m dist_contrastive.train --list` shows all of them",
    )
    return RECIPES[name]()


def list_recipes() -> str:
    """A line for each recipe: its name, what it is, what it costs, and its measured and expected scores."""
    rows = [("recipe", "what", "cost", "linear, kNN", "expected")]
    for name, recipe in RECIPES.items():
        what, facts = summary_of(recipe)
        measured = ", ".join(re.findall(r"(?:linear|kNN) (\d\.\d+)", facts.get("Measured", ""))) or "-"
        rows.append((name, what, facts["Cost"], measured, facts.get("Expected", "-")))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    note = "linear, kNN: measured with this code. expected: what the recipe's source reports, or its aim."
    return "\n".join([*lines, "", note])


def summary_of(recipe: Callable[[], TrainConfig]) -> tuple[str, dict[str, str]]:
    """What a recipe's docstring says in short: its first sentence, and the heads of Cost, Measured and Expected."""
    text = inspect.getdoc(recipe) or ""
    facts = dict(re.findall(r"^(Cost|Measured|Expected): +([^;]+);", text, re.MULTILINE))
    return text.partition("\n")[0].removesuffix("."), facts
