"""Weights of one sign or three values with a scale that is their mean, by their papers' names."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxcompress.core.compressor import Compressor
from jaxcompress.formats import (
    binary,
    granularity_for,
    identity_ste,
    integer,
    ternary,
    ternary_absmean,
)
from jaxcompress.graph import trace, walk
from jaxcompress.quantize.fake_quantized_activations import chosen_taps
from jaxcompress.quantize.fake_quantized_weights import weights
from jaxcompress.quantize.ranges.min_max import extremes, known


def twn(*, axis: int | tuple[int, ...] | None = None, group: int | None = None) -> Compressor:
    """Ternary Weight Networks: alpha sign(w) where |w| > 0.7 mean|w|, alpha the mean there.

    The derivative is 1 everywhere. `quantize.weights(formats.ternary())` with that said.
    Source: Li et al. 2016, Ternary Weight Networks, arXiv 1605.04711.
    """
    return weights(ternary(), axis=axis, group=group, ste=identity_ste)


def bitnet_b158(*, axis: int | tuple[int, ...] | None = None) -> Compressor:
    """BitNet b1.58: gamma clip(round(w / gamma), -1, 1) with gamma = mean|w|, derivative 1.

    Source: Ma et al. 2024, The Era of 1-bit LLMs, arXiv 2402.17764, eq. 1 to 3.
    """
    return weights(ternary_absmean(), axis=axis, ste=identity_ste)


def per_token(
    apply_fn: Callable[..., Any], *, bits: Any = 8, sites: str = ".*"
) -> Callable[..., Any]:
    """`apply_fn` with every contraction's input rounded to qmax levels a side of each token's own.

    x^ = round(qmax x / max|x|) max|x| / qmax, qmax = 2**(bits - 1) - 1, the maximum over the last
    axis; derivative 1. The scales are found anew for each input, so there is no state. BitNet's
    activations, at 8 bits.

    Args:
      apply_fn: pure, (params, *inputs) -> outputs, whose contractions run over last axes.
      bits: 2 to 8; may be traced.
      sites: regex on the names of the contractions (the path of the weight they use).

    Source: Ma et al. 2024, The Era of 1-bit LLMs, arXiv 2402.17764, section 2.
    """
    format = integer(bits)

    def snap(x):
        fixed = jax.lax.stop_gradient(x)
        found = extremes(fixed, axes=(x.ndim - 1,))
        ends = (known(end, found) for end in (found.low, found.high))
        return identity_ste(x, format.fake_quant(fixed, format.qparams(*ends, dtype=x.dtype)))

    walked = walk(apply_fn, lambda tap, x, state: (snap(x), state))

    def quantized(params, *inputs):
        chosen = chosen_taps(trace(apply_fn, params, *inputs), sites)
        return walked({tap.name: () for tap in chosen}, params, *inputs)[0]

    return quantized


def xnor(*, axis: int | tuple[int, ...] | None = -1, group: int | None = None) -> Compressor:
    """XNOR-Net's binary weights: alpha sign(w) with alpha = mean|w| per filter, sign(0) = +1.

    dL/dw = (1/n + alpha 1[|w| <= 1]) dL/dw_q, n weights sharing alpha: the derivative of the mean
    by its own weight, and the clipped straight-through one of the sign.

    Source: Rastegari et al. 2016, XNOR-Net, arXiv 1603.05279, section 3.1.
    """
    where = granularity_for(binary(), axis, group)

    def ste(w, value):
        count = w.size // max(math.prod(where.scale_shape(w.shape)), 1)
        return _binary_ste(w, jax.lax.stop_gradient(value), jnp.float32(1.0 / max(count, 1)))

    return weights(binary(), axis=axis, group=group, ste=ste)


@jax.custom_jvp
def _binary_ste(w: Array, value: Array, share: Array) -> Array:
    del w, share
    return value


@_binary_ste.defjvp
def _binary_ste_jvp(primals, tangents):
    w, value, share = primals
    alpha = jnp.abs(value).astype(jnp.float32)
    slope = share + jnp.where(jnp.abs(w) <= 1, alpha, 0.0)
    return value, (slope * tangents[0].astype(jnp.float32)).astype(value.dtype)
