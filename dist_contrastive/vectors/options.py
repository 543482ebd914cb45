"""What commands that turn images into vectors are asked for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional

from dist_contrastive.config import require
from dist_contrastive.data.format import MAX_BAD

Split = Literal["all", "train", "test"]


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """Which weights, which images, and where."""

    checkpoint: int | None = None
    """Take this step's checkpoint instead of the finished weights."""
    batch_size: int = 256
    """Images that go through the encoder at once."""
    threads: int = 0
    """Threads of each rank that decode; 0 takes one for each core that it may use, but for one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    split: Split = "all"
    """Which part of a packed dataset."""
    max_bad: int = MAX_BAD
    """How many images of a folder may be left out because they can't be read. Files that are no images do not count."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, f"--batch-size {self.batch_size}: give 1 or more")
        require(self.threads >= 0, f"--threads {self.threads}: give 0 (automatic) or more")
        require(self.max_bad >= 0, f"--max-bad {self.max_bad}: give 0 (none) or more")


@dataclass(frozen=True, kw_only=True)
class EmbedOptions(ImageOptions):
    """What `embed` is asked for."""

    run: Annotated[Path, Positional]
    """A run's folder."""
    source: Annotated[Path, Positional]
    """A packed dataset (.beton), or a folder of images."""
    out: Annotated[Path, Positional]
    """Where the vectors go: a name that ends in .parquet or in .npy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.out.suffix in (".parquet", ".npy"), f"{self.out}: give a name for OUT that ends in .parquet or .npy"
        )
