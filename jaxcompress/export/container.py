"""The safetensors container: a JSON header and the bytes of named arrays; a strict reader.

Layout (https://github.com/huggingface/safetensors): 8 bytes little-endian length of the header,
the header, the data. Written and read with NumPy alone, since shipping must need no extra.
"""

import io
import json
import math
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

_DTYPES: dict[str, Any] = {
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
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # the limit of the format's own reader


class FileSize(NamedTuple):
    """Bytes of a file on disk: all of it, its header (length field included), its arrays."""

    file_bytes: int
    header_bytes: int
    payload_bytes: int


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
    header, entries = layout(arrays, metadata)
    data = b"".join(np.ascontiguousarray(arrays[name]).tobytes() for name in entries)
    head = seal(header, zlib.crc32(data, open_checksum(header)))
    return head + data, FileSize(len(head) + len(data), len(head), len(data))


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
        last = offset + _nbytes(dtype, shape)
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


def _nbytes(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize


def _dump(header: dict[str, Any]) -> bytes:
    return json.dumps(header, separators=(",", ":")).encode()


def read(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays and metadata of a file; every length is checked before anything is allocated.

    Raises:
      FileNotFoundError: no such file.
      ValueError: truncated, with bytes left over, a damaged header or a wrong checksum; the
        message names the file and what is wrong.
    """
    path = Path(path)
    raw = path.read_bytes()
    header, start = _parsed(path, io.BytesIO(raw), len(raw))
    metadata = _metadata(path, header)
    checksum, data = metadata.pop("crc32", None), memoryview(raw)[start:]
    expected = f"{zlib.crc32(data, open_checksum(header)):08x}" if checksum else None
    header.pop("__metadata__", None)
    arrays = {
        name: np.frombuffer(data[first:last], dtype).reshape(shape)
        for name, (dtype, shape, first, last) in _entries(path, header, len(data)).items()
    }
    if checksum != expected:
        raise _damaged(path, "its checksum is wrong")
    return arrays, metadata if checksum is None else {**metadata, "crc32": checksum}


def read_header(path: str | os.PathLike) -> Header:
    """What a file holds, its data left on disk: the checksum is not tested.

    Raises:
      FileNotFoundError, ValueError: as `read`.
    """
    path = Path(path)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        header, start = _parsed(path, file, size)
    metadata = _metadata(path, header)
    header.pop("__metadata__", None)
    return Header(_entries(path, header, size - start), metadata, start)


def _metadata(path: Path, header: dict[str, Any]) -> dict[str, str]:
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(path, "its metadata are not strings")
    return metadata


def _entries(path: Path, header: dict[str, Any], data_bytes: int) -> dict[str, Entry]:
    # Every length is checked: the arrays fill the data, one after the other.
    found = {name: _entry(path, name, entry) for name, entry in header.items()}
    entries, end = {}, 0
    for name, entry in sorted(found.items(), key=lambda item: (item[1].first, item[1].last)):
        if entry.first != end or entry.last != end + _nbytes(entry.dtype, entry.shape):
            raise _damaged(path, f"{name!r} does not lie where its shape says")
        if entry.last > data_bytes:
            raise ValueError(
                f"{path}: truncated: {name!r} ends at byte {entry.last} of the data, "
                f"which has {data_bytes}"
            )
        entries[name], end = entry, entry.last
    if end != data_bytes:
        raise _damaged(path, f"{data_bytes - end} bytes follow the last array")
    return entries


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(f"{path}: not a readable packed file: {why}")


def _parsed(path: Path, file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    # The header, and where the data begin.
    if size < 8:
        raise ValueError(f"{path}: truncated: {size} bytes, less than the length field")
    length = int.from_bytes(file.read(8), "little")
    if length > _MAX_HEADER or 8 + length > size:
        raise ValueError(
            f"{path}: truncated or not a packed file: the header should have {length} bytes, "
            f"{size - 8} are there"
        )
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON ({type(error).__name__})") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not an object")
    return header, 8 + length


def _entry(path: Path, name: str, entry: Any) -> Entry:
    try:
        dtype = np.dtype(_DTYPES[entry["dtype"]])
        shape, (first, last) = tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"the entry {name!r} is malformed: {_flaw(entry)}") from error
    numbers = (*shape, first, last)
    if len(shape) > 32 or not all(type(n) is int and 0 <= n < 2**48 for n in numbers):
        raise _damaged(path, f"the entry {name!r} has impossible sizes")
    return Entry(dtype, shape, first, last)


def _flaw(entry: Any) -> str:
    dtype = entry.get("dtype") if isinstance(entry, dict) else None
    if isinstance(dtype, str) and dtype not in _DTYPES:
        return f"dtype {dtype!r} is none of {', '.join(_DTYPES)}"
    return "it needs dtype, shape and data_offsets"
