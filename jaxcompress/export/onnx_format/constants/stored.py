"""Constants that are computed in the file from what is kept: tables, codes of any format, halves.

Operators of runtimes know integers in regular blocks (`codes.Codes`). All else that is packed
stays packed too: the file holds codes, scales and tables, and a few operations make numbers of them
before anything runs (runtimes fold them when they load the file). What is computed from such a
constant, a slice or a product with a gain, is lowered as an operation.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxcompress.core.packed import Masked, QTensor, dense, unpack, unsigned_codes
from jaxcompress.export.onnx_format.onnx_graph import Graph
from jaxcompress.formats.bits import signed
from jaxcompress.formats.fixed_point_grids import FixedPoint
from jaxcompress.formats.integers import Integer
from jaxcompress.formats.scaled import Scaled

_INT32, _FLOAT = 6, 1  # TensorProto.DataType
_BLOCKED_OPSET = 21  # that has 4 bits
_LONG = 8192  # codes of one or two bits from which on tables to open bytes pay


class Stored(NamedTuple):
    """A constant that operations of the file make.

    Attributes:
      numbers: what they give.
      make: (lowering) -> name of the tensor, or None if the lowering has it then.
      leaves: paths of the packed leaves it is made of.
      kept_bytes: of what is in the file for it.
    """

    numbers: np.ndarray
    make: Callable[[Any], str | None]
    leaves: frozenset[str]
    kept_bytes: int


class Opened(np.ndarray):
    """An array that was packed: `leaves` says what it is made of, `why` why it is so no more."""

    leaves: frozenset[str] = frozenset()
    why: str = ""

    def __array_finalize__(self, source: Any) -> None:
        self.leaves = getattr(source, "leaves", frozenset())
        self.why = getattr(source, "why", "")


def opened(array: Any, leaves: frozenset[str], why: str) -> np.ndarray:
    """An array that remembers which leaves it is made of."""
    view = np.asarray(array).view(Opened)
    view.leaves, view.why = leaves, why
    return view


def of_packed(leaf: Any, path: str) -> Any:
    """A leaf as `Stored`; an array that is not packed as it is, save those of 8 or 16 bits."""
    leaves = frozenset({path})
    if not isinstance(leaf, QTensor | Masked):
        array = np.asarray(leaf)
        bytewise = array.dtype.itemsize == 1 and array.dtype.kind in "iu"
        if not (bytewise or array.dtype.itemsize == 2) or array.ndim < 2:
            return leaf
        make = lambda low: low.graph.constant(array, leaves=leaves)
        return Stored(array, make, leaves, array.nbytes)
    numbers = np.asarray(unpack(leaf))
    form = dense(leaf)
    if not isinstance(form, QTensor) or numbers.size == 0:
        return opened(numbers, leaves, "its zeros are stored beside its numbers")
    parts = _parts(form)
    if parts is None or not _same(_joined(form, parts), numbers):
        return opened(numbers, leaves, f"the format {form.format.name} has no table")
    size = math.ceil(form.size * parts.bits / 8) + parts.table.nbytes
    make = lambda low: _made(low.graph, form, parts, leaves, numbers.dtype)
    return Stored(numbers, make, leaves, size)


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    return np.allclose(a, b, rtol=1e-6, atol=0, equal_nan=True)


class _Parts(NamedTuple):
    # x = (table[code] - zero) * scale, or table[block, code]; scale and zero in the shape of the
    # granularity's scales.
    codes: np.ndarray
    bits: int
    table: np.ndarray
    scale: np.ndarray | None
    zero: np.ndarray | None = None


def _parts(leaf: QTensor) -> _Parts | None:
    form: Any = leaf.format
    codes = np.asarray(unsigned_codes(leaf))
    bits = max(math.ceil(form.bits), 1)
    if bits > 8:
        return None
    every = jnp.arange(2**bits, dtype=jnp.uint8)
    if isinstance(form, FixedPoint):
        return _Parts(codes, bits, np.asarray(form.decode(every), np.float32), None)
    if isinstance(form, Integer):
        table = np.asarray(signed(every, bits) if form.symmetric else every, np.float32)
        zero = None if form.symmetric else np.asarray(leaf.qparams.zero_point, np.float32)
        return _Parts(codes, bits, table, np.asarray(leaf.qparams.scale, np.float32), zero)
    first = _first_of_blocks(leaf)
    if isinstance(form, Scaled):
        table = np.asarray(form.element.decode(every), np.float32)
        ones = jnp.ones(leaf.shape, jnp.float32)
        scales = form.scale.multiply(ones, form._open(leaf.qparams, leaf.granularity, leaf.shape))
        scale = np.asarray(scales, np.float32).reshape(-1)[first]
        return _Parts(codes, bits, table, scale.reshape(leaf.granularity.scale_shape(leaf.shape)))
    columns = []
    for code in range(2**bits):
        same = jnp.full(leaf.shape, code, jnp.uint8)
        values = form.decode(same, leaf.qparams, where=leaf.granularity, dtype=jnp.float32)
        columns.append(np.asarray(values).reshape(-1)[first])
    return _Parts(codes, bits, np.nan_to_num(np.stack(columns, -1)), None)


def _blocks(leaf: QTensor) -> np.ndarray:
    # The number of the block of every element.
    scales = leaf.granularity.scale_shape(leaf.shape)
    numbers = jnp.arange(math.prod(scales)).reshape(scales)
    spread = leaf.granularity.expand(numbers, leaf.shape)
    return np.broadcast_to(np.asarray(spread), leaf.shape)


def _first_of_blocks(leaf: QTensor) -> np.ndarray:
    return np.unique(_blocks(leaf).reshape(-1), return_index=True)[1]


def _joined(leaf: QTensor, parts: _Parts) -> np.ndarray:
    codes = parts.codes.astype(np.int64)
    if parts.table.ndim == 2:
        return parts.table[_blocks(leaf), codes]
    values = parts.table[codes]
    if parts.zero is not None:
        values = values - parts.zero.reshape(-1)[_blocks(leaf)]
    return values if parts.scale is None else values * parts.scale.reshape(-1)[_blocks(leaf)]


def _made(graph: Graph, leaf: QTensor, parts: _Parts, leaves: frozenset[str], dtype: Any) -> str:
    index = indices(graph, parts.codes, parts.bits, leaves)
    if parts.table.ndim == 2 and len(parts.table) > 1:  # a table for every block, one after another
        places = np.arange(len(parts.table), dtype=np.int32) * parts.table.shape[1]
        shape = leaf.granularity.scale_shape(leaf.shape)
        start = graph.constant(places.reshape(shape), leaves=leaves)
        index = graph.emit("Add", [index, _spread(graph, start, leaf)])
    name = graph.emit("Gather", [graph.constant(parts.table.reshape(-1), leaves=leaves), index])
    if parts.zero is not None:
        zero = few_numbers(graph, parts.zero, leaves)
        name = graph.emit("Sub", [name, _spread(graph, zero, leaf)])
    if parts.scale is not None:
        scale = few_numbers(graph, parts.scale, leaves)
        name = graph.emit("Mul", [name, _spread(graph, scale, leaf)])
    if dtype != np.float32:
        name = graph.emit("Cast", [name], to={"float16": 10, "bfloat16": 16}[dtype.name])
    return name


def few_numbers(graph: Graph, numbers: np.ndarray, leaves: frozenset[str]) -> str:
    """float32 numbers, as a table and bytes where few of them differ (powers of two, float8)."""
    table, places = np.unique(numbers, return_inverse=True)
    if len(table) > 256 or 4 * len(table) + numbers.size >= 4 * numbers.size:
        return graph.constant(numbers, leaves=leaves)
    index = graph.constant(places.reshape(numbers.shape).astype(np.uint8), leaves=leaves)
    index = graph.emit("Cast", [index], to=_INT32)
    return graph.emit("Gather", [graph.constant(table, leaves=leaves), index])


def indices(graph: Graph, codes: np.ndarray, bits: int, leaves: frozenset[str]) -> str:
    """Unsigned codes below 2**bits as int32; in the file two or more in a byte where they fit."""
    if bits > 4:
        name = graph.constant(codes.astype(np.uint8), leaves=leaves)
        return graph.emit("Cast", [name], to=_INT32)
    if bits > 2 or codes.size < _LONG:
        graph.opset = max(graph.opset, _BLOCKED_OPSET)
        name = graph.constant(codes.astype(np.uint8), stored="uint4", leaves=leaves)
        one = graph.constant(np.ones((), np.float32))
        name = graph.emit("DequantizeLinear", [name, one])
        return graph.emit("Cast", [name], to=_INT32)
    return _from_bytes(graph, codes, bits, leaves)


def _from_bytes(graph: Graph, codes: np.ndarray, bits: int, leaves: frozenset[str]) -> str:
    # Each byte opens into a row of a table; three values (1.6 bits) lie five to a byte.
    trits = bits == 2 and codes.max(initial=0) <= 2
    width, base = (5, 3) if trits else (8 // bits, 2**bits)
    flat = np.zeros(-(-codes.size // width) * width, np.uint8)
    flat[: codes.size] = codes.reshape(-1)
    powers = base ** np.arange(width)
    packed = (flat.reshape(-1, width) * powers).sum(-1).astype(np.uint8)
    table = (np.arange(base**width)[:, None] // powers % base).astype(np.uint8)
    index = graph.emit("Cast", [graph.constant(packed, leaves=leaves)], to=_INT32)
    rows = graph.emit("Gather", [graph.constant(table), index])
    ints = lambda *values: graph.constant(np.asarray(values, np.int64))
    name = graph.emit("Reshape", [rows, ints(-1)])
    name = graph.emit("Slice", [name, ints(0), ints(codes.size)])
    name = graph.emit("Reshape", [name, ints(*codes.shape)])
    return graph.emit("Cast", [name], to=_INT32)


def _spread(graph: Graph, name: str, leaf: QTensor) -> str:
    # As `Granularity.expand`: scales that broadcast against the array.
    where, shape = leaf.granularity, leaf.shape
    scales = where.scale_shape(shape)
    if where.plain:
        return name
    ints = lambda values: graph.constant(np.asarray(values, np.int64))
    if where.block is not None:
        lead = 2 * len(shape) - len(scales)
        counts = (*scales[:lead], *scales[lead::2])
        sizes = (*[1] * lead, *where.block[-len(shape) :])
        name = graph.emit("Reshape", [name, ints(counts)])
        return blockwise(graph, name, counts, sizes, shape)
    order, lead, count, trail = where._plan(shape)
    at, groups = len(lead), scales[len(lead)]
    assert where.group is not None
    name = graph.emit("Expand", [name, ints((*lead, groups, where.group, *trail))])
    name = graph.emit("Reshape", [name, ints((*lead, groups * where.group, *trail))])
    name = graph.emit("Slice", [name, ints([0]), ints([count]), ints([at])])
    if order is None:
        return graph.emit("Reshape", [name, ints(shape)])
    name = graph.emit("Reshape", [name, ints([shape[a] for a in order])])
    return graph.emit("Transpose", [name], perm=tuple(order.index(a) for a in range(len(order))))


def blockwise(graph: Graph, name: str, counts: Any, sizes: Any, shape: Any) -> str:
    """Numbers [counts], each repeated `sizes` times along the axes, cut to `shape`."""
    ints = lambda values: graph.constant(np.asarray(values, np.int64))
    axes = [a for a, s in enumerate(sizes) if s > 1 and counts[a] < shape[a]]
    if not axes:
        return name
    grow = [sizes[a] if a in axes else 1 for a in range(len(counts))]
    between = [n for c, s in zip(counts, grow, strict=True) for n in (c, s)]
    ones = [n for c in counts for n in (c, 1)]
    name = graph.emit("Reshape", [name, ints(ones)])
    name = graph.emit("Expand", [name, ints(between)])
    name = graph.emit("Reshape", [name, ints([c * s for c, s in zip(counts, grow, strict=True)])])
    cut = [a for a in axes if counts[a] * grow[a] != shape[a]]
    if not cut:
        return name
    ends = [shape[a] for a in cut]
    return graph.emit("Slice", [name, ints([0] * len(cut)), ints(ends), ints(cut)])
