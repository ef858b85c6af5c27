"""Quantizers whose grids are trained beside the weights."""

from jaxcompress.quantize.qat.activations import lsq_activations
from jaxcompress.quantize.qat.lsq import lsq

__all__ = ["lsq", "lsq_activations"]
