"""Recipes on ImageNet-1k, packed with `python -m dist_contrastive.pack folder:DIR data/imagenet.beton`."""

from dataclasses import replace
from pathlib import Path

from dist_contrastive.config import (
    AugmentConfig,
    BatchConfig,
    DataConfig,
    EncoderConfig,
    HeadConfig,
    MethodConfig,
    OptimConfig,
    ProbeConfig,
    TextConfig,
    TrainConfig,
    ViewConfig,
)  # fmt: skip
from dist_contrastive.methods.clip import CLIPConfig
from dist_contrastive.methods.dino import DINOConfig
from dist_contrastive.methods.dinov2 import DINOv2Config
from dist_contrastive.methods.ibot import IBOTConfig
from dist_contrastive.methods.siglip import SigLIPConfig
from dist_contrastive.methods.simclr import SimCLRConfig
from dist_contrastive.methods.swav import SwAVConfig


def imagenet_simclr_4096() -> TrainConfig:
    """SimCLR as published.

    ResNet-50, LARS, global batch 4096, 100 epochs.

    Command:  accelerate launch --config_file launch_configs/node_8gpu.yaml -m dist_contrastive.train imagenet_simclr_4096
    Cost:     unknown, 8 GPUs; 100 epochs; GPUs of 80 GB hold the whole batch at once.
    Expected: linear 0.645; the paper's (100 epochs, table B.1).
    Source:   SimCLR, appendix A and B.6: learning rate 0.3 per 256, weight decay 1e-6, 10 epochs of warm-up,
              temperature 0.1, colour strength 1.0, blur 0.5.
    """
    return TrainConfig(
        recipe="imagenet_simclr_4096",
        run_dir=Path("runs/imagenet_simclr_4096"),
        epochs=100,
        method=SimCLRConfig(temperature=0.1, projector=HeadConfig(layers=2, output_size=128)),
        data=DataConfig(path=Path("data/imagenet.beton"), image_size=224, eval_crop=0.875),
        augment=AugmentConfig((ViewConfig(count=2, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2),)),
        encoder=EncoderConfig(name="resnet50", stem="standard", norm="sync"),
        batch=BatchConfig(size=4096),
        optim=OptimConfig(name="lars", learning_rate=0.3, weight_decay=1e-6, warmup_epochs=10),
        probe=ProbeConfig(every=10),
    )


def _multi_crop(
    recipe: str, method: MethodConfig, *, epochs: int, scale: float, crops: int, encoder: EncoderConfig
) -> TrainConfig:
    """What DINO, iBOT and DINOv2 share: two unlike views of 224 pixels of at least `scale` of an image, and smaller crops of at
    most that much."""
    view = ViewConfig(crop_scale=(scale, 1.0), saturation=0.2, blur=1.0)
    local = replace(view, count=crops, size=96, crop_scale=(0.05, scale), blur=0.5)
    base = imagenet_simclr_4096()
    return replace(
        base,
        recipe=recipe,
        run_dir=Path("runs") / recipe,
        epochs=epochs,
        method=method,
        augment=AugmentConfig((view, replace(view, blur=0.1, solarize=0.2), local)),
        encoder=encoder,
        batch=BatchConfig(size=1024),
        optim=OptimConfig(learning_rate=5e-4, weight_decay=0.04, weight_decay_end=0.4, warmup_epochs=10, clip_norm=3.0),
    )


def imagenet_dino() -> TrainConfig:
    """DINO, ViT-S/16, batch 512.

    Two views of 224 pixels and eight of 96.

    Command:  accelerate launch --config_file launch_configs/node_8gpu.yaml -m dist_contrastive.train imagenet_dino
    Cost:     unknown, 8 GPUs; 100 epochs, 1.75 days on 8 V100 by the authors.
    Expected: linear 0.740; the authors' at 100 epochs, with kNN 0.693.
    Source:   the authors' command for ViT-S at 100 epochs (64 images on each of 8 GPUs); the whole gradient is clipped, not each
              parameter's, and prototypes have unit length.
    """
    method = DINOConfig(teacher_temperature=0.04, teacher_temperature_epochs=0.0)
    encoder = EncoderConfig(name="vit_small_patch16_224", norm="group", drop_path=0.1)
    config = _multi_crop("imagenet_dino", method, epochs=100, scale=0.4, crops=8, encoder=encoder)
    return replace(config, batch=BatchConfig(size=512))


def imagenet_ibot() -> TrainConfig:
    """iBOT, ViT-S/16, batch 1024.

    Two views of 224 pixels and ten of 96.

    Command:  accelerate launch --config_file launch_configs/node_8gpu.yaml -m dist_contrastive.train imagenet_ibot
    Cost:     unknown, 8 GPUs; 800 epochs.
    Expected: linear 0.779; the paper's, table 1, with kNN 0.752.
    Source:   the authors' command for ViT-S/16; the whole gradient is clipped, not each parameter's, and prototypes have unit
              length.
    """
    encoder = EncoderConfig(name="vit_small_patch16_224", norm="group", drop_path=0.1)
    return _multi_crop("imagenet_ibot", IBOTConfig(), epochs=800, scale=0.25, crops=10, encoder=encoder)


def imagenet_dinov2() -> TrainConfig:
    """DINOv2, ViT-L/16, batch 2048.

    Two views of 224 pixels and eight of 96.

    Command:  accelerate launch --config_file launch_configs/multi_node.yaml -m dist_contrastive.train imagenet_dinov2
    Cost:     unknown, 32 GPUs; 100 epochs, about a day on 32 A100 by the authors.
    Expected: unknown; the authors' short schedule has linear 0.829 and kNN 0.816 with a shared head and a moving center.
    Source:   the authors' short schedule (vitl16_short.yaml), whose rate is 0.004 · √(batch / 1024), with the paper's two heads
              and Sinkhorn-Knopp; without its smaller rate for the patch embedding and without layer scale.
    """
    encoder = EncoderConfig(name="vit_large_patch16_224", norm="group", drop_path=0.3)
    method = DINOv2Config(prototypes=65536, patch_prototypes=65536)
    config = _multi_crop("imagenet_dinov2", method, epochs=100, scale=0.32, crops=8, encoder=encoder)
    optim = OptimConfig(
        learning_rate=7.07e-4,
        weight_decay=0.04,
        weight_decay_end=0.4,
        warmup_epochs=10,
        clip_norm=3.0,
        layer_decay=0.9,
    )
    return replace(config, batch=BatchConfig(size=2048), optim=optim)


def imagenet_swav() -> TrainConfig:
    """SwAV, ResNet-50, batch 4096.

    Two views of 224 pixels and six of 96.

    Command:  accelerate launch --config_file launch_configs/multi_node.yaml -m dist_contrastive.train imagenet_swav
    Cost:     unknown, 64 GPUs; 800 epochs.
    Expected: linear 0.753; the paper's, table 1.
    Source:   the paper, appendix A, and the authors' code (LARS, 4.8 at 4,096, weight decay 1e-6, 3,000 prototypes).
    """
    base = imagenet_simclr_4096()
    view = ViewConfig(count=2, crop_scale=(0.14, 1.0), brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, blur=0.5)
    return replace(
        base,
        recipe="imagenet_swav",
        run_dir=Path("runs/imagenet_swav"),
        epochs=800,
        method=SwAVConfig(),
        augment=AugmentConfig((view, replace(view, count=6, size=96, crop_scale=(0.05, 0.14)))),
    )


def _captions(recipe: str, method: MethodConfig, encoder: str, optim: OptimConfig) -> TrainConfig:
    """What CLIP and SigLIP share: 32 epochs of pairs, 32,768 at a time, each image seen once in a square crop."""
    base = imagenet_simclr_4096()
    view = ViewConfig(crop_scale=(0.9, 1.0), jitter=0.0, grayscale=0.0, blur=0.0, flip=0.0)
    return replace(
        base,
        recipe=recipe,
        run_dir=Path("runs") / recipe,
        epochs=32,
        method=method,
        data=replace(base.data, path=Path("data/imagenet_captions.beton")),
        augment=AugmentConfig((view,)),
        encoder=EncoderConfig(name=encoder, norm="sync"),
        batch=BatchConfig(size=32768),
        optim=optim,
    )


def imagenet_clip() -> TrainConfig:
    """CLIP, ViT-B/32, batch 32,768.

    On ImageNet packed with --caption-templates; a collection of pairs of your own is a matter of --data.path.

    Command:  accelerate launch --config_file launch_configs/multi_node.yaml -m dist_contrastive.train imagenet_clip
    Cost:     unknown, 64 GPUs; 32 epochs.
    Expected: unknown; the paper's 0.632 zero-shot comes from 400 million pairs that are not public.
    Source:   the paper, tables 18 and 19 (ViT-B/32, AdamW, 5e-4 at 32,768, weight decay 0.2, beta 0.98), with as much of the
              run for warm-up as ImageNet's size allows, and crops of at least nine tenths, as open_clip has them;
              Adam's epsilon is 1e-8.
    """
    method = CLIPConfig(text=TextConfig(vocabulary=49408, context=76, width=512, layers=12, heads=8))
    optim = OptimConfig(learning_rate=5e-4 / 128, weight_decay=0.2, beta2=0.98, warmup_epochs=5)
    return _captions("imagenet_clip", method, "vit_base_patch32_clip_224", optim)


def imagenet_siglip() -> TrainConfig:
    """SigLIP, ViT-B/16, batch 32 K.

    On ImageNet packed with --caption-templates; a collection of pairs of your own is a matter of --data.path.

    Command:  accelerate launch --config_file launch_configs/multi_node.yaml -m dist_contrastive.train imagenet_siglip
    Cost:     unknown, 64 GPUs; 32 epochs.
    Expected: unknown; the paper's come from collections that are not public.
    Source:   the paper, sections 3.2 and 4 (1e-3, weight decay 1e-4, beta 0.95, bias -10, 64 tokens), with AdamW in place of
              Adafactor, as much of the run for warm-up as ImageNet's size allows, and crops of at least nine tenths.
    """
    text = TextConfig(vocabulary=32000, context=64, width=768, layers=12, heads=12)
    method = SigLIPConfig(projector=HeadConfig(layers=1, output_size=768), text=text, bias=-10.0)
    optim = OptimConfig(learning_rate=1e-3 / 128, weight_decay=1e-4, beta2=0.95, warmup_epochs=5)
    return _captions("imagenet_siglip", method, "vit_base_patch16_224", optim)
