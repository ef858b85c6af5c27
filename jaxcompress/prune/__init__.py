"""Pruning: criteria, schedules, masks."""

from jaxcompress.prune.magnitude import magnitude
from jaxcompress.prune.optimizer import mask_gradients, masked_optimizer, project
from jaxcompress.prune.schedules import SparsitySchedule, cubic
from jaxcompress.prune.state import PruneState, masks, sparsity_of

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
