"""Post-training quantization: (apply_fn, params, data, spec) -> (params, state)."""

from jaxcompress.quantize.ptq.adaround import adaround
from jaxcompress.quantize.ptq.bias import correct_bias
from jaxcompress.quantize.ptq.gptq import gptq
from jaxcompress.quantize.ptq.hqq import hqq
from jaxcompress.quantize.ptq.nearest import mse_clip, round_to_nearest
from jaxcompress.quantize.ptq.spec import Spec, recipe

__all__ = [
    "Spec",
    "adaround",
    "correct_bias",
    "gptq",
    "hqq",
    "mse_clip",
    "recipe",
    "round_to_nearest",
]
