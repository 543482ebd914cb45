"""Packed datasets: what a `.beton` holds, opening one safely. The only module that imports ffcv.

A dataset is FFCV's `.beton` with the fields `image`, `label` and `split`, which a plain `ffcv.Loader` opens as well, a
manifest beside it (`OUT.beton.json`) with its checksum and, where the images have captions, `OUT.beton.captions`. FFCV
itself checks nothing: an interrupted file opens with zeroed metadata, and compiled code follows whatever addresses the file
gives it. So a file without a manifest that matches is refused, and every address is checked to lie inside the file before
compiled code sees it.
"""

import ctypes
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import llvmlite.binding
import numba
import numba.typed
import numpy as np

from dist_contrastive import distributed, liveness, signals
from dist_contrastive.config import UserError, require
from dist_contrastive.data.captions import Captions
from dist_contrastive.data.format import NO_LABEL, TEST, TRAIN, Manifest, captions_path, find_manifest, pack_again

DECODE_SYMBOL = "dist_contrastive_imdecode"

# FFCV keeps two constants in a numba dictionary, for which every process would compile for five seconds. Its compiled code
# never sees the dictionary, so a plain one serves, for the time of this import alone.
_numba_dict = numba.typed.Dict
numba.typed.Dict = dict
try:
    import ffcv.libffcv
    import ffcv.reader
    import ffcv.types
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.rgb_image import IMAGE_MODES
    from ffcv.utils import align_to_page
except (ImportError, OSError) as _error:  # OSError: a shared library that ctypes can't load
    _ffcv_error: Exception | None = _error
else:
    _ffcv_error = None
    # Registering is cheap and has to happen in each process before compiled code that was kept on disk is loaded.
    llvmlite.binding.add_symbol(DECODE_SYMBOL, ctypes.cast(ffcv.libffcv.lib.imdecode, ctypes.c_void_p).value)
finally:
    numba.typed.Dict = _numba_dict

IMAGE_FIELD, LABEL_FIELD, SPLIT_FIELD = "image", "label", "split"

# int32(source, source bytes, source height, source width, destination, crop height, crop width, offset x, offset y,
# scale numerator, scale denominator, enable crop, flip)
_DECODE_SIGNATURE = numba.types.int32(
    numba.types.uintp, numba.types.uint64, numba.types.uint32, numba.types.uint32, numba.types.uintp,
    numba.types.uint32, numba.types.uint32, numba.types.uint32, numba.types.uint32,
    numba.types.uint32, numba.types.uint32, numba.types.uint8, numba.types.uint8,
)  # fmt: skip

TURBOJPEG_DECODE = numba.types.ExternalFunction(DECODE_SYMBOL, _DECODE_SIGNATURE)
"""FFCV's JPEG decoder for compiled code: decodes `src` to RGB at `dst`; 0 means fine.

FFCV's own binding discards the return code, so that a corrupt JPEG gives wrong pixels without a word. The function is
found by its name and not by its address, so that compiled callers can be kept on disk (`cache=True`).
"""


PAGE_SIZE = 1 << 23
"""Bytes of a page, FFCV's own choice; no sample lies across two pages, so no encoded image may be larger."""

MAX_SIDE = (1 << 16) - 1
"""Pixels: FFCV keeps widths and heights in 16 bits."""


def require_ffcv() -> None:
    """Raise `UserError` with the commands that install it where FFCV or one of its shared libraries is missing."""
    if _ffcv_error is not None:
        raise UserError(
            f"FFCV can't be loaded ({_ffcv_error}): `apt-get install libopencv-dev libturbojpeg0-dev pkg-config g++`, "
            "then `pip install ffcv`"
        )


@dataclass(frozen=True)
class Images:
    """Images as they are stored, one after the other in one piece of memory. N samples."""

    file_bytes: np.ndarray
    """uint8, read-only: the mapped file, if they are those of one"""
    pointers: np.ndarray
    """int64 [N]: where in it each sample's image starts"""
    sizes: np.ndarray
    """int64 [N]: bytes of each sample's image"""
    is_jpeg: np.ndarray
    """uint8 [N]: 1 for a JPEG, 0 for raw RGB (height × width × 3)"""
    heights: np.ndarray
    """int32 [N]"""
    widths: np.ndarray
    """int32 [N]"""

    @classmethod
    def raw(cls, pictures: Sequence[np.ndarray]) -> "Images":
        """Of N `pictures` uint8 [h, w, 3]; N is at least 1."""
        stored = np.concatenate([np.ascontiguousarray(picture).reshape(-1) for picture in pictures])
        stored.flags.writeable = False  # as a file is: compiled code knows one kind
        heights, widths = (np.array([picture.shape[axis] for picture in pictures], np.int32) for axis in (0, 1))
        sizes = 3 * heights.astype(np.int64) * widths
        return cls(stored, np.cumsum(sizes) - sizes, sizes, np.zeros(len(sizes), np.uint8), heights, widths)


@dataclass(frozen=True)
class Dataset(Images):
    """A packed dataset that was opened and checked."""

    path: Path
    manifest: Manifest
    labels: np.ndarray
    """int64 [N]: a class, or `NO_LABEL` for all"""
    splits: np.ndarray
    """int64 [N]: `TRAIN` or `TEST`"""
    captions: Captions | None = None
    """None where the images have none."""

    @property
    def num_samples(self) -> int:
        return len(self.labels)

    def indices(self, split: int) -> np.ndarray:
        """The samples of a split in ascending order, int64."""
        return np.flatnonzero(self.splits == split).astype(np.int64)


class _GivesWay(io.FileIO):
    """A file whose reading gives way where the run is to stop."""

    def readinto(self, buffer: Any) -> int:
        signals.give_way()
        return super().readinto(buffer) or 0


def _require_unaltered(path: Path, sha256: str, again: str) -> None:
    with _GivesWay(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    require(digest == sha256, f"{path} was altered: its SHA-256 is not its manifest's; {again}")


def open_dataset(path: Path, *, verify: bool = True) -> Dataset:
    """Open a packed dataset for reading.

    `verify` reads the whole file and that of its captions once and compares their SHA-256 with the manifest's (about a second
    for each gigabyte); the sizes, the counts and every address are checked in any case.

    Raises `UserError` where a file or its manifest is missing, they do not match, or FFCV can't be loaded.
    """
    require_ffcv()
    again = pack_again(path)
    manifest = find_manifest(path)
    try:
        if verify:
            _require_unaltered(path, manifest.sha256, again)
            if manifest.captions is not None:
                _require_unaltered(captions_path(path), manifest.captions.sha256, again)
        reader = ffcv.reader.Reader(str(path))
        file_bytes = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from error
    except (AssertionError, LookupError, ValueError, TypeError, MemoryError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not a .beton file that FFCV can read ({error}); {again}") from error

    expected = {IMAGE_FIELD: RGBImageField, LABEL_FIELD: IntField, SPLIT_FIELD: IntField}
    found = {name: type(handler) for name, handler in reader.handlers.items()}
    require(found == expected, f"{path} has fields {', '.join(found)}, not {', '.join(expected)}; {again}")
    columns = dict(zip(expected, reader.metadata.dtype.names, strict=True))
    images = reader.metadata[columns[IMAGE_FIELD]]
    labels = reader.metadata[columns[LABEL_FIELD]].astype(np.int64)
    splits = reader.metadata[columns[SPLIT_FIELD]].astype(np.int64)
    counts = (len(labels), int(np.sum(splits == TRAIN)), int(np.sum(splits == TEST)))
    require(
        counts == (manifest.num_samples, manifest.num_train, manifest.num_test)
        and len(reader.alloc_table) == len(labels) == reader.num_samples,
        f"{path} holds {counts[0]} samples ({counts[1]} to train, {counts[2]} to test), its manifest says "
        f"{manifest.num_samples} ({manifest.num_train}, {manifest.num_test}); {again}",
    )
    dataset = Dataset(
        path=path,
        manifest=manifest,
        labels=labels,
        splits=splits,
        file_bytes=file_bytes,
        pointers=images["data_ptr"].astype(np.int64),
        sizes=reader.alloc_table["size"].astype(np.int64),
        is_jpeg=(images["mode"] == IMAGE_MODES["jpg"]).astype(np.uint8),
        heights=images["height"].astype(np.int32),
        widths=images["width"].astype(np.int32),
        captions=Captions(path, manifest) if manifest.captions is not None else None,
    )
    # Compiled code follows these without a check of its own.
    first_label, num_labels = (0, len(manifest.classes)) if manifest.classes else (NO_LABEL, 1)
    raw_bytes = dataset.heights.astype(np.int64) * dataset.widths * 3
    in_file = (dataset.pointers >= 0) & (dataset.sizes > 0) & (dataset.pointers <= manifest.num_bytes - dataset.sizes)
    require(
        bool(
            np.array_equal(reader.alloc_table["sample_id"], np.arange(len(labels)))
            and np.array_equal(reader.alloc_table["ptr"].astype(np.int64), dataset.pointers)
            and np.all(in_file & (raw_bytes > 0) & ((dataset.is_jpeg == 1) | (dataset.sizes == raw_bytes)))
            and np.all((labels >= first_label) & (labels < first_label + num_labels))
        ),
        f"{path} has samples that lie outside the file or belong to no class; {again}",
    )
    return dataset


def open_verified(path: Path) -> Dataset:
    """One rank of each host reads the whole file to verify it; the others trust that rank."""
    if distributed.local_rank():
        return open_dataset(path, verify=False)
    with liveness.busy(f"verifies {path}"):
        return open_dataset(path)


class BetonWriter:
    """Writes the samples of a `.beton` one after the other into a file that is open for writing.

    FFCV's own `DatasetWriter` hangs for ever where one sample raises or the disk is full, and with several workers the
    order of its pages depends on which is the fastest. This one uses FFCV's types for everything that reaches the file
    and writes in the order of the calls: the same samples give the same bytes.

    Layout: header, field descriptors, metadata of all samples, then from the next page on the images, then the table
    of allocations. `capacity` is the largest number of samples that will be added: the metadata lies before the images,
    so its room has to be known first. Bad samples leave a part of it unused.
    """

    def __init__(self, file: BinaryIO, capacity: int) -> None:
        require_ffcv()
        handlers = {IMAGE_FIELD: RGBImageField(), LABEL_FIELD: IntField(), SPLIT_FIELD: IntField()}
        self._descriptors = np.zeros(len(handlers), dtype=ffcv.types.FieldDescType)
        type_ids = {handler: type_id for type_id, handler in ffcv.types.TYPE_ID_HANDLER.items()}
        for descriptor, (name, handler) in zip(self._descriptors, handlers.items(), strict=True):
            descriptor["type_id"] = type_ids[type(handler)]
            encoded_name = np.frombuffer(name.encode("ascii"), dtype=np.uint8)
            descriptor["name"][: len(encoded_name)] = encoded_name
            descriptor["arguments"][:] = handler.to_binary()[0]
        self._metadata = np.zeros(capacity, dtype=ffcv.types.get_metadata_type(list(handlers.values())))
        self._allocations = np.zeros(capacity, dtype=ffcv.types.ALLOC_TABLE_TYPE)
        self._columns = [self._metadata[name] for name in self._metadata.dtype.names or ()]
        self._handlers = list(handlers.values())
        self._metadata_start = ffcv.types.HeaderType.itemsize + self._descriptors.nbytes
        self._file = file
        self._position = align_to_page(self._metadata_start + self._metadata.nbytes, PAGE_SIZE)
        file.seek(self._position)
        self.num_samples = 0

    def add(self, data: bytes, *, is_jpeg: bool, height: int, width: int, label: int, split: int) -> None:
        """Append a sample whose encoded image is `data` (a JPEG, or height × width × 3 bytes RGB)."""
        assert 0 < len(data) <= PAGE_SIZE, f"{len(data)} bytes do not fit on a page"
        assert is_jpeg or len(data) == height * width * 3, "the raw image's size does not match its shape"
        left = -self._position % PAGE_SIZE or PAGE_SIZE
        if len(data) > left:
            self._file.write(bytes(left))
            self._position += left
        index = self.num_samples
        images, labels, splits = self._columns
        images[index] = (IMAGE_MODES["jpg" if is_jpeg else "raw"], width, height, self._position)
        self._handlers[1].encode(labels[index : index + 1], label, None)
        self._handlers[2].encode(splits[index : index + 1], split, None)
        self._allocations[index] = (index, self._position, len(data))
        self._file.write(data)
        self._position += len(data)
        self.num_samples += 1

    def hold_out(self, indices: Sequence[int]) -> None:
        """Make the samples `indices` (in the order of the calls of `add`) the test split."""
        for index in indices:
            self._handlers[2].encode(self._columns[2][index : index + 1], TEST, None)

    def finish(self) -> None:
        """Write what FFCV reads first. Until then the file is not a `.beton` (its version is 0)."""
        header = np.zeros(1, dtype=ffcv.types.HeaderType)
        header["version"] = ffcv.types.CURRENT_VERSION
        header["num_fields"] = len(self._descriptors)
        header["page_size"] = PAGE_SIZE
        header["num_samples"] = self.num_samples
        header["alloc_table_ptr"] = self._position
        self._file.write(self._allocations[: self.num_samples].tobytes())
        self._file.seek(0)
        self._file.write(header.tobytes())
        self._file.write(self._descriptors.tobytes())
        self._file.write(self._metadata[: self.num_samples].tobytes())
        self._file.flush()
