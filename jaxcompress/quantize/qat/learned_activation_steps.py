"""Learned step sizes of activations, LSQ, and offsets too, LSQ+."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxcompress.core.packed import Grid
from jaxcompress.formats import Integer, QParams, clip_ste, integer, uniform_codes
from jaxcompress.formats.scales import finite, smallest_scale
from jaxcompress.quantize.fake_quantized_activations import ActivationQuantizer
from jaxcompress.quantize.qat.activation_quantizers import (
    Rule,
    features,
    learned_activations,
    mean_size,
)
from jaxcompress.quantize.qat.gradients import (
    offset_ste,
    positive,
    scale_gradient,
    step_gradient_factor,
)
from jaxcompress.quantize.qat.learned_steps import LearnedStep
from jaxcompress.quantize.ranges.clipping import mse
from jaxcompress.quantize.ranges.min_max import Calibrator, check_calibrator, min_max


def activation_format(name: str, bits: Any) -> Integer:
    """Codes 0 to 2**bits - 1; where an activation is signed its zero point is 2**(bits - 1)."""
    if isinstance(bits, int) and bits == 1:
        raise ValueError(f"{name}(bits): learned activations need 2 bits or more")
    return integer(bits, symmetric=False)


def zero_point(format: Integer, signed: Array) -> Array:
    """uint8: 2**(bits - 1) where signed, else 0."""
    half = jnp.asarray(2 ** (format.bits - 1), jnp.uint8)
    return jnp.where(signed, half, jnp.zeros_like(half))


def largest_code(format: Integer, signed: Array) -> Array:
    """Q_P, float32: the largest code with the zero point taken off."""
    top = jnp.asarray(format.bounds[1], jnp.float32)
    return top - zero_point(format, signed).astype(jnp.float32)


def lsq_activations(
    apply_fn: Callable[..., Any],
    bits: int | Mapping[str, int],
    *,
    sites: str = ".*",
    calibrate: Calibrator | None = None,
) -> ActivationQuantizer:
    """Every contraction's input on an integer grid whose step is learned, one per tensor.

    The equations and gradients are those of `lsq`. Codes are 0 to 2**bits - 1 where calibration
    saw no number below zero (after ReLU), else -2**(bits - 1) to 2**(bits - 1) - 1, stored with a
    zero point. N is the number of features: elements of one example. Steps start from
    2 mean|x| / sqrt(Q_P) of the inputs of `init`, or of all batches given to `observe`.

    Args:
      apply_fn: pure, (params, *inputs) -> outputs, or the `forward` of `train.make_step`.
      bits: 2 to 8, or {regex on the names of the contractions: bits}, of which the first that
        matches counts; traced numbers where no grid is shipped.
      sites: regex on the names of the contractions (the path of the weight they use).
      calibrate: `quantize.mse()`, say: steps start from the range it finds, not the paper's rule.

    Raises:
      ValueError: bits below 2; (at init) a regex matches nothing; NaN or Inf in an activation.

    Source: Esser et al. 2019, Learned Step Size Quantization, arXiv 1902.08153, section 2.

    >>> act = lsq_activations(lambda params, x: x @ params["w"], 4)
    >>> state = act.init({"w": jnp.ones((3, 2))}, jnp.ones((5, 3)))
    >>> print(state.learned["w"].step)  # 2 * 1 / sqrt(15)
    [[0.5163978]]
    """
    check_calibrator(calibrate)
    rule_of = lambda bits: _lsq_rule(bits, calibrate)
    return learned_activations(apply_fn, bits, rule_of, sites=sites)


def _lsq_rule(bits: Any, calibrate: Calibrator | None) -> Rule:
    format, smallest = activation_format("lsq_activations", bits), smallest_scale(jnp.float32)

    def start(moments, signed):
        top = largest_code(format, signed)
        if calibrate is None:
            step = mean_size(moments) * (2.0 * jax.lax.rsqrt(top))
        else:
            low, high = calibrate.range(moments.ranges, format)
            step = jnp.maximum(jnp.where(signed, -low / (top + 1.0), 0.0), high / top)
        return LearnedStep(jnp.where(mean_size(moments) == 0, jnp.ones_like(step), step))

    def qparams(learned, signed):
        return QParams(positive(learned.step, smallest), zero_point(format, signed))

    def snap(x, learned, signed):
        placed = qparams(learned, signed)
        factor = step_gradient_factor(features(x), largest_code(format, signed))
        return format.fake_quant(x, placed._replace(scale=scale_gradient(placed.scale, factor)))

    def grid(learned, signed):
        return Grid(qparams(learned, signed), format)

    return Rule(start, snap, grid, calibrate or min_max())


class StepOffset(NamedTuple):
    """What LSQ+ trains of an activation."""

    step: Array  # float32 [1, ..., 1]; max(|step|, the smallest float) is used
    offset: Array  # float32 [1, ..., 1], the low end; a whole number of steps is used


def lsq_plus_activations(
    apply_fn: Callable[..., Any],
    bits: int | Mapping[str, int],
    *,
    sites: str = ".*",
    calibrate: Calibrator | None = None,
) -> ActivationQuantizer:
    """`lsq_activations` with a learned offset beside each step, for activations such as swish.

    x^ = s round(clip((x - beta) / s, 0, Q_P)) + beta, Q_P = 2**bits - 1, with the gradients of
    `gradients.offset_ste`, both times 1 / sqrt(N Q_P). Here beta is rounded to a whole number of
    steps, -zero_point * s, and lies in [-Q_P s, 0]: so zero is exact, padding and masks too, and
    the grid ships as integers with a zero point. Rounding it is straight through; an offset
    outside that interval moves back only with the gradient of what is clipped.

    Args:
      apply_fn, bits, sites: as of `lsq_activations`.
      calibrate: finds the range that step and offset start from; default `mse()`, least squares.

    Source: Bhalgat et al. 2020, LSQ+, arXiv 2004.09576, section 3.
    """
    check_calibrator(calibrate)
    rule_of = lambda bits: _lsq_plus_rule(bits, calibrate or mse())
    return learned_activations(apply_fn, bits, rule_of, sites=sites)


def _lsq_plus_rule(bits: Any, calibrate: Calibrator) -> Rule:
    format, smallest = activation_format("lsq_plus_activations", bits), smallest_scale(jnp.float32)
    top = jnp.asarray(format.bounds[1], jnp.float32)

    def start(moments, signed):
        del signed
        found = format.qparams(*calibrate.range(moments.ranges, format))
        return StepOffset(found.scale, -found.zero_point.astype(jnp.float32) * found.scale)

    def qparams(learned):
        step = positive(learned.step, smallest)
        # zero point = clip(round(-beta / s), 0, Q_P)
        steps = jnp.round(-jax.lax.stop_gradient(learned.offset / step))
        return QParams(step, clip_ste(steps, 0.0, top).astype(jnp.uint8))

    def snap(x, learned, signed):
        del signed
        step, zero = qparams(learned)
        low = -zero.astype(jnp.float32)
        levels = uniform_codes(x, jax.lax.stop_gradient(step), low, low + top)
        factor = step_gradient_factor(features(x), top)
        step, offset = (scale_gradient(p, factor) for p in (step, learned.offset))
        return finite(offset_ste(x, step, offset, levels, low, low + top), x.dtype)

    def grid(learned, signed):
        del signed
        return Grid(qparams(learned), format)

    return Rule(start, snap, grid, calibrate)
