"""Distillation losses."""

from jaxcompress.distill.features import (
    attention_transfer,
    fitnets,
    hierarchical_context,
    vid,
    vid_variance,
)
from jaxcompress.distill.features_overhaul import ofd_margin, overhaul
from jaxcompress.distill.features_projectors import (
    Projector,
    conv_projector,
    linear_projector,
    mlp_projector,
)
from jaxcompress.distill.features_transformer import tinybert_attention, tinybert_hidden
from jaxcompress.distill.logits import kd
from jaxcompress.distill.relational import (
    cckd,
    cckd_bilinear,
    pkt,
    rkd_angle,
    rkd_distance,
    similarity_preserving,
)
from jaxcompress.distill.relational_attention import minilm_relation
from jaxcompress.distill.relational_contrast import (
    CRDMemory,
    CRDProjections,
    crd,
    crd_init,
    crd_negatives,
)

__all__ = ["kd"]
__all__ += [
    "CRDMemory",
    "CRDProjections",
    "Projector",
    "attention_transfer",
    "cckd",
    "cckd_bilinear",
    "conv_projector",
    "crd",
    "crd_init",
    "crd_negatives",
    "fitnets",
    "hierarchical_context",
    "linear_projector",
    "minilm_relation",
    "mlp_projector",
    "ofd_margin",
    "overhaul",
    "pkt",
    "rkd_angle",
    "rkd_distance",
    "similarity_preserving",
    "tinybert_attention",
    "tinybert_hidden",
    "vid",
    "vid_variance",
]
