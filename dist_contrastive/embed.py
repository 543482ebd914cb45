"""`python -m dist_contrastive.embed RUN SOURCE OUT`: the images of SOURCE as vectors of a run, into a table or an array.

SOURCE is a packed dataset (.beton) or a folder of images, at any depth and without classes. OUT.parquet is a data set of parts,
which pandas and pyarrow read as one table; OUT.npy is one array with named fields. Both have each image's index,
its path or its label where there is one, its feature (what the encoder gives) and its embedding (what the loss compared).

    python -m dist_contrastive.embed runs/photos data/photos.beton vectors.parquet
    python -m dist_contrastive.embed runs/photos path/to/images vectors.npy --max-bad 0
    python -m dist_contrastive.embed runs/photos data/photos.beton test.npy --split test --checkpoint 18
    accelerate launch --config_file launch_configs/cpu.yaml -m dist_contrastive.embed runs/photos path/to/images vectors.parquet

Several ranks share the work, and the result is the same. What was stopped goes on when the same command is given again.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dist_contrastive import cli, distributed, liveness, slurm
from dist_contrastive.config import UserError, require
from dist_contrastive.data.format import MAX_BAD

PROG = "python -m dist_contrastive.embed"


@dataclass(frozen=True)
class EmbedCommand:
    run: Annotated[Path, tyro.conf.Positional]
    """A run's folder."""
    source: Annotated[Path, tyro.conf.Positional]
    """A packed dataset (.beton), or a folder of images."""
    out: Annotated[Path, tyro.conf.Positional]
    """Where the vectors go: a name that ends in .parquet or in .npy."""
    checkpoint: int | None = None
    """Take this step's checkpoint instead of the finished weights."""
    batch_size: int = 256
    """Images that go through the encoder at once."""
    threads: int = 0
    """Threads of each rank that decode; 0 takes one for each core that it may use, but for one."""
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
        require(
            self.out.suffix in (".parquet", ".npy"), f"{self.out}: give a name for OUT that ends in .parquet or .npy"
        )


def main(argv: Sequence[str] | None = None) -> None:
    slurm.adopt_slurm()
    liveness.end_with_launcher()
    command = cli.parse(EmbedCommand, argv, prog=PROG, about=__doc__)

    from dist_contrastive.vectors.embedding import Options, embed

    try:
        finished = embed(Options(**vars(command)))
    except (UserError, KeyboardInterrupt):
        distributed.shut_down()
        raise
    distributed.shut_down()
    # A launcher that restarts its ranks takes any status but 0 for a failure, and would not let them stop.
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if not finished and not restarts:
        sys.exit(cli.EXIT_STOPPED)


if __name__ == "__main__":
    liveness.run_rank(main)
