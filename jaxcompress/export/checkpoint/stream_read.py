"""Safetensors checkpoints of any size: what they hold, and one piece of a tensor at a time.

A source is one file, a folder of shards, or the index that Hugging Face writes beside shards
(`model.safetensors.index.json`: {"weight_map": {tensor: file}}). Plain reads, not memory maps: the
pages of a map count as resident memory of the process.
"""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np

from jaxcompress.core.pytrees import packed_bytes
from jaxcompress.core.storage import container
from jaxcompress.core.storage.file_contents import VERSION
from jaxcompress.core.storage.leaves import grid_avals, parse_grids, part_avals
from jaxcompress.core.storage.scheme import Scheme, parse_scheme, parse_table
from jaxcompress.export.checkpoint import container_reader, zstandard_frame
from jaxcompress.export.checkpoint.packed_file import check_version

_CHUNK_BYTES = 2**24  # of a tensor that is copied
_INDEX = ".safetensors.index.json"


class Tensor(NamedTuple):
    """A tensor of a checkpoint, on disk."""

    file: Path
    start: int  # of its first byte in the file
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return container.nbytes_of(self.dtype, self.shape)


class Source(NamedTuple):
    """A checkpoint, on disk."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]  # of the shards; the first to name a key says its value
    files: tuple[Path, ...]


def open_source(path: str | os.PathLike, *, leave_out: Path | None = None) -> Source:
    """What a file, a folder of shards or an index holds; only headers are read.

    Args:
      path: `*.safetensors`, a folder, or `*.safetensors.index.json`. A folder with one index is
        read by its index, else all of its `*.safetensors` are shards.
      leave_out: a file of the folder that is no shard (the target of a run).

    Raises:
      FileNotFoundError: no such file, or a shard of the index is missing.
      ValueError: a file is truncated or damaged, a packed file, or of an unknown dtype; a folder
        without shards; an index that does not agree with its shards; a tensor in two shards.
    """
    path = Path(path)
    if path.is_dir():
        indices = sorted(path.glob(f"*{_INDEX}"))
        if len(indices) == 1:
            return _indexed(indices[0])
        files = [
            file
            for file in sorted(path.glob("*.safetensors"))
            if not file.name.startswith(".") and file.resolve() != leave_out
        ]
        if not files:
            raise ValueError(f"{path}: the folder holds no *.safetensors")
        return _shards(files)
    return _indexed(path) if path.name.endswith(".json") else _shards([path])


def _shards(files: list[Path]) -> Source:
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for file in files:
        if zstandard_frame.is_compressed(file):
            raise ValueError(f"{file}: is compressed; `zstd -d` gives the file to read")
        header = container_reader.read_header(file)
        if "jaxcompress" in header.metadata:
            raise ValueError(f"{file}: is packed already; give the checkpoint it was made from")
        for name, (dtype, shape, first, _) in header.entries.items():
            if name in tensors:
                raise ValueError(f"{file}: {name!r} is in {tensors[name].file.name} too")
            tensors[name] = Tensor(file, header.data_start + first, dtype, shape)
        metadata = {**header.metadata, **metadata}
    return Source(tensors, metadata, tuple(files))


def _indexed(index: Path) -> Source:
    try:
        places = json.loads(index.read_bytes())["weight_map"]
        names = sorted(set(places.values()))
        safe = all(not PurePath(name).is_absolute() and ".." not in name for name in names)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index}: needs an object 'weight_map' of file names") from error
    if not safe:
        raise ValueError(f"{index}: shards must lie in the index's own folder")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise FileNotFoundError(f"{index}: its shard {missing[0]!r} does not exist")
    source = _shards([index.parent / name for name in names])
    for name in sorted({*places, *source.tensors}):
        if name not in source.tensors:
            raise ValueError(f"{index}: {places[name]!r} should hold {name!r}, it does not")
        held = source.tensors[name].file
        if name not in places or held != index.parent / places[name]:
            raise ValueError(f"{held}: holds {name!r}, which {index.name} does not place there")
    return source


def read_rows(tensor: Tensor, first: int, last: int) -> np.ndarray:
    """Rows `first` to `last` (along the first axis) of a tensor of at least one axis.

    Raises:
      ValueError: the file is shorter than its header said.
    """
    row_bytes = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
    rows = _read(tensor, first * row_bytes, (last - first) * row_bytes)
    return rows.view(tensor.dtype).reshape(last - first, *tensor.shape[1:])


def chunks(tensor: Tensor) -> Iterator[tuple[int, np.ndarray]]:
    """The bytes of a tensor in pieces, uint8, each with the place of its end."""
    for start in range(0, tensor.nbytes, _CHUNK_BYTES):
        end = min(start + _CHUNK_BYTES, tensor.nbytes)
        yield end, _read(tensor, start, end - start)


def _read(tensor: Tensor, start: int, count: int) -> np.ndarray:
    buffer = np.empty(count, np.uint8)
    with tensor.file.open("rb") as file:
        file.seek(tensor.start + start)
        found = file.readinto(buffer.data)
    if found != count:
        raise ValueError(f"{tensor.file}: truncated: {count - found} bytes of a tensor are missing")
    return buffer


class Leaf(NamedTuple):
    """A leaf of a packed file, or a tensor of another safetensors file."""

    name: str
    format: str  # of its codes; the dtype where it is not quantized
    shape: tuple[int, ...]
    dtype: str  # of the array that `unpack` gives
    stored_bytes: int  # codes, scales and positions
    sparse: bool

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per element."""
        return 8 * self.stored_bytes / max(math.prod(self.shape), 1)


def inspect(path: str | os.PathLike) -> list[Leaf]:
    """The leaves of a file, compressed or not, by name, from its header alone.

    Raises:
      FileNotFoundError, ValueError: as `export.load`, without a test of the checksum; a leaf is
        in a format of your own, whose arrays only `export.load(formats=)` knows.
    """
    entries, metadata, _ = container_reader.read_header(path)
    sizes = {name: (e.dtype.name, e.shape, e.last - e.first) for name, e in entries.items()}
    schemes: dict[str, str | Scheme] = {
        key[5:]: text for key, text in metadata.items() if key.startswith("leaf:")
    }
    leaves, name = [], "its table of leaves"
    try:
        if "jaxcompress" in metadata:
            version = check_version(path, entries, {"crc32": "", **metadata})
            schemes |= _pooled(version, metadata, sizes)
        for name, scheme in schemes.items():
            scheme = parse_scheme(scheme) if isinstance(scheme, str) else scheme
            avals = part_avals(name, scheme, {})
            stored_bytes = sum(
                container.nbytes_of(np.dtype(a.dtype), a.shape) for a in avals.values()
            )
            leaves.append(_packed_leaf(name, scheme, stored_bytes))
            for part, aval in avals.items():
                if not container.is_small(aval) or part in sizes:
                    sizes.pop(part)
    except (KeyError, ValueError, TypeError, IndexError, RecursionError) as error:
        raise ValueError(f"{path}: {name}: does not fit {schemes.get(name)!r}: {error}") from error
    leaves += [
        Leaf(n, dtype, shape, dtype, size, False) for n, (dtype, shape, size) in sizes.items()
    ]
    return sorted(leaves)


def _pooled(version: str, metadata: dict[str, str], sizes: dict[str, Any]) -> dict[str, Scheme]:
    """The table of leaves; in `sizes`, arrays of activations take the place of the pools."""
    if version != VERSION:
        return {}
    for pool in [name for name in sizes if name[1:] in container.DTYPES and name[0] == "."]:
        del sizes[pool]
    for name, aval in grid_avals(parse_grids(metadata.get("activations", "")), {}).items():
        sizes[name] = (np.dtype(aval.dtype).name, aval.shape, packed_bytes(aval))
    return parse_table(metadata["leaves"]) if "leaves" in metadata else {}


def _packed_leaf(name: str, scheme: Scheme, stored_bytes: int) -> Leaf:
    format, sparse = scheme.format or scheme.dtype, scheme.nnz is not None
    return Leaf(name, format, scheme.shape, scheme.dtype, stored_bytes, sparse)
