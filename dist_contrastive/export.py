"""`python -m dist_contrastive.export RUN [--checkpoint STEP] [--data PATH] [--out DIR]`: a run as ONNX, fp32 and int8, for use
without torch.

The graphs take uint8 images of any size and give features and embeddings. fp32 equals torch; int8 is there only where it is as
good: the export measures that on the run's own dataset, and says which layers had to stay in fp32, or why there is no int8.

    python -m dist_contrastive.export runs/photos
    python -m dist_contrastive.export runs/photos --checkpoint 18 --out exports/photos
    python -m dist_contrastive.export runs/photos --data data/photos.beton --no-int8
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dist_contrastive import cli
from dist_contrastive.config import require
from dist_contrastive.run_folder.config import read_config

PROG = "python -m dist_contrastive.export"


@dataclass(frozen=True)
class ExportCommand:
    run: Annotated[Path, tyro.conf.Positional]
    """A run's folder."""
    checkpoint: int | None = None
    """Export this step's checkpoint instead of the finished encoder."""
    data: Path | None = None
    """Where the packed dataset that the run was trained on lies now, if not at the path of its config."""
    out: Path | None = None
    """The folder to write, by default the run's own `export`; an older export there is replaced."""
    int8: bool = True
    """Make an int8 form, too, if it is as good."""
    max_images: int = 10_000
    """At most as many training images and as many test images serve to compare int8 with fp32."""

    def __post_init__(self) -> None:
        require(self.max_images >= 100, f"--max-images {self.max_images}: give at least 100")


def main(argv: Sequence[str] | None = None) -> None:
    command = cli.parse(ExportCommand, argv, prog=PROG, about=__doc__)
    read_config(command.run)  # a folder that holds no run is refused at once

    from dist_contrastive.exporting.write import export

    export(
        command.run, checkpoint=command.checkpoint, data=command.data, out=command.out, int8=command.int8,
        max_images=command.max_images,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(cli.main_guard(main))
