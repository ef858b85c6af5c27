"""What is pruned as one: weights, groups of N:M, blocks, channels, heads.

A structure turns the scores of a leaf into scores of its units, which a scope selects among, and
the mask of units back into a mask of weights. So "the share of zeros" of a structure is the share
of its units, exactly; that of the weights is the same where all units are of one size.

NaN scores count as -inf, as in `core.numerics.top_k`, and make a unit that holds one go first.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


class Structure(Protocol):
    """How the weights of a leaf are tied together; hashable and immutable."""

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError if a leaf of this shape has no such units."""
        ...

    def pool(self, scores: Array) -> Array:
        """Scores of the units: the mean over the weights that go with a unit."""
        ...

    def expand(self, units: Array, scores: Array) -> Array:
        """The mask of the weights, of the shape of `scores`, from the mask of the units."""
        ...

    def weights(self, shape: tuple[int, ...]) -> np.ndarray:
        """How many weights go with each unit; int, broadcastable to the units' shape."""
        ...


@dataclass(frozen=True)
class Unstructured:
    """Every weight for itself."""

    def check(self, shape: tuple[int, ...]) -> None:
        del shape

    def pool(self, scores: Array) -> Array:
        return scores

    def expand(self, units: Array, scores: Array) -> Array:
        del scores
        return units

    def weights(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.ones([1] * len(shape), np.int64)


@dataclass(frozen=True)
class Block:
    """The structure of `block`."""

    shape: tuple[int, ...]

    def check(self, shape: tuple[int, ...]) -> None:
        if len(shape) < len(self.shape):
            raise ValueError(f"block{self.shape} needs {len(self.shape)} axes, got shape {shape}")

    def pool(self, scores: Array) -> Array:
        sums = scores.astype(jnp.float32)
        for axis, size in self._axes(scores.shape):
            blocks = divided(padded(sums, size, axis, jnp.float32(0)), size, axis)
            sums = jnp.sum(blocks, axis=axis + 1)
        # The mean over the weights that an edge block has, not over those it would have.
        return sums / self.weights(scores.shape).astype(np.float32)

    def expand(self, units: Array, scores: Array) -> Array:
        mask = units
        for axis, size in self._axes(scores.shape):
            wide = jnp.broadcast_to(
                jnp.expand_dims(mask, axis + 1),
                (*mask.shape[: axis + 1], size, *mask.shape[axis + 1 :]),
            )
            mask = first(merged(wide, axis), scores.shape[axis], axis)
        return mask

    def weights(self, shape: tuple[int, ...]) -> np.ndarray:
        counts = np.ones([1] * len(shape), np.int64)
        for axis, size in self._axes(shape):
            sizes = np.minimum(shape[axis] - np.arange(0, shape[axis], size), size)
            counts = counts * np.expand_dims(sizes, [a for a in range(len(shape)) if a != axis])
        return counts

    def _axes(self, shape: tuple[int, ...]) -> list[tuple[int, int]]:
        first = len(shape) - len(self.shape)
        return [(first + i, size) for i, size in enumerate(self.shape) if size > 1]


@dataclass(frozen=True)
class Head:
    """The structure of `head`, and with as many heads as the axis is long (0) of `channel`."""

    heads: int
    axis: int

    def check(self, shape: tuple[int, ...]) -> None:
        check_axis("head" if self.heads else "channel", self.axis, shape)
        if self.heads and shape[self.axis] % self.heads:
            raise ValueError(
                f"an axis of {shape[self.axis]} (axis {self.axis} of {shape}) does not divide into "
                f"{self.heads} heads"
            )

    def pool(self, scores: Array) -> Array:
        axis, shape = self.axis % scores.ndim, scores.shape
        size, count = self._size(shape), self.heads or shape[axis]
        heads = scores.astype(jnp.float32).reshape(*shape[:axis], count, size, *shape[axis + 1 :])
        others = tuple(a for a in range(heads.ndim) if a != axis)
        return jnp.sum(heads, axis=others) / np.float32(max(self._each(shape), 1))

    def expand(self, units: Array, scores: Array) -> Array:
        axis = self.axis % scores.ndim
        wide = jnp.repeat(units, self._size(scores.shape), total_repeat_length=scores.shape[axis])
        wide = jnp.expand_dims(wide, [a for a in range(scores.ndim) if a != axis])
        return jnp.broadcast_to(wide, scores.shape)

    def weights(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.full([1], self._each(shape), np.int64)

    def _size(self, shape: tuple[int, ...]) -> int:
        return shape[self.axis] // self.heads if self.heads else 1

    def _each(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) // max(self.heads or shape[self.axis], 1)


def unstructured() -> Unstructured:
    """Every weight is a unit."""
    return Unstructured()


UNSTRUCTURED = Unstructured()


def block(shape: tuple[int, ...]) -> Block:
    """Blocks of the last axes of a leaf, (16, 16) say, stay or go as one.

    Axes before them have blocks of 1. Blocks at an edge are as large as what is left; their score
    is the mean over that.

    Raises:
      ValueError: a size below 1; (at init) a leaf with fewer axes.

    >>> block((2, 2)).pool(jnp.arange(6.0).reshape(2, 3)).tolist()
    [[2.0, 3.5]]
    """
    if not shape or min(shape) < 1:
        raise ValueError(f"block needs sizes of at least 1, got {shape}")
    return Block(tuple(shape))


def channel(axis: int = -1) -> Head:
    """All weights with one index along an axis: -1 for the outputs of a Flax kernel, -2 the inputs.

    This masks a leaf and knows nothing of its bias or of the layers after it.

    Raises:
      ValueError: (at init) a leaf without the axis.

    >>> channel(-1).pool(jnp.array([[1.0, 4.0], [3.0, 4.0]])).tolist()
    [2.0, 4.0]
    """
    return Head(0, axis)


def head(heads: int, *, axis: int = -1) -> Head:
    """Equal, consecutive parts of an axis: the heads of a fused attention kernel.

    Where heads have an axis of their own, as in Linen's attention, they are its `channel`s.

    Raises:
      ValueError: fewer than 1 head; (at init) a leaf without the axis, or one that does not divide.

    >>> head(2).pool(jnp.array([[1.0, 3.0, 5.0, 5.0]])).tolist()
    [2.0, 5.0]
    """
    if heads < 1:
        raise ValueError(f"head needs at least 1 head, got {heads}")
    return Head(heads, axis)


def check_axis(name: str, axis: int, shape: tuple[int, ...]) -> None:
    """Raises TypeError for what is no integer, ValueError if the array has no such axis."""
    if isinstance(axis, bool) or not isinstance(axis, int):
        raise TypeError(f"{name}: axis must be an integer, got {axis!r}")
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"{name}: axis {axis} is none of an array of shape {shape}")


def padded(x: Array, size: int, axis: int, value: Array) -> Array:
    """The array with an axis filled up to a multiple of `size`."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % size)
    return jnp.pad(x, padding, constant_values=value) if padding[axis][1] else x


def divided(x: Array, size: int, axis: int) -> Array:
    """[..., L, ...] as [..., L / size, size, ...]."""
    return x.reshape(*x.shape[:axis], x.shape[axis] // size, size, *x.shape[axis + 1 :])


def merged(x: Array, axis: int) -> Array:
    """[..., G, size, ...] as [..., G * size, ...]."""
    length = x.shape[axis] * x.shape[axis + 1]
    return x.reshape(*x.shape[:axis], length, *x.shape[axis + 2 :])


def first(x: Array, length: int, axis: int) -> Array:
    """The first `length` indices of an axis."""
    return x if x.shape[axis] == length else jax.lax.slice_in_dim(x, 0, length, axis=axis)
