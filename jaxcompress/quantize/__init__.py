"""Quantization of weights and activations."""

from jaxcompress.quantize.activations import (
    ActivationQuantizer,
    activations,
    calibrate_activations,
    with_activations,
)
from jaxcompress.quantize.calibrate import Calibrator, MinMax, min_max, moving_average
from jaxcompress.quantize.clipping import kl, mse, octav, percentile
from jaxcompress.quantize.weights import fake_quant, weights

__all__ = [
    "ActivationQuantizer",
    "Calibrator",
    "MinMax",
    "activations",
    "calibrate_activations",
    "fake_quant",
    "kl",
    "min_max",
    "moving_average",
    "mse",
    "octav",
    "percentile",
    "weights",
    "with_activations",
]
