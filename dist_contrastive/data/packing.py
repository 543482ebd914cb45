"""Writing a source's images into a packed dataset: decode and check each, encode it, write the file whole or not at all.

Every image is decoded in full, upright, as 8-bit RGB (`pictures`); what can't be decoded is left out
and listed. An image whose longest side is above `max_side` is reduced with antialiasing. Small ones are stored raw,
where a JPEG would cost quality and save little; the others as a JPEG. So what the loader's decoder meets was
written here, whatever the source held. The same source gives the same bytes at any number of workers.

Where the source has no test split, a part of each class is held out once it is known which of its files are images: those
whose paths have the smallest hashes, so that the choice changes neither with the machine nor with other classes.
"""

import hashlib
import io
import os
import secrets
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from dist_contrastive.atomic import sync_folder, write_atomic
from dist_contrastive.config import UserError, require
from dist_contrastive.data.beton import PAGE_SIZE, BetonWriter
from dist_contrastive.data.captions import CaptionOptions, given_tokenizer, write_captions
from dist_contrastive.data.folders import TEST_SHARE
from dist_contrastive.data.format import (
    MAX_BAD,
    MAX_SIDE,
    QUALITY,
    TEST,
    TRAIN,
    LeftOut,
    Manifest,
    captions_path,
    manifest_path,
)
from dist_contrastive.data.pictures import BadImageError, NotAnImageError, read_rgb
from dist_contrastive.data.sources import Sample, Source
from dist_contrastive.data.tokenizing import CaptionTokenizer

MAX_RAW_PIXELS = 64 * 64
"""Images of at most this many pixels (12 KiB) are stored raw."""

CHUNK = 16
"""Images that a thread takes at once."""
CHUNKS_AHEAD = 3
"""How many chunks are under way for each thread."""
DEFAULT_CAPTION_OPTIONS = CaptionOptions()
NUM_SHOWN = 3
"""Bad images that an error message names."""


@dataclass(frozen=True)
class Encoded:
    """An image as it is stored."""

    data: bytes
    is_jpeg: bool
    height: int
    width: int
    sums: np.ndarray
    """int64 [3, 2]: each channel's values and their squares summed over the pixels, before JPEG compression."""


def encode(image: Image.Image, *, quality: int, max_side: int) -> Encoded:
    """`image` (RGB) as it is stored: reduced to `max_side`, raw up to `MAX_RAW_PIXELS`, else a JPEG."""
    longest = max(image.size)
    if longest > max_side:
        width, height = (max(1, round(side * max_side / longest)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    is_jpeg = image.width * image.height > MAX_RAW_PIXELS
    if is_jpeg:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        data = buffer.getvalue()
        if len(data) > PAGE_SIZE:
            raise BadImageError(f"its JPEG has {len(data)} bytes, at most {PAGE_SIZE} fit; lower --max-side")
    else:
        data = image.tobytes()
    histogram = np.array(image.histogram(), np.int64).reshape(3, 256)
    values = np.arange(256)
    return Encoded(data, is_jpeg, image.height, image.width, histogram @ np.stack([values, values**2], axis=1))


def write_dataset(
    source: Source,
    out: Path,
    *,
    quality: int = QUALITY,
    max_side: int = MAX_SIDE,
    max_bad: int = MAX_BAD,
    workers: int = 0,
    captions: CaptionOptions = DEFAULT_CAPTION_OPTIONS,
    on_sample: Callable[[], None] | None = None,
) -> Manifest:
    """Pack `source` into the file `out` with its captions, if it has any, and its manifest beside it; an older dataset there
    is replaced.

    `quality` is the JPEG quality in percent, `max_side` the longest side of a stored image in pixels, `max_bad` how many
    images may be bad (files that never were images do not count), `workers` the number of threads that decode (0: one for
    each usable core), `captions` how captions become tokens; `on_sample` is called after each image.

    Each file is written under another name in the same folder, synced to disk and renamed; an interruption removes it.
    The old manifest goes before the renames and the new one comes after them, so that no manifest is ever beside a file
    that it does not describe.

    Raises `UserError` where more than `max_bad` images are bad, a class or a split ends up empty, `out` can't be written,
    or FFCV is missing.
    """
    workers = workers or len(os.sched_getaffinity(0))
    unique = secrets.token_hex(4)  # two runs at once do not meet
    temporary, of_captions = (path.with_name(f".{path.name}.{unique}.incomplete") for path in (out, captions_path(out)))
    encoder = given_tokenizer(captions)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            manifest = _write_file(
                source, temporary, of_captions, quality=quality, max_side=max_side, max_bad=max_bad, workers=workers,
                captions=captions, encoder=encoder, on_sample=on_sample,
            )  # fmt: skip
            manifest_path(out).unlink(missing_ok=True)
            sync_folder(out.parent)
            temporary.rename(out)
            if manifest.captions is None:
                captions_path(out).unlink(missing_ok=True)
            else:
                of_captions.rename(captions_path(out))
        except BaseException:
            temporary.unlink(missing_ok=True)
            of_captions.unlink(missing_ok=True)
            raise
        sync_folder(out.parent)
        write_atomic(manifest_path(out), manifest.to_json().encode())
    except OSError as error:
        raise UserError(
            f"{out} can't be written: {error.strerror or error}; give another place for it or make room there"
        ) from error
    return manifest


def _write_file(
    source: Source,
    path: Path,
    of_captions: Path,
    *,
    quality: int,
    max_side: int,
    max_bad: int,
    workers: int,
    captions: CaptionOptions,
    encoder: CaptionTokenizer | None,
    on_sample: Callable[[], None] | None,
) -> Manifest:
    """Write the `.beton` file itself to `path` and captions to `of_captions`, neither of which may exist, and wait until the
    disk has them."""
    bad = list(source.bad)
    if len(bad) > max_bad:
        raise UserError(too_many(bad, max_bad, "packed"))
    not_images = Counter(source.not_images)
    first_bad: dict[int, LeftOut] = {}
    capacity = len(source.samples)
    packed: list[Sample] = []
    sums, num_pixels = np.zeros((capacity, 3, 2), np.int64), np.zeros(capacity, np.int64)
    widths, heights = set(), set()
    num_jpeg = 0
    with open(path, "x+b") as file:
        writer = BetonWriter(file, capacity)
        for sample, encoded in _encode_all(source, quality=quality, max_side=max_side, workers=workers):
            if isinstance(encoded, BadImageError):
                found = LeftOut(sample.name, f"{encoded} ({sample.where})" if sample.where else str(encoded))
                first_bad.setdefault(sample.label, found)
                if isinstance(encoded, NotAnImageError) and not sample.where:
                    not_images[PurePosixPath(sample.name).suffix.lower()] += 1
                else:
                    bad.append(found)
                if len(bad) > max_bad:
                    raise UserError(too_many(bad, max_bad, "packed"))
            else:
                sums[len(packed)] = encoded.sums
                num_pixels[len(packed)] = encoded.height * encoded.width
                writer.add(
                    encoded.data, is_jpeg=encoded.is_jpeg, height=encoded.height, width=encoded.width,
                    label=sample.label, split=TRAIN if sample.split is None else sample.split,
                )  # fmt: skip
                packed.append(sample)
                widths.add(encoded.width)
                heights.add(encoded.height)
                num_jpeg += encoded.is_jpeg
            if on_sample is not None:
                on_sample()
        held_out = choose_test(packed)
        writer.hold_out(held_out)
        is_test = np.array([sample.split == TEST for sample in packed], bool)
        is_test[held_out] = True
        _check_samples(source, packed, is_test, first_bad)
        writer.finish()
        os.fsync(file.fileno())
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        num_bytes = file.seek(0, os.SEEK_END)
    to_train = np.flatnonzero(~is_test)
    entry = None
    if any(sample.captions for sample in packed):
        entry = write_captions(of_captions, [sample.captions for sample in packed], to_train, captions, encoder)
    mean, std = _moments(sums[to_train].sum(0), int(num_pixels[to_train].sum()))
    return Manifest(
        num_samples=len(packed),
        num_train=len(to_train),
        num_test=int(is_test.sum()),
        classes=source.classes,
        num_jpeg=num_jpeg,
        smallest_width=min(widths),
        largest_width=max(widths),
        smallest_height=min(heights),
        largest_height=max(heights),
        mean=mean,
        std=std,
        source=source.spec,
        left_out=(*source.left_out, *bad),
        num_bytes=num_bytes,
        sha256=sha256,
        split=source.split_note + _missing(source, packed, is_test),
        not_images=dict(sorted(not_images.items())),
        captions=entry,
    )


def choose_test(samples: Sequence[Sample]) -> list[int]:
    """Which of `samples` are held out for the test split, ascending: `TEST_SHARE` of each class (without labels: of all)
    whose split is open, at least one where there are two. A function of the samples' keys alone."""
    of_label: dict[int, list[tuple[bytes, int]]] = {}
    for index, sample in enumerate(samples):
        if sample.split is None:
            digest = hashlib.sha256(os.fsencode(sample.key)).digest()
            of_label.setdefault(sample.label, []).append((digest, index))
    chosen: list[int] = []
    for candidates in of_label.values():
        num_test = min(max(1, round(TEST_SHARE * len(candidates))), len(candidates) - 1)
        chosen += [index for _, index in sorted(candidates)[:num_test]]
    return sorted(chosen)


def _encode_all(
    source: Source, *, quality: int, max_side: int, workers: int
) -> Iterator[tuple[Sample, Encoded | BadImageError]]:
    """Each sample with its encoded image or what is wrong with it, in order; a bounded number is under way at once.

    Threads are enough: Pillow decodes, resizes and encodes without Python's lock.
    """

    def run(sample: Sample) -> Encoded | BadImageError:
        try:
            image = Image.fromarray(sample.image) if isinstance(sample.image, np.ndarray) else read_rgb(sample.image)
            return encode(image, quality=quality, max_side=max_side)
        except BadImageError as error:
            return error

    def run_chunk(chunk: tuple[Sample, ...]) -> list[Encoded | BadImageError]:
        return [run(sample) for sample in chunk]

    chunks = iter([source.samples[start : start + CHUNK] for start in range(0, len(source.samples), CHUNK)])
    pending: deque[tuple[tuple[Sample, ...], Future[list[Encoded | BadImageError]]]] = deque()
    # Pillow warns of large images and odd metadata, file by file; what matters is in the reasons.
    with warnings.catch_warnings(), ThreadPoolExecutor(workers) as pool:
        warnings.simplefilter("ignore")
        try:
            while True:
                for chunk in islice(chunks, CHUNKS_AHEAD * workers - len(pending)):
                    pending.append((chunk, pool.submit(run_chunk, chunk)))
                if not pending:
                    return
                chunk, future = pending.popleft()
                yield from zip(chunk, future.result(), strict=True)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def too_many(left_out: list[LeftOut], max_bad: int, done: str) -> str:
    """The line about more than `max_bad` images that can't be `done`, as in `packed`."""
    shown = "; ".join(f"{bad.name} ({bad.reason})" for bad in left_out[:NUM_SHOWN])
    count = "an image" if max_bad == 0 else f"more than {max_bad} images"
    more = "; ..." if len(left_out) > NUM_SHOWN else ""
    return f"{count} can't be {done}: {shown}{more}; repair or remove them, or allow more with --max-bad"


def _check_samples(
    source: Source, packed: Sequence[Sample], is_test: np.ndarray, first_bad: dict[int, LeftOut]
) -> None:
    """Every class has an image, and so has each split that the source has; `is_test` is bool [len(packed)].

    `first_bad` has a bad image of each class (by label) that has one.
    """
    found = {sample.label for sample in packed}
    for label, name in enumerate(source.classes):
        bad = first_bad.get(label)
        example = f" ({bad.name}, {bad.reason})" if bad is not None else ""
        require(label in found, f"class {name} of {source.spec} has no readable image{example}; repair or remove it")
    require(
        not bool(is_test.all()),
        f"{source.spec} has no readable image to train on ({source.split_note}); repair its training images",
    )
    require(
        bool(is_test.any()) or all(sample.split != TEST for sample in source.samples),
        f"{source.spec} has no readable image to test on ({source.split_note}); repair or remove its test images",
    )


def _missing(source: Source, packed: Sequence[Sample], is_test: np.ndarray) -> str:
    """What the note on the splits adds: where one has no image, or none of some classes; `is_test` is bool [len(packed)]."""
    text = ""
    for split, of_split in (("train", ~is_test), ("test", is_test)):
        found = {sample.label for sample, is_in in zip(packed, of_split, strict=True) if is_in}
        missing = [name for label, name in enumerate(source.classes) if label not in found]
        if not found:
            text += f"; no image to {split}: too few"
        elif missing:
            more = ", ..." if len(missing) > NUM_SHOWN else ""
            text += f"; no image to {split} of {len(missing)} class(es): {', '.join(missing[:NUM_SHOWN])}{more}"
    return text


def _moments(sums: np.ndarray, num_pixels: int) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of each channel, in units of the full range, from the sums int64 [3, 2] over the pixels.

    The sums are exact integers: no order of summation changes the result.
    """
    mean, std = [], []
    for first, second in sums.tolist():
        mean.append(first / num_pixels / 255)
        std.append((num_pixels * second - first**2) ** 0.5 / num_pixels / 255)
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])
