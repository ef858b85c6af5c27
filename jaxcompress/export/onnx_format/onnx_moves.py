"""How primitives that move numbers are lowered; they move codes where there are codes."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxcompress.export.onnx_format.onnx_elementwise import KINDS, onnx_kind, rule
from jaxcompress.export.onnx_format.onnx_lowering import LiveGrid, Lowering, Tensor
from jaxcompress.export.onnx_format.symbolic_sizes import is_one, is_static
from jaxcompress.graph.equations import Equation
from jaxcompress.graph.primitives.movement import (
    Moved,
    Pad,
    Permute,
    Regroup,
    Shape,
    Spread,
    Step,
    Take,
    moved,
)

END = np.iinfo(np.int64).max


def _axes(count: int) -> tuple[int, ...]:
    return tuple(range(count))


def source(low: Lowering, e: Equation, operand: int = 0, *, loose: bool = False) -> Tensor:
    """The first operand as it lies: in its own order, in codes where it is."""
    number = e.operands[operand]
    order = None if low.known(number) is not None else low.live(number).order
    return low.tensor(number, order=order, loose=loose, codes=True)


def _moved(low: Lowering, e: Equation) -> None:
    for number, result in zip(e.outputs, moved(e.eqn) or (), strict=True):
        fill = e.operands[-1]  # of a pad
        if result.axis is None:
            (operand,) = (e.operands[k] for k in result.operands)
            x = source(low, e, result.operands[0], loose=True)
            x = _stepped(low, x, low.shape(operand), result.steps, fill)
            low.put(number, x.name, order=x.order, shape=x.shape, grid=x.grid)
        else:
            _join(low, number, [e.operands[k] for k in result.operands], result)


KINDS["move"] = _moved


def _join(low: Lowering, number: int, operands: Sequence[int], result: Moved) -> None:
    assert result.axis is not None
    inner = low.common_order(operands)
    parts = [
        _stepped(low, low.tensor(n, order=inner, codes=True), low.shape(n), result.steps)
        for n in operands
    ]
    if len({t.grid for t in parts}) > 1:
        parts = [low.floats(t) for t in parts]
    order, grid = parts[0].order, parts[0].grid
    names = [low.ordered(t, order).name for t in parts]
    name = low.emit("Concat", names, axis=order.index(result.axis))
    low.put(number, name, order=order, grid=grid)


def _stepped(
    low: Lowering, x: Tensor, shape: Shape, steps: Sequence[Step], fill: int | None = None
) -> Tensor:
    """x, a value of `shape`, after some steps; `fill` is the value that a pad puts there."""
    for step in steps:
        if isinstance(step, Permute):
            x = x._replace(order=tuple(step.order.index(axis) for axis in x.order))
        elif isinstance(step, Regroup):
            x = _regrouped(low, x, shape, step.sizes)
        elif isinstance(step, Spread):
            ones: list[Any] = [1] * len(step.sizes)
            for axis, n in zip(step.axes, shape, strict=True):
                ones[axis] = n
            x = _regrouped(low, x, shape, tuple(ones))
        elif isinstance(step, Take):
            x = sliced(low, low.full(x, shape), step, shape)
        else:
            assert fill is not None
            x = _padded(low, low.full(x, shape), step, shape, fill)
        shape = step.shape(shape)
    return x


def _regrouped(low: Lowering, x: Tensor, old: Shape, new: Shape) -> Tensor:
    kept = [[axis for axis, n in enumerate(s) if not is_one(n)] for s in (old, new)]
    if [old[a] for a in kept[0]] != [new[a] for a in kept[1]]:
        x = low.full(low.ordered(x, _axes(len(old))), old)
        return x._replace(
            name=low.dims.reshape(x.name, x.shape, new), order=_axes(len(new)), shape=new
        )
    # Only axes of size 1 come or go: what is lazy stays so.
    place = dict(zip(*kept, strict=True))
    order = [place[axis] for axis in x.order if axis in place]
    sizes = [n for axis, n in zip(x.order, x.shape, strict=True) if axis in place]
    for axis in range(len(new)):
        if axis not in place.values():
            order.insert(axis, axis)
            sizes.insert(axis, 1)
    name = low.dims.reshape(x.name, x.shape, sizes)
    return x._replace(name=name, order=tuple(order), shape=tuple(sizes))


def sliced(low: Lowering, x: Tensor, take: Take, shape: Shape) -> Tensor:
    """What is taken of x, a value of `shape`."""
    axes = [axis for axis, whole in enumerate(take.whole(shape)) if not whole]
    if not axes:
        return x
    # Backwards an axis is taken whole.
    cuts = [(a, b, s) if s > 0 else (-1, -END, s) for a, b, s in (take.bounds[k] for k in axes)]
    starts, limits = (low.dims.vector([cut[k] for cut in cuts]) for k in (0, 1))
    places = low.ints([x.order.index(axis) for axis in axes])
    steps = low.ints([step for *_, step in cuts])
    name = low.emit("Slice", [x.name, starts, limits, places, steps])
    sizes = take.shape(shape)
    return x._replace(name=name, shape=tuple(sizes[axis] for axis in x.order))


def _padded(low: Lowering, x: Tensor, pad: Pad, shape: Shape, fill: int) -> Tensor:
    if any(inside and not is_one(n) for (*_, inside), n in zip(pad.config, shape, strict=True)):
        return _stepped(low, x, shape, _between(pad, shape), fill)
    ends = [pad.config[axis][side] for side in (0, 1) for axis in x.order]
    if all(is_static([n]) and n == 0 for n in ends):
        return x
    value = _code(x.grid, low.array(fill))
    if value is None:
        x, number = low.floats(x), low.name(fill)
    else:
        number = low.graph.constant(value)
    name = low.emit("Pad", [x.name, low.dims.vector(ends), number], mode="constant")
    sizes = Pad(tuple((a, b, 0) for a, b, _ in pad.config)).shape(shape)
    return x._replace(name=name, shape=tuple(sizes[axis] for axis in x.order))


def _between(pad: Pad, shape: Shape) -> tuple[Step, ...]:
    # [n] -> [n, 1] -> [n, 1 + i] -> [n (1 + i)], the last i of which are not between elements.
    pairs = zip(pad.config, shape, strict=True)
    inside = [0 if is_static([n]) and n == 0 else i for (*_, i), n in pairs]
    holes = tuple(c for i in inside for c in ((0, 0, 0), (0, i, 0)))
    wide = tuple(n * (1 + i) for n, i in zip(shape, inside, strict=True))
    ends = tuple((a, b - i, 0) for (a, b, _), i in zip(pad.config, inside, strict=True))
    return (
        Regroup(tuple(size for n in shape for size in (n, 1))),
        Pad(holes),
        Regroup(wide),
        Pad(ends),
    )


def _code(grid: LiveGrid | None, fill: np.ndarray | None) -> np.ndarray | None:
    # The code of a number that lies on the grid.
    if grid is None or fill is None:
        return None
    code, bounds = round(float(fill) / float(grid.scale)) + grid.zero, np.iinfo(grid.dtype)
    near = np.float32(code - grid.zero) * grid.scale
    on_it = abs(near - fill) <= 1e-6 * grid.scale and bounds.min <= code <= bounds.max
    return np.asarray(code, grid.dtype) if on_it else None


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
