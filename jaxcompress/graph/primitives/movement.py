"""What moves elements, in six steps that every pass knows: one rule for all such primitives.

Transposes, reshapes, slices, splits, stacks, tiles and the rest are chains of a few steps:

- `Permute` puts axes in another order;
- `Regroup` keeps the elements in order and gives them another shape;
- `Spread` repeats along new axes and along axes of size 1;
- `Take` keeps every n-th index of a stretch of each axis, forwards or backwards;
- `Pad` puts a number around and between elements;
- a join lays operands one behind the other along an axis.

`moved` writes an equation so. A pass says what a step does to what it follows (labels of channels,
terms of axes, codes, nodes of a file), and so knows all primitives that move elements, those of
newer JAX too. Sizes may be symbols (`jax.export`).

`move` evaluates an equation on NumPy arrays, of whatever they hold: element numbers say where each
element comes from.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxcompress.graph import compat
from jaxcompress.graph.primitives.table import row

Shape = tuple[Any, ...]


@dataclass(frozen=True)
class Permute:
    """Axis k of the result is axis `order[k]` of the operand."""

    order: tuple[int, ...]

    def shape(self, before: Shape) -> Shape:
        """The shape of the result."""
        return tuple(before[axis] for axis in self.order)

    def apply(self, x: Any, fill: Any = None, *, lead: int = 0) -> Any:
        """The step on an array; `lead` axes in front stay."""
        del fill
        return x.transpose(*range(lead), *(axis + lead for axis in self.order))


@dataclass(frozen=True)
class Regroup:
    """The same elements in the same order, of another shape."""

    sizes: Shape

    def shape(self, before: Shape) -> Shape:
        """The shape of the result."""
        del before
        return self.sizes

    def apply(self, x: Any, fill: Any = None, *, lead: int = 0) -> Any:
        """The step on an array; `lead` axes in front stay."""
        del fill
        return x.reshape((*x.shape[:lead], *self.sizes))


@dataclass(frozen=True)
class Spread:
    """Axis k of the operand is axis `axes[k]` of the result; others and sizes of 1 are repeated.

    `axes` ascend.
    """

    sizes: Shape
    axes: tuple[int, ...]

    def shape(self, before: Shape) -> Shape:
        """The shape of the result."""
        del before
        return self.sizes

    def apply(self, x: Any, fill: Any = None, *, lead: int = 0) -> Any:
        """The step on an array; `lead` axes in front stay."""
        del fill
        ones = [1] * len(self.sizes)
        for axis, n in zip(self.axes, x.shape[lead:], strict=True):
            ones[axis] = n
        first = x.shape[:lead]
        return np.broadcast_to(x.reshape((*first, *ones)), (*first, *self.sizes))


@dataclass(frozen=True)
class Take:
    """Every `step`-th index from `start` up to `stop`, along each axis.

    Backwards (`step` -1) an axis is always taken whole.
    """

    bounds: tuple[tuple[Any, Any, int], ...]  # (start, stop, step)

    def shape(self, before: Shape) -> Shape:
        """The shape of the result."""
        pairs = zip(self.bounds, before, strict=True)
        return tuple(
            n if step < 0 or (_is(start, 0) and step == 1 and _is(stop, n)) else
            -((start - stop) // step)
            for (start, stop, step), n in pairs
        )  # fmt: skip

    def apply(self, x: Any, fill: Any = None, *, lead: int = 0) -> Any:
        """The step on an array; `lead` axes in front stay."""
        del fill
        return x[(*[slice(None)] * lead, *self.slices)]

    @property
    def slices(self) -> tuple[slice, ...]:
        """As indices of an array."""
        return tuple(slice(None, None, -1) if s < 0 else slice(a, b, s) for a, b, s in self.bounds)

    def whole(self, before: Shape) -> tuple[bool, ...]:
        """Of which axes all indices are kept, in order."""
        return tuple(
            step == 1 and _is(start, 0) and _is(stop, n)
            for (start, stop, step), n in zip(self.bounds, before, strict=True)
        )


@dataclass(frozen=True)
class Pad:
    """`low` and `high` elements before and behind each axis, `interior` between its elements.

    Negative numbers cut. The number that is put there is the second operand of the equation.
    """

    config: tuple[tuple[Any, Any, int], ...]  # (low, high, interior)

    def shape(self, before: Shape) -> Shape:
        """The shape of the result."""
        pairs = zip(self.config, before, strict=True)
        return tuple(n + (n - 1) * i * (n != 0) + a + b if i else n + a + b
                     for (a, b, i), n in pairs)  # fmt: skip

    def apply(self, x: Any, fill: Any = None, *, lead: int = 0) -> Any:
        """The step on an array; `lead` axes in front stay."""
        config = ((0, 0, 0),) * lead + self.config
        sizes = [n + max(n - 1, 0) * i for (_, _, i), n in zip(config, x.shape, strict=True)]
        wide = [n + max(a, 0) + max(b, 0) for (a, b, _), n in zip(config, sizes, strict=True)]
        out = np.full(wide, fill, x.dtype)
        out[tuple(
            slice(max(a, 0), max(a, 0) + n, i + 1)
            for (a, _, i), n in zip(config, sizes, strict=True)
        )] = x  # fmt: skip
        return out[tuple(
            slice(max(-a, 0), n - max(-b, 0)) for (a, b, _), n in zip(config, wide, strict=True)
        )]  # fmt: skip


Step = Permute | Regroup | Spread | Take | Pad


@dataclass(frozen=True)
class Moved:
    """How a result comes from operands.

    Attributes:
      operands: the numbers of those whose elements it holds.
      steps: what is done to each of them; to all the same.
      axis: along which they are joined then, None of a single one.
    """

    operands: tuple[int, ...]
    steps: tuple[Step, ...]
    axis: int | None = None


def moved(eqn: Any) -> list[Moved] | None:
    """How each result of an equation comes from its operands; None if more than moving is done.

    The equation may be of any primitive; its parameters and the shapes of its operands are read.

    >>> import jax, jax.numpy as jnp
    >>> eqn = jax.make_jaxpr(lambda x: x.T)(jnp.ones((2, 3))).eqns[0]
    >>> moved(eqn)
    [Moved(operands=(0,), steps=(Permute(order=(1, 0)),), axis=None)]
    """
    name = eqn.primitive.name
    meaning = row(name)
    if meaning.kind == "identity":
        return [Moved((k,), ()) for k in range(len(eqn.outvars))]
    if meaning.kind != "move":
        return None
    shapes = [tuple(v.aval.shape) for v in eqn.invars]
    return _MOVES[name](eqn, shapes)


def move(eqn: Any, operands: Sequence[Any], *, lead: int = 0) -> list[np.ndarray] | None:
    """The results of an equation that only moves elements, on NumPy arrays of any dtype.

    Args:
      eqn: the equation.
      operands: arrays of the operands' shapes behind `lead` further axes, which stay in front; a
        padding value may have none of them.
      lead: how many there are.

    Returns:
      None if more than moving is done.
    """
    found = moved(eqn)
    if found is None:
        return None
    results = []
    for result in found:
        parts = []
        for k in result.operands:
            x = operands[k]
            for step in result.steps:
                x = step.apply(x, operands[1] if isinstance(step, Pad) else None, lead=lead)
            parts.append(x)
        results.append(
            parts[0] if result.axis is None else np.concatenate(parts, result.axis + lead)
        )
    return results


def taken(eqn: Any, shape: Shape, positions: Sequence[Any]) -> np.ndarray | None:
    """Which elements of its first operand an indexing equation takes, positions being known.

    Args:
      eqn: of a gather or a dynamic slice.
      shape: of its first operand.
      positions: its other operands.

    Returns:
      int64 numbers of elements of the flattened operand, of the result's shape; -1 for what lies
      outside and is filled. None if the equation writes.
    """
    name = eqn.primitive.name
    if name not in ("gather", "dynamic_slice"):
        return None
    numbers = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
    (result,) = compat.evaluate(eqn, [numbers, *positions])
    result = np.asarray(result).astype(np.int64)
    return np.where((result < 0) | (result >= math.prod(shape)), -1, result)


def whole_axes(eqn: Any) -> list[tuple[int, int]]:
    """Axes that are taken whole, of an equation that takes slices at some places.

    Pairs of an axis of the first operand and the axis of the result that it becomes.
    """
    shape, sizes = tuple(eqn.invars[0].aval.shape), eqn.params["slice_sizes"]
    numbers = eqn.params.get("dimension_numbers")
    if numbers is None:
        pairs = [(axis, axis) for axis in range(len(shape))]
    else:
        gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
        window = [axis for axis in range(len(sizes)) if axis not in gone]
        pairs = list(zip(window, sorted(numbers.offset_dims), strict=True))
    return [(a, b) for a, b in pairs if sizes[a] == shape[a]]


def _is(size: Any, n: Any) -> bool:
    # Equal for all values of symbols.
    return bool(compat.at_most(size, n) and compat.at_most(n, size))


def _one(*steps: Step) -> list[Moved]:
    return [Moved((0,), steps)]


def _out(eqn: Any) -> Shape:
    return tuple(eqn.outvars[0].aval.shape)


def _reshape(eqn: Any, shapes: list[Shape]) -> list[Moved]:
    order = eqn.params.get("dimensions")
    if order is not None:
        return _one(Permute(tuple(order)), Regroup(_out(eqn)))
    return _one(Regroup(_out(eqn)))


def _broadcast_to(eqn: Any, shapes: list[Shape]) -> list[Moved]:
    out = _out(eqn)
    new = len(out) - len(shapes[0])
    return _one(Spread(out, tuple(range(new, len(out)))))


def _rev(eqn: Any, shapes: list[Shape]) -> list[Moved]:
    back = eqn.params["dimensions"]
    bounds = ((0, n, -1 if axis in back else 1) for axis, n in enumerate(shapes[0]))
    return _one(Take(tuple(bounds)))


def _slice(eqn: Any, shapes: list[Shape]) -> list[Moved]:
    p = eqn.params
    steps = p["strides"] or (1,) * len(shapes[0])
    return _one(Take(tuple(zip(p["start_indices"], p["limit_indices"], steps, strict=True))))


def _piece(shape: Shape, axis: int, start: Any, stop: Any) -> Take:
    return Take(tuple((start, stop, 1) if a == axis else (0, n, 1) for a, n in enumerate(shape)))


def _split(eqn: Any, shapes: list[Shape]) -> list[Moved]:
    axis, start, found = eqn.params["axis"], 0, []
    for n in eqn.params["sizes"]:
        n = int(n) if isinstance(n, np.integer) else n
        found.append(Moved((0,), (_piece(shapes[0], axis, start, start + n),)))
        start = start + n
    return found


def _unstack(eqn: Any, shapes: list[Shape]) -> list[Moved]:
    axis, out = eqn.params["axis"], _out(eqn)
    pieces = (_piece(shapes[0], axis, k, k + 1) for k in range(len(eqn.outvars)))
    return [Moved((0,), (piece, Regroup(out))) for piece in pieces]


def _concatenate(eqn: Any, shapes: list[Shape]) -> list[Moved]:
    return [Moved(tuple(range(len(shapes))), (), eqn.params["dimension"])]


def _stack(eqn: Any, shapes: list[Shape]) -> list[Moved]:
    axis, one = eqn.params["axis"], list(shapes[0])
    one.insert(axis, 1)
    return [Moved(tuple(range(len(shapes))), (Regroup(tuple(one)),), axis)]


def _tile(eqn: Any, shapes: list[Shape]) -> list[Moved]:
    # [n, m] -> [r, n, s, m] -> [r n, s m]
    times, sizes = eqn.params["reps"], shapes[0]
    both = tuple(n for pair in zip(times, sizes, strict=True) for n in pair)
    return _one(Spread(both, tuple(range(1, len(both), 2))), Regroup(_out(eqn)))


_MOVES: dict[str, Callable[[Any, list[Shape]], list[Moved]]] = {
    "reshape": _reshape,
    **dict.fromkeys(("squeeze", "expand_dims"), lambda eqn, shapes: _one(Regroup(_out(eqn)))),
    "transpose": lambda eqn, shapes: _one(Permute(tuple(eqn.params["permutation"]))),
    "broadcast_in_dim": lambda eqn, shapes: _one(
        Spread(_out(eqn), tuple(eqn.params["broadcast_dimensions"]))
    ),
    "broadcast_to": _broadcast_to,
    "rev": _rev,
    "slice": _slice,
    "pad": lambda eqn, shapes: _one(Pad(tuple(map(tuple, eqn.params["padding_config"])))),
    "concatenate": _concatenate,
    "split": _split,
    "stack": _stack,
    "unstack": _unstack,
    "tile": _tile,
}
