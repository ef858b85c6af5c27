"""Quantization of weights and activations."""

from jaxcompress.quantize.activations import (
    ActivationQuantizer,
    activations,
    calibrate_activations,
    with_activations,
)
from jaxcompress.quantize.calibrate import Calibrator, MinMax, min_max, moving_average
from jaxcompress.quantize.clipping import kl, mse, octav, percentile
from jaxcompress.quantize.integer import (
    IntegerProgram,
    assert_integer_only,
    differing_codes,
    float_operations,
    integer_only,
)
from jaxcompress.quantize.ptq import (
    Spec,
    adaround,
    awq,
    correct_bias,
    equalize,
    fold_batch_norm,
    gptq,
    hqq,
    mse_clip,
    recipe,
    reconstruct,
    round_to_nearest,
    smooth_quant,
)
from jaxcompress.quantize.qat import LearnedStep, lsq, lsq_activations, lsq_plus
from jaxcompress.quantize.weights import fake_quant, weights

__all__ = [
    "ActivationQuantizer",
    "Calibrator",
    "IntegerProgram",
    "LearnedStep",
    "MinMax",
    "Spec",
    "activations",
    "adaround",
    "assert_integer_only",
    "awq",
    "calibrate_activations",
    "correct_bias",
    "differing_codes",
    "equalize",
    "fake_quant",
    "float_operations",
    "fold_batch_norm",
    "gptq",
    "hqq",
    "integer_only",
    "kl",
    "lsq",
    "lsq_activations",
    "lsq_plus",
    "min_max",
    "moving_average",
    "mse",
    "mse_clip",
    "octav",
    "percentile",
    "recipe",
    "reconstruct",
    "round_to_nearest",
    "smooth_quant",
    "weights",
    "with_activations",
]
