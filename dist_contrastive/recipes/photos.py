"""Recipes on the embedded photographs: no network, minutes on two CPU cores."""

from pathlib import Path

from dist_contrastive.config import (
    AugmentConfig,
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EncoderConfig,
    HeadConfig,
    OptimConfig,
    ProbeConfig,
    TrainConfig,
)  # fmt: skip
from dist_contrastive.methods.simclr import SimCLRConfig


def photos() -> TrainConfig:
    """SimCLR on 32×32 patches of 19 photographs: the demonstration.

    Command:  accelerate launch --config_file launch_configs/cpu.yaml -m dist_contrastive.train photos
    Cost:     3 epochs on two CPU cores; 165 s with packing and report, measured.
    Score:    linear 0.765 measured, beside raw pixels 0.414 and the untrained encoder 0.648
              (benchmarks/records/2026-11-24_2cpu_photos).
    Source:   SimCLR with weak colour jitter: what tells these photographs apart is largely their colour and brightness,
              which SimCLR's own strengths teach the encoder to ignore.
    """
    return TrainConfig(
        recipe="photos",
        run_dir=Path("runs/photos"),
        epochs=3,
        log_every=1,
        method=SimCLRConfig(temperature=0.2, projector=HeadConfig(layers=2, hidden_size=256, output_size=128)),
        data=DataConfig(path=Path("data/photos.beton"), image_size=32),
        augment=AugmentConfig(
            crop_scale=(0.25, 1.0),
            jitter=(0.5,),
            brightness=0.2,
            contrast=0.2,
            saturation=0.2,
            hue=0.05,
            grayscale=(0.0,),
            blur=(0.0,),
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
        ),
        encoder=EncoderConfig(name="resnet10_w16", stem="small"),
        batch=BatchConfig(size=256),
        optim=OptimConfig(name="adamw", learning_rate=2e-3, weight_decay=1e-4, warmup_epochs=0.3),
        probe=ProbeConfig(every=1),
        checkpoint=CheckpointConfig(every=1),
    )
