"""Accumulator-aware quantization: weights that can never overflow a promised accumulator."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcompress.core.compressor import Compressor, CompressState, per_leaf
from jaxcompress.core.packed import fake_quantize, quantize
from jaxcompress.formats import QParams, granularity_for, integer
from jaxcompress.formats.exact import exact_sum
from jaxcompress.formats.scales import smallest_scale
from jaxcompress.quantize.fake_quantized_weights import made_for
from jaxcompress.quantize.qat.gradients import positive
from jaxcompress.quantize.ranges.min_max import refuse_non_finite

# Truncation takes what lies closer to the next integer than this share for that integer.
_TOLERANCE = np.float32(2.0**-20)


class AccumulatorBound(NamedTuple):
    """What A2Q trains beside a weight, one per channel; magnitudes are used, never zero."""

    step: Array  # float32, s
    norm: Array  # float32, g: the l1 norm that the weights of a channel are brought to


def toward_zero(t: Array, key: Array | None = None) -> Array:
    """Integers, the fraction cut off: the l1 norm cannot grow. A `formats.Rounding`.

    What a few roundings left just below an integer counts as it, so that codes come back.

    >>> print(toward_zero(jnp.array([1.9, -1.9, 2.9999999])))
    [ 1. -1.  3.]
    """
    del key
    return jnp.trunc(t * (1.0 + _TOLERANCE))


def a2q(
    bits: int,
    *,
    accumulator_bits: int,
    input_bits: int,
    input_signed: bool = False,
    axis: int | tuple[int, ...] | None = -1,
) -> Compressor:
    """Integer weights whose products with any inputs fit a signed accumulator of P bits.

    w = g v / ||v||_1 per output channel, q = clip(trunc(w / s), -Q_P, Q_P), with the learned norm
    g and step s, and g <= s L where L = (2^(P-1) - 1) 2^(1[signed] - N). Then ||q||_1 <= L, and
    |sum x q| <= 2^(P-1) - 1 for all inputs x of N bits, whatever the order of the sum: partial
    sums fit too. Gradients are straight through the truncation, as `lsq`'s, and exact through the
    normalization; a norm above its bound gets none, the step gets it instead.

    The promise is for integers: multiply codes, then scale. Inputs with a zero point count as
    unsigned if it is taken off before the product. L is made smaller by (n + 32) 2^-24 + 2^-19,
    n weights per channel, for the roundings of float32. Training starts from w = v: the norm is
    ||v||_1, the step the smallest that neither clips nor breaks the bound.

    Args:
      bits: of the weights, 2 to 8; may be a traced number where nothing is packed.
      accumulator_bits: P, sign included; may be traced.
      input_bits: N of the inputs; may be traced.
      input_signed: inputs in [-2^(N-1), 2^(N-1) - 1], else in [0, 2^N - 1].
      axis: output channels (one accumulator each). Flax kernels have them last.

    Raises:
      ValueError: bits below 2; an accumulator in which not even a single code 1 fits.

    Source: Colbert et al. 2023, A2Q: Accumulator-Aware Quantization with Guaranteed Overflow
    Avoidance, arXiv 2308.13504, section 4; there g and s are powers of two of what is learned,
    and a penalty draws g below its bound.

    >>> comp = a2q(8, accumulator_bits=16, input_bits=8)
    >>> w = jnp.linspace(-1.0, 1.0, 600).reshape(300, 2)
    >>> codes = comp.apply(w, comp.init(w)) / comp.init(w).learned.step
    >>> print(jnp.abs(codes).sum(0) <= (2**15 - 1) / 2**8)
    [ True  True]
    """
    if isinstance(bits, int) and bits == 1:
        raise ValueError("a2q(bits): weights need 2 bits or more")
    format, where = integer(bits), granularity_for(integer(8), axis)
    largest = format.bounds[1]
    bound = _l1_bound(accumulator_bits, input_bits, input_signed)

    def limit(w):
        count = w.size // max(math.prod(where.scale_shape(w.shape)), 1)
        margin = (count + 32) * 2.0**-24 + 2.0**-19
        return bound * np.float32(max(1.0 - margin, 0.0))

    def norm_of(w):
        return exact_sum(jnp.abs(w.astype(jnp.float32)), axes=where.reduce_axes(w.shape))

    def normalized(w, learned):
        # w = min(g, s L) v / ||v||_1, float32
        step = positive(learned.step, smallest_scale(w.dtype))
        norm = positive(learned.norm, smallest_scale(jnp.float32))
        top = step * limit(w)
        norm = jnp.where(norm < top, norm, top)
        return _with_l1_norm(w.astype(jnp.float32), norm, norm_of(w)), step

    def init(w):
        refuse_non_finite("an array to quantize", w)
        norm, axes = norm_of(w), where.reduce_axes(w.shape)
        refuse_non_finite("the l1 norm of a channel's weights, in float32,", norm)
        size = jnp.max(jnp.abs(w.astype(jnp.float32)), axis=axes, keepdims=True, initial=0.0)
        codes = jnp.maximum(jnp.asarray(largest, jnp.float32), 1.0)
        step = jnp.maximum(size / codes, norm / limit(w)) * (1.0 + np.float32(2.0**-22))
        ones = jnp.ones_like(step)
        zero = norm == 0
        return CompressState(
            AccumulatorBound(jnp.where(zero, ones, step), jnp.where(zero, ones, norm))
        )

    def parts(w, state):
        if not isinstance(state.learned, AccumulatorBound):
            raise ValueError("the state holds no norms: it was made by another compressor")
        scaled, step = normalized(w, state.learned)
        how = {"format": format, "granularity": where, "rounding": toward_zero}
        return scaled, QParams(step), how

    def apply(w, state):
        scaled, qparams, how = parts(w, state)
        return fake_quantize(scaled, qparams, **how).astype(w.dtype)

    def pack(w, state):
        refuse_non_finite("an array to pack", w, *state.learned)
        scaled, qparams, how = parts(w, state)
        return quantize(scaled, qparams, dtype=w.dtype, **how)

    return per_leaf(init, apply, pack=pack, maker=made_for(format, where))


def _l1_bound(accumulator_bits: Any, input_bits: Any, input_signed: bool) -> Any:
    # L = (2^(P-1) - 1) 2^(1[signed] - N)
    if isinstance(accumulator_bits, int) and isinstance(input_bits, int):
        bound = (2 ** (accumulator_bits - 1) - 1) * 2.0 ** (int(input_signed) - input_bits)
        if bound < 1:
            raise ValueError(
                f"accumulator_bits={accumulator_bits} holds no product of inputs of "
                f"{input_bits} bits; at least {input_bits + 2 - int(input_signed)} are needed"
            )
        return np.float32(bound)
    p, n = (jnp.asarray(b, jnp.float32) for b in (accumulator_bits, input_bits))
    return (jnp.exp2(p - 1) - 1) * jnp.exp2(float(input_signed) - n)


@jax.custom_jvp
def _with_l1_norm(v: Array, norm: Array, of: Array) -> Array:
    """v * norm / of, float32, where `of` is the l1 norm of each channel of v; 0 where that is 0."""
    return v * (norm * _inverse(of))


def _inverse(of: Array) -> Array:
    # 0 for a channel of zeros, NaN for one with NaN
    return jnp.where(of == 0, 0.0, 1.0 / jnp.where(of == 0, 1.0, of))


@_with_l1_norm.defjvp
def _with_l1_norm_jvp(primals, tangents):
    v, norm, of = primals
    dv, dnorm, _ = tangents  # the derivative by v takes in that of the norm
    axes = tuple(a for a in range(v.ndim) if of.shape[a] != v.shape[a])
    inverse = _inverse(of)
    along = jnp.sum(jnp.sign(v) * dv, axis=axes, keepdims=True)
    change = (dv - v * (along * inverse)) * (norm * inverse) + v * (dnorm * inverse)
    return _with_l1_norm(v, norm, of), change
