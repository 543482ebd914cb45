"""Methods, each one file under the contract of `base.Method`."""

from typing import Any

from dist_contrastive.config import TrainConfig, require
from dist_contrastive.methods.barlow import Barlow
from dist_contrastive.methods.base import Method
from dist_contrastive.methods.byol import BYOL
from dist_contrastive.methods.clip import CLIP
from dist_contrastive.methods.cpc import CPC
from dist_contrastive.methods.dino import DINO
from dist_contrastive.methods.dinov2 import DINOv2
from dist_contrastive.methods.ibot import IBOT
from dist_contrastive.methods.margin import Margin
from dist_contrastive.methods.moco import MoCo
from dist_contrastive.methods.mocov3 import MoCoV3
from dist_contrastive.methods.siglip import SigLIP
from dist_contrastive.methods.simclr import SimCLR
from dist_contrastive.methods.simsiam import SimSiam
from dist_contrastive.methods.swav import SwAV
from dist_contrastive.methods.vicreg import VICReg

METHODS: dict[str, type[Method[Any]]] = {
    cls.Config.name: cls
    for cls in (
        Margin,
        SimCLR,
        MoCo,
        MoCoV3,
        BYOL,
        SimSiam,
        Barlow,
        VICReg,
        CPC,
        DINO,
        IBOT,
        DINOv2,
        SwAV,
        CLIP,
        SigLIP,
    )
}
"""By the names that their configs give them."""


def method_of(config: TrainConfig) -> type[Method[Any]]:
    """The class of the method that `config` names; `UserError` where it can't learn from such views."""
    cls, name = METHODS[config.method.name], config.method.name
    layout = config.augment.layout(config.data.image_size)
    sizes = " and ".join(str(size) for size, _, _ in layout)
    require(
        len(layout) == 1 or cls.multi_crop,
        f"--augment.size: {name} learns from views of one size, and these are of {sizes} pixels; give one size",
    )
    views, most = len(layout[0].views), cls.max_views
    wanted = f"exactly {most}" if most == cls.min_views else f"at least {cls.min_views}"
    of_size = f" of {layout[0].size} pixels, the first size" if len(layout) > 1 else ""
    require(
        cls.min_views <= views and (most is None or views <= most),
        f"--augment.count {views}: {name} needs {wanted} views{of_size}",
    )
    return cls
