"""Captions as token ids: a byte-level BPE that is learned from them, or a tokenizer that is given.

What is learned is lower-cased as CLIP's is (Radford et al. 2021); no character is unknown to it, as it knows all bytes. The
same captions, in any order, give the same tokenizer. A caption is `start`, its tokens and `end`, then padding: the id
`PADDING`, whatever a given tokenizer pads with. What is longer than the limit loses tokens before `end`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from dist_contrastive.config import PADDING, UserError

PADDING_TOKEN, START_TOKEN, END_TOKEN = "<pad>", "<start>", "<end>"
STARTS = (START_TOKEN, "<|startoftext|>", "<s>", "[CLS]", "<bos>", "<|begin_of_text|>")
"""What a tokenizer may call its start; of several the first counts."""
ENDS = (END_TOKEN, "<|endoftext|>", "</s>", "[SEP]", "<eos>", "<|end_of_text|>")

PIECE = 1 << 14
"""Captions that are encoded at once."""


@dataclass(frozen=True)
class CaptionTokenizer:
    """Encodes texts as token ids int32 [n, L]."""

    tokenizer: Tokenizer
    start: int
    end: int
    max_tokens: int
    """L"""

    @cached_property
    def vocabulary_size(self) -> int:
        """Token ids are below it."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def json(self) -> bytes:
        """The tokenizer's own JSON, from which `read_tokenizer` makes it again."""
        return self.tokenizer.to_str().encode()

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, int]:
        """Token ids int32 [n, L] of `texts`, and how many of these were cut to the limit."""
        rows = np.full((len(texts), self.max_tokens), PADDING, np.int32)
        num_cut = 0
        for first in range(0, len(texts), PIECE):
            encoded = self.tokenizer.encode_batch(list(texts[first : first + PIECE]), add_special_tokens=False)
            for row, ids in zip(rows[first:], (found.ids for found in encoded), strict=False):
                num_cut += len(ids) > self.max_tokens - 2
                kept = [self.start, *ids[: self.max_tokens - 2], self.end]
                row[: len(kept)] = kept
        return rows, num_cut


def learn_tokenizer(texts: Iterable[str], *, vocabulary: int, max_tokens: int) -> CaptionTokenizer:
    """A byte-level BPE of at most `vocabulary` tokens, fewer where `texts` do not give as many (Sennrich et al. 2016)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    # A word is the same tokens at the beginning of a caption and within it.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=[PADDING_TOKEN, START_TOKEN, END_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.token_to_id(PADDING_TOKEN) == PADDING
    return _encoder(tokenizer, max_tokens)


def read_tokenizer(data: bytes, *, max_tokens: int, name: str) -> CaptionTokenizer:
    """The tokenizer whose JSON is `data`; `name` is where it comes from. It gets a start and an end where it has none.

    Raises `UserError` where it is not the JSON of a tokenizer.
    """
    try:
        tokenizer = Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises Exception itself
        raise UserError(
            f"{name} is not a tokenizer that this version of the tokenizers library reads "
            f"({' '.join(str(error).split())}); give a tokenizer.json as the library saves it"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return _encoder(tokenizer, max_tokens)


def read_tokenizer_file(path: Path, *, max_tokens: int) -> CaptionTokenizer:
    """The tokenizer of a tokenizer.json."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"--tokenizer {path} can't be read: {error.strerror}; give a tokenizer.json") from error
    return read_tokenizer(data, max_tokens=max_tokens, name=f"--tokenizer {path}")


def _encoder(tokenizer: Tokenizer, max_tokens: int) -> CaptionTokenizer:
    start, end = (_special(tokenizer, names) for names in (STARTS, ENDS))
    tokenizer.encode_special_tokens = True  # "<end>" in a caption is text and ends nothing
    return CaptionTokenizer(tokenizer, start, end, max_tokens)


def _special(tokenizer: Tokenizer, names: Sequence[str]) -> int:
    """The id of the first of `names` that the tokenizer has; it gets the first one where it has none of them."""
    known = next((name for name in names if tokenizer.token_to_id(name) is not None), None)
    if known is None:
        known = names[0]
        tokenizer.add_special_tokens([known])
    number = tokenizer.token_to_id(known)
    assert number is not None
    return number
