"""Pruning: criteria, scopes, structures, schedules, dynamic sparse training, smaller networks."""

from jaxcompress.prune import entropy
from jaxcompress.prune.activity import apoz, binary_entropy, hrank, map_ranks, on_off_entropy
from jaxcompress.prune.at_init import grasp, snip, synflow
from jaxcompress.prune.backward import backward_masks, sr_ste, ste, top_kast, top_kast_penalty
from jaxcompress.prune.cost_scope import cost_weighted
from jaxcompress.prune.coupled import group_masks, masked_groups
from jaxcompress.prune.criteria import filter_norm, movement, quantile, random, taylor, threshold
from jaxcompress.prune.dynamic import rigl, snfs, sparse_evolutionary, static_sparse
from jaxcompress.prune.entropy import activation_entropy
from jaxcompress.prune.filters import (
    afie,
    filter_norms,
    fpgm,
    slimming,
    slimming_masks,
    slimming_penalty,
)
from jaxcompress.prune.fisher import Surgery, fisher_diagonal, obd, obs
from jaxcompress.prune.given import fixed, masks_of_scores, scored
from jaxcompress.prune.group_obs import group_obs
from jaxcompress.prune.group_scores import gated, group_fisher, group_norms, group_taylor
from jaxcompress.prune.groups import channel_macs, choose_groups, group_macs, groups_for_macs
from jaxcompress.prune.lamp import lamp, lamp_scores
from jaxcompress.prune.magnitude import magnitude
from jaxcompress.prune.moments import reset_moments
from jaxcompress.prune.n_m import n_m
from jaxcompress.prune.optimizer import (
    dynamic_optimizer,
    hold,
    mask_gradients,
    masked_optimizer,
    pausing_optimizer,
    project,
)
from jaxcompress.prune.phases import ac_dc, alternating
from jaxcompress.prune.proximal import prox_group_lasso, prox_l1, proximal
from jaxcompress.prune.rewind import (
    Round,
    iterative,
    iterative_magnitude,
    nested_magnitude_masks,
    rewind_schedule,
    rewind_weights,
)
from jaxcompress.prune.schedules import (
    SparsitySchedule,
    constant,
    cubic,
    exponential,
    linear,
    one_shot,
)
from jaxcompress.prune.scope import Scope, Units, erk
from jaxcompress.prune.score import Criterion, by_score
from jaxcompress.prune.shrink import ShrinkReport, Shrunk, shrink
from jaxcompress.prune.soft import l0, l0_penalty, soft_threshold, without_noise
from jaxcompress.prune.soft_movement import soft_movement, soft_movement_penalty
from jaxcompress.prune.sparse_gpt import sparse_gpt
from jaxcompress.prune.state import PruneState, masks, sparsity_of
from jaxcompress.prune.structure import Structure, block, channel, head, unstructured
from jaxcompress.prune.wanda import wanda
from jaxcompress.prune.woodfisher import WoodFisher, compensate, woodfisher

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
