"""Pruning: criteria, scopes, structures, schedules, masks."""

from jaxcompress.prune import entropy
from jaxcompress.prune.activity import apoz, binary_entropy, hrank, map_ranks, on_off_entropy
from jaxcompress.prune.cost_scope import cost_weighted
from jaxcompress.prune.criteria import filter_norm, movement, quantile, random, taylor, threshold
from jaxcompress.prune.entropy import activation_entropy
from jaxcompress.prune.filters import (
    afie,
    filter_norms,
    fpgm,
    slimming,
    slimming_masks,
    slimming_penalty,
)
from jaxcompress.prune.given import fixed, masks_of_scores, scored
from jaxcompress.prune.lamp import lamp, lamp_scores
from jaxcompress.prune.magnitude import magnitude
from jaxcompress.prune.n_m import n_m
from jaxcompress.prune.optimizer import mask_gradients, masked_optimizer, project
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
from jaxcompress.prune.sparse_gpt import sparse_gpt
from jaxcompress.prune.state import PruneState, masks, sparsity_of
from jaxcompress.prune.structure import Structure, block, channel, head, unstructured
from jaxcompress.prune.wanda import wanda

__all__ = [
    "Criterion",
    "PruneState",
    "Scope",
    "SparsitySchedule",
    "Structure",
    "Units",
    "activation_entropy",
    "afie",
    "apoz",
    "binary_entropy",
    "block",
    "by_score",
    "channel",
    "constant",
    "cost_weighted",
    "cubic",
    "entropy",
    "erk",
    "exponential",
    "filter_norm",
    "filter_norms",
    "fixed",
    "fpgm",
    "head",
    "hrank",
    "lamp",
    "lamp_scores",
    "linear",
    "magnitude",
    "map_ranks",
    "mask_gradients",
    "masked_optimizer",
    "masks",
    "masks_of_scores",
    "movement",
    "n_m",
    "on_off_entropy",
    "one_shot",
    "project",
    "quantile",
    "random",
    "scored",
    "slimming",
    "slimming_masks",
    "slimming_penalty",
    "sparse_gpt",
    "sparsity_of",
    "taylor",
    "threshold",
    "unstructured",
    "wanda",
]
