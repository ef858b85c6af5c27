"""How reductions, windows and running sums are lowered."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcompress.export.onnx_format.onnx_elementwise import onnx_kind, rule
from jaxcompress.export.onnx_format.onnx_lowering import Lowering, Tensor
from jaxcompress.export.onnx_format.onnx_moves import source
from jaxcompress.export.onnx_format.symbolic_sizes import is_static
from jaxcompress.graph import compat
from jaxcompress.graph.equations import Equation

_INT32, _BOOL = 6, 9  # TensorProto.DataType


def _removed(tensor: Tensor, axes: tuple[int, ...]) -> tuple[list[int], tuple[int, ...]]:
    # Places of the axes in the tensor, and the order of those that stay.
    places = [tensor.order.index(axis) for axis in axes]
    kept = [axis for axis in tensor.order if axis not in axes]
    rank = {axis: k for k, axis in enumerate(sorted(kept))}
    return places, tuple(rank[axis] for axis in kept)


def _reduce(low: Lowering, x: Tensor, op: str, axes: tuple[int, ...]) -> Tensor:
    places, order = _removed(x, axes)
    name = low.emit(op, [x.name, low.ints(places)], keepdims=0) if axes else x.name
    shape = tuple(n for axis, n in zip(x.order, x.shape, strict=True) if axis not in axes)
    return x._replace(name=name, order=order, shape=shape)


def _put(low: Lowering, e: Equation, y: Tensor) -> None:
    low.put(e.outputs[0], y.name, order=y.order, shape=y.shape, grid=y.grid)


@rule("reduce_sum", "reduce_prod")
def _sum(low: Lowering, e: Equation) -> None:
    axes = tuple(e.eqn.params["axes"])
    x = low.floats(source(low, e))
    op = {"reduce_sum": "ReduceSum", "reduce_prod": "ReduceProd"}[e.primitive]
    _put(low, e, _reduce(low, x, op, axes))
    sizes = [low.shape(e.operands[0])[axis] for axis in axes]
    is_float = jnp.issubdtype(low.avals[e.outputs[0]].dtype, jnp.floating)
    if e.primitive == "reduce_sum" and axes and is_float and is_static(sizes):
        count = math.prod(sizes)
        low.sums[e.outputs[0]] = count, lambda: _reduce(low, x, "ReduceMean", axes)


@rule("reduce_max", "reduce_min")
def _extreme(low: Lowering, e: Equation) -> None:
    op = {"reduce_max": "ReduceMax", "reduce_min": "ReduceMin"}[e.primitive]
    _put(low, e, _reduce(low, source(low, e), op, tuple(e.eqn.params["axes"])))


@rule("reduce_and", "reduce_or")
def _all(low: Lowering, e: Equation) -> None:
    op = {"reduce_and": "ReduceMin", "reduce_or": "ReduceMax"}[e.primitive]
    x = source(low, e)
    x = x._replace(name=low.emit("Cast", [x.name], to=_INT32))
    y = _reduce(low, x, op, tuple(e.eqn.params["axes"]))
    _put(low, e, y._replace(name=low.emit("Cast", [y.name], to=_BOOL)))


@rule("argmax", "argmin")
def _argmax(low: Lowering, e: Equation) -> None:
    (axis,) = e.eqn.params["axes"]
    x = low.floats(source(low, e))
    (place,), order = _removed(x, (axis,))
    op = {"argmax": "ArgMax", "argmin": "ArgMin"}[e.primitive]
    name = low.emit(op, [x.name], axis=place, keepdims=0)
    name = low.emit("Cast", [name], to=onnx_kind(low.avals[e.outputs[0]].dtype))
    low.put(e.outputs[0], name, order=order)


@rule("cumsum")
def _cumsum(low: Lowering, e: Equation) -> None:
    x = low.floats(source(low, e))
    place = low.graph.constant(np.asarray(x.order.index(e.eqn.params["axis"]), np.int64))
    name = low.emit("CumSum", [x.name, place], reverse=int(e.eqn.params["reverse"]))
    low.put(e.outputs[0], name, order=x.order)


@rule("reduce_window_max", "reduce_window_sum", "reduce_window")
def _window(low: Lowering, e: Equation) -> None:
    p, largest = e.eqn.params, _takes_largest(low, e)
    keys = ("window_dimensions", "window_strides", "padding", "window_dilation")
    columns = list(zip(*(p[key] for key in keys), strict=True))
    if any(n != 1 for n in p["base_dilation"]):
        raise low.refuse(e, "its input is dilated")
    if not is_static([n for size, step, pad, gap in columns for n in (size, step, *pad, gap)]):
        raise low.refuse(e, "its windows depend on the input's shape")
    idle = [a for a, column in enumerate(columns) if column == (1, 1, (0, 0), 1)]
    rank = len(columns)
    if rank - len(idle) > 3 or len(idle) < 2:
        raise low.refuse(e, "windows are lowered where two axes have none and at most three do")
    order = _window_order(low, e, idle[:2], rank)
    chosen = [columns[axis] for axis in order[2:]]
    pooled = _pooled(low, e, order, chosen, largest)
    x_grid = None if low.known(e.operands[0]) is not None else low.live(e.operands[0]).grid
    if largest:
        return _put(low, e, pooled._replace(grid=x_grid))
    count, dtype = math.prod(c[0] for c in chosen), low.avals[e.outputs[0]].dtype
    factor = low.graph.constant(np.asarray(count, dtype))
    _put(low, e, pooled._replace(name=low.emit("Mul", [pooled.name, factor])))
    low.sums[e.outputs[0]] = count, lambda: pooled


def _takes_largest(low: Lowering, e: Equation) -> bool:
    # Whether the largest of a window is taken, else the sum is.
    if e.primitive != "reduce_window":
        return e.primitive == "reduce_window_max"
    steps = [eqn.primitive.name for eqn in compat.body(e.eqn.params["jaxpr"]).jaxpr.eqns]
    start = low.array(e.operands[1]) if len(e.operands) == 2 else None
    dtype = low.avals[e.operands[0]].dtype
    if start is not None and steps in (["max"], ["add"]):
        is_float = jnp.issubdtype(dtype, jnp.floating)
        least = -np.inf if is_float else np.iinfo(dtype).min
        if float(start) == (least if steps == ["max"] else 0):
            return steps == ["max"]
    raise low.refuse(e, "only the largest number or the sum of a window is lowered")


def _window_order(low: Lowering, e: Equation, lead: list[int], rank: int) -> tuple[int, ...]:
    # As it lies, if its first two axes have no windows.
    if low.known(e.operands[0]) is None:
        order = low.live(e.operands[0]).order
        if set(order[:2]) == set(lead):
            return order
    return (*lead, *(axis for axis in range(rank) if axis not in lead))


def _pooled(
    low: Lowering, e: Equation, order: tuple[int, ...], columns: list[Any], largest: bool
) -> Tensor:
    # The largest number of every window, or its mean.
    x = low.tensor(e.operands[0], order=order, codes=largest)
    attributes = {
        "kernel_shape": tuple(c[0] for c in columns),
        "strides": tuple(c[1] for c in columns),
        "pads": (*(c[2][0] for c in columns), *(c[2][1] for c in columns)),
        "dilations": tuple(c[3] for c in columns) if any(c[3] != 1 for c in columns) else None,
    }
    shape = tuple(low.shape(e.outputs[0])[axis] for axis in order)
    if largest:
        return Tensor(low.emit("MaxPool", [x.name], **attributes), order, shape)
    name = low.emit("AveragePool", [x.name], count_include_pad=1, **attributes)
    return Tensor(name, order, shape)
