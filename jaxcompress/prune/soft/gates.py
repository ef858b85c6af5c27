"""What pruning by learned gates and thresholds shares: shapes and packing."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxcompress.core.compressor import CompressState
from jaxcompress.core.packed import mask_leaf
from jaxcompress.prune.soft.proximal_operators import group_axes


def packing(apply: Callable[[Array, CompressState], Array]) -> Callable[..., Any]:
    """`pack` of one array from its `apply`: the view, its +0 left out where that is smaller."""

    def pack(w: Array, state: CompressState) -> Any:
        view = apply(w, state)
        return w if view is w else mask_leaf((view != 0) | jnp.signbit(view), view)

    return pack


def gate_values(w: Array, value: float, axis: int | tuple[int, ...] | None) -> Array:
    """float32 gates of one value: of w's shape, 1 along the axes that share them."""
    shape = _gate_shape(w.shape, axis)
    if shape == w.shape:
        return jnp.full_like(w, value, dtype=jnp.float32)  # keeps the sharding
    return jnp.full(shape, value, jnp.float32)


def weights_per_gate(shape: tuple[int, ...], axis: int | tuple[int, ...] | None) -> int:
    """How many weights of an array share a gate."""
    return math.prod(shape) // max(math.prod(_gate_shape(shape, axis)), 1)


def _gate_shape(shape: tuple[int, ...], axis: Any) -> tuple[int, ...]:
    own = set(range(len(shape))) if axis is None else group_axes(shape, axis)
    return tuple(n if a in own else 1 for a, n in enumerate(shape))
