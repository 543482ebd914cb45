"""The run's complete state on disk: copied in a moment, written in the background, verified when read.

A checkpoint is a folder `step-00000123` with safetensors files, `state.json` and, last, `manifest.json` (SHA-256 sums and
versions). State that ranks have shares of is gathered first, so that any number of ranks can go on from it. All is written
under a temporary name, every file and the folder synced, then renamed; older checkpoints go only after that. Opening one runs
no code: tensors are safetensors, everything else is JSON, and no other file is opened.

What can't be read is never deleted: a run that goes on from an older checkpoint sets the newer ones aside, and where none
can be read it does not start.
"""

from dist_contrastive.checkpoint.saver import Saver
from dist_contrastive.checkpoint.state import load_module, load_optimizer, optimizer_tensors, save_module
from dist_contrastive.checkpoint.store import FORMAT, Checkpoint, CheckpointStore, Damaged
from dist_contrastive.checkpoint.tensor_file import Tensors, read_tensors, sha256_of

__all__ = [
    "FORMAT",
    "Checkpoint",
    "CheckpointStore",
    "Damaged",
    "Saver",
    "Tensors",
    "load_module",
    "load_optimizer",
    "optimizer_tensors",
    "read_tensors",
    "save_module",
    "sha256_of",
]
