"""Features of a frozen encoder over samples of a packed dataset: encoded by all ranks, held by rank 0's host."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from dist_contrastive import distributed, signals
from dist_contrastive.data.augment import Augment
from dist_contrastive.data.loader import Loader
from dist_contrastive.evaluation.precision import full_precision
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


class HostRows:
    """Rows as they come from the device, in memory of the host."""

    def __init__(self, num_rows: int, row_shape: tuple[int, ...]) -> None:
        self.rows = torch.empty(num_rows, *row_shape)
        self._filled = 0
        self._coming: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def add(self, features: Tensor) -> None:
        """The next rows. A GPU sends them while it goes on; the host waits for those before them alone."""
        # On its way from a GPU into memory that is pinned; that of all rows would be too much to pin.
        self._coming.append((features.float().to("cpu", non_blocking=True), _recorded(features.device)))
        if len(self._coming) > 1:
            self._take()

    def _take(self) -> None:
        features, arrived = self._coming.popleft()
        if arrived is not None:
            arrived.synchronize()
        self.rows[self._filled : self._filled + len(features)] = features
        self._filled += len(features)

    def end(self) -> Tensor:
        """All rows that there is room for; those that came are in front."""
        while self._coming:
            self._take()
        return self.rows


def _recorded(device: torch.device) -> torch.cuda.Event | None:
    """What is over once the device has done all that it was given."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def _on_main(
    indices: np.ndarray, row_shape: tuple[int, ...], encode: Callable[[np.ndarray, Callable[[Tensor], None]], None]
) -> Tensor:
    """`encode(share, keep)` hands `keep` features [b, *row_shape] of this rank's share of the samples `indices`, batch by batch,
    on any device; those of all ranks, float32 [n, *row_shape] on rank 0's host, [0, *row_shape] elsewhere."""
    shares = np.array_split(indices, distributed.world_size())
    share = shares[distributed.rank()]
    host = HostRows(len(indices) if distributed.is_main() else len(share), row_shape)

    def fill() -> Tensor:
        encode(share, host.add)
        return host.end()

    rows = distributed.together(fill)
    distributed.gather_to_main(rows, [len(part) for part in shares])
    return rows if distributed.is_main() else rows.new_empty(0, *row_shape)


def extract(encoder: Encoder, loader: Loader, indices: np.ndarray, device: torch.device) -> Tensor:
    """Features float32 [n, D] of the samples `indices` int64 [n], in their order, on rank 0's host; elsewhere [0, D].

    Each rank encodes a contiguous share in fp32 on its `device`, so all ranks must call it with the same samples; batches leave
    the device as they come. Rank 0's host holds them all, once (10.5 GB of ImageNet's 1.28 M images at 2048 features), the others
    their share. Images are seen as the protocol says: `EvalView`, nothing random.
    Buffers are rank 0's: where BatchNorm is not synchronised, its running statistics differ between ranks, and rank 0's are the
    model's.
    """
    distributed.broadcast_buffers(encoder)

    def encode(share: np.ndarray, keep: Callable[[Tensor], None]) -> None:
        with frozen(encoder), full_precision(device), loader.centered(share, batch_size=BATCH_SIZE) as batches:
            for batch in batches:
                signals.give_way()
                images = loader.view.normalized(batch.views[0][0], device)
                keep(encoder(images.contiguous(memory_format=torch.channels_last)))

    return _on_main(indices, (encoder.feature_size,), encode)


def extract_views(encoder: Encoder, loader: Loader, indices: np.ndarray, device: torch.device) -> Tensor:
    """Features float32 [V, n, D] of augmented views of the samples `indices` int64 [n], otherwise as `extract`.

    The views are those of the first size that training would make; where that is one, two of its kind.
    """
    augment = loader.augment.of_first_size(loader.data.image_size)
    num_views = augment.num_views
    distributed.broadcast_buffers(encoder)
    make_views = Augment(augment)
    batch_size = max(1, BATCH_SIZE // num_views)

    def encode(share: np.ndarray, keep: Callable[[Tensor], None]) -> None:
        with (
            frozen(encoder),
            full_precision(device),
            loader.views(share, batch_size=batch_size, augment=augment) as batches,
        ):
            for batch in batches:
                signals.give_way()
                (views,) = make_views(batch, device).views
                images = views.flatten(0, 1).contiguous(memory_format=torch.channels_last)
                keep(encoder(images).unflatten(0, (num_views, -1)).transpose(0, 1))

    return _on_main(indices, (num_views, encoder.feature_size), encode).transpose(0, 1)


def raw_pixels(loader: Loader, indices: np.ndarray, image_size: int) -> Tensor:
    """The pixels themselves at S = `image_size` as features, bytes uint8 [n, 3·S·S] on the host; the calling rank reads all.

    At 32 px they take 154 MB of CIFAR-10, 3.9 GB of ImageNet. The probes take bytes as they are, and neither standardised
    features nor cosines depend on their scale.
    """
    pixels = torch.empty(len(indices), 3 * image_size**2, dtype=torch.uint8)
    start = 0
    with loader.centered(indices, batch_size=BATCH_SIZE, image_size=image_size) as batches:
        for batch in batches:
            signals.give_way()
            rows = batch.views[0][0].flatten(1)
            pixels[start : start + len(rows)] = rows
            start += len(rows)
    return pixels
