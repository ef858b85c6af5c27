"""Rounding, and the gradients of the straight-through estimator."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

# (t float32, key) -> integers as float32, one of the two neighbours of t; t itself where it is one
Rounding = Callable[..., Array]


def half_even(t: Array, key: Array | None = None) -> Array:
    """Nearest integer, ties to even: IEEE 754, XLA, NumPy.

    >>> print(half_even(jnp.array([0.5, 1.5, -2.5])))
    [ 0.  2. -2.]
    """
    del key
    return jnp.round(t)


def half_away(t: Array, key: Array | None = None) -> Array:
    """Nearest integer, ties away from zero: most fixed-point hardware, CMSIS-NN.

    >>> print(half_away(jnp.array([0.5, 1.5, -2.5])))
    [ 1.  2. -3.]
    """
    del key
    size = jnp.abs(t)
    floor = jnp.floor(size)
    # Not floor(size + 0.5): just below one half the sum rounds to 1.
    rounded = jnp.where(size - floor >= 0.5, floor + 1.0, floor)
    return jnp.where(t < 0, -rounded, rounded)


def stochastic(t: Array, key: Array | None = None) -> Array:
    """floor(t) or floor(t) + 1, the latter with the probability t - floor(t): unbiased.

    `key` (uint32 [2] or a typed key) decides; one draw per element, the same wherever it runs.
    Source: Gupta et al. 2015, Deep Learning with Limited Numerical Precision, arXiv 1502.02551.

    >>> mean = jnp.mean(stochastic(jnp.full(10_000, 0.25), jax.random.key(0)))
    >>> abs(float(mean) - 0.25) < 0.02
    True
    """
    if key is None:
        raise ValueError("stochastic rounding needs a key")
    floor = jnp.floor(t)
    return jnp.where(jax.random.uniform(key, t.shape) < t - floor, floor + 1.0, floor)


@jax.custom_jvp
def round_ste(x: Array) -> Array:
    """Rounds half to even; the derivative is 1 (straight-through estimator).

    A negative value that rounds to zero gives +0, so that a decoded code has the same bits.
    Source: Bengio et al. 2013, Estimating or Propagating Gradients, arXiv 1308.3432.

    >>> print(round_ste(jnp.array([0.5, 1.5, -0.2])), jax.grad(round_ste)(0.3))
    [0. 2. 0.] 1.0
    """
    return _without_minus_zero(jnp.round(x))


@round_ste.defjvp
def _round_ste_jvp(primals, tangents):
    return round_ste(*primals), tangents[0]


def _without_minus_zero(x):
    return jnp.where(x == 0, jnp.zeros_like(x), x)


def clip_ste(x: Array, low: Array | float, high: Array | float) -> Array:
    """Clips to [low, high]; the derivative is 1 inside, both ends included, and 0 outside.

    `jnp.clip` halves the gradient at a tie, which is where the largest weight of a channel sits.
    The bounds receive the gradient of the elements they replace (LSQ needs it).
    """
    low = jnp.asarray(low, x.dtype)
    high = jnp.asarray(high, x.dtype)
    return jnp.where(x < low, low, jnp.where(x > high, high, x))


def over_scale(x: Array, scale: Array) -> Array:
    """x / scale in float32, as x * (1 / scale).

    XLA may or may not turn the division by a broadcast array into this; so codes are the same in
    every context. The inverse of a large scale would be subnormal, which XLA takes for zero: it is
    that of a part of the scale, a power of two.
    """
    part = jnp.where(scale > 2.0**100, jnp.float32(2.0**-32), jnp.float32(1.0))
    return x.astype(jnp.float32) * (1.0 / (scale * part)) * part


def uniform_codes(
    x: Array,
    scale: Array,
    low: Array,
    high: Array,
    *,
    rounding: Rounding = half_even,
    key: Array | None = None,
) -> Array:
    """clip(round(x / scale), low, high) in float32: integers, never -0; no gradient."""
    scaled = over_scale(jax.lax.stop_gradient(x), scale)
    return _without_minus_zero(rounding(clip_ste(scaled, low, high), key))


@jax.custom_jvp
def scaled_ste(x: Array, scale: Array, levels: Array, low: Array, high: Array) -> Array:
    """levels * scale, float32, where `levels` are x / scale on a grid that ends at low and high.

    d/dx = 1 where low <= x / scale <= high, else 0, exactly;
    d/dscale = level - x / scale between the ends, and the bound at them and outside (Esser et al.
    2019, Learned Step Size Quantization, arXiv 1902.08153, eq. 3). Levels and bounds get no
    gradient.

    >>> x, one = jnp.array([0.3, 9.0]), jnp.float32(1.0)
    >>> print(jax.grad(lambda x: jnp.sum(scaled_ste(x, one, jnp.round(x), -one, one)))(x))
    [1. 0.]
    """
    del x, low, high
    return levels * scale


@scaled_ste.defjvp
def _scaled_ste_jvp(primals, tangents):
    x, scale, levels, low, high = primals
    dx, dscale = tangents[0].astype(jnp.float32), tangents[1]
    scaled = over_scale(x, scale)
    inside = (scaled >= low) & (scaled <= high)
    slope = levels - jnp.where((scaled > low) & (scaled < high), scaled, 0.0)
    return levels * scale, jnp.where(inside, dx, 0.0) + slope * dscale


def uniform_ste(
    x: Array,
    scale: Array,
    low: Array,
    high: Array,
    *,
    rounding: Rounding = half_even,
    key: Array | None = None,
) -> Array:
    """The nearest of the numbers scale * {low, ..., high}, with the gradients of `scaled_ste`."""
    codes = uniform_codes(x, jax.lax.stop_gradient(scale), low, high, rounding=rounding, key=key)
    return scaled_ste(x, scale, codes, low, high)


@jax.custom_jvp
def straight_through(x: Array, value: Array, inside: Array) -> Array:
    """`value`, in its dtype; the derivative by x is 1 where `inside`, else 0; by value it is 0."""
    del x, inside
    return value


@straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    _, value, inside = primals
    dx = tangents[0].astype(value.dtype)
    return value, jnp.where(inside, dx, jnp.zeros_like(dx))


def clipped_ste(x: Array, value: Array) -> Array:
    """The format's own rule: derivative 1 inside its range, 0 outside. The default.

    Source: Hubara et al. 2016, Binarized Neural Networks, arXiv 1602.02830.
    """
    del x
    return value


def identity_ste(x: Array, value: Array) -> Array:
    """Derivative 1 everywhere, none for scales: weights beyond a clipped range can come back.

    Source: Bengio et al. 2013, arXiv 1308.3432.

    >>> x = jnp.array([0.3, 9.0])
    >>> print(jax.grad(lambda x: jnp.sum(identity_ste(x, jnp.clip(x, -1, 1))))(x))
    [1. 1.]
    """
    return straight_through(x, jax.lax.stop_gradient(value), jnp.ones((), bool))
