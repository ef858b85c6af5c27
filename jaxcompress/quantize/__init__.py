"""Quantization of weights and activations."""

from jaxcompress.quantize.activations import (
    ActivationQuantizer,
    activations,
    calibrate_activations,
    with_activations,
)
from jaxcompress.quantize.calibrate import Calibrator, MinMax, min_max
from jaxcompress.quantize.weights import fake_quant, weights

__all__ = [
    "ActivationQuantizer",
    "Calibrator",
    "MinMax",
    "activations",
    "calibrate_activations",
    "fake_quant",
    "min_max",
    "weights",
    "with_activations",
]
