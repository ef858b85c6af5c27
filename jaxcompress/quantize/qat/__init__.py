"""Quantizers that are trained: steps, clips and scales learned beside the weights."""

from jaxcompress.quantize.qat.accumulator_aware import AccumulatorBound, a2q
from jaxcompress.quantize.qat.annealed import annealed_activations, annealed_bits
from jaxcompress.quantize.qat.dorefa_net import (
    dorefa,
    dorefa_activations,
    dorefa_gradients,
    quantized_gradient,
    quantized_gradients,
)
from jaxcompress.quantize.qat.ema import ema_ranges
from jaxcompress.quantize.qat.learned_activation_steps import (
    StepOffset,
    lsq_activations,
    lsq_plus_activations,
)
from jaxcompress.quantize.qat.learned_steps import LearnedStep, lsq, lsq_plus
from jaxcompress.quantize.qat.pact import ClipLevel, pact_activations
from jaxcompress.quantize.qat.signs import bitnet_b158, per_token, twn, xnor
from jaxcompress.quantize.qat.trained_ternary import TwoScales, ttq

__all__ = [
    "AccumulatorBound",
    "ClipLevel",
    "LearnedStep",
    "StepOffset",
    "TwoScales",
    "a2q",
    "annealed_activations",
    "annealed_bits",
    "bitnet_b158",
    "dorefa",
    "dorefa_activations",
    "dorefa_gradients",
    "ema_ranges",
    "lsq",
    "lsq_activations",
    "lsq_plus",
    "lsq_plus_activations",
    "pact_activations",
    "per_token",
    "quantized_gradient",
    "quantized_gradients",
    "ttq",
    "twn",
    "xnor",
]
