"""Recipes on the embedded photographs: no network, minutes on two CPU cores."""

from pathlib import Path

from dist_contrastive.config import (
    AugmentConfig,
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EncoderConfig,
    OptimConfig,
    ProbeConfig,
    ProjectorConfig,
    TrainConfig,
)  # fmt: skip
from dist_contrastive.methods.simclr import SimCLRConfig


def photos() -> TrainConfig:
    """SimCLR on 32×32 patches of 19 photographs: the demonstration.

    Command:  accelerate launch --config_file launch_configs/cpu.yaml -m dist_contrastive.train photos
    """
    return TrainConfig(
        recipe="photos",
        run_dir=Path("runs/photos"),
        epochs=12,
        log_every=1,
        method=SimCLRConfig(temperature=0.2, projector=ProjectorConfig(layers=2, hidden_size=256, output_size=128)),
        data=DataConfig(path=Path("data/photos.beton"), image_size=32),
        augment=AugmentConfig(crop_scale=(0.2, 1.0), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), blur=(0.0,)),
        encoder=EncoderConfig(name="resnet10_w16", stem="small"),
        batch=BatchConfig(size=512),
        optim=OptimConfig(name="adamw", learning_rate=1e-3, weight_decay=1e-4, warmup_epochs=1),
        probe=ProbeConfig(every=4),
        checkpoint=CheckpointConfig(every=1),
    )
