"""`python -m dist_contrastive.serve DIR [--index INDEX]`: an export over HTTP, with a page to try it in a browser.

DIR is what export wrote, or the folder of a run that has it. Requests that come together go through the model together. What a
client may ask for at most is set below. SIGTERM ends the service once all that is under way is answered.

    python -m dist_contrastive.serve runs/photos
    python -m dist_contrastive.serve runs/photos/export --index runs/photos/index --port 8080

The page is at /, examples are at /docs, counters for Prometheus at /metrics.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated

import tyro

from dist_contrastive import cli
from dist_contrastive.config import require
from dist_contrastive.service.limits import Limits

PROG = "python -m dist_contrastive.serve"
TOKEN_VARIABLE = "DIST_CONTRASTIVE_TOKEN"


@dataclass(frozen=True, kw_only=True)
class ServeCommand(Limits):
    dir: Annotated[Path, tyro.conf.Positional]
    """An export's folder, or a run's that has an export."""
    index: Path | None = None
    """An index of the same run, for searches."""
    host: str = "127.0.0.1"
    """The address to listen on; 0.0.0.0 lets other machines in."""
    port: int = 8000
    """The port to listen on; 0 takes a free one."""
    int8: bool | None = None
    """Use the int8 model, or fp32; None takes int8 where the export has it and the processor gains by it."""
    threads: int = 0
    """Threads of the model; 0 takes one for each core that it may use."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.port < 2**16, f"--port {self.port}: give 0 (a free one) to 65535")
        require(self.threads >= 0, f"--threads {self.threads}: give 0 (automatic) or more")


def main(argv: Sequence[str] | None = None) -> None:
    command = cli.parse(ServeCommand, argv, prog=PROG, about=__doc__)

    from dist_contrastive.service.server import serve

    limits = Limits(**{field.name: getattr(command, field.name) for field in fields(Limits)})
    limits = replace(limits, token=limits.token or os.environ.get(TOKEN_VARIABLE, ""))
    serve(
        command.dir, index=command.index, host=command.host, port=command.port, int8=command.int8,
        threads=command.threads, limits=limits,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(cli.main_guard(main))
