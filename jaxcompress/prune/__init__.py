"""Pruning: criteria, schedules, masks."""

from jaxcompress.prune.magnitude import PruneState, magnitude, masks, sparsity_of
from jaxcompress.prune.optimizer import mask_gradients, masked_optimizer, project
from jaxcompress.prune.schedules import SparsitySchedule, cubic

__all__ = [
    "PruneState",
    "SparsitySchedule",
    "cubic",
    "magnitude",
    "mask_gradients",
    "masked_optimizer",
    "masks",
    "project",
    "sparsity_of",
]
