"""The class token's attention, against what timm computes where it does not fuse."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dist_contrastive.config import EncoderConfig
from dist_contrastive.models.attention import last_attention
from dist_contrastive.models.base import Encoder
from dist_contrastive.models.encoders import build_encoder

WITH_CLASS_TOKEN = [
    ("vit_w96_d4", 32),
    ("deit_tiny_distilled_patch16_224", 32),
    ("vit_tiny_patch16_dinov3_qkvb", 32),  # registers, and positions by rotation
    ("eva02_tiny_patch14_224", 28),
]


def built(name: str, image_size: int) -> tuple[Encoder, Tensor]:
    torch.manual_seed(0)
    return build_encoder(EncoderConfig(name=name), image_size).eval(), torch.randn(2, 3, image_size, image_size)


@pytest.mark.parametrize(("name", "image_size"), WITH_CLASS_TOKEN)
def test_it_is_the_attention_of_the_last_block(name: str, image_size: int) -> None:
    encoder, images = built(name, image_size)
    found = last_attention(encoder, images)
    assert found is not None
    assert found.shape[2] == encoder.grid(image_size) ** 2
    assert not found.requires_grad
    body: Any = encoder.body
    last = body.blocks[-1].attn
    last.fused_attn = False
    seen: list[Tensor] = []
    last.attn_drop.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    encoder(images)
    torch.testing.assert_close(found, seen[0][:, :, 0, body.num_prefix_tokens :].detach())


@pytest.mark.parametrize(("name", "image_size"), WITH_CLASS_TOKEN)
def test_it_sums_to_less_than_one_and_leaves_the_encoder_as_it_is(name: str, image_size: int) -> None:
    encoder, images = built(name, image_size)
    before = encoder(images)
    found = last_attention(encoder, images)
    assert found is not None
    assert (found >= 0).all()
    assert (found.sum(-1) < 1).all(), "the class token attends to itself, too"
    assert torch.equal(encoder(images), before)


def test_images_of_another_size_have_another_number_of_patches() -> None:
    encoder, _ = built("vit_w96_d4", 32)
    found = last_attention(encoder, torch.randn(2, 3, 48, 48))
    assert found is not None
    assert found.shape == (2, 3, 144)


@pytest.mark.parametrize(
    "name", ["resnet10_w16", "test_vit_relpos", "gmlp_ti16_224"]  # no patches; no class token; no attention
)  # fmt: skip
def test_an_encoder_whose_class_token_attends_to_no_patches_has_none(name: str) -> None:
    assert last_attention(*built(name, 32)) is None
