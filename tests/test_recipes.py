"""Recipes: each says what it is for and builds, and the command line they share changes only deliberately."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_contrastive.config import TrainConfig
from dist_contrastive.methods import METHODS
from dist_contrastive.recipes import DEFAULT_RECIPE, RECIPES
from dist_contrastive.trainer import build_method
from tests.launches import launch_config_of

# The command line. What is added or renamed here is added or renamed for everybody's scripts.
OPTIONS = set(
    """
--help --from --run-dir --seed --epochs --resume --overwrite --no-overwrite --stop-after-steps --log-every
--method.projector.layers --method.projector.hidden-size --method.projector.output-size
--method.projector.output-norm --method.projector.no-output-norm --method.projector.activation
--method.projector.hidden-norm --method.projector.no-hidden-norm
--data.path --data.image-size --data.eval-crop --data.threads --data.batches-ahead --data.timeout-s
--data.resident --data.no-resident
--augment.count --augment.size --augment.crop-scale --augment.crop-ratio --augment.flip
--augment.jitter --augment.brightness --augment.contrast --augment.saturation --augment.hue
--augment.grayscale --augment.blur --augment.blur-sigma --augment.solarize
--augment.solarize-threshold
--augment.mean --augment.std
--encoder.name --encoder.stem --encoder.norm --encoder.dropout --encoder.drop-path --encoder.patch-size
--batch.global --batch.micro --batch.memory-gib
--optim.name --optim.learning-rate --optim.weight-decay --optim.momentum --optim.beta2 --optim.warmup-epochs --optim.clip-norm
--optim.schedule --optim.decay-epochs --optim.weight-decay-end --optim.layer-decay
--probe.enabled --probe.no-enabled --probe.every --probe.knn-k --probe.knn-temperature --probe.strengths --probe.holdout
--checkpoint.every --checkpoint.every-steps --checkpoint.every-minutes --checkpoint.keep
--launch.ranks --launch.device --launch.precision --launch.timeout-minutes --launch.compile --launch.no-compile --launch.tf32
--launch.no-tf32 --launch.cudnn-benchmark --launch.no-cudnn-benchmark --launch.expandable-segments
--launch.no-expandable-segments
""".split()  # noqa: SIM905 - a list of strings would be a page long
)
METHOD_OPTIONS = {
    "simclr": {"--method.temperature", "--method.positives", "--method.decoupled", "--method.no-decoupled"},
}

each_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


def test_the_command_line_is_frozen(known_options: set[str]) -> None:
    method = RECIPES[DEFAULT_RECIPE]().method.name
    assert known_options == OPTIONS | METHOD_OPTIONS[method]


@each_recipe
def test_a_recipe_knows_its_name_and_has_a_folder_of_its_own(recipe: Callable[[], TrainConfig]) -> None:
    config = recipe()
    assert RECIPES[config.recipe] is recipe
    assert config.run_dir == Path("runs") / config.recipe
    assert (config.resume, config.overwrite, config.stop_after_steps) == ("auto", False, 0)


@each_recipe
def test_a_recipe_builds(recipe: Callable[[], TrainConfig]) -> None:
    config = recipe()
    method = build_method(config)
    assert type(method) is METHODS[config.method.name]
    assert config.augment.num_views >= method.min_views
    assert config.optim.warmup_epochs < config.epochs
    assert config.probe.every < config.epochs


@each_recipe
def test_the_docstring_states_command_cost_score_and_source(recipe: Callable[[], TrainConfig]) -> None:
    text = inspect.getdoc(recipe) or ""
    for name in ("Command", "Cost", "Measured|Expected", "Source"):
        assert re.search(rf"^({name}): +\S", text, re.MULTILINE), f"{recipe.__name__}'s docstring has no line {name}:"
    assert launch_config_of(recipe)["num_processes"] >= 1


@each_recipe
def test_on_several_gpus_no_statistics_depend_on_how_many(recipe: Callable[[], TrainConfig]) -> None:
    """So that such a run goes on at another number of them; on CPUs the demonstration's ranks keep their own."""
    launch = launch_config_of(recipe)
    if launch["num_processes"] > 1 and not launch["use_cpu"]:
        assert recipe().encoder.norm in ("sync", "group")
