"""Learned clipping levels of activations: PACT."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxcompress.core.packed import Grid
from jaxcompress.formats import QParams, uniform_codes
from jaxcompress.formats.scales import finite, smallest_scale
from jaxcompress.quantize.fake_quantized_activations import ActivationQuantizer
from jaxcompress.quantize.qat.activation_quantizers import Rule, learned_activations, mean_size
from jaxcompress.quantize.qat.gradients import clip_level_ste, positive
from jaxcompress.quantize.qat.learned_activation_steps import (
    activation_format,
    largest_code,
    zero_point,
)


class ClipLevel(NamedTuple):
    """What PACT trains of an activation."""

    clip: Array  # float32 [1, ..., 1], alpha; max(|alpha|, the smallest float) is used


def pact_activations(
    apply_fn: Callable[..., Any],
    bits: int | Mapping[str, int],
    *,
    sites: str = ".*",
    initial: float | None = None,
) -> ActivationQuantizer:
    """Every contraction's input clipped at a learned level alpha, and on an integer grid below it.

    y = clip(x, 0, alpha), y_q = round(y Q_P / alpha) alpha / Q_P with Q_P = 2**bits - 1, and
    dy_q/dx = 1 where 0 <= x < alpha, else 0; dy_q/dalpha = 1 where x >= alpha, else 0.
    Where calibration saw numbers below zero, the grid is that of `lsq_activations` and both of its
    ends move with alpha. The paper decays alpha with the L2 of the weights: give the group
    "learned" of `train.label_learned` weight decay.

    Args:
      apply_fn, bits, sites: as of `lsq_activations`.
      initial: alpha at the start (the paper: about 10); None: the largest magnitude seen.

    Raises:
      ValueError: bits below 2, `initial` not positive; (at init) as `lsq_activations`.

    Source: Choi et al. 2018, PACT, arXiv 1805.06085, eq. 1 to 3.
    """
    if initial is not None and not initial > 0:
        raise ValueError(f"initial must be positive, got {initial}")
    return learned_activations(apply_fn, bits, lambda b: _pact_rule(b, initial), sites=sites)


def _pact_rule(bits: Any, initial: float | None) -> Rule:
    format = activation_format("pact_activations", bits)
    smallest = smallest_scale(jnp.float32) * 2**8

    def start(moments, signed):
        del signed
        top = jnp.maximum(moments.ranges.high, -moments.ranges.low)
        clip = jnp.where(top == 0, jnp.ones_like(top), top)
        clip = clip if initial is None else jnp.full_like(clip, initial)
        return ClipLevel(jnp.where(jnp.isnan(mean_size(moments)), jnp.nan, clip))

    def qparams(learned, signed):
        top = largest_code(format, signed)
        return QParams(positive(learned.clip, smallest) * (1.0 / top), zero_point(format, signed))

    def snap(x, learned, signed):
        scale, zero = qparams(learned, signed)
        low, high = -zero.astype(jnp.float32), largest_code(format, signed)
        levels = uniform_codes(x, jax.lax.stop_gradient(scale), low, high)
        clip = positive(learned.clip, smallest)
        return finite(clip_level_ste(x, clip, scale, levels, low, high), x.dtype)

    def grid(learned, signed):
        return Grid(qparams(learned, signed), format)

    return Rule(start, snap, grid)
