"""The lowering of a flat list of equations to an ONNX graph: what values are while it runs.

Transposes, broadcasts and quantization are lazy. A live value is a tensor of the graph with an
order of its axes, sizes of 1 along axes in which it only repeats, and perhaps a grid: then the
tensor holds codes. So convolutions stay in ONNX's order of axes one after the other, masks stay
small, and views of quantized tensors move codes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxcompress.export.onnx_format.constants.codes import Codes
from jaxcompress.export.onnx_format.constants.stored import Stored, opened
from jaxcompress.export.onnx_format.onnx_graph import Graph
from jaxcompress.export.onnx_format.symbolic_sizes import Dims, is_one
from jaxcompress.graph.equations import Equation

Order = tuple[int, ...]


class Settings(NamedTuple):
    """What the caller chose."""

    dynamic: bool  # activations of products become int8 while the network runs
    activations: str  # "uint8" or "int8": how codes of static grids are stored
    standard: bool = False  # no operators of com.microsoft


class LiveGrid(NamedTuple):
    """The grid of a live tensor of codes."""

    scale: np.float32
    zero: int
    dtype: str


class Tensor(NamedTuple):
    """A live value.

    Attributes:
      name: of the tensor in the graph.
      order: axis k of the tensor is the axis order[k] of the value.
      shape: of the tensor; 1 along an axis where the value has more says that it repeats.
      grid: of codes, None if the tensor holds the numbers themselves.
    """

    name: str
    order: Order
    shape: tuple[Any, ...]
    grid: LiveGrid | None = None


class Lowering:
    """What rules work with.

    Attributes:
      graph: to emit nodes into.
      dims: sizes as tensors.
      avals: shape and dtype of every value.
      uses: how often each is read.
      biased: value -> bias [channels] -> (the same plus a bias along one axis), where that is one
        operation; with the axis.
      clamped: value -> (value, low, high) that it is clamped from.
      sums: value that is a sum -> how many numbers are in it, and what emits their mean.
    """

    def __init__(
        self,
        graph: Graph,
        dims: Dims,
        avals: Mapping[int, Any],
        known: Mapping[int, Any],
        uses: Mapping[int, int],
        settings: Settings,
    ):
        self.graph, self.dims, self.avals, self.uses = graph, dims, avals, uses
        self.settings = settings
        self.biased: dict[int, tuple[int, Callable[[np.ndarray], Tensor | None]]] = {}
        self.clamped: dict[int, tuple[Any, ...]] = {}
        self.sums: dict[int, tuple[int, Callable[[], Tensor]]] = {}
        self._known = known
        self._tensors: dict[int, Tensor] = {}

    def shape(self, number: int) -> tuple[Any, ...]:
        """Sizes of a value."""
        return tuple(self.avals[number].shape)

    def known(self, number: int) -> Any:
        """`Codes`, `Stored` or a NumPy array where the value is known in advance, else None."""
        return self._known.get(number)

    def array(self, number: int) -> np.ndarray | None:
        """The known value as an array, else None."""
        known = self.known(number)
        if known is None:
            return None
        if isinstance(known, Codes):
            return known.unpacked("an operation needs its numbers")
        if isinstance(known, Stored):
            return opened(known.numbers, known.leaves, "an operation needs its numbers")
        return np.asanyarray(known)

    def _made(self, number: int) -> Tensor | None:
        # The tensor of a constant that stays packed in the file: what operations make of it.
        known = self.known(number)
        if number not in self._tensors and isinstance(known, Codes):
            self.put(number, known.emit(self.graph))
        elif number not in self._tensors and isinstance(known, Stored):
            name = known.make(self)
            if name is not None:
                self.put(number, name)
        elif not isinstance(known, Codes | Stored):
            return None
        return self._tensors[number]

    def live(self, number: int) -> Tensor:
        """The tensor of a value that is not known."""
        return self._tensors[number]

    def put(
        self,
        number: int,
        name: str,
        *,
        order: Order | None = None,
        shape: Sequence[Any] | None = None,
        grid: LiveGrid | None = None,
    ) -> None:
        """Says which tensor a value is; default: all of it, its axes in their own order."""
        sizes = self.shape(number)
        order = order or tuple(range(len(sizes)))
        full = tuple(sizes[axis] for axis in order)
        self._tensors[number] = Tensor(name, order, tuple(shape or full) if sizes else (), grid)

    def alias(self, number: int, source: int) -> None:
        """Says that a value is another one."""
        if self.known(source) is not None:
            self.put(number, self.name(source))
        else:
            self._tensors[number] = self._tensors[source]

    def emit(self, op: str, inputs: Sequence[str], **attributes: Any) -> Any:
        """A node; see `Graph.emit`."""
        return self.graph.emit(op, inputs, **attributes)

    def ints(self, values: Sequence[int]) -> str:
        """A constant int64 [n]."""
        return self.graph.constant(np.asarray(values, np.int64))

    def floats(self, tensor: Tensor) -> Tensor:
        """The numbers of a tensor of codes."""
        if tensor.grid is None:
            return tensor
        scale, zero = self.grid_constants(tensor.grid)
        name = self.emit("DequantizeLinear", [tensor.name, scale, zero])
        return tensor._replace(name=name, grid=None)

    def grid_constants(self, grid: LiveGrid) -> tuple[str, str]:
        """Scale and zero point, of no axes: others keep products of integers from forming.

        Every grid has a zero point of its own: OpenVINO moves that of an input behind a mean, and
        would take away one that the grid on the other side shares.
        """
        scale = self.graph.constant(np.asarray(grid.scale, np.float32))
        return scale, self.graph.constant(np.asarray(grid.zero, grid.dtype), of=scale)

    def ordered(self, tensor: Tensor, order: Order) -> Tensor:
        """The same with its axes in another order."""
        if tensor.order == order:
            return tensor
        perm = [tensor.order.index(axis) for axis in order]
        shape = tuple(tensor.shape[k] for k in perm)
        moving = [k for k in perm if not is_one(tensor.shape[k])]
        if moving == sorted(moving) and any(map(is_one, tensor.shape)):
            name = self.dims.reshape(tensor.name, tensor.shape, shape)
        else:
            name = self.emit("Transpose", [tensor.name], perm=tuple(perm))
        return tensor._replace(name=name, order=order, shape=shape)

    def tensor(
        self, number: int, *, order: Order | None = None, loose: bool = False, codes: bool = False
    ) -> Tensor:
        """A value as a tensor, constants included.

        Args:
          number: of the value.
          order: of its axes, default their own.
          loose: whether axes in which it repeats may have the size 1.
          codes: whether it may be codes, where it is.
        """
        order = order if order is not None else tuple(range(len(self.shape(number))))
        found = self._made(number)
        array = self.array(number) if found is None else None
        if array is not None:
            array = array.transpose(order)
            array = compressed(array) if loose else array
            return Tensor(self.graph.constant(array), order, array.shape)
        found = self.live(number) if found is None else found
        found = self.ordered(found, order)  # codes are moved, where there are
        found = found if codes else self.floats(found)
        return found if loose else self.full(found, self.shape(number))

    def full(self, tensor: Tensor, sizes: Sequence[Any]) -> Tensor:
        """The same, a value of these sizes, with nothing left to repeat."""
        full = tuple(sizes[axis] for axis in tensor.order)
        if full == tensor.shape:
            return tensor
        name = self.emit("Expand", [tensor.name, self.dims.vector(full)])
        return tensor._replace(name=name, shape=full)

    def name(self, number: int, *, order: Order | None = None) -> str:
        """The tensor of a value, all of it, its axes in the given order."""
        return self.tensor(number, order=order).name

    def common_order(self, numbers: Sequence[int]) -> Order:
        """The order in which values are computed together: that of the largest live one."""
        best, most = tuple(range(len(self.shape(numbers[0])))), -1
        rank = max(len(self.shape(number)) for number in numbers)
        for number in numbers:
            if self.known(number) is None and len(self.shape(number)) == rank:
                tensor = self.live(number)
                count = sum(not is_one(n) for n in tensor.shape)
                if count > most:
                    best, most = tensor.order, count
        return best

    def refuse(self, e: Equation, why: str) -> ValueError:
        """The error for an operation that cannot be lowered."""
        return refusal(e, why)


def refusal(e: Equation, why: str) -> ValueError:
    """The error for an operation that cannot be lowered: its name, scope and shapes."""
    results = ", ".join(v.aval.str_short() for v in e.eqn.outvars)
    operands = ", ".join(v.aval.str_short() for v in e.eqn.invars)
    return ValueError(f"export.onnx: {e.where}, ({operands}) -> {results}: {why}")


def compressed(array: np.ndarray) -> np.ndarray:
    """The array with size 1 along every axis in which nothing changes."""
    for axis in range(array.ndim):
        first = array.take([0], axis) if array.shape[axis] > 1 else array
        if array.shape[axis] > 1 and np.array_equal(array, np.broadcast_to(first, array.shape)):
            array = first
    return array


def joined(shapes: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    """The shape of tensors that are broadcast together; those of no axes do not count."""
    shapes = [shape for shape in shapes if shape]
    if not shapes:
        return ()
    return tuple(
        next((n for n in sizes if not is_one(n)), sizes[0]) for sizes in zip(*shapes, strict=True)
    )
