"""Packed checkpoints: as small as they claim, read back without the model's code.

A file is a safetensors file. Each leaf `a/b/kernel` is one array of that name, or several:
`.codes` and the fields of the format's qparams (`.scale`, `.zero_point`, `.exponent`, ...) of a
`QTensor`, and `.values` or `.codes` and the positions of a `Masked`: `.mask`, a bitmask, or
`.mask.pointers` and `.mask.indices`, or `.mask.offsets`, see core/sparse.py. The metadata say, for
each packed leaf, `format|axes|group|shape|dtype` (and `|nnz` if masked, and `|positions` if they
are no bitmask), e.g. `int4|-1||3x3x16x16|float32|230|csr:3`; tiles are a group `x128x128`. The
metadata key `jaxcompress` is the version of this scheme. The grids of
activations lie in `activations.scale` and so on, a field of all grids one after the other; the
metadata key `activations` lists `name|format|shape` of each, `;` between.
"""

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.compressor import is_absent
from jaxcompress.core.files import replacing
from jaxcompress.core.packed import Grid, Masked, QTensor, is_packed, packed_bytes, unpack
from jaxcompress.core.paths import leaves_with_paths, near_misses, refuse_twins
from jaxcompress.export import container, positions
from jaxcompress.formats import Format, Granularity, parse, shipped

VERSION = "3"
_READABLE = ("2", VERSION)  # 2 knew bitmasks alone
_ROOT = "(array)"  # the name of a tree that is one array
TAKEN = ("jaxcompress", "crc32", "activations")
FLOATS = ("float16", "bfloat16", "float32", "float64")


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
) -> container.FileSize:
    """Writes a packed tree (QTensor, Masked and plain arrays) to one file.

    The payload is exactly `packed_bytes((params, activations))`. Nothing appears under `path`
    before it is whole.

    Args:
      path: conventionally `*.safetensors`.
      params: a pytree; its paths become the names.
      activations: the grids of the activations, by tap.
      metadata: strings of your own, kept in the header.

    Raises:
      ValueError: two leaves have one path, or a key of `metadata` is taken.
      TypeError: a leaf of a format without a name, or of a dtype the file cannot hold.
    """
    content, size = _encode(params, activations or {}, metadata or {})
    with replacing(path) as file:
        file.write(content)
    return size


def file_size(
    params: Any,
    *,
    activations: Mapping[str, Grid] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> container.FileSize:
    """What `save` would write, without writing it.

    >>> file_size({"w": jnp.zeros((8, 4))})
    FileSize(file_bytes=248, header_bytes=120, payload_bytes=128)
    """
    return _encode(params, activations or {}, metadata or {})[1]


def _encode(params, activations, metadata) -> tuple[bytes, container.FileSize]:
    arrays, schemes = _disassemble_grids(activations)
    flat = leaves_with_paths(params, is_leaf=is_packed)
    refuse_names([name for name, _ in flat])
    for name, leaf in flat:
        parts, scheme = disassemble(name or _ROOT, leaf)
        if clash := set(parts) & set(arrays):
            raise ValueError(f"two leaves are named {sorted(clash)[0]!r}")
        arrays |= parts
        if scheme:
            schemes["leaf:" + (name or _ROOT)] = scheme
    for key, value in metadata.items():
        if not (isinstance(key, str) and isinstance(value, str)):
            raise TypeError(f"metadata must be strings, got {key!r}: {value!r}")
        if key in TAKEN or key.startswith("leaf:"):
            raise ValueError(f"metadata key {key!r} is taken by the file format")
    content, size = container.encode(arrays, {"jaxcompress": VERSION, **metadata, **schemes})
    assert size.payload_bytes == packed_bytes((params, dict(activations)))
    return content, size


def refuse_names(names: list[str]) -> None:
    """Raises ValueError for names of leaves that cannot stand in one file."""
    known = set(names)
    for name in names:
        if name == "__metadata__" or name.startswith("activations."):
            raise ValueError(f"the name {name!r} is taken by the file format; rename the leaf")
        parts = name.split("/")
        for depth in range(1, len(parts)):
            if (parent := "/".join(parts[:depth])) in known:
                raise ValueError(f"leaf {name!r} lies below leaf {parent!r}; rename one")


def _disassemble_grids(activations: Mapping[str, Grid]):
    if not activations:
        return {}, {}
    texts, parts = [], {}
    for name, grid in activations.items():
        if not isinstance(grid, Grid):
            raise TypeError(f"activations: {name!r} must be a core.Grid, got {grid!r}")
        if ";" in name:
            raise ValueError(f"activations: {name!r} must not hold ';', which separates names")
        fields = _fields(name, grid.format, grid.qparams)
        for field, array in fields.items():
            parts.setdefault(f"activations.{field}", []).append(array.reshape(-1))
        texts.append(f"{name}|{grid.format.name}|{_size_text(_scale_shape(grid, fields))}")
    arrays = {name: np.concatenate(part) for name, part in parts.items()}
    return arrays, {"activations": ";".join(texts)}


def _assemble_grids(
    text: str, arrays: dict[str, np.ndarray], formats: Mapping[str, Format]
) -> dict[str, Grid]:
    rest = {name: arrays.pop(name) for name in list(arrays) if name.startswith("activations.")}
    grids = {}
    for entry in text.split(";") if text else []:
        name, format_name, sizes = entry.rsplit("|", 2)
        format = _format(format_name, formats)

        def take(field, template):
            key = f"activations.{field}"
            count = math.prod(template.shape)
            taken, rest[key] = rest[key][:count], rest[key][count:]
            return taken.reshape(template.shape)

        grids[name] = Grid(_qparams(format, _sizes(sizes), take), format)
    if left := [name for name, array in rest.items() if len(array)]:
        raise ValueError(f"{left[0]!r} holds more than the activations")
    return grids


def _scale_shape(grid: Grid, fields: dict[str, np.ndarray]) -> tuple[int, ...]:
    # The first field has a value per block, or a table.
    if not fields:
        return ()
    shape = next(iter(fields.values())).shape
    ends = jax.ShapeDtypeStruct(shape, jnp.float32)
    expected = jax.eval_shape(grid.format.qparams, ends, ends)[0].shape
    return shape[: 2 * len(shape) - len(expected)]


def _format(name: str, formats: Mapping[str, Format]) -> Format:
    return formats[name] if name in formats else parse(name)


def _fields(name: str, format: Format, qparams: Any) -> dict[str, np.ndarray]:
    """The arrays of a format's qparams by field; fields that are `()` are absent."""
    if not isinstance(qparams, tuple) or not isinstance(getattr(format, "name", None), str):
        raise TypeError(
            f"{name}: a format of type {type(format).__name__} cannot be saved: it needs a name, "
            "and a NamedTuple of arrays as qparams"
        )
    if any(sign in format.name for sign in "|;"):
        raise ValueError(f"{name}: the format's name {format.name!r} must not hold '|' or ';'")
    fields = qparams._asdict() if hasattr(qparams, "_asdict") else {}  # type: ignore
    return {key: _host(array) for key, array in fields.items() if not is_absent(array)}


def _host(array: Any) -> Any:
    return array if isinstance(array, jax.ShapeDtypeStruct) else np.asarray(array)


def _qparams(format: Format, scale_shape: tuple[int, ...], take: Any) -> Any:
    """The qparams of a format from arrays that `take(field, shape and dtype)` finds."""
    ends = jax.ShapeDtypeStruct(scale_shape, jnp.float32)
    ship = lambda low, high: shipped(format, format.qparams(low, high))
    template = jax.eval_shape(ship, ends, ends)
    found = {}
    for field, aval in template._asdict().items() if hasattr(template, "_asdict") else ():
        if is_absent(aval):
            found[field] = ()
            continue
        array = take(field, aval)
        if array.dtype != aval.dtype or array.shape != aval.shape:
            raise ValueError(
                f"{field} should be {aval.dtype} {aval.shape}, it is {array.dtype} {array.shape}"
            )
        found[field] = jnp.asarray(array)
    return type(template)(**found) if hasattr(template, "_asdict") else ()


def disassemble(name: str, leaf: Any) -> tuple[dict[str, Any], str]:
    """The arrays of a leaf by their names in the file, and its scheme ("" for a plain array).

    A leaf of shapes and dtypes gives those of its arrays.
    """
    if isinstance(leaf, Masked):
        parts, inner = disassemble(name, leaf.values)
        if not inner:
            parts = {f"{name}.values": parts[name]}
            inner = f"|||{_size_text(leaf.shape)}|{leaf.dtype}"
        places = {part: _host(array) for part, array in positions.parts(name, leaf).items()}
        return {**places, **parts}, f"{inner}|{positions.scheme(leaf)}"
    if not isinstance(leaf, QTensor):
        if not hasattr(leaf, "dtype") or jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            kind = getattr(leaf, "dtype", type(leaf).__name__)
            raise TypeError(f"{name}: only arrays of numbers can be saved, got {kind}")
        return {name: _host(leaf)}, ""
    fields = _fields(name, leaf.format, leaf.qparams)
    parts = {f"{name}.codes": _host(leaf.codes)}
    parts |= {f"{name}.{field}": array for field, array in fields.items()}
    axes = ",".join(map(str, leaf.granularity.axis))
    group = "" if leaf.granularity.group is None else str(leaf.granularity.group)
    if leaf.granularity.block is not None:
        group = "x" + _size_text(leaf.granularity.block)
    fields = (leaf.format.name, axes, group, _size_text(leaf.shape), leaf.dtype)
    return parts, "|".join(fields)


def _size_text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split("x")) if text else ()


def load(
    path: str | os.PathLike, *, like: Any = None, formats: Iterable[Format] = ()
) -> Checkpoint:
    """Reads a packed file.

    Args:
      path: a file that `save` wrote.
      like: a tree whose structure and paths `params` takes (NNX, Equinox, lists); None gives
        nested dicts, split at `/`.
      formats: your own formats, which the file names; the library's need not be given.

    Returns:
      `Checkpoint(params, activations, metadata)`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: truncated, damaged, of another program or a newer version, or without a leaf
        that `like` has.
    """
    arrays, metadata = container.read(path)
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
        grids = _assemble_grids(metadata.get(name, ""), arrays, own)
        for name, scheme in schemes.items():
            leaves[name] = _assemble(name, scheme, arrays, own)
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        scheme = schemes.get(name, metadata.get(name))
        raise ValueError(f"{path}: {name}: its parts do not fit {scheme!r}: {error}") from error
    leaves |= {name: _as_saved(array) for name, array in arrays.items()}
    params = _nest(path, leaves) if like is None else _into(path, leaves, like)
    return Checkpoint(params, grids, {k: v for k, v in metadata.items() if k not in TAKEN})


def _as_saved(array: np.ndarray) -> Any:
    # JAX would cut 64-bit numbers in half without jax_enable_x64: they stay NumPy arrays then.
    same = jax.dtypes.canonicalize_dtype(array.dtype) == array.dtype
    return jnp.asarray(array) if same else array


def _take(arrays: dict[str, np.ndarray], name: str, dtype: Any) -> jax.Array:
    array = arrays.pop(name)
    if array.dtype != dtype:
        raise ValueError(f"{name!r} should be {jnp.dtype(dtype)}, it is {array.dtype}")
    return jnp.asarray(array)


def _assemble(
    name: str, scheme: str, arrays: dict[str, np.ndarray], formats: Mapping[str, Format]
) -> Any:
    format_name, axes, group, sizes, dtype, *rest = scheme.split("|")
    shape = _sizes(sizes)
    if dtype not in FLOATS:
        raise ValueError(f"unknown dtype {dtype!r}")
    if format_name:
        axis = tuple(int(a) for a in axes.split(",")) if axes else ()
        if group.startswith("x"):
            where = Granularity(block=_sizes(group[1:]))
        else:
            where = Granularity(axis, int(group) if group else None)
        format = _format(format_name, formats)
        leaf = _assemble_codes(name, format, where, shape, dtype, arrays)
    else:
        leaf = _take(arrays, f"{name}.values", dtype)
    if rest:
        leaf = Masked(positions.take(name, shape, rest, arrays), leaf, shape, dtype, int(rest[0]))
    _check(leaf)
    return leaf


def _assemble_codes(name, format, where, shape, dtype, arrays) -> QTensor:
    take = lambda field, template: arrays.pop(f"{name}.{field}")
    qparams = _qparams(format, where.scale_shape(shape), take)
    codes = _take(arrays, f"{name}.codes", jnp.uint8)
    return QTensor(codes, qparams, format, where, shape, dtype)


def _check(leaf: Any) -> None:
    # The abstract unpack meets every shape rule.
    if jax.eval_shape(unpack, leaf).shape != leaf.shape:
        raise ValueError(f"the parts do not have the shape {leaf.shape}")
    if isinstance(leaf, Masked):
        positions.check(leaf)


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
