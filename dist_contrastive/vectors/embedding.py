"""Turning the images of a source into vectors, on one rank or several; what was done stays done."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_contrastive import distributed, liveness, signals
from dist_contrastive.config import LaunchConfig, require
from dist_contrastive.data.compiled import announced_compilation
from dist_contrastive.embedder import Embedder
from dist_contrastive.evaluation.features import HostRows
from dist_contrastive.launch import connect_for_use
from dist_contrastive.progress import bar
from dist_contrastive.run_folder.trained import TrainedRun, open_run
from dist_contrastive.vectors.options import EmbedOptions, Split
from dist_contrastive.vectors.parts import PartNote, Parts, Vectors, merged
from dist_contrastive.vectors.source import BadImages, Chunk, VectorSource, open_vector_source

NUM_LISTED = 20
"""Lines about images that were left out; the parts name all."""


def embed(options: EmbedOptions) -> bool:
    """Do it, or go on with it; whether it came to its end (or else was stopped, and the same command goes on)."""
    device = connect_for_use(options.device)
    kept = "and keeps the parts that are done"
    with signals.deferred(kept), liveness.watch(60 * LaunchConfig().timeout_minutes):
        try:
            run, source = distributed.together(lambda: _open(options, device))
            with source:
                _embed(options, run, source, device)
        except signals.Stopped:
            _say(f"stopped; the same command goes on with {options.out}")
            return False
    return True


def _open(options: EmbedOptions, device: torch.device) -> tuple[TrainedRun, VectorSource]:
    run = open_run(options.run, checkpoint=options.checkpoint)
    say = print if distributed.is_main() else str
    with announced_compilation(say), liveness.busy(f"reads {options.source}"):
        source = open_vector_source(
            options.source, run.config, split=options.split, threads=options.threads, device=device
        )
    return run, source


def about(run: TrainedRun, source: VectorSource, split: Split) -> dict[str, Any]:
    """What tells the vectors of a run and a source from others: written beside them, and compared before going on."""
    return {
        "run": {"method": run.config.method.name, "encoder": run.config.encoder.name, "step": run.step},
        "weights": {part: run.sha256(part) for part in ("encoder", "projector")},
        "view": asdict(run.view),
        "source": {"name": source.path.name, "identity": source.identity, "split": split, "items": source.num_items},
        "classes": list(source.classes),
    }


def _embed(options: EmbedOptions, run: TrainedRun, source: VectorSource, device: torch.device) -> None:
    identities = distributed.gather_objects(source.identity)
    require(len(set(identities)) == 1, f"{source.path} is not the same on all ranks; give a place that all of them see")
    embedder = distributed.together(lambda: Embedder(run).to(device))
    parts = Parts(
        options.out, about(run, source, options.split),
        num_items=source.num_items, classes=source.classes, feature_size=embedder.feature_size,
    )  # fmt: skip
    if distributed.broadcast_object(distributed.together(lambda: distributed.is_main() and parts.is_done())):
        _say(f"{options.out} is there already, of this run and source: nothing to do")
        return
    with closing(parts):
        known = distributed.together(lambda: parts.open() if distributed.is_main() else {})
        known = distributed.broadcast_object(known)
        if known:
            _say(f"goes on: {len(known)} of {len(parts.ranges)} parts are there")
        waiting = [number for number in range(len(parts.ranges)) if number not in known]
        mine = waiting[distributed.rank() :: distributed.world_size()]
        bad = BadImages(options.max_bad)
        start = time.monotonic()

        def work() -> dict[int, PartNote]:
            bad.add(image for note in known.values() for image in note.bad)
            with liveness.busy("embeds its share"):
                return write_parts(parts, mine, source, embedder, options.batch_size, bad)

        found = merged(distributed.gather_objects(distributed.together(work)))
        seconds = time.monotonic() - start
        notes = merged([known, found])
        everyones = BadImages(options.max_bad)
        everyones.add(image for note in notes.values() for image in note.bad)
        num_rows = sum(note.num_rows for note in notes.values())
        require(num_rows > 0, f"{source.path} has no image that can be read")
        with liveness.busy(f"writes {options.out}"):
            distributed.together(lambda: parts.finish(notes) if distributed.is_main() else None)
    rate = sum(note.num_rows for note in found.values()) / seconds
    passed_over = source.num_passed_over + sum(note.num_passed_over for note in notes.values())
    _report(options.out, num_rows, rate, everyones, passed_over)


def write_parts(
    parts: Parts, numbers: Sequence[int], source: VectorSource, embedder: Embedder, batch_size: int, bad: BadImages
) -> dict[int, PartNote]:
    """Make and write the parts with these `numbers`; their notes."""
    notes = {}
    ranges = [parts.ranges[number] for number in numbers]
    done, total = 0, sum(map(len, ranges))
    compiling = announced_compilation(print) if distributed.is_main() else nullcontext()
    with compiling, bar("embedding", visible=distributed.is_main()) as tell:

        def advance(chunk: Chunk) -> None:
            nonlocal done
            signals.give_way()
            bad.add(chunk.bad)
            done += len(chunk.items)
            tell(done, total)

        written: Future[None] | None = None
        # A part goes to the disk while the next one is made.
        with ThreadPoolExecutor(1, thread_name_prefix="parts") as writer:
            for number, vectors in zip(numbers, _vectors(source, ranges, embedder, batch_size, advance), strict=True):
                if written:
                    written.result()
                written = writer.submit(parts.write, number, vectors)
                notes[number] = vectors.note
            if written:
                written.result()
    return notes


def _vectors(
    source: VectorSource,
    ranges: Sequence[range],
    embedder: Embedder,
    batch_size: int,
    advance: Callable[[Chunk], None],
) -> Iterator[Vectors]:
    """Those of each of `ranges`; `advance` is called with each chunk before it is encoded."""
    waiting = iter(ranges)
    chunks: list[Chunk] = []
    room: HostRows | None = None
    items = range(0)
    with closing(source.chunks_of(ranges, batch_size)) as coming:
        for chunk in coming:
            advance(chunk)
            features = embedder.of_squares(chunk.squares, batch_size)
            rows = torch.cat([features, embedder.embeddings(features)], dim=1)
            if room is None:
                items = next(waiting)
                room = HostRows(len(items), (rows.shape[1],))
            room.add(rows)
            chunks.append(replace(chunk, squares=chunk.squares[:0].clone()))  # its pixels are not needed any more
            if chunk.items.stop == items.stop:
                yield _joined(chunks, items, room.end().numpy())
                chunks, room = [], None


def _joined(chunks: Sequence[Chunk], items: range, room: np.ndarray) -> Vectors:
    """The vectors of a part whose rows are the first ones in `room`."""
    indices = np.concatenate([chunk.indices for chunk in chunks])
    labels = [chunk.labels for chunk in chunks if chunk.labels is not None]
    paths = [path for chunk in chunks for path in chunk.paths or ()]
    note = PartNote(
        items.start,
        items.stop,
        len(indices),
        tuple(image for chunk in chunks for image in chunk.bad),
        sum(chunk.num_passed_over for chunk in chunks),
    )
    has_paths = chunks[0].paths is not None
    return Vectors(
        note, indices, paths if has_paths else None, np.concatenate(labels) if labels else None, room[: len(indices)]
    )


def _report(out: Path, num_rows: int, rate: float, bad: BadImages, passed_over: int) -> None:
    if not distributed.is_main():
        return
    for image in bad.found[:NUM_LISTED]:
        print(f"left out: {image.name}: {image.reason}", file=sys.stderr)
    if len(bad.found) > NUM_LISTED:
        print(f"left out: {len(bad.found) - NUM_LISTED} more", file=sys.stderr)
    more = f", {passed_over} file(s) passed over that are no images" if passed_over else ""
    print(f"{out}: {num_rows:,} images, {rate:,.0f} images/s, {len(bad.found)} left out{more}", flush=True)


def _say(text: str) -> None:
    if distributed.is_main():
        print(text, flush=True)
