"""Range statistics: streaming, jitted, mergeable; they refuse NaN and Inf by themselves."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxcompress.core.compressor import holds
from jaxcompress.formats import Format


class Calibrator(NamedTuple):
    """Statistics of blocks of numbers, and the range that a format should cover.

    Attributes:
      init: shape of the scales -> statistics, a pytree of arrays.
      update: (statistics, x, *, axes, where) -> statistics; x is a blocked view, `axes` are
        reduced, `where` (bool or None) leaves padding out. Blocks without an element stay as they
        were. Works under jit.
      merge: two statistics of disjoint data -> those of all of it (shards, batches).
      range: (statistics, format) -> (low, high), low <= 0 <= high, both 0 only where all numbers
        were (float32 below the smallest normal number counts as 0); NaN where a number was not
        finite or nothing was seen.
      of: (x, format, *, axes, where) -> (low, high) of an array in hand, where that can be done
        better than by statistics; None: by them.
    """

    init: Callable[[tuple[int, ...]], Any]
    update: Callable[..., Any]
    merge: Callable[[Any, Any], Any]
    range: Callable[..., tuple[Array, Array]]
    of: Callable[..., tuple[Array, Array]] | None = None


def check_calibrator(calibrate: Any) -> None:
    """Raises TypeError for what is neither None nor a `Calibrator`."""
    if calibrate is not None and not isinstance(calibrate, Calibrator):
        raise TypeError(
            "calibrate must be a Calibrator such as quantize.min_max() or quantize.mse(), or None, "
            f"got {calibrate!r}"
        )


def range_of(
    calibrate: Calibrator,
    x: Array,
    format: Format,
    *,
    axes: tuple[int, ...],
    where: Array | None = None,
) -> tuple[Array, Array]:
    """The range (low, high) of the blocks of a blocked view, each of the shape of the scales.

    Blocks without elements have the range 0: an array of no rows has nothing to cover.
    """
    if any(x.shape[a] == 0 for a in axes):
        nothing = jnp.zeros([1 if a in axes else n for a, n in enumerate(x.shape)], jnp.float32)
        return nothing, nothing
    if calibrate.of is not None:
        return calibrate.of(x, format, axes=axes, where=where)
    empty = calibrate.init(tuple(1 if a in axes else n for a, n in enumerate(x.shape)))
    return calibrate.range(calibrate.update(empty, x, axes=axes, where=where), format)


class MinMax(NamedTuple):
    """Smallest and largest number so far, zero included; whether all were finite, if any."""

    low: Array  # float32, shape of the scales
    high: Array  # float32, shape of the scales
    finite: Array  # bool, shape of the scales
    seen: Array  # bool, shape of the scales


def extremes(x: Array, *, axes: tuple[int, ...], where: Array | None = None) -> MinMax:
    """The `MinMax` of a blocked view alone; `seen` where a block has an element.

    `jnp.max` may drop NaN on CPU, so finiteness is tested on its own.
    """
    x = x.astype(jnp.float32)
    seen = jnp.ones((1,) * x.ndim, bool) if where is None else where
    x = x if where is None else jnp.where(where, x, 0.0)
    return MinMax(
        jnp.min(x, axis=axes, keepdims=True, initial=0.0),
        jnp.max(x, axis=axes, keepdims=True, initial=0.0),
        jnp.all(jnp.isfinite(x), axis=axes, keepdims=True),
        jnp.any(jnp.broadcast_to(seen, x.shape), axis=axes, keepdims=True),
    )


def min_max() -> Calibrator:
    """The whole range: low = min(x, 0), high = max(x, 0).

    >>> c = min_max()
    >>> state = c.update(c.init((1,)), jnp.array([-1.0, 3.0]), axes=(0,))
    >>> low, high = c.range(state)
    >>> print(low, high)
    [-1.] [3.]
    """

    def init(shape):
        zeros = jnp.zeros(shape, jnp.float32)
        return MinMax(zeros, zeros, jnp.ones(shape, bool), jnp.zeros(shape, bool))

    def update(state, x, *, axes, where=None):
        return merge(state, extremes(x, axes=axes, where=where))

    def merge(a, b):
        return MinMax(
            jnp.minimum(a.low, b.low),
            jnp.maximum(a.high, b.high),
            a.finite & b.finite,
            a.seen | b.seen,
        )

    def limits(state, format=None):
        del format
        return known(state.low, state), known(state.high, state)

    def of(x, format, *, axes, where=None):
        if format.symmetric and len(axes) == 1 and x.shape[axes[0]] <= _SMALL:
            span = _absmax_of_small_blocks(x, axes, where)
            return -span, span
        state = extremes(x, axes=axes, where=where)
        return known(state.low, state), known(state.high, state)

    return Calibrator(init, update, merge, limits, of)


_SMALL = 256  # numbers of a block up to which XLA reduces integers as fast as floats on CPU


def _absmax_of_small_blocks(x: Array, axes: tuple[int, ...], where: Array | None) -> Array:
    # One reduction instead of three: as integers, magnitudes keep their order, and NaN and Inf
    # are the largest of all.
    x = x.astype(jnp.float32)
    x = x if where is None else jnp.where(where, x, 0.0)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0x7FFFFFFF)
    top = jnp.max(bits, axis=axes, keepdims=True, initial=0)
    span = jax.lax.bitcast_convert_type(top, jnp.float32)
    return jnp.where(top < jnp.uint32(0x7F800000), span, jnp.nan)


def known(value: Array, state: Any) -> Array:
    """`value` where all numbers were finite and there were any, else NaN."""
    return jnp.where(state.finite & state.seen, value, jnp.nan)


def cut_range(low: Array, high: Array, state: Any) -> tuple[Array, Array]:
    """A range that a rule has cut out of the whole one, `known`; the whole one where it is 0.

    A rule may find that 0 alone is worth covering (a percentile of mostly zeros): the other
    numbers would have a scale that has nothing to do with them.
    """
    nothing = (low == 0) & (high == 0)
    low, high = jnp.where(nothing, state.low, low), jnp.where(nothing, state.high, high)
    return known(low, state), known(high, state)


class MovingAverage(NamedTuple):
    """Averages of the extremes of the batches so far."""

    low: Array  # float32, shape of the scales
    high: Array  # float32, shape of the scales
    finite: Array  # bool, shape of the scales
    seen: Array  # bool, shape of the scales
    batches: Array  # int32, shape of the scales


def moving_average(decay: float = 0.99) -> Calibrator:
    """An exponential moving average of each batch's extremes: mean <- decay mean + (1-decay) new.

    The first batch starts the average. Merging averages two of them by their numbers of batches:
    for shards that saw equally many, their mean.
    Source: Jacob et al. 2018, arXiv 1712.05877, section 3.1.

    Raises:
      ValueError: decay outside [0, 1).
    """
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"decay must be at least 0 and below 1, got {decay}")

    def init(shape):
        zeros, no = jnp.zeros(shape, jnp.float32), jnp.zeros(shape, bool)
        return MovingAverage(zeros, zeros, ~no, no, jnp.zeros(shape, jnp.int32))

    def update(state, x, *, axes, where=None):
        new = extremes(x, axes=axes, where=where)

        def mix(old, now):
            mean = jnp.where(state.seen, decay * old + (1 - decay) * now, now)
            return jnp.where(new.seen, mean, old)

        return MovingAverage(
            mix(state.low, new.low),
            mix(state.high, new.high),
            state.finite & new.finite,
            state.seen | new.seen,
            state.batches + new.seen.astype(jnp.int32),
        )

    def merge(a, b):
        total = a.batches + b.batches
        share = a.batches.astype(jnp.float32) / jnp.maximum(total, 1).astype(jnp.float32)
        mix = lambda x, y: share * x + (1 - share) * y
        return MovingAverage(
            mix(a.low, b.low), mix(a.high, b.high), a.finite & b.finite, a.seen | b.seen, total
        )

    def limits(state, format=None):
        del format
        return known(state.low, state), known(state.high, state)

    return Calibrator(init, update, merge, limits)


def refuse_non_finite(what: str, *arrays: Array) -> None:
    """Raises ValueError if a concrete array holds NaN or Inf; traced arrays pass.

    Under `jit` nothing can be raised: there a calibrator's range is NaN, and so is all that is
    computed with it.
    """
    if not all(holds(jnp.isfinite, x) for x in arrays):
        raise ValueError(f"{what} must be finite, got NaN or Inf")
