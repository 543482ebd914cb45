"""SimCLR (Chen et al. 2020, "A simple framework for contrastive learning of visual representations").

With two variants of its loss: positives by label (SupCon, Khosla et al. 2020, "Supervised contrastive learning") and
positives left out of the denominator (DCL, Yeh et al. 2022, "Decoupled contrastive learning"), which needs smaller batches.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
from torch.nn import functional as F

from dist_contrastive import distributed
from dist_contrastive.batch import Batch, Samples
from dist_contrastive.config import MethodConfig, require_positive
from dist_contrastive.losses.infonce import nt_xent, supervised
from dist_contrastive.methods.base import Embeddings, Losses, Method


@dataclass(frozen=True)
class SimCLRConfig(MethodConfig):
    """SimCLR and two variants of its loss."""

    name: Annotated[str, tyro.conf.Fixed] = "simclr"
    temperature: float = 0.1
    """Divides the cosine similarities; smaller weighs the hardest negatives more."""
    positives: Literal["views", "labels"] = "views"
    """views: the other views of the sample; labels: all views of all samples of its label (SupCon)."""
    decoupled: bool = False
    """Leave positives out of the denominator (DCL)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("--method.temperature", self.temperature)

    @property
    def needs_labels(self) -> bool:
        return self.positives == "labels"


class SimCLR(Method[SimCLRConfig]):
    """NT-Xent over the embeddings of all ranks, all views in one forward pass."""

    def embed(self, batch: Batch) -> Embeddings:
        return {"z": F.normalize(self.project(batch), dim=-1)}

    def loss(self, embeddings: Embeddings, samples: Samples) -> Losses:
        num_views = len(embeddings["z"])
        anchors = embeddings["z"].flatten(0, 1)
        everyone = distributed.gather_with_grad(anchors)
        offset = distributed.row_offset(len(anchors))
        temperature, decoupled = self.config.temperature, self.config.decoupled
        if self.config.needs_labels:
            labels = distributed.all_gather(samples.labels.repeat(num_views))
            loss = supervised(anchors, everyone, labels, offset=offset, temperature=temperature, decoupled=decoupled)
        else:
            loss = nt_xent(
                anchors, everyone, offset=offset, num_views=num_views, temperature=temperature, decoupled=decoupled
            )
        return {"loss": loss}
