"""Packed checkpoints: as small as they claim, read back without the model's code.

A file is a safetensors file. Each leaf `a/b/kernel` is one array of that name, or several:
`.codes` and the fields of the format's qparams (`.scale`, `.zero_point`, `.exponent`, ...) of a
`QTensor`, and `.values` or `.codes` and the positions of a `Masked`: `.mask`, a bitmask, or
`.mask.pointers` and `.mask.indices`, or `.mask.offsets`, see core/sparse.py. The metadata say, for
each packed leaf, `format|axes|group|shape|dtype` (and `|nnz` if masked, and `|positions` if they
are no bitmask), e.g. `int4|-1||3x3x16x16|float32|230|csr:3`; tiles are a group `x128x128`. The
metadata key `jaxcompress` is the version of this scheme, `crc32` the checksum of the header without
it and of all data. The grids of activations lie in `activations.scale` and so on, a field of all
grids one after the other; the metadata key `activations` lists `name|format|shape` of each, `;`
between. A compressed file is all of that in one Zstandard frame.

Version 2 knew bitmasks alone; 3 is what is written.
"""

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.files import replacing
from jaxcompress.core.packed import Grid, Masked, QTensor, is_packed, packed_bytes
from jaxcompress.core.paths import leaves_with_paths, near_misses, refuse_twins
from jaxcompress.export import container, container_read, zstd
from jaxcompress.export.leaves import assemble, assemble_grids, disassemble, disassemble_grids
from jaxcompress.export.scheme import (
    parse_scheme,
)
from jaxcompress.formats import Format

VERSION = "3"
_READABLE = ("2", VERSION)  # 2 knew bitmasks alone
_ROOT = "(array)"  # the name of a tree that is one array
TAKEN = ("jaxcompress", "crc32", "activations")
_GROWTH = 64  # more than 2 bits of a float32, sparse: unpacking it needs no permission


class Checkpoint(NamedTuple):
    """What a packed file holds."""

    params: Any  # the packed tree; `unpack` gives arrays
    activations: dict[str, Grid]  # {tap name: Grid}, for `quantize.with_activations`
    metadata: dict[str, str]  # the caller's own


def save(
    path: str | os.PathLike,
    params: Any,
    *,
    activations: Mapping[str, Grid] | None = None,
    metadata: Mapping[str, str] | None = None,
    compress: str | None = None,
) -> container.FileSize:
    """Writes a packed tree (QTensor, Masked and plain arrays) to one file.

    The payload is exactly `packed_bytes((params, activations))`; the file is of version 3 (above).
    Nothing appears under `path` before it is whole.

    Args:
      path: conventionally `*.safetensors`.
      params: a pytree; its paths become the names.
      activations: the grids of the activations, by tap.
      metadata: strings of your own, kept in the header.
      compress: "zstd" (level 19), or "zstd:1" to "zstd:22": all of the file as one Zstandard frame,
        conventionally `*.safetensors.zst`. The size says the `ratio`; `entropy_bytes` what a
        Huffman code of each leaf would reach.

    Returns:
      `FileSize`: bytes on disk, and of header and arrays before compression.

    Raises:
      ValueError: two leaves have one path, or a key of `metadata` is taken; no such `compress`.
      TypeError: a leaf of a format without a name, or of a dtype the file cannot hold.
      ImportError: `compress` without zstandard.
    """
    content, size = _encode(params, activations or {}, metadata or {}, compress)
    with replacing(path) as file:
        file.write(content)
    return size


def file_size(
    params: Any,
    *,
    activations: Mapping[str, Grid] | None = None,
    metadata: Mapping[str, str] | None = None,
    compress: str | None = None,
) -> container.FileSize:
    """What `save` would write, without writing it.

    >>> file_size({"w": jnp.zeros((8, 4))})
    FileSize(file_bytes=248, header_bytes=120, payload_bytes=128)
    """
    return _encode(params, activations or {}, metadata or {}, compress)[1]


def _encode(params, activations, metadata, codec) -> tuple[bytes, container.FileSize]:
    if codec is not None:
        zstd.level_of(codec)
    arrays, schemes = disassemble_grids(activations)
    flat = leaves_with_paths(params, is_leaf=is_packed)
    if jax.tree_util.treedef_is_leaf(jax.tree.structure(params, is_leaf=is_packed)):
        flat = [(_ROOT, leaf) for _, leaf in flat]
    refuse_names([name for name, _ in flat])
    for name, leaf in flat:
        parts, scheme = disassemble(name, leaf)
        if clash := set(parts) & set(arrays):
            raise ValueError(f"two leaves are named {sorted(clash)[0]!r}")
        arrays |= parts
        if scheme:
            schemes["leaf:" + name] = scheme
    for key, value in metadata.items():
        if not (isinstance(key, str) and isinstance(value, str)):
            raise TypeError(f"metadata must be strings, got {key!r}: {value!r}")
        if key in TAKEN or key.startswith("leaf:"):
            raise ValueError(f"metadata key {key!r} is taken by the file format")
    pieces, size = container.encode_parts(arrays, {"jaxcompress": VERSION, **metadata, **schemes})
    assert size.payload_bytes == packed_bytes((params, dict(activations)))
    if codec is None:
        return b"".join(pieces), size
    content = zstd.compress(pieces, codec)
    return content, size._replace(file_bytes=len(content))


def refuse_names(names: list[str]) -> None:
    """Raises ValueError for names of leaves that cannot stand in one file."""
    known = set(names)
    for name in names:
        if not name:
            raise ValueError("a leaf is named '', which a file cannot hold; rename it")
        if name == "__metadata__" or name.startswith("activations."):
            raise ValueError(f"the name {name!r} is taken by the file format; rename the leaf")
        parts = name.split("/")
        for depth in range(1, len(parts)):
            if (parent := "/".join(parts[:depth])) in known:
                raise ValueError(f"leaf {name!r} lies below leaf {parent!r}; rename one")


def load(
    path: str | os.PathLike,
    *,
    like: Any = None,
    formats: Iterable[Format] = (),
    max_bytes: int = container_read.MAX_BYTES,
) -> Checkpoint:
    """Reads a packed file of version 2 or 3, compressed or not.

    Strictly: a file that is not exactly what `save` writes is refused, before anything is
    allocated that it only claims to need.

    Args:
      path: a file that `save` wrote.
      like: a tree whose structure and paths `params` takes (NNX, Equinox, lists); None gives
        nested dicts, split at `/`.
      formats: your own formats, which the file names; the library's need not be given.
      max_bytes: what a file may grow to: a compressed one when it is decompressed, a packed one
        when `unpack` gives all its arrays (that one up to 64 times what is stored in any case).

    Returns:
      `Checkpoint(params, activations, metadata)`.

    Raises:
      FileNotFoundError: no such file.
      ImportError: the file is compressed, and zstandard is missing.
      ValueError: truncated, damaged, of another program or a newer version, or without a leaf
        that `like` has; larger than `max_bytes` allows.
    """
    arrays, metadata = container_read.read(path, max_bytes=max_bytes)
    if metadata.get("jaxcompress") not in _READABLE or "crc32" not in metadata:
        found = metadata.get("jaxcompress", "none")
        raise ValueError(
            f"{path}: scheme version {found}, this program reads {' and '.join(_READABLE)} "
            "with a checksum"
        )
    own = {format.name: format for format in formats}
    schemes = {k[5:]: metadata.pop(k) for k in list(metadata) if k.startswith("leaf:")}
    leaves, name = {}, "activations"
    try:
        grids = assemble_grids(metadata.get(name, ""), arrays, own)
        for name, scheme in schemes.items():
            leaves[name] = assemble(name, parse_scheme(scheme), arrays, own)
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        scheme = schemes.get(name, metadata.get(name))
        raise ValueError(f"{path}: {name}: its parts do not fit {scheme!r}: {error}") from error
    leaves |= {name: _as_saved(array) for name, array in arrays.items()}
    if "" in leaves:
        raise ValueError(f"{path}: holds a leaf without a name")
    _refuse_growth(path, leaves, max_bytes)
    params = _nest(path, leaves) if like is None else _into(path, leaves, like)
    return Checkpoint(params, grids, {k: v for k, v in metadata.items() if k not in TAKEN})


def _as_saved(array: np.ndarray) -> Any:
    # JAX would cut 64-bit numbers in half without jax_enable_x64: they stay NumPy arrays then.
    same = jax.dtypes.canonicalize_dtype(array.dtype) == array.dtype
    return jnp.asarray(array) if same else array


def _refuse_growth(path: Any, leaves: dict[str, Any], max_bytes: int) -> None:
    """Raises ValueError if the arrays that `unpack` gives are out of all proportion."""
    sizes = {name: _unpacked_bytes(leaf) for name, leaf in leaves.items() if is_packed(leaf)}
    stored = packed_bytes(leaves)
    if (total := sum(sizes.values())) > max(max_bytes, _GROWTH * stored):
        largest = max(sizes, key=lambda name: sizes[name])
        raise ValueError(
            f"{path}: {stored:,} stored bytes are {total:,} when unpacked, most of them of "
            f"{largest!r}; max_bytes is {max_bytes:,}"
        )


def _unpacked_bytes(leaf: Any) -> int:
    # Padding of groups and tiles included.
    itemsize = np.dtype(jnp.dtype(leaf.dtype)).itemsize
    inner = leaf.values if isinstance(leaf, Masked) else leaf
    if not isinstance(inner, QTensor):
        return leaf.size * itemsize
    blocked = jax.eval_shape(inner.granularity.split, jax.ShapeDtypeStruct(leaf.shape, jnp.uint8))
    return max(leaf.size, math.prod(blocked.shape)) * itemsize


def _nest(path: Any, leaves: dict[str, Any]) -> Any:
    if set(leaves) == {_ROOT}:
        return leaves[_ROOT]
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict) or is_packed(node):
                raise ValueError(f"{path}: {name!r} lies below another leaf")
        node[last] = leaf
    return tree


def _into(path: Any, leaves: dict[str, Any], like: Any) -> Any:
    flat = leaves_with_paths(like, is_leaf=is_packed)
    wanted = [name or _ROOT for name, _ in flat]
    refuse_twins("like", wanted)
    if missing := [name for name in wanted if name not in leaves]:
        hint = near_misses(missing[0], leaves) or sorted(leaves)[:3]
        raise ValueError(f"{path}: no leaf {missing[0]!r}; nearest in the file: {hint}")
    if extra := sorted(set(leaves) - set(wanted)):
        raise ValueError(f"{path}: holds {extra[0]!r}, which `like` does not have")
    for name, (_, template) in zip(wanted, flat, strict=True):
        shape = getattr(template, "shape", None)
        if shape is not None and tuple(shape) != tuple(leaves[name].shape):
            raise ValueError(
                f"{path}: {name} has the shape {tuple(leaves[name].shape)}, "
                f"`like` has {tuple(shape)}: a checkpoint of another network"
            )
    treedef = jax.tree.structure(like, is_leaf=is_packed)
    return treedef.unflatten([leaves[name] for name in wanted])
