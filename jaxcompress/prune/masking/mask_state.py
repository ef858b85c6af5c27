"""Masks: the state that pruning methods share, and what they do with it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxcompress.core.compressor import CompressState, holds, is_float_array
from jaxcompress.core.packed import Masked, is_packed, kept, mask_leaf, unpack
from jaxcompress.core.paths import leaves_with_paths


class PruneState(NamedTuple):
    """Masks with the params' structure (True keeps; 0-d True: the leaf is dense), and the step.

    `stats` is what a criterion gathers over the steps, `()` if it gathers nothing.
    """

    masks: Any
    step: Array  # int32 []
    stats: Any = ()


def prunable(w: Any, min_ndim: int = 2) -> bool:
    """Whether a leaf is an array of floats with at least `min_ndim` axes."""
    return is_float_array(w) and len(w.shape) >= min_ndim


def check_owner(state: CompressState) -> None:
    """Raises ValueError unless the state holds masks."""
    if not isinstance(state.buffers, PruneState):
        raise ValueError("the state holds no masks: it was made by another compressor's init")


def refuse_nan(w: Array) -> None:
    """Raises ValueError if a weight is NaN (where values are known)."""
    if not holds(lambda x: ~jnp.isnan(x), w):
        raise ValueError("a weight to prune must not be NaN")


def is_dense(w: Any, mask: Array) -> bool:
    """Whether a mask says that its whole leaf is kept."""
    return mask.ndim == 0 and getattr(w, "ndim", 0) > 0


def hide(w: Any, mask: Array) -> Any:
    """The leaf with exact zeros where the mask is False."""
    if not is_float_array(w) or is_dense(w, mask):
        return w
    return jnp.where(mask, w, jnp.zeros((), w.dtype))


def apply_masks(params: Any, masks: Any) -> Any:
    """The params with exact zeros where `masks`, of the same structure, are False."""
    return jax.tree.map(hide, params, masks)


def pack_masks(params: Any, masks: Any) -> Any:
    """The params with their masked leaves as `Masked`, where that is smaller."""

    def pack(w, mask):
        return w if hide(w, mask) is w else mask_leaf(mask, hide(w, mask))

    return jax.tree.map(pack, params, masks)


def masks(state: CompressState, params: Any) -> Any:
    """The masks of all pruning in a state (chains and rules included), with params' structure.

    A leaf that nothing prunes gets a 0-d True; where several prune, their masks are joined.
    """
    found: dict[str, Array] = {}
    is_prune = lambda node: isinstance(node, PruneState)
    for node in jax.tree.leaves(state.buffers, is_leaf=is_prune):
        if is_prune(node):
            for path, mask in leaves_with_paths(node.masks):
                found[path] = found[path] & mask if path in found else mask
    named = [found.get(path, jnp.ones((), bool)) for path, _ in leaves_with_paths(params)]
    return jax.tree.structure(params).unflatten(named)


def masks_of_packed(packed: Any) -> Any:
    """The masks of a packed tree, with the structure of the params; a dense leaf has a 0-d True."""
    leaves = jax.tree.leaves(packed, is_leaf=is_packed)
    found = [kept(leaf) if isinstance(leaf, Masked) else jnp.ones((), bool) for leaf in leaves]
    return jax.tree.structure(unpack(packed)).unflatten(found)


def sparsity_of(params: Any) -> float:
    """Share of exact zeros among the floating point leaves with two axes or more (eager).

    A packed tree is unpacked first.
    """
    leaves = [w for w in jax.tree.leaves(unpack(params)) if is_float_array(w) and w.ndim >= 2]
    zeros = sum(int(jnp.sum(w == 0)) for w in leaves)
    return zeros / max(sum(w.size for w in leaves), 1)
