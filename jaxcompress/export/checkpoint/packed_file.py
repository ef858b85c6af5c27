"""Packed checkpoints: as small as they claim, read back without the model's code.

A file is a safetensors file. Each leaf `a/b/kernel` is one array of that name, or several:
`.codes` and the fields of the format's qparams (`.scale`, `.zero_point`, `.exponent`, ...) of a
`QTensor`, and `.values` or `.codes` and the positions of a `Masked`: `.mask`, a bitmask, or
`.mask.pointers` and `.mask.indices`, or `.mask.offsets`, see core/sparse.py. Arrays below 4 KiB lie
in pools, one for each dtype (`.F32`, `.U8`, see core/storage/container.py), in the order of their
names. The metadata key `leaves` is a table of all leaves that are packed or lie in pools
(core/storage/scheme.py): each scheme once, shapes, numbers of kept elements. The key `jaxcompress`
is the version of all this, `crc32` the checksum of the header without it and of all data. The grids
of activations lie in `activations.scale` and so on, a field of all grids one after the other; the
metadata key `activations` says whose they are (core/storage/leaves.py). A compressed file is all of
that in one Zstandard frame.

Version 4 is what is written. Versions 2 and 3 had every array under its own name and a scheme for
each leaf (`leaf:NAME`); they are read.
"""

import contextlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.files import replacing
from jaxcompress.core.packed import Grid, Masked, QTensor, is_packed, packed_bytes
from jaxcompress.core.paths import leaves_with_paths, near_misses, refuse_twins
from jaxcompress.core.storage import Contents, container, contents
from jaxcompress.core.storage.file_contents import ROOT, TAKEN, VERSION
from jaxcompress.core.storage.leaves import (
    assemble,
    assemble_grids,
    grid_avals,
    parse_grids,
    parse_old_grids,
    part_avals,
)
from jaxcompress.core.storage.scheme import Scheme, parse_scheme, parse_table
from jaxcompress.export.checkpoint import container_reader, foreign, zstandard_frame
from jaxcompress.formats import Format

_OLD = ("2", "3")  # 2 knew bitmasks alone
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

    The payload is exactly `packed_bytes((params, activations))`; the file is of version 4 (above).
    Nothing appears under `path` before it is whole. Where an array spans processes
    (`jax.distributed`), every process must call this alike: the arrays are gathered, process 0
    writes the file, and all return when it is there.

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
      OSError: it cannot be written; in every process that takes part.
    """
    if compress is not None:
        zstandard_frame.level_of(compress)
    found = contents(params, activations=activations, metadata=metadata)
    if not _spans_processes((params, activations)):
        return _write(path, found, compress)
    from jax.experimental import multihost_utils

    size, error = found.size, None
    if jax.process_index() == 0:
        try:
            size = _write(path, found, compress)
        except (OSError, ImportError) as raised:
            error = raised
    written = multihost_utils.broadcast_one_to_all(np.int64(-1 if error else size.file_bytes))
    if error is not None:
        raise error
    if written < 0:
        raise OSError(f"{path}: process 0 could not write it")
    return size._replace(file_bytes=int(written))


def _spans_processes(tree: Any) -> bool:
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    return not all(array.is_fully_addressable for array in arrays)


def _write(path: Any, found: Contents, compress: str | None) -> container.FileSize:
    content, size = _encoded(found, compress)
    with replacing(path) as file:
        file.write(content)
    return size


def _encoded(found: Contents, compress: str | None) -> tuple[bytes, container.FileSize]:
    pieces, size = container.filled(found.arrays, found.header, found.entries)
    if compress is None:
        return b"".join(pieces), size
    content = zstandard_frame.compress(pieces, compress)
    return content, size._replace(file_bytes=len(content))


def file_size(
    params: Any,
    *,
    activations: Mapping[str, Grid] | None = None,
    metadata: Mapping[str, str] | None = None,
    compress: str | None = None,
) -> container.FileSize:
    """What `save` would write, without writing it; shapes and dtypes suffice without `compress`.

    >>> file_size({"w": jnp.zeros((8, 4))})
    FileSize(file_bytes=272, header_bytes=144, payload_bytes=128)
    """
    if compress is not None:
        zstandard_frame.level_of(compress)
    found = contents(params, activations=activations, metadata=metadata)
    return found.size if compress is None else _encoded(found, compress)[1]


def load(
    path: str | os.PathLike,
    *,
    like: Any = None,
    formats: Iterable[Format] = (),
    max_bytes: int = container_reader.MAX_BYTES,
) -> Checkpoint:
    """Reads a packed file of version 2, 3 or 4, compressed or not.

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
    arrays, metadata = container_reader.read(path, max_bytes=max_bytes)
    version = check_version(path, arrays, metadata)
    own = {format.name: format for format in formats}
    grids, schemes, arrays = _read_schemes(path, version, arrays, metadata, own)
    found: dict[str, Any] = {}
    with _fitting(path, "activations", metadata.get("activations")):
        activations = assemble_grids(grids, arrays, own)
    for name, scheme in schemes.items():
        with _fitting(path, name, scheme):
            parsed = parse_scheme(scheme) if isinstance(scheme, str) else scheme
            found[name] = assemble(name, parsed, arrays, own)
    found |= arrays
    found = {name: x if is_packed(x) else _as_saved(x) for name, x in found.items()}
    if "" in found:
        raise ValueError(f"{path}: holds a leaf without a name")
    _refuse_growth(path, found, max_bytes)
    params = _nest(path, found) if like is None else _into(path, found, like)
    return Checkpoint(params, activations, {k: v for k, v in metadata.items() if k not in TAKEN})


def check_version(path: Any, names: Iterable[str], metadata: Mapping[str, str]) -> str:
    """The version of a packed file.

    Raises:
      ValueError: a file of another program, or of another version.
    """
    version = metadata.get("jaxcompress")
    if version is None:
        raise ValueError(f"{path}: {foreign.described(path, names, metadata)}")
    if version not in (*_OLD, VERSION) or "crc32" not in metadata:
        raise ValueError(
            f"{path}: scheme version {version}, this program reads {', '.join(_OLD)} and "
            f"{VERSION} with a checksum; a later version of jaxcompress may have written it"
        )
    return version


def _read_schemes(path, version, arrays, metadata, own):
    """Schemes of grids and of leaves, and all arrays by their own names."""
    text = metadata.get("activations", "")
    if version in _OLD:
        with _fitting(path, "activations", text):
            grids = parse_old_grids(text)
        schemes: dict[str, str | Scheme] = {
            key[5:]: metadata.pop(key) for key in list(metadata) if key.startswith("leaf:")
        }
        return grids, schemes, arrays
    avals: dict[str, Any] = {}
    with _fitting(path, "activations", text):
        grids = parse_grids(text)
        avals |= grid_avals(grids, own)
    with _fitting(path, "its table of leaves", metadata.get("leaves", "")[:80]):
        table = parse_table(metadata["leaves"]) if "leaves" in metadata else {}
    for name, scheme in table.items():
        with _fitting(path, name, scheme):
            parts = part_avals(name, scheme, own)
            if clash := set(parts) & set(avals):
                raise ValueError(f"{sorted(clash)[0]!r} stands twice")
            avals |= parts
    with _fitting(path, "its pools", "the table of leaves"):
        return grids, table, container.split_pools(arrays, avals)


@contextlib.contextmanager
def _fitting(path: Any, name: str, scheme: Any) -> Iterator[None]:
    # Whatever a damaged or forged file may lead to is one error that names the file.
    try:
        yield
    except (
        KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, RecursionError,
    ) as error:  # fmt: skip
        raise ValueError(f"{path}: {name}: its parts do not fit {scheme!r}: {error}") from error


def _as_saved(array: np.ndarray) -> Any:
    # JAX would cut 64-bit numbers in half without jax_enable_x64, and XLA has no numbers of 6 bits:
    # these stay NumPy arrays.
    same = "float6_" not in array.dtype.name
    same = same and jax.dtypes.canonicalize_dtype(array.dtype) == array.dtype
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
    if set(leaves) == {ROOT}:
        return leaves[ROOT]
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
    wanted = [name or ROOT for name, _ in flat]
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
