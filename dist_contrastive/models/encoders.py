"""Encoders: any timm model by name, without its classifier, and small ResNets and vision transformers for CPUs and tests."""

import difflib
import functools
import math
from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.layers import BatchNormAct2d, DropPath, GroupNormAct, PatchEmbed
from timm.models import generate_default_cfgs, register_model
from timm.models.eva import Eva
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dist_contrastive.config import EncoderConfig, UserError, require
from dist_contrastive.models.base import Encoder
from dist_contrastive.models.drop_path import KeyedDropPath, PassKeys
from dist_contrastive.models.sync_norm import SyncBatchNorm

CHANNELS_PER_GROUP = 16  # GroupNorm, Wu and He 2018, table 3: as good as 32 groups, and it also serves narrow layers


def build_encoder(config: EncoderConfig, image_size: int) -> Encoder:
    """The encoder that `config` names, with random weights drawn from torch's global generator, in channels_last.

    `image_size` is the side of the images in pixels; models of a fixed input size (ViT) are built for it. Raises
    `UserError` for an unknown name (with the nearest one) and for what the model has not: a small stem, where it is no
    ResNet, patches, paths that can be dropped.
    """
    if not timm.is_model(config.name):
        nearest = difflib.get_close_matches(config.name, timm.list_models(), n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise UserError(f"--encoder.name {config.name}: timm has no such model{hint}")
    options = model_options(config, image_size)
    try:
        body = timm.create_model(config.name, pretrained=False, num_classes=0, **options)
    except TypeError as error:  # what a model's class does not take, it refuses by name
        require("drop_path_rate" not in str(error), _no_paths(config))
        require("patch_size" not in str(error), _no_patches(config))
        raise
    pass_keys = _key_paths(body, config)
    if config.stem == "small":
        _shrink_stem(body, config.name)
    if config.norm != "batch":
        body = _with_norm(body, {"group": _group_norm, "sync": _sync_norm}[config.norm])
    # Where a model has layers between pooling and classifier (MobileNetV3), they are part of it: its features are theirs.
    feature_size: Any = getattr(body, "head_hidden_size", None) or body.num_features
    encoder = Encoder(
        body,
        int(feature_size),
        config,
        image_size,
        patch_embedding=_patch_embedding(body),
        pass_keys=pass_keys,
    )
    return encoder.to(memory_format=torch.channels_last)


def model_options(config: EncoderConfig, image_size: int) -> dict[str, Any]:
    """What timm's `create_model` is given beside the name of the model that timm knows; `UserError` as `build_encoder`."""
    options: dict[str, Any] = {}
    cfg = timm.get_pretrained_cfg(config.name, allow_unregistered=True)
    if cfg is not None and cfg.fixed_input_size and cfg.input_size[-1] != image_size:
        options["img_size"] = image_size
    has_patches, takes_other_sizes = _traits(config.name)
    if takes_other_sizes:
        options["dynamic_img_size"] = True
    if config.patch_size:
        require(has_patches, _no_patches(config))
        options["patch_size"] = config.patch_size
    if config.drop_path:
        options["drop_path_rate"] = config.drop_path
    return options


@functools.cache
def _traits(name: str) -> tuple[bool, bool]:
    """Whether the tokens of the timm model `name` are patches, and whether its class interpolates position embeddings."""
    with torch.device("meta"):
        body = timm.create_model(name, pretrained=False, num_classes=0)
    has_patches = _patch_embedding(body) is not None
    return has_patches, has_patches and isinstance(body, VisionTransformer | Eva)


def _patch_embedding(body: nn.Module) -> str | None:
    """The name of the module that cuts images into patches, if these are what the tokens stand for to the end."""
    found = [(name, module) for name, module in body.named_modules() if isinstance(module, PatchEmbed)]
    stages: Any = getattr(body, "feature_info", None)
    if len(found) != 1 or not isinstance(stages, list) or not stages:
        return None
    name, embedding = found[0]
    # A Swin transformer merges its patches on the way.
    return name if stages[-1]["reduction"] == embedding.patch_size[0] else None


def _no_patches(config: EncoderConfig) -> str:
    return (
        f"--encoder.patch-size {config.patch_size}: {config.name} has no patches whose size can be chosen; leave it out, or "
        "choose a vision transformer, such as vit_small_patch16_224"
    )


def _no_paths(config: EncoderConfig) -> str:
    return f"--encoder.drop-path {config.drop_path:g}: {config.name} has no paths that can be dropped; leave it out"


def _key_paths(body: nn.Module, config: EncoderConfig) -> PassKeys:
    """Put `KeyedDropPath` in the place of the model's own, which some have without being asked; where its layers get keys."""
    pass_keys, layer = PassKeys(), 0
    for module in list(body.modules()):
        for name, child in module.named_children():
            if isinstance(child, DropPath):
                keyed = KeyedDropPath(child.drop_prob, layer, pass_keys)
                setattr(module, name, keyed if config.drop_path else nn.Identity())
                layer += 1
    require(layer > 0 or config.drop_path == 0, _no_paths(config))
    return pass_keys


def _shrink_stem(body: nn.Module, name: str) -> None:
    """Replace a ResNet's stem by a 3×3 convolution of stride 1 without max-pool (SimCLR, appendix B.9)."""
    if not isinstance(body, ResNet):
        raise UserError(f"--encoder.stem small: {name} is no ResNet; use --encoder.stem standard")
    stem = nn.Conv2d(3, len(body.bn1.weight), kernel_size=3, stride=1, padding=1, bias=False)  # type: ignore[arg-type]
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    body.conv1 = stem  # type: ignore[assignment]
    body.maxpool = nn.Identity()  # type: ignore[assignment]


def _with_norm(module: nn.Module, replace: Callable[[_BatchNorm], nn.Module]) -> nn.Module:
    """The module with each BatchNorm replaced by what `replace` makes of it, weights and activations kept."""
    if isinstance(module, _BatchNorm):
        norm = replace(module)
        norm.weight, norm.bias = module.weight, module.bias  # keeps a zero-initialised last norm zero
        return norm
    for child_name, child in module.named_children():
        setattr(module, child_name, _with_norm(child, replace))
    return module


def _group_norm(norm: _BatchNorm) -> nn.Module:
    num_groups = _num_groups(norm.num_features)
    if not isinstance(norm, BatchNormAct2d):
        return nn.GroupNorm(num_groups, norm.num_features)
    group_norm = GroupNormAct(norm.num_features, num_groups=num_groups)
    group_norm.drop, group_norm.act = norm.drop, norm.act
    return group_norm


class _SyncBatchNormAct(SyncBatchNorm):
    """SyncBatchNorm with the dropout and the activation that timm puts into some of its norms."""

    def __init__(self, norm: BatchNormAct2d) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum)
        self.drop, self.act = norm.drop, norm.act

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.act(self.drop(super().forward(input)))
        return output


def _sync_norm(norm: _BatchNorm) -> nn.Module:
    if isinstance(norm, BatchNormAct2d):
        return _SyncBatchNormAct(norm)
    return SyncBatchNorm(norm.num_features, norm.eps, norm.momentum)


def _num_groups(num_channels: int) -> int:
    return num_channels // math.gcd(num_channels, CHANNELS_PER_GROUP)


def _without_pretraining(options: dict[str, Any]) -> dict[str, Any]:
    """What timm passes to a model's function, without what is about pretrained weights."""
    others = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
    return {key: value for key, value in options.items() if key not in others}


def _resnet10(width: int, **kwargs: Any) -> ResNet:
    """Four stages of one basic block each, `width` to 8·`width` channels."""
    # A stem of type "deep" is timm's way to a stem narrower than 64 channels: it ends in 2·stem_width.
    options = _without_pretraining(kwargs)
    channels = (width, 2 * width, 4 * width, 8 * width)
    block: Any = BasicBlock
    return ResNet(block, (1, 1, 1, 1), channels=channels, stem_type="deep", stem_width=width // 2, **options)


@register_model
def resnet10_w16(**kwargs: Any) -> ResNet:
    """ResNet-10 of a quarter of the usual width: 0.3 M parameters."""
    return _resnet10(16, **kwargs)


@register_model
def resnet10_w32(**kwargs: Any) -> ResNet:
    """ResNet-10 of half the usual width: 1.2 M parameters."""
    return _resnet10(32, **kwargs)


@register_model
def resnet10_w64(**kwargs: Any) -> ResNet:
    """ResNet-10 of the usual width: 4.9 M parameters."""
    return _resnet10(64, **kwargs)


default_cfgs = generate_default_cfgs(
    {name: {"input_size": (3, 32, 32), "fixed_input_size": True} for name in ("vit_w96_d4", "vit_w192_d4")}
)
"""Where timm looks for what its models were made for: those of this file that are of a fixed size."""


def _vit(width: int, **kwargs: Any) -> VisionTransformer:
    """Four blocks of `width` features, heads of 32, patches of 4 pixels: 8 × 8 of them in an image of 32."""
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": width, "depth": 4, "num_heads": width // 32}
    return VisionTransformer(**{**sizes, **_without_pretraining(kwargs)})


@register_model
def vit_w96_d4(**kwargs: Any) -> VisionTransformer:
    """Vision transformer of half the width of ViT-Ti and a third of its depth: 0.5 M parameters."""
    return _vit(96, **kwargs)


@register_model
def vit_w192_d4(**kwargs: Any) -> VisionTransformer:
    """Vision transformer of the width of ViT-Ti and a third of its depth: 1.8 M parameters."""
    return _vit(192, **kwargs)
