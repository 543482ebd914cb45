"""Real ranks for tests: processes that talk over gloo.

The ranks are forked from a server that has imported torch and this package once, so that a test with four ranks costs
what its work costs, not four imports of torch.
"""

import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dist_contrastive import distributed

TIMEOUT_S = 120.0

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "dist_contrastive.methods", "tests.harness"])


class RankError(AssertionError):
    """What went wrong on a rank, with its traceback."""


def run_ranks(function: Callable[..., Any], num_ranks: int, *args: Any, timeout_s: float = TIMEOUT_S) -> list[Any]:
    """`function(rank, *args)` on each of `num_ranks` gloo ranks; what each returned, in rank order.

    Raises `RankError` with the first failing rank's traceback; no rank outlives the call.
    """
    results: Any = _context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        ranks = [
            _context.Process(target=_run_rank, args=(rank, num_ranks, str(store), function, args, results), daemon=True)
            for rank in range(num_ranks)
        ]
        for process in ranks:
            process.start()
        try:
            outcomes: dict[int, Any] = {}
            for _ in ranks:
                rank, error, value = results.get(timeout=timeout_s)
                if error is not None:
                    raise RankError(f"rank {rank} of {num_ranks}:\n{error}")
                outcomes[rank] = value
            return [outcomes[rank] for rank in range(num_ranks)]
        finally:
            for process in ranks:
                process.join(timeout=5)
                if process.is_alive():
                    process.kill()
                    process.join()


def _run_rank(rank: int, num_ranks: int, store: str, function: Callable[..., Any], args: tuple, results: Any) -> None:
    torch.set_num_threads(1)
    # What a launcher tells its ranks, for the code that asks the environment; one rank alone is started without a launcher.
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    for name, value in zip(names, (rank, rank, num_ranks, num_ranks), strict=True):
        os.environ.pop(name, None)
        if num_ranks > 1:
            os.environ[name] = str(value)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    try:
        if num_ranks > 1:
            # FileStore: no port to clash on.
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(store, num_ranks),
                rank=rank,
                world_size=num_ranks,
                timeout=timedelta(seconds=TIMEOUT_S),
            )
            distributed.open_groups(timedelta(seconds=TIMEOUT_S))
        results.put((rank, None, function(rank, *args)))
        if num_ranks > 1:
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
    finally:
        sys.stdout.flush()
