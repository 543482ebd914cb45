"""What `index` is asked for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional

from dist_contrastive.config import require
from dist_contrastive.vectors.options import ImageOptions

NOTHING = Path("-")
"""The source that has nothing new."""


@dataclass(frozen=True, kw_only=True)
class IndexOptions(ImageOptions):
    run: Annotated[Path, Positional]
    """A run's folder."""
    source: Annotated[Path, Positional]
    """A packed dataset (.beton), a folder of images, or vectors of embed (.parquet); - for nothing new."""
    out: Annotated[Path, Positional]
    """The index's folder."""
    output: Literal["feature", "embedding"] = "feature"
    """What is compared: what the encoder gives, or what the run's loss compared."""
    add: bool = False
    """Add to the index that is in OUT, with its kind and its parameters."""
    delete: tuple[int, ...] = ()
    """Ids to take out of the index."""
    to: str = ""
    """Put what the index holds into an engine as well: milvus:URI, of a server (milvus:http://host:19530) or of a local file
    (milvus:vectors.db)."""
    kind: Literal["auto", "flat", "hnsw", "ivfpq"] = "auto"
    """auto: flat up to 10,000 vectors, hnsw where its graph fits into --memory-gib, ivfpq otherwise."""
    recall: float = 0.95
    """Of the ten nearest neighbours, how many are to be found."""
    memory_gib: float = 0.0
    """What the index may take when it is searched; 0: half of what is free now."""
    links: int = 16
    """hnsw: links of a vector on each level."""
    build_effort: int = 100
    """hnsw: candidates while inserting (efConstruction)."""
    lists: int = 0
    """ivfpq: how many lists; 0: four times the square root of the number of vectors."""
    code_bytes: int = 0
    """ivfpq: bytes of a vector's code; 0: about a quarter of the dimension."""
    pictures: int = 96
    """Pixels a side, at most, of the pictures that are kept for showing, cut as the encoder sees them; 0: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source == NOTHING:
            require(not self.add, "--add: give a SOURCE to add, not -")
            require(bool(self.delete or self.to), "SOURCE is -: then give --delete or --to")
