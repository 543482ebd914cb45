"""What is refused before a run begins, by trying or by arithmetic: image sizes that an encoder can't take, crops that images
have not, forward passes too small for BatchNorm."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_contrastive import preflight, trial
from dist_contrastive.batch import Batch, Samples, largest_micro, smallest_part
from dist_contrastive.config import (
    AugmentConfig,
    BatchConfig,
    CheckpointConfig,
    EncoderConfig,
    HeadConfig,
    MethodConfig,
    OptimConfig,
    ProbeConfig,
    TrainConfig,
    UserError,
    ViewConfig,
)  # fmt: skip
from dist_contrastive.data.beton import open_dataset
from dist_contrastive.methods import METHODS
from dist_contrastive.methods.byol import BYOLConfig
from dist_contrastive.methods.cpc import CPCConfig
from dist_contrastive.methods.moco import MoCoConfig
from dist_contrastive.methods.simclr import SimCLR
from dist_contrastive.step.gradient import split
from dist_contrastive.trainer import build_method
from dist_contrastive.trial import fewest_samples
from tests.harness import RankError, run_ranks
from tests.runs import GLOBAL_BATCH, NUM_TRAIN, STEPS_PER_EPOCH, losses_of, tiny_config, train_on_rank, write_dataset
from tests.steps import TEXT, encoder_for, small, with_small

HEAD = HeadConfig(layers=2, hidden_size=8, output_size=4)


def with_method(method: MethodConfig, *, norm: str = "batch", size: int = 2, micro: int = 0) -> TrainConfig:
    config = tiny_config(Path("run"), Path("data.beton"), norm=norm, stop_after_steps=2)
    views = METHODS[method.name].min_views
    augment = AugmentConfig((ViewConfig(count=views),))
    encoder = encoder_for(method.name, config.encoder)
    return replace(config, method=method, augment=augment, encoder=encoder, batch=BatchConfig(size=size, micro=micro))


def with_encoder(name: str, image_size: int, **changes: Any) -> TrainConfig:
    config = tiny_config(Path("run"), Path("data.beton"))
    data = replace(config.data, image_size=image_size)
    return replace(config, encoder=EncoderConfig(name=name), data=data, **changes)


def refusal_of(config: TrainConfig) -> str:
    with pytest.raises(UserError) as caught:
        fewest_samples(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Encoder and image size.


@pytest.mark.parametrize(
    ("name", "image_size"),
    [
        ("resnet18", 8),  # maps of one pixel at the end
        ("resnet50", 32),
        ("vit_tiny_patch16_224", 48),
        ("deit_tiny_distilled_patch16_224", 32),
        ("swin_tiny_patch4_window7_224", 40),  # its windows are padded
        ("mixer_s32_224", 64),
        ("maxvit_tiny_tf_224", 64),
        ("efficientnet_b0", 8),
        ("convnext_atto", 32),
        ("xcit_nano_12_p16_224", 32),
    ],
)
def test_an_encoder_that_can_take_the_size_is_let_through(name: str, image_size: int) -> None:
    assert fewest_samples(with_encoder(name, image_size)) == 1


@pytest.mark.parametrize(
    ("name", "image_size", "patch", "fits"),
    [
        ("vit_tiny_patch16_224", 8, 16, "such as 16"),
        ("vit_tiny_patch16_224", 40, 16, "32 or 48"),
        ("deit_tiny_distilled_patch16_224", 40, 16, "32 or 48"),
        ("beit_base_patch16_224", 33, 16, "32 or 48"),
        ("mixer_s32_224", 40, 32, "32 or 64"),
        ("eva02_tiny_patch14_224", 32, 14, "28 or 42"),
        ("swin_tiny_patch4_window7_224", 30, 4, "28 or 32"),
        ("vit_w96_d4", 33, 4, "32 or 36"),
        ("convnext_atto", 34, 4, "32 or 36"),
    ],
)
def test_pixels_that_would_never_be_seen_are_refused_with_what_fits(
    name: str, image_size: int, patch: int, fits: str
) -> None:
    assert refusal_of(with_encoder(name, image_size)) == (
        f"--data.image-size {image_size}: {name} cuts images into patches of {patch} pixels and would never see the rest; "
        f"give a multiple of {patch}, {fits}"
    )


def test_patches_of_a_chosen_size_are_refused_by_that_size() -> None:
    config = with_encoder("vit_tiny_patch16_224", 33)
    config = replace(config, encoder=replace(config.encoder, patch_size=4))
    assert refusal_of(config) == (
        "--data.image-size 33: vit_tiny_patch16_224 cuts images into patches of 4 pixels and would never see the rest; give a "
        "multiple of 4, 32 or 36"
    )


def test_smaller_views_that_patches_do_not_cover_are_refused_by_their_group() -> None:
    config = with_small(with_encoder("vit_w96_d4", 32), "dino")
    groups = (ViewConfig(count=2), ViewConfig(count=4, size=18))
    assert refusal_of(replace(config, augment=AugmentConfig(groups))) == (
        "--augment.size 18: vit_w96_d4 cuts images into patches of 4 pixels and would never see the rest; give a multiple of "
        "4, 16 or 20"
    )
    fitting = AugmentConfig((groups[0], replace(groups[1], size=16)))
    assert fewest_samples(replace(config, augment=fitting))


def test_patches_that_overlap_have_sizes_of_their_own() -> None:
    assert fewest_samples(with_encoder("pit_ti_224", 56)) == 1
    assert refusal_of(with_encoder("pit_ti_224", 60)) == (
        "--data.image-size 60: pit_ti_224 cuts images into patches of 16 pixels and would never see the rest; give 16 and any "
        "number of times 8 more, 56 or 64"
    )


@pytest.mark.parametrize(
    ("name", "image_size", "advice"),
    [
        ("convnext_atto", 8, "give 32"),  # no pixel is left for its last stages
        ("xcit_nano_12_p16_224", 40, "give 32 or 48"),  # is not even built for it
        ("coatnet_0_rw_224", 40, "give 32 or 64"),
    ],
)
def test_an_encoder_that_fails_at_the_size_is_refused_with_sizes_that_it_takes(
    name: str, image_size: int, advice: str
) -> None:
    message = refusal_of(with_encoder(name, image_size))
    assert message.startswith(f"--data.image-size {image_size}: {name} can't be trained on such images with simclr (")
    assert message.endswith(f"); {advice}")
    for size in advice.removeprefix("give ").split(" or "):
        assert fewest_samples(with_encoder(name, int(size))) in (1, 2)


def test_an_encoder_of_patches_is_refused_for_patches_that_it_cannot_take() -> None:
    config = with_method(CPCConfig(projector=HeadConfig(layers=1), patch_size=8, patch_stride=4, rows_ahead=1))
    config = replace(config, encoder=EncoderConfig(name="convnext_atto"))
    message = refusal_of(config)
    assert "with cpc" in message
    assert "convnext_atto" in message


def sequence(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output[:, None].expand(-1, 3, -1)


def test_features_that_are_no_vectors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(config: TrainConfig) -> Any:
        method = build_method(config)
        method.encoder.body.register_forward_hook(sequence)
        return method

    monkeypatch.setattr(trial, "build_method", build)
    assert "it gives [4, 3, 512] for 4 images, not a feature of 512 numbers" in refusal_of(with_encoder("resnet18", 32))


class OfTokens(SimCLR):
    """Asks the encoder for tokens, too."""

    def project_views(self, views: Tensor, samples: Samples, first: int = 0) -> Tensor:
        pooled = self.encoder.features(views.flatten(0, 1)).pooled
        return self.projector(pooled).float().unflatten(0, views.shape[:2])


def test_features_that_are_no_vectors_are_refused_beside_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(config: TrainConfig) -> Any:
        method = build_method(config)
        method.__class__ = OfTokens
        method.encoder.body.global_pool.register_forward_hook(sequence)  # type: ignore[union-attr]
        return method

    monkeypatch.setattr(trial, "build_method", build)
    assert "it gives [4, 3, 512] for 4 images, not a feature of 512 numbers" in refusal_of(with_encoder("resnet18", 32))


def test_what_meta_tensors_cannot_do_is_tried_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(config: TrainConfig) -> Any:
        method = build_method(config)
        method.encoder.body.register_forward_hook(lambda module, inputs, output: output * float(output.detach().sum()))
        return method

    monkeypatch.setattr(trial, "build_method", build)
    assert fewest_samples(with_encoder("resnet10_w16", 16)) == 1


def test_trying_leaves_the_random_state_and_the_initial_weights_as_they_are() -> None:
    config = with_encoder("resnet10_w16", 16)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fewest_samples(config)
    assert torch.equal(torch.rand(3), expected)
    before = build_method(config).state_dict()
    fewest_samples(config)
    for name, value in build_method(config).state_dict().items():
        assert torch.equal(value, before[name]), name


# Samples of a forward pass.


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("norm", ["batch", "sync", "group"])
def test_the_fewest_samples_are_those_that_a_real_pass_takes(name: str, norm: str) -> None:
    """Every method: with as many it trains, with one less it does not, on real tensors."""
    config = with_method(small(name, HEAD), norm=norm, size=16)
    fewest = fewest_samples(config)
    for size in range(1, fewest + 1):
        method = build_method(config).train()
        samples = Samples(labels=torch.zeros(size, dtype=torch.int64), indices=torch.arange(size), epoch=0)
        text = torch.ones(size, TEXT.context, dtype=torch.int64)
        batch = Batch((torch.randn(config.augment.num_views, size, 3, 16, 16),), samples, text)
        if size < fewest:
            with pytest.raises(ValueError, match=r"more than (1|one) value per channel"):
                method.embed_all(batch)
        else:
            method.embed_all(batch)


def test_a_method_whose_layers_have_no_batch_statistics_takes_one_sample() -> None:
    config = with_method(MoCoConfig(projector=replace(HEAD, layers=1), queue=8))
    assert fewest_samples(replace(config, encoder=EncoderConfig(name="vit_tiny_patch16_224"))) == 1
    assert fewest_samples(with_method(MoCoConfig(projector=HEAD, queue=8), norm="group")) == 1


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


def run_moco(dataset: Path, folder: Path, num_ranks: int, *, norm: str, size: int, micro: int) -> Path:
    config = with_method(MoCoConfig(projector=HEAD, queue=size * 4), norm=norm, size=size, micro=micro)
    config = replace(config, run_dir=folder, data=replace(config.data, path=dataset))
    run_ranks(train_on_rank, num_ranks, config)
    return folder


@pytest.mark.parametrize(
    ("num_ranks", "norm", "size", "micro", "line"),
    [
        (1, "batch", 4, 1, r"--batch.micro 1 cuts a rank's 4 samples .* of 1 .* give 2, or 0"),
        (1, "batch", 3, 2, r"--batch.micro 2 cuts a rank's 3 samples .* of 1 .* give 0"),
        (1, "batch", 5, 2, r"--batch.micro 2 cuts a rank's 5 samples .* of 1 .* give 3, or 0"),
        (2, "batch", 2, 0, r"--batch.global 2 gives each of 2 rank\(s\) 1 .* give at least 4, or --encoder.norm sync"),
        (1, "sync", 4, 1, r"--batch.micro 1 cuts .* moco with --encoder.norm sync needs 2 .* or --encoder.norm group"),
    ],
)
def test_a_pass_with_too_few_samples_is_refused_before_training(
    num_ranks: int, norm: str, size: int, micro: int, line: str, dataset: Path, tmp_path: Path
) -> None:
    with pytest.raises(RankError, match=f"UserError: {line}"):
        run_moco(dataset, tmp_path / "run", num_ranks, norm=norm, size=size, micro=micro)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("num_ranks", "norm", "size", "micro"),
    [
        (1, "batch", 4, 2),
        (1, "batch", 5, 3),
        (2, "sync", 2, 0),
        (2, "sync", 4, 1),
        (2, "group", 2, 0),
        (1, "group", 3, 1),
    ],
)
def test_what_is_not_refused_trains(
    num_ranks: int, norm: str, size: int, micro: int, dataset: Path, tmp_path: Path
) -> None:
    assert len(losses_of(run_moco(dataset, tmp_path / "run", num_ranks, norm=norm, size=size, micro=micro))) == 2


@pytest.mark.parametrize("num_samples", range(1, 12))
@pytest.mark.parametrize("fewest", [1, 2, 3])
def test_the_largest_micro_batch_leaves_no_part_too_small(num_samples: int, fewest: int) -> None:
    for at_most in range(1, num_samples + 1):
        found = largest_micro(num_samples, at_most, fewest)
        parts = {m: [part.stop - part.start for part in split(num_samples, m)] for m in range(1, at_most + 1)}
        assert all(min(sizes) == smallest_part(num_samples, m) for m, sizes in parts.items())
        fitting = [m for m, sizes in parts.items() if min(sizes) >= fewest]
        assert found == (max(parts[max(fitting)]) if fitting else 0), "what a pass of that micro-batch really has"


# Options with the data.


def check_crops(config: TrainConfig) -> None:
    data = open_dataset(config.data.path)
    preflight.check_crops(config, data.heights, data.widths)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"optim": OptimConfig(warmup_epochs=0.05)},
            f"--optim.warmup-epochs 0.05 is less than a step: an epoch has {STEPS_PER_EPOCH} of --batch.global {GLOBAL_BATCH}; "
            "give 0, or at least 0.166667",
        ),
        (
            {"stop_after_steps": 25},
            f"--stop-after-steps 25: the run has 24 steps (4 epochs of {STEPS_PER_EPOCH}); give at most that, or 0",
        ),
        ({"batch": BatchConfig(size=NUM_TRAIN + 1)}, f"--batch.global {NUM_TRAIN + 1} is more than the {NUM_TRAIN}"),
        (
            {"batch": BatchConfig(size=16, micro=17)},
            "--batch.micro 17: a rank has 16 samples of a step; give at most that",
        ),
    ],
)
def test_options_that_the_data_rules_out(changes: dict[str, Any], line: str, dataset: Path, tmp_path: Path) -> None:
    config = replace(tiny_config(tmp_path, dataset), **changes)
    with pytest.raises(UserError) as caught:
        preflight.check(config)
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize(
    ("augment", "line"),
    [
        ({"crop_scale": (1e-5, 1e-4)}, "--augment.crop-scale 1e-05 0.0001: of an image of 400 pixels"),
        (
            {"crop_ratio": (3.0, 4.0), "crop_scale": (0.5, 1.0)},
            "--augment.crop-scale 0.5 1 with --augment.crop-ratio 3 4",
        ),
    ],
)
def test_crops_that_no_image_has_are_refused(augment: dict[str, Any], line: str, dataset: Path, tmp_path: Path) -> None:
    """The loader would take the largest centred crop instead."""
    config = tiny_config(tmp_path, dataset)
    config = replace(config, augment=config.augment.with_all(**augment))
    with pytest.raises(UserError) as caught:
        check_crops(config)
    assert str(caught.value).startswith(line)


def test_an_evaluation_crop_of_less_than_a_pixel_is_refused(dataset: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, dataset)
    config = replace(config, data=replace(config.data, eval_crop=0.01))
    with pytest.raises(UserError, match=r"^--data.eval-crop 0.01: of an image of 20 pixels .* give at least 0.05"):
        check_crops(config)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, None),
        ({"optim": OptimConfig(warmup_epochs=4)}, "--optim.warmup-epochs 4 is all of --epochs 4: "),
        ({"probe": ProbeConfig(every=5)}, "--probe.every 5 is more than --epochs 4: "),
        ({"probe": ProbeConfig(enabled=False, every=5)}, None),
        ({"checkpoint": CheckpointConfig(every=5)}, "--checkpoint.every 5 is more than --epochs 4: "),
        ({"checkpoint": CheckpointConfig(every=5, every_steps=100)}, None),
        ({"checkpoint": CheckpointConfig(every=5, every_minutes=10)}, None),
        (
            {"method": MoCoConfig(queue=16 * 8, momentum=0.5)},
            "--method.queue 128 holds more keys than there are training samples (100)",
        ),
        ({"method": MoCoConfig(queue=16 * 25, momentum=0.5)}, "--method.queue 400: the run makes 384 keys"),
        ({"method": MoCoConfig(queue=16 * 6, momentum=0.5)}, None),
        (
            {"method": BYOLConfig(momentum=0.99)},
            "--method.momentum 0.99: after the run's 24 steps at least 79 % of the teacher is still the random one that it began "
            "as; 0.68 leaves next to nothing of it",
        ),
    ],
)
def test_what_works_and_may_not_be_meant_is_said(
    changes: dict[str, Any], line: str | None, dataset: Path, tmp_path: Path
) -> None:
    lines = preflight.remarks(replace(tiny_config(tmp_path, dataset), **changes), NUM_TRAIN)
    assert [text[: len(line or "")] for text in lines] == ([line] if line else [])
