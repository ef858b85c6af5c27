"""Derivatives that learned quantizers share."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxcompress.formats.rounding import over_scale


@jax.custom_jvp
def scale_gradient(x: Array, factor: Any) -> Array:
    """x itself; its derivative is `factor`, a number that may be traced and gets none.

    >>> print(jax.grad(lambda x: 3.0 * scale_gradient(x, 0.5))(1.0))
    1.5
    """
    del factor
    return x


@scale_gradient.defjvp
def _scale_gradient_jvp(primals, tangents):
    x, factor = primals
    return x, jnp.asarray(factor, x.dtype) * tangents[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def positive(x: Array, smallest: float) -> Array:
    """max(|x|, smallest): what an optimizer sends below zero comes back on the other side.

    The derivative is the sign of x, +1 at zero, also below `smallest`: so x is never stuck there.

    >>> print(positive(jnp.array([0.5, -0.5, 0.0]), 1e-30))
    [5.e-01 5.e-01 1.e-30]
    """
    return jnp.maximum(jnp.abs(x), smallest)


@positive.defjvp
def _positive_jvp(smallest, primals, tangents):
    (x,), (dx,) = primals, tangents
    return positive(x, smallest), jnp.where(x < 0, -dx, dx)


def step_gradient_factor(count: int, largest_code: Any) -> Any:
    """1 / sqrt(N Q_P), float32: brings a step's gradient to the size of the weights'.

    Args:
      count: N, numbers that share the step.
      largest_code: Q_P; a number that may be traced.

    Source: Esser et al. 2019, Learned Step Size Quantization, arXiv 1902.08153, section 2.2.
    """
    return jax.lax.rsqrt(max(count, 1) * jnp.maximum(jnp.asarray(largest_code, jnp.float32), 1.0))


@jax.custom_jvp
def offset_ste(
    x: Array, scale: Array, offset: Array, levels: Array, low: Array, high: Array
) -> Array:
    """levels * scale, float32, on a grid that `offset` has moved to low, ..., high = low + Q_P.

    d/dx = 1 where low <= x / scale <= high, else 0; d/doffset = 0 inside, 1 outside;
    d/dscale = level - x / scale inside, 0 below and Q_P above: the offset holds the low end.
    Source: Bhalgat et al. 2020, LSQ+, arXiv 2004.09576, eq. 4 and 5, for an offset low * scale.
    """
    del x, offset, low, high
    return levels * scale


@offset_ste.defjvp
def _offset_ste_jvp(primals, tangents):
    x, scale, _, levels, low, high = primals
    dx, dscale, doffset = (t.astype(jnp.float32) for t in tangents[:3])
    scaled = over_scale(x, scale)
    inside = (scaled >= low) & (scaled <= high)
    between = (scaled > low) & (scaled < high)
    slope = levels - jnp.where(between, scaled, low)
    return levels * scale, jnp.where(inside, dx, doffset) + slope * dscale


@jax.custom_jvp
def clip_level_ste(
    x: Array, clip: Array, scale: Array, levels: Array, low: Array, high: Array
) -> Array:
    """levels * scale, float32, with scale = clip / high, where only what is clipped moves the clip.

    d/dx = 1 where low <= x / scale and x < clip, else 0; d/dclip = 0 there, else level / high.
    Source: Choi et al. 2018, PACT, arXiv 1805.06085, section 3.
    """
    del x, clip, low, high
    return levels * scale


@clip_level_ste.defjvp
def _clip_level_ste_jvp(primals, tangents):
    x, clip, scale, levels, low, high = primals
    dx, dclip = (t.astype(jnp.float32) for t in tangents[:2])
    inside = (over_scale(x, scale) >= low) & (x.astype(jnp.float32) < clip)
    return levels * scale, jnp.where(inside, dx, (levels / high) * dclip)
