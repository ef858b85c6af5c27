"""Learned step sizes of weights: LSQ, and LSQ+ with its initial steps."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcompress.core.compressor import Compressor, CompressState, per_leaf
from jaxcompress.core.packed import fake_quantize, quantize
from jaxcompress.formats import Granularity, Integer, QParams, granularity_for, integer
from jaxcompress.formats.exact import exact_mean, unit_for
from jaxcompress.formats.scales import smallest_scale
from jaxcompress.quantize.fake_quantized_weights import made_for, qparams_of
from jaxcompress.quantize.qat.gradients import positive, scale_gradient, step_gradient_factor
from jaxcompress.quantize.ranges.min_max import Calibrator, check_calibrator, refuse_non_finite


class LearnedStep(NamedTuple):
    """What LSQ trains beside a weight. The step in use is max(|step|, the smallest of the dtype)"""

    step: Array  # float32, shape of the scales


def lsq(
    bits: int,
    *,
    axis: int | tuple[int, ...] | None = None,
    group: int | None = None,
    block: int | tuple[int, ...] | None = None,
    narrow: bool = False,
    from_bits: int | None = None,
    calibrate: Calibrator | None = None,
) -> Compressor:
    """Weights on an integer grid whose step is learned, in `CompressState.learned`.

    v^ = s round(clip(v / s, -Q_N, Q_P)), and the gradients
    dv^/dv = 1 where -Q_N <= v/s <= Q_P, else 0;
    dv^/ds = round(v/s) - v/s inside, -Q_N below, Q_P above, times g = 1 / sqrt(N Q_P),
    with N the weights that share a step. Steps start from 2 mean|v| / sqrt(Q_P), over the weights
    that are not zero (so that pruned ones do not shrink it); where all are zero, from 1.

    The step stays positive: its magnitude is used, not below the smallest of the dtype. Give
    learned steps an optimizer of their own with `train.label_learned`.

    Args:
      bits: 2 to 8; a traced number where nothing is packed.
      axis, group, block: which weights share a step, as in `quantize.weights`.
      narrow: leave out the lowest code, -Q_N = -Q_P; the paper's Q_N is Q_P + 1.
      from_bits: where bits change in training, those that the learned step is for; in use is
        sqrt(Q_P(from_bits) / Q_P(bits)) times it, as the step at the start would have it.
      calibrate: `quantize.mse()`, say: steps start from the range it finds, not the paper's rule.

    Raises:
      ValueError: bits below 2; (at init, eager) NaN or Inf in a leaf, with the path.

    Source: Esser et al. 2019, Learned Step Size Quantization, arXiv 1902.08153, eq. 1 to 5.

    >>> from jaxcompress.core import packed_bytes
    >>> comp = lsq(4, axis=-1)
    >>> params = {"kernel": jnp.ones((8, 2))}
    >>> packed_bytes(comp.pack(params, comp.init(params)))  # 16 codes of half a byte, two steps
    16
    """
    format, start = _format("lsq", bits, narrow), mean_size_step
    check_calibrator(calibrate)
    if calibrate is not None:
        first = format if from_bits is None else integer(from_bits, narrow=narrow)
        start = lambda w, where, _: qparams_of(w, first, where, calibrate=calibrate).scale
    return learned_steps(format, axis, group, block, start=start, from_bits=from_bits)


def lsq_plus(
    bits: int,
    *,
    axis: int | tuple[int, ...] | None = None,
    group: int | None = None,
    block: int | tuple[int, ...] | None = None,
    narrow: bool = False,
) -> Compressor:
    """`lsq` with the steps of LSQ+ at the start: max(|mean - 3 sigma|, |mean + 3 sigma|) / 2^(b-1).

    Weights have no offset in LSQ+; `lsq_plus_activations` learns one. Arguments as of `lsq`.
    Source: Bhalgat et al. 2020, LSQ+, arXiv 2004.09576, section 3.2.
    """
    format = _format("lsq_plus", bits, narrow)
    return learned_steps(format, axis, group, block, start=three_sigma_step)


def _format(name: str, bits: Any, narrow: bool) -> Integer:
    if isinstance(bits, int) and bits == 1:
        raise ValueError(f"{name}(bits): a learned step needs 2 bits or more; for 1 take xnor()")
    return integer(bits, narrow=narrow)


def learned_steps(
    format: Integer,
    axis: int | tuple[int, ...] | None = None,
    group: int | None = None,
    block: int | tuple[int, ...] | None = None,
    *,
    start: Callable[[Array, Granularity, Any], Array],
    from_bits: int | None = None,
) -> Compressor:
    """A Compressor with a learned step per block; start(w, where, Q_P) -> its first steps."""
    where = granularity_for(format, axis, group, block)
    largest = format.bounds[1]
    first = largest if from_bits is None else integer(from_bits).bounds[1]
    wider = None if from_bits is None else _widened(from_bits, format.bits)

    def qparams(w, state):
        if not isinstance(state.learned, LearnedStep):
            raise ValueError("the state holds no learned steps: it was made by another compressor")
        blocks = math.prod(where.scale_shape(w.shape))
        factor = step_gradient_factor(w.size // max(blocks, 1), largest)
        step = state.learned.step if wider is None else wider * state.learned.step
        step = positive(step, smallest_scale(w.dtype))
        return QParams(scale_gradient(step, factor))

    def init(w):
        refuse_non_finite("an array to quantize", w)
        step = start(w, where, jnp.maximum(jnp.asarray(first, jnp.float32), 1.0))
        return CompressState(learned=LearnedStep(step))

    def apply(w, state):
        return fake_quantize(w, qparams(w, state), format=format, granularity=where)

    def pack(w, state):
        refuse_non_finite("an array to pack", w, state.learned.step)
        return quantize(w, qparams(w, state), format=format, granularity=where)

    # Steps that are for `from_bits` serve any width.
    stored = format if from_bits is None else integer(from_bits)
    return per_leaf(init, apply, pack=pack, maker=made_for(stored, where))


def _widened(from_bits: int, bits: Any) -> Any:
    # sqrt(Q_P(from_bits) / Q_P(bits)); from a table, so that traced bits give the same number
    codes = np.maximum(2.0 ** (np.arange(9) - 1) - 1, 1.0)
    table = np.sqrt(codes[from_bits] / codes).astype(np.float32)
    return table[bits] if isinstance(bits, int) else jnp.take(jnp.asarray(table), bits)


def mean_size_step(w: Array, where: Granularity, largest: Array) -> Array:
    """2 mean|w| / sqrt(Q_P) of each block's numbers that are not zero; 1 where all are zero."""
    size, axes = jnp.abs(_blocked(w, where)), where.reduce_axes(w.shape)
    count = jnp.sum(size != 0, axis=axes, keepdims=True, dtype=jnp.int32).astype(jnp.float32)
    mean = exact_mean(size, count, axes=axes)
    step = jnp.minimum(mean * (2.0 * jax.lax.rsqrt(largest)), float(jnp.finfo(jnp.float32).max))
    return jnp.where(count == 0, jnp.ones_like(step), step)


def three_sigma_step(w: Array, where: Granularity, largest: Array) -> Array:
    """max(|mean - 3 sigma|, |mean + 3 sigma|) / (Q_P + 1) of each block; 1 where it is zero.

    Over Q_P where all numbers are equal: the grid then holds them.
    """
    x, axes = _blocked(w, where), where.reduce_axes(w.shape)
    blocks = math.prod(where.scale_shape(w.shape))
    valid = where.valid(w.shape)
    count = jnp.full((1,) * x.ndim, float(max(w.size // max(blocks, 1), 1)), jnp.float32)
    if valid is not None:
        kept = jnp.broadcast_to(valid, x.shape)
        count = jnp.sum(kept, axis=axes, keepdims=True, dtype=jnp.int32).astype(jnp.float32)
    # In units of a power of two: sums and squares of the largest numbers overflow.
    low, high = (end(x, axis=axes, keepdims=True, initial=0.0) for end in (jnp.min, jnp.max))
    up, down = unit_for(jnp.maximum(-low, high))
    x = x * up
    above = exact_mean(jnp.maximum(x, 0.0), count, axes=axes)
    below = exact_mean(jnp.maximum(-x, 0.0), count, axes=axes)
    mean = above - below
    spread = jnp.square(x - mean)
    spread = spread if valid is None else jnp.where(valid, spread, 0.0)
    sigma = jnp.sqrt(exact_mean(spread, count, axes=axes))
    # Equal numbers have no sigma, and the grid may have a code less above zero than below.
    inside = jnp.ones((1,) * x.ndim, bool) if valid is None else valid
    least = jnp.min(jnp.where(inside, x, jnp.inf), axis=axes, keepdims=True, initial=jnp.inf)
    most = jnp.max(jnp.where(inside, x, -jnp.inf), axis=axes, keepdims=True, initial=-jnp.inf)
    codes = jnp.where(least == most, largest, largest + 1.0)
    step = (jnp.abs(mean) + np.float32(3.0) * sigma) / codes * down
    return jnp.where(step == 0, jnp.ones_like(step), step)


def _blocked(w: Array, where: Granularity) -> Array:
    # float32; the padding of a ragged block is zero
    return where.split(w).astype(jnp.float32)
