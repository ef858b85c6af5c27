"""Calibrators that cut the tails off: percentile, least squares, OCTAV, relative entropy."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxcompress.formats import FixedPoint, Format, Integer
from jaxcompress.formats.exact import exact_sum, unit_for
from jaxcompress.formats.granularities import block_rows
from jaxcompress.quantize.ranges import histogram
from jaxcompress.quantize.ranges.min_max import Calibrator, cut_range, extremes

# (x, weight, low, high, format, axes) -> (low, high); weight None counts every number once
Solve = Callable[..., tuple[Array, Array]]


def _need(format: Any, name: str) -> Format:
    if format is None:
        raise TypeError(f"{name}: the range depends on the format; call range(statistics, format)")
    return format


def _from_points(name: str, solve: Solve) -> Calibrator:
    # One algorithm on weighted numbers: those of an array, or the middles of a histogram's bins.
    def limits(state, format=None):
        format = _need(format, name)
        low, high = state.low[..., None], state.high[..., None]
        points, weight = histogram.centres(state), state.counts.astype(jnp.float32)
        points = jnp.clip(points, low, high)
        low, high = solve(points, weight, low, high, format, axes=(points.ndim - 1,))
        return cut_range(low[..., 0], high[..., 0], state)

    def of(x, format, *, axes, where=None):
        x = x.astype(jnp.float32)
        state = extremes(x, axes=axes, where=where)
        weight = None if where is None else jnp.broadcast_to(where, x.shape).astype(jnp.float32)
        low, high = solve(x, weight, state.low, state.high, format, axes=axes)
        return cut_range(low, high, state)

    return Calibrator(histogram.empty, histogram.update, histogram.merge, limits, of)


def _least_error(x, weight, low, high, format, *, axes, up):
    # (low, high) [candidates, *scale shape] -> of each block the candidate with the least sum of
    # squared errors of the format, and that sum; errors are in units of 1 / up
    def error(ends):
        squared = ((x - format.fake_quant(x, format.qparams(*ends))) * up) ** 2
        squared = squared if weight is None else weight * squared
        return jnp.sum(squared, axis=axes, keepdims=True)

    errors = jax.lax.map(error, (low, high))
    return jnp.argmin(errors, axis=0), jnp.min(errors, axis=0)


def _cut(low: Array, high: Array, c: Array, format: Format) -> tuple[Array, Array]:
    if format.symmetric:
        return -c, c
    return jnp.maximum(low, -c), jnp.minimum(high, c)


def percentile(percent: float = 99.99) -> Calibrator:
    """The smallest range that holds `percent` of the numbers at either end.

    Symmetric formats: of the magnitudes. Others: of the numbers above and, on their own, below.
    Where so many numbers are 0 that the range would be 0, it is the whole one.
    100 is min-max. Streaming takes the end of a histogram bin (2048 per side, powers of two wide).

    Raises:
      ValueError: percent outside (50, 100].

    >>> c = percentile(75)
    >>> from jaxcompress.formats import integer
    >>> x = jnp.array([0.1, -0.2, 0.3, 5.0])
    >>> print(c.of(x, integer(8), axes=(0,))[1])
    [0.3]
    """
    if not 50 < percent <= 100:
        raise ValueError(f"percent must be above 50 and at most 100, got {percent}")

    def of(x, format, *, axes, where=None):
        x = x.astype(jnp.float32)
        state = extremes(x, axes=axes, where=where)
        count = math.prod(x.shape[a] for a in axes)
        if where is not None:
            count = jnp.sum(jnp.broadcast_to(where, x.shape), axis=axes, keepdims=True)
        if format.symmetric:
            c = _ranked(jnp.abs(x), where, count, percent, axes)
            low, high = -c, c
        else:
            high = jnp.maximum(_ranked(x, where, count, percent, axes), 0.0)
            low = -jnp.maximum(_ranked(-x, where, count, percent, axes), 0.0)
        return cut_range(low, high, state)

    def limits(state, format=None):
        counts = state.counts
        format = _need(format, "percentile")
        if format.symmetric:
            folded = counts + jnp.flip(counts, -1)
            counts = folded.at[..., : histogram.BINS].set(0)
            c = jnp.minimum(_bin_end(state, counts, percent), jnp.maximum(-state.low, state.high))
            low, high = -c, c
        else:
            high = jnp.clip(_bin_end(state, counts, percent), 0.0, state.high)
            flipped = _bin_end(state, jnp.flip(counts, -1), percent)
            low = -jnp.clip(flipped, 0.0, -state.low)
        return cut_range(low, high, state)

    return Calibrator(histogram.empty, histogram.update, histogram.merge, limits, of)


def _ranked(x: Array, where: Any, count: Any, percent: float, axes: tuple[int, ...]) -> Array:
    # the ceil(percent / 100 * count)-th smallest valid number of each block, axes kept
    rows = block_rows(x if where is None else jnp.where(where, x, jnp.inf), axes)
    shape = tuple(1 if a in axes else n for a, n in enumerate(x.shape))
    if rows.shape[-1] == 0:
        return jnp.zeros(shape, jnp.float32)
    rows = jnp.sort(rows, axis=-1)
    if isinstance(count, int):
        return rows[:, max(math.ceil(percent / 100 * count) - 1, 0)].reshape(shape)
    rank = jnp.ceil(count.astype(jnp.float32) * (percent / 100)).astype(jnp.int32) - 1
    return jnp.take_along_axis(rows, jnp.maximum(rank, 0).reshape(-1, 1), axis=1).reshape(shape)


def _bin_end(state: Any, counts: Array, percent: float) -> Array:
    # upper end of the first bin up to which `percent` of the counts lie
    share = counts.astype(jnp.float32)
    below = jnp.cumsum(share, axis=-1)
    total = below[..., -1:]
    index = jnp.argmax(below >= total * (percent / 100), axis=-1)
    if percent == 100:
        last = jnp.arange(counts.shape[-1], dtype=jnp.int32)
        index = jnp.max(jnp.where(counts > 0, last.reshape((1,) * state.low.ndim + (-1,)), 0), -1)
    end = (index - (histogram.BINS - 1)).astype(jnp.float32)
    return histogram.in_bins(end, state.exponent)


_COARSE = tuple(0.9**k for k in range(40))  # 1 down to 0.016
_FINE = tuple(0.91 + 0.01 * k for k in range(19))


def mse() -> Calibrator:
    """The range, a share of min-max, with the least sum of squared errors of the format.

    40 shares 0.9**k of the range, then 19 around the best one; the whole range is among them, so
    the error is never above that of min-max. Works with every format that takes a range.
    """

    def solve(x, weight, low, high, format, *, axes):
        up, _ = unit_for(jnp.maximum(-low, high))  # squares would overflow, or vanish

        def search(shares, best):
            shares = jnp.broadcast_to(shares, (shares.shape[0], *low.shape))
            ends = low[None] * shares, high[None] * shares
            index, least = _least_error(x, weight, *ends, format, axes=axes, up=up)
            found = jnp.take_along_axis(shares, index[None], axis=0)[0]
            if best is None:
                return found, least
            return jnp.where(least < best[1], found, best[0]), jnp.minimum(least, best[1])

        column = lambda values: jnp.asarray(values, jnp.float32).reshape(-1, *(1,) * low.ndim)
        best = search(column(_COARSE), None)
        share, _ = search(jnp.minimum(column(_FINE) * best[0][None], 1.0), best)
        return low * share, high * share

    return _from_points("mse", solve)


def octav(*, iterations: int = 20) -> Calibrator:
    """The clipping level with the least mean squared error of a uniform grid, by Newton's method.

    c <- E[|x| 1(|x| >= c)] / (k E[1(0 < |x| < c)] + E[1(|x| >= c)]), k = 4**-b / 3; where all
    numbers have one sign and the format is asymmetric, k = 4**-b / 12. Numbers at the level itself
    have no error, so they count as beyond it (the paper has them below, and swings between 0 and
    the magnitude that all numbers share). Few numbers may still end in a circle: of its last two
    levels and the whole range, the one with the least squared error is taken.
    Source: Sakr et al. 2022, Optimal Clipping and Magnitude-aware Differentiation for Improved
    Quantization-aware Training, arXiv 2206.06501.

    Raises:
      ValueError: (with the format) not a uniform grid.
    """

    def solve(x, weight, low, high, format, *, axes):
        if not isinstance(format, Integer | FixedPoint):
            raise ValueError(f"octav: {format.name} is no uniform grid; use mse")
        noise = jnp.full(low.shape, 1 / (3.0 * 4.0**format.bits), jnp.float32)
        if not format.symmetric:
            noise = jnp.where((low < 0) & (high > 0), noise, 0.25 * noise)
        span = jnp.maximum(-low, high)
        # In units of a power of two: sums of the largest numbers overflow.
        up, down = unit_for(span)
        size, top = jnp.abs(x) * up, span * up

        def count(chosen):
            if weight is None:
                total = jnp.sum(chosen, axis=axes, keepdims=True, dtype=jnp.int32)
                return total.astype(jnp.float32)
            return jnp.sum(jnp.where(chosen, weight, 0.0), axis=axes, keepdims=True)

        def step(_, levels):
            c, _ = levels
            above = (size > 0) & (size >= c)
            far = jnp.where(above, size, 0.0)
            if weight is None:
                total = exact_sum(far, axes=axes)
            else:
                total = jnp.sum(far * weight, axis=axes, keepdims=True)
            within = noise * count((size > 0) & ~above) + count(above)
            return jnp.minimum(total / jnp.maximum(within, 1e-30), top), c

        start = (jnp.zeros(low.shape, jnp.float32), top)
        levels = jnp.stack([top, *jax.lax.fori_loop(0, iterations, step, start)])
        low, high = _cut(low[None], high[None], levels * down[None], format)
        index, _ = _least_error(x, weight, low, high, format, axes=axes, up=up)
        pick = lambda ends: jnp.take_along_axis(ends, index[None], axis=0)[0]
        return pick(low), pick(high)

    return _from_points("octav", solve)


def kl(*, candidates: int = 128) -> Calibrator:
    """The clipping level whose quantized histogram has the least relative entropy to the whole.

    For `candidates` levels between as many bins as the grid has levels on one side and all bins:
    P is the histogram up to there with the tail in its last bin, Q the same bins merged into the
    grid's levels and spread again over the bins that are not empty; the least KL(P || Q) wins.
    Source: Migacz 2017, 8-bit Inference with TensorRT (GTC slides); 2048 bins, powers of two wide.
    """

    def limits(state, format=None):
        format = _need(format, "kl")
        levels = 2 ** math.ceil(format.bits)
        counts = state.counts.astype(jnp.float32)
        size = counts[..., histogram.BINS :] + jnp.flip(counts[..., : histogram.BINS], -1)
        one_sided = (state.low == 0) & (not format.symmetric)
        rows = size.reshape(-1, histogram.BINS)
        sides = jnp.where(one_sided, levels, levels // 2).reshape(-1)
        best = jax.lax.map(lambda row: _least_kl(row[0], row[1], candidates), (rows, sides))
        c = histogram.in_bins(best.reshape(state.low.shape).astype(jnp.float32), state.exponent)
        c = jnp.minimum(c, jnp.maximum(-state.low, state.high))
        return cut_range(*_cut(state.low, state.high, c, format), state)

    return Calibrator(histogram.empty, histogram.update, histogram.merge, limits)


def _least_kl(counts: Array, levels: Array, candidates: int) -> Array:
    # number of bins to keep of the histogram of magnitudes `counts` [BINS]
    bins = counts.shape[0]
    ids = jnp.arange(bins, dtype=jnp.int32)
    last = jnp.max(jnp.where(counts > 0, ids + 1, 1))
    first = jnp.minimum(levels, last)

    def divergence(k):
        keep = first + (last - first) * k // max(candidates - 1, 1)
        inside = ids < keep
        tail = jnp.sum(jnp.where(inside, 0.0, counts))
        p = jnp.where(inside, counts, 0.0) + jnp.where(ids == keep - 1, tail, 0.0)
        level = jnp.minimum(ids * levels // keep, levels - 1)
        full = inside & (counts > 0)
        total = jnp.zeros(bins).at[level].add(jnp.where(full, counts, 0.0))
        members = jnp.zeros(bins).at[level].add(full.astype(jnp.float32))
        q = jnp.where(full, (total / jnp.maximum(members, 1.0))[level], 0.0)
        p, q = p / jnp.sum(p), q / jnp.maximum(jnp.sum(q), 1.0)
        q = jnp.maximum(q, 1e-9)
        return jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.maximum(p, 1e-30) / q), 0.0)), keep

    scores, keeps = jax.lax.map(divergence, jnp.arange(candidates, dtype=jnp.int32))
    # Of equals the widest: an exact grid needs no clipping.
    return keeps[candidates - 1 - jnp.argmin(jnp.flip(scores))]
