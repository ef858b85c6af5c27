"""The integer program against all solutions: optimum, k best, groups, peaks, and no solution."""

import math
import subprocess
import sys

import numpy as np
import pytest
from test_search_pareto import exhaustive, random_problem

import jaxcompress as jc
from jaxcompress.search import Budget, Choice, Problem, allocate, rerank

pytestmark = pytest.mark.broad

COSTS = ("weight_bytes", "latency_s", "energy_j", "macs", "peak_bytes")


def brute(problem, budget, *, groups=()):
    """All that fits, best first."""
    fitting = [
        c
        for c in exhaustive(problem)
        if problem.fits(c, budget) and all(len({c[s] for s in g}) == 1 for g in groups)
    ]
    return sorted(fitting, key=problem.loss)


def budget_between(rng, problem, names, share):
    """Limits of which about `share` lies between the least and the most of each cost."""
    limits = {}
    for name in names:
        low, high = (
            problem.costs(
                {
                    site: pick(choices, key=lambda k, c=choices: c[k].costs[name])
                    for site, choices in problem.sites.items()
                }
            )[name]
            for pick in (min, max)
        )
        limits[name] = low + share * rng.uniform(0.7, 1.3) * (high - low)
    return Budget(**limits)


def test_optimum_is_that_of_brute_force():
    solved = 0
    for seed in range(80):
        rng = np.random.default_rng(seed)
        # up to 8 layers x 4 choices; the largest ones rarely, for brute force
        layers, choices = (8, 4) if seed < 2 else map(int, rng.integers(1, (7, 5)))
        names = tuple(rng.choice(COSTS, int(rng.integers(1, 6)), replace=False))
        problem = random_problem(rng, layers, choices, names, whole=bool(seed % 2))
        budget = budget_between(rng, problem, names, 0.5)
        expected = brute(problem, budget)
        if not expected:
            with pytest.raises(ValueError, match="least"):
                allocate(problem, budget)
            continue
        solved += 1
        found = allocate(problem, budget)[0]
        assert problem.fits(found.chosen, budget)
        np.testing.assert_allclose(found.loss, problem.loss(expected[0]), rtol=0, atol=1e-9)
        assert found.costs == problem.costs(found.chosen)
        np.testing.assert_allclose(found.bound, found.loss, rtol=0, atol=1e-6)
    assert solved >= 50


@pytest.mark.parametrize("seed", range(4))
def test_k_best_are_the_k_best_of_brute_force(seed):
    rng = np.random.default_rng(100 + seed)
    problem = random_problem(rng, 4, 3, ("weight_bytes", "macs"), whole=bool(seed % 2))
    budget = budget_between(rng, problem, ("weight_bytes", "macs"), 0.6)
    expected = brute(problem, budget)
    found = allocate(problem, budget, k=12)
    assert len(found) == min(12, len(expected))
    np.testing.assert_allclose(
        [s.loss for s in found], [problem.loss(c) for c in expected[:12]], atol=1e-9
    )
    assert len({tuple(s.chosen.values()) for s in found}) == len(found)


def test_fewer_come_back_if_there_are_no_more():
    problem = random_problem(np.random.default_rng(0), 2, 2, ("macs",))
    assert len(allocate(problem, Budget(macs=1000), k=10)) == 4


def test_groups_take_the_same_choice():
    for seed in range(6):
        rng = np.random.default_rng(200 + seed)
        free = random_problem(rng, 5, 3, ("weight_bytes", "peak_bytes"))
        groups = [("layer0", "layer2", "layer4")]
        problem = Problem(free.sites, groups=groups)
        budget = Budget(weight_bytes=25, peak_bytes=7)
        expected = brute(problem, budget, groups=groups)
        if expected:
            found = allocate(problem, budget)[0]
            assert len({found.chosen[s] for s in groups[0]}) == 1
            assert found.loss == problem.loss(expected[0])


def test_groups_keep_the_names_that_all_have():
    byte = {"weight_bytes": 1}
    sites = {
        "a": {"int4": Choice(0.0, byte), "int8": Choice(1.0, byte)},
        "b": {"int8": Choice(1.0, byte), "int2": Choice(0.0, byte)},
        "c": {"int2": Choice(0.0, byte)},
    }
    found = allocate(Problem(sites, groups=[("a", "b")]), Budget())[0]
    assert found.chosen == {"a": "int8", "b": "int8", "c": "int2"}
    with pytest.raises(ValueError, match=r"\['a', 'c'\] have no choice of the same name"):
        Problem(sites, groups=[("a", "c")])
    with pytest.raises(ValueError, match="'a' is in two"):
        Problem(sites, groups=[("a", "b"), ("a",)])
    with pytest.raises(ValueError, match="no site 'aa'; nearest: a"):
        Problem(sites, groups=[("aa",)])


def test_peak_of_steps_is_a_maximum_of_sums():
    for seed in range(6):
        rng = np.random.default_rng(300 + seed)
        free = random_problem(rng, 5, 3, ("peak_bytes",))
        live = [
            {s: {k: int(rng.integers(1, 9)) for k in free.sites[s]} for s in pair}
            for pair in (("layer0", "layer1"), ("layer1", "layer2", "layer4"), ("layer3",))
        ]
        problem = Problem(free.sites, steps=live, fixed={"peak_bytes": 5})
        budget = Budget(peak_bytes=10)
        expected = brute(problem, budget)
        found = allocate(problem, budget)[0]
        assert found.loss == problem.loss(expected[0])


def test_fixed_costs_and_other_costs_count():
    choices = {"a": Choice(0.0, {"wear": 3}), "b": Choice(1.0, {"wear": 1})}
    problem = Problem({"x": choices}, fixed={"wear": 2})
    assert allocate(problem, Budget(others={"wear": 5}))[0].chosen == {"x": "a"}
    assert allocate(problem, Budget(others={"wear": 4.9}))[0].chosen == {"x": "b"}


def test_sums_at_the_limit_fit_to_the_last_byte():
    size = 10**9 + 1
    choices = {
        "small": Choice(1.0, {"weight_bytes": size}),
        "large": Choice(0.0, {"weight_bytes": size + 1}),
    }
    problem = Problem({f"layer{i}": choices for i in range(3)})
    for extra in range(4):
        found = allocate(problem, Budget(weight_bytes=3 * size + extra))[0]
        assert found.loss == 3 - extra and found.costs["weight_bytes"] == 3 * size + extra


def test_infeasible_budgets_say_the_least_possible():
    rows = {"int2": Choice(1.0, {"weight_bytes": 20, "latency_s": 0.5}),
            "int8": Choice(0.0, {"weight_bytes": 80, "latency_s": 0.25})}  # fmt: skip
    problem = Problem({"a": rows, "b": rows})
    with pytest.raises(ValueError) as alone:
        allocate(problem, Budget(weight_bytes=30, latency_s=1.0))
    assert str(alone.value) == (
        "no choice meets the budget: weight_bytes: the limit is 30, the least possible 40, 10 "
        "more; latency_s: the least possible is 0.5, within 1"
    )
    with pytest.raises(ValueError) as together:
        allocate(problem, Budget(weight_bytes=40, latency_s=0.5))
    assert str(together.value) == (
        "every limit can be met alone, but not all at once: weight_bytes: under the other limits "
        "the least is 160, 120 more than 40; latency_s: under the other limits the least is 1, "
        "0.5 more than 0.5"
    )


def test_infeasible_peak_says_the_least():
    rows = {"int2": Choice(1.0, {"weight_bytes": 8, "peak_bytes": 2}),
            "int8": Choice(0.0, {"weight_bytes": 2, "peak_bytes": 8})}  # fmt: skip
    problem = Problem({"a": rows, "b": rows})
    with pytest.raises(ValueError, match="peak_bytes: the limit is 1, the least possible 2, 1 mor"):
        allocate(problem, Budget(peak_bytes=1))
    with pytest.raises(ValueError, match="peak_bytes: under the other limits the least is 8, 5 mo"):
        allocate(problem, Budget(peak_bytes=3, weight_bytes=15))


def test_re_ranking_by_the_true_loss():
    problem = random_problem(np.random.default_rng(7), 3, 3, ("macs",))
    found = allocate(problem, Budget(macs=20), k=6)
    # the true loss turns the order around; NaN comes last
    true = {tuple(s.chosen.values()): -float(i) for i, s in enumerate(found)}
    true[tuple(found[2].chosen.values())] = math.nan
    ranked = rerank(found, lambda chosen: true[tuple(chosen.values())])
    assert [s.true_loss for s in ranked[:5]] == [-5.0, -4.0, -3.0, -1.0, 0.0]
    assert math.isnan(ranked[5].true_loss or 0.0)
    with pytest.raises(ValueError, match="NaN for every"):
        rerank(found, lambda chosen: math.nan)
    with pytest.raises(ValueError, match="no solutions"):
        rerank([], lambda chosen: 0.0)


def test_bad_problems_and_budgets():
    with pytest.raises(ValueError, match="'a' has no choices"):
        Problem({"a": {}})
    with pytest.raises(ValueError, match="choice 'x' of site 'a': the loss must be finite"):
        Problem({"a": {"x": Choice(math.nan, {})}})
    with pytest.raises(ValueError, match="choice 'x' of site 'a': macs must be finite"):
        Problem({"a": {"x": Choice(0.0, {"macs": -1})}})
    with pytest.raises(ValueError, match=r"choice 'y' of site 'a' has the costs \[\]"):
        Problem({"a": {"x": Choice(0.0, {"macs": 1}), "y": Choice(0.0)}})
    problem = Problem({"a": {"x": Choice(0.0, {"macs": 1})}})
    with pytest.raises(ValueError, match="no choice has the cost 'latency_s'; there are: macs"):
        allocate(problem, Budget(latency_s=1.0))
    with pytest.raises(ValueError, match=r"chosen\['a'\] must be one of \['x'\], got 'z'"):
        problem.costs({"a": "z"})
    with pytest.raises(ValueError, match="k must be at least 1"):
        allocate(problem, Budget(), k=0)
    with pytest.raises(ValueError, match=r"Budget\(macs\) must be finite and at least 0"):
        Budget(macs=-1)
    with pytest.raises(ValueError, match="arguments of their own"):
        Budget(others={"macs": 1})
    assert allocate(Problem({}), Budget())[0].chosen == {}
    assert jc.Budget is jc.search.Budget


def test_scipy_is_imported_only_when_needed():
    code = (
        "import sys; sys.modules['scipy.optimize'] = None\n"
        "import jaxcompress.search as s\n"
        "p = s.Problem({'a': {'x': s.Choice(0.0, {'macs': 1})}})\n"
        "s.front(p, 'macs')\n"
        "try: s.allocate(p, s.Budget())\n"
        "except ImportError as e: print(e)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == 'search needs SciPy: pip install "jaxcompress[search]"'
