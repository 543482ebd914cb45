"""Captions of a packed dataset: the file `OUT.beton.captions` beside it, written once, mapped into memory and drawn from.

The file is one of tensors (safetensors): the texts, their token ids, whose they are, and the tokenizer. Token ids are made
when the dataset is packed, so that training looks rows up and tokenizes nothing.

Which caption of an image is taken at an epoch is a pure function of (seed, epoch, sample index), each as often as the others:
any number of threads, ranks and restarts give the same one.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
import torch
from torch import Tensor

from dist_contrastive import rng
from dist_contrastive.atomic import write_synced
from dist_contrastive.config import UserError, require
from dist_contrastive.data.format import (
    MAX_TOKENS,
    VOCABULARY,
    CaptionsEntry,
    Manifest,
    captions_path,
    pack_again,
)
from dist_contrastive.data.tokenizing import CaptionTokenizer, learn_tokenizer, read_tokenizer, read_tokenizer_file

DTYPES = {
    "tokens": torch.int32,  # [C, L]
    "first": torch.int64,  # [N + 1]: the captions of sample i are the rows from first[i] up to first[i + 1]
    "texts": torch.uint8,  # all texts in UTF-8, one after the other
    "text_ends": torch.int64,  # [C]: where in them each one ends
    "tokenizer": torch.uint8,  # its JSON
    "special": torch.int64,  # [2]: ids of the start and of the end
}
"""What the file holds, of N samples with C captions of L token ids."""


@dataclass(frozen=True)
class CaptionOptions:
    """How captions become token ids."""

    max_tokens: int = MAX_TOKENS
    vocabulary: int = VOCABULARY
    tokenizer: Path | None = None
    """A tokenizer.json instead of a tokenizer that is learned."""


def given_tokenizer(options: CaptionOptions) -> CaptionTokenizer | None:
    """The tokenizer that `options` give; None where one is to be learned."""
    if options.tokenizer is None:
        return None
    return read_tokenizer_file(options.tokenizer, max_tokens=options.max_tokens)


def write_captions(
    path: Path,
    captions: Sequence[Sequence[str]],
    to_train: np.ndarray,
    options: CaptionOptions,
    encoder: CaptionTokenizer | None,
) -> CaptionsEntry:
    """Write the `captions` of each sample to `path` and wait until the disk has them.

    Without an `encoder` a tokenizer is learned from those of the samples `to_train`, int64.
    """
    assert all(captions), "a sample without a caption has nothing to draw"
    if encoder is None:
        of_train = chain.from_iterable(captions[index] for index in to_train)
        encoder = learn_tokenizer(of_train, vocabulary=options.vocabulary, max_tokens=options.max_tokens)
    texts = list(chain.from_iterable(captions))
    tokens, num_cut = encoder.encode(texts)
    encoded = [text.encode() for text in texts]
    arrays: dict[str, np.ndarray] = {
        "tokens": tokens,
        "first": np.cumsum([0, *map(len, captions)], dtype=np.int64),
        "texts": np.frombuffer(b"".join(encoded), np.uint8),
        "text_ends": np.cumsum([len(text) for text in encoded], dtype=np.int64),
        "tokenizer": np.frombuffer(encoder.json, np.uint8),
        "special": np.array([encoder.start, encoder.end], np.int64),
    }
    # No metadata: the library writes several entries in an order of chance.
    content = safetensors.numpy.save(arrays)
    write_synced(path, content)
    return CaptionsEntry(
        num_captions=len(texts),
        vocabulary_size=encoder.vocabulary_size,
        max_tokens=encoder.max_tokens,
        num_cut=num_cut,
        num_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )


class Captions:
    """The captions of a packed dataset. L token ids each: the start, those of the text, the end, then padding (0)."""

    def __init__(self, dataset: Path, manifest: Manifest) -> None:
        """Map the captions of the packed dataset `dataset`; its manifest, which has an entry of them, was checked.

        Raises `UserError` where the file is not one that pack wrote for this dataset.
        """
        assert manifest.captions is not None
        self._path = captions_path(dataset)
        self._entry = manifest.captions
        again = pack_again(dataset)
        try:
            with safetensors.safe_open(self._path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{self._path} is not a file of captions ({error}); {again}") from error
        found = {name: tensor.dtype for name, tensor in tensors.items()}
        require(found == DTYPES, f"{self._path} does not hold what captions are made of; {again}")
        self._tokens, self._first = tensors["tokens"], tensors["first"]
        self._texts, self._text_ends = tensors["texts"], tensors["text_ends"]
        self._tokenizer = tensors["tokenizer"]
        # Rows are looked up by these without a check of their own.
        num_captions, num_tokens = self._entry.num_captions, self._entry.max_tokens
        require(
            self._tokens.shape == (num_captions, num_tokens)
            and self._first.shape == (manifest.num_samples + 1,)
            and self._text_ends.shape == (num_captions,)
            and tensors["special"].shape == (2,)
            and int(self._first[0]) == 0
            and int(self._first[-1]) == num_captions
            and bool((self._first.diff() > 0).all()),
            f"{self._path} holds captions of another dataset than {dataset}; {again}",
        )
        self.start_id, self.end_id = tensors["special"].tolist()
        """Ids of the start and of the end: a caption's own tokens are those before its first `end_id`."""

    @property
    def max_tokens(self) -> int:
        """L"""
        return self._entry.max_tokens

    @property
    def vocabulary_size(self) -> int:
        """Token ids are below it."""
        return self._entry.vocabulary_size

    @cached_property
    def tokenizer_json(self) -> bytes:
        """The tokenizer as `--tokenizer` of pack takes it, and whoever reads prompts without this dataset."""
        return self._tokenizer.numpy().tobytes()

    @cached_property
    def _encoder(self) -> CaptionTokenizer:
        return read_tokenizer(self.tokenizer_json, max_tokens=self.max_tokens, name=str(self._path))

    def tokens(self, indices: Tensor, *, seed: int, epoch: int) -> Tensor:
        """One caption of each of the samples `indices` int64 [B], as token ids int64 [B, L]; all on the CPU."""
        keys = rng.fold(rng.sample_keys(seed, epoch, indices, 0), int(rng.Stream.CAPTION))
        first = self._first[indices]
        rows = first + rng.below(keys, self._first[indices + 1] - first)
        return self._tokens[rows].long()

    def texts(self, index: int) -> list[str]:
        """All captions of sample `index`."""
        first, stop = self._first[index : index + 2].tolist()
        start = int(self._text_ends[first - 1]) if first else 0
        texts = []
        for end in self._text_ends[first:stop].tolist():
            texts.append(self._texts[start:end].numpy().tobytes().decode())
            start = end
        return texts

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Token ids int64 [n, L] of `texts` (prompts), cut to the limit as captions are."""
        return torch.from_numpy(self._encoder.encode(texts)[0]).long()
