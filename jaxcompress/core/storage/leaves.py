"""Packed leaves and grids as named arrays and schemes, and back; see export/checkpoint.py.

The grids of activations are runs of one format and shape: `uint8|=in;out&int8|=logits`.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.compressor import is_absent
from jaxcompress.core.packed import Grid, Masked, QTensor, codes_shape, unpack
from jaxcompress.core.pytrees import host, is_nibbles, stored_bits
from jaxcompress.core.storage import kept_elements
from jaxcompress.core.storage.scheme import (
    Scheme,
    parse_sizes,
    plain_scheme,
    quoted,
    sizes_text,
    unquoted,
)
from jaxcompress.formats import Format, parse, shipped
from jaxcompress.formats.bits import pack_bits, row_bytes, signed, unpack_bits


def disassemble_grids(activations: Mapping[str, Grid]):
    """The arrays of grids by field, and the metadata that say whose they are."""
    if not activations:
        return {}, {}
    parts, kinds = {}, []
    for name, grid in activations.items():
        if not isinstance(grid, Grid):
            raise TypeError(f"activations: {name!r} must be a core.Grid, got {grid!r}")
        fields = _fields(name, grid.format, grid.qparams)
        for field, array in fields.items():
            parts.setdefault(f"activations.{field}", []).append(array)
        shape = sizes_text(_scale_shape(grid, fields))
        kinds.append((f"{quoted(grid.format.name)}|{shape}", quoted(name)))
    runs = itertools.groupby(kinds, key=lambda kind: kind[0])
    text = "&".join(f"{kind}={';'.join(name for _, name in run)}" for kind, run in runs)
    return {name: _joined(part) for name, part in parts.items()}, {"activations": text}


def _joined(parts: list[Any]) -> Any:
    if not all(isinstance(part, np.ndarray) for part in parts):
        count = sum(math.prod(part.shape) for part in parts)
        return jax.ShapeDtypeStruct((count,), parts[0].dtype)
    return np.concatenate([part.reshape(-1) for part in parts])


class GridScheme(NamedTuple):
    """Of one grid, what a file says."""

    name: str
    format: str
    shape: tuple[int, ...]  # of the ends that give its arrays


def parse_grids(text: str) -> list[GridScheme]:
    """The grids of the metadata of a file."""
    found = []
    for run in text.split("&") if text else []:
        kind, names = run.split("=")
        format, sizes = kind.split("|")
        shape = parse_sizes(sizes)
        found += [GridScheme(unquoted(name), unquoted(format), shape) for name in names.split(";")]
    return found


def parse_old_grids(text: str) -> list[GridScheme]:
    """The same of version 2 or 3: `name|format|shape`, `;` between."""
    entries = [entry.rsplit("|", 2) for entry in text.split(";")] if text else []
    return [GridScheme(name, format, parse_sizes(sizes)) for name, format, sizes in entries]


def grid_avals(grids: Iterable[GridScheme], formats: Mapping[str, Format]) -> dict[str, Any]:
    """Shapes and dtypes of the arrays of all grids, by name in the file."""
    found: dict[str, Any] = {}
    for grid in grids:
        template = _template(_format(grid.format, formats), grid.shape)
        for field, aval in _present(template).items():
            name = f"activations.{field}"
            count = math.prod(aval.shape) + (found[name].shape[0] if name in found else 0)
            found[name] = jax.ShapeDtypeStruct((count,), aval.dtype)
    return found


def assemble_grids(
    schemes: Iterable[GridScheme], arrays: dict[str, np.ndarray], formats: Mapping[str, Format]
) -> dict[str, Grid]:
    """The grids by name; their arrays leave `arrays`."""
    rest = {name: arrays.pop(name) for name in list(arrays) if name.startswith("activations.")}
    grids = {}
    for name, format_name, shape in schemes:
        if name in grids:
            raise ValueError(f"{name!r} stands twice")
        format = _format(format_name, formats)

        def take(field, template):
            key = f"activations.{field}"
            count = math.prod(template.shape)
            taken, rest[key] = rest[key][:count], rest[key][count:]
            return taken.reshape(template.shape)

        grids[name] = Grid(_qparams(format, shape, take), format)
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
    fields = qparams._asdict() if hasattr(qparams, "_asdict") else {}  # type: ignore
    return {key: _host(array) for key, array in fields.items() if not is_absent(array)}


def _host(array: Any) -> Any:
    return array if isinstance(array, jax.ShapeDtypeStruct) else host(array)


@functools.lru_cache(maxsize=1024)
def _template(format: Format, scale_shape: tuple[int, ...]) -> Any:
    """Shapes and dtypes of the qparams that ship."""
    ends = jax.ShapeDtypeStruct(scale_shape, jnp.float32)
    ship = lambda low, high: shipped(format, format.qparams(low, high))
    return jax.eval_shape(ship, ends, ends)


def _present(template: Any) -> dict[str, Any]:
    fields = template._asdict() if hasattr(template, "_asdict") else {}
    return {field: aval for field, aval in fields.items() if not is_absent(aval)}


def _qparams(format: Format, scale_shape: tuple[int, ...], take: Any) -> Any:
    """The qparams of a format from arrays that `take(field, shape and dtype)` finds."""
    template = _template(format, scale_shape)
    if not hasattr(template, "_asdict"):
        return ()
    found = {}
    for field, aval in _present(template).items():
        array = take(field, aval)
        if array.dtype != aval.dtype or array.shape != aval.shape:
            raise ValueError(
                f"{field} should be {aval.dtype} {aval.shape}, it is {array.dtype} {array.shape}"
            )
        found[field] = jnp.asarray(array)
    return template._replace(**found)


def part_avals(name: str, scheme: Scheme, formats: Mapping[str, Format]) -> dict[str, Any]:
    """Shapes and dtypes of the arrays of a leaf, by their names in the file.

    Raises:
      ValueError: the parts of the scheme do not fit, or its format is unknown.
    """
    if not scheme.packed:
        return {name: _plain_aval(scheme.shape, scheme.dtype)}
    found: dict[str, Any] = {}
    if scheme.nnz is not None:
        found |= kept_elements.avals(name, scheme.shape, scheme.nnz, scheme.positions)
    if not scheme.format:
        kept = jax.ShapeDtypeStruct((scheme.nnz or 0,), np.dtype(scheme.dtype))
        return {**found, f"{name}.values": kept}
    format = _format(scheme.format, formats)
    shape = scheme.shape if scheme.nnz is None else (scheme.nnz,)
    found[f"{name}.codes"] = jax.ShapeDtypeStruct(codes_shape(shape, format.bits), np.uint8)
    fields = _present(_template(format, scheme.where.scale_shape(scheme.shape)))
    return found | {f"{name}.{field}": aval for field, aval in fields.items()}


def disassemble(name: str, leaf: Any) -> tuple[dict[str, Any], Scheme]:
    """The arrays of a leaf by their names in the file, and its scheme.

    A leaf of shapes and dtypes gives those of its arrays.
    """
    if isinstance(leaf, Masked):
        parts, inner = disassemble(name, leaf.values)
        if not inner.packed:
            parts = {f"{name}.values": parts[name]}
        places = {part: _host(array) for part, array in kept_elements.parts(name, leaf).items()}
        kept = {"shape": tuple(leaf.shape), "dtype": str(leaf.dtype), "nnz": leaf.nnz}
        return {**places, **parts}, inner._replace(**kept, positions=leaf.positions.name)
    if not isinstance(leaf, QTensor):
        if not hasattr(leaf, "dtype") or jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            kind = getattr(leaf, "dtype", type(leaf).__name__)
            raise TypeError(f"{name}: only arrays of numbers can be saved, got {kind}")
        return {name: plain_in_file(leaf)}, plain_scheme(leaf.shape, np.dtype(leaf.dtype).name)
    fields = _fields(name, leaf.format, leaf.qparams)
    parts = {f"{name}.codes": _host(leaf.codes)}
    parts |= {f"{name}.{field}": array for field, array in fields.items()}
    scheme = Scheme(leaf.format.name, leaf.granularity, tuple(leaf.shape), leaf.dtype, None, "")
    return parts, scheme


def _plain_aval(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """What an array that is not packed is in a file: itself, or the codes of one row of nibbles."""
    dtype = jnp.dtype(dtype)
    if not is_nibbles(dtype):
        return jax.ShapeDtypeStruct(shape, dtype)
    return jax.ShapeDtypeStruct((row_bytes(math.prod(shape), stored_bits(dtype)),), np.uint8)


def plain_in_file(leaf: Any) -> Any:
    """What a file holds of an array that is not packed: see `_plain_aval`."""
    if not is_nibbles(leaf.dtype):
        return _host(leaf)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return _plain_aval(leaf.shape, leaf.dtype)
    codes = host(leaf).astype(np.int8).reshape(-1).view(np.uint8)
    return np.asarray(pack_bits(jnp.asarray(codes), stored_bits(leaf.dtype)))


def _from_plain(array: np.ndarray, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    dtype = jnp.dtype(dtype)
    return np.asarray(opened_nibbles(array, shape, dtype)) if is_nibbles(dtype) else array


def opened_nibbles(row: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """An array of nibbles from the bytes that a file holds for it, uint8 [bytes]."""
    bits = stored_bits(dtype)
    codes = unpack_bits(jnp.asarray(row), bits, math.prod(shape))
    numbers = signed(codes, bits) if jnp.iinfo(dtype).min < 0 else codes
    return numbers.astype(dtype).reshape(shape)


def _take(arrays: dict[str, np.ndarray], name: str, dtype: Any) -> jax.Array:
    array = arrays.pop(name)
    if array.dtype != dtype:
        raise ValueError(f"{name!r} should be {jnp.dtype(dtype)}, it is {array.dtype}")
    return jnp.asarray(array)


def assemble(
    name: str, scheme: Scheme, arrays: dict[str, np.ndarray], formats: Mapping[str, Format]
) -> Any:
    """A leaf from its arrays, which leave `arrays`."""
    if not scheme.packed:
        array = arrays.pop(name)
        stored = _plain_aval(scheme.shape, scheme.dtype)
        if array.shape != stored.shape or array.dtype != stored.dtype:
            raise ValueError(f"it is {array.dtype} {array.shape}")
        return _from_plain(array, scheme.shape, scheme.dtype)
    shape, dtype = scheme.shape, scheme.dtype
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"{dtype} needs jax_enable_x64")
    if scheme.format:
        leaf = _assemble_codes(name, scheme, _format(scheme.format, formats), arrays)
    else:
        leaf = _take(arrays, f"{name}.values", dtype)
    if scheme.nnz is not None:
        where = kept_elements.take(name, shape, scheme.nnz, scheme.positions, arrays)
        leaf = Masked(where, leaf, shape, dtype, scheme.nnz)
    # The abstract unpack meets every shape rule.
    if jax.eval_shape(unpack, leaf).shape != leaf.shape:
        raise ValueError(f"the parts do not have the shape {leaf.shape}")
    return leaf


def _assemble_codes(name: str, scheme: Scheme, format: Format, arrays) -> QTensor:
    where, shape = scheme.where, scheme.shape
    take = lambda field, template: arrays.pop(f"{name}.{field}")
    qparams = _qparams(format, where.scale_shape(shape), take)
    codes = _take(arrays, f"{name}.codes", jnp.uint8)
    return QTensor(codes, qparams, format, where, shape, scheme.dtype)
