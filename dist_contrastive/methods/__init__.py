"""Methods, each one file under the contract of `base.Method`."""

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

METHODS: dict[str, type[Method]] = {
    "margin": Margin,
    "simclr": SimCLR,
    "moco": MoCo,
    "mocov3": MoCoV3,
    "byol": BYOL,
    "simsiam": SimSiam,
    "barlow": Barlow,
    "vicreg": VICReg,
    "cpc": CPC,
}
