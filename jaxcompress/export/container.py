"""The safetensors container: a JSON header and the bytes of named arrays; its reader is strict.

Layout (https://github.com/huggingface/safetensors): 8 bytes little-endian length of the header,
the header, the data. Written and read (container_read.py) with NumPy alone, since shipping must
need no extra.
"""

import json
import math
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

DTYPES: dict[str, Any] = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


class FileSize(NamedTuple):
    """Bytes of a file on disk: all of it, its header (length field included), its arrays.

    Of a compressed file, header and arrays before they were compressed.
    """

    file_bytes: int
    header_bytes: int
    payload_bytes: int

    @property
    def raw_bytes(self) -> int:
        """Bytes of the file if it were not compressed."""
        return self.header_bytes + self.payload_bytes

    @property
    def ratio(self) -> float:
        """How many times smaller compression made the file: `raw_bytes` over `file_bytes`."""
        return self.raw_bytes / self.file_bytes


class Entry(NamedTuple):
    """An array of a file: bytes `first` to `last` of the data."""

    dtype: np.dtype
    shape: tuple[int, ...]
    first: int
    last: int


class Header(NamedTuple):
    """What a file holds, without its data."""

    entries: dict[str, Entry]  # in the order of the data
    metadata: dict[str, str]
    data_start: int  # of the data, in bytes from the start of the file


def encode(arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> tuple[bytes, FileSize]:
    """The bytes of a file of arrays and string metadata, and what they are made of.

    Raises:
      TypeError: an array's dtype has no name in the format.
    """
    parts, size = encode_parts(arrays, metadata)
    return b"".join(parts), size


def encode_parts(
    arrays: dict[str, np.ndarray], metadata: dict[str, str]
) -> tuple[list[bytes], FileSize]:
    """What `encode` gives, in parts: the header, then each array."""
    header, entries = layout(arrays, metadata)
    data = [np.ascontiguousarray(arrays[name]).tobytes() for name in entries]
    checksum = open_checksum(header)
    for part in data:
        checksum = zlib.crc32(part, checksum)
    parts = [seal(header, checksum), *data]
    total = sum(map(len, parts))
    return parts, FileSize(total, len(parts[0]), total - len(parts[0]))


def layout(
    arrays: Mapping[str, Any], metadata: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, Entry]]:
    """The header of a file that is to be written, and where each array will lie in its data.

    Args:
      arrays: arrays, or their shapes and dtypes (`jax.ShapeDtypeStruct`).
      metadata: strings; with any, the file has a checksum.

    Raises:
      TypeError: an array's dtype has no name in the format.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    entries, offset = {}, 0
    # Wide elements first, so that each array is aligned for its type.
    for name in sorted(arrays, key=lambda n: (-np.dtype(arrays[n].dtype).itemsize, n)):
        dtype, shape = np.dtype(arrays[name].dtype), tuple(arrays[name].shape)
        if dtype not in _NAMES:
            raise TypeError(f"{name}: dtype {dtype} has no name in the file format")
        last = offset + nbytes_of(dtype, shape)
        entries[name] = Entry(dtype, shape, offset, last)
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, last],
        }
        offset = last
    return header, entries


def open_checksum(header: dict[str, Any]) -> int:
    """What the crc32 of the data starts from: that of the header without a checksum."""
    return zlib.crc32(_dump(header))


def seal(header: dict[str, Any], checksum: int) -> bytes:
    """The bytes before the data: length field, and the header with the checksum in it.

    Their number does not depend on the checksum.
    """
    if "__metadata__" in header:
        metadata = {**header["__metadata__"], "crc32": f"{checksum:08x}"}
        header = {**header, "__metadata__": metadata}
    text = _dump(header)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def nbytes_of(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    """Bytes of an array."""
    return math.prod(shape) * dtype.itemsize


def _dump(header: dict[str, Any]) -> bytes:
    return json.dumps(header, separators=(",", ":")).encode()
