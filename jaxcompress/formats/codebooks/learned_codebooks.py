"""Learned codebooks: the levels of a block are the centroids of its numbers."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcompress.formats.codebooks.lookup import Table
from jaxcompress.formats.exact import from_limbs, split_limbs, unit_for
from jaxcompress.formats.granularities import Granularity, block_rows
from jaxcompress.formats.rounding import Rounding, half_even, identity_ste
from jaxcompress.formats.scales import finite, shortened

_WHOLE = Granularity()


class Codebook(NamedTuple):
    """The tables of an array's blocks."""

    codebook: Array  # float32 [*scale shape, 2**bits], ascending along the last axis


@dataclass(frozen=True)
class KMeans:
    """2**bits centroids per block, one of them 0; build it with `k_means`."""

    bits: int
    iterations: int

    group = None
    symmetric = False

    @property
    def name(self) -> str:
        """`kmeans4`; `formats.parse` reads it."""
        return f"kmeans{self.bits}"

    def metadata_bytes(self, blocks: int) -> int:
        """Bytes of the tables of an array of so many blocks."""
        return 4 * 2**self.bits * blocks

    def qparams(self, low: Array, high: Array, *, dtype: Any = jnp.float32) -> Codebook:
        """Evenly spaced levels from low to high, the one nearest to zero moved to zero."""
        low, high = (jnp.asarray(end, jnp.float32)[..., None] for end in (low, high))
        up, down = unit_for(jnp.maximum(-low, high))
        return Codebook(_storable(_spread(low * up, high * up, 2**self.bits) * down, dtype))

    def fit(self, x: Array, *, axes: tuple[int, ...], where: Array | None, dtype: Any) -> Codebook:
        """Lloyd's algorithm on the blocks of a blocked view, from evenly spaced levels."""
        scale_shape = tuple(1 if a in axes else n for a, n in enumerate(x.shape))
        valid = jnp.ones((1,) * x.ndim, bool) if where is None else where
        rows = block_rows(x.astype(jnp.float32), axes)
        valid = block_rows(jnp.broadcast_to(valid, x.shape), axes)
        if not len(rows):
            return Codebook(jnp.zeros((*scale_shape, 2**self.bits), jnp.float32))
        lloyd = jax.vmap(lambda row, ok: _lloyd(row, ok, 2**self.bits, self.iterations))
        table = lloyd(rows, valid)
        return Codebook(_storable(table.reshape(*scale_shape, 2**self.bits), dtype))

    def _table(self, qparams, where, shape):
        table = qparams.codebook
        expand = lambda p: where.expand(p, shape)
        rows = table.reshape(math.prod(table.shape[:-1]), table.shape[-1])
        return Table(rows, expand=expand, scale_shape=table.shape[:-1])

    def fake_quant(
        self,
        x: Array,
        qparams: Codebook,
        *,
        where: Granularity = _WHOLE,
        rounding: Rounding = half_even,
        key: Array | None = None,
    ) -> Array:
        """The nearest centroid, in x's dtype; the gradient is 1 everywhere."""
        table, fixed = self._table(qparams, where, x.shape), jax.lax.stop_gradient(x)
        codes = table.nearest(fixed.astype(jnp.float32), rounding=rounding, key=key)
        value = jnp.where(jnp.isnan(fixed), jnp.nan, table.at(codes))
        return identity_ste(x, finite(value, x.dtype))

    def encode(
        self,
        x: Array,
        qparams: Codebook,
        *,
        where: Granularity = _WHOLE,
        rounding: Rounding = half_even,
        key: Array | None = None,
    ) -> Array:
        """uint8 codes of the nearest centroids."""
        table = self._table(qparams, where, x.shape)
        return table.nearest(x.astype(jnp.float32), rounding=rounding, key=key).astype(jnp.uint8)

    def decode(
        self,
        codes: Array,
        qparams: Codebook,
        *,
        where: Granularity = _WHOLE,
        dtype: Any = jnp.float32,
    ) -> Array:
        """The centroids of the codes: exactly what `fake_quant` gave."""
        return self._table(qparams, where, codes.shape).at(codes).astype(dtype)


def _with_zero(levels: Array) -> Array:
    # the level nearest to zero becomes zero; the order stays
    nearest = jnp.argmin(jnp.abs(levels), axis=-1, keepdims=True)
    index = jnp.arange(levels.shape[-1]).reshape((1,) * (levels.ndim - 1) + (-1,))
    unknown = jnp.isnan(levels).any(axis=-1, keepdims=True)
    return jnp.where(unknown, jnp.nan, jnp.where(index == nearest, 0.0, levels))


def _spread(low: Array, high: Array, k: int) -> Array:
    # k levels from low to high, with exact products index * step
    step = shortened((high - low) * np.float32(1 / (k - 1)))
    index = np.arange(k, dtype=np.float32).reshape((1,) * (low.ndim - 1) + (k,))
    return _with_zero(jnp.minimum(low + index * step, high))


def _storable(levels: Array, dtype: Any) -> Array:
    # Numbers of the array's dtype, so that a centroid is its own nearest number there.
    return levels.astype(dtype).astype(jnp.float32)


def _lloyd(row: Array, valid: Array, k: int, iterations: int) -> Array:
    """Centroids [k] of the valid numbers of a row [n]: sorted once, cluster sums by prefix sums."""
    row = jnp.where(valid, row, 0.0)
    known = jnp.all(jnp.isfinite(row))
    # In units of a power of two: differences of the largest numbers overflow.
    unit, back = unit_for(jnp.max(jnp.abs(row), initial=0.0))
    row = row * unit
    low, high = jnp.min(row, initial=0.0), jnp.max(row, initial=0.0)
    count = jnp.sum(valid, dtype=jnp.int32)
    data = jnp.sort(jnp.where(valid, row, jnp.inf))
    # Prefix sums of integers above `low`: exact whatever the order. They wrap around at 2**32,
    # and so do their differences: right for clusters of up to 2**24 numbers.
    up, down = unit_for(high - low)
    limbs = split_limbs(jnp.where(jnp.isinf(data), 0.0, data - low), up)
    sums = [jnp.concatenate([jnp.zeros(1, jnp.uint32), jnp.cumsum(limb)]) for limb in limbs]

    def step(_, levels):
        ends = jnp.searchsorted(data, 0.5 * levels[:-1] + 0.5 * levels[1:], side="right")
        ends = jnp.minimum(ends.astype(jnp.int32), count)
        ends = jnp.concatenate([jnp.zeros(1, jnp.int32), ends, count[None]])
        members = (ends[1:] - ends[:-1]).astype(jnp.float32)
        total = from_limbs([s[ends[1:]] - s[ends[:-1]] for s in sums])
        mean = low + (total / jnp.maximum(members, 1.0)) * down
        return _with_zero(jnp.where(members > 0, mean, levels))

    levels = jax.lax.fori_loop(0, iterations, step, _spread(low[None], high[None], k))
    return jnp.where(known, levels * back, jnp.nan)


def k_means(bits: int, *, iterations: int = 100) -> KMeans:
    """A learned codebook of 2**bits numbers per tensor or channel, found by k-means.

    Starts from evenly spaced levels, the best start according to the paper; the level nearest to
    zero is held at zero, so that pruned weights and padding stay zero.
    Source: Han et al. 2016, Deep Compression, arXiv 1510.00149, section 3.

    Args:
      bits: 1 to 8.
      iterations: of Lloyd's algorithm.

    Raises:
      ValueError: bits outside 1 to 8, or no iteration.

    >>> x = jnp.array([-1.0, -0.5, 0.0, 1.25, 2.0, 2.5])
    >>> print(k_means(2).fit(x, axes=(0,), where=None, dtype=jnp.float32).codebook)
    [[-0.75  0.    1.25  2.25]]
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError(f"k_means(bits): bits must be an integer from 1 to 8, got {bits!r}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    return KMeans(bits, iterations)
