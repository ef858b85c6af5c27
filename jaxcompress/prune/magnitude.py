"""Magnitude pruning: the weights nearest to zero go first."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.core.compressor import (
    Compressor,
    CompressState,
    at_path,
    holds,
    state_leaves,
)
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.core.select import keep_count, top_k_mask, top_k_masks
from jaxcompress.prune.schedules import as_schedule
from jaxcompress.prune.state import PruneState, apply_masks, check_owner, pack_masks, prunable


def magnitude(sparsity: Any, *, scope: str = "layer", min_ndim: int = 2) -> Compressor:
    """Zeroes the share `sparsity` of the weights with the smallest |w|, exactly.

    In a leaf of N weights (or in all of them together) round((1 - sparsity) * N) are kept; ties
    keep the lower flat index. Masks are renewed by `update` where the schedule fires.

    Args:
      sparsity: a number, `cubic(...)`, or any Optax schedule step -> sparsity; may be traced.
      scope: "layer": the share holds in every leaf; "global": over all leaves together.
      min_ndim: leaves with fewer axes (biases, norms) stay dense, and so do integers.

    Raises:
      ValueError: a scope of another name, a sparsity outside [0, 1]; (at init, eager) NaN in a
        leaf, with its path.

    Source: Han et al. 2015, arXiv 1506.02626; Zhu and Gupta 2017, arXiv 1710.01878.

    >>> comp = magnitude(0.5)
    >>> params = {"kernel": jnp.array([[3.0, -1.0], [0.5, -2.0]]), "bias": jnp.zeros(2)}
    >>> print(comp.apply(params, comp.init(params))["kernel"])
    [[ 3.  0.]
     [ 0. -2.]]
    """
    if scope not in ("layer", "global"):
        raise ValueError(f'scope must be "layer" or "global", got {scope!r}')
    schedule = as_schedule(sparsity)

    def select(weights, step):
        scores = [jnp.abs(w) for w in weights]
        share = getattr(schedule, "sparsity", None)
        share = share if isinstance(share, int | float) else schedule(step)
        if scope == "layer":
            return [top_k_mask(s, keep_count(s.size, share)) for s in scores]
        return top_k_masks(scores, keep_count(sum(s.size for s in scores), share))

    @jax.jit  # so that an eager loop of updates compiles once
    def renew(weights, masks, step):
        return jax.lax.cond(schedule.fires(step), lambda: select(weights, step), lambda: masks)

    def chosen(params):
        leaves, treedef = jax.tree.flatten(params)
        return [i for i, w in enumerate(leaves) if prunable(w, min_ndim)], leaves, treedef

    def placed(masks, indices, new):
        found = dict(zip(indices, new, strict=True))
        return [found.get(i, mask) for i, mask in enumerate(masks)]

    def init(params):
        for path, w in leaves_with_paths(params):
            with at_path(path):
                if prunable(w, min_ndim) and not holds(lambda x: ~jnp.isnan(x), w):
                    raise ValueError("a weight to prune must not be NaN")
        indices, leaves, treedef = chosen(params)
        step = jnp.zeros((), jnp.int32)
        new = select([leaves[i] for i in indices], step)
        masks = placed([jnp.ones((), bool) for _ in leaves], indices, new)
        return CompressState(buffers=PruneState(treedef.unflatten(masks), step))

    def apply(params, state):
        check_owner(state)
        return apply_masks(params, state.buffers.masks)

    def update(params, state, *, grads=None, **extra):
        del grads, extra
        check_owner(state)
        indices, leaves, treedef = chosen(params)
        masks, step = state_leaves(treedef, state.buffers.masks), state.buffers.step + 1
        new = renew([leaves[i] for i in indices], [masks[i] for i in indices], step)
        masks = placed(masks, indices, new)
        return state._replace(buffers=PruneState(treedef.unflatten(masks), step))

    def pack(params, state):
        return pack_masks(params, state.buffers.masks)

    return Compressor(init, apply, update, pack)
