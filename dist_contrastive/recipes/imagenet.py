"""Recipes on ImageNet-1k, packed with `python -m dist_contrastive.pack folder:DIR data/imagenet.beton`."""

from pathlib import Path

from dist_contrastive.config import (
    AugmentConfig,
    BatchConfig,
    DataConfig,
    EncoderConfig,
    HeadConfig,
    OptimConfig,
    ProbeConfig,
    TrainConfig,
    ViewConfig,
)  # fmt: skip
from dist_contrastive.methods.simclr import SimCLRConfig


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
