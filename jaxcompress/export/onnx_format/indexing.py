"""How lookups are lowered: tables stay codes, the rows that are looked up become numbers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.export.onnx_format.constants.codes import Codes
from jaxcompress.export.onnx_format.matrix_products import joined_codes
from jaxcompress.export.onnx_format.onnx_elementwise import rule
from jaxcompress.export.onnx_format.onnx_graph import MICROSOFT
from jaxcompress.export.onnx_format.onnx_lowering import Lowering
from jaxcompress.export.onnx_format.onnx_moves import sliced, source
from jaxcompress.export.onnx_format.quantized import dequantized
from jaxcompress.export.onnx_format.symbolic_sizes import is_static
from jaxcompress.graph.equations import Equation
from jaxcompress.graph.primitives.movement import Take


@rule("gather")
def _gather(low: Lowering, e: Equation) -> None:
    d, sizes = e.eqn.params["dimension_numbers"], e.eqn.params["slice_sizes"]
    shape = low.shape(e.operands[0])
    if low.known(e.operands[1]) is not None and low.known(e.operands[0]) is None:
        free = [a for a, n in enumerate(shape) if not is_static([n])]
        if not {*free} & {*d.start_index_map} and _at_known_places(low, e):
            return
    axes = tuple(d.start_index_map)
    whole = all(sizes[a] == n for a, n in enumerate(shape) if a not in axes)
    if (
        len(axes) != 1
        or tuple(d.collapsed_slice_dims) != axes
        or d.operand_batching_dims
        or sizes[axes[0]] != 1
        or not whole
    ):
        raise low.refuse(e, "only whole slices at indices along one axis are looked up")
    (axis,) = axes
    indices = low.tensor(e.operands[1])
    index_shape = indices.shape[:-1]
    ids = low.dims.reshape(indices.name, indices.shape, index_shape)
    if e.eqn.params["mode"] == jax.lax.GatherScatterMode.CLIP:
        ends = [low.graph.constant(np.asarray(n, _dtype(low, e))) for n in (0, shape[axis] - 1)]
        ids = low.emit("Min", [low.emit("Max", [ids, ends[0]]), ends[1]])
    rank = len(low.shape(e.outputs[0]))
    batch = [a for a in range(rank) if a not in d.offset_dims]
    order = (*d.offset_dims[:axis], *batch, *d.offset_dims[axis:])
    table = low.known(e.operands[0])
    if isinstance(table, Codes):
        name = _rows_of_codes(low, table, ids, axis, len(index_shape))
        return low.put(e.outputs[0], name, order=order)
    x = low.tensor(e.operands[0], codes=True)
    low.put(e.outputs[0], low.emit("Gather", [x.name, ids], axis=axis), order=order, grid=x.grid)


def _dtype(low: Lowering, e: Equation) -> Any:
    return low.avals[e.operands[1]].dtype


def _rows_of_codes(low: Lowering, table: Codes, ids: str, axis: int, lead: int) -> str:
    # `lead` axes of indices take the place of `axis`.
    if axis == 0 and len(table.shape) == 2 and table.bits <= 4:
        found = _rows_of_nibbles(low, table, ids)
        if found is not None:
            return found
    if any(n not in (1, size) for n, size in zip(table.scale.shape, table.shape, strict=True)):
        return low.emit("Gather", [table.emit(low.graph), ids], axis=axis)
    if table.bits <= 4:
        return low.emit("Gather", [dequantized(low, table), ids], axis=axis)
    kept = low.graph.constant(table.codes, leaves=table.leaves)
    codes = low.emit("Gather", [kept, ids], axis=axis)
    rest = [n for a, n in enumerate(table.scale.shape) if a != axis]
    if table.blocks(axis) == 1 and all(n == 1 for n in rest):
        scale, zero = table.scale.reshape(()), table.zero.reshape(()).astype(np.int8)
        return low.emit("DequantizeLinear", [codes, *map(low.graph.constant, (scale, zero))])
    numbers = (table.scale, table.zero)
    parts = [_looked_up(low, a, ids, axis, lead, table.leaves) for a in numbers]
    steps = low.emit("Cast", [codes], to=1)
    if not table.symmetric:
        steps = low.emit("Sub", [steps, parts[1]])
    return low.emit("Mul", [steps, parts[0]])


def _looked_up(
    low: Lowering, numbers: np.ndarray, ids: str, axis: int, lead: int, leaves: frozenset[str]
) -> str:
    # Scales beside the rows that are looked up.
    numbers = numbers.astype(np.float32)
    if numbers.shape[axis] > 1:
        return low.emit("Gather", [low.graph.constant(numbers, leaves=leaves), ids], axis=axis)
    shape = (*numbers.shape[:axis], *[1] * lead, *numbers.shape[axis + 1 :])
    return low.graph.constant(numbers.reshape(shape), leaves=leaves)


def _rows_of_nibbles(low: Lowering, table: Codes, ids: str) -> str | None:
    # Blocks along the rows: `GatherBlockQuantized`.
    rows, width = table.shape
    own = table.block[1]
    if table.blocks(0) not in (1, rows) or table.ragged(1) or width % 2 or low.settings.standard:
        return None
    size = min(own & -own, 256)
    if size < 16 or width % size:
        return None
    where = np.arange(width // size) * size // own
    scale, points = (
        np.broadcast_to(a[:, where], (rows, width // size)) for a in (table.scale, table.zero + 8)
    )
    constant = lambda a: low.graph.constant(a, leaves=table.leaves)
    data = joined_codes((table.codes.astype(np.int32) + 8).astype(np.uint8), 4)
    inputs = [constant(data), ids, constant(np.ascontiguousarray(scale))]
    inputs.append(constant(joined_codes(points.astype(np.uint8), 4)))
    return low.emit(
        "GatherBlockQuantized", inputs, domain=MICROSOFT, gather_axis=0, quantize_axis=1,
        block_size=size, bits=4,
    )  # fmt: skip


def _at_known_places(low: Lowering, e: Equation) -> bool:
    # Indices that are a slice, as those of x[:, ::2]; else any, where all sizes are known.
    taken, small = _taken(low, e)
    if (taken < 0).any():
        raise low.refuse(e, "some of its known positions lie outside")
    if _as_slice(low, e, taken, small):
        return True
    if not is_static(low.shape(e.operands[0])) or small != low.shape(e.operands[0]):
        return False
    x = low.tensor(e.operands[0], codes=True)
    flat = low.emit("Reshape", [x.name, low.ints([-1])])
    places = low.graph.constant(taken.astype(np.int64))
    low.put(e.outputs[0], low.emit("Gather", [flat, places], axis=0), grid=x.grid)
    return True


def _taken(low: Lowering, e: Equation) -> tuple[np.ndarray, tuple[int, ...]]:
    # Numbers of the elements that are taken, in the shape of the result; axes of free sizes, which
    # are taken whole, stand as 1, also in the second result, the shape of the operand.
    p, shape = e.eqn.params, low.shape(e.operands[0])
    sizes = p["slice_sizes"]
    small = tuple(n if is_static([n]) else 1 for n in shape)
    few = tuple(s if is_static([n]) else 1 for s, n in zip(sizes, shape, strict=True))
    numbers = np.arange(int(np.prod(small)), dtype=np.int32).reshape(small)
    taken = jax.lax.gather(
        jnp.asarray(numbers), jnp.asarray(low.array(e.operands[1])), p["dimension_numbers"], few,
        mode=p["mode"], fill_value=-1,
    )  # fmt: skip
    return np.asarray(taken), small


def _as_slice(low: Lowering, e: Equation, taken: np.ndarray, small: tuple[int, ...]) -> bool:
    d = e.eqn.params["dimension_numbers"]
    if d.operand_batching_dims or not taken.size:
        return False
    bounds = []
    for along in np.unravel_index(taken, small):
        places = np.unique(along)
        step = int(places[1] - places[0]) if len(places) > 1 else 1
        bounds.append((int(places[0]), int(places[-1]) + 1, step))
    found = np.arange(int(np.prod(small))).reshape(small)[tuple(slice(*b) for b in bounds)]
    batch = [axis for axis in range(taken.ndim) if axis not in d.offset_dims]
    kept = [axis for axis in range(len(small)) if axis not in d.collapsed_slice_dims]
    target = dict(zip(kept, d.offset_dims, strict=True))
    if len(batch) == len(d.collapsed_slice_dims):
        target |= dict(zip(d.collapsed_slice_dims, batch, strict=True))
    elif batch or any(found.shape[axis] != 1 for axis in d.collapsed_slice_dims):
        return False
    axes = sorted(target, key=target.__getitem__)
    squeezed = found.transpose([*axes, *(a for a in range(found.ndim) if a not in axes)])
    if squeezed.size != taken.size or (squeezed.reshape(taken.shape) != taken).any():
        return False
    _put_slice(low, e, bounds, target)
    return True


def _put_slice(
    low: Lowering, e: Equation, bounds: list[tuple[int, int, int]], target: dict[int, int]
) -> None:
    shape, x = low.shape(e.operands[0]), source(low, e)
    cuts = [b if is_static([n]) else (0, n, 1) for b, n in zip(bounds, shape, strict=True)]
    x = sliced(low, x, Take(tuple(cuts)), shape)
    kept = [k for k, axis in enumerate(x.order) if axis in target]
    sizes = tuple(x.shape[k] for k in kept)
    name = low.dims.reshape(x.name, x.shape, sizes)
    order = tuple(target[x.order[k]] for k in kept)
    low.put(e.outputs[0], name, order=order, shape=sizes, grid=x.grid)


@rule("dynamic_slice")
def _dynamic_slice(low: Lowering, e: Equation) -> None:
    x_number, *starts = e.operands
    shape, sizes = low.shape(x_number), e.eqn.params["slice_sizes"]
    if all(low.known(n) is not None for n in starts) and is_static(shape):
        places = [int(np.asarray(low.array(n))) for n in starts]
        known = zip(places, shape, sizes, strict=True)
        firsts = [min(max(at, 0), n - size) for at, n, size in known]
        bounds = [(first, first + size, 1) for first, size in zip(firsts, sizes, strict=True)]
        x = sliced(low, source(low, e), Take(tuple(bounds)), shape)
        return low.put(e.outputs[0], x.name, order=x.order, grid=x.grid)
    x, order = source(low, e), None
    order = x.order
    vector = []
    for axis in order:
        start = low.emit("Cast", [low.name(starts[axis])], to=7)
        last = low.emit("Sub", [low.dims.one(shape[axis]), low.dims.one(sizes[axis])])
        start = low.emit("Reshape", [start, low.ints([1])])
        vector.append(low.emit("Min", [low.emit("Max", [start, low.ints([0])]), last]))
    first = low.emit("Concat", vector, axis=0)
    ends = low.emit("Add", [first, low.dims.vector([sizes[axis] for axis in order])])
    name = low.emit("Slice", [x.name, first, ends, low.ints(range(len(order)))])
    low.put(e.outputs[0], name, order=order, grid=x.grid)
