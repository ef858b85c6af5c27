"""The safetensors container: a JSON header and the bytes of named arrays.

Layout (https://github.com/huggingface/safetensors): 8 bytes little-endian length of the header,
the header, the data. Written and read (export/container_read.py) with NumPy alone, since shipping
must need no extra.

An entry of the header takes about 80 bytes, more than a small array does. Arrays below 4 KiB can
lie in pools, therefore: one array for each dtype (`.F32`, `.U8`), which holds them one after the
other in the order of their names. Who reads a pool must know names, dtypes and shapes from
elsewhere.
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
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "C64": np.complex64,
    "F4": ml_dtypes.float4_e2m1fn,
    "F6_E2M3": ml_dtypes.float6_e2m3fn,
    "F6_E3M2": ml_dtypes.float6_e3m2fn,
}
# Elements take a byte in memory, and these bits in a file, the first ones in the lowest bits.
_BITS = {np.dtype(DTYPES[name]): bits for name, bits in (("F4", 4), ("F6_E2M3", 6), ("F6_E3M2", 6))}
POOL = "."  # begins the name of a pool
_SMALL_BYTES = 2**12
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
    return filled(arrays, *layout(arrays, metadata))


def filled(
    arrays: Mapping[str, np.ndarray], header: dict[str, Any], entries: Mapping[str, Entry]
) -> tuple[list[bytes], FileSize]:
    """The parts of a file of arrays that `layout` has placed."""
    data = [to_bytes(arrays[name]) for name in entries]
    checksum = open_checksum(header)
    for part in data:
        checksum = zlib.crc32(part, checksum)
    parts = [seal(header, checksum), *data]
    total = sum(map(len, parts))
    return parts, FileSize(total, len(parts[0]), total - len(parts[0]))


def is_small(array: Any) -> bool:
    """Whether an array, or its shape and dtype, lies in a pool where there are pools.

    Elements of less than a byte do not: their arrays end within a byte.
    """
    dtype = np.dtype(array.dtype)
    return dtype not in _BITS and nbytes_of(dtype, tuple(array.shape)) < _SMALL_BYTES


def split_pools(
    arrays: Mapping[str, np.ndarray], known: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """All arrays by their own names.

    Args:
      arrays: of a file.
      known: shapes and dtypes by name; those that are small lie in pools.

    Raises:
      ValueError: a pool is missing, or of another size than its arrays.
    """
    pools = {POOL + name for name in DTYPES} & arrays.keys()
    found = {name: array for name, array in arrays.items() if name not in pools}
    ends = dict.fromkeys(pools, 0)
    for name in sorted(name for name, aval in known.items() if is_small(aval)):
        shape, pool = tuple(known[name].shape), POOL + dtype_name(name, known[name].dtype)
        first, count = ends.get(pool, 0), math.prod(shape)
        if name in found or pool not in pools or first + count > arrays[pool].size:
            raise ValueError(f"{name!r} should lie in {pool!r}, which does not hold it")
        found[name] = arrays[pool].reshape(-1)[first : first + count].reshape(shape)
        ends[pool] = first + count
    if left := [pool for pool, end in ends.items() if end != arrays[pool].size]:
        raise ValueError(f"{left[0]!r} holds more than the leaves")
    return found


def dtype_name(name: str, dtype: Any) -> str:
    """The name of a dtype in the format.

    Raises:
      TypeError: it has none.
    """
    if np.dtype(dtype) not in _NAMES:
        raise TypeError(f"{name}: dtype {np.dtype(dtype)} has no name in the file format")
    return _NAMES[np.dtype(dtype)]


def layout(
    arrays: Mapping[str, Any], metadata: Mapping[str, str], *, pooled: bool = False
) -> tuple[dict[str, Any], dict[str, Entry]]:
    """The header of a file that is to be written, and where each array will lie in its data.

    Args:
      arrays: arrays, or their shapes and dtypes (`jax.ShapeDtypeStruct`).
      metadata: strings; with any, the file has a checksum.
      pooled: whether small arrays lie in pools; the header then has the pools, what is returned
        beside it has the arrays.

    Raises:
      TypeError: an array's dtype has no name in the format.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    entries, offset = {}, 0
    home = {
        name: POOL + dtype_name(name, a.dtype) if pooled and is_small(a) else name
        for name, a in arrays.items()
    }
    # Wide elements first, so that each array is aligned for its type.
    key = lambda name: (-np.dtype(arrays[name].dtype).itemsize, home[name], name)
    for name in sorted(arrays, key=key):
        dtype, shape = np.dtype(arrays[name].dtype), tuple(arrays[name].shape)
        last = offset + nbytes_of(dtype, shape)
        entries[name] = Entry(dtype, shape, offset, last)
        if home[name] == name:
            header[name] = _described(name, dtype, shape, offset, last)
        else:
            first = header.get(home[name], {"data_offsets": [offset]})["data_offsets"][0]
            whole = ((last - first) * 8 // _bits(dtype),)
            header[home[name]] = _described(name, dtype, whole, first, last)
        offset = last
    return header, entries


def _described(name: str, dtype: np.dtype, shape: Any, first: int, last: int) -> dict[str, Any]:
    return {
        "dtype": dtype_name(name, dtype),
        "shape": list(shape),
        "data_offsets": [first, last],
    }


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
    return -(-math.prod(shape) * _bits(dtype) // 8)


def _bits(dtype: np.dtype) -> int:
    return _BITS.get(dtype, 8 * dtype.itemsize)


def to_bytes(array: np.ndarray) -> bytes:
    """An array as it lies in a file."""
    flat = np.ascontiguousarray(array).reshape(-1)
    if flat.dtype not in _BITS:
        return flat.tobytes()
    bits = np.unpackbits(flat.view(np.uint8)[:, None], axis=1, bitorder="little")
    return np.packbits(bits[:, : _BITS[flat.dtype]], bitorder="little").tobytes()


def of_bytes(data: np.ndarray, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """The array of the uint8 that `to_bytes` gave."""
    if dtype not in _BITS:
        return data.view(dtype).reshape(shape)
    count, width = math.prod(shape), _BITS[dtype]
    bits = np.unpackbits(data, count=count * width, bitorder="little").reshape(count, width)
    return np.packbits(bits, axis=1, bitorder="little").reshape(-1).view(dtype).reshape(shape)


def _dump(header: dict[str, Any]) -> bytes:
    return json.dumps(header, separators=(",", ":")).encode()
