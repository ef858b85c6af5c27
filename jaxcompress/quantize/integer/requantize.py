"""Products with a real number in int32 alone: accumulators to the codes of the next grid.

M = m * 2**(shift - 31) with m an int32, 2**30 <= |m| < 2**31 (or 0). `requantize` rounds twice, as
gemmlowp and the TensorFlow Lite reference kernels do: acc * m / 2**31 to the nearest integer, ties
upwards (SaturatingRoundingDoublingHighMul), then divided by 2**-shift to the nearest integer, ties
away from zero (RoundingDivideByPOT). A positive shift is applied first, and saturates.

Source: Jacob et al. 2018, arXiv 1712.05877, section 2.2; gemmlowp, fixedpoint/fixedpoint.h.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

_MOST = 2**31 - 1


def fixed_multiplier(real: Any) -> tuple[np.ndarray, np.ndarray]:
    """The int32 multiplier and the int32 shift nearest to real numbers: M = m * 2**(shift - 31).

    Computed on the host in float64. Magnitudes from 2**30 become the largest that there is, those
    below 2**-32 become 0.

    Raises:
      ValueError: a number is not finite.

    >>> m, shift = fixed_multiplier([0.75, -3.0])
    >>> print(m / 2**31, shift)
    [ 0.75 -0.75] [0 2]
    """
    real = np.asarray(real, np.float64)
    if not np.isfinite(real).all():
        raise ValueError("fixed_multiplier(real): must be finite, got NaN or Inf")
    fraction, exponent = np.frexp(real)
    m = np.rint(fraction * 2.0**31)
    carried = np.abs(m) == 2.0**31
    m, exponent = np.where(carried, m / 2, m), exponent + carried
    too_large, too_small = exponent > 30, exponent < -31
    m = np.where(too_large, np.sign(m) * _MOST, np.where(too_small, 0.0, m))
    exponent = np.where(too_small | (m == 0), 0, np.minimum(exponent, 30))
    return m.astype(np.int32), exponent.astype(np.int32)


def requantize(acc: ArrayLike, multiplier: ArrayLike, shift: ArrayLike) -> Array:
    """acc * multiplier * 2**(shift - 31), rounded as the module says, saturated; int32 only.

    Args:
      acc: int32.
      multiplier: int32, broadcast against acc: one number, or one per channel.
      shift: int32, -31 to 30, of the shape of the multiplier.

    Returns:
      int32 of acc's shape.

    Raises:
      TypeError: an operand is not int32.

    >>> m, shift = fixed_multiplier(0.25)
    >>> print(requantize(jnp.array([10, -10, 7], jnp.int32), m, shift))
    [ 3 -3  2]
    """
    for name, x in (("acc", acc), ("multiplier", multiplier), ("shift", shift)):
        if jnp.asarray(x).dtype != jnp.int32:
            raise TypeError(f"requantize({name}): must be int32, got {jnp.asarray(x).dtype}")
    multiplier, shift = jnp.asarray(multiplier), jnp.asarray(shift)
    left = _saturating_left_shift(jnp.asarray(acc), jnp.maximum(shift, 0))
    return _rounding_right_shift(_doubling_high_product(left, multiplier), jnp.maximum(-shift, 0))


def _saturating_left_shift(x: Array, bits: Array) -> Array:
    most = jnp.int32(_MOST)
    low, high = (-most - 1) >> bits, most >> bits
    shifted = jnp.clip(x, low, high) << bits
    return jnp.where(x > high, most, shifted)


def _unsigned_magnitude(x: Array) -> Array:
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(x < 0, jnp.uint32(0) - bits, bits)


def _doubling_high_product(a: Array, b: Array) -> Array:
    # floor(a b / 2**31 + 1/2): sign and magnitude, the magnitude from four 16-bit products.
    low16, half = jnp.uint32(0xFFFF), jnp.uint32(16)
    ua, ub = _unsigned_magnitude(a), _unsigned_magnitude(b)
    a_low, a_high, b_low, b_high = ua & low16, ua >> half, ub & low16, ub >> half
    cross_1, cross_2, bottom = a_low * b_high, a_high * b_low, a_low * b_low
    middle = (bottom >> half) + (cross_1 & low16) + (cross_2 & low16)
    low = (bottom & low16) | (middle << half)
    high = a_high * b_high + (cross_1 >> half) + (cross_2 >> half) + (middle >> half)
    # Of a negative product a tie is rounded towards zero, which is upwards.
    negative = (a < 0) ^ (b < 0)
    nudge = jnp.uint32(1 << 30) - negative.astype(jnp.uint32)
    nudged = low + nudge
    high = high + (nudged < low).astype(jnp.uint32)
    magnitude = (high << jnp.uint32(1)) | (nudged >> jnp.uint32(31))
    signed = jnp.where(negative, jnp.uint32(0) - magnitude, magnitude)
    result = lax.bitcast_convert_type(signed, jnp.int32)
    # -2**31 squared is the one product that int32 does not hold.
    return jnp.where(~negative & (result < 0), jnp.int32(_MOST), result)


def _rounding_right_shift(x: Array, bits: Array) -> Array:
    one = jnp.int32(1)
    mask = (one << bits) - one
    threshold = (mask >> one) + (x < 0).astype(jnp.int32)
    return (x >> bits) + ((x & mask) > threshold).astype(jnp.int32)


def rounded_product(acc: np.ndarray, multiplier: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """The numbers that `requantize` gives, by its definition, in float64 on the host.

    Everything is an integer below 2**53, or that divided by a power of two: nothing is rounded but
    where the definition says so. A product of 62 bits is taken in two halves.

    Args:
      acc: float64, integers of int32.
      multiplier, shift: as of `requantize`.

    Returns:
      float64 of acc's shape.
    """
    if np.max(shift, initial=0) > 0:
        acc = np.clip(acc * np.exp2(np.maximum(shift, 0)), -(2.0**31), _MOST)
    m = multiplier.astype(np.float64)
    if np.max(np.abs(acc), initial=0.0) <= 2.0**21:
        # y = floor(acc m / 2**31 + 1/2)
        y = np.floor(acc * m * 2.0**-31 + 0.5)
    else:
        # m = m_1 2**16 + m_0;  y = floor((acc m_1 + floor((acc m_0 + 2**30) / 2**16)) / 2**15)
        upper = np.floor(m * 2.0**-16)
        lower = np.floor((acc * (m - upper * 2.0**16) + 2.0**30) * 2.0**-16)
        y = np.minimum(np.floor((acc * upper + lower) * 2.0**-15), _MOST)
    # sign(y) floor(|y| / 2**e + 1/2)
    right = np.exp2(np.minimum(shift, 0))
    return np.copysign(np.floor(np.abs(y) * right + 0.5), y)
