"""Pruning: criteria, schedules, masks."""

from jaxcompress.prune import entropy
from jaxcompress.prune.activity import apoz, binary_entropy, hrank, map_ranks, on_off_entropy
from jaxcompress.prune.entropy import activation_entropy
from jaxcompress.prune.filters import (
    afie,
    filter_norms,
    fpgm,
    slimming,
    slimming_masks,
    slimming_penalty,
)
from jaxcompress.prune.magnitude import magnitude
from jaxcompress.prune.optimizer import mask_gradients, masked_optimizer, project
from jaxcompress.prune.schedules import SparsitySchedule, cubic
from jaxcompress.prune.state import PruneState, masks, sparsity_of

__all__ = [
    "PruneState",
    "SparsitySchedule",
    "activation_entropy",
    "afie",
    "apoz",
    "binary_entropy",
    "cubic",
    "entropy",
    "filter_norms",
    "fpgm",
    "hrank",
    "magnitude",
    "map_ranks",
    "mask_gradients",
    "masked_optimizer",
    "masks",
    "on_off_entropy",
    "project",
    "slimming",
    "slimming_masks",
    "slimming_penalty",
    "sparsity_of",
]
