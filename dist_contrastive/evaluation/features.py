"""Features of a frozen encoder over samples of a packed dataset, shared out over the ranks."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from dist_contrastive import distributed, signals
from dist_contrastive.data.augment import Augment, to_normalized
from dist_contrastive.data.loader import Loader
from dist_contrastive.models.base import Encoder

BATCH_SIZE = 256


@contextmanager
def frozen(encoder: nn.Module) -> Iterator[None]:
    """Within the context `encoder` is in eval mode and nothing carries gradient; afterwards each module is as it was."""
    before = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        assert not any(module.training for module in encoder.modules()), "a probe sees the encoder in eval mode"
        with torch.no_grad():
            yield
    finally:
        for module, training in before:
            module.training = training


def extract(encoder: Encoder, loader: Loader, indices: np.ndarray, device: torch.device) -> Tensor:
    """Features float32 [n, D] of the samples `indices` int64 [n], in their order, on `device`, on every rank.

    Each rank encodes a contiguous share in fp32, so all ranks must call it with the same samples. Images are seen as the
    protocol says: the centred square (`DataConfig.eval_crop`), normalized, nothing random. Buffers are rank 0's: where
    BatchNorm is not synchronised, its running statistics differ between ranks, and rank 0's are the model's.
    """
    distributed.broadcast_buffers(encoder)
    share = np.array_split(indices, distributed.world_size())[distributed.rank()]

    def encode() -> Tensor:
        parts = [torch.empty(0, encoder.feature_size, device=device)]
        with frozen(encoder), loader.centered(share, batch_size=BATCH_SIZE) as batches:
            for batch in batches:
                signals.give_way()
                images = to_normalized(batch.views[0][0], loader.augment, device).contiguous(
                    memory_format=torch.channels_last
                )
                parts.append(encoder(images).float())
        return torch.cat(parts)

    return distributed.all_gather_rows(distributed.together(encode))


def extract_views(encoder: Encoder, loader: Loader, indices: np.ndarray, device: torch.device) -> Tensor:
    """Features float32 [V, n, D] of augmented views of the samples `indices` int64 [n], otherwise as `extract`.

    The views are those of the first size that training would make; where that is one, two of its kind.
    """
    augment = loader.augment.of_first_size(loader.data.image_size)
    num_views = augment.num_views
    distributed.broadcast_buffers(encoder)
    share = np.array_split(indices, distributed.world_size())[distributed.rank()]
    make_views = Augment(augment)
    batch_size = max(1, BATCH_SIZE // num_views)

    def encode() -> Tensor:
        parts = [torch.empty(0, num_views, encoder.feature_size, device=device)]
        with frozen(encoder), loader.views(share, batch_size=batch_size, augment=augment) as batches:
            for batch in batches:
                signals.give_way()
                (views,) = make_views(batch, device).views
                images = views.flatten(0, 1).contiguous(memory_format=torch.channels_last)
                parts.append(encoder(images).float().unflatten(0, (num_views, -1)).transpose(0, 1))
        return torch.cat(parts).flatten(1)

    rows = distributed.all_gather_rows(distributed.together(encode))
    return rows.unflatten(1, (num_views, -1)).transpose(0, 1)


def raw_pixels(loader: Loader, indices: np.ndarray, image_size: int, device: torch.device) -> Tensor:
    """The pixels themselves at S = `image_size` as features, float32 [n, 3·S·S] in [0, 1], on `device`; every rank reads all."""
    parts = []
    with loader.centered(indices, batch_size=BATCH_SIZE, image_size=image_size) as batches:
        for batch in batches:
            signals.give_way()
            parts.append(batch.views[0][0].flatten(1).to(device).float().div_(255))
    return torch.cat(parts)
