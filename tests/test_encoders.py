"""Encoders and heads: any timm model by name, its tokens, masks and other image sizes, the small stem, the norms, the
projector, dropout by key."""

import itertools
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

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
    assert (encoder.patch_size, encoder.grid(32)) == (4, 8)
    assert encoder.features(torch.zeros(2, 3, 32, 32)).tokens.shape == (2, 64, width)


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


# Tokens.

FAMILIES = [
    ("resnet10_w16", 32, 1, 128),
    ("vit_w96_d4", 32, 64, 96),
    ("test_vit", 32, 4, 64),
    ("deit_tiny_distilled_patch16_224", 32, 4, 192),  # a second token before the patches
    ("vit_small_patch14_reg4_dinov2", 28, 4, 384),  # registers
    ("vit_tiny_patch16_dinov3_qkvb", 32, 4, 192),  # registers, and positions by rotation
    ("eva02_tiny_patch14_224", 28, 4, 192),
    ("cait_xxs24_224", 32, 4, 192),  # its class token comes late
    ("xcit_nano_12_p16_224", 32, 4, 128),
    ("test_vit_relpos", 32, 4, 96),  # no class token
    ("gmlp_ti16_224", 32, 4, 128),
    ("swin_tiny_patch4_window7_224", 56, 4, 768),  # maps in channels_last
    ("test_mambaout", 32, 1, 64),  # and a layer between pooling and classifier
    ("mobilenetv3_small_050", 64, 4, 288),
    ("test_convnext", 64, 4, 64),
    ("test_efficientnet", 64, 4, 256),
    ("test_byobnet", 64, 4, 256),
    ("test_nfnet", 64, 4, 192),
    ("regnetx_002", 64, 4, 368),
]


@pytest.mark.parametrize(("name", "image_size", "num_tokens", "token_size"), FAMILIES)
def test_features_are_the_models_own_bit_for_bit_with_tokens_beside_them(
    name: str, image_size: int, num_tokens: int, token_size: int
) -> None:
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(name=name), image_size).eval()
    images = torch.randn(2, 3, image_size, image_size)
    features = encoder.features(images)
    assert torch.equal(features.pooled, encoder.body(images))
    assert torch.equal(features.pooled, encoder(images))
    assert features.tokens.shape == (2, num_tokens, token_size)
    assert features.tokens.isfinite().all()


def test_tokens_of_a_vision_transformer_are_its_normalized_patches() -> None:
    encoder = build_encoder(EncoderConfig(name="vit_small_patch14_reg4_dinov2"), 28).eval()
    seen: list[Tensor] = []
    encoder.body.norm.register_forward_hook(lambda module, inputs, output: seen.append(output))  # type: ignore[union-attr]
    tokens = encoder.features(torch.randn(2, 3, 28, 28)).tokens
    assert seen[0].shape[1] == 1 + 4 + 4  # the class token, registers, patches
    assert torch.equal(tokens, seen[0][:, 5:])


@pytest.mark.parametrize(("name", "last"), [("resnet10_w16", "layer4"), ("swin_tiny_patch4_window7_224", "norm")])
def test_tokens_of_a_map_are_its_places_row_by_row(name: str, last: str) -> None:
    encoder = build_encoder(EncoderConfig(name=name), 96).eval()
    seen: list[Tensor] = []
    encoder.body.get_submodule(last).register_forward_hook(lambda module, inputs, output: seen.append(output))
    tokens = encoder.features(torch.randn(2, 3, 96, 96)).tokens
    found = seen[0].permute(0, 3, 1, 2) if last == "norm" else seen[0]
    assert found.shape[2:] == (3, 3)
    for row, column in itertools.product(range(3), range(3)):
        assert torch.equal(tokens[:, 3 * row + column], found[:, :, row, column])


@pytest.mark.parametrize(("name", "image_size"), [("pit_ti_224", 56), ("crossvit_tiny_240", 240)])
def test_a_model_whose_features_have_no_places_has_pooled_ones_alone(name: str, image_size: int) -> None:
    encoder = build_encoder(EncoderConfig(name=name), image_size).eval()
    images = torch.zeros(1, 3, image_size, image_size)
    assert encoder(images).shape == (1, encoder.feature_size)
    with pytest.raises(
        UserError, match=f"--encoder.name {name} has no features of places; choose a vision transformer"
    ):
        encoder.features(images)


# Image sizes and patches.

INTERPOLATED = [
    ("vit_w96_d4", 32),
    ("deit_tiny_distilled_patch16_224", 64),
    ("vit_tiny_patch16_dinov3_qkvb", 64),
    ("eva02_tiny_patch14_224", 56),
]


@pytest.mark.parametrize(("name", "image_size"), [*INTERPOLATED, ("resnet10_w16", 32), ("test_convnext", 64)])
def test_at_its_own_size_an_encoder_is_timms_model_bit_for_bit(name: str, image_size: int) -> None:
    """Weights, their names, features and gradients; so its file loads in plain timm."""
    torch.manual_seed(3)
    encoder = build_encoder(EncoderConfig(name=name, drop_path=0.1), image_size).eval()
    torch.manual_seed(3)
    options: dict[str, Any] = {} if name in ("resnet10_w16", "test_convnext") else {"img_size": image_size}
    plain = timm.create_model(name, num_classes=0, **options).eval().to(memory_format=torch.channels_last)
    own, theirs = encoder.body.state_dict(), plain.state_dict()
    assert list(own) == list(theirs)
    assert all(torch.equal(own[key], theirs[key]) for key in own)
    images = torch.randn(2, 3, image_size, image_size)
    assert torch.equal(encoder(images), plain(images))
    encoder(images).square().sum().backward()
    plain(images).square().sum().backward()
    for (key, one), other in zip(encoder.body.named_parameters(), plain.parameters(), strict=True):
        assert one.grad is not None, key
        assert other.grad is not None, key
        assert torch.equal(one.grad, other.grad), key
    plain.load_state_dict({key: torch.zeros_like(value) for key, value in own.items()})


@pytest.mark.parametrize(("name", "image_size"), INTERPOLATED)
def test_a_vision_transformer_takes_images_of_other_sizes(name: str, image_size: int) -> None:
    encoder = build_encoder(EncoderConfig(name=name), image_size).eval()
    assert encoder.patch_size is not None
    native = torch.randn(2, 3, image_size, image_size)
    before = encoder(native)
    for patches in (1, 3, 9):
        side = patches * encoder.patch_size
        assert encoder.grid(side) == patches
        features = encoder.features(torch.randn(2, 3, side, side))
        assert features.tokens.shape[1] == patches**2
        assert features.pooled.isfinite().all()
        assert features.tokens.isfinite().all()
    positions = getattr(encoder.body, "pos_embed", None)
    if positions is not None:  # the last one turns queries and keys instead
        features.pooled.square().sum().backward()
        assert positions.grad.any()
    assert torch.equal(encoder(native), before)
    with pytest.raises(AssertionError, match="divisible by patch size"):
        encoder(torch.zeros(2, 3, side + 1, side + 1))


def test_a_vision_transformer_can_have_other_patches() -> None:
    encoder = build_encoder(EncoderConfig(name="vit_tiny_patch16_224", patch_size=4), 32)
    assert (encoder.patch_size, encoder.grid(32)) == (4, 8)
    assert encoder.features(torch.zeros(2, 3, 32, 32)).tokens.shape == (2, 64, 192)
    assert build_encoder(EncoderConfig(name="vit_tiny_patch16_224"), 32).patch_size == 16


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "convnext_atto",
        "swin_tiny_patch4_window7_224",  # merges its patches on the way
        "vit_tiny_r_s16_p8_224",  # has a ResNet before them
        "mixer_s32_224",  # has one size of them
    ],
)
def test_patches_of_a_chosen_size_are_for_vision_transformers(name: str) -> None:
    with pytest.raises(UserError) as caught:
        build_encoder(EncoderConfig(name=name, patch_size=4), 32)
    assert str(caught.value) == (
        f"--encoder.patch-size 4: {name} has no patches whose size can be chosen; leave it out, or choose a vision transformer, "
        "such as vit_small_patch16_224"
    )


# Masks.

MASKABLE = [
    ("vit_w96_d4", 16),
    ("deit_tiny_distilled_patch16_224", 64),
    ("vit_tiny_patch16_dinov3_qkvb", 64),
    ("cait_xxs24_224", 64),
    ("gmlp_ti16_224", 64),
]


@pytest.mark.parametrize(("name", "image_size"), MASKABLE)
def test_the_pixels_of_masked_patches_do_not_matter_and_others_do(name: str, image_size: int) -> None:
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(name=name), image_size).eval()
    patch, side = encoder.patch_size, encoder.grid(image_size)
    assert patch is not None
    assert side == 4
    images, token = torch.randn(2, 3, image_size, image_size), torch.randn(encoder.feature_size)
    mask = torch.zeros(2, side, side, dtype=torch.bool)
    mask[0, 1, 2] = mask[0, 3, 0] = mask[1, 0, 0] = True
    pixels = mask.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None]  # [N, 1, S, S]

    def features(images: Tensor) -> tuple[Tensor, Tensor]:
        return encoder.features(images, mask=mask.flatten(1), mask_token=token)

    expected = features(images)
    for found, one in zip(features(images + 5 * pixels * torch.randn_like(images)), expected, strict=True):
        assert torch.equal(found, one)
    other = images.clone()
    other[0, :, patch : 2 * patch, :patch] += 1  # a patch that is not masked
    pooled, tokens = features(other)
    assert not torch.equal(pooled[0], expected[0][0])
    assert torch.equal(pooled[1], expected[0][1])
    assert not torch.equal(tokens[0], expected[1][0])


@pytest.mark.parametrize(("name", "image_size"), MASKABLE)
def test_a_mask_of_nothing_changes_nothing_and_any_is_for_one_pass(name: str, image_size: int) -> None:
    encoder = build_encoder(EncoderConfig(name=name), image_size).eval()
    images, token = torch.randn(2, 3, image_size, image_size), torch.randn(encoder.feature_size)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    before = encoder.features(images)
    for found, one in zip(encoder.features(images, mask=mask, mask_token=token), before, strict=True):
        assert torch.equal(found, one)
    assert not torch.equal(encoder.features(images, mask=~mask, mask_token=token).tokens, before.tokens)
    assert torch.equal(encoder.features(images).tokens, before.tokens)


def test_the_token_takes_a_patchs_place_before_its_position_is_added() -> None:
    """All patches masked, the transformer sees the token and positions alone."""
    encoder = build_encoder(EncoderConfig(name="vit_w96_d4"), 16).eval()
    token = torch.randn(96, requires_grad=True)
    entering: list[Tensor] = []
    body: Any = encoder.body
    body.blocks.register_forward_pre_hook(lambda module, inputs: entering.append(inputs[0]))
    mask = torch.ones(2, 16, dtype=torch.bool)
    features = encoder.features(torch.randn(2, 3, 16, 16), mask=mask, mask_token=token)
    torch.testing.assert_close(entering[0][:, 1:], (token + body.pos_embed[:, 1:]).expand(2, -1, -1))
    features.tokens.square().sum().backward()
    assert token.grad is not None
    assert token.grad.any()


@pytest.mark.parametrize("name", ["resnet10_w16", "swin_tiny_patch4_window7_224"])
def test_what_has_no_patches_cannot_be_masked(name: str) -> None:
    encoder = build_encoder(EncoderConfig(name=name), 32)
    mask = torch.zeros(2, 1, dtype=torch.bool)
    with pytest.raises(UserError) as caught:
        encoder.features(torch.zeros(2, 3, 32, 32), mask=mask, mask_token=torch.zeros(8))
    assert str(caught.value) == (
        f"--encoder.name {name} has no patches that could be masked; choose a vision transformer of timm, such as "
        "vit_small_patch16_224"
    )
    with pytest.raises(UserError, match=f"--encoder.name {name} has no patches; choose a vision transformer of timm"):
        encoder.grid(32)


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
