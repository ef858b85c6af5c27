"""Quantizers that are trained: steps, clips and scales learned beside the weights."""

from jaxcompress.quantize.qat.a2q import AccumulatorBound, a2q
from jaxcompress.quantize.qat.annealed import annealed_activations, annealed_bits
from jaxcompress.quantize.qat.dorefa import (
    dorefa,
    dorefa_activations,
    dorefa_gradients,
    quantized_gradient,
    quantized_gradients,
)
from jaxcompress.quantize.qat.ema import ema_ranges
from jaxcompress.quantize.qat.lsq import LearnedStep, lsq, lsq_plus
from jaxcompress.quantize.qat.lsq_activations import (
    StepOffset,
    lsq_activations,
    lsq_plus_activations,
)
from jaxcompress.quantize.qat.pact import ClipLevel, pact_activations
from jaxcompress.quantize.qat.signs import bitnet_b158, per_token, twn, xnor
from jaxcompress.quantize.qat.ttq import TwoScales, ttq

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
