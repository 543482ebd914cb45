"""Vectors that `embed` wrote as a Parquet data set, read a piece at a time."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_contrastive.config import UserError, require
from dist_contrastive.searching.index_file import Encoder, Output, Source
from dist_contrastive.vectors.parts import KEY, require_parquet

BATCH = 4096


@dataclass(frozen=True)
class Rows:
    """Some n rows of a table."""

    indices: np.ndarray
    """int64 [n]"""
    vectors: np.ndarray
    """float32 [n, d]"""
    labels: np.ndarray | None
    """int64 [n]"""
    paths: Sequence[str] | None


@dataclass(frozen=True)
class VectorTable:
    """A data set of vectors, opened."""

    path: Path
    output: Output
    encoder: Encoder
    source: Source
    classes: tuple[str, ...]
    dimension: int
    num_rows: int
    parts: Sequence[Path]

    def rows(self) -> Iterator[Rows]:
        """All of them, in order. `UserError` where the file can't be read."""
        pyarrow, parquet = require_parquet()
        for part in self.parts:
            try:
                with parquet.ParquetFile(part) as file:
                    names = [
                        name for name in ("index", "path", "label", self.output) if name in file.schema_arrow.names
                    ]
                    for batch in file.iter_batches(BATCH, columns=names):
                        yield _rows(batch, self.output, self.dimension)
            except (pyarrow.ArrowException, OSError) as error:
                raise _unreadable(part, error) from error


def open_table(path: Path, output: Output) -> VectorTable:
    """The vectors in `path` (a `.parquet` of `embed`); `UserError` where they are none."""
    pyarrow, parquet = require_parquet()
    require(path.exists(), f"there is no {path}")
    parts = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    require(bool(parts), f"{path} holds no vectors that embed wrote: there is no .parquet in it")
    about: Any = None
    dimension = num_rows = 0
    for part in parts:
        try:
            with parquet.ParquetFile(part) as file:
                schema = file.schema_arrow
                noted = json.loads((schema.metadata or {})[KEY])
                dimension = schema.field(output).type.list_size
                num_rows += file.metadata.num_rows
        except (pyarrow.ArrowException, OSError) as error:
            raise _unreadable(part, error) from error
        except (KeyError, ValueError, AttributeError) as error:
            raise UserError(f"{part} holds no vectors that embed wrote") from error
        require(about in (None, noted), f"{path} holds vectors of several runs or sources; give one that embed wrote")
        about = noted
    try:
        names = ("encoder",) if output == "feature" else ("encoder", "projector")
        weights = {name: about["weights"][name] for name in names}
        encoder = Encoder(about["run"]["method"], about["run"]["step"], output, weights)
        identity = hashlib.sha256(json.dumps(about["source"], sort_keys=True).encode()).hexdigest()
        source = Source(about["source"]["name"], identity)
        return VectorTable(path, output, encoder, source, tuple(about["classes"]), dimension, num_rows, parts)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} holds no vectors that embed wrote") from error


def _rows(batch: Any, output: Output, dimension: int) -> Rows:
    def column(name: str) -> np.ndarray | None:
        return batch.column(name).to_numpy(zero_copy_only=False) if name in batch.schema.names else None

    values = batch.column(output).flatten().to_numpy(zero_copy_only=False).reshape(-1, dimension)
    indices = column("index")
    assert indices is not None, "embed writes it"
    paths = batch.column("path").to_pylist() if "path" in batch.schema.names else None
    return Rows(indices, values, column("label"), paths)


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} can't be read ({str(error).splitlines()[0]})")
