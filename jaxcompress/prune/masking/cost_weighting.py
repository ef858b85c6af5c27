"""Compares what weights are worth with what they cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcompress.core.numerics.counting import flat_index, order_bits, reread
from jaxcompress.core.numerics.top_k import top_k_masks
from jaxcompress.core.paths import match_rules
from jaxcompress.prune.masking.scopes_of_comparison import Units, largest


@dataclass(frozen=True)
class CostWeighted:
    """The scope of `cost_weighted`."""

    costs: tuple[tuple[str, float], ...]
    budget: Any

    def select(self, leaves: Sequence[Units], sparsity: Any) -> list[Array]:
        if not leaves:
            return []
        costs = self._costs(leaves)
        total = sum(c * np.prod(u.shape, dtype=float) for c, u in zip(costs, leaves, strict=True))
        allowed = self._allowed(sparsity, total, total - sum(map(_movable, costs, leaves)))
        # S_l > lambda c_l, as S_l / c_l > lambda
        worth = [
            jnp.where(jnp.isnan(u.scores), -jnp.inf, u.scores.astype(np.float32)) / np.float32(c)
            for c, u in zip(costs, leaves, strict=True)
        ]
        return top_k_masks(worth, _affordable(worth, costs, leaves, allowed))

    def _costs(self, leaves: Sequence[Units]) -> list[float]:
        rules = dict(self.costs)
        matched = match_rules(rules, [u.path for u in leaves])
        left = [path for path, rule in matched.items() if rule is None]
        if left:
            raise ValueError(f"costs: no rule matches {', '.join(map(repr, left))}")
        return [rules[str(matched[u.path])] for u in leaves]

    def _allowed(self, sparsity: Any, total: float, fixed: float) -> Array:
        # What the units may cost: (1 - s) total + s budget, less what stays whatever is pruned.
        budget = self.budget
        if isinstance(budget, int | float):
            if budget < fixed:
                raise ValueError(
                    f"the budget {budget} cannot be met: what the structure always keeps costs "
                    f"{fixed:.6g}"
                )
            budget = min(budget, total)
        if isinstance(budget, int | float) and isinstance(sparsity, int | float):
            return jnp.float32((1 - sparsity) * total + sparsity * budget - fixed)
        budget = jnp.minimum(jnp.asarray(budget, np.float32), np.float32(total))
        share = jnp.asarray(sparsity, np.float32)
        return (1 - share) * np.float32(total) + share * budget - np.float32(fixed)


def cost_weighted(costs: Mapping[str, float], budget: Any) -> CostWeighted:
    """Keeps what is worth its cost: max sum of kept scores, such that sum cost_l nnz_l <= budget.

    What has S > lambda c_l stays, lambda found by bisection on the bits of S / c_l; of those equal
    to lambda the first in flatten order, as many as fit. So the budget is met to less than the cost
    of the next unit (and the rounding of a float32 sum), and a larger one keeps all that a smaller
    one does. Scores must be comparable between leaves, and not negative.

    The sparsity of a schedule is the share of the way from the cost of everything to the budget:
    1.0 for the budget itself, `cubic(0.0, 1.0, ...)` for a ramp.

    Args:
      costs: {regex on paths: cost of a kept weight}, bytes or joules say; the first match wins.
      budget: in the same unit; may be traced.

    Raises:
      ValueError: a cost that is not positive, a negative budget; (at init) a leaf to prune without
        a cost, a rule that matches none, a budget below what the structure always keeps.

    >>> scope = cost_weighted({"big": 1.0, "small": 4.0}, 6.0)
    >>> one = np.ones(1, int)
    >>> big = Units("big", (3,), jnp.array([3.0, 2.0, 1.0]), one)
    >>> small = Units("small", (2,), jnp.array([9.0, 5.0]), one)
    >>> [mask.tolist() for mask in scope.select([big, small], 1.0)]
    [[True, True, False], [True, False]]
    """
    for rule, cost in costs.items():
        if not 0 < cost < float("inf"):
            raise ValueError(f"the cost of {rule!r} must be positive, got {cost}")
    if isinstance(budget, int | float | np.number):
        budget = float(budget)
        if not budget >= 0:
            raise ValueError(f"budget must not be negative, got {budget}")
    return CostWeighted(tuple((rule, float(cost)) for rule, cost in costs.items()), budget)


def _movable(cost: float, units: Units) -> float:
    whole = np.broadcast_to(units.weights, units.scores.shape)
    return cost * float(whole.sum())


def _affordable(
    worth: Sequence[Array], costs: Sequence[float], leaves: Sequence[Units], allowed: Array
) -> Array:
    """How many units, the most worth first, cost no more than `allowed`; int32."""
    weights = [u.weights.reshape(u.weights.shape or 1) for u in leaves]
    ends = np.cumsum([x.size for x in worth])
    starts = [np.uint32(end - x.size) for end, x in zip(ends, worth, strict=True)]

    def spent(chosen: Any) -> Any:
        total = jnp.float32(0)
        for kept, each, cost in zip(chosen, weights, costs, strict=True):
            count = jnp.sum(jnp.where(kept, each.astype(np.int32), 0), dtype=np.int32)
            total = total + np.float32(cost) * count.astype(np.float32)
        return total

    def before(scores: Any, stop: Any) -> list[Array]:
        # What is worth more than `last`, and of its equals those before `stop` in flat order.
        pairs = [
            (order_bits(x), flat_index(x, jnp.asarray(at)))
            for x, at in zip(scores, starts, strict=True)
        ]
        return [(bits > last) | ((bits == last) & (index < stop)) for bits, index in pairs]

    def reaches(bits: Any) -> Any:
        return spent([order_bits(x) >= bits for x in reread(worth, bits)]) > allowed

    # The largest S / c at which what reaches it costs too much: all above it is affordable.
    last = largest(reaches, np.iinfo(np.uint32).max)
    stop = largest(lambda stop: spent(before(reread(worth, stop), stop)) <= allowed, ends[-1])
    return sum((jnp.sum(c, dtype=np.int32) for c in before(worth, stop)), start=jnp.int32(0))
