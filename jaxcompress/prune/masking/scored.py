"""From scores to compressors: a criterion scores the weights, a scope and a structure select."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcompress.core.compressor import (
    Compressor,
    CompressState,
    absent_if_empty,
    at_path,
    is_absent,
    quartet,
    state_leaves,
)
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.prune.masking.cost_weighting import CostWeighted
from jaxcompress.prune.masking.mask_state import (
    PruneState,
    check_owner,
    hide,
    pack_masks,
    prunable,
    refuse_nan,
)
from jaxcompress.prune.masking.schedules import Constant, SparsitySchedule, as_schedule
from jaxcompress.prune.masking.scopes_of_comparison import Scope, Units, as_scope
from jaxcompress.prune.masking.structures import UNSTRUCTURED, Structure


def _no_stats(path: str, w: Array) -> Any:
    del path, w
    return ()


def _same_stats(w: Array, stats: Any, grad: Array, mask: Array) -> Any:
    del w, grad, mask
    return stats


class Criterion(NamedTuple):
    """How the weights of one leaf are scored; pure functions.

    Attributes:
      score: (w, stats) -> float scores of the shape of w, higher stays.
      init: (path, w) -> stats, a tree of arrays; `()` for none.
      accumulate: (w, stats, grad, mask) -> stats with the same avals, at every `update` that is
        given gradients, whether masks are renewed or not.
      view: (w, mask) -> what `apply` gives; `hide` with another derivative.
    """

    score: Callable[[Array, Any], Array]
    init: Callable[[str, Array], Any] = _no_stats
    accumulate: Callable[[Array, Any, Array, Array], Any] = _same_stats
    view: Callable[[Any, Array], Any] = hide


def by_score(
    criterion: Criterion,
    sparsity: Any = None,
    *,
    scope: str | Scope = "layer",
    structure: Structure = UNSTRUCTURED,
    min_ndim: int = 2,
) -> Compressor:
    """Zeroes the share `sparsity` of the units with the lowest scores, exactly.

    Of N units that are compared round((1 - sparsity) N) are kept; ties keep the lower flat index.
    `update` gathers what the criterion wants from gradients, and renews masks where the schedule
    fires.

    Args:
      criterion: scores the weights of a leaf.
      sparsity: a number, a schedule, or any Optax schedule step -> sparsity; may be traced. Shares
        are of units; what that means for N:M and for `cost_weighted` is said there. None: what
        the structure fixes.
      scope: "layer": the share holds in every leaf; "global": over all together; `erk(...)`,
        `cost_weighted(...)`.
      structure: `unstructured()`, `n_m(...)`, `block(...)`, `channel(...)`, `head(...)`.
      min_ndim: leaves with fewer axes (biases, norms) stay dense, and so do integers.

    Raises:
      ValueError: an unknown scope, a sparsity outside [0, 1]; (at init) a leaf that does not suit
        the structure or the scope, (eager) NaN in a leaf, with its path.

    >>> widest = Criterion(lambda w, stats: w)
    >>> comp = by_score(widest, 0.5)
    >>> w = jnp.array([[3.0, -1.0], [0.5, -2.0]])
    >>> print(comp.apply(w, comp.init(w)))
    [[3.  0. ]
     [0.5 0. ]]
    """
    chosen_scope = as_scope(scope)
    schedule = as_schedule(share_of(sparsity, structure, chosen_scope))

    def select(weights, stats, step, paths):
        scores = [criterion.score(w, s) for w, s in zip(weights, stats, strict=True)]
        share = share_at(schedule, step)
        return select_masks(paths, scores, share, scope=chosen_scope, structure=structure)

    @functools.partial(jax.jit, static_argnames="paths")  # an eager loop of updates compiles once
    def renew(weights, masks, stats, grads, step, *, paths):
        if grads is not None:
            stats = list(map(criterion.accumulate, weights, stats, grads, masks))
        fires = schedule.fires(step)
        new = lambda: select(weights, stats, step, paths)
        return jax.lax.cond(fires, new, lambda: masks), stats

    def init(params):
        leaves, treedef = jax.tree.flatten(params)
        at, paths = chosen(params, min_ndim)
        weights = [leaves[i] for i in at]
        stats = []
        for path, w in zip(paths, weights, strict=True):
            with at_path(path):
                refuse_nan(w)
                structure.check(w.shape)
                stats.append(criterion.init(path, w))
        step = jnp.zeros((), jnp.int32)
        new = select(weights, stats, step, paths)
        masks = placed([jnp.ones((), bool) for _ in leaves], at, new)
        every = placed([() for _ in leaves], at, stats)
        kept = absent_if_empty(treedef.unflatten(every))
        return CompressState(buffers=PruneState(treedef.unflatten(masks), step, kept))

    def apply(params, state):
        check_owner(state)
        return jax.tree.map(criterion.view, params, state.buffers.masks)

    def update(params, state, *, grads=None, **extra):
        del extra
        return renewed(params, state, grads, renew, min_ndim=min_ndim)

    def pack(params, state):
        return pack_masks(params, state.buffers.masks)

    return quartet(init, apply, update, pack)


def renewed(
    params: Any, state: CompressState, grads: Any, renew: Callable[..., Any], *, min_ndim: int
) -> CompressState:
    """The state one step later, its masks and stats those of `renew`.

    Args:
      params, state, grads: of `update`; no gradients are None.
      renew: (weights, masks, stats, grads, step, *, paths) -> (masks, stats) of the leaves that are
        pruned.
      min_ndim: as in `by_score`.
    """
    check_owner(state)
    leaves, treedef = jax.tree.flatten(params)
    at, paths = chosen(params, min_ndim)
    pick = lambda found: [found[i] for i in at]
    old, step, kept = state.buffers
    masks = state_leaves(treedef, old)
    stats = [()] * len(leaves) if is_absent(kept) else state_leaves(treedef, kept)
    grads = None if grads is None else pick(treedef.flatten_up_to(grads))
    new, gathered = renew(pick(leaves), pick(masks), pick(stats), grads, step + 1, paths=paths)
    if not is_absent(kept):
        kept = treedef.unflatten(placed(stats, at, gathered))
    masks = treedef.unflatten(placed(masks, at, new))
    return state._replace(buffers=PruneState(masks, step + 1, kept))


def chosen(tree: Any, min_ndim: int) -> tuple[list[int], tuple[str, ...]]:
    """Which leaves are pruned, in flatten order, and their paths."""
    flat = leaves_with_paths(tree)
    at = [i for i, (_, w) in enumerate(flat) if prunable(w, min_ndim)]
    return at, tuple(flat[i][0] for i in at)


def placed(everywhere: Sequence[Any], at: Sequence[int], new: Sequence[Any]) -> list[Any]:
    """The list `everywhere` with new elements at some places."""
    found = dict(zip(at, new, strict=True))
    return [found.get(i, rest) for i, rest in enumerate(everywhere)]


def share_at(schedule: SparsitySchedule, step: Array) -> Any:
    """The sparsity at a step; a number stays one, so that counts are exact and checked early."""
    if isinstance(schedule, Constant) and isinstance(schedule.sparsity, int | float):
        return schedule.sparsity
    return schedule(step)


def share_of(sparsity: Any, structure: Structure, scope: Scope) -> Any:
    """The share of units that go, from what was asked for.

    A structure that fixes the share of zeros (`n_m`) takes None, or that number; all its units go
    then. Schedules, and scopes that spend a budget, are taken as they are.

    Raises:
      ValueError: None for a structure that fixes no share; a number that contradicts the structure.
    """
    fixed = getattr(structure, "share", None)
    if fixed is None or (isinstance(scope, CostWeighted) and sparsity is not None):
        if sparsity is None:
            raise ValueError("sparsity must be given: this structure fixes no share of zeros")
        return sparsity
    if sparsity is None:
        return 1.0
    if not isinstance(sparsity, int | float | np.number) or not 0 <= sparsity <= 1:
        return sparsity
    if abs(sparsity - fixed) > 1e-6:
        raise ValueError(
            f"sparsity {sparsity} contradicts {structure}, which makes {fixed:g} of the weights "
            "zero: leave the number out, or ramp the share of its groups by a schedule to 1.0"
        )
    return 1.0


def select_masks(
    paths: Sequence[str],
    scores: Sequence[Array],
    sparsity: Any,
    *,
    scope: Scope,
    structure: Structure,
) -> list[Array]:
    """Masks of leaves from their scores."""
    units = [
        Units(path, s.shape, structure.pool(s), structure.weights(s.shape))
        for path, s in zip(paths, scores, strict=True)
    ]
    chosen = scope.select(units, sparsity)
    return [structure.expand(u, s) for u, s in zip(chosen, scores, strict=True)]
