"""Constants that stay codes: integers, scales and zero points that follow views of the weight."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxcompress.core.packed import Masked, QTensor, dense, is_packed, unsigned_codes
from jaxcompress.core.pytrees import is_nibbles, stored_bits
from jaxcompress.export.onnx_format.constants.stored import blockwise, indices, of_packed, opened
from jaxcompress.export.onnx_format.onnx_graph import Graph
from jaxcompress.formats.integers import Integer
from jaxcompress.graph.primitives.movement import Pad, Permute, Step, Take


class Codes(NamedTuple):
    """A constant x = scale * (code - zero), in blocks.

    Attributes:
      codes: int8 [...].
      scale: float32, of the rank of `codes`: along an axis of size n as many as there are blocks.
      zero: int32 of the same shape.
      bits: at most 8: codes lie in [-2**(bits - 1), 2**(bits - 1)).
      block: along each axis, elements of a block; the last one may have fewer.
      leaves: paths of the packed leaves that hold them.
      dtype: of x; integers below a byte are floats in the file, which has none to compute with.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    bits: int
    block: tuple[int, ...]
    leaves: frozenset[str] = frozenset()
    dtype: Any = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return self.codes.shape

    @property
    def symmetric(self) -> bool:
        """Whether all zero points are 0."""
        return not self.zero.any()

    def blocks(self, axis: int) -> int:
        """Along an axis: how many scales there are."""
        return self.scale.shape[axis]

    def ragged(self, axis: int) -> bool:
        """Along an axis: whether the last of several blocks is shorter."""
        return self.blocks(axis) > 1 and self.shape[axis] % self.block[axis] != 0

    def expanded(self) -> tuple[np.ndarray, np.ndarray]:
        """Scales and zero points that broadcast against the array."""
        found = self
        for axis in range(len(self.shape)):
            found = found.opened(axis) if found.blocks(axis) > 1 else found
        return found.scale, found.zero

    def array(self) -> np.ndarray:
        """The numbers: as `jc.unpack` gives them."""
        scale, zero = self.expanded()
        return ((self.codes - zero).astype(np.float32) * scale).astype(self.dtype)

    def unpacked(self, why: str) -> np.ndarray:
        """The same as an array that remembers its leaf, and why it is packed no more."""
        return opened(self.array(), self.leaves, why)

    def emit(self, graph: Graph) -> str:
        """The tensor of the numbers, made by operations of the file that hold for any blocks."""
        half = 2 ** (self.bits - 1)
        if self.bits > 4:
            name = graph.emit("Cast", [graph.constant(self.codes, leaves=self.leaves)], to=1)
            offset = self.zero
        else:
            unsigned = (self.codes.astype(np.int32) + half).astype(np.uint8)
            name = indices(graph, unsigned, self.bits, self.leaves)
            name, offset = graph.emit("Cast", [name], to=1), self.zero + half
        where = (self.scale.shape, self.block, self.shape)
        if offset.any():
            same = offset.min() == offset.max()
            numbers = offset.reshape(-1)[:1].reshape(()) if same else offset
            kept = graph.constant(
                numbers.astype(np.uint8 if numbers.min() >= 0 else np.int8), leaves=self.leaves
            )
            zero = graph.emit("Cast", [kept], to=1)
            name = graph.emit("Sub", [name, zero if same else blockwise(graph, zero, *where)])
        scale = graph.constant(self.scale, leaves=self.leaves)
        return graph.emit("Mul", [name, blockwise(graph, scale, *where)])

    def opened(self, axis: int) -> "Codes":
        """With a scale for every index of an axis."""
        n, size = self.shape[axis], self.block[axis]
        index = [slice(None)] * axis + [slice(0, n)]
        spread = lambda a: np.repeat(a, size, axis=axis)[tuple(index)]
        block = (*self.block[:axis], 1, *self.block[axis + 1 :])
        return self._replace(scale=spread(self.scale), zero=spread(self.zero), block=block)

    def transposed(self, order: tuple[int, ...]) -> "Codes":
        """With the axes in another order."""
        return self._replace(
            codes=np.ascontiguousarray(self.codes.transpose(order)),
            scale=self.scale.transpose(order),
            zero=self.zero.transpose(order),
            block=tuple(self.block[axis] for axis in order),
        )

    def stepped(self, step: Step) -> "Codes | None":
        """After a step that moves elements, None where codes would not follow."""
        if isinstance(step, Permute):
            return self.transposed(step.order)
        if isinstance(step, Take):
            return self.sliced(step.slices)
        if isinstance(step, Pad) or math.prod(step.sizes) != self.codes.size:
            return None
        return self.reshaped(step.sizes)

    def reshaped(self, shape: tuple[int, ...]) -> "Codes | None":
        """In another shape, None where the blocks would not follow an axis of it.

        Blocks are cut where that helps, as long as scales take fewer bytes than codes: heads that
        share the scales of their columns have one for each of their columns then.
        """
        shape = self.codes.reshape(shape).shape
        coarse = [a for a, n in enumerate(self.shape) if self.blocks(a) < n]
        choices = (c for k in range(len(coarse) + 1) for c in itertools.combinations(coarse, k))
        for choice in sorted(choices, key=lambda c: math.prod(self.shape[a] for a in c)):
            found = self
            for axis in choice:
                found = found.opened(axis)
            if choice and 4 * found.scale.size > max(4 * self.scale.size, self.codes.size // 2):
                continue
            moved = _moved_scales(found, shape)
            if moved is not None:
                return found._replace(
                    codes=self.codes.reshape(shape),
                    scale=found.scale.reshape(moved[0]),
                    zero=found.zero.reshape(moved[0]),
                    block=moved[1],
                )
        return None

    def sliced(self, bounds: tuple[slice, ...]) -> "Codes | None":
        """A slice, None where it would cut blocks or begin with a shorter one."""
        few = []
        for axis, bound in enumerate(bounds):
            n, size = self.shape[axis], self.block[axis]
            start, stop, step = bound.indices(n)
            if self.blocks(axis) == 1 or size == 1:
                few.append(bound if size == 1 else slice(None))
            elif step == -1 and not self.ragged(axis):
                few.append(bound)
            elif step == 1 and start % size == 0 and (stop % size == 0 or stop == n):
                few.append(slice(start // size, -(-stop // size)))
            else:
                return None
        cut = tuple(few)
        codes, scale = self.codes[bounds], self.scale[cut]
        sizes = zip(self.block, codes.shape, scale.shape, strict=True)
        block = tuple(max(n, 1) if s == 1 else b for b, n, s in sizes)
        return self._replace(codes=codes, scale=scale, zero=self.zero[cut], block=block)


def joined(parts: Sequence[Codes], axis: int) -> Codes | None:
    """One behind the other along an axis, None where that takes scales that cost too much.

    Blocks of other sizes are cut, as in `Codes.reshaped`.
    """
    first, bytes_ = parts[0], sum(4 * part.scale.size for part in parts)
    if len({(part.bits, part.dtype) for part in parts}) > 1:
        return None
    for a in range(len(first.shape)):
        fit = len({part.block[a] for part in parts}) == 1
        if a == axis:
            fit = fit and not any(part.shape[a] % part.block[a] for part in parts[:-1])
        parts = parts if fit else [part.opened(a) for part in parts]
    scale = np.concatenate([part.scale for part in parts], axis)
    codes = np.concatenate([part.codes for part in parts], axis)
    if 4 * scale.size > max(bytes_, codes.size // 2):
        return None
    return parts[0]._replace(
        codes=codes,
        scale=scale,
        zero=np.concatenate([part.zero for part in parts], axis),
        leaves=frozenset().union(*(part.leaves for part in parts)),
    )


def _moved_scales(
    codes: Codes, new: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    # Shape of the scales and sizes of the blocks in another shape of the array. Runs of axes of
    # equal products belong together; a run has scales in one or in all elements, or is a single
    # axis that stays.
    old, scales = codes.shape, codes.scale.shape
    result: list[int] = []
    block: list[int] = []
    i, j = 0, 0
    while i < len(old) or j < len(new):
        first, start = i, j
        left, right = math.prod(old[i : i + 1]), math.prod(new[j : j + 1])
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while left != right:
            if left < right:
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        sizes, few, wanted = old[first:i], scales[first:i], new[start:j]
        count = math.prod(few)
        large = [n for n in wanted if n > 1]
        spread = [a for a in range(first, i) if old[a] > 1]
        if count == 1:
            result += [1] * len(wanted)
            block += wanted
        elif count == math.prod(sizes):
            result += wanted
            block += [1] * len(wanted)
        elif large == [old[a] for a in spread]:
            rest = [(scales[a], codes.block[a]) for a in spread]
            moved = [rest.pop(0) if n > 1 else (1, 1) for n in wanted]
            result += [s for s, _ in moved]
            block += [b for _, b in moved]
        elif len(large) == 1 and _leading(sizes, few) and not any(map(codes.ragged, spread)):
            result += [count if n > 1 else 1 for n in wanted]
            block += [n // count if n > 1 else 1 for n in wanted]
        else:
            return None
    return tuple(result), tuple(block)


def _leading(sizes: tuple[int, ...], scales: tuple[int, ...]) -> bool:
    # Whether blocks stay blocks when the axes become one: full, ..., full, any, 1, ..., 1.
    kinds = [(n != s) for n, s in zip(sizes, scales, strict=True)]
    first = kinds.index(True) if True in kinds else len(kinds)
    return all(s == 1 for s in scales[first + 1 :])


def of_leaf(leaf: Any, path: str = "") -> Any:
    """What a leaf of the params is in the file: `Codes`, `Stored`, or the array itself.

    Integers in blocks along their axes are `Codes`, and arrays of `int4` and the like; other packed
    leaves, and arrays of 8 or 16 bits, are `Stored`: their numbers are computed in the file from
    what is kept.
    """
    form = dense(leaf) if isinstance(leaf, Masked) else leaf
    if isinstance(form, QTensor) and isinstance(form.format, Integer) and form.format.bits <= 8:
        layout = _blocks(form)
        if layout is not None and form.dtype == "float32":
            return _of_integers(form, *layout)._replace(leaves=frozenset({path}))
    if not is_packed(leaf) and is_nibbles(leaf.dtype) and leaf.size:
        return _of_nibbles(np.asarray(leaf), path)
    return of_packed(leaf, path)


def _of_nibbles(array: np.ndarray, path: str) -> Codes:
    # Integers of less than a byte, as they are: the scale is 1.
    bits, dtype = stored_bits(array.dtype), array.dtype
    zero = 0 if np.int8(-1).astype(dtype) < 0 else -(2 ** (bits - 1))
    one = (1,) * array.ndim
    codes, zeros = array.astype(np.int8) + np.int8(zero), np.full(one, zero, np.int32)
    scale, leaves = np.ones(one, np.float32), frozenset({path})
    return Codes(codes, scale, zeros, bits, array.shape, leaves, dtype)


def _of_integers(leaf: QTensor, order: tuple[int, ...], shape: Any, block: Any) -> Codes:
    # `order`, `shape`: how the scales are reshaped, then transposed, to one number a block.
    bits = int(leaf.format.bits)
    codes = np.asarray(unsigned_codes(leaf)).astype(np.int32)
    place = lambda a, dtype: np.asarray(a, dtype).reshape(shape).transpose(order)
    scale, half = place(leaf.qparams.scale, np.float32), 2 ** (bits - 1)
    if leaf.format.symmetric:
        codes, zero = (codes ^ half) - half, np.zeros(scale.shape, np.int32)
    else:
        codes, zero = codes - half, place(leaf.qparams.zero_point, np.int32) - half
    return Codes(codes.astype(np.int8), scale, zero, bits, block)


def _blocks(leaf: QTensor) -> tuple[Any, Any, tuple[int, ...]] | None:
    # How scales become one number a block, along each axis of the array; and the blocks' sizes.
    where, shape = leaf.granularity, leaf.shape
    scales = where.scale_shape(shape)
    identity = tuple(range(len(shape)))
    if where.plain:
        sizes = tuple(1 if s > 1 else n for s, n in zip(scales, shape, strict=True))
        return identity, scales, sizes
    if where.block is not None:
        lead = 2 * len(shape) - len(scales)
        counts = (*scales[:lead], *scales[lead::2])
        tiles = where.block[-len(shape) :] if shape else ()
        sizes = (*[1] * lead, *(min(b, n) for b, n in zip(tiles, shape[lead:], strict=True)))
        return identity, counts, sizes
    channels = where.channels(shape)
    rest = [axis for axis in identity if axis not in channels]
    assert where.group is not None
    group = where.group
    if not rest:
        return None
    # Groups run along the last of the other axes, or hold all of several of them.
    along, sizes = rest[-1], [1] * len(shape)
    for axis in reversed(rest):
        n = shape[axis]
        sizes[axis], along = min(group, n), axis
        if group < n:
            break
        if group % n:
            return None
        group //= n
    outer = rest[: rest.index(along)]
    if outer and shape[along] % sizes[along]:
        return None
    contiguous = rest == list(range(rest[0], rest[-1] + 1))
    stored = list(identity) if contiguous else [*channels, *rest]
    counts = [-(-shape[a] // sizes[a]) for a in stored]
    return tuple(stored.index(a) for a in identity), tuple(counts), tuple(sizes)


def of_mark(array: np.ndarray, attributes: dict[str, Any]) -> Codes:
    """`Codes` of a constant that is marked: what the mark's own rounding gives."""
    scale, zero = attributes["scale"], attributes["zero_point"]
    axis = attributes.get("quantization_dimension")
    shape = [1] * array.ndim
    if axis is not None:
        shape[axis] = scale.size
    step = np.asarray(scale, np.float32).reshape(shape)
    offset = np.asarray(zero, np.int32).reshape(shape)
    bits = int(attributes["dtype"][1:])
    lowest = -(2 ** (bits - 1)) + int(attributes["narrow_range"])
    codes = np.rint(array.astype(np.float64) / step) + offset
    codes = np.clip(codes, lowest, 2 ** (bits - 1) - 1)
    block = tuple(1 if k == axis else n for k, n in enumerate(array.shape))
    return Codes(codes.astype(np.int8), step, offset, bits, block)
