"""The front against all solutions; baselines against the exact solver."""

import itertools
import math

import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.search import Budget, Choice, Problem, allocate, evolve, front, greedy

pytestmark = pytest.mark.broad


def random_problem(rng, layers, choices, costs, *, whole=True):
    """Random losses and costs; whole numbers of few values, so that there are ties."""

    def number():
        return int(rng.integers(0, 9)) if whole else float(rng.random())

    return Problem(
        {
            f"layer{i}": {
                f"int{k + 1}": Choice(number(), {name: number() for name in costs})
                for k in range(choices)
            }
            for i in range(layers)
        }
    )


def exhaustive(problem):
    """Every {site: choice}."""
    for names in itertools.product(*problem.sites.values()):
        yield dict(zip(problem.sites, names, strict=True))


def exhaustive_front(problem, cost):
    points = {(problem.costs(c)[cost], problem.loss(c)) for c in exhaustive(problem)}
    best, kept = math.inf, []
    for point in sorted(points):
        if point[1] < best:
            best = point[1]
            kept.append(point)
    return kept


@pytest.mark.parametrize("seed", range(12))
def test_front_is_the_exhaustive_one_with_ties(seed):
    rng = np.random.default_rng(seed)
    layers, choices = int(rng.integers(1, 7)), int(rng.integers(1, 5))
    problem = random_problem(rng, layers, choices, ("macs",))
    found = front(problem, "macs")
    assert list(zip(found.cost, found.loss, strict=True)) == exhaustive_front(problem, "macs")
    for i in range(len(found)):
        solution = found.solution(i)
        assert (solution.costs["macs"], solution.loss) == (found.cost[i], found.loss[i])


@pytest.mark.parametrize("seed", range(6))
def test_front_of_real_numbers_and_negative_losses(seed):
    rng = np.random.default_rng(seed)
    sites = {
        f"layer{i}": {
            str(k): Choice(float(rng.normal()), {"latency_s": float(rng.random())})
            for k in range(4)
        }
        for i in range(5)
    }
    problem = Problem(sites)
    found = front(problem, "latency_s")
    expected = np.array(exhaustive_front(problem, "latency_s"))
    np.testing.assert_allclose(np.stack([found.cost, found.loss], 1), expected, rtol=1e-12)


def test_front_of_a_maximum():
    rng = np.random.default_rng(1)
    problem = random_problem(rng, 4, 4, ("peak_bytes",))
    found = front(problem, "peak_bytes")
    expected = exhaustive_front(problem, "peak_bytes")
    assert list(zip(found.cost, found.loss, strict=True)) == expected


def test_front_agrees_with_the_integer_program_at_every_budget():
    problem = random_problem(np.random.default_rng(3), 8, 4, ("weight_bytes",))
    found = front(problem)
    for limit in range(int(found.cost[0]), int(found.cost[-1]) + 2, 3):
        best = allocate(problem, Budget(weight_bytes=limit))[0]
        assert best.loss == found.within(limit).loss
    limited = front(problem, limit=20)
    assert limited.cost.tolist() == [c for c in found.cost if c <= 20]
    with pytest.raises(ValueError, match=r"weight_bytes: the limit is -1, the least possible"):
        found.within(-1)


def test_front_of_groups_and_fixed_costs():
    rng = np.random.default_rng(4)
    free = random_problem(rng, 4, 3, ("macs",))
    problem = Problem(free.sites, groups=[("layer0", "layer3")], fixed={"macs": 100})
    tied = [c for c in exhaustive(problem) if c["layer0"] == c["layer3"]]
    points = sorted({(problem.costs(c)["macs"], problem.loss(c)) for c in tied})
    best = [p for i, p in enumerate(points) if all(p[1] < q[1] for q in points[:i])]
    found = front(problem, "macs")
    assert list(zip(found.cost, found.loss, strict=True)) == best


def test_no_sites_and_bad_costs():
    empty = front(Problem({}), "macs")
    assert empty.cost.tolist() == [0] and empty.solution(0).chosen == {}
    problem = random_problem(np.random.default_rng(0), 2, 2, ("macs",))
    with pytest.raises(ValueError, match="cost must be one of"):
        front(problem, "weight_bytes")


def test_baselines_fit_and_never_beat_the_exact_solver():
    rng = np.random.default_rng(5)
    for _ in range(5):
        problem = random_problem(rng, 7, 4, ("weight_bytes", "latency_s"), whole=False)
        budget = Budget(weight_bytes=3.0, latency_s=3.0)
        exact = allocate(problem, budget)[0]
        for found in (
            greedy(problem, budget),
            evolve(problem, budget, seed=1, population=32, generations=30),
        ):
            assert problem.fits(found.chosen, budget)
            assert found.loss >= exact.loss - 1e-9
    again = evolve(problem, budget, seed=1, population=32, generations=30)
    assert again == found and dict(again.chosen) == dict(found.chosen)


def test_baselines_say_that_nothing_fits():
    problem = random_problem(np.random.default_rng(6), 3, 3, ("macs",), whole=False)
    with pytest.raises(ValueError, match="exceeded"):
        greedy(problem, Budget(macs=0.0))
    with pytest.raises(ValueError, match="nothing fits"):
        evolve(problem, Budget(macs=0.0), generations=2)


def test_greedy_under_peaks_and_steps():
    choice = {"int4": Choice(1.0, {"peak_bytes": 4}), "int8": Choice(0.0, {"peak_bytes": 8})}
    live = {"a": {"int4": 4, "int8": 8}, "b": {"int4": 4, "int8": 8}}
    problem = Problem({"a": choice, "b": choice}, steps=[live])
    assert greedy(problem, jc.Budget(peak_bytes=12)).loss == 1.0
    assert evolve(problem, jc.Budget(peak_bytes=12), generations=5).loss == 1.0
