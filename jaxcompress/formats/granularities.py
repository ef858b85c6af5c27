"""Which elements share a scale: the tensor, a channel, a group inside a channel, or a block."""

import math
import operator
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import Array


@dataclass(frozen=True)
class Granularity:
    """One scale per index of the channel axes and per group or block of what remains.

    Attributes:
      axis: channel axes; () gives one scale for the tensor. Scalars have no axis: for them any
        granularity is the tensor's.
      group: elements per group along the flattened remaining axes (row-major), None for all of
        them. The last group of a channel may be shorter (ragged); statistics leave its padding out.
      block: sizes of a tile of the last axes, instead of `axis` and `group`: (128, 128) gives one
        scale per tile of that size. Axes before them have a scale per index; tiles at the end of
        an axis may be smaller. A vector takes the last size; other arrays need as
        many axes as the block has.

    The blocked view of an array is the array itself without groups and blocks,
    [lead..., groups, group, trail...] with groups, and [lead..., tiles, size, tiles, size, ...]
    with blocks; scales have the view's rank and broadcast against it.

    >>> Granularity(axis=(-1,), group=32).scale_shape((3, 3, 16, 8))
    (5, 1, 8)
    >>> Granularity(block=(128, 128)).scale_shape((300, 256))
    (3, 1, 2, 1)
    """

    axis: tuple[int, ...] = ()
    group: int | None = None
    block: tuple[int, ...] | None = None

    def __post_init__(self):
        if len(set(self.axis)) < len(self.axis):
            raise ValueError(f"axis names an axis twice: {self.axis}")
        sizes = [("group", self.group)] if self.group is not None else []
        if self.block is not None:
            if self.axis or self.group is not None:
                raise ValueError("block has no axis and no group beside it")
            if not self.block:
                raise ValueError("block must hold the size of at least one axis")
            sizes = [("block", size) for size in self.block]
        for name, size in sizes:
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {size!r}")

    @property
    def plain(self) -> bool:
        """Whether the blocked view is the array itself."""
        return self.group is None and self.block is None

    def _tiles(self, shape: tuple[int, ...]):
        # (leading axes, [(tiles, size) of each tiled axis])
        block = self.block or ()
        block = () if not shape else block[-1:] if len(shape) == 1 else block
        if len(block) > len(shape):
            raise ValueError(
                f"block {block} has {len(block)} axes, an array of shape {shape} fewer: give sizes "
                "of its last axes alone"
            )
        lead = shape[: len(shape) - len(block)]
        return lead, [(-(-n // b), b) for n, b in zip(shape[len(lead) :], block, strict=True)]

    def channels(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Channel axes of `shape`, counted from the front, sorted."""
        rank = len(shape)
        if rank == 0:
            return ()
        bad = [a for a in self.axis if not -rank <= a < rank]
        if bad:
            raise ValueError(f"axis {bad[0]} is out of range for shape {shape}")
        found = tuple(sorted({a % rank for a in self.axis}))
        if len(found) < len(self.axis):
            raise ValueError(f"axis names an axis of shape {shape} twice: {self.axis}")
        return found

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
        if self.plain:
            return x
        if self.block is not None:
            lead, tiles = self._tiles(x.shape)
            ends = [t * b - n for (t, b), n in zip(tiles, x.shape[len(lead) :], strict=True)]
            if any(ends):
                x = jnp.pad(x, [(0, 0)] * len(lead) + [(0, end) for end in ends])
            return x.reshape(*lead, *(size for tile in tiles for size in tile))
        assert self.group is not None
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
        if self.plain:
            return blocked
        if self.block is not None:
            lead, tiles = self._tiles(shape)
            x = blocked.reshape(*lead, *(t * b for t, b in tiles))
            return x if x.shape == shape else x[tuple(slice(0, n) for n in shape)]
        assert self.group is not None
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
        if self.plain:
            return scales
        if self.block is not None:
            lead, tiles = self._tiles(shape)
            blocked = (*lead, *(size for tile in tiles for size in tile))
        else:
            assert self.group is not None
            _, lead, count, trail = self._plan(shape)
            blocked = (*lead, -(-count // self.group), self.group, *trail)
        return self.join(jnp.broadcast_to(scales, blocked), shape)

    def reduce_axes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Axes of the blocked view over which statistics run."""
        if self.block is not None:
            lead, tiles = self._tiles(shape)
            return tuple(len(lead) + 2 * k + 1 for k in range(len(tiles)))
        if self.group is not None:
            return (len(self._plan(shape)[1]) + 1,)
        channels = self.channels(shape)
        return tuple(a for a in range(len(shape)) if a not in channels)

    def valid(self, shape: tuple[int, ...]) -> Array | None:
        """Which elements of the blocked view are not padding; None where there is no padding."""
        if self.block is not None:
            return self._valid_in_tiles(shape)
        if self.group is None:
            return None
        _, lead, count, trail = self._plan(shape)
        groups = -(-count // self.group)
        if groups * self.group == count:
            return None
        index = jnp.arange(groups * self.group) < count
        return index.reshape((1,) * len(lead) + (groups, self.group) + (1,) * len(trail))

    def _valid_in_tiles(self, shape: tuple[int, ...]) -> Array | None:
        lead, tiles = self._tiles(shape)
        if all(t * b == n for (t, b), n in zip(tiles, shape[len(lead) :], strict=True)):
            return None
        valid = jnp.ones((1,) * (len(lead) + 2 * len(tiles)), bool)
        for k, (t, b) in enumerate(tiles):
            inside = (jnp.arange(t * b) < shape[len(lead) + k]).reshape(t, b)
            at = len(lead) + 2 * k
            valid = valid & inside.reshape((1,) * at + (t, b) + (1,) * (valid.ndim - at - 2))
        return valid

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of an array of `shape`: the view's rank, 1 along `reduce_axes`."""
        if self.block is not None:
            lead, tiles = self._tiles(shape)
            return (*lead, *(size for tiles, _ in tiles for size in (tiles, 1)))
        if self.group is not None:
            _, lead, count, trail = self._plan(shape)
            return (*lead, -(-count // self.group), 1, *trail)
        channels = self.channels(shape)
        return tuple(n if a in channels else 1 for a, n in enumerate(shape))


def block_rows(blocked: Array, axes: tuple[int, ...]) -> Array:
    """[blocks, n]: the numbers of each block of a blocked view whose `axes` are reduced.

    The blocks are in the order of the scales.
    """
    kept = [a for a in range(blocked.ndim) if a not in axes]
    count, size = (math.prod(blocked.shape[a] for a in part) for part in (kept, axes))
    return jnp.transpose(blocked, (*kept, *axes)).reshape(count, size)


def granularity(
    axis: int | tuple[int, ...] | None = None,
    group: int | None = None,
    block: int | tuple[int, ...] | None = None,
) -> Granularity:
    """A `Granularity` from the usual arguments: None, one axis or several; sizes or None.

    >>> granularity(-1)
    Granularity(axis=(-1,), group=None, block=None)
    """
    axes = () if axis is None else _integers("axis", axis)
    return Granularity(axes, group, None if block is None else _integers("block", block))


def _integers(name: str, values: int | tuple[int, ...]) -> tuple[int, ...]:
    try:
        several = tuple(values) if isinstance(values, tuple | list) else (values,)
        if any(isinstance(value, bool | np.bool_) for value in several):
            raise TypeError("a bool is no axis")
        return tuple(operator.index(value) for value in several)
    except TypeError as error:
        raise TypeError(f"{name} must be None, an integer or several, got {values!r}") from error
