"""An index's vectors in Milvus, for those who outgrow one machine: through its own client, to a cluster or to a local file."""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dist_contrastive.config import UserError, require
from dist_contrastive.searching.index_file import SearchIndex

BATCH = 1000
"""Vectors sent at once."""
LONGEST_PATH = 65535
"""Bytes of a text in Milvus."""
TIMEOUT_S = 60.0


def collection_of(index: SearchIndex) -> str:
    """The name of the index's collection: the folder's, the output's, and what tells encoders apart, so that vectors of two
    encoders never meet in one."""
    identity = hashlib.sha256(json.dumps(asdict(index.facts.encoder), sort_keys=True).encode()).hexdigest()
    name = re.sub(r"\W", "_", index.path.absolute().name, flags=re.ASCII)
    return f"{name if name[:1].isalpha() else f'index_{name}'}_{index.facts.encoder.output}_{identity[:12]}"


def send(index: SearchIndex, uri: str, tell: Callable[[int, int], None] = lambda done, total: None) -> str:
    """Make the index's collection at `uri` hold what the index holds: ids, vectors, labels and paths. Returns its name.

    What is there already is replaced by id, so that the same call goes on after a fault; what was deleted here is deleted there.
    `uri` is a server's (http://host:19530) or a local file's (vectors.db), which Milvus Lite keeps. `UserError` where it can't be
    reached, or refuses, or its collection has vectors besides.
    """
    pymilvus = _load_pymilvus()
    try:
        client = pymilvus.MilvusClient(uri, timeout=TIMEOUT_S)
        try:
            return _send(index, pymilvus, client, tell)
        finally:
            client.close()
    except pymilvus.exceptions.MilvusException as error:
        raise UserError(f"--to milvus:{uri}: {error.message}; mend that, then give the same command again") from error


def _send(index: SearchIndex, pymilvus: Any, client: Any, tell: Callable[[int, int], None]) -> str:
    name, items = collection_of(index), index.items
    if not client.has_collection(name):
        _create(client, pymilvus, index, name)
    alive = np.flatnonzero(items.alive)
    for start in range(0, len(alive), BATCH):
        client.upsert(name, [_entity(index, row) for row in alive[start : start + BATCH].tolist()])
        tell(min(start + BATCH, len(alive)), len(alive))
    gone = np.setdiff1d(items.ids[~items.alive], items.ids[alive])
    for start in range(0, len(gone), BATCH):
        client.delete(name, ids=gone[start : start + BATCH].tolist())
    client.flush(name)
    client.load_collection(name)
    (found,) = client.query(name, filter="", output_fields=["count(*)"], consistency_level="Strong")
    require(
        found["count(*)"] == len(alive),
        f"collection {name} has {found['count(*)']:,} vectors and the index {len(alive):,}: others put some there; drop it there",
    )
    return name


def _create(client: Any, pymilvus: Any, index: SearchIndex, name: str) -> None:
    types = pymilvus.DataType
    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("id", types.INT64, is_primary=True)
    schema.add_field("vector", types.FLOAT_VECTOR, dim=index.facts.dimension)
    if index.items.labels is not None:
        schema.add_field("label", types.INT64)
    if index.items.has_paths:
        schema.add_field("path", types.VARCHAR, max_length=LONGEST_PATH)
    parameters = client.prepare_index_params()
    parameters.add_index("vector", index_type="AUTOINDEX", metric_type="COSINE")
    client.create_collection(name, schema=schema, index_params=parameters)


def _entity(index: SearchIndex, row: int) -> dict[str, Any]:
    items = index.items
    entity: dict[str, Any] = {"id": int(items.ids[row]), "vector": index.vectors[row]}
    if items.labels is not None:
        entity["label"] = int(items.labels[row])
    path = items.path(row)
    return entity if path is None else entity | {"path": path}


def uri_of(to: str) -> str:
    """What `--to` names, without the engine's name; a path gets its `~` replaced."""
    engine, _, uri = to.partition(":")
    require(
        engine == "milvus" and bool(uri),
        f"--to {to}: give milvus:URI (milvus:http://host:19530, milvus:vectors.db)",
    )
    return uri if "://" in uri else str(Path(uri).expanduser())


def _load_pymilvus() -> Any:
    try:
        import pymilvus
    except ImportError as error:
        raise UserError("--to milvus: needs pymilvus: pip install 'dist_contrastive[milvus]'") from error
    return pymilvus
