"""Pruning: criteria, scopes, structures, schedules, dynamic sparse training, smaller networks."""

from jaxcompress.prune.channels import entropies as entropy
from jaxcompress.prune.channels.activity import (
    apoz,
    binary_entropy,
    hrank,
    map_ranks,
    on_off_entropy,
)
from jaxcompress.prune.channels.choose import (
    channel_macs,
    choose_groups,
    group_macs,
    groups_for_macs,
)
from jaxcompress.prune.channels.coupled import group_masks, masked_groups
from jaxcompress.prune.channels.entropies import activation_entropy
from jaxcompress.prune.channels.filters import (
    afie,
    filter_norms,
    fpgm,
    slimming,
    slimming_masks,
    slimming_penalty,
)
from jaxcompress.prune.channels.gate_scores import gated, group_fisher, group_norms, group_taylor
from jaxcompress.prune.channels.least_squares import group_obs
from jaxcompress.prune.channels.smaller_networks import ShrinkReport, Shrunk, shrink
from jaxcompress.prune.from_calibration.sparsegpt import sparse_gpt
from jaxcompress.prune.from_calibration.wanda_masks import wanda
from jaxcompress.prune.masking.cost_weighting import cost_weighted
from jaxcompress.prune.masking.given_masks import fixed, masks_of_scores, scored
from jaxcompress.prune.masking.magnitudes import magnitude
from jaxcompress.prune.masking.mask_state import PruneState, masks, sparsity_of
from jaxcompress.prune.masking.n_to_m import n_m
from jaxcompress.prune.masking.schedules import (
    SparsitySchedule,
    constant,
    cubic,
    exponential,
    linear,
    one_shot,
)
from jaxcompress.prune.masking.scopes_of_comparison import Scope, Units, erk
from jaxcompress.prune.masking.scored import Criterion, by_score
from jaxcompress.prune.masking.structures import Structure, block, channel, head, unstructured
from jaxcompress.prune.saliency.at_init import grasp, snip, synflow
from jaxcompress.prune.saliency.block_fisher import WoodFisher, compensate, woodfisher
from jaxcompress.prune.saliency.criteria import (
    filter_norm,
    movement,
    quantile,
    random,
    taylor,
    threshold,
)
from jaxcompress.prune.saliency.layer_adaptive import lamp, lamp_scores
from jaxcompress.prune.saliency.second_order import Surgery, fisher_diagonal, obd, obs
from jaxcompress.prune.soft.movement_gates import soft_movement, soft_movement_penalty
from jaxcompress.prune.soft.proximal_operators import prox_group_lasso, prox_l1, proximal
from jaxcompress.prune.soft.thresholds import l0, l0_penalty, soft_threshold, without_noise
from jaxcompress.prune.sparse_training.backward import (
    backward_masks,
    sr_ste,
    ste,
    top_kast,
    top_kast_penalty,
)
from jaxcompress.prune.sparse_training.dense_and_sparse import ac_dc, alternating
from jaxcompress.prune.sparse_training.dynamic import rigl, snfs, sparse_evolutionary, static_sparse
from jaxcompress.prune.sparse_training.lottery_tickets import (
    Round,
    iterative,
    iterative_magnitude,
    nested_magnitude_masks,
    rewind_schedule,
    rewind_weights,
)
from jaxcompress.prune.sparse_training.moments import reset_moments
from jaxcompress.prune.sparse_training.optimizers import (
    dynamic_optimizer,
    hold,
    mask_gradients,
    masked_optimizer,
    pausing_optimizer,
    project,
)

__all__ = [
    "Criterion",
    "PruneState",
    "Round",
    "Scope",
    "ShrinkReport",
    "Shrunk",
    "SparsitySchedule",
    "Structure",
    "Surgery",
    "Units",
    "WoodFisher",
    "ac_dc",
    "activation_entropy",
    "afie",
    "alternating",
    "apoz",
    "backward_masks",
    "binary_entropy",
    "block",
    "by_score",
    "channel",
    "channel_macs",
    "choose_groups",
    "compensate",
    "constant",
    "cost_weighted",
    "cubic",
    "dynamic_optimizer",
    "entropy",
    "erk",
    "exponential",
    "filter_norm",
    "filter_norms",
    "fisher_diagonal",
    "fixed",
    "fpgm",
    "gated",
    "grasp",
    "group_fisher",
    "group_macs",
    "group_masks",
    "group_norms",
    "group_obs",
    "group_taylor",
    "groups_for_macs",
    "head",
    "hold",
    "hrank",
    "iterative",
    "iterative_magnitude",
    "l0",
    "l0_penalty",
    "lamp",
    "lamp_scores",
    "linear",
    "magnitude",
    "map_ranks",
    "mask_gradients",
    "masked_groups",
    "masked_optimizer",
    "masks",
    "masks_of_scores",
    "movement",
    "n_m",
    "nested_magnitude_masks",
    "obd",
    "obs",
    "on_off_entropy",
    "one_shot",
    "pausing_optimizer",
    "project",
    "prox_group_lasso",
    "prox_l1",
    "proximal",
    "quantile",
    "random",
    "reset_moments",
    "rewind_schedule",
    "rewind_weights",
    "rigl",
    "scored",
    "shrink",
    "slimming",
    "slimming_masks",
    "slimming_penalty",
    "snfs",
    "snip",
    "soft_movement",
    "soft_movement_penalty",
    "soft_threshold",
    "sparse_evolutionary",
    "sparse_gpt",
    "sparsity_of",
    "sr_ste",
    "static_sparse",
    "ste",
    "synflow",
    "taylor",
    "threshold",
    "top_kast",
    "top_kast_penalty",
    "unstructured",
    "wanda",
    "without_noise",
    "woodfisher",
]
