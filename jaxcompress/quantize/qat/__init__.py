"""Quantizers that are trained: steps, clips and scales learned beside the weights."""

from jaxcompress.quantize.qat.lsq import LearnedStep, lsq, lsq_plus
from jaxcompress.quantize.qat.lsq_activations import lsq_activations

__all__ = [
    "LearnedStep",
    "lsq",
    "lsq_activations",
    "lsq_plus",
]
