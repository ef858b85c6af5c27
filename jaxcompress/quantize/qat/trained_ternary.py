"""Ternary weights with two learned scales: TTQ."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxcompress.core.compressor import Compressor, CompressState, per_leaf
from jaxcompress.core.packed import fake_quantize, quantize
from jaxcompress.formats import TernaryScales, granularity_for, ternary_ttq
from jaxcompress.formats.scales import smallest_scale
from jaxcompress.quantize.fake_quantized_weights import made_for, qparams_of
from jaxcompress.quantize.qat.gradients import positive
from jaxcompress.quantize.ranges.min_max import refuse_non_finite


class TwoScales(NamedTuple):
    """What TTQ trains beside a weight; magnitudes are used, never zero."""

    scale: Array  # float32, shape of the scales: W^p
    negative: Array  # float32, shape of the scales: W^n


def ttq(
    *,
    axis: int | tuple[int, ...] | None = None,
    group: int | None = None,
    block: int | tuple[int, ...] | None = None,
) -> Compressor:
    """Weights W^p, 0 or -W^n with both scales learned, and the threshold 0.05 max|w|.

    dL/dW^p = sum over w > threshold of dL/dw_q, dL/dW^n = -sum over w < -threshold of it (the
    derivatives; the paper writes the second without its sign, for a scale that is subtracted);
    dL/dw = W^p, 1 or W^n times dL/dw_q above, between and below the thresholds. Scales start from
    the mean magnitudes above and below; thresholds are buffers, which `update` renews. 1.6 bits
    per weight.

    Args:
      axis, group, block: which weights share scales and threshold, as in `quantize.weights`.

    Source: Zhu et al. 2016, Trained Ternary Quantization, arXiv 1612.01064, eq. 6 to 9.
    """
    format = ternary_ttq()
    where = granularity_for(format, axis, group, block)

    def init(w):
        found = qparams_of(w, format, where)
        ones = jnp.ones_like(found.scale)
        used = lambda side: jnp.where(side > 0, side, ones)
        learned = TwoScales(used(found.scale), used(found.negative))
        return CompressState(learned, found.threshold)

    def qparams(w, state):
        if not isinstance(state.learned, TwoScales):
            raise ValueError("the state holds no two scales: it was made by another compressor")
        smallest = smallest_scale(w.dtype)
        scale, negative = (positive(side, smallest) for side in state.learned)
        return TernaryScales(scale, negative, state.buffers)

    def apply(w, state):
        found = qparams(w, state)
        value = fake_quantize(
            jax.lax.stop_gradient(w),
            jax.lax.stop_gradient(found),
            format=format,
            granularity=where,
        )
        above, below = (where.expand(side, w.shape) for side in (found.scale, found.negative))
        return _two_scales_ste(w, above, below, value)

    def update(w, state, *, grads=None, **extra):
        del grads, extra
        return state._replace(buffers=qparams_of(w, format, where).threshold)

    def pack(w, state):
        refuse_non_finite("an array to pack", w, *state.learned)
        return quantize(w, qparams(w, state), format=format, granularity=where)

    maker = made_for(format, where)
    return per_leaf(init, apply, update=update, pack=pack, maker=maker)


@jax.custom_jvp
def _two_scales_ste(x: Array, scale: Array, negative: Array, value: Array) -> Array:
    """`value`, which is scale, 0 or -negative, with the derivatives of TTQ."""
    del x, scale, negative
    return value


@_two_scales_ste.defjvp
def _two_scales_ste_jvp(primals, tangents):
    _, scale, negative, value = primals
    dx, dscale, dnegative = (t.astype(jnp.float32) for t in tangents[:3])
    up, down = value > 0, value < 0
    slope = jnp.where(up, scale, jnp.where(down, negative, 1.0))
    change = slope * dx + jnp.where(up, dscale, jnp.where(down, -dnegative, 0.0))
    return value, change.astype(value.dtype)
