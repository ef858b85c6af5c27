"""Constants that stay codes: integers, scales and zero points that follow views of the weight."""

import math
from typing import Any, NamedTuple

import numpy as np

from jaxcompress.core.packed import Masked, QTensor, dense, unpack
from jaxcompress.formats import unpack_bits
from jaxcompress.formats.bits import lanes
from jaxcompress.formats.integer import Integer


class Codes(NamedTuple):
    """A constant x = scale * (code - zero), in blocks.

    Attributes:
      codes: int8 [...].
      scale: float32, of the rank of `codes`; along each axis of size n it has 1, n, or a divisor
        of n: so many blocks.
      zero: int32 of the same shape.
      bits: at most 8: codes lie in [-2**(bits - 1), 2**(bits - 1)).
    """

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    bits: int

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

    def array(self) -> np.ndarray:
        """The numbers, float32: as `jc.unpack` gives them."""
        scale, zero = (expanded(a, self.shape) for a in (self.scale, self.zero))
        return (self.codes - zero).astype(np.float32) * scale

    def transposed(self, order: tuple[int, ...]) -> "Codes":
        """With the axes in another order."""
        return self._replace(
            codes=np.ascontiguousarray(self.codes.transpose(order)),
            scale=self.scale.transpose(order),
            zero=self.zero.transpose(order),
        )

    def flipped(self, axes: tuple[int, ...]) -> "Codes":
        """Reversed along axes."""
        flip = lambda a: np.flip(a, axes)
        return self._replace(codes=flip(self.codes), scale=flip(self.scale), zero=flip(self.zero))

    def reshaped(self, shape: tuple[int, ...]) -> "Codes | None":
        """In another shape, None where the blocks would not follow an axis of it."""
        moved = _scale_shape(self.shape, self.scale.shape, shape)
        if moved is None:
            return None
        return self._replace(
            codes=self.codes.reshape(shape),
            scale=self.scale.reshape(moved),
            zero=self.zero.reshape(moved),
        )

    def sliced(self, bounds: tuple[slice, ...]) -> "Codes | None":
        """A slice, None where it would cut blocks."""
        few = []
        for axis, bound in enumerate(bounds):
            n, blocks = self.shape[axis], self.blocks(axis)
            whole = len(range(*bound.indices(n))) == n and (bound.step or 1) == 1
            if blocks not in (1, n) and not whole:
                return None
            few.append(bound if blocks == n else slice(None))
        cut = tuple(few)
        return self._replace(codes=self.codes[bounds], scale=self.scale[cut], zero=self.zero[cut])


def expanded(a: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers per block, repeated so that they broadcast against the array."""
    for axis, n in enumerate(shape):
        if a.shape[axis] not in (1, n):
            a = np.repeat(a, n // a.shape[axis], axis=axis)
    return a


def _scale_shape(
    old: tuple[int, ...], scales: tuple[int, ...], new: tuple[int, ...]
) -> tuple[int, ...] | None:
    # Runs of axes of equal products belong together; a run has scales in one or in all elements,
    # or is a single axis that stays.
    result, i, j = [], 0, 0
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
        if count == 1:
            result += [1] * len(wanted)
        elif count == math.prod(sizes):
            result += wanted
        elif len([n for n in wanted if n > 1]) == 1 and _leading(sizes, few):
            result += [count if n > 1 else 1 for n in wanted]
        else:
            large = [n for n in wanted if n > 1]
            spread = [(n, s) for n, s in zip(sizes, few, strict=True) if n > 1]
            if large != [n for n, _ in spread]:
                return None
            rest = [s for _, s in spread]
            result += [rest.pop(0) if n > 1 else 1 for n in wanted]
    return tuple(result)


def _leading(sizes: tuple[int, ...], scales: tuple[int, ...]) -> bool:
    # Whether blocks stay blocks when the axes become one: full, ..., full, any, 1, ..., 1.
    kinds = [(n != s) for n, s in zip(sizes, scales, strict=True)]
    first = kinds.index(True) if True in kinds else len(kinds)
    return all(s == 1 for s in scales[first + 1 :])


def of_leaf(leaf: Any) -> Any:
    """`Codes` of a packed leaf if it holds integers in blocks along its axes, else its array.

    Zeros of a sparse leaf are stored; codebooks, floats and blocks that do not divide give arrays.
    """
    if isinstance(leaf, Masked):
        leaf = dense(leaf)
    if not isinstance(leaf, QTensor):
        return leaf
    scales = _block_shape(leaf)
    if scales is None or leaf.dtype != "float32" or not isinstance(leaf.format, Integer):
        return unpack(leaf)
    bits, order, shape = leaf.format.bits, *scales
    rows = leaf.shape if leaf.shape and leaf.shape[-1] % lanes(bits) == 0 else (leaf.size,)
    codes = np.asarray(unpack_bits(leaf.codes, bits, rows[-1])).reshape(leaf.shape)
    codes = codes.astype(np.int32)
    scale = np.asarray(leaf.qparams.scale, np.float32).reshape(shape).transpose(order)
    half = 2 ** (bits - 1)
    if leaf.format.symmetric:
        codes, zero = (codes ^ half) - half, np.zeros(scale.shape, np.int32)
    else:
        codes = codes - half
        zero = np.asarray(leaf.qparams.zero_point, np.int32).reshape(shape).transpose(order) - half
    return Codes(codes.astype(np.int8), scale, zero, bits)


def _block_shape(leaf: QTensor) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    # (order, shape): how the scales are reshaped, then transposed, to one number of blocks an axis.
    where, shape = leaf.granularity, leaf.shape
    scales = where.scale_shape(shape)
    identity = tuple(range(len(shape)))
    if where.plain:
        return identity, scales
    if where.block is not None:
        lead = 2 * len(shape) - len(scales)
        counts = (*scales[:lead], *scales[lead::2])
        fits = all(n % c == 0 for n, c in zip(shape, counts, strict=True))
        last = zip(where.block[::-1], shape[::-1], counts[::-1], strict=False)
        fits &= all(b == n // c for b, n, c in last)
        return (identity, counts) if fits else None
    channels = where.channels(shape)
    rest = [axis for axis in identity if axis not in channels]
    assert where.group is not None
    if not rest or shape[rest[-1]] % where.group:
        return None
    contiguous = rest == list(range(rest[0], rest[-1] + 1))
    stored = list(identity) if contiguous else [*channels, *rest]
    sizes = {a: shape[a] for a in identity} | {rest[-1]: shape[rest[-1]] // where.group}
    return tuple(stored.index(a) for a in identity), tuple(sizes[a] for a in stored)


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
    return Codes(codes.astype(np.int8), step, offset, bits)
