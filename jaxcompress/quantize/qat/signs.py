"""Weights of one sign or three values with a scale that is their mean, by their papers' names."""

import math

import jax
import jax.numpy as jnp
from jax import Array

from jaxcompress.core.compressor import Compressor
from jaxcompress.formats import binary, granularity_for, identity_ste, ternary, ternary_absmean
from jaxcompress.quantize.weights import weights


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
