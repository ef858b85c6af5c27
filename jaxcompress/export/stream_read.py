"""Safetensors checkpoints of any size: what they hold, and one piece of a tensor at a time.

A source is one file, a folder of shards, or the index that Hugging Face writes beside shards
(`model.safetensors.index.json`: {"weight_map": {tensor: file}}). Plain reads, not memory maps: the
pages of a map count as resident memory of the process.
"""

import functools
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.compressor import is_absent
from jaxcompress.export import container_read, positions, zstd
from jaxcompress.export.scheme import Scheme, parse_scheme
from jaxcompress.formats import parse, shipped

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
        return math.prod(self.shape) * self.dtype.itemsize


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
        if zstd.is_compressed(file):
            raise ValueError(f"{file}: is compressed; `zstd -d` gives the file to read")
        header = container_read.read_header(file)
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
    entries, metadata, _ = container_read.read_header(path)
    sizes = {name: entry.last - entry.first for name, entry in entries.items()}
    leaves = []
    for key in [key for key in metadata if key.startswith("leaf:")]:
        name, scheme = key[5:], metadata[key]
        try:
            leaves.append(_packed_leaf(name, parse_scheme(scheme), sizes))
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path}: {name}: does not fit {scheme!r}: {error}") from error
    for name, stored_bytes in sizes.items():
        dtype = entries[name].dtype.name
        leaves.append(Leaf(name, dtype, entries[name].shape, dtype, stored_bytes, False))
    return sorted(leaves)


def _packed_leaf(name: str, scheme: Scheme, sizes: dict[str, int]) -> Leaf:
    parts = ["codes", *_field_names(scheme.format)] if scheme.format else ["values"]
    names = [f"{name}.{part}" for part in parts]
    if scheme.nnz is not None:
        names += positions.part_names(name, scheme.shape, scheme.nnz, scheme.positions)
    stored = [sizes.pop(part) for part in names]
    format, sparse = scheme.format or scheme.dtype, scheme.nnz is not None
    return Leaf(name, format, scheme.shape, scheme.dtype, sum(stored), sparse)


@functools.lru_cache
def _field_names(format_name: str) -> tuple[str, ...]:
    format = parse(format_name)
    ends = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    fields = jax.eval_shape(
        lambda low, high: shipped(format, format.qparams(low, high)), ends, ends
    )
    return tuple(k for k, v in fields._asdict().items() if not is_absent(v)) if fields else ()
