"""Files of tensors (safetensors), written and summed a piece at a time: no file is ever in memory as a whole.

The library's own writers give no sum of what they wrote, and reading a file back to sum it would read from memory what the
disk may have got wrong all the same. The format is three parts: the header's length (8 bytes, little-endian), the header
(JSON, padded with spaces), and the tensors' bytes, C-contiguous and little-endian.
"""

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import safetensors
import torch
from torch import Tensor

Tensors = dict[str, Tensor]

PIECE_BYTES = 2**24
ALIGNMENT = 8
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

assert sys.byteorder == "little", "tensors are written as they lie in memory"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write `tensors`, on any device, as the file `path`, wait until the disk has it, and return its SHA-256.

    Beyond the tensors themselves it takes the memory of one of them, where that is not contiguous in host memory.
    """
    # The largest elements first, so that each tensor starts at a multiple of its element's size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % ALIGNMENT)
    sha256 = hashlib.sha256()
    with open(path, "wb", buffering=0) as file:

        def write(data: memoryview) -> None:
            sha256.update(data)
            while data:
                data = data[file.write(data) :]

        write(memoryview(len(header).to_bytes(8, "little") + header))
        for name in names:
            content = tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
            for start in range(0, len(content), PIECE_BYTES):
                write(content[start : start + PIECE_BYTES])
        os.fsync(file.fileno())
    return sha256.hexdigest()


def read_tensors(path: Path) -> Tensors:
    """The tensors of a file, on the CPU, mapped into memory: their bytes are read where they are used.

    Raises `safetensors.SafetensorError` where it is no such file.
    """
    with safetensors.safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes; raises OSError where the disk does not give them."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class HostCopy:
    """Copies tensors to host memory, into the same buffers each time (page-locked ones for what comes from a GPU)."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}

    def __call__(self, groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensors]:
        """Contiguous copies of the tensors in each group, valid until the next call."""
        copies = {
            group: {name: self._copy((group, name), tensor.detach()) for name, tensor in tensors.items()}
            for group, tensors in groups.items()
        }
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        return copies

    def _copy(self, key: tuple[str, str], tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[key] = buffer
        return buffer.copy_(tensor, non_blocking=True)
