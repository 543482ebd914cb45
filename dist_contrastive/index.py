"""`python -m dist_contrastive.index RUN SOURCE OUT`: images of SOURCE as vectors of a run, in an index of nearest neighbours.

SOURCE is a packed dataset (.beton), a folder of images, or a .parquet that embed wrote with this run: then nothing is encoded
anew. OUT is a folder, written whole or not at all. How neighbours are found is chosen by number and memory, and said: all vectors
one by one (flat), a graph (hnsw) or lists of coded vectors (ivfpq). With vectors that are not in it yet, recall@10 against exact
search and the time of a search are measured; a search takes the least effort that reaches --recall.

    python -m dist_contrastive.index runs/photos data/photos.beton runs/photos/index
    python -m dist_contrastive.index runs/photos vectors.parquet index --output embedding --kind hnsw
    python -m dist_contrastive.index runs/photos path/to/more index --add
    python -m dist_contrastive.index runs/photos - index --delete 17 18
    python -m dist_contrastive.index runs/photos - index --to milvus:http://localhost:19530

For SOURCE, - stands for nothing new. Ids are positions in SOURCE; what is added later gets the next ones.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dist_contrastive import cli
from dist_contrastive.config import require
from dist_contrastive.data.format import MAX_BAD
from dist_contrastive.run_folder.config import read_config

PROG = "python -m dist_contrastive.index"


@dataclass(frozen=True)
class IndexCommand:
    run: Annotated[Path, tyro.conf.Positional]
    """A run's folder."""
    source: Annotated[Path, tyro.conf.Positional]
    """A packed dataset (.beton), a folder of images, or vectors of embed (.parquet); - for nothing new."""
    out: Annotated[Path, tyro.conf.Positional]
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
    checkpoint: int | None = None
    """Take this step's checkpoint instead of the finished weights."""
    batch_size: int = 256
    """Images that go through the encoder at once."""
    threads: int = 0
    """Threads that decode; 0 takes one for each core that it may use, but for one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    split: Literal["all", "train", "test"] = "all"
    """Which part of a packed dataset."""
    max_bad: int = MAX_BAD
    """How many images of a folder may be left out because they can't be read. Files that are no images do not count."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, f"--batch-size {self.batch_size}: give 1 or more")
        require(self.threads >= 0, f"--threads {self.threads}: give 0 (automatic) or more")
        require(self.max_bad >= 0, f"--max-bad {self.max_bad}: give 0 (none) or more")
        if self.source == Path("-"):
            require(not self.add, "--add: give a SOURCE to add, not -")
            require(bool(self.delete or self.to), "SOURCE is -: then give --delete or --to")


def main(argv: Sequence[str] | None = None) -> None:
    command = cli.parse(IndexCommand, argv, prog=PROG, about=__doc__)
    read_config(command.run)  # a folder that holds no run is refused at once

    from dist_contrastive.searching.build import Settings
    from dist_contrastive.searching.indexing import Options, index
    from dist_contrastive.searching.structures import Parameters

    parameters = Parameters(command.links, command.build_effort, command.lists, command.code_bytes)
    settings = Settings(command.kind, command.recall, command.memory_gib, parameters, command.pictures)
    options = Options(
        run=command.run, source=None if command.source == Path("-") else command.source, out=command.out,
        output=command.output, add=command.add, delete=command.delete, to=command.to, settings=settings,
        checkpoint=command.checkpoint, batch_size=command.batch_size, threads=command.threads, device=command.device,
        split=command.split, max_bad=command.max_bad,
    )  # fmt: skip
    index(options)


if __name__ == "__main__":
    sys.exit(cli.main_guard(main))
