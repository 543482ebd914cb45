"""Methods, each one file under the contract of `base.Method`."""

from dist_contrastive.methods.base import Method
from dist_contrastive.methods.simclr import SimCLR

METHODS: dict[str, type[Method]] = {"simclr": SimCLR}
