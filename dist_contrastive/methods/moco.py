"""MoCo v2 (He et al. 2020, "Momentum contrast for unsupervised visual representation learning"; Chen et al. 2020, "Improved
baselines with momentum contrastive learning")."""

from dataclasses import dataclass
from typing import Annotated

import torch
import tyro
from torch import Tensor
from torch.nn import functional as F

from dist_contrastive import distributed
from dist_contrastive.batch import Batch, Samples, balanced_slices
from dist_contrastive.config import TeacherConfig, require, require_positive
from dist_contrastive.losses.infonce import queue_nce
from dist_contrastive.losses.statistics import positive_cosine
from dist_contrastive.methods.base import Embeddings, Losses, Method, MethodSettings, Report
from dist_contrastive.rng import Stream, fold
from dist_contrastive.schedules import Clock

QUERY, KEY = 0, 1  # the views


@dataclass(frozen=True)
class MoCoConfig(TeacherConfig):
    """Defaults of MoCo v2 and the authors' code (moco-k, moco-m, moco-t of version 2); the head has a normalization between
    its two layers, which theirs has not."""

    name: Annotated[str, tyro.conf.Fixed] = "moco"
    queue: int = 65536
    """How many past keys are the negatives; a multiple of the global batch."""
    momentum: float = 0.999
    """The teacher's, constant."""
    temperature: float = 0.2
    """Divides the cosine similarities."""
    norm_groups: int = 8
    """In how many groups BatchNorm sees the samples of a forward pass; they stand for the GPUs of the paper. Encoders without
    batch statistics take no notice."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.queue >= 1, f"--method.queue {self.queue}: give at least the global batch")
        require_positive("--method.temperature", self.temperature)
        require(self.norm_groups >= 1, f"--method.norm-groups {self.norm_groups}: give at least 1")

    def check_global_batch(self, size: int) -> None:
        require(
            self.queue % size == 0,
            f"--method.queue {self.queue}: must be a multiple of --batch.global {size}; give "
            f"{max(size, self.queue // size * size)}",
        )

    def remarks(self, num_train: int, num_seen: int, global_batch: int) -> list[str]:
        lines = super().remarks(num_train, num_seen, global_batch)
        if self.queue > num_seen:
            lines.append(
                f"--method.queue {self.queue}: the run makes {num_seen:,} keys; the random ones it begins with stay to the end"
            )
        elif self.queue > num_train:
            lines.append(
                f"--method.queue {self.queue} holds more keys than there are training samples ({num_train:,}): earlier keys of a "
                "sample are among its negatives"
            )
        return lines


class MoCo(Method[MoCoConfig]):
    """A query looks for its key among the keys of past batches.

    The queue is a buffer that all ranks fill with the keys of all ranks, so it is the same on each without ever being sent.
    """

    max_views = 2
    couples_samples = False
    target = "k"  # section 3.2
    queue: Tensor
    queue_pointer: Tensor

    def __init__(self, settings: MethodSettings[MoCoConfig]) -> None:
        super().__init__(settings)
        self.norm_groups = 1 if self.norm == "group" else self.config.norm_groups
        rows = F.normalize(torch.randn(self.config.queue, self.config.projector.output_size), dim=1)
        self.register_buffer("queue", rows)
        self.register_buffer("queue_pointer", torch.zeros((), dtype=torch.int64))

    def embed(self, batch: Batch) -> Embeddings:
        """Queries, normalized by BatchNorm in groups of their own samples.

        Statistics over the whole batch would betray which key belongs to a query: both would be normalized by the same
        samples, unlike the keys in the queue. So both are embedded in groups, as on several GPUs, and the groups of the
        keys are of shuffled samples (shuffling BN, He et al. 2020, section 3.3): a query and its key have few samples in
        common.
        """
        queries = batch.views[0][QUERY : QUERY + 1]
        groups = [(queries[:, group], batch.samples.part(group)) for group in self._groups(batch)]
        query = F.normalize(torch.cat([self.project_views(*group) for group in groups], dim=1), dim=-1)
        return {"z": query.detach(), "q": query}

    def targets(self, batch: Batch) -> Embeddings:
        """Keys, in groups of other samples than the queries'."""
        order = fold(self.keys(batch.samples, KEY), int(Stream.SHUFFLE)).argsort()
        images = batch.views[0][KEY][order]
        shuffled = torch.cat([self.teach(images[None, group])[0] for group in self._groups(batch)])
        key = F.normalize(torch.empty_like(shuffled).index_copy_(0, order, shuffled), dim=-1)
        return {"k": key[None]}

    def _groups(self, batch: Batch) -> list[slice]:
        """Slices over the samples."""
        return balanced_slices(len(batch), self.groups_of_norm(len(batch)))

    def groups_of_norm(self, num_samples: int) -> int:
        """`norm_groups`, or fewer, so that each has at least two samples."""
        return max(1, min(self.norm_groups, num_samples // 2))

    def loss(self, embeddings: Embeddings, samples: Samples) -> Losses:
        loss = queue_nce(embeddings["q"][0], embeddings["k"][0], self.queue, temperature=self.config.temperature)
        return {"loss": loss}

    def report(self, embeddings: Embeddings, *, logged: bool) -> Report:
        pair = torch.cat([embeddings["q"], embeddings["k"]]).detach()
        return {**super().report(embeddings, logged=logged), "positive_cosine": positive_cosine(pair)}

    def teacher_momentum(self, progress: float) -> float:
        return self.config.momentum

    def after_step(self, clock: Clock, embeddings: Embeddings, done: Tensor) -> None:
        super().after_step(clock, embeddings, done)
        keys = distributed.all_gather(embeddings["k"][0])
        # On the device, which the host would have to wait for to know the pointer.
        places = (torch.arange(len(keys), device=keys.device) + self.queue_pointer) % len(self.queue)
        self.queue.index_copy_(0, places, keys.where(done, self.queue[places]))
        self.queue_pointer.add_(done * len(keys)).remainder_(len(self.queue))
