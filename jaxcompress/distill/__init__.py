"""Distillation losses."""

from jaxcompress.distill.correlation import dist
from jaxcompress.distill.curriculum import ctkd_temperature, ctkd_weight
from jaxcompress.distill.divergences import (
    generalized_jsd,
    reverse_kd,
    reverse_skew_kd,
    skew_kd,
)
from jaxcompress.distill.logits import dkd, kd, nkd, standardize_logits, top_k_kd

__all__ = [
    "ctkd_temperature",
    "ctkd_weight",
    "dist",
    "dkd",
    "generalized_jsd",
    "kd",
    "nkd",
    "reverse_kd",
    "reverse_skew_kd",
    "skew_kd",
    "standardize_logits",
    "top_k_kd",
]
