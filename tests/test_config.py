"""Configs: written to JSON and back without loss, compared by what they compute, never changed."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dist_contrastive.config import (
    EXECUTION_FIELDS,
    AugmentConfig,
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EncoderConfig,
    HeadConfig,
    LaunchConfig,
    OptimConfig,
    ProbeConfig,
    TrainConfig,
    UserError,
    ViewConfig,
    differences,
    flatten,
    from_dict,
    to_dict,
)  # fmt: skip
from dist_contrastive.methods import METHODS
from dist_contrastive.methods.simclr import SimCLRConfig
from dist_contrastive.methods.vicreg import VICRegConfig
from dist_contrastive.recipes import RECIPES


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_json_and_back(recipe: Callable[[], TrainConfig]) -> None:
    config = recipe()
    data = json.loads(json.dumps(to_dict(config)))
    assert from_dict(TrainConfig, data, METHODS[config.method.name].Config) == config


def test_from_dict_refuses_fields_that_it_does_not_know() -> None:
    data = to_dict(RECIPES["photos"]())
    data["optim"]["nesterov"] = True
    with pytest.raises(UserError, match="nesterov"):
        from_dict(TrainConfig, data, SimCLRConfig)


def test_differences_names_the_fields_that_compute_something_else() -> None:
    config = RECIPES["photos"]()
    other = replace(config, seed=7, optim=replace(config.optim, learning_rate=0.5))
    assert differences(to_dict(config), to_dict(config)) == []
    assert differences(to_dict(config), to_dict(other)) == [
        f"optim.learning_rate: {config.optim.learning_rate} -> 0.5",
        "seed: 0 -> 7",
    ]


def test_differences_sees_a_field_that_only_one_side_has() -> None:
    new = to_dict(RECIPES["photos"]())
    old = {name: value for name, value in new.items() if name != "epochs"}
    assert differences(old, new) == [f"epochs: None -> {new['epochs']}"]


def test_execution_fields_exist_and_make_no_difference() -> None:
    config = to_dict(RECIPES["photos"]())
    assert set(EXECUTION_FIELDS) <= set(flatten(config))
    other = json.loads(json.dumps(config))
    for field in EXECUTION_FIELDS:
        *sections, name = field.split(".")
        place = other
        for section in sections:
            place = place[section]
        place[name] = "something else"
    assert differences(config, other) == []


def parts(config: Any) -> Iterator[Any]:
    """The dataclass and all dataclasses in it."""
    yield config
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for part in value if isinstance(value, tuple) else (value,):
            if dataclasses.is_dataclass(part):
                yield from parts(part)


def test_frozen() -> None:
    for part in parts(RECIPES["photos"]()):
        for field in dataclasses.fields(part):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(part, field.name, getattr(part, field.name))


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("option", "build"),
    [
        ("--data.image-size", lambda: DataConfig(image_size=0)),
        ("--data.eval-crop", lambda: DataConfig(eval_crop=1.1)),
        ("--data.threads", lambda: DataConfig(threads=-1)),
        ("--data.batches-ahead", lambda: DataConfig(batches_ahead=0)),
        ("--data.timeout-s", lambda: DataConfig(timeout_s=NAN)),
        ("--augment.count", lambda: ViewConfig(count=-1)),
        ("--augment.count", lambda: AugmentConfig((ViewConfig(count=0),))),
        ("--augment.size", lambda: ViewConfig(size=-1)),
        ("--augment.flip", lambda: ViewConfig(flip=NAN)),
        ("--augment.jitter", lambda: ViewConfig(jitter=1.5)),
        ("--augment.blur", lambda: ViewConfig(blur=-0.1)),
        ("--augment.contrast", lambda: ViewConfig(contrast=-0.1)),
        ("--augment.hue", lambda: ViewConfig(hue=0.6)),
        ("--augment.crop-scale", lambda: ViewConfig(crop_scale=(0.5, 0.2))),
        ("--augment.crop-ratio", lambda: ViewConfig(crop_ratio=(0.0, 1.0))),
        ("--augment.blur-sigma", lambda: ViewConfig(blur_sigma=(2.0, 1.0))),
        ("--augment.std", lambda: AugmentConfig(std=(0.2, 0.0, 0.2))),
        ("--augment.solarize-threshold", lambda: ViewConfig(solarize_threshold=1.5)),
        ("--encoder.dropout", lambda: EncoderConfig(dropout=1.0)),
        ("--encoder.drop-path", lambda: EncoderConfig(drop_path=1.0)),
        ("--encoder.patch-size", lambda: EncoderConfig(patch_size=-1)),
        ("--method.projector.hidden-size", lambda: SimCLRConfig(projector=HeadConfig(hidden_size=-1))),
        ("--method.projector.output-size", lambda: SimCLRConfig(projector=HeadConfig(output_size=0))),
        ("--method.temperature", lambda: SimCLRConfig(temperature=0.0)),
        ("--batch.global", lambda: BatchConfig(size=1)),
        ("--optim.learning-rate", lambda: OptimConfig(learning_rate=NAN)),
        ("--optim.learning-rate", lambda: OptimConfig(learning_rate=float("inf"))),
        ("--optim.weight-decay", lambda: OptimConfig(weight_decay=-1.0)),
        ("--optim.momentum", lambda: OptimConfig(momentum=1.0)),
        ("--optim.beta2", lambda: OptimConfig(beta2=1.0)),
        ("--optim.warmup-epochs", lambda: OptimConfig(warmup_epochs=-1.0)),
        ("--optim.clip-norm", lambda: OptimConfig(clip_norm=-1.0)),
        ("--probe.every", lambda: ProbeConfig(every=-1)),
        ("--probe.knn-k", lambda: ProbeConfig(knn_k=-1)),
        ("--probe.knn-temperature", lambda: ProbeConfig(knn_temperature=0.0)),
        ("--probe.strengths", lambda: ProbeConfig(strengths=())),
        ("--probe.strengths", lambda: ProbeConfig(strengths=(0.1, 0.0))),
        ("--probe.strengths", lambda: ProbeConfig(strengths=(0.1, NAN))),
        ("--probe.holdout", lambda: ProbeConfig(holdout=1.0)),
        ("--checkpoint.every", lambda: CheckpointConfig(every=0)),
        ("--checkpoint.every-steps", lambda: CheckpointConfig(every_steps=-1)),
        ("--checkpoint.every-minutes", lambda: CheckpointConfig(every_minutes=-0.5)),
        ("--checkpoint.every-minutes", lambda: CheckpointConfig(every_minutes=NAN)),
        ("--checkpoint.keep", lambda: CheckpointConfig(keep=1)),
        ("--launch.ranks", lambda: LaunchConfig(ranks=-1)),
        ("--launch.timeout-minutes", lambda: LaunchConfig(timeout_minutes=0.0)),
        ("--launch.timeout-minutes", lambda: LaunchConfig(timeout_minutes=1e300)),
        ("--epochs", lambda: TrainConfig(method=SimCLRConfig(), epochs=0)),
        ("--log-every", lambda: TrainConfig(method=SimCLRConfig(), log_every=0)),
        ("--stop-after-steps", lambda: TrainConfig(method=SimCLRConfig(), stop_after_steps=-1)),
        ("--seed", lambda: TrainConfig(method=SimCLRConfig(), seed=-1)),
    ],
)
def test_a_wrong_value_is_refused_in_one_line_that_starts_with_its_option(
    option: str, build: Callable[[], object], known_options: set[str]
) -> None:
    assert option in known_options
    with pytest.raises(UserError) as caught:
        build()
    assert str(caught.value).startswith(option)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(
    "recipe", [RECIPES["photos"], *(RECIPES[f"photos_{n}"] for n in ("barlow", "vicreg", "byol", "cpc"))]
)
def test_no_number_may_be_infinite_or_none(recipe: Callable[[], TrainConfig], value: float) -> None:
    """Each number of each section, whatever it is for."""
    sections = [part for part in parts(recipe()) if not isinstance(part, HeadConfig | TrainConfig)]
    tried = 0
    for section in sections:
        for name, old in vars(section).items():
            numbers = old if isinstance(old, tuple) else (old,)
            if not any(isinstance(number, float) for number in numbers):
                continue
            tried += 1
            wrong = (*numbers[:-1], value) if isinstance(old, tuple) else value
            with pytest.raises(UserError) as caught:
                replace(section, **{name: wrong})
            assert f".{name.replace('_', '-')} " in str(caught.value)
    assert tried > 25


def pair(**changes: Any) -> TrainConfig:
    return replace(RECIPES["photos"](), **changes)


@pytest.mark.parametrize(
    ("build", "line"),
    [
        (
            lambda: pair(epochs=5, optim=OptimConfig(warmup_epochs=10)),
            "--optim.warmup-epochs 10 is longer than the run (--epochs 5), which would never reach its learning rate: give "
            "fewer than 5 warm-up epochs, or more epochs than 10",
        ),
        (
            lambda: BatchConfig(memory_gib=4.0),
            "--batch.memory-gib 4 is for --batch.micro auto, not for --batch.micro 0: give --batch.micro auto with it",
        ),
        (
            lambda: pair(
                data=DataConfig(image_size=1), augment=AugmentConfig((ViewConfig(blur=0.0), ViewConfig(blur=0.5)))
            ),
            "--augment.blur 0.5 with --data.image-size 1: one pixel can't be blurred; give --augment.blur 0",
        ),
        (
            lambda: VICRegConfig(invariance=0.0, variance=0.0, covariance=0.0),
            "--method.invariance 0 with --method.variance 0 and --method.covariance 0: a loss of nothing; give one of them more",
        ),
    ],
)
def test_what_is_valid_alone_and_not_together_is_refused_with_both_names(
    build: Callable[[], object], line: str
) -> None:
    with pytest.raises(UserError) as caught:
        build()
    assert str(caught.value) == line


def test_a_warm_up_as_long_as_the_run_and_its_neighbours_are_let_through() -> None:
    pair(epochs=5, optim=OptimConfig(warmup_epochs=5))
    BatchConfig(micro="auto", memory_gib=4.0)
    pair(data=DataConfig(image_size=2), augment=AugmentConfig((ViewConfig(blur=0.5),)))
    VICRegConfig(invariance=0.0, variance=0.0)


def test_a_path_that_is_read_back_has_its_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    data = to_dict(replace(RECIPES["photos"](), run_dir=Path("~/runs")))
    assert from_dict(TrainConfig, data, SimCLRConfig).run_dir == Path("/home/somebody/runs")


def test_paths_are_plain_text_in_json() -> None:
    assert to_dict(DataConfig(path=Path("a/b.beton")))["path"] == "a/b.beton"
