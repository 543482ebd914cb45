"""Recipes on CIFAR-10, one a method, and those for particular machines."""

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

DATA = DataConfig(path=Path("data/cifar10.beton"), image_size=32)
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
VIEW = ViewConfig(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
WITHOUT_BLUR = AugmentConfig((replace(VIEW, count=2, blur=0.0),), CIFAR10_MEAN, CIFAR10_STD)


def cifar10_simclr() -> TrainConfig:
    """SimCLR, ResNet-50, batch 256.

    The reference.

    Command:  accelerate launch --config_file launch_configs/single_gpu.yaml -m dist_contrastive.train cifar10_simclr
    Cost:     unknown, 1 GPU; 80 epochs of ResNet-50 at 32×32; about 2 hours are expected on one A100-class GPU.
    Expected: linear 0.88; the aim, at least.
    Source:   hyper-parameters as stated by the project's reference; small stem from SimCLR, appendix B.9.
    """
    return TrainConfig(
        recipe="cifar10_simclr",
        run_dir=Path("runs/cifar10_simclr"),
        epochs=80,
        method=SimCLRConfig(temperature=0.07, projector=HeadConfig(layers=2, output_size=128)),
        data=DATA,
        augment=AugmentConfig((VIEW, replace(VIEW, solarize=0.2)), CIFAR10_MEAN, CIFAR10_STD),
        encoder=EncoderConfig(name="resnet50", stem="small", norm="sync", dropout=0.1),
        batch=BatchConfig(size=256),
        optim=OptimConfig(name="adamw", learning_rate=3e-4, weight_decay=1e-4),
        probe=ProbeConfig(every=20),
    )


def cifar10_simclr_4096() -> TrainConfig:
    """SimCLR, LARS, batch 4096.

    The large-batch regime with a ResNet-50.

    Command:  accelerate launch --config_file launch_configs/node_8gpu.yaml -m dist_contrastive.train cifar10_simclr_4096
    Cost:     unknown, 8 GPUs; 100 epochs; about 10 GiB a GPU on eight of them at bf16 are expected.
    Expected: linear 0.93; about that, by SimCLR's figure B.7 at 100 epochs and batch 4096 after tuning the rate.
    Source:   SimCLR, appendix B.9 (LARS, weight decay 1e-6, temperature 0.5, learning rate 1.0 at 256, no blur).
    """
    base = cifar10_simclr()
    return replace(
        base,
        recipe="cifar10_simclr_4096",
        run_dir=Path("runs/cifar10_simclr_4096"),
        epochs=100,
        method=SimCLRConfig(temperature=0.5, projector=HeadConfig(layers=2, output_size=128)),
        augment=WITHOUT_BLUR,
        encoder=replace(base.encoder, dropout=0.0),
        batch=BatchConfig(size=4096),
        optim=OptimConfig(name="lars", learning_rate=1.0, weight_decay=1e-6, warmup_epochs=10),
    )


def cifar10_simclr_4096_t4() -> TrainConfig:
    """SimCLR's 4096 on a 16 GB GPU.

    A ResNet-18, with gradient caching in micro-batches that the memory plan finds.

    Command:  accelerate launch --config_file launch_configs/t4.yaml -m dist_contrastive.train cifar10_simclr_4096_t4
    Cost:     unknown, 1 GPU; 100 epochs of ResNet-18, encoded twice forward. Memory at fp16 as the plan predicts it for 16 GB:
              12.9 GiB a step with micro-batches of 3,128 or fewer, 2.2 GiB with 512, 16.9 GiB without
              (benchmarks/records/2026-11-24_2cpu_memory).
    Expected: unknown; as cifar10_simclr_4096, but for a ResNet-18: SimCLR's figure B.7 is of a ResNet-50.
    Source:   cifar10_simclr_4096; gradient caching from Gao et al. 2021. BatchNorm sees one micro-batch at a time.
    """
    base = cifar10_simclr_4096()
    return replace(
        base,
        recipe="cifar10_simclr_4096_t4",
        run_dir=Path("runs/cifar10_simclr_4096_t4"),
        encoder=replace(base.encoder, name="resnet18", norm="batch"),
        batch=BatchConfig(size=4096, micro="auto"),
        checkpoint=CheckpointConfig(every=5),
    )


def _resnet18(recipe: str, method: MethodConfig) -> TrainConfig:
    """What the recipes below share: the setting in which lightly's benchmark compares methods, so that scores compare."""
    base = cifar10_simclr()
    return replace(
        base,
        recipe=recipe,
        run_dir=Path("runs") / recipe,
        epochs=200,
        method=method,
        augment=WITHOUT_BLUR,
        encoder=EncoderConfig(name="resnet18", stem="small", norm="batch"),
        batch=BatchConfig(size=512),
        optim=OptimConfig(name="sgd", learning_rate=0.12, weight_decay=5e-4, warmup_epochs=10),
        probe=ProbeConfig(every=50),
        checkpoint=CheckpointConfig(every=10),
    )


def cifar10_margin() -> TrainConfig:
    """Margin loss, hardest negatives.

    Command:  accelerate launch --config_file launch_configs/single_gpu.yaml -m dist_contrastive.train cifar10_margin
    Cost:     unknown, 1 GPU; 200 epochs of ResNet-18 at 32×32.
    Expected: unknown; no source reports this method in this setting.
    Source:   Chopra, Hadsell and LeCun 2005; setting of lightly's CIFAR-10 benchmark (SGD 0.06 per 128, batch 512).
    """
    return _resnet18("cifar10_margin", MarginConfig(margin=1.4))


def cifar10_supcon() -> TrainConfig:
    """SupCon: positives by label.

    The upper end of what these encoders can learn in this setting.

    Command:  accelerate launch --config_file launch_configs/single_gpu.yaml -m dist_contrastive.train cifar10_supcon
    Cost:     unknown, 1 GPU; 200 epochs of ResNet-18 at 32×32.
    Expected: linear 0.960; the paper's (ResNet-50, 1000 epochs, table 2), with labels.
    Source:   Khosla et al. 2020 (temperature 0.1); setting of lightly's CIFAR-10 benchmark.
    """
    return _resnet18("cifar10_supcon", SimCLRConfig(temperature=0.1, positives="labels"))


def cifar10_dcl() -> TrainConfig:
    """DCL: decoupled SimCLR.

    The denominator is without positives.

    Command:  accelerate launch --config_file launch_configs/single_gpu.yaml -m dist_contrastive.train cifar10_dcl
    Cost:     unknown, 1 GPU; 200 epochs of ResNet-18 at 32×32.
    Expected: unknown; no source of this project reports this method in this setting.
    Source:   Yeh et al. 2022 (temperature 0.1); setting of lightly's CIFAR-10 benchmark.
    """
    return _resnet18("cifar10_dcl", SimCLRConfig(temperature=0.1, decoupled=True))


def cifar10_moco() -> TrainConfig:
    """MoCo v2, queue of 4,096 keys.

    Command:  accelerate launch --config_file launch_configs/single_gpu.yaml -m dist_contrastive.train cifar10_moco
    Cost:     unknown, 1 GPU; 200 epochs of ResNet-18 at 32×32.
    Expected: kNN 0.847; lightly's benchmark at 200 epochs.
    Source:   the MoCo authors' CIFAR-10 demonstration (queue 4,096, momentum 0.99, temperature 0.1); setting of lightly's
              CIFAR-10 benchmark.
    """
    return _resnet18("cifar10_moco", MoCoConfig(queue=4096, momentum=0.99, temperature=0.1))


def cifar10_moco_t4() -> TrainConfig:
    """MoCo v2 for a small GPU.

    A queue of 65,536 negatives, whatever batch the memory holds.

    Command:  accelerate launch --config_file launch_configs/t4.yaml -m dist_contrastive.train cifar10_moco_t4
    Cost:     unknown, 1 GPU; 200 epochs of ResNet-18. Memory at fp16 as the plan predicts it for 16 GB: 1.0 GiB a step
              with the whole batch at once (benchmarks/records/2026-11-24_2cpu_memory).
    Expected: kNN 0.847; lightly's benchmark at 200 epochs with its 4,096 keys.
    Source:   MoCo v2 (queue 65,536, momentum 0.999, temperature 0.2); setting of lightly's CIFAR-10 benchmark, batch 256.
    """
    config = _resnet18("cifar10_moco_t4", MoCoConfig())
    return replace(config, batch=BatchConfig(size=256, micro="auto"))


def cifar10_mocov3() -> TrainConfig:
    """MoCo v3.

    No queue, a predictor, both directions.

    Command:  accelerate launch --config_file launch_configs/single_gpu.yaml -m dist_contrastive.train cifar10_mocov3
    Cost:     unknown, 1 GPU; 200 epochs of ResNet-18 at 32×32.
    Expected: linear 0.931; solo-learn's (ResNet-18, batch 256, 1000 epochs).
    Source:   Chen, Xie and He 2021; temperature 0.2 as solo-learn; setting of lightly's CIFAR-10 benchmark.
    """
    return _resnet18("cifar10_mocov3", MoCoV3Config(temperature=0.2))


def cifar10_byol() -> TrainConfig:
    """BYOL.

    Command:  accelerate launch --config_file launch_configs/single_gpu.yaml -m dist_contrastive.train cifar10_byol
    Cost:     unknown, 1 GPU; 200 epochs of ResNet-18 at 32×32.
    Expected: kNN 0.868; lightly's benchmark at 200 epochs.
    Source:   Grill et al. 2020; heads of 1,024 and 256 and setting of lightly's CIFAR-10 benchmark.
    """
    method = BYOLConfig(projector=HeadConfig(hidden_size=1024, output_size=256), predictor=HeadConfig(hidden_size=1024))
    return _resnet18("cifar10_byol", method)


def cifar10_simsiam() -> TrainConfig:
    """SimSiam.

    Command:  accelerate launch --config_file launch_configs/single_gpu.yaml -m dist_contrastive.train cifar10_simsiam
    Cost:     unknown, 1 GPU; 200 epochs of ResNet-18 at 32×32.
    Expected: linear 0.918; the paper's at 800 epochs (appendix D).
    Source:   Chen and He 2021, appendix D (2-layer projector of 2,048); setting of lightly's CIFAR-10 benchmark.
    """
    projector = HeadConfig(layers=2, hidden_size=2048, output_size=2048, output_norm=True)
    return _resnet18("cifar10_simsiam", SimSiamConfig(projector=projector))


def cifar10_barlow() -> TrainConfig:
    """Barlow Twins.

    Command:  accelerate launch --config_file launch_configs/single_gpu.yaml -m dist_contrastive.train cifar10_barlow
    Cost:     unknown, 1 GPU; 200 epochs of ResNet-18 at 32×32.
    Expected: linear 0.921; solo-learn's (ResNet-18, batch 256, 1000 epochs).
    Source:   Zbontar et al. 2021; projector of 2,048 as lightly's and solo-learn's on CIFAR-10.
    """
    config = _resnet18(
        "cifar10_barlow", BarlowConfig(projector=HeadConfig(layers=3, hidden_size=2048, output_size=2048))
    )
    return replace(config, optim=replace(config.optim, learning_rate=0.03))


def cifar10_vicreg() -> TrainConfig:
    """VICReg.

    Command:  accelerate launch --config_file launch_configs/single_gpu.yaml -m dist_contrastive.train cifar10_vicreg
    Cost:     unknown, 1 GPU; 200 epochs of ResNet-18 at 32×32.
    Expected: linear 0.921; solo-learn's (ResNet-18, batch 256, 1000 epochs).
    Source:   Bardes et al. 2022; projector of 2,048 as solo-learn's on CIFAR-10.
    """
    config = _resnet18(
        "cifar10_vicreg", VICRegConfig(projector=HeadConfig(layers=3, hidden_size=2048, output_size=2048))
    )
    return replace(config, optim=replace(config.optim, learning_rate=0.03))


def cifar10_cpc() -> TrainConfig:
    """CPC, grid of 7 × 7 patches.

    Patches of 8 pixels, one view an image.

    Command:  accelerate launch --config_file launch_configs/single_gpu.yaml -m dist_contrastive.train cifar10_cpc
    Cost:     unknown, 1 GPU; 200 epochs of ResNet-18 over 49 patches an image, three times the pixels of one view.
    Expected: unknown; no source reports this method in this setting.
    Source:   van den Oord et al. 2018, section 3.2 (grid, rows ahead); GroupNorm, as Henaff et al. 2020 found that
              BatchNorm harms CPC (section 3.2).
    """
    config = _resnet18("cifar10_cpc", CPCConfig())
    return replace(
        config,
        augment=config.augment.with_all(count=1),
        encoder=replace(config.encoder, norm="group"),
        optim=OptimConfig(name="adamw", learning_rate=5e-4, weight_decay=1e-4, warmup_epochs=10),
    )


def cifar10_cpu() -> TrainConfig:
    """SimCLR, small ResNet for CPUs.

    Two cores train it in under 40 minutes.

    Command:  accelerate launch --config_file launch_configs/cpu.yaml -m dist_contrastive.train cifar10_cpu
    Cost:     36 min, 2 cores; 8 epochs, with probes and report, measured.
    Measured: linear 0.561, kNN 0.523; beside raw pixels 0.410 and the untrained encoder 0.346
              (benchmarks/records/2026-11-24_2cpu_cifar10).
    Source:   SimCLR, appendix B.9, without blur; a quarter-width ResNet-10 for the time that two cores have.
    """
    return TrainConfig(
        recipe="cifar10_cpu",
        run_dir=Path("runs/cifar10_cpu"),
        epochs=8,
        method=SimCLRConfig(temperature=0.2, projector=HeadConfig(layers=2, hidden_size=512, output_size=128)),
        data=DATA,
        augment=WITHOUT_BLUR.with_all(crop_scale=(0.2, 1.0)),
        encoder=EncoderConfig(name="resnet10_w16", stem="small"),
        batch=BatchConfig(size=256),
        optim=OptimConfig(name="adamw", learning_rate=2e-3, weight_decay=1e-4, warmup_epochs=0.5),
        probe=ProbeConfig(every=2),
        checkpoint=CheckpointConfig(every=1),
    )


def cifar10_dino() -> TrainConfig:
    """DINO.

    Command:  accelerate launch --config_file launch_configs/single_gpu.yaml -m dist_contrastive.train cifar10_dino
    Cost:     unknown, 1 GPU; 200 epochs of ResNet-18 at 32×32.
    Expected: kNN 0.848; lightly's benchmark at 800 epochs.
    Source:   Caron et al. 2021; head (2,048, 256, with BatchNorm), 2,048 prototypes and setting of lightly's CIFAR-10 benchmark.
    """
    head = HeadConfig(layers=3, hidden_size=2048, output_size=256, activation="gelu")
    method = DINOConfig(projector=head, prototypes=2048, momentum=0.99, teacher_temperature_epochs=5.0)
    return _resnet18("cifar10_dino", method)


def cifar10_swav() -> TrainConfig:
    """SwAV.

    Command:  accelerate launch --config_file launch_configs/single_gpu.yaml -m dist_contrastive.train cifar10_swav
    Cost:     unknown, 1 GPU; 200 epochs of ResNet-18 at 32×32.
    Expected: kNN 0.884; lightly's benchmark at 800 epochs.
    Source:   Caron et al. 2020; head, 512 prototypes and setting of lightly's CIFAR-10 benchmark, without smaller crops.
    """
    projector = HeadConfig(layers=2, hidden_size=512, output_size=128)
    return _resnet18("cifar10_swav", SwAVConfig(projector=projector, prototypes=512))


def _vit(recipe: str, method: MethodConfig) -> TrainConfig:
    """A ViT-S with patches of 4 pixels, two views of 32 pixels and four of 16."""
    base = _resnet18(recipe, method)
    crops = replace(VIEW, count=4, size=16, crop_scale=(0.05, 0.32), blur=0.0)
    views = replace(VIEW, count=2, crop_scale=(0.32, 1.0), blur=0.0)
    return replace(
        base,
        augment=replace(base.augment, groups=(views, crops)),
        encoder=EncoderConfig(name="vit_small_patch16_224", patch_size=4, norm="group", drop_path=0.1),
        optim=OptimConfig(learning_rate=5e-4, weight_decay=0.04, weight_decay_end=0.4, warmup_epochs=10, clip_norm=3.0),
    )


def cifar10_ibot() -> TrainConfig:
    """iBOT, ViT-S/4.

    Command:  accelerate launch --config_file launch_configs/single_gpu.yaml -m dist_contrastive.train cifar10_ibot
    Cost:     unknown, 1 GPU; 200 epochs of a ViT-S with 64 patches.
    Expected: unknown; no source reports this method on CIFAR-10.
    Source:   Zhou et al. 2022, the authors' settings for ViT-S/16 on ImageNet, with fewer epochs and smaller images.
    """
    return _vit("cifar10_ibot", IBOTConfig())


def cifar10_dinov2() -> TrainConfig:
    """DINOv2, ViT-S/4.

    Command:  accelerate launch --config_file launch_configs/single_gpu.yaml -m dist_contrastive.train cifar10_dinov2
    Cost:     unknown, 1 GPU; 200 epochs of a ViT-S with 64 patches.
    Expected: unknown; no source reports this method on CIFAR-10.
    Source:   Oquab et al. 2023, with iBOT's optimizer for ViT-S and 8,192 prototypes.
    """
    return _vit("cifar10_dinov2", DINOv2Config(prototypes=8192, patch_prototypes=8192))


CAPTIONS_HEAD = HeadConfig(layers=1, output_size=128)
CAPTIONS_TEXT = TextConfig(vocabulary=512, context=32, width=128, layers=4, heads=4)


def _captions(recipe: str, method: MethodConfig) -> TrainConfig:
    """ResNet-18 and a small text tower on CIFAR-10 packed with --caption-templates: one lightly cropped view of each image."""
    config = _resnet18(recipe, method)
    view = replace(VIEW, crop_scale=(0.5, 1.0), jitter=0.0, grayscale=0.0, blur=0.0)
    data = replace(config.data, path=Path("data/cifar10_captions.beton"))
    return replace(config, data=data, augment=replace(config.augment, groups=(view,)))


def cifar10_clip() -> TrainConfig:
    """CLIP, captions of class names.

    Command:  accelerate launch --config_file launch_configs/single_gpu.yaml -m dist_contrastive.train cifar10_clip
    Cost:     unknown, 1 GPU; 200 epochs of ResNet-18 at 32×32.
    Expected: unknown; with captions of class names this learns from labels, and no source reports it.
    Source:   Radford et al. 2021 with a small text tower, on CIFAR-10 packed with --caption-templates; setting of lightly's
              CIFAR-10 benchmark.
    """
    return _captions("cifar10_clip", CLIPConfig(projector=CAPTIONS_HEAD, text=CAPTIONS_TEXT))


def cifar10_siglip() -> TrainConfig:
    """SigLIP, captions from classes.

    Command:  accelerate launch --config_file launch_configs/single_gpu.yaml -m dist_contrastive.train cifar10_siglip
    Cost:     unknown, 1 GPU; 200 epochs of ResNet-18 at 32×32.
    Expected: unknown; with captions of class names this learns from labels, and no source reports it.
    Source:   Zhai et al. 2023 with a small text tower, on CIFAR-10 packed with --caption-templates; setting of lightly's
              CIFAR-10 benchmark.
    """
    return _captions("cifar10_siglip", SigLIPConfig(projector=CAPTIONS_HEAD, text=CAPTIONS_TEXT))
