"""The whole trade-off of loss against one cost: dynamic programming over the sites."""

from dataclasses import dataclass

import numpy as np

from jaxcompress.search.problem import PEAK, Problem, variables
from jaxcompress.search.solvers.knapsack import Solution, named


@dataclass(frozen=True)
class Front:
    """The points that no other point beats in both loss and cost, cheapest first.

    Attributes:
      cost: [P], strictly increasing; integers if all costs are.
      loss: [P] float64, strictly decreasing.
      picks: [P, variables] index of the choice of every decision.
    """

    name: str
    cost: np.ndarray
    loss: np.ndarray
    picks: np.ndarray
    problem: Problem

    def __len__(self) -> int:
        return len(self.cost)

    def solution(self, index: int) -> Solution:
        """A point as {site: choice} with its costs."""
        chosen = named(variables(self.problem), self.picks[index].tolist())
        loss = self.problem.loss(chosen)
        return Solution(chosen, loss, self.problem.costs(chosen), bound=loss)

    def within(self, limit: float) -> Solution:
        """The point of least loss whose cost is at most `limit`.

        Raises:
          ValueError: even the cheapest costs more.
        """
        count = int(np.searchsorted(self.cost, limit + 1e-12 * abs(limit), side="right"))
        if not count:
            least = self.cost[0] if len(self) else np.nan
            raise ValueError(
                f"{self.name}: the limit is {limit:g}, the least possible {least:g}, "
                f"{least - limit:g} more"
            )
        return self.solution(count - 1)


def front(problem: Problem, cost: str = "weight_bytes", *, limit: float | None = None) -> Front:
    """The exact Pareto front of the sum of losses against one cost.

    Site by site, every point is joined with every choice; a point that another one beats or equals
    is dropped, which is exact because what follows adds the same to both. Of several solutions
    with the same loss and cost one is kept.

    Args:
      problem: choices, losses and costs.
      cost: its name; "peak_bytes" is a maximum, all others are sums.
      limit: points that must exceed it are not followed.

    Raises:
      ValueError: no such cost; "peak_bytes" of a problem with steps.

    Source: Nemhauser, Ullmann, Discrete dynamic programming and capital allocation, Management
    Science 1969. The number of points grows with the number of distinct costs: integers, or few
    digits, keep it small.

    >>> from jaxcompress.search import Choice
    >>> choices = {"int2": Choice(0.5, {"macs": 2}), "int8": Choice(0.0, {"macs": 8})}
    >>> found = front(Problem({"a": choices, "b": choices}), "macs")
    >>> print(found.cost, found.loss)
    [ 4 10 16] [1.  0.5 0. ]
    """
    if problem.sites and cost not in problem.cost_names:
        raise ValueError(f"cost must be one of {list(problem.cost_names)}, got {cost!r}")
    if cost == PEAK and problem.steps:
        raise ValueError("cost: peak_bytes of a problem with steps has no front here; use allocate")
    join = np.maximum if cost == PEAK else np.add
    found = variables(problem)
    tables = [_pruned(v.costs[cost], v.loss) for v in found]
    rest = np.zeros(len(found) + 1)
    if cost != PEAK:
        rest[:-1] = np.cumsum([t[0].min() for t in reversed(tables)])[::-1]
    costs, losses = np.array([problem.fixed.get(cost, 0)]), np.zeros(1)
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    for number, (steps, gains, names) in enumerate(tables):
        costs, losses, parents, taken = _join(costs, losses, steps, gains, join)
        if limit is not None:
            count = int(
                np.searchsorted(costs, limit - rest[number + 1] + 1e-9 * abs(limit), side="right")
            )
            costs, losses, parents, taken = (
                costs[:count],
                losses[:count],
                parents[:count],
                taken[:count],
            )
        trail.append((parents, names[taken]))
    index = np.arange(len(costs))
    chosen = np.zeros((len(costs), len(found)), np.int32)
    for number in range(len(found) - 1, -1, -1):
        parents, picks = trail[number]
        chosen[:, number] = picks[index]
        index = parents[index]
    return Front(cost, costs, losses, chosen, problem)


def _pruned(cost: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    # The choices of one site that none beats, cheapest first, and their numbers.
    keep = _undominated(cost, loss)
    return cost[keep], loss[keep], keep


def _undominated(cost: np.ndarray, loss: np.ndarray) -> np.ndarray:
    # Indices by increasing cost, each of lower loss than all before it.
    order = np.lexsort((loss, cost))
    ordered = loss[order]
    best = np.minimum.accumulate(ordered)
    first = np.ones(len(order), bool)
    first[1:] = ordered[1:] < best[:-1]
    return order[first]


def _join(costs, losses, steps, gains, join):
    points = len(costs)
    # K runs, each sorted already: a stable sort merges them.
    all_costs = join(costs[None, :], steps[:, None]).ravel()
    all_losses = (losses[None, :] + gains[:, None]).ravel()
    order = np.argsort(all_costs, kind="stable")
    all_costs, all_losses = all_costs[order], all_losses[order]
    best = np.minimum.accumulate(all_losses)
    keep = np.ones(len(order), bool)
    keep[1:] = all_losses[1:] < best[:-1]
    # Of equal costs the last one that improved is the best.
    kept = np.flatnonzero(keep)
    last = np.ones(len(kept), bool)
    last[:-1] = all_costs[kept[1:]] != all_costs[kept[:-1]]
    kept = kept[last]
    source = order[kept]
    return all_costs[kept], all_losses[kept], source % points, source // points
