"""Packed leaves and grids as named arrays and schemes, and back; see checkpoint.py."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.compressor import is_absent
from jaxcompress.core.packed import Grid, Masked, QTensor, unpack
from jaxcompress.export import positions
from jaxcompress.export.scheme import Scheme, parse_sizes, scheme_of, sizes_text
from jaxcompress.formats import Format, parse, shipped


def disassemble_grids(activations: Mapping[str, Grid]):
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
        texts.append(f"{name}|{grid.format.name}|{sizes_text(_scale_shape(grid, fields))}")
    arrays = {name: np.concatenate(part) for name, part in parts.items()}
    return arrays, {"activations": ";".join(texts)}


def assemble_grids(
    text: str, arrays: dict[str, np.ndarray], formats: Mapping[str, Format]
) -> dict[str, Grid]:
    rest = {name: arrays.pop(name) for name in list(arrays) if name.startswith("activations.")}
    grids = {}
    for entry in text.split(";") if text else []:
        name, format_name, sizes = entry.rsplit("|", 2)
        if name in grids:
            raise ValueError(f"{name!r} stands twice")
        format = _format(format_name, formats)

        def take(field, template):
            key = f"activations.{field}"
            count = math.prod(template.shape)
            taken, rest[key] = rest[key][:count], rest[key][count:]
            return taken.reshape(template.shape)

        grids[name] = Grid(_qparams(format, parse_sizes(sizes), take), format)
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
            inner = f"|||{sizes_text(leaf.shape)}|{leaf.dtype}"
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
    return parts, scheme_of(leaf)


def _take(arrays: dict[str, np.ndarray], name: str, dtype: Any) -> jax.Array:
    array = arrays.pop(name)
    if array.dtype != dtype:
        raise ValueError(f"{name!r} should be {jnp.dtype(dtype)}, it is {array.dtype}")
    return jnp.asarray(array)


def assemble(
    name: str, scheme: Scheme, arrays: dict[str, np.ndarray], formats: Mapping[str, Format]
) -> Any:
    shape, dtype = scheme.shape, scheme.dtype
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"{dtype} needs jax_enable_x64")
    if scheme.format:
        leaf = _assemble_codes(name, scheme, _format(scheme.format, formats), arrays)
    else:
        leaf = _take(arrays, f"{name}.values", dtype)
    if scheme.nnz is not None:
        where = positions.take(name, shape, scheme.nnz, scheme.positions, arrays)
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
