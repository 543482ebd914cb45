"""`python -m dist_contrastive.status RUN [--json]`: what became of a run, in one line.

The exit status is 0 where the run is done, 75 where it was stopped and the same command goes on, and 1 where it is running,
has failed or died, whatever a launcher made of its ranks' own exit status.

    python -m dist_contrastive.status runs/photos
    python -m dist_contrastive.status runs/photos --json
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dist_contrastive import cli
from dist_contrastive.run_folder.status import RunStatus, read_status

PROG = "python -m dist_contrastive.status"
EXIT_STATUS = {"done": 0, "stopped": cli.EXIT_STOPPED}


@dataclass(frozen=True)
class StatusCommand:
    run: Annotated[Path, tyro.conf.Positional]
    """A run's folder."""
    json: bool = False
    """Print an object with all that is known instead."""


def describe(run: Path, status: RunStatus) -> str:
    """One line for people."""
    parts = [f"{run}: {status.state}"]
    if status.step is not None:
        parts[0] += f" at step {status.step}" + (f" of {status.total_steps}" if status.total_steps else "")
    if status.reason:
        parts[0] += f" ({status.reason})"
    if status.when:
        parts.append(f"as of {status.when}")
    if status.host:
        parts.append(f"{status.ranks} rank(s), rank 0 is process {status.pid} on {status.host}")
    if status.job:
        parts.append(f"job {status.job}" + (f", requeued {status.restarts} times" if status.restarts else ""))
    return "; ".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    command = cli.parse(StatusCommand, argv, prog=PROG, about=__doc__)
    status = read_status(command.run)
    with cli.page():
        if command.json:
            print(json.dumps({"run": str(command.run), **dataclasses.asdict(status)}))
        else:
            print(describe(command.run, status))
    sys.exit(EXIT_STATUS.get(status.state, 1))


if __name__ == "__main__":
    sys.exit(cli.main_guard(main))
