"""Distillation: losses on logits, features and relations; teachers and their outputs on disk."""

from jaxcompress.distill.correlation import dist
from jaxcompress.distill.curriculum import ctkd_temperature, ctkd_weight
from jaxcompress.distill.divergences import (
    generalized_jsd,
    reverse_kd,
    reverse_skew_kd,
    skew_kd,
)
from jaxcompress.distill.features.feature_losses import (
    attention_transfer,
    fitnets,
    hierarchical_context,
    vid,
    vid_variance,
)
from jaxcompress.distill.features.feature_taps import linen_features, nnx_features
from jaxcompress.distill.features.overhaul import ofd_margin, overhaul
from jaxcompress.distill.features.projectors import (
    Projector,
    conv_projector,
    linear_projector,
    mlp_projector,
)
from jaxcompress.distill.features.transformer import tinybert_attention, tinybert_hidden
from jaxcompress.distill.logits import dkd, kd, nkd, standardize_logits, top_k_kd
from jaxcompress.distill.relations.attention_relations import minilm_relation
from jaxcompress.distill.relations.contrast import (
    CRDMemory,
    CRDProjections,
    crd,
    crd_init,
    crd_negatives,
)
from jaxcompress.distill.relations.relational import (
    cckd,
    cckd_bilinear,
    pkt,
    rkd_angle,
    rkd_distance,
    similarity_preserving,
)
from jaxcompress.distill.teachers.ensembles import (
    Teacher,
    average_logits,
    average_probabilities,
    born_again,
    ensemble,
    ensemble_of,
    mean_teacher,
    product_of_experts,
    stack_members,
    teacher_assistants,
)
from jaxcompress.distill.teachers.mutual import (
    joint_students,
    mutual_kd,
    mutual_loss,
    stacked_students,
)
from jaxcompress.distill.teachers.output_cache import (
    CachedOutputs,
    augment_examples,
    cached_outputs,
)
from jaxcompress.distill.teachers.output_storage import Dense, TopK

__all__ = [
    "CRDMemory",
    "CRDProjections",
    "CachedOutputs",
    "Dense",
    "Projector",
    "Teacher",
    "TopK",
    "attention_transfer",
    "augment_examples",
    "average_logits",
    "average_probabilities",
    "born_again",
    "cached_outputs",
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
    "ensemble",
    "ensemble_of",
    "fitnets",
    "generalized_jsd",
    "hierarchical_context",
    "joint_students",
    "kd",
    "linear_projector",
    "linen_features",
    "mean_teacher",
    "minilm_relation",
    "mlp_projector",
    "mutual_kd",
    "mutual_loss",
    "nkd",
    "nnx_features",
    "ofd_margin",
    "overhaul",
    "pkt",
    "product_of_experts",
    "reverse_kd",
    "reverse_skew_kd",
    "rkd_angle",
    "rkd_distance",
    "similarity_preserving",
    "skew_kd",
    "stack_members",
    "stacked_students",
    "standardize_logits",
    "teacher_assistants",
    "tinybert_attention",
    "tinybert_hidden",
    "top_k_kd",
    "vid",
    "vid_variance",
]
