"""Range statistics: streaming, jitted, mergeable; they refuse NaN and Inf by themselves."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxcompress.core.compressor import holds


class Calibrator(NamedTuple):
    """Statistics of blocks of numbers, and the range that a format should cover.

    Attributes:
      init: shape of the scales -> statistics, a pytree of arrays.
      update: (statistics, x, *, axes, where) -> statistics; x is a blocked view, `axes` are
        reduced, `where` (bool or None) leaves padding out. Works under jit.
      merge: two statistics of disjoint data -> those of all of it (exact: shards, batches).
      range: statistics -> (low, high), low <= 0 <= high; NaN where a number was not finite or
        nothing was seen.
    """

    init: Callable[[tuple[int, ...]], Any]
    update: Callable[..., Any]
    merge: Callable[[Any, Any], Any]
    range: Callable[[Any], tuple[Array, Array]]


class MinMax(NamedTuple):
    """Smallest and largest number so far, zero included; whether all were finite, if any."""

    low: Array  # float32, shape of the scales
    high: Array  # float32, shape of the scales
    finite: Array  # bool, shape of the scales
    seen: Array  # bool, shape of the scales


def min_max() -> Calibrator:
    """The whole range: low = min(x, 0), high = max(x, 0).

    `jnp.max` may drop NaN on CPU, so finiteness is tested on its own.

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
        x = x.astype(jnp.float32)
        seen = x if where is None else jnp.where(where, x, 0.0)
        return MinMax(
            jnp.minimum(state.low, jnp.min(seen, axis=axes, keepdims=True, initial=0.0)),
            jnp.maximum(state.high, jnp.max(seen, axis=axes, keepdims=True, initial=0.0)),
            state.finite & jnp.all(jnp.isfinite(seen), axis=axes, keepdims=True),
            jnp.ones_like(state.seen),
        )

    def merge(a, b):
        return MinMax(
            jnp.minimum(a.low, b.low),
            jnp.maximum(a.high, b.high),
            a.finite & b.finite,
            a.seen | b.seen,
        )

    def limits(state):
        known = state.finite & state.seen
        return jnp.where(known, state.low, jnp.nan), jnp.where(known, state.high, jnp.nan)

    return Calibrator(init, update, merge, limits)


def refuse_non_finite(what: str, *arrays: Array) -> None:
    """Raises ValueError if a concrete array holds NaN or Inf; traced arrays pass.

    Under `jit` nothing can be raised: there a calibrator's range is NaN, and so is all that is
    computed with it.
    """
    if not all(holds(jnp.isfinite, x) for x in arrays):
        raise ValueError(f"{what} must be finite, got NaN or Inf")
