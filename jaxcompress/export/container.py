"""The safetensors container: a JSON header and the bytes of named arrays; a strict reader.

Layout (https://github.com/huggingface/safetensors): 8 bytes little-endian length of the header,
the header, the data. Written and read with NumPy alone, since shipping must need no extra.
"""

import json
import os
import zlib
from pathlib import Path
from typing import Any, NamedTuple

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
}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # the limit of the format's own reader


class FileSize(NamedTuple):
    """Bytes of a file on disk: all of it, its header (length field included), its arrays."""

    file_bytes: int
    header_bytes: int
    payload_bytes: int


def encode(arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> tuple[bytes, FileSize]:
    """The bytes of a file of arrays and string metadata, and what they are made of.

    Raises:
      TypeError: an array's dtype has no name in the format.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    blobs, offset = [], 0
    # Wide elements first, so that each array is aligned for its type.
    for name in sorted(arrays, key=lambda n: (-arrays[n].dtype.itemsize, n)):
        array = np.ascontiguousarray(arrays[name])
        if array.dtype not in _NAMES:
            raise TypeError(f"{name}: dtype {array.dtype} has no name in the file format")
        blob = array.tobytes()
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(arrays[name].shape),
            "data_offsets": [offset, offset + len(blob)],
        }
        blobs.append(blob)
        offset += len(blob)
    data = b"".join(blobs)
    if metadata:
        header["__metadata__"]["crc32"] = _checksum(header, data)
    text = _dump(header)
    text += b" " * (-len(text) % 8)
    content = len(text).to_bytes(8, "little") + text + data
    return content, FileSize(len(content), 8 + len(text), len(data))


def _dump(header: dict[str, Any]) -> bytes:
    return json.dumps(header, separators=(",", ":")).encode()


def _checksum(header: dict[str, Any], data: bytes | memoryview) -> str:
    # Of the header without this entry, and the data.
    return f"{zlib.crc32(data, zlib.crc32(_dump(header))):08x}"


def read(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays and metadata of a file; every length is checked before anything is allocated.

    Raises:
      FileNotFoundError: no such file.
      ValueError: truncated, with bytes left over, a damaged header or a wrong checksum; the
        message names the file and what is wrong.
    """
    path = Path(path)
    raw = path.read_bytes()
    header, data = _header(path, raw)
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(path, "its metadata are not strings")
    checksum = metadata.pop("crc32", None)
    expected = None if checksum is None else _checksum(header, data)
    header.pop("__metadata__", None)
    arrays, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: _start(path, item)):
        dtype, shape, (first, last) = _entry(path, name, entry)
        size = int(np.prod(shape, dtype=object)) * dtype.itemsize
        if first != end or last != first + size:
            raise _damaged(path, f"{name!r} does not lie where its shape says")
        if last > len(data):
            raise ValueError(
                f"{path}: truncated: {name!r} ends at byte {last} of the data, "
                f"which has {len(data)}"
            )
        arrays[name] = np.frombuffer(data, dtype, count=size // dtype.itemsize, offset=first)
        arrays[name] = arrays[name].reshape(shape)
        end = last
    if end != len(data):
        raise _damaged(path, f"{len(data) - end} bytes follow the last array")
    if checksum != expected:
        raise _damaged(path, "its checksum is wrong")
    return arrays, metadata if checksum is None else {**metadata, "crc32": checksum}


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(f"{path}: not a readable packed file: {why}")


def _header(path: Path, raw: bytes) -> tuple[dict[str, Any], memoryview]:
    if len(raw) < 8:
        raise ValueError(f"{path}: truncated: {len(raw)} bytes, less than the length field")
    length = int.from_bytes(raw[:8], "little")
    if length > _MAX_HEADER or 8 + length > len(raw):
        raise ValueError(
            f"{path}: truncated or not a packed file: the header should have {length} bytes, "
            f"{len(raw) - 8} are there"
        )
    try:
        header = json.loads(raw[8 : 8 + length])
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON ({type(error).__name__})") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not an object")
    return header, memoryview(raw)[8 + length :]


def _start(path: Path, item: tuple[str, Any]) -> tuple[int, int]:
    _, _, (first, last) = _entry(path, *item)
    return first, last


def _entry(path: Path, name: str, entry: Any):
    try:
        dtype = np.dtype(_DTYPES[entry["dtype"]])
        shape, (first, last) = tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"the entry {name!r} is malformed") from error
    numbers = (*shape, first, last)
    if len(shape) > 32 or not all(type(n) is int and 0 <= n < 2**48 for n in numbers):
        raise _damaged(path, f"the entry {name!r} has impossible sizes")
    return dtype, shape, (first, last)
