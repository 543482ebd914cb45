"""Recipes on the embedded photographs, one a method: no network, minutes on two CPU cores.

All share encoder, batch, epochs, optimizer and augmentation, those of the demonstration (`photos`), so that the methods compare.
What is a method's own is set for this scale: 406 steps, where the papers have hundreds of thousands.
"""

from dataclasses import replace
from pathlib import Path

from dist_contrastive.config import (
    AugmentConfig,
    BatchConfig,
    CheckpointConfig,
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
from dist_contrastive.methods.barlow import BarlowConfig
from dist_contrastive.methods.byol import BYOLConfig
from dist_contrastive.methods.clip import CLIPConfig
from dist_contrastive.methods.cpc import CPCConfig
from dist_contrastive.methods.dino import DINOConfig
from dist_contrastive.methods.dinov2 import DINOv2Config
from dist_contrastive.methods.ibot import IBOTConfig
from dist_contrastive.methods.margin import MarginConfig
from dist_contrastive.methods.moco import MoCoConfig
from dist_contrastive.methods.mocov3 import MoCoV3Config
from dist_contrastive.methods.siglip import SigLIPConfig
from dist_contrastive.methods.simclr import SimCLRConfig
from dist_contrastive.methods.simsiam import SimSiamConfig
from dist_contrastive.methods.swav import SwAVConfig
from dist_contrastive.methods.vicreg import VICRegConfig

PROJECTOR = HeadConfig(layers=2, hidden_size=256, output_size=128)
DISTILLING_HEAD = HeadConfig(layers=3, hidden_size=256, output_size=64, activation="gelu", hidden_norm=False)
VIEW = ViewConfig(
    crop_scale=(0.25, 1.0),
    jitter=0.5,
    brightness=0.2,
    contrast=0.2,
    saturation=0.2,
    hue=0.05,
    grayscale=0.0,
    blur=0.0,
)
LOCAL_CROPS = replace(VIEW, count=4, size=16, crop_scale=(0.05, 0.25))


def photos() -> TrainConfig:
    """SimCLR, the demonstration.

    Trained on 32×32 patches of 19 photographs.

    Command:  accelerate launch --config_file launch_configs/cpu.yaml -m dist_contrastive.train photos
    Cost:     138 s, 2 cores; 14 epochs, with packing and report, measured.
    Measured: linear 0.769, kNN 0.684; beside raw pixels 0.414 and 0.254 and the untrained encoder 0.479 and 0.267
              (benchmarks/records/2026-11-24_2cpu_demo).
    Source:   SimCLR with weak colour jitter, as these photographs differ by colour and brightness, and a stem of stride 4,
              with which the time holds five times the steps. How earlier settings compared: 2026-11-24_2cpu_photos.
    """
    return TrainConfig(
        recipe="photos",
        run_dir=Path("runs/photos"),
        epochs=14,
        log_every=10,
        method=SimCLRConfig(temperature=0.2, projector=PROJECTOR),
        data=DataConfig(path=Path("data/photos.beton"), image_size=32),
        augment=AugmentConfig((replace(VIEW, count=2),), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),
        encoder=EncoderConfig(name="resnet10_w16", stem="standard"),
        batch=BatchConfig(size=256),
        optim=OptimConfig(name="adamw", learning_rate=2e-3, weight_decay=1e-4, warmup_epochs=1.0),
        probe=ProbeConfig(every=7),
        checkpoint=CheckpointConfig(every=7),
    )


def _method(recipe: str, method: MethodConfig) -> TrainConfig:
    """The demonstration with another method."""
    return replace(photos(), recipe=recipe, run_dir=Path("runs") / recipe, method=method, probe=ProbeConfig())


def photos_supcon() -> TrainConfig:
    """SupCon: positives by label.

    The upper end of what this setting lets an encoder learn.

    Command:  accelerate launch --config_file launch_configs/cpu.yaml -m dist_contrastive.train photos_supcon
    Cost:     3-5 min, 1 core; 14 epochs, with another run beside it, measured.
    Measured: linear 0.808 ± 0.007, kNN 0.758 ± 0.020; over three seeds, beside the untrained
              encoder's 0.466 and 0.273 (benchmarks/records/2026-11-24_2cpu_methods).
    Source:   Khosla et al. 2020; temperature as in `photos`.
    """
    return _method("photos_supcon", SimCLRConfig(temperature=0.2, projector=PROJECTOR, positives="labels"))


def photos_dcl() -> TrainConfig:
    """DCL: decoupled SimCLR.

    The denominator is without positives.

    Command:  accelerate launch --config_file launch_configs/cpu.yaml -m dist_contrastive.train photos_dcl
    Cost:     3-5 min, 1 core; 14 epochs, with another run beside it, measured.
    Measured: linear 0.760 ± 0.012, kNN 0.694 ± 0.003; over three seeds, beside the untrained
              encoder's 0.466 and 0.273 (benchmarks/records/2026-11-24_2cpu_methods).
    Source:   Yeh et al. 2022; temperature as in `photos`.
    """
    return _method("photos_dcl", SimCLRConfig(temperature=0.2, projector=PROJECTOR, decoupled=True))


def photos_margin() -> TrainConfig:
    """Margin loss, all negatives.

    The squared hinge.

    Command:  accelerate launch --config_file launch_configs/cpu.yaml -m dist_contrastive.train photos_margin
    Cost:     3-5 min, 1 core; 14 epochs, with another run beside it, measured.
    Measured: linear 0.735 ± 0.008, kNN 0.652 ± 0.009; over three seeds, beside the untrained
              encoder's 0.466 and 0.273 (benchmarks/records/2026-11-24_2cpu_methods).
    Source:   Chopra, Hadsell and LeCun 2005; Hadsell, Chopra and LeCun 2006, equation 4.
    """
    return _method("photos_margin", MarginConfig(projector=PROJECTOR))


def photos_moco() -> TrainConfig:
    """MoCo v2, queue of 8 batches.

    Command:  accelerate launch --config_file launch_configs/cpu.yaml -m dist_contrastive.train photos_moco
    Cost:     3-5 min, 1 core; 14 epochs, with another run beside it, measured.
    Measured: linear 0.735 ± 0.001, kNN 0.683 ± 0.021; over three seeds, beside the untrained
              encoder's 0.466 and 0.273 (benchmarks/records/2026-11-24_2cpu_methods).
    Source:   MoCo v2; queue and momentum for some hundred steps, in which 0.999 would leave the teacher where it began.
    """
    return _method("photos_moco", MoCoConfig(projector=PROJECTOR, queue=2048, momentum=0.95))


def photos_mocov3() -> TrainConfig:
    """MoCo v3.

    Command:  accelerate launch --config_file launch_configs/cpu.yaml -m dist_contrastive.train photos_mocov3
    Cost:     3-5 min, 1 core; 14 epochs, with another run beside it, measured.
    Measured: linear 0.756 ± 0.012, kNN 0.676 ± 0.002; over three seeds, beside the untrained
              encoder's 0.466 and 0.273 (benchmarks/records/2026-11-24_2cpu_methods).
    Source:   Chen, Xie and He 2021; heads of 256 and 128, temperature 0.2, momentum for some hundred steps.
    """
    projector = replace(PROJECTOR, output_norm=True)
    method = MoCoV3Config(projector=projector, predictor=PROJECTOR, momentum=0.95, temperature=0.2)
    return _method("photos_mocov3", method)


def photos_byol() -> TrainConfig:
    """BYOL.

    Command:  accelerate launch --config_file launch_configs/cpu.yaml -m dist_contrastive.train photos_byol
    Cost:     3-5 min, 1 core; 14 epochs, with another run beside it, measured.
    Measured: linear 0.717 ± 0.012, kNN 0.634 ± 0.016; over three seeds, beside the untrained
              encoder's 0.466 and 0.273 (benchmarks/records/2026-11-24_2cpu_methods).
    Source:   Grill et al. 2020; heads of 256 and 128, momentum for some hundred steps.
    """
    return _method("photos_byol", BYOLConfig(projector=PROJECTOR, predictor=PROJECTOR, momentum=0.95))


def photos_simsiam() -> TrainConfig:
    """SimSiam.

    Command:  accelerate launch --config_file launch_configs/cpu.yaml -m dist_contrastive.train photos_simsiam
    Cost:     3-5 min, 1 core; 14 epochs, with another run beside it, measured.
    Measured: linear 0.688 ± 0.020, kNN 0.558 ± 0.040; over three seeds, beside the untrained
              encoder's 0.466 and 0.273 (benchmarks/records/2026-11-24_2cpu_methods).
    Source:   Chen and He 2021; heads an eighth of the paper's.
    """
    projector = HeadConfig(layers=3, hidden_size=256, output_size=256, output_norm=True)
    method = SimSiamConfig(projector=projector, predictor=HeadConfig(layers=2, hidden_size=64))
    return _method("photos_simsiam", method)


def photos_barlow() -> TrainConfig:
    """Barlow Twins.

    Command:  accelerate launch --config_file launch_configs/cpu.yaml -m dist_contrastive.train photos_barlow
    Cost:     3-5 min, 1 core; 14 epochs, with another run beside it, measured.
    Measured: linear 0.734 ± 0.018, kNN 0.663 ± 0.015; over three seeds, beside the untrained
              encoder's 0.466 and 0.273 (benchmarks/records/2026-11-24_2cpu_methods).
    Source:   Zbontar et al. 2021; a projector of 512.
    """
    return _method("photos_barlow", BarlowConfig(projector=HeadConfig(layers=2, hidden_size=512, output_size=512)))


def photos_vicreg() -> TrainConfig:
    """VICReg.

    Command:  accelerate launch --config_file launch_configs/cpu.yaml -m dist_contrastive.train photos_vicreg
    Cost:     3-5 min, 1 core; 14 epochs, with another run beside it, measured.
    Measured: linear 0.769 ± 0.008, kNN 0.701 ± 0.007; over three seeds, beside the untrained
              encoder's 0.466 and 0.273 (benchmarks/records/2026-11-24_2cpu_methods).
    Source:   Bardes et al. 2022; a projector of 512.
    """
    return _method("photos_vicreg", VICRegConfig(projector=HeadConfig(layers=2, hidden_size=512, output_size=512)))


def photos_cpc() -> TrainConfig:
    """CPC, grid of 3 × 3 patches.

    Overlapping patches of 16 pixels, one view an image.

    Command:  accelerate launch --config_file launch_configs/cpu.yaml -m dist_contrastive.train photos_cpc
    Cost:     9 min, 1 core; 14 epochs, with another run beside it, measured.
    Measured: linear 0.748 ± 0.012, kNN 0.679 ± 0.020; over three seeds, beside the untrained
              encoder's 0.466 and 0.273 (benchmarks/records/2026-11-24_2cpu_methods).
    Source:   van den Oord et al. 2018, section 3.2, with larger patches and fewer rows ahead, for images of 32 pixels.
    """
    method = CPCConfig(
        projector=HeadConfig(layers=1, output_size=128), patch_size=16, patch_stride=8, rows_ahead=2, context_size=128
    )
    config = _method("photos_cpc", method)
    return replace(config, augment=config.augment.with_all(count=1))


def _multi_crop(recipe: str, method: MethodConfig) -> TrainConfig:
    """The demonstration with another method, and with four views of half the side beside its two."""
    config = _method(recipe, method)
    return replace(config, augment=replace(config.augment, groups=(*config.augment.groups, LOCAL_CROPS)))


def _vit(recipe: str, method: MethodConfig) -> TrainConfig:
    """The same with a small ViT, which learns more slowly, and whose patches of 8 pixels leave time for it."""
    config = _multi_crop(recipe, method)
    return replace(
        config,
        epochs=20,
        encoder=EncoderConfig(name="vit_w96_d4", patch_size=8),
        optim=replace(config.optim, learning_rate=1e-3),
    )


def photos_dino() -> TrainConfig:
    """DINO, multi-crop.

    Two views of 32 pixels and four of 16.

    Command:  accelerate launch --config_file launch_configs/cpu.yaml -m dist_contrastive.train photos_dino
    Cost:     65 s, 2 cores; 14 epochs, with report, measured.
    Measured: linear 0.696 ± 0.014, kNN 0.658 ± 0.015; over three seeds, beside the untrained
              encoder's 0.468 ± 0.019 and 0.349 (benchmarks/records/2026-11-26_2cpu_views).
    Source:   Caron et al. 2021; fewer prototypes, and momentum and temperature for some hundred steps.
    """
    method = DINOConfig(
        projector=DISTILLING_HEAD,
        prototypes=1024,
        momentum=0.95,
        teacher_temperature=0.05,
        teacher_temperature_epochs=3.0,
    )
    return _multi_crop("photos_dino", method)


def photos_ibot() -> TrainConfig:
    """iBOT, a small ViT.

    Patches of 8 pixels; two views of 32 pixels and four of 16.

    Command:  accelerate launch --config_file launch_configs/cpu.yaml -m dist_contrastive.train photos_ibot
    Cost:     4.8 min, 2 cores; 20 epochs, with report, measured.
    Measured: linear 0.786 ± 0.017, kNN 0.685 ± 0.027; over three seeds, beside the untrained
              encoder's 0.632 ± 0.008 and 0.575 (benchmarks/records/2026-11-26_2cpu_views).
    Source:   Zhou et al. 2022; fewer prototypes, and momentum and temperature for some hundred steps.
    """
    method = IBOTConfig(
        projector=DISTILLING_HEAD,
        prototypes=1024,
        momentum=0.95,
        teacher_temperature=0.05,
        teacher_temperature_epochs=3.0,
    )
    return _vit("photos_ibot", method)


def photos_dinov2() -> TrainConfig:
    """DINOv2, a small ViT.

    Patches of 8 pixels; two views of 32 pixels and four of 16.

    Command:  accelerate launch --config_file launch_configs/cpu.yaml -m dist_contrastive.train photos_dinov2
    Cost:     5.5 min, 2 cores; 20 epochs, with report, measured.
    Measured: linear 0.778 ± 0.005, kNN 0.773 ± 0.007; over three seeds, beside the untrained
              encoder's 0.632 ± 0.008 and 0.575 (benchmarks/records/2026-11-26_2cpu_views).
    Source:   Oquab et al. 2023; fewer prototypes, and momentum and temperature for some hundred steps.
    """
    method = DINOv2Config(
        projector=DISTILLING_HEAD,
        prototypes=1024,
        patch_prototypes=1024,
        momentum=0.95,
        teacher_temperature=0.05,
        teacher_temperature_epochs=3.0,
    )
    return _vit("photos_dinov2", method)


def photos_swav() -> TrainConfig:
    """SwAV, multi-crop.

    Two views of 32 pixels and four of 16; as many prototypes as a step has samples.

    Command:  accelerate launch --config_file launch_configs/cpu.yaml -m dist_contrastive.train photos_swav
    Cost:     64 s, 2 cores; 14 epochs, with report, measured.
    Measured: linear 0.731 ± 0.011, kNN 0.685 ± 0.011; over three seeds, beside the untrained
              encoder's 0.468 ± 0.019 and 0.349 (benchmarks/records/2026-11-26_2cpu_views).
    Source:   Caron et al. 2020; 256 prototypes, without a queue.
    """
    return _multi_crop("photos_swav", SwAVConfig(projector=PROJECTOR, prototypes=256))


TEXT = TextConfig(vocabulary=512, context=32, width=96, layers=2, heads=4)


def _captions(recipe: str, method: MethodConfig) -> TrainConfig:
    """The demonstration's encoder on patches with captions: one lightly cropped view of each."""
    config = _method(recipe, method)
    view = ViewConfig(crop_scale=(0.5, 1.0), jitter=0.0, grayscale=0.0, blur=0.0)
    data = replace(config.data, path=Path("data/photo_captions.beton"))
    return replace(config, data=data, augment=replace(config.augment, groups=(view,)))


def photo_captions() -> TrainConfig:
    """CLIP on described patches.

    Command:  accelerate launch --config_file launch_configs/cpu.yaml -m dist_contrastive.train photo_captions
    Cost:     83 s, 2 cores; 14 epochs, with report, measured.
    Measured: linear 0.803 ± 0.012, kNN 0.785 ± 0.008; and zero-shot 0.713 ± 0.020, recall@5 of captions 0.655 ± 0.027; over three
              seeds, beside the untrained towers' 0.044 and 0.025 (benchmarks/records/2026-11-26_2cpu_pairs).
    Source:   Radford et al. 2021, with towers for two cores.
    """
    return _captions("photo_captions", CLIPConfig(projector=HeadConfig(layers=1, output_size=128), text=TEXT))


def photo_captions_siglip() -> TrainConfig:
    """SigLIP on described patches.

    Command:  accelerate launch --config_file launch_configs/cpu.yaml -m dist_contrastive.train photo_captions_siglip
    Cost:     86 s, 2 cores; 14 epochs, with report, measured.
    Measured: linear 0.801, kNN 0.790; one run (benchmarks/records/2026-11-26_2cpu_pairs).
    Source:   Zhai et al. 2023, with towers for two cores.
    """
    method = SigLIPConfig(projector=HeadConfig(layers=1, output_size=128), text=TEXT)
    return _captions("photo_captions_siglip", method)
