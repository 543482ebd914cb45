"""`python -m dist_contrastive.probe RUN [--checkpoint STEP] [--data OTHER.beton]`: score the encoder of a run, without training.

What training measured (`probe.json`) stays as it is: the scores go to a file of their own in the run's `probes/`.

    python -m dist_contrastive.probe runs/photos
    python -m dist_contrastive.probe runs/photos --checkpoint 18
    python -m dist_contrastive.probe runs/photos --data data/cifar10.beton --device cpu
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dist_contrastive import cli
from dist_contrastive.run_folder.config import read_config

PROG = "python -m dist_contrastive.probe"


@dataclass(frozen=True)
class ProbeCommand:
    run: Annotated[Path, tyro.conf.Positional]
    """A run's folder."""
    checkpoint: int | None = None
    """Score this step's checkpoint instead of the finished encoder."""
    data: Path | None = None
    """The packed dataset: the run's own, where it is no longer at the path of its config, or another one, on which the
    encoder is scored by a probe that is trained there (transfer)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""


def main(argv: Sequence[str] | None = None) -> None:
    command = cli.parse(ProbeCommand, argv, prog=PROG, about=__doc__)
    read_config(command.run)  # a folder that holds no run is refused at once

    from dist_contrastive.score import probe

    probe(command.run, checkpoint=command.checkpoint, data=command.data, device_name=command.device)


if __name__ == "__main__":
    sys.exit(cli.main_guard(main))
