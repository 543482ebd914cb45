"""Methods, each one file under the contract of `base.Method`."""

from typing import Any

from dist_contrastive.config import TrainConfig, require
from dist_contrastive.methods.barlow import Barlow
from dist_contrastive.methods.base import Method
from dist_contrastive.methods.byol import BYOL
from dist_contrastive.methods.cpc import CPC
from dist_contrastive.methods.margin import Margin
from dist_contrastive.methods.moco import MoCo
from dist_contrastive.methods.mocov3 import MoCoV3
from dist_contrastive.methods.simclr import SimCLR
from dist_contrastive.methods.simsiam import SimSiam
from dist_contrastive.methods.vicreg import VICReg

METHODS: dict[str, type[Method[Any]]] = {
    cls.Config.name: cls for cls in (Margin, SimCLR, MoCo, MoCoV3, BYOL, SimSiam, Barlow, VICReg, CPC)
}
"""By the names that their configs give them."""


def method_of(config: TrainConfig) -> type[Method[Any]]:
    """The class of the method that `config` names; `UserError` where it can't learn from that number of views."""
    cls = METHODS[config.method.name]
    views, most = config.augment.num_views, cls.max_views
    wanted = f"exactly {most}" if most == cls.min_views else f"at least {cls.min_views}"
    require(
        cls.min_views <= views and (most is None or views <= most),
        f"--augment.num-views {views}: {config.method.name} needs {wanted} views",
    )
    return cls
