"""What the exact solver is compared with: greedy and evolutionary search."""

from collections.abc import Sequence

import numpy as np

from jaxcompress.search.problem import PEAK, Budget, Problem, Variable, variables, within
from jaxcompress.search.solvers.knapsack import Solution, check_limits, named

_TINY = 1e-30


def greedy(problem: Problem, budget: Budget) -> Solution:
    """From the least loss down: the step that loses least for what it saves, until all fits.

    What a step saves is the excess over all budgets, in shares of them, so that every step comes
    nearer. It can end where no single step does, although the exact solver finds a solution.

    Raises:
      ValueError: no step saves anything, with the budgets that are exceeded.
    """
    check_limits(problem, budget)
    found = variables(problem)
    tables = [_shares(v, budget) for v in found]
    fixed = [problem.fixed.get(name, 0) / max(b, _TINY) for name, b in _sums(budget)]
    picks = [int(np.argmin(v.loss)) for v in found]
    total = np.concatenate([fixed, np.zeros(len(problem.steps))]) - 1.0  # [rows]
    total += sum(table[pick] for (table, _), pick in zip(tables, picks, strict=True))
    while True:
        best = None
        for i, (variable, (table, own), now) in enumerate(zip(found, tables, picks, strict=True)):
            after = np.maximum(total - table[now] + table, 0.0).sum(axis=1) + own
            saved = np.maximum(total, 0.0).sum() + own[now] - after
            for k in np.flatnonzero(saved > 1e-12):
                step = (float((variable.loss[k] - variable.loss[now]) / saved[k]), i, int(k))
                best = step if best is None else min(best, step)
        if best is None:
            break
        _, i, k = best
        total += tables[i][0][k] - tables[i][0][picks[i]]
        picks[i] = k
    chosen = named(found, picks)
    costs = problem.costs(chosen)
    over = [name for name, limit in budget.limits.items() if not within(costs[name], limit)]
    if over:
        raise ValueError(f"greedy search ended with {sorted(over)} exceeded")
    return Solution(chosen, problem.loss(chosen), costs)


def _sums(budget: Budget) -> list[tuple[str, float]]:
    return [(name, limit) for name, limit in budget.limits.items() if name != PEAK]


def _shares(variable: Variable, budget: Budget) -> tuple[np.ndarray, np.ndarray]:
    # Shares of the budgets [K, rows]: every sum, every step; and the excess of its own peak [K].
    size = len(variable.names)
    columns = [
        variable.costs.get(name, np.zeros(size)) / max(limit, _TINY)
        for name, limit in _sums(budget)
    ]
    peak = budget.limits.get(PEAK, np.inf)
    columns += list(variable.steps.T / max(peak, _TINY))
    own = variable.costs.get(PEAK, np.zeros(size)) / max(peak, _TINY) - 1.0
    return np.stack(columns, axis=1) if columns else np.zeros((size, 0)), np.maximum(own, 0.0)


def evolve(
    problem: Problem,
    budget: Budget,
    *,
    seed: int = 0,
    population: int = 128,
    generations: int = 200,
    mutation: float = 0.05,
) -> Solution:
    """A genetic algorithm: tournaments of two, uniform crossover, random new choices.

    What fits beats what does not; what does not fit counts by the sum of the shares by which it
    exceeds the budgets.

    Args:
      problem: choices, losses and costs.
      budget: limits.
      seed: of all random numbers.
      population: solutions per generation.
      generations: how many.
      mutation: probability that a decision of a child is drawn anew.

    Raises:
      ValueError: nothing that fits was found.
    """
    check_limits(problem, budget)
    found = variables(problem)
    rng = np.random.default_rng(seed)
    sizes = np.array([len(v.names) for v in found])
    tables = _Tables(found, problem, budget)
    people = rng.integers(0, sizes, (population, len(found)))
    over, loss = tables.fitness(people)
    for _ in range(generations):
        pairs = rng.integers(0, population, (2, population, 2))
        first, second = (_winners(over, loss, pair) for pair in pairs)
        mixed = rng.random(people.shape) < 0.5
        children = np.where(mixed, people[first], people[second])
        drawn = rng.random(people.shape) < mutation
        children = np.where(drawn, rng.integers(0, sizes, people.shape), children)
        merged = np.concatenate([people, children])
        over, loss = tables.fitness(merged)
        best = np.lexsort((loss, over))[:population]
        people, over, loss = merged[best], over[best], loss[best]
    chosen = named(found, people[0].tolist())
    if not problem.fits(chosen, budget):
        raise ValueError(f"evolve: nothing fits after {generations} generations")
    return Solution(chosen, problem.loss(chosen), problem.costs(chosen))


def _winners(over: np.ndarray, loss: np.ndarray, pair: np.ndarray) -> np.ndarray:
    a, b = pair[:, 0], pair[:, 1]
    first = (over[a] < over[b]) | ((over[a] == over[b]) & (loss[a] <= loss[b]))
    return np.where(first, a, b)


class _Tables:
    """Losses and costs of many solutions at once."""

    def __init__(self, found: Sequence[Variable], problem: Problem, budget: Budget):
        self.found, self.problem, self.limits = found, problem, budget.limits

    def fitness(self, people: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """By how much each [N] exceeds the budgets, in shares, and its loss."""
        columns = list(zip(self.found, people.T, strict=True))
        loss = sum((v.loss[picks] for v, picks in columns), np.zeros(len(people)))
        over = np.zeros(len(people))
        for name, limit in self.limits.items():
            parts = [v.costs[name][picks] for v, picks in columns if name in v.costs]
            fixed = np.full(len(people), float(self.problem.fixed.get(name, 0)))
            if name == PEAK:
                start = np.zeros((len(people), len(self.problem.steps)))
                steps = sum((v.steps[picks] for v, picks in columns), start)
                terms = [fixed, *parts, *steps.T]
                total = np.max(terms, axis=0)
            else:
                total = sum(parts, fixed)
            share = (total - limit) / max(limit, _TINY)
            over += np.where(share > 1e-12, share, 0.0)
        return over, loss
