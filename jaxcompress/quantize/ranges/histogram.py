"""Streaming histograms whose bins are powers of two wide: they grow and merge without error."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxcompress.formats.granularities import block_rows
from jaxcompress.quantize.ranges.min_max import extremes

BINS = 2048  # on either side of zero
_MOST_BYTES = 2**31


class Histogram(NamedTuple):
    """Counts of the numbers of each block; bin k holds [k - BINS, k - BINS + 1) * 2**e / BINS."""

    counts: Array  # uint32 [*scale shape, 2 * BINS]: up to 2**32 numbers per bin
    exponent: Array  # int32, shape of the scales: all numbers lie within 2**e
    low: Array  # float32, shape of the scales
    high: Array  # float32, shape of the scales
    finite: Array  # bool, shape of the scales
    seen: Array  # bool, shape of the scales


def empty(shape: tuple[int, ...]) -> Histogram:
    """A histogram of nothing, for scales of `shape`.

    Raises:
      ValueError: so many blocks that the counts would not fit into 2 GiB.
    """
    if 8 * BINS * math.prod(shape) > _MOST_BYTES:
        raise ValueError(
            f"a histogram keeps {8 * BINS} bytes per block, too much for scales of shape {shape}; "
            "calibrate whole tensors or channels with it, groups with min_max, mse or percentile"
        )
    zeros, no = jnp.zeros(shape, jnp.float32), jnp.zeros(shape, bool)
    counts = jnp.zeros((*shape, 2 * BINS), jnp.uint32)
    return Histogram(counts, jnp.full(shape, -126, jnp.int32), zeros, zeros, ~no, no)


def update(state: Histogram, x: Array, *, axes: tuple[int, ...], where=None) -> Histogram:
    """Counts the numbers of a blocked view; what is not finite is noted and left out."""
    new = extremes(x, axes=axes, where=where)
    low, high = (jnp.where(new.finite, end, 0.0) for end in (new.low, new.high))
    span = jnp.maximum(-low, high)
    bits = jax.lax.bitcast_convert_type(span, jnp.int32)
    exponent = jnp.maximum(state.exponent, (bits >> 23) - 126)  # span < 2**exponent
    old = _rebinned(state.counts, exponent - state.exponent)
    x = x.astype(jnp.float32)
    # In two factors: 2**-exponent alone may be too large.
    half = -exponent >> 1
    share = x * jnp.ldexp(jnp.float32(BINS), half) * jnp.ldexp(jnp.float32(1), -exponent - half)
    index = BINS + jnp.clip(jnp.floor(share), -BINS, BINS - 1).astype(jnp.int32)
    valid = jnp.isfinite(x) if where is None else jnp.isfinite(x) & where
    counts = _counted(index, valid, axes)
    return Histogram(
        old + counts.reshape(old.shape),
        exponent,
        jnp.minimum(state.low, low),
        jnp.maximum(state.high, high),
        state.finite & new.finite,
        state.seen | new.seen,
    )


def _counted(index: Array, valid: Array, axes: tuple[int, ...]) -> Array:
    # counts [blocks, 2 * BINS]
    rows = block_rows(index, axes)
    valid = block_rows(jnp.broadcast_to(valid, index.shape), axes)
    blocks = rows.shape[0]
    first = jnp.arange(blocks, dtype=jnp.int32)[:, None] * (2 * BINS)
    flat = jnp.where(valid, first + rows, blocks * 2 * BINS)
    counts = jnp.zeros(blocks * 2 * BINS, jnp.uint32)
    return counts.at[flat.reshape(-1)].add(jnp.uint32(1), mode="drop").reshape(blocks, -1)


def _rebinned(counts: Array, shift: Array) -> Array:
    """Counts on bins 2**shift times as wide: exact, as each new bin holds whole old ones."""
    shape = counts.shape
    shift = jnp.clip(shift.reshape(-1, 1), 0, 31)
    bins = jnp.arange(2 * BINS, dtype=jnp.int32)[None] - BINS
    index = BINS + (bins >> shift)
    blocks = index.shape[0]
    first = jnp.arange(blocks, dtype=jnp.int32)[:, None] * (2 * BINS)
    moved = jnp.zeros(counts.size, jnp.uint32).at[(first + index).reshape(-1)]
    return moved.add(counts.reshape(-1)).reshape(shape)


def merge(a: Histogram, b: Histogram) -> Histogram:
    """The histogram of the data of both, exactly."""
    exponent = jnp.maximum(a.exponent, b.exponent)
    return Histogram(
        _rebinned(a.counts, exponent - a.exponent) + _rebinned(b.counts, exponent - b.exponent),
        exponent,
        jnp.minimum(a.low, b.low),
        jnp.maximum(a.high, b.high),
        a.finite & b.finite,
        a.seen | b.seen,
    )


def edges(state: Histogram) -> Array:
    """Lower ends of the bins, float32 [*scale shape, 2 * BINS]."""
    return _all_bins(state, 0.0)


def centres(state: Histogram) -> Array:
    """Middles of the bins, float32 [*scale shape, 2 * BINS]."""
    return _all_bins(state, 0.5)


def _all_bins(state: Histogram, part: float) -> Array:
    bins = jnp.arange(2 * BINS, dtype=jnp.float32) - (BINS - part)
    bins = jnp.broadcast_to(bins.reshape((1,) * state.exponent.ndim + (-1,)), state.counts.shape)
    return in_bins(bins, state.exponent[..., None])


def in_bins(bins: Array, exponent: Array) -> Array:
    """bins * 2**exponent / BINS, float32: numbers so many bins from zero.

    In one step: the width of a bin alone may be too small for a float32.
    """
    return jnp.ldexp(bins * (1 / BINS), exponent)
