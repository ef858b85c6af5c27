"""Prunes by scores or masks that were found elsewhere."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxcompress.core.compressor import (
    Compressor,
    CompressState,
    at_path,
    holds,
    is_float_array,
    quartet,
)
from jaxcompress.core.paths import leaves_with_paths, refuse_twins
from jaxcompress.prune.masking.mask_state import (
    PruneState,
    apply_masks,
    check_owner,
    is_dense,
    pack_masks,
)
from jaxcompress.prune.masking.schedules import as_schedule
from jaxcompress.prune.masking.scopes_of_comparison import Scope, as_scope
from jaxcompress.prune.masking.scored import (
    Criterion,
    by_score,
    chosen,
    placed,
    select_masks,
    share_at,
    share_of,
)
from jaxcompress.prune.masking.structures import UNSTRUCTURED, Structure


def scored(
    scores: Any,
    sparsity: Any,
    *,
    scope: str | Scope = "global",
    structure: Structure = UNSTRUCTURED,
    min_ndim: int = 2,
) -> Compressor:
    """Prunes by scores that were found before, by SNIP say, and do not change.

    With a growing sparsity masks are nested. The scores lie in the state.

    Args:
      scores: the params' structure and shapes, higher stays.
      sparsity, scope, structure, min_ndim: as in `by_score`.

    Raises:
      ValueError: as `by_score`; (at init) a leaf to prune without scores, or with scores of another
        shape; (eager) NaN in them.

    >>> comp = scored({"w": jnp.array([[1.0, 5.0, 3.0]])}, 1 / 3)
    >>> params = {"w": jnp.ones((1, 3))}
    >>> print(comp.apply(params, comp.init(params))["w"])
    [[0. 1. 1.]]
    """
    flat = leaves_with_paths(scores)
    refuse_twins("scores", [path for path, _ in flat])
    named = dict(flat)

    def init(path, w):
        if path not in named:
            raise ValueError("a leaf to prune has no scores")
        found = jnp.asarray(named[path])
        if found.shape != w.shape:
            raise ValueError(f"scores have shape {found.shape}, the leaf {w.shape}")
        if not holds(lambda x: ~jnp.isnan(x), found):
            raise ValueError("scores must not be NaN")
        return found

    criterion = Criterion(lambda w, stats: stats, init=init)
    return by_score(criterion, sparsity, scope=scope, structure=structure, min_ndim=min_ndim)


def masks_of_scores(
    scores: Any,
    sparsity: Any = None,
    *,
    scope: str | Scope = "global",
    structure: Structure = UNSTRUCTURED,
    min_ndim: int = 2,
) -> Any:
    """The masks of a tree of scores: True at the units that stay, 0-d True for dense leaves.

    Args:
      scores: floats, higher stays; leaves that are no floats or have fewer than `min_ndim` axes are
        dense.
      sparsity: a number in [0, 1] or a traced scalar.
      scope, structure, min_ndim: as in `by_score`.

    Returns:
      bool masks with the structure of `scores`.

    Raises:
      ValueError: as `by_score`; (eager) NaN in a score.

    >>> masks = masks_of_scores({"w": jnp.array([[1.0, 5.0, 3.0]]), "b": jnp.ones(3)}, 1 / 3)
    >>> masks["w"].tolist(), masks["b"].tolist()
    ([[False, True, True]], True)
    """
    leaves, treedef = jax.tree.flatten(scores)
    at, paths = chosen(scores, min_ndim)
    for path, i in zip(paths, at, strict=True):
        with at_path(path):
            if not holds(lambda x: ~jnp.isnan(x), leaves[i]):
                raise ValueError("scores must not be NaN")
            structure.check(leaves[i].shape)
    chosen_scope = as_scope(scope)
    schedule = as_schedule(share_of(sparsity, structure, chosen_scope))
    share = share_at(schedule, jnp.zeros((), jnp.int32))
    found = [jnp.asarray(leaves[i]) for i in at]
    new = select_masks(paths, found, share, scope=chosen_scope, structure=structure)
    return treedef.unflatten(placed([jnp.ones((), bool) for _ in leaves], at, new))


def fixed(masks: Any) -> Compressor:
    """Prunes by masks that are given and stay as they are.

    Args:
      masks: bool, with the params' structure and shapes; a dense leaf is a 0-d True.

    Raises:
      ValueError: (at init) masks of another structure or shape, or that are not bool; a 0-d False;
        a mask of a leaf that is no array of floats.

    >>> comp = fixed({"w": jnp.array([[True, False]]), "b": jnp.array(True)})
    >>> params = {"w": jnp.ones((1, 2)), "b": jnp.ones(2)}
    >>> print(comp.apply(params, comp.init(params))["w"])
    [[1. 0.]]
    """

    def init(params):
        treedef = jax.tree.structure(params)
        try:
            given = treedef.flatten_up_to(masks)
        except ValueError as error:
            raise ValueError(f"masks do not have the params' structure: {error}") from error
        found = []
        for (path, w), mask in zip(leaves_with_paths(params), given, strict=True):
            with at_path(path):
                found.append(_checked_mask(w, mask))
        step = jnp.zeros((), jnp.int32)
        return CompressState(buffers=PruneState(treedef.unflatten(found), step))

    def apply(params, state):
        check_owner(state)
        return apply_masks(params, state.buffers.masks)

    def update(params, state, *, grads=None, **extra):
        del params, grads, extra
        check_owner(state)
        return state._replace(buffers=state.buffers._replace(step=state.buffers.step + 1))

    def pack(params, state):
        return pack_masks(params, state.buffers.masks)

    return quartet(init, apply, update, pack)


def _checked_mask(w: Any, mask: Any) -> Array:
    mask = jnp.asarray(mask)
    shape = getattr(w, "shape", ())
    if mask.dtype != bool:
        raise ValueError(f"a mask must be bool, got {mask.dtype}")
    if mask.ndim and mask.shape != shape:
        raise ValueError(f"the mask has shape {mask.shape}, the leaf {shape}")
    if is_dense(w, mask) and not holds(lambda m: m, mask):
        raise ValueError(f"a 0-d mask must be True; to prune all, give zeros of shape {shape}")
    if mask.ndim and not is_float_array(w):
        raise ValueError("only arrays of floats are pruned; their mask is a 0-d True")
    return mask
