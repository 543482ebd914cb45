"""dist_contrastive: a distributed trainer for contrastive and self-distilled representations."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dist_contrastive.embedder import Embedder

__version__ = "0.1.0"


def load(run: str | Path, *, checkpoint: int | None = None) -> "Embedder":
    """The trained encoder and projector of the run in the folder `run`, or in one of its checkpoints, as a module.

    `load("runs/mine")(image)` gives features float32 [1, D] of a PIL image, `.embed(image)` embeddings (`Embedder`). Raises
    `config.UserError` where there is no such run.
    """
    from dist_contrastive.embedder import Embedder
    from dist_contrastive.run_folder.trained import open_run

    return Embedder(open_run(Path(run).expanduser(), checkpoint=checkpoint))
