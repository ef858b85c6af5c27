"""Sizes that are known only when the network runs, as tensors of an ONNX graph."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxcompress.export.onnx_format.onnx_graph import Graph
from jaxcompress.graph import compat


def is_static(shape: Sequence[Any]) -> bool:
    """Whether all sizes are numbers."""
    return all(isinstance(n, int | np.integer) for n in shape)


def is_one(size: Any) -> bool:
    """Whether a size is the number 1."""
    return isinstance(size, int | np.integer) and size == 1


class Dims:
    """Named dimensions, read from the shapes of the inputs.

    Args:
      graph: where the nodes go.
      symbols: name of a dimension -> (input, axis) where it can be read.
    """

    def __init__(self, graph: Graph, symbols: Mapping[str, tuple[str, int]]):
        self._graph, self._symbols = graph, symbols

    def one(self, size: Any) -> str:
        """A size as int64 [1]."""
        if isinstance(size, int | np.integer):
            return self._graph.constant(np.array([size], np.int64))
        values = {name: _Size(self._graph, self._symbol(name)) for name in self._symbols}
        for name in re.findall(r"[A-Za-z_]\w*", str(size)):
            if name not in (*values, "floordiv", "mod"):
                raise ValueError(
                    f"export.onnx: {name!r} is no size of an input by itself, so that {size} is "
                    "not known while the network runs; name the sizes themselves in `shapes`"
                )
        found = compat.dimension(size, values)
        return found.name if isinstance(found, _Size) else self.one(int(found))

    def _symbol(self, name: str) -> str:
        source, axis = self._symbols[name]
        return self._graph.emit("Shape", [source], start=axis, end=axis + 1)

    def vector(self, shape: Sequence[Any]) -> str:
        """A shape as int64 [rank]."""
        if is_static(shape):
            return self._graph.constant(np.asarray(shape, np.int64).reshape(-1))
        return self._graph.emit("Concat", [self.one(n) for n in shape], axis=0)

    def reshape(self, name: str, old: Sequence[Any], new: Sequence[Any]) -> str:
        """A tensor in another shape; one size may be left for the runtime to find."""
        if tuple(old) == tuple(new):
            return name
        sizes: list[Any] = []
        for axis, n in enumerate(new):
            same = axis < len(old) and n == old[axis]
            sizes.append(n if isinstance(n, int | np.integer) else 0 if same else n)
        open_axes = [axis for axis, n in enumerate(sizes) if not isinstance(n, int | np.integer)]
        if len(open_axes) == 1:
            sizes[open_axes[0]] = -1
        zeros = [n for n in new if isinstance(n, int | np.integer) and n == 0]
        target = self.vector(sizes if not zeros else new)
        allow = 1 if zeros else None
        return self._graph.emit("Reshape", [name, target], allowzero=allow)


class _Size:
    """Arithmetic of sizes becomes nodes."""

    def __init__(self, graph: Graph, name: str):
        self._graph, self.name = graph, name

    def _with(self, op: str, other: Any, *, swapped: bool = False) -> "_Size":
        if not isinstance(other, _Size):
            other = _Size(self._graph, self._graph.constant(np.array([int(other)], np.int64)))
        names = [other.name, self.name] if swapped else [self.name, other.name]
        return _Size(self._graph, self._graph.emit(op, names))

    def __add__(self, other: Any) -> "_Size":
        return self._with("Add", other)

    def __mul__(self, other: Any) -> "_Size":
        return self._with("Mul", other)

    def __sub__(self, other: Any) -> "_Size":
        return self._with("Sub", other)

    def __rsub__(self, other: Any) -> "_Size":
        return self._with("Sub", other, swapped=True)

    def __floordiv__(self, other: Any) -> "_Size":
        # Sizes are not negative, so that the quotient of integers is its floor.
        return self._with("Div", other)

    def __mod__(self, other: Any) -> "_Size":
        return self._with("Mod", other)

    def __divmod__(self, other: Any) -> "tuple[_Size, _Size]":
        return self // other, self % other

    def __pow__(self, power: int) -> "_Size":
        result = self
        for _ in range(power - 1):
            result = result * self
        return result

    def __neg__(self) -> "_Size":
        return self * -1

    __radd__, __rmul__ = __add__, __mul__
