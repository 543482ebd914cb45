"""Encoders and heads: any timm model by name, the small stem, the norms, the projector, dropout by key."""

import itertools

import pytest
import torch
from torch import nn

from dist_contrastive.config import EncoderConfig, HeadConfig, UserError
from dist_contrastive.models.encoders import build_encoder
from dist_contrastive.models.heads import KeyedDropout, build_head
from dist_contrastive.models.sync_norm import SyncBatchNorm
from dist_contrastive.rng import sample_keys


def modules_named(module: nn.Module, part: str) -> list[str]:
    return [type(child).__name__ for child in module.modules() if part in type(child).__name__]


@pytest.mark.parametrize(
    ("name", "image_size"),
    [
        ("resnet18", 32),
        ("resnet10_w16", 32),
        ("vit_tiny_patch16_224", 32),  # of a fixed input size, built for 32 pixels
        ("mobilenetv3_small_050", 32),  # has a layer between pooling and classifier
        ("convnext_atto", 32),
    ],
)
def test_any_timm_model_gives_features_of_the_size_it_says(name: str, image_size: int) -> None:
    encoder = build_encoder(EncoderConfig(name=name), image_size).eval()
    features = encoder(torch.zeros(2, 3, image_size, image_size))
    assert features.shape == (2, encoder.feature_size)


@pytest.mark.parametrize(("width", "millions"), [(16, 0.3), (32, 1.2), (64, 4.9)])
def test_the_small_resnets_have_the_size_their_docstrings_state(width: int, millions: float) -> None:
    encoder = build_encoder(EncoderConfig(name=f"resnet10_w{width}", stem="small"), 32)
    assert encoder.feature_size == 8 * width
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize(("width", "millions"), [(96, 0.46), (192, 1.8)])
def test_the_small_vision_transformers_cut_32_pixels_into_8_by_8_patches(width: int, millions: float) -> None:
    encoder = build_encoder(EncoderConfig(name=f"vit_w{width}_d4"), 32)
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)
    assert encoder.body.patch_embed.num_patches == 64  # type: ignore[union-attr]
    assert encoder(torch.zeros(2, 3, 32, 32)).shape == (2, width)


def test_an_unknown_name_gets_the_nearest_one() -> None:
    with pytest.raises(UserError, match=r"--encoder.name resnt50: timm has no such model; did you mean resnet50\?"):
        build_encoder(EncoderConfig(name="resnt50"), 32)


@pytest.mark.parametrize("name", ["resnet18", "resnet10_w16"])
def test_the_small_stem_keeps_the_resolution(name: str) -> None:
    def first_map(stem: str) -> tuple[int, ...]:
        body = build_encoder(EncoderConfig(name=name, stem=stem), 32).body  # type: ignore[arg-type]
        sizes: list[tuple[int, ...]] = []
        body.layer1.register_forward_hook(lambda module, args, out: sizes.append(tuple(out.shape[-2:])))  # type: ignore[union-attr]
        body(torch.zeros(2, 3, 32, 32))
        return sizes[0]

    assert first_map("small") == (32, 32)
    assert first_map("standard") == (8, 8)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto"])
def test_the_small_stem_is_for_resnets(name: str) -> None:
    with pytest.raises(UserError, match=f"--encoder.stem small: {name} is no ResNet; use --encoder.stem standard"):
        build_encoder(EncoderConfig(name=name, stem="small"), 32)


@pytest.mark.parametrize("name", ["resnet10_w16", "resnet50", "mobilenetv3_small_050"])
def test_group_norm_leaves_no_batch_norm(name: str) -> None:
    encoder = build_encoder(EncoderConfig(name=name, norm="group"), 32)
    assert modules_named(encoder, "BatchNorm") == []
    batch = build_encoder(EncoderConfig(name=name), 32)
    assert len(modules_named(encoder, "GroupNorm")) == len(modules_named(batch, "BatchNorm")) > 0
    assert {n: p.shape for n, p in encoder.named_parameters()} == {n: p.shape for n, p in batch.named_parameters()}


def test_with_group_norm_an_image_does_not_see_the_others() -> None:
    encoder = build_encoder(EncoderConfig(name="resnet10_w16", stem="small", norm="group"), 16).train()
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(encoder(images)[:2], encoder(images[:2]))


def test_group_norm_keeps_the_activation() -> None:
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(name="mobilenetv3_small_050", norm="group"), 32)
    assert modules_named(encoder, "Hardswish") == modules_named(
        build_encoder(EncoderConfig(name="mobilenetv3_small_050"), 32), "Hardswish"
    )


def test_kernels_lie_in_channels_last() -> None:
    encoder = build_encoder(EncoderConfig(name="resnet10_w16", stem="small"), 32)
    kernels = [p for p in encoder.parameters() if p.ndim == 4]
    assert kernels
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)


def test_the_weights_come_from_torchs_generator() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        encoder = build_encoder(EncoderConfig(name="resnet10_w16", stem="small"), 32)
        return torch.cat([p.detach().flatten() for p in encoder.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize(
    ("norm", "norm_type"), [("batch", nn.BatchNorm1d), ("sync", SyncBatchNorm), ("group", nn.LayerNorm)]
)
def test_the_projector_has_linear_layers_with_norm_and_relu_between_them(
    layers: int, norm: str, norm_type: type[nn.Module]
) -> None:
    projector = build_head(HeadConfig(layers=layers, hidden_size=7, output_size=5), 11, norm)  # type: ignore[arg-type]
    hidden = [nn.Linear, norm_type, nn.ReLU]
    assert [type(module) for module in projector] == [*hidden * (layers - 1), nn.Linear]
    linears = [module for module in projector if isinstance(module, nn.Linear)]
    sizes = [11, *[7] * (layers - 1), 5]
    assert [(linear.in_features, linear.out_features) for linear in linears] == list(itertools.pairwise(sizes))
    assert all(linear.bias is None for linear in linears)


def test_the_hidden_size_is_the_features_where_none_is_given() -> None:
    projector = build_head(HeadConfig(), 11, "group")
    assert projector[0].out_features == 11
    assert projector(torch.zeros(2, 11)).shape == (2, 128)


def test_dropout_replays_by_key() -> None:
    dropout = KeyedDropout(0.3).train()
    keys = sample_keys(seed=0, epoch=2, indices=torch.arange(64), view=1)
    features = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    dropped = dropout(features, keys)
    torch.manual_seed(123)  # whatever torch's own generator does
    assert torch.equal(dropout(features, keys), dropped)
    # A share of the samples in another order gets the same masks.
    assert torch.equal(dropout(features.flip(0)[:10], keys.flip(0)[:10]), dropped.flip(0)[:10])
    # Another view of the same samples gets others.
    other = dropout(features, sample_keys(seed=0, epoch=2, indices=torch.arange(64), view=0))
    assert not torch.equal(other == 0, dropped == 0)


def test_dropout_keeps_the_rate_and_the_mean() -> None:
    keys = sample_keys(seed=0, epoch=0, indices=torch.arange(1000), view=0)
    dropped = KeyedDropout(0.3).train()(torch.ones(1000, 100), keys)
    kept = dropped != 0
    # Five standard deviations of 100,000 draws; every sample and every feature for itself within five of its own.
    assert kept.float().mean().item() == pytest.approx(0.7, abs=5 * (0.21 / 1e5) ** 0.5)
    assert (kept.float().mean(0) - 0.7).abs().max() < 5 * (0.21 / 1000) ** 0.5
    assert (kept.float().mean(1) - 0.7).abs().max() < 5 * (0.21 / 100) ** 0.5
    torch.testing.assert_close(dropped[kept], torch.full_like(dropped[kept], 1 / 0.7))


def test_dropout_is_the_identity_in_eval_mode_and_at_probability_zero() -> None:
    features, keys = torch.randn(4, 8), torch.arange(4)
    assert KeyedDropout(0.5).eval()(features, keys) is features
    assert KeyedDropout(0.0).train()(features, keys) is features
