"""An export in use: pictures and texts to vectors by ONNX Runtime alone, without torch."""

import hashlib
import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dist_contrastive.config import UserError, require
from dist_contrastive.data.tokenizing import CaptionTokenizer, read_tokenizer
from dist_contrastive.exporting.names import (
    EMBEDDING,
    FACTS,
    FEATURE,
    FILES,
    IMAGES,
    MODEL,
    MODEL_INT8,
    TEXT_MODEL,
    TOKENS,
    VERSION,
)
from dist_contrastive.exporting.packages import require_packages
from dist_contrastive.exporting.processor import int8_instructions
from dist_contrastive.run_folder.names import TOKENIZER

if TYPE_CHECKING:
    import onnxruntime

PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")
"""What runs a graph, the better one first."""
BATCH_SIZE = 64


class ExportedModel:
    """Vectors of pictures, and of texts where the run learned from captions. Threads may share it.

    Attributes:
        facts: what the export says of itself (export.json).
        provider: what runs the graphs, by ONNX Runtime's name.
        is_int8: whether images go through the int8 form.
    """

    def __init__(self, folder: Path, *, int8: bool | None = None, threads: int = 0) -> None:
        """`int8`: None takes the int8 form where it is offered and the processor has what it was made for. `threads`: of one
        call; 0 is one for each usable core. `UserError` where `folder` is no export, or was changed since.
        """
        require_packages("onnxruntime")
        import onnxruntime

        self.folder, self.facts = folder, read_facts(folder)
        _require_unaltered(folder, self.facts["files"])
        there = onnxruntime.get_available_providers()
        self.provider = next(name for name in PROVIDERS if name in there)
        offered = MODEL_INT8 in self.facts["files"]
        require(
            not int8 or offered, f"{folder} has no {MODEL_INT8}: {self.facts['int8']['why']}; leave int8 out for fp32"
        )
        # On a GPU its products would be floats; without the instructions it is no faster, and sums may saturate.
        has_use = self.provider == "CPUExecutionProvider" and (
            bool(int8_instructions()) or not self.facts["int8"].get("full_range")
        )
        self.is_int8 = offered and (has_use if int8 is None else int8)
        self._threads = threads or len(os.sched_getaffinity(0))
        self._images = self._session(MODEL_INT8 if self.is_int8 else MODEL)
        self._texts = self._session(TEXT_MODEL) if self.has_text else None
        self.provider = self._images.get_providers()[0]

    @property
    def has_text(self) -> bool:
        return TEXT_MODEL in self.facts["files"]

    @property
    def feature_size(self) -> int:
        """D"""
        return int(self.facts["feature_size"])

    @property
    def embedding_size(self) -> int:
        """E"""
        return int(self.facts["embedding_size"])

    def embed(self, pictures: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Features float32 [n, D] and embeddings float32 [n, E] of n `pictures` uint8 [h, w, 3] of any sizes.

        Those of one size go through the graph together. `ValueError` for what is no picture.
        """
        of_size: dict[tuple[int, ...], list[int]] = {}
        for number, picture in enumerate(pictures):
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
                raise ValueError(f"a picture is uint8 [h, w, 3], not {picture.dtype} {list(picture.shape)}")
            of_size.setdefault(picture.shape, []).append(number)
        features = np.empty((len(pictures), self.feature_size), np.float32)
        embeddings = np.empty((len(pictures), self.embedding_size), np.float32)
        for numbers in of_size.values():
            for start in range(0, len(numbers), BATCH_SIZE):
                part = numbers[start : start + BATCH_SIZE]
                images = np.stack([pictures[number] for number in part])
                features[part], embeddings[part] = self._images.run([FEATURE, EMBEDDING], {IMAGES: images})
        return features, embeddings

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings float32 [n, E] of `texts`, in the space of the images'; `UserError` where the run has no text tower."""
        if self._texts is None:
            raise UserError(f"{self.folder} has no text tower: {self.facts['run']['method']} learns from images alone")
        tokens = self._tokenizer.encode(texts)[0].astype(np.int64)
        found = [np.empty((0, self.embedding_size), np.float32)]
        for start in range(0, len(tokens), BATCH_SIZE):
            found += self._texts.run([EMBEDDING], {TOKENS: tokens[start : start + BATCH_SIZE]})
        return np.concatenate(found)

    @cached_property
    def _tokenizer(self) -> CaptionTokenizer:
        path = self.folder / TOKENIZER
        return read_tokenizer(path.read_bytes(), max_tokens=self.facts["text"]["context"], name=str(path))

    def _session(self, name: str) -> "onnxruntime.InferenceSession":
        return open_session(self.folder / name, provider=self.provider, threads=self._threads)


def open_session(
    graph: Path | bytes, *, provider: str = "CPUExecutionProvider", threads: int = 0
) -> "onnxruntime.InferenceSession":
    """ONNX Runtime's session of a graph's file or bytes. With another `provider` the CPU does what that can't."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors: its warnings are of what it optimises away
    options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
    # Threads that wait for the next call by turning would take the cores from all else.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers = list(dict.fromkeys([provider, "CPUExecutionProvider"]))
    content = graph if isinstance(graph, bytes) else str(graph)
    return onnxruntime.InferenceSession(content, options, providers=providers)


def read_facts(folder: Path) -> dict[str, Any]:
    """What the export in `folder` says of itself; `UserError` where there is none, and where that was changed."""
    path = folder / FACTS
    require(
        path.is_file(), f"{folder} is no export: it has no {FACTS}; python -m dist_contrastive.export RUN makes one"
    )
    try:
        facts = json.loads(path.read_bytes())
        version = facts["version"]
        known = {"files", "int8", "run", "feature_size", "embedding_size"} <= facts.keys()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}): export again") from error
    require(
        version == VERSION and known,
        f"{path} is of another version ({version}, this one reads {VERSION}): export again",
    )
    noted = facts.pop("sha256", None)
    require(noted == sum_of(facts), f"{path} was changed since it was exported (its sum differs): export again")
    result: dict[str, Any] = facts
    return result


def sum_of(facts: dict[str, Any]) -> str:
    """Of what an export says of itself: SHA-256, hexadecimal."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _require_unaltered(folder: Path, files: dict[str, Any]) -> None:
    """`UserError` unless all `files` are there with the sums that export.json has of them."""
    for name, entry in files.items():
        path = folder / name
        require(name in FILES and path.is_file(), f"{folder} has no {name}, which its {FACTS} names: export again")
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        require(
            found == entry["sha256"], f"{path} was changed since it was exported (its SHA-256 differs): export again"
        )
