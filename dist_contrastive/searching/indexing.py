"""What `index` does: images or vectors into an index on disk, and from there, where that is wanted, into an engine."""

import io
from collections.abc import Sequence, Set
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dist_contrastive.config import require
from dist_contrastive.data.compiled import announced_compilation
from dist_contrastive.embedder import Embedder
from dist_contrastive.preflight import device_for_use
from dist_contrastive.progress import bar
from dist_contrastive.run_folder.trained import TrainedRun, open_run
from dist_contrastive.searching import milvus, vector_table
from dist_contrastive.searching.build import IndexWriter, Settings, delete, require_same
from dist_contrastive.searching.index_file import Encoder, Facts, SearchIndex, Source, read_facts
from dist_contrastive.searching.options import NOTHING, IndexOptions
from dist_contrastive.searching.structures import Parameters
from dist_contrastive.vectors.source import BadImages, open_vector_source

JPEG_QUALITY = 85


def index(options: IndexOptions) -> None:
    """Build, add, delete and send, as far as each is asked for, in this order; every error of a user is one line."""
    uri = milvus.uri_of(options.to) if options.to else ""
    run = open_run(options.run, checkpoint=options.checkpoint)
    encoder = Encoder.of(run, options.output)
    if options.source == NOTHING:
        require_same(read_facts(options.out), encoder, options.out)
    elif options.source.suffix == ".parquet":
        _index_table(options, options.source, encoder)
    else:
        _index_images(options, options.source, run, encoder)
    if options.delete:
        facts = delete(options.out, np.array(options.delete, np.int64))
        _say(f"{options.out}: {len(set(options.delete)):,} deleted, {facts.num_vectors:,} left")
    if uri:
        with SearchIndex(options.out) as found, bar("sending") as tell:
            name = milvus.send(found, uri, tell)
            num = len(found)
        _say(f"{options.to}: collection {name} has the {num:,} vectors, by cosine")


def _index_images(options: IndexOptions, path: Path, run: TrainedRun, encoder: Encoder) -> None:
    device = torch.device(device_for_use(options.device))
    with announced_compilation(_say):
        source = open_vector_source(path, run.config, split=options.split, threads=options.threads, device=device)
    with source:
        embedder = Embedder(run).to(device)

        def encoded(squares: torch.Tensor) -> torch.Tensor:
            features = embedder.of_squares(squares)
            return features if options.output == "feature" else embedder.embeddings(features)

        size = embedder.view.size
        dimension = encoded(torch.zeros(1, size, size, 3, dtype=torch.uint8)).shape[1]
        bad = BadImages(options.max_bad)
        writer = _writer(options, encoder, dimension, Source(path.name, source.identity), source.classes)
        with writer, torch.inference_mode():
            first, known = writer.next_id, writer.known_paths()
            with bar("embedding") as tell:
                for chunk in source.chunks(range(source.num_items), options.batch_size):
                    bad.add(chunk.bad)
                    paths = chunk.paths
                    _require_new(paths or (), known, options.out)
                    pictures = _pictures(chunk.squares, writer.picture_size) if writer.picture_size else None
                    writer.add(first + chunk.indices, encoded(chunk.squares), chunk.labels, paths, pictures)
                    tell(chunk.items.stop, source.num_items)
            _commit(writer, options.out)
    for image in bad.found[:3]:
        _say(f"left out: {image.name}: {image.reason}")
    if len(bad.found) > 3:
        _say(f"left out: {len(bad.found) - 3} more that can't be read")


def _index_table(options: IndexOptions, path: Path, encoder: Encoder) -> None:
    """Vectors that `embed` wrote: nothing is encoded."""
    require(
        options.split == "all", f"--split {options.split}: {path} holds vectors, which have no splits; leave it out"
    )
    table = vector_table.open_table(path, options.output)
    differ = encoder.differences(table.encoder)
    require(not differ, f"{path} holds vectors of {differ}; give it the run that it was embedded with")
    with _writer(options, encoder, table.dimension, table.source, table.classes, pictures=False) as writer:
        first, known = writer.next_id, writer.known_paths()
        done = 0
        with bar("reading") as tell:
            for rows in table.rows():
                _require_new(rows.paths or (), known, options.out)
                writer.add(first + rows.indices, rows.vectors, rows.labels, rows.paths)
                done += len(rows.indices)
                tell(done, table.num_rows)
        _commit(writer, options.out)


def _writer(
    options: IndexOptions,
    encoder: Encoder,
    dimension: int,
    source: Source,
    classes: tuple[str, ...],
    *,
    pictures: bool = True,
) -> IndexWriter:
    parameters = Parameters(options.links, options.build_effort, options.lists, options.code_bytes)
    settings = Settings(
        options.kind, options.recall, options.memory_gib, parameters, options.pictures if pictures else 0
    )
    return IndexWriter(
        options.out, encoder, dimension, settings, source=source, classes=classes, to_old=options.add
    )  # fmt: skip


def _commit(writer: IndexWriter, out: Path) -> None:
    with bar("inserting") as tell:
        facts = writer.commit(_say, tell)
    _say(f"{out}: {described(facts)}")


def described(facts: Facts) -> str:
    """An index in one line."""
    measured = facts.measured
    how = {"flat": "compared one by one", "hnsw": f"efSearch {facts.effort}", "ivfpq": f"nprobe {facts.effort}"}
    return (
        f"{facts.num_vectors:,} vectors of {facts.dimension} ({facts.encoder.output}), {facts.kind}, {how[facts.kind]}; "
        f"recall@10 {measured.recall_at_10:.3f} and p50 {measured.p50_ms:.2g} ms on one thread, with {measured.num_queries:,} "
        "vectors that were not in it"
    )


def _require_new(paths: Sequence[str], known: Set[str], out: Path) -> None:
    again = [path for path in paths if path in known]
    require(not again, f"{out} has {again[0] if again else ''} already; delete that first (--delete), or leave it out")


def _pictures(squares: torch.Tensor, size: int) -> list[bytes]:
    """JPEGs of squares uint8 [n, S, S, 3], S or `size` pixels a side, whichever is less."""
    found = []
    for square in squares.cpu().numpy():
        picture = Image.fromarray(square)
        if picture.width > size:
            picture = picture.resize((size, size), Image.Resampling.LANCZOS, reducing_gap=2.0)
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=JPEG_QUALITY)
        found.append(file.getvalue())
    return found


def _say(text: str) -> None:
    print(text, flush=True)
