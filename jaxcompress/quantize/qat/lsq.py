"""Learned step size quantization of weights."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxcompress.core.compressor import Compressor, CompressState, is_absent, per_leaf
from jaxcompress.core.packed import fake_quantize, quantize
from jaxcompress.formats import granularity_for
from jaxcompress.formats.scales import QParams
from jaxcompress.quantize.calibrate import (
    Calibrator,
    check_calibrator,
    range_of,
    refuse_non_finite,
)
from jaxcompress.quantize.qat.steps import (
    elements_per_scale,
    first_step,
    gradient_factor,
    highest_code,
    positive,
    scale_gradient,
    trainable_grid,
)


def lsq(
    bits: Any,
    *,
    axis: int | tuple[int, ...] | None = None,
    group: int | None = None,
    block: int | tuple[int, ...] | None = None,
    calibrate: Calibrator | None = None,
) -> Compressor:
    """Integers whose step sizes are trained beside the weights, LSQ.

    v_hat = s round(clip(v / s, -Q_N, Q_P)), Q_N = 2**(bits - 1), Q_P = Q_N - 1. The gradient by v
    is 1 inside the range and 0 outside; by s it is round(v / s) - v / s inside and the bound
    outside, times 1 / sqrt(N Q_P) with N weights per step. Steps lie in `CompressState.learned`,
    float32, where Optax finds them; |s| counts, so that they stay positive.

    Args:
      bits: 2 to 8; a traced number where only the view is needed.
      axis, group, block: which weights share a step, as in `quantize.weights`.
      calibrate: where steps start: from the range that it finds, `mse()` say. Default: the rule of
        the paper, 2 mean|v| / sqrt(Q_P).

    Raises:
      ValueError: bits outside 2 to 8; (at init) NaN or Inf in a leaf, with the path.

    Source: Esser et al. 2019, Learned Step Size Quantization, arXiv 1902.08153, eq. 1 to 3.

    >>> comp = lsq(4)
    >>> state = comp.init({"kernel": jnp.array([0.5, -0.5])})
    >>> print(state.learned["kernel"])  # 2 * 0.5 / sqrt(7)
    [0.37796447]
    """
    format = trainable_grid(bits)
    check_calibrator(calibrate)
    where = granularity_for(format, axis, group, block)
    highest = highest_code(bits)

    def init(w):
        refuse_non_finite("an array to quantize", w)
        blocked, axes = where.split(w), where.reduce_axes(w.shape)
        valid = where.valid(w.shape)
        if calibrate is None:
            count = elements_per_scale(w.shape, where.scale_shape(w.shape))
            total = jnp.sum(jnp.abs(blocked.astype(jnp.float32)), axes, keepdims=True, where=valid)
            return CompressState(learned=first_step(total / max(count, 1), highest))
        low, high = range_of(calibrate, blocked, format, axes=axes, where=valid)
        return CompressState(learned=format.qparams(low, high, dtype=w.dtype).scale)

    def qparams(w: Array, state: CompressState) -> QParams:
        if is_absent(state.learned):
            raise ValueError("the state holds no step sizes: it was made by another compressor")
        count = elements_per_scale(w.shape, where.scale_shape(w.shape))
        step = scale_gradient(positive(state.learned), gradient_factor(count, highest))
        return QParams(step)

    def apply(w, state):
        return fake_quantize(w, qparams(w, state), format=format, granularity=where)

    def pack(w, state):
        refuse_non_finite("an array to pack", w)
        return quantize(w, qparams(w, state), format=format, granularity=where)

    return per_leaf(init, apply, pack=pack)
