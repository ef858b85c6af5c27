"""Post-training quantization: (apply_fn, params, data, spec) -> (params, state)."""

from jaxcompress.quantize.ptq.adaptive_rounding import adaround
from jaxcompress.quantize.ptq.batch_norm import fold_batch_norm
from jaxcompress.quantize.ptq.bias import correct_bias
from jaxcompress.quantize.ptq.cross_layer_equalization import equalize
from jaxcompress.quantize.ptq.gptq_rounding import gptq
from jaxcompress.quantize.ptq.half_quadratic import hqq
from jaxcompress.quantize.ptq.leaf_specs import Spec, recipe
from jaxcompress.quantize.ptq.nearest import mse_clip, round_to_nearest
from jaxcompress.quantize.ptq.network_reconstruction import reconstruct
from jaxcompress.quantize.ptq.smooth import awq, smooth_quant

__all__ = [
    "Spec",
    "adaround",
    "awq",
    "correct_bias",
    "equalize",
    "fold_batch_norm",
    "gptq",
    "hqq",
    "mse_clip",
    "recipe",
    "reconstruct",
    "round_to_nearest",
    "smooth_quant",
]
