"""Rounding and clipping with the gradients of the straight-through estimator."""

import jax
import jax.numpy as jnp
from jax import Array


@jax.custom_jvp
def round_ste(x: Array) -> Array:
    """Rounds half to even; the derivative is 1 (straight-through estimator).

    A negative value that rounds to zero gives +0, so that a decoded code has the same bits.
    Source: Bengio et al. 2013, Estimating or Propagating Gradients, arXiv 1308.3432.

    >>> print(round_ste(jnp.array([0.5, 1.5, -0.2])), jax.grad(round_ste)(0.3))
    [0. 2. 0.] 1.0
    """
    rounded = jnp.round(x)
    return jnp.where(rounded == 0, jnp.zeros_like(rounded), rounded)


@round_ste.defjvp
def _round_ste_jvp(primals, tangents):
    return round_ste(*primals), tangents[0]


def clip_ste(x: Array, low: Array | float, high: Array | float) -> Array:
    """Clips to [low, high]; the derivative is 1 inside, both ends included, and 0 outside.

    `jnp.clip` halves the gradient at a tie, which is where the largest weight of a channel sits.
    The bounds receive the gradient of the elements they replace (LSQ needs it).
    """
    low = jnp.asarray(low, x.dtype)
    high = jnp.asarray(high, x.dtype)
    return jnp.where(x < low, low, jnp.where(x > high, high, x))


def uniform_codes(x: Array, scale: Array, low: Array, high: Array) -> Array:
    """clip(round(x / scale), low, high) in float32: integers, ties to even, never -0."""
    return round_ste(clip_ste(_scaled(x, scale), low, high))


def _scaled(x: Array, scale: Array) -> Array:
    # XLA may or may not turn the division by a broadcast array into this; so codes are the same
    # in every context.
    return x.astype(jnp.float32) * (1.0 / scale)


@jax.custom_jvp
def uniform_ste(x: Array, scale: Array, low: Array, high: Array) -> Array:
    """The nearest of the numbers scale * {low, ..., high}, float32, with straight-through rules.

    d/dx = 1 where low <= x / scale <= high, else 0, exactly;
    d/dscale = code - x / scale inside and the bound outside (Esser et al. 2019, Learned Step Size
    Quantization, arXiv 1902.08153, eq. 3). The bounds get no gradient.

    >>> x, one = jnp.array([0.3, 9.0]), jnp.float32(1.0)
    >>> print(jax.grad(lambda x: jnp.sum(uniform_ste(x, one, -one, one)))(x))
    [1. 0.]
    """
    return uniform_codes(x, scale, low, high) * scale


@uniform_ste.defjvp
def _uniform_ste_jvp(primals, tangents):
    x, scale, low, high = primals
    dx, dscale = tangents[0].astype(jnp.float32), tangents[1]
    scaled = _scaled(x, scale)
    inside = (scaled >= low) & (scaled <= high)
    codes = uniform_codes(x, scale, low, high)
    slope = codes - jnp.where(inside, scaled, 0.0)
    return codes * scale, jnp.where(inside, dx, 0.0) + slope * dscale
