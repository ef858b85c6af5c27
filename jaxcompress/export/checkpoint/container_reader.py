"""Strict reading of safetensors files, compressed or not: every length is checked first."""

import contextlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxcompress.core.storage.container import (
    DTYPES,
    Entry,
    Header,
    nbytes_of,
    of_bytes,
    open_checksum,
)
from jaxcompress.export.checkpoint import zstandard_frame
from jaxcompress.export.checkpoint.foreign import other_kind

MAX_BYTES = 2**30  # of a compressed file when it is decompressed
_MAX_HEADER = 100_000_000  # the limit of the format's own reader
_PIECE_BYTES = 2**20  # of what is read at a time
_KEYS = {"dtype", "shape", "data_offsets"}


def read(
    path: str | os.PathLike, *, max_bytes: int = MAX_BYTES
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays and metadata of a file; every length is checked before anything is allocated.

    Args:
      path: a safetensors file, or one Zstandard frame that holds such a file.
      max_bytes: the most that a compressed file may have when it is decompressed.

    Raises:
      FileNotFoundError: no such file.
      ImportError: the file is compressed, and zstandard is missing.
      ValueError: truncated, with bytes left over, a damaged header, a wrong checksum, or more than
        `max_bytes`; the message names the file and what is wrong.
    """
    path = Path(path)
    with _opened(path) as (file, size, on_disk):
        if on_disk != size > max_bytes:
            raise ValueError(
                f"{path}: has {size:,} bytes when decompressed, max_bytes is {max_bytes:,}"
            )
        header, start = _parsed(path, file, size, on_disk)
        metadata = _metadata(path, header)
        entries = _entries(path, header, size - start)
        data = _exactly(path, file, size - start)
    checksum = metadata.pop("crc32", None)
    expected = f"{zlib.crc32(data, open_checksum(header)):08x}" if checksum else None
    if checksum != expected:
        raise _damaged(path, "its checksum is wrong")
    arrays = {name: _array(path, name, entry, data) for name, entry in entries.items()}
    return arrays, metadata if checksum is None else {**metadata, "crc32": checksum}


def read_header(path: str | os.PathLike) -> Header:
    """What a file holds, its data left on disk: the checksum is not tested.

    Raises:
      FileNotFoundError, ImportError, ValueError: as `read`.
    """
    path = Path(path)
    with _opened(path) as (file, size, on_disk):
        header, start = _parsed(path, file, size, on_disk)
    return Header(_entries(path, header, size - start), _metadata(path, header), start)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, int, int]]:
    """A file, for reading in order, the size of its content, and its size on disk."""
    if zstandard_frame.is_compressed(path):
        with zstandard_frame.decompressed(path) as (file, size):
            yield file, size, path.stat().st_size
        return
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        yield file, size, size


def _exactly(path: Path, file: BinaryIO, count: int) -> memoryview:
    # Memory that is not written takes no room: a size that is not true costs nothing.
    data, end = memoryview(bytearray(count)), 0
    while part := file.readinto(data[end : end + _PIECE_BYTES]):  # type: ignore[attr-defined]
        end += part
    if end != count or file.read(1):
        raise ValueError(f"{path}: truncated or damaged: its data should have {count} bytes")
    return data.toreadonly()


def _array(path: Path, name: str, entry: Entry, data: memoryview) -> np.ndarray:
    flat = np.frombuffer(data[entry.first : entry.last], np.uint8)
    if entry.dtype == np.bool_ and flat.max(initial=0) > 1:
        raise _damaged(path, f"{name!r} holds bytes that are neither true nor false")
    return of_bytes(flat, entry.dtype, entry.shape)


def _metadata(path: Path, header: dict[str, Any]) -> dict[str, str]:
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(path, "its metadata are not strings")
    return metadata


def _entries(path: Path, header: dict[str, Any], data_bytes: int) -> dict[str, Entry]:
    # Every length is checked: the arrays fill the data, one after the other.
    arrays = {name: entry for name, entry in header.items() if name != "__metadata__"}
    found = {name: _entry(path, name, entry) for name, entry in arrays.items()}
    entries, end = {}, 0
    for name, entry in sorted(found.items(), key=lambda item: (item[1].first, item[1].last)):
        if entry.first != end or entry.last != end + nbytes_of(entry.dtype, entry.shape):
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


def _parsed(path: Path, file: BinaryIO, size: int, on_disk: int) -> tuple[dict[str, Any], int]:
    # The header, and where the data begin.
    if size < 8:
        raise ValueError(f"{path}: truncated: {size} bytes, less than the length field")
    head = file.read(8)
    length = int.from_bytes(head, "little")
    # A header grows when it is parsed: one that compresses by more than 32 is no real one.
    if length > min(_MAX_HEADER, max(2**20, 32 * on_disk)) or 8 + length > size:
        if (kind := other_kind(head)) is not None:
            raise ValueError(f"{path}: {kind}")
        raise ValueError(
            f"{path}: truncated or not a packed file: the header should have {length} bytes, "
            f"{size - 8} are there"
        )
    try:
        header = json.loads(file.read(length), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON ({type(error).__name__})") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not an object")
    return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def _entry(path: Path, name: str, entry: Any) -> Entry:
    try:
        dtype = np.dtype(DTYPES[entry["dtype"]])
        shape, (first, last) = tuple(entry["shape"]), entry["data_offsets"]
        if not set(entry) <= _KEYS or type(entry["shape"]) is not list:
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"the entry {name!r} is malformed: {_flaw(entry)}") from error
    numbers = (*shape, first, last)
    if len(shape) > 32 or not all(type(n) is int and 0 <= n < 2**48 for n in numbers):
        raise _damaged(path, f"the entry {name!r} has impossible sizes")
    return Entry(dtype, shape, first, last)


def _flaw(entry: Any) -> str:
    dtype = entry.get("dtype") if isinstance(entry, dict) else None
    if isinstance(dtype, str) and dtype not in DTYPES:
        return f"dtype {dtype!r} is none of {', '.join(DTYPES)}"
    return "it needs dtype, shape and data_offsets, no more"
