"""What is searched: for every site one choice among several, each with a loss and costs."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxcompress.core.paths import near_misses

PEAK = "peak_bytes"
# Sums of floats that are equal on paper may differ in their last digits.
_SLACK = 1e-12


@dataclass(frozen=True)
class Budget:
    """Most that a network may cost; None: no limit.

    Attributes:
      weight_bytes, macs, latency_s, energy_j: limits of sums over the sites; `weight_bytes` is the
        payload: codes, scales, positions of all weights, without the header of a file.
      file_bytes: limit of the file that `export.save` writes of the packed network and the grids
        of its activations (no metadata, not compressed), header included.
      peak_bytes: limit of a maximum, the most bytes that are live at once.
      others: limits of any further costs, by name; sums.

    Raises:
      ValueError: a limit is negative or not finite, or `others` repeats a field.

    >>> Budget(weight_bytes=60_000, latency_s=0.1).limits
    {'weight_bytes': 60000, 'latency_s': 0.1}
    """

    weight_bytes: float | None = None
    peak_bytes: float | None = None
    latency_s: float | None = None
    energy_j: float | None = None
    macs: float | None = None
    file_bytes: float | None = None
    others: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self):
        named = {f.name for f in dataclasses.fields(self)} & set(self.others)
        if named:
            raise ValueError(f"Budget(others): {sorted(named)} are arguments of their own")
        for name, limit in self.limits.items():
            if isinstance(limit, bool) or not isinstance(limit, int | float | np.number):
                raise ValueError(f"Budget({name}) must be a number, got {limit!r}")
            if not 0 <= limit < math.inf:
                raise ValueError(
                    f"Budget({name}) must be finite and at least 0, got {limit}; leave a limit out "
                    "that does not count"
                )

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set, by name."""
        names = [f.name for f in dataclasses.fields(self) if f.name != "others"]
        found = {name: getattr(self, name) for name in names}
        return {k: v for k, v in {**found, **self.others}.items() if v is not None}


def within(total: float, limit: float) -> bool:
    """Whether a cost meets its limit, rounding of sums aside."""
    return total <= limit + _SLACK * abs(limit)


@dataclass(frozen=True)
class Choice:
    """One way to store or run a site.

    Attributes:
      loss: what it adds to the loss of the network; an additive proxy, may be negative.
      costs: by name, as in `Budget`; "peak_bytes" is what is live while this site runs.
    """

    loss: float
    costs: Mapping[str, float] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Problem:
    """A multiple-choice knapsack: sum of losses minimal, costs within a budget.

        min sum_l loss[l, k_l]   subject to   sum_l cost_r[l, k_l] <= B_r for every r

    Args:
      sites: {site: {name of the choice: Choice}}, in order.
      groups: sites that must take choices of the same name: tied weights, inputs of one addition,
        layers that the hardware runs in one mode. Only names that all members have are left.
      fixed: costs outside the sites, by name; added to every sum, and one more term of the maximum
        for "peak_bytes".
      steps: where what is live at once depends on several sites: for each moment
        {site: {name of the choice: bytes}}; each sum is a term of the maximum "peak_bytes".

    Raises:
      ValueError: a site without choices; costs that are missing, negative or not finite; groups
        that overlap, name no site or share no choice; steps that name no site or choice.

    Source: Kellerer, Pferschy, Pisinger, Knapsack Problems (2004), chapter 11; for bit widths: Yao
    et al., HAWQ-V3, ICML 2021, arXiv 2011.10680, section 3.4.
    """

    sites: Mapping[str, Mapping[str, Choice]] = field(hash=False)
    groups: Sequence[Sequence[str]] = ()
    fixed: Mapping[str, float] = field(default_factory=dict, hash=False)
    steps: Sequence[Mapping[str, Mapping[str, float]]] = field(default=(), hash=False)

    def __post_init__(self):
        names = self.cost_names
        for site, choices in self.sites.items():
            if not choices:
                raise ValueError(f"site {site!r} has no choices")
            for name, choice in choices.items():
                _check_choice(f"choice {name!r} of site {site!r}", choice, names)
        for name, value in self.fixed.items():
            _check_number(f"fixed[{name!r}]", value)
        _check_groups(self)
        for number, step in enumerate(self.steps):
            for site, by_choice in step.items():
                self._known(f"steps[{number}]", site)
                missing = set(self.sites[site]) - set(by_choice)
                if missing:
                    raise ValueError(f"steps[{number}][{site!r}] lacks {sorted(missing)}")
                for name, value in by_choice.items():
                    _check_number(f"steps[{number}][{site!r}][{name!r}]", value)

    def _known(self, what: str, site: str) -> None:
        if site not in self.sites:
            near = ", ".join(near_misses(site, self.sites)) or "there are none"
            raise ValueError(f"{what}: no site {site!r}; nearest: {near}")

    @property
    def cost_names(self) -> tuple[str, ...]:
        """The costs that every choice has."""
        first = next((c for choices in self.sites.values() for c in choices.values()), None)
        return tuple(first.costs) if first else ()

    def loss(self, chosen: Mapping[str, str]) -> float:
        """The sum of the losses of {site: choice}."""
        self._check_chosen(chosen)
        return math.fsum(self.sites[site][chosen[site]].loss for site in self.sites)

    def costs(self, chosen: Mapping[str, str]) -> dict[str, float]:
        """Sums of the costs, and the maximum for "peak_bytes", of {site: choice}.

        Raises:
          ValueError: a site or a choice that does not exist, or a site without a choice.
        """
        self._check_chosen(chosen)
        found = {}
        for name in dict.fromkeys(
            (*self.cost_names, *self.fixed, *((PEAK,) if self.steps else ()))
        ):
            parts = [self.sites[site][chosen[site]].costs.get(name, 0) for site in self.sites]
            parts.append(self.fixed.get(name, 0))
            if name == PEAK:
                sums = [
                    math.fsum(by_choice[chosen[site]] for site, by_choice in step.items())
                    for step in self.steps
                ]
                found[name] = max(*parts, *sums, 0)
            else:
                whole = all(isinstance(part, int | np.integer) for part in parts)
                found[name] = sum(parts) if whole else math.fsum(parts)
        return found

    def fits(self, chosen: Mapping[str, str], budget: Budget) -> bool:
        """Whether {site: choice} meets every limit."""
        costs = self.costs(chosen)
        return all(within(costs[name], limit) for name, limit in budget.limits.items())

    def _check_chosen(self, chosen: Mapping[str, str]) -> None:
        for site in chosen:
            self._known("chosen", site)
        for site, choices in self.sites.items():
            if site not in chosen:
                raise ValueError(f"chosen: site {site!r} has no choice")
            if chosen[site] not in choices:
                raise ValueError(
                    f"chosen[{site!r}] must be one of {list(choices)}, got {chosen[site]!r}"
                )


def _check_number(what: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{what} must be finite and at least 0, got {value}")


def _check_choice(what: str, choice: Choice, names: Iterable[str]) -> None:
    if not math.isfinite(choice.loss):
        raise ValueError(f"{what}: the loss must be finite, got {choice.loss}")
    if set(choice.costs) != set(names):
        raise ValueError(f"{what} has the costs {sorted(choice.costs)}, others {sorted(names)}")
    for name, value in choice.costs.items():
        _check_number(f"{what}: {name}", value)


def _check_groups(problem: Problem) -> None:
    seen: set[str] = set()
    for group in problem.groups:
        for site in group:
            problem._known("groups", site)
            if site in seen:
                raise ValueError(f"groups: site {site!r} is in two of them")
            seen.add(site)
        if group and not shared(problem, group):
            raise ValueError(f"groups: {list(group)} have no choice of the same name")


def shared(problem: Problem, group: Sequence[str]) -> list[str]:
    """Names of the choices that all sites of a group have."""
    first, *rest = (problem.sites[site] for site in group)
    return [name for name in first if all(name in choices for choices in rest)]


@dataclass(frozen=True)
class Variable:
    """Sites that decide together: one row per choice.

    Attributes:
      loss: [K] float64.
      costs: [K] by name; sums over the sites, the maximum for "peak_bytes".
      steps: [K, S], bytes at every step.
    """

    sites: tuple[str, ...]
    names: tuple[str, ...]
    loss: np.ndarray
    costs: Mapping[str, np.ndarray]
    steps: np.ndarray


def variables(problem: Problem) -> list[Variable]:
    """The decisions of a problem: a group is one, every other site is one."""
    groups = [tuple(group) for group in problem.groups if group]
    grouped = {site for group in groups for site in group}
    found = [(site,) for site in problem.sites if site not in grouped] + groups
    order = {site: number for number, site in enumerate(problem.sites)}
    return [_variable(problem, sites) for sites in sorted(found, key=lambda s: order[s[0]])]


def _variable(problem: Problem, sites: tuple[str, ...]) -> Variable:
    names = shared(problem, sites)
    rows = [[problem.sites[site][name] for site in sites] for name in names]
    loss = np.array([math.fsum(c.loss for c in row) for row in rows])
    costs = {
        cost: np.array([(max if cost == PEAK else sum)(c.costs[cost] for c in row) for row in rows])
        for cost in problem.cost_names
    }
    steps = np.zeros((len(names), len(problem.steps)))
    for s, step in enumerate(problem.steps):
        for k, name in enumerate(names):
            steps[k, s] = sum(step[site][name] for site in sites if site in step)
    return Variable(sites, tuple(names), loss, costs, steps)
