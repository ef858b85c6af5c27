"""Distillation: losses on logits, features and relations."""

from jaxcompress.distill.correlation import dist
from jaxcompress.distill.curriculum import ctkd_temperature, ctkd_weight
from jaxcompress.distill.divergences import (
    generalized_jsd,
    reverse_kd,
    reverse_skew_kd,
    skew_kd,
)
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
from jaxcompress.distill.logits import dkd, kd, nkd, standardize_logits, top_k_kd
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

__all__ = [
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
    "ctkd_temperature",
    "ctkd_weight",
    "dist",
    "dkd",
    "fitnets",
    "generalized_jsd",
    "hierarchical_context",
    "kd",
    "linear_projector",
    "minilm_relation",
    "mlp_projector",
    "nkd",
    "ofd_margin",
    "overhaul",
    "pkt",
    "reverse_kd",
    "reverse_skew_kd",
    "rkd_angle",
    "rkd_distance",
    "similarity_preserving",
    "skew_kd",
    "standardize_logits",
    "tinybert_attention",
    "tinybert_hidden",
    "top_k_kd",
    "vid",
    "vid_variance",
]
