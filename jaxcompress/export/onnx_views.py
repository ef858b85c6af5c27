"""How primitives that move numbers are lowered; they move codes where there are codes."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxcompress.export.onnx_lower import Lowering, Tensor
from jaxcompress.export.onnx_rules import onnx_kind, rule
from jaxcompress.export.onnx_shapes import is_one, is_static
from jaxcompress.graph.equations import Equation

END = np.iinfo(np.int64).max


def _axes(count: int) -> tuple[int, ...]:
    return tuple(range(count))


def _put(low: Lowering, e: Equation, tensor: Tensor, **changed: Any) -> None:
    found = tensor._replace(**changed)
    low.put(e.outputs[0], found.name, order=found.order, shape=found.shape, grid=found.grid)


def source(low: Lowering, e: Equation, operand: int = 0, *, loose: bool = False) -> Tensor:
    """The first operand as it lies: in its own order, in codes where it is."""
    number = e.operands[operand]
    order = None if low.known(number) is not None else low.live(number).order
    return low.tensor(number, order=order, loose=loose, codes=True)


@rule("transpose")
def _transpose(low: Lowering, e: Equation) -> None:
    x = source(low, e, loose=True)
    permutation = e.eqn.params["permutation"]
    _put(low, e, x, order=tuple(permutation.index(axis) for axis in x.order))


@rule("broadcast_in_dim")
def _broadcast(low: Lowering, e: Equation) -> None:
    places = e.eqn.params["broadcast_dimensions"]
    x = source(low, e, loose=True)
    rank = len(low.shape(e.outputs[0]))
    if len(places) == rank:
        return _put(low, e, x)
    order = tuple(sorted(range(len(places)), key=places.__getitem__))
    x = low.ordered(x, order)
    shape: list[Any] = [1] * rank
    for axis, n in zip(x.order, x.shape, strict=True):
        shape[places[axis]] = n
    _put(low, e, x, name=_with_ones(low, x, shape), order=_axes(rank), shape=tuple(shape))


def _with_ones(low: Lowering, x: Tensor, shape: Sequence[Any]) -> str:
    # The same elements in the same order, with other axes of size 1.
    return low.dims.reshape(x.name, x.shape, shape)


@rule("reshape", "squeeze", "expand_dims")
def _reshape(low: Lowering, e: Equation) -> None:
    if e.primitive == "reshape" and e.eqn.params.get("dimensions") is not None:
        raise low.refuse(e, "it permutes dimensions")
    old, new = low.shape(e.operands[0]), low.shape(e.outputs[0])
    kept = [[axis for axis, n in enumerate(s) if not is_one(n)] for s in (old, new)]
    x = source(low, e, loose=True)
    if [old[a] for a in kept[0]] == [new[a] for a in kept[1]]:
        # Only axes of size 1 come or go: what is lazy stays so.
        place = dict(zip(*kept, strict=True))
        order = [place[axis] for axis in x.order if axis in place]
        sizes = [n for axis, n in zip(x.order, x.shape, strict=True) if axis in place]
        ones = [axis for axis in range(len(new)) if axis not in order]
        for axis in ones:
            order.insert(axis, axis)
            sizes.insert(axis, 1)
        return _put(
            low, e, x, name=_with_ones(low, x, sizes), order=tuple(order), shape=tuple(sizes)
        )
    x = low.tensor(e.operands[0], codes=True)
    name = low.dims.reshape(x.name, x.shape, new)
    _put(low, e, x, name=name, order=_axes(len(new)), shape=new)


@rule("rev")
def _rev(low: Lowering, e: Equation) -> None:
    x = source(low, e)
    axes = [x.order.index(axis) for axis in e.eqn.params["dimensions"]]
    ends = [low.ints(v) for v in ([-1] * len(axes), [-END] * len(axes), axes, [-1] * len(axes))]
    _put(low, e, x, name=low.emit("Slice", [x.name, *ends]) if axes else x.name)


@rule("slice")
def _slice(low: Lowering, e: Equation) -> None:
    p, shape = e.eqn.params, low.shape(e.operands[0])
    steps = p["strides"] or (1,) * len(shape)
    bounds = list(zip(p["start_indices"], p["limit_indices"], steps, strict=True))
    x = sliced(low, source(low, e), bounds, shape)
    _put(low, e, x)


def sliced(
    low: Lowering, x: Tensor, bounds: Sequence[tuple[Any, Any, int]], shape: Sequence[Any]
) -> Tensor:
    """A slice of x, a value of `shape`: (start, limit, step) along each of its axes."""
    axes = [
        axis
        for axis, (start, limit, step) in enumerate(bounds)
        if not (step == 1 and limit == shape[axis] and isinstance(start, int) and start == 0)
    ]
    if not axes:
        return x
    starts, limits = (low.dims.vector([bounds[a][k] for a in axes]) for k in (0, 1))
    places = low.ints([x.order.index(axis) for axis in axes])
    steps = low.ints([bounds[axis][2] for axis in axes])
    name = low.emit("Slice", [x.name, starts, limits, places, steps])
    sizes = list(x.shape)
    for axis in axes:
        start, limit, step = bounds[axis]
        sizes[x.order.index(axis)] = -((start - limit) // step)
    return x._replace(name=name, shape=tuple(sizes))


@rule("split")
def _split(low: Lowering, e: Equation) -> None:
    x, sizes = source(low, e), e.eqn.params["sizes"]
    axis = x.order.index(e.eqn.params["axis"])
    count = len(sizes)
    names = low.emit("Split", [x.name, low.dims.vector(sizes)], outputs=count, axis=axis)
    for number, name in zip(e.outputs, [names] if count == 1 else names, strict=True):
        low.put(number, name, order=x.order, grid=x.grid)


@rule("concatenate")
def _concatenate(low: Lowering, e: Equation) -> None:
    order = low.common_order(e.operands)
    tensors = [low.tensor(n, order=order, codes=True) for n in e.operands]
    grids = {t.grid for t in tensors}
    if len(grids) > 1:
        tensors = [low.floats(t) for t in tensors]
    axis = order.index(e.eqn.params["dimension"])
    name = low.emit("Concat", [t.name for t in tensors], axis=axis)
    low.put(e.outputs[0], name, order=order, grid=tensors[0].grid)


@rule("stack")
def _stack(low: Lowering, e: Equation) -> None:
    axis, inner = e.eqn.params["axis"], low.common_order(e.operands)
    order = [a + (a >= axis) for a in inner]
    order.insert(axis, axis)
    tensors = [low.tensor(n, order=inner) for n in e.operands]
    shape = (*tensors[0].shape[:axis], 1, *tensors[0].shape[axis:])
    names = [_with_ones(low, t, shape) for t in tensors]
    low.put(e.outputs[0], low.emit("Concat", names, axis=axis), order=tuple(order))


@rule("pad")
def _pad(low: Lowering, e: Equation) -> None:
    config, fill = e.eqn.params["padding_config"], low.array(e.operands[1])
    if any(inside for _, _, inside in config):
        raise low.refuse(e, "it pads between elements")
    x = source(low, e)
    value = None
    if x.grid is not None and fill is not None:
        code = round(float(fill) / float(x.grid.scale)) + x.grid.zero
        near = np.float32(code - x.grid.zero) * x.grid.scale
        bounds = np.iinfo(x.grid.dtype)
        if abs(near - fill) <= 1e-6 * x.grid.scale and bounds.min <= code <= bounds.max:
            value = low.graph.constant(np.asarray(code, x.grid.dtype))
    if value is None:
        x, value = low.floats(x), low.name(e.operands[1])
    ends = [config[axis][side] for side in (0, 1) for axis in x.order]
    if not is_static(ends):
        raise low.refuse(e, "how much it pads depends on the input's shape")
    name = (
        low.emit("Pad", [x.name, low.ints(ends), value], mode="constant") if any(ends) else x.name
    )
    out = low.shape(e.outputs[0])
    _put(low, e, x, name=name, shape=tuple(out[axis] for axis in x.order))


@rule("iota")
def _iota(low: Lowering, e: Equation) -> None:
    shape, axis = low.shape(e.outputs[0]), e.eqn.params["dimension"]
    scalar = low.graph.constant(np.zeros(0, np.int64))  # the shape of a scalar
    size = low.emit("Reshape", [low.dims.one(shape[axis]), scalar])
    ends = [low.graph.constant(np.asarray(n, np.int64)) for n in (0, 1)]
    numbers = low.emit("Range", [ends[0], size, ends[1]])
    sizes = [shape[axis] if k == axis else 1 for k in range(len(shape))]
    numbers = low.emit("Cast", [numbers], to=_kind(low, e))
    name = low.dims.reshape(numbers, (shape[axis],), sizes)
    low.put(e.outputs[0], name, shape=sizes)


@rule("dim_as_value")
def _dim_as_value(low: Lowering, e: Equation) -> None:
    scalar = low.graph.constant(np.zeros(0, np.int64))
    size = low.emit("Reshape", [low.dims.one(e.eqn.params["dim"]), scalar])
    low.put(e.outputs[0], low.emit("Cast", [size], to=_kind(low, e)))


def _kind(low: Lowering, e: Equation) -> int:
    return onnx_kind(low.avals[e.outputs[0]].dtype)


def flattened(low: Lowering, x: Tensor, groups: Sequence[int]) -> Tensor:
    """x with runs of its axes joined, `groups` of so many each; the sizes of a run multiplied."""
    shape, at = [], 0
    for count in groups:
        shape.append(math.prod(x.shape[at : at + count]))
        at += count
    name = low.dims.reshape(x.name, x.shape, shape)
    return Tensor(name, _axes(len(shape)), tuple(shape), x.grid)
