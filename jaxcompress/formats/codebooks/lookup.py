"""The nearest entry of a sorted table, static or learned; small tables by comparing."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcompress.formats.rounding import Rounding, half_away, half_even

_FEW = 16  # up to here one comparison per entry is faster than a binary search
_TINY = float(np.finfo(np.float32).tiny)


class Table:
    """Sorted levels, one table per block.

    Args:
      levels: float32 [blocks, k], ascending.
      expand: an array with one number per block ([*scale shape]) -> broadcast against the data.
      scale_shape: shape of the blocks; its product is `blocks`.
    """

    def __init__(
        self,
        levels: Array,
        *,
        expand: Callable[[Array], Array] = lambda p: p,
        scale_shape: tuple[int, ...] = (),
    ):
        self.levels, self.expand, self.shape = levels, expand, scale_shape
        self.count = levels.shape[1]

    def _entry(self, table: Array, k: int) -> Array:
        return self.expand(table[:, k].reshape(self.shape))

    def _rows(self) -> Array:
        # first position of each block's table in the flat one
        ids = jnp.arange(self.levels.shape[0], dtype=jnp.int32).reshape(self.shape)
        return self.expand(ids)

    def at(self, codes: Array) -> Array:
        """The levels of codes (any integer dtype)."""
        codes = codes.astype(jnp.int32)
        if self.count <= _FEW:
            value = jnp.broadcast_to(self._entry(self.levels, 0), codes.shape)
            for k in range(1, self.count):
                value = jnp.where(codes >= k, self._entry(self.levels, k), value)
            return value
        return self.levels.reshape(-1)[self._rows() * self.count + codes]

    def _above(self, x: Array, thresholds: Array) -> Array:
        # how many of the sorted thresholds [blocks, k - 1] lie below x, int32
        if self.count <= _FEW:
            code = jnp.zeros(x.shape, jnp.int32)
            for k in range(self.count - 1):
                code = code + (x > self._entry(thresholds, k)).astype(jnp.int32)
            return code
        size = 1 << (self.count - 1).bit_length()
        padded = jnp.pad(thresholds, ((0, 0), (0, size - self.count + 1)), constant_values=np.inf)
        flat, rows = padded.reshape(-1), self._rows() * size
        code, step = jnp.zeros(x.shape, jnp.int32), size // 2
        while step:
            code = jnp.where(x > flat[rows + code + (step - 1)], code + step, code)
            step //= 2
        return code

    def nearest(self, x: Array, *, rounding: Rounding = half_even, key: Any = None) -> Array:
        """Codes (int32) of the nearest levels: ties to the even code, or as `rounding` says.

        `half_away` sends ties away from zero; `stochastic` takes the next level up with a
        probability that makes the mean right.
        """
        # The barrier keeps XLA from halving the sum instead, which may overflow.
        half = jax.lax.optimization_barrier(0.5 * self.levels)
        middle = half[:, :-1] + half[:, 1:]
        if rounding is half_even:
            up = jnp.broadcast_to(jnp.arange(self.count - 1) % 2 == 1, middle.shape)
            return self._above(x, jnp.where(up, _just_below(middle), middle))
        if rounding is half_away:
            return self._above(x, jnp.where(middle > 0, _just_below(middle), middle))
        code = self._above(x, _just_below(self.levels[:, 1:]))
        here, there = self.at(code), self.at(jnp.minimum(code + 1, self.count - 1))
        gap = there - here
        part = jnp.where(gap > 0, (x - here) / jnp.where(gap > 0, gap, 1.0), 0.0)
        position = code.astype(jnp.float32) + jnp.clip(part, 0.0, 1.0)
        return jnp.clip(rounding(position, key), 0, self.count - 1).astype(jnp.int32)


def _just_below(x: Array) -> Array:
    # so that t > _just_below(x) is t >= x; XLA takes the subnormal below zero for zero
    return jnp.where(x == 0, -_TINY, jnp.nextafter(x, -jnp.inf))


def static_table(levels: Sequence[float]) -> Table:
    """One table for everything."""
    return Table(jnp.asarray(np.asarray(levels, np.float32))[None])
