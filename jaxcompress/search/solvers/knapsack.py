"""Exact multiple-choice knapsack with any number of budgets, by HiGHS."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from jaxcompress.search.problem import PEAK, Budget, Problem, Variable, variables, within

# What limits are scaled to: HiGHS lets rows be violated by 1e-6.
_UNIT = 1e3


class Infeasible(ValueError):
    """No choice meets the budget."""


@dataclass(frozen=True)
class Solution:
    """One choice for every site.

    Attributes:
      chosen: {site: name of the choice}.
      loss: sum of the losses of the choices.
      costs: by name.
      bound: no solution of the problem has a lower loss than this (of the k-th best: none that is
        not listed before it); equal to `loss`, to rounding, when it is proved optimal.
      true_loss: what `rerank` measured; None before.
    """

    chosen: Mapping[str, str] = field(hash=False)
    loss: float
    costs: Mapping[str, float] = field(hash=False)
    bound: float = -math.inf
    true_loss: float | None = None


def allocate(
    problem: Problem, budget: Budget, *, k: int = 1, time_limit_s: float | None = None
) -> list[Solution]:
    """The k solutions of least loss that meet every budget, best first.

    "peak_bytes" is a maximum: a choice that alone exceeds the limit is left out, and every step of
    the problem is a row of its own. The second best is the best with the first one cut off
    (a no-good cut: at least one decision differs), and so on. Solutions that HiGHS lets pass
    within its tolerance but which exceed a limit are cut off as well: all that is returned fits.

    Args:
      problem: choices, losses and costs.
      budget: limits; each names a cost of the problem.
      k: how many distinct solutions; fewer come back if there are no more.
      time_limit_s: for each of the k; None: until it is proved optimal. `Solution.bound` then tells
        how far from the optimum it may be.

    Raises:
      Infeasible: nothing fits; with the least possible of every cost and by how much it misses.
      ValueError: a limit on a cost that the choices do not have.
      ImportError: SciPy is not installed.
      TimeoutError: no solution was found within `time_limit_s`.

    Source: Huangfu, Hall, Parallelizing the dual revised simplex method, Math. Prog. Comp. 2018
    (HiGHS); no-good cuts: Balas, Jeroslow, Canonical cuts on the unit hypercube, 1972.

    >>> from jaxcompress.search import Choice
    >>> int8 = Choice(0.0, {"weight_bytes": 8})
    >>> sites = {
    ...     "a": {"int2": Choice(0.5, {"weight_bytes": 2}), "int8": int8},
    ...     "b": {"int2": Choice(0.1, {"weight_bytes": 2}), "int8": int8},
    ... }
    >>> dict(allocate(Problem(sites), Budget(weight_bytes=10))[0].chosen)
    {'a': 'int8', 'b': 'int2'}
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    found_variables = variables(problem)
    check_limits(problem, budget)
    if not found_variables:
        return [Solution({}, 0.0, problem.costs({}), bound=0.0)]
    program = _Program(found_variables, problem, budget)
    found: list[Solution] = []
    while len(found) < k:
        answer = program.best(time_limit_s)
        if answer is None:
            break
        picks, bound = answer
        program.cut(picks)
        chosen = named(found_variables, picks)
        if problem.fits(chosen, budget):
            loss = problem.loss(chosen)
            found.append(Solution(chosen, loss, problem.costs(chosen), min(bound, loss)))
    if not found:
        raise Infeasible(_infeasible(problem, budget, found_variables))
    return sorted(found, key=lambda solution: solution.loss)


def rerank(
    solutions: Sequence[Solution], true_loss: Callable[[Mapping[str, str]], float]
) -> list[Solution]:
    """The solutions by what they really lose; the additive loss decides between equals.

    Args:
      solutions: e.g. the 32 best of `allocate`.
      true_loss: {site: choice} -> loss of the network.

    Raises:
      ValueError: no solution, or all true losses are NaN. Single NaN count as infinite.
    """
    if not solutions:
        raise ValueError("rerank: there are no solutions")
    measured = [replace(s, true_loss=float(true_loss(s.chosen))) for s in solutions]
    losses = [math.inf if math.isnan(s.true_loss or 0.0) else s.true_loss for s in measured]
    if all(math.isnan(s.true_loss or 0.0) for s in measured):
        raise ValueError("rerank: true_loss is NaN for every solution")
    order = sorted(range(len(measured)), key=lambda i: (losses[i], measured[i].loss))
    return [measured[i] for i in order]


def named(found: Sequence[Variable], picks: Sequence[int]) -> dict[str, str]:
    """{site: choice} of the index of a choice for every variable."""
    return {
        site: variable.names[pick]
        for variable, pick in zip(found, picks, strict=True)
        for site in variable.sites
    }


def check_limits(problem: Problem, budget: Budget) -> None:
    """Raises ValueError where a limit has no cost."""
    known = {*problem.cost_names, *problem.fixed, *([PEAK] if problem.steps else [])}
    for name in budget.limits:
        if problem.sites and name not in known:
            raise ValueError(
                f"budget: no choice has the cost {name!r}; there are: {', '.join(sorted(known))}"
            )


def _scipy() -> Any:
    try:
        import scipy.optimize
        import scipy.sparse
    except ImportError as error:
        raise ImportError('search needs SciPy: pip install "jaxcompress[search]"') from error
    return scipy


class _Program:
    """The rows of an integer program; grows by one for every solution that is cut off."""

    def __init__(
        self,
        found: Sequence[Variable],
        problem: Problem,
        budget: Budget,
        objective: np.ndarray | None = None,
    ):
        self.scipy = _scipy()
        self.starts = np.cumsum([0, *(len(v.names) for v in found)])
        loss = np.concatenate([v.loss for v in found]) if objective is None else objective
        # Per variable the least is taken off: what is left is small and the scale is its own.
        self.offset = math.fsum(
            float(part.min()) for part in np.split(loss, self.starts[1:-1].tolist())
        )
        least = np.concatenate(
            [np.full(len(p), p.min()) for p in np.split(loss, self.starts[1:-1].tolist())]
        )
        self.scale = float((loss - least).max()) / _UNIT or 1.0
        self.objective = (loss - least) / self.scale
        size = int(self.starts[-1])
        self.upper = np.ones(size)
        rows: list[np.ndarray] = []
        for name, limit in budget.limits.items():
            if name == PEAK:
                rows += self._peak(found, problem, limit)
                continue
            room = limit - problem.fixed.get(name, 0)
            parts = [v.costs.get(name, np.zeros(len(v.names))) for v in found]
            room -= math.fsum(float(part.min()) for part in parts)
            extra = np.concatenate([part - part.min() for part in parts]).astype(np.float64)
            rows.append(self._row(extra, room, limit))
        self.rows = rows
        self.ones = np.repeat(np.arange(len(found)), np.diff(self.starts))

    def _row(self, extra: np.ndarray, room: float, limit: float) -> np.ndarray:
        # extra . x <= room, as one array with the bound last, scaled
        room = max(room, 0.0) if within(0.0, room + 1e-12 * abs(limit)) else -1.0
        scale = room / _UNIT if room > 0 else 1.0
        # What exceeds the room alone can not be chosen.
        self.upper[extra > room + 1e-9 * abs(limit)] = 0.0
        return np.append(extra, room) / scale

    def _peak(self, found, problem, limit) -> list[np.ndarray]:
        if not within(problem.fixed.get(PEAK, 0), limit):
            self.upper[:] = 0.0
        if PEAK in problem.cost_names:
            live = np.concatenate([v.costs[PEAK] for v in found])
            self.upper[live > limit * (1 + 1e-12)] = 0.0
        steps = np.concatenate([v.steps for v in found])  # [sum of K, S]
        return [self._row(column, limit, limit) for column in steps.T]

    def best(self, time_limit_s: float | None) -> tuple[list[int], float] | None:
        """Index of the choice of every variable, and a bound; None if there is no solution."""
        scipy = self.scipy
        groups, size = len(self.starts) - 1, int(self.starts[-1])
        if any(
            not self.upper[a:b].any() for a, b in zip(self.starts, self.starts[1:], strict=False)
        ):
            return None
        equal = scipy.sparse.csr_array(
            (np.ones(size), (self.ones, np.arange(size))), shape=(groups, size)
        )
        constraints = [scipy.optimize.LinearConstraint(equal, 1, 1)]
        if self.rows:
            table = np.stack(self.rows)
            constraints.append(
                scipy.optimize.LinearConstraint(
                    scipy.sparse.csr_array(table[:, :-1]), -np.inf, table[:, -1]
                )
            )
        options = {"mip_rel_gap": 0.0}
        if time_limit_s is not None:
            options["time_limit"] = time_limit_s
        answer = scipy.optimize.milp(
            self.objective,
            constraints=constraints,
            bounds=scipy.optimize.Bounds(0, self.upper),
            integrality=np.ones(size),
            options=options,
        )
        if answer.status == 2:
            return None
        if answer.x is None:
            raise TimeoutError(f"no solution within time_limit_s={time_limit_s}: {answer.message}")
        picks = [
            int(np.argmax(answer.x[a:b]))
            for a, b in zip(self.starts, self.starts[1:], strict=False)
        ]
        bound = answer.mip_dual_bound
        bound = answer.fun if bound is None else bound
        return picks, float(bound) * self.scale + self.offset

    def cut(self, picks: Sequence[int]) -> None:
        """Takes one solution out: at least one decision must differ."""
        row = np.zeros(int(self.starts[-1]) + 1)
        row[self.starts[:-1] + np.asarray(picks)] = 1.0
        row[-1] = len(picks) - 1
        self.rows.append(row)


def _infeasible(problem: Problem, budget: Budget, found: list[Variable]) -> str:
    lines, possible = [], True
    for name, limit in budget.limits.items():
        least = least_cost(problem, found, name)
        if not within(least, limit):
            possible = False
            lines.append(f"{name}: the limit is {limit:g}, the least possible {_number(least)}, "
                         f"{_number(least - limit)} more")  # fmt: skip
        else:
            lines.append(f"{name}: the least possible is {_number(least)}, within {limit:g}")
    if not possible:
        return "no choice meets the budget: " + "; ".join(lines)
    lines = []
    for name, limit in budget.limits.items():
        rest = _without(budget, name)
        least = _least_given(problem, found, name, rest)
        if least is None:
            alone = _number(least_cost(problem, found, name))
            lines.append(
                f"{name}: the least possible alone is {alone}, within {limit:g}, but the other "
                "limits cannot be met at once"
            )
        else:
            lines.append(
                f"{name}: under the other limits the least is {_number(least)}, "
                f"{_number(max(least - limit, 0))} more than {limit:g}"
            )
    return "every limit can be met alone, but not all at once: " + "; ".join(lines)


def _number(value: float) -> str:
    return f"{int(value)}" if float(value).is_integer() else f"{value:.6g}"


def _without(budget: Budget, name: str) -> Budget:
    if name in budget.others:
        others = {key: value for key, value in budget.others.items() if key != name}
        return replace(budget, others=others)
    return replace(budget, **{name: None})


def least_cost(problem: Problem, found: Sequence[Variable], name: str) -> float:
    """The least that a cost can be, whatever the others are."""
    fixed = problem.fixed.get(name, 0)
    lows = [v.costs[name].min() for v in found if name in v.costs]
    if name != PEAK:
        return sum(lows, fixed) if lows else fixed
    # With steps it is a bound: each step has its own best choices.
    steps = sum((v.steps.min(axis=0) for v in found), np.zeros(len(problem.steps)))
    return max([fixed, *lows, *steps])


def _least_given(problem, found, name, rest) -> float | None:
    if name == PEAK:
        return _least_peak(problem, found, rest)
    objective = np.concatenate([v.costs[name] for v in found]).astype(np.float64)
    answer = _Program(found, problem, rest, objective).best(None)
    return None if answer is None else problem.costs(named(found, answer[0]))[name]


def _least_peak(problem, found, rest) -> float | None:
    # Halves the interval in which the least peak lies; each try gives a peak that is reached.
    steps = sum((v.steps.max(axis=0) for v in found), np.zeros(len(problem.steps)))
    own = [v.costs[PEAK].max() for v in found if PEAK in v.costs]
    low, high = 0.0, float(max([*own, *steps, problem.fixed.get(PEAK, 0)]))
    best = None
    for _ in range(40):
        answer = _Program(found, problem, replace(rest, peak_bytes=high)).best(None)
        if answer is None:
            if best is None:
                return None
            low, high = high, (high + best) / 2
        else:
            best = problem.costs(named(found, answer[0]))[PEAK]
            high = (low + best) / 2
        if best - low <= 0.5:
            break
    return best
