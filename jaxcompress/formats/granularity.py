"""Which elements share a scale: the tensor, a channel, or a group inside a channel."""

import math
import operator
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array


@dataclass(frozen=True)
class Granularity:
    """One scale per index of the channel axes and per group of the elements that remain.

    Attributes:
      axis: channel axes; () gives one scale for the tensor. Scalars have no axis: for them any
        granularity is the tensor's.
      group: elements per group along the flattened remaining axes (row-major), None for all of
        them. The last group of a channel may be shorter (ragged); statistics leave its padding out.

    The blocked view of an array is the array itself without groups, else
    [lead..., groups, group, trail...]; scales have the view's rank and broadcast against it.

    >>> Granularity(axis=(-1,), group=32).scale_shape((3, 3, 16, 8))
    (5, 1, 8)
    """

    axis: tuple[int, ...] = ()
    group: int | None = None

    def __post_init__(self):
        if self.group is None:
            return
        if not isinstance(self.group, int) or self.group < 1:
            raise ValueError(f"group must be an integer of at least 1, got {self.group}")

    def channels(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Channel axes of `shape`, counted from the front, sorted."""
        rank = len(shape)
        if rank == 0:
            return ()
        bad = [a for a in self.axis if not -rank <= a < rank]
        if bad:
            raise ValueError(f"axis {bad[0]} is out of range for shape {shape}")
        return tuple(sorted({a % rank for a in self.axis}))

    def _plan(self, shape: tuple[int, ...]):
        # (permutation or None, lead sizes, elements per channel, trail sizes)
        channels = self.channels(shape)
        rest = [a for a in range(len(shape)) if a not in channels]
        count = math.prod(shape[a] for a in rest)
        contiguous = not rest or rest == list(range(rest[0], rest[-1] + 1))
        if contiguous:
            first = rest[0] if rest else len(shape)
            return None, shape[:first], count, shape[first + len(rest) :]
        order = (*channels, *rest)
        return order, tuple(shape[a] for a in channels), count, ()

    def split(self, x: Array) -> Array:
        """The blocked view of x; a ragged last group is padded with zeros."""
        if self.group is None:
            return x
        order, lead, count, trail = self._plan(x.shape)
        groups = -(-count // self.group)
        x = x if order is None else jnp.transpose(x, order)
        x = x.reshape(*lead, count, *trail)
        padding = groups * self.group - count
        if padding:
            x = jnp.pad(x, [(0, 0)] * len(lead) + [(0, padding)] + [(0, 0)] * len(trail))
        return x.reshape(*lead, groups, self.group, *trail)

    def join(self, blocked: Array, shape: tuple[int, ...]) -> Array:
        """The inverse of `split`: the array of `shape`, padding dropped."""
        if self.group is None:
            return blocked
        order, lead, count, trail = self._plan(shape)
        padded = -(-count // self.group) * self.group
        x = blocked.reshape(*lead, padded, *trail)
        if padded != count:
            x = x[(slice(None),) * len(lead) + (slice(0, count),)]
        if order is None:
            return x.reshape(shape)
        x = x.reshape([shape[a] for a in order])
        return jnp.transpose(x, [order.index(a) for a in range(len(order))])

    def expand(self, scales: Array, shape: tuple[int, ...]) -> Array:
        """Scales in a shape that broadcasts against the array itself instead of its view.

        Work on the array keeps its sharding; a reshape into blocks may not.
        """
        if self.group is None:
            return scales
        _, lead, count, trail = self._plan(shape)
        blocked = (*lead, -(-count // self.group), self.group, *trail)
        return self.join(jnp.broadcast_to(scales, blocked), shape)

    def reduce_axes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Axes of the blocked view over which statistics run."""
        if self.group is not None:
            return (len(self._plan(shape)[1]) + 1,)
        channels = self.channels(shape)
        return tuple(a for a in range(len(shape)) if a not in channels)

    def valid(self, shape: tuple[int, ...]) -> Array | None:
        """Which elements of the blocked view are not padding; None where there is no padding."""
        if self.group is None:
            return None
        _, lead, count, trail = self._plan(shape)
        groups = -(-count // self.group)
        if groups * self.group == count:
            return None
        index = jnp.arange(groups * self.group) < count
        return index.reshape((1,) * len(lead) + (groups, self.group) + (1,) * len(trail))

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of an array of `shape`: the view's rank, 1 along `reduce_axes`."""
        if self.group is not None:
            _, lead, count, trail = self._plan(shape)
            return (*lead, -(-count // self.group), 1, *trail)
        channels = self.channels(shape)
        return tuple(n if a in channels else 1 for a, n in enumerate(shape))


def granularity(axis: int | tuple[int, ...] | None = None, group: int | None = None) -> Granularity:
    """A `Granularity` from the usual arguments: None, one axis or several; a group size or None.

    >>> granularity(-1)
    Granularity(axis=(-1,), group=None)
    """
    if axis is None:
        axis = ()
    axes = tuple(axis) if isinstance(axis, tuple | list) else (axis,)
    try:
        return Granularity(tuple(operator.index(a) for a in axes), group)
    except TypeError as error:
        raise TypeError(f"axis must be None, an integer or several, got {axis!r}") from error
