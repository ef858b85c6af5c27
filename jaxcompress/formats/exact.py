"""Sums whose bits do not depend on the order: the same eager, under jit, on any shards."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from jaxcompress.formats.rounding import clip_ste


# One program: a caller that is not compiled would compile some forty small ones.
@functools.partial(jax.jit, static_argnames="axes")
def exact_sum(x: Array, *, axes: tuple[int, ...]) -> Array:
    """Sums non-negative numbers over axes, kept, with each cut to 24 bits of the largest.

    A float sum depends on its order in the last bits, and with it every scale that is a mean.
    Here the numbers become integers below 2**24, which add up exactly in limbs of 8 bits.

    Args:
      x: float32, >= 0; axes of up to 2**24 elements.
      axes: to sum over.

    Returns:
      float32; NaN where x is not finite.

    >>> print(exact_sum(jnp.array([1.0, 2.0, 4.5]), axes=(0,)))
    [7.5]
    """
    total, down = _sum_in_units(x, axes)
    return total * down


@functools.partial(jax.jit, static_argnames="axes")
def exact_mean(x: Array, count: Array, *, axes: tuple[int, ...]) -> Array:
    """`exact_sum` over a count (float32, at least 1 is taken), also where the sum overflows.

    >>> x = jnp.full(4, 3e38)
    >>> print(exact_sum(x, axes=(0,)), exact_mean(x, jnp.float32(4), axes=(0,)))
    [inf] [3.e+38]
    """
    total, down = _sum_in_units(x, axes)
    # Under jit the count may be a constant, which XLA would fold with other constants.
    return total * jax.lax.optimization_barrier(1.0 / jnp.maximum(count, 1.0)) * down


def _sum_in_units(x: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    # the sum in units of a power of two, and that power; NaN where x is not finite
    top = jnp.max(x, axis=axes, keepdims=True, initial=0.0)
    known = jnp.all(jnp.isfinite(x), axis=axes, keepdims=True)
    up, down = unit_for(top)
    limbs = split_limbs(x, up)
    for axis in axes:
        limbs = _carried([jnp.sum(limb, axis=axis, keepdims=True) for limb in limbs])
    return jnp.where(known, from_limbs(limbs), jnp.nan), down


def unit_for(top: Array) -> tuple[Array, Array]:
    """A power of two that brings numbers up to `top` below 2**24, and its inverse."""
    exponent = (jax.lax.bitcast_convert_type(top, jnp.int32) >> 23) - 127
    shift = jnp.clip(23 - exponent, -104, 126)
    return power_of_two(shift), power_of_two(-shift)


def power_of_two(exponent: Array) -> Array:
    """2**exponent, float32, exact; exponents (int32) from -126 to 127."""
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def split_limbs(x: Array, up: Array) -> list[Array]:
    """round(x * up), below 2**24, as three limbs of 8 bits (uint32), the lowest first."""
    whole = clip_ste(jnp.round(x * up), 0.0, 2.0**24 - 1)
    # NaN has no integer: 0, the caller looks for it on its own.
    whole = jnp.where(jnp.isnan(whole), 0.0, whole).astype(jnp.uint32)
    return [whole & 255, (whole >> 8) & 255, whole >> 16]


def from_limbs(limbs: list[Array]) -> Array:
    """The number of the limbs, float32, rounded once per limb from the highest down."""
    total = jnp.zeros(limbs[0].shape, jnp.float32)
    # Scaling by 256 is exact, so a fused multiply-add gives the same bits.
    for limb in reversed(limbs):
        total = total * 256.0 + limb.astype(jnp.float32)
    return total


def _carried(limbs: list[Array]) -> list[Array]:
    out, carry = [], jnp.zeros_like(limbs[0])
    for limb in limbs:
        value = limb + carry  # below 2**32: a sum of 2**24 bytes and a carry of 24 bits
        out.append(value & 255)
        carry = value >> 8
    for _ in range(3):
        out.append(carry & 255)
        carry = carry >> 8
    return out
