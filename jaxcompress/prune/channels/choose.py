"""Which channels of coupled groups stay: by score, to a share of channels or of MACs."""

from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.numerics.top_k import keep_count, top_k_mask, top_k_masks
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.graph.coupling.dependency_graph import Axes
from jaxcompress.graph.coupling.smaller import keeper, replay
from jaxcompress.graph.tracing import trace
from jaxcompress.prune.channels.coupled import Kept, by_atom, checked, group_names
from jaxcompress.prune.channels.smaller_networks import rounded_up


def choose_groups(
    scores: Mapping[str, Any],
    sparsity: float | Fraction,
    *,
    scope: str = "layer",
    channel_costs: Mapping[str, float] | None = None,
    round_to: int = 1,
    min_keep: int = 1,
) -> dict[str, np.ndarray]:
    """Keeps round((1 - sparsity) n) channels, those with the highest scores (eager).

    Args:
      scores: name of a group -> float [size], higher stays; NaN is refused. Groups that shall stay
        whole are left out.
      sparsity: share of channels to remove, in [0, 1].
      scope: "layer": the share holds in every group; "global": over all together, each score
        divided by the mean magnitude in its group.
      channel_costs: name of a group -> what a channel of it costs, positive; globally scores are
        divided by it too. None: all cost the same.
      round_to: the number that stays in a group is then rounded up to a multiple of this, or all,
        by the highest scores among the removed.
      min_keep: so many channels of each group stay first; they count.

    Returns:
      Name of a group -> bool [size], for `shrink` and `group_masks`.

    Raises:
      ValueError: an unknown scope, NaN in scores, a cost that is not positive, settings out of
        range.

    Source: the normalisation is that of DepGraph, https://arxiv.org/abs/2301.12900.

    >>> choose_groups({"a": np.array([1.0, 3.0, 2.0, 0.5])}, 0.5)["a"].astype(int).tolist()
    [0, 1, 1, 0]
    """
    if scope not in ("layer", "global"):
        raise ValueError(f'scope must be "layer" or "global", got {scope!r}')
    found = {name: _checked_scores(name, score) for name, score in scores.items()}
    least = {name: rounded_up(0, s.size, 1, min_keep) for name, s in found.items()}
    if scope == "layer":
        counts = {n: max(keep_count(s.size, sparsity), least[n]) for n, s in found.items()}
    else:
        counts = _global_counts(found, sparsity, channel_costs or {}, least)
    return {
        name: np.asarray(top_k_mask(s, rounded_up(int(counts[name]), s.size, round_to, min_keep)))
        for name, s in found.items()
    }


def groups_for_macs(
    axes: Axes,
    scores: Mapping[str, Any],
    share: float,
    *,
    scope: str = "layer",
    channel_costs: Mapping[str, float] | None = None,
    round_to: int = 1,
    min_keep: int = 1,
) -> dict[str, np.ndarray]:
    """Removes as few channels as bring the MACs down to `share` of what they are.

    Args:
      axes: what `graph.axes` found in the network.
      scores, scope, channel_costs, round_to, min_keep: as in `choose_groups`; of which the
        smallest sparsity is looked for.
      share: of the MACs, in (0, 1].

    Raises:
      ValueError: a share out of range, or one that is not reached (by how much); else as
        `choose_groups`.

    >>> from jaxcompress.graph.coupling.dependency_graph import axes
    >>> params = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 2))}
    >>> found = axes(lambda p, x: x @ p["up"] @ p["down"], params, jnp.ones((3, 4)))
    >>> groups_for_macs(found, {"up[1]": np.arange(8.0)}, 0.5)["up[1]"].astype(int).tolist()
    [0, 0, 0, 0, 1, 1, 1, 1]
    """
    if not 0 < share <= 1:
        raise ValueError(f"share of the MACs must be in (0, 1], got {share}")
    checked(axes, {name: np.ones(np.shape(s), bool) for name, s in scores.items()})
    total = sum(int(np.size(s)) for s in scores.values())
    dense = group_macs(axes, {})

    def at(removed: int) -> dict[str, np.ndarray]:
        return choose_groups(
            scores,
            Fraction(removed, max(total, 1)),
            scope=scope,
            channel_costs=channel_costs,
            round_to=round_to,
            min_keep=min_keep,
        )

    # The more is removed the fewer MACs: what stays at a higher sparsity stays at a lower one.
    low, high = 0, total
    if group_macs(axes, at(high)) > share * dense:
        least = group_macs(axes, at(high)) / dense
        raise ValueError(
            f"{share:.3f} of the MACs cannot be reached: {least:.3f} are left at least"
        )
    while low < high:
        middle = (low + high) // 2
        if group_macs(axes, at(middle)) <= share * dense:
            high = middle
        else:
            low = middle + 1
    return at(high)


def group_macs(axes: Axes, kept: Kept) -> int:
    """Multiply-accumulates of the network with the channels that stay; nothing is computed.

    They are those of `graph.trace`, for inputs as `axes` was given.

    Args:
      axes: what `graph.axes` found in the network.
      kept: name of a group -> bool [size]; groups that are not in it stay whole.

    Raises:
      ValueError: an unknown group, or a mask of another size.
    """
    chosen = by_atom(axes, checked(axes, kept))
    keep = keeper(chosen)
    length = lambda term: int(keep(term).sum())
    small = [
        jax.ShapeDtypeStruct(tuple(map(length, axes.program.leaves[path])), w.dtype)
        for path, w in leaves_with_paths(axes.program.params)
    ]
    params = jax.tree.structure(axes.program.params).unflatten(small)
    return trace(replay(axes, chosen), params, *axes.program.inputs).macs


def channel_macs(axes: Axes, *, of: Iterable[str] | None = None) -> dict[str, float]:
    """The MACs that the network loses with one channel of each group, the others being whole.

    As `channel_costs` they make a choice keep what is worth its MACs.

    Args:
      axes: what `graph.axes` found in the network.
      of: names of groups; None: all groups of channels.

    Raises:
      ValueError: an unknown group.
    """
    dense = group_macs(axes, {})

    def cost(name: str) -> float:
        rest = np.arange(axes.every[name].size) > 0
        return float(dense - group_macs(axes, {name: rest}))

    return {name: cost(name) for name in group_names(axes, of)}


def _checked_scores(name: str, score: Any) -> jax.Array:
    score = jnp.asarray(score).astype(jnp.float32)
    if score.ndim != 1 or bool(jnp.any(jnp.isnan(score))):
        raise ValueError(
            f"scores of group {name!r} must be a vector without NaN, got shape {score.shape}"
        )
    return score


def _global_counts(
    scores: Mapping[str, jax.Array],
    sparsity: float | Fraction,
    costs: Mapping[str, float],
    least: Mapping[str, int],
) -> dict[str, int]:
    for name, cost in costs.items():
        if not 0 < cost < float("inf"):
            raise ValueError(f"the cost of a channel of {name!r} must be positive, got {cost}")
    relative = {}
    for name, s in scores.items():
        # S / mean |S| / c; what must stay comes before all else
        mean = jnp.mean(jnp.abs(s))
        worth = s / jnp.where(mean == 0, 1.0, mean) / np.float32(costs.get(name, 1.0))
        relative[name] = jnp.where(top_k_mask(s, least[name]), jnp.inf, worth)
    keep = keep_count(sum(s.size for s in scores.values()), sparsity)
    masks = top_k_masks(relative, max(keep, sum(least.values())))
    return {name: int(mask.sum()) for name, mask in masks.items()}
