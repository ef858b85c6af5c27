"""Students of a family: all that fit and no others, in the order of the proxy."""

import math

import jax
import jax.numpy as jnp
import pytest

import jaxcompress as jc
from experiments.models import digits
from jaxcompress.search import Budget, Student, effective_parameters, students, train_students

pytestmark = pytest.mark.broad

OPTIONS = {"width": (4, 8), "hidden": (16, 64), "bits": (4, 8), "sparsity": (0.0, 0.5)}
IMAGE = jnp.zeros((1, 8, 8, 1))


def build(width, hidden):
    model = digits.DigitsCNN(features=(width, 2 * width), hidden=hidden)
    return digits.apply_fn(model), model.init(jax.random.key(0), IMAGE)["params"]


def recipe(bits, sparsity):
    weights = jc.quantize.weights(jc.formats.integer(bits), axis=-1)
    return jc.chain(
        jc.prune.magnitude(jc.prune.one_shot(sparsity), scope="global"),
        jc.by_path({".*kernel": weights}, default=jc.identity()),
    )


@pytest.fixture(scope="module")
def everything():
    return students(build, OPTIONS, IMAGE, device="stm32l4r5", recipe=recipe, activations=8)


def test_all_members_with_the_cost_of_what_ships(everything):
    assert len(everything) == 16
    assert len({tuple(s.options.values()) for s in everything}) == 16
    for s in everything[::5]:
        apply_fn, params = build(s.options["width"], s.options["hidden"])
        chosen = recipe(s.options["bits"], s.options["sparsity"])
        packed = chosen.pack(params, chosen.update(params, chosen.init(params)))
        cost = jc.cost.estimate(apply_fn, packed, IMAGE, device="stm32l4r5", activations=8)
        assert cost == s.cost and s.cost.weight_bytes == jc.packed_bytes(s.packed)


def test_those_that_fit_and_no_others(everything):
    budget = Budget(weight_bytes=6000, latency_s=0.002, others={"traffic": 1})
    with pytest.raises(ValueError, match="'traffic' is no number"):
        students(build, OPTIONS, IMAGE, device="stm32l4r5", budget=budget, recipe=recipe)
    limits = Budget(weight_bytes=6000, latency_s=0.002)
    found = students(
        build, OPTIONS, IMAGE, device="stm32l4r5", budget=limits, recipe=recipe, activations=8
    )
    expected = [
        s.options
        for s in everything
        if s.cost.weight_bytes <= 6000 and s.cost.latency_s <= 0.002 and s.cost.fits()
    ]
    assert 0 < len(expected) < 16
    assert [s.options for s in found] == expected
    first = students(
        build, OPTIONS, IMAGE, device="stm32l4r5", budget=limits, recipe=recipe, activations=8,
        most=2,
    )  # fmt: skip
    assert [s.options for s in first] == expected[:2]


def test_the_proxy_orders_and_is_the_formula(everything):
    values = [s.proxy for s in everything]
    assert values == sorted(values, reverse=True)
    plain = students(build, {"width": (4,), "hidden": (16,)}, IMAGE, device="stm32l4r5")[0]
    count = sum(w.size for w in jax.tree.leaves(plain.params))
    assert math.isclose(effective_parameters(plain), count * (1 - math.exp(-32 / 2.6745)))
    by_cost = students(
        build, OPTIONS, IMAGE, device="stm32l4r5", recipe=recipe, proxy=lambda s: -s.cost.macs
    )
    macs = [s.cost.macs for s in by_cost]
    assert macs == sorted(macs)
    at = {tuple(s.options.values()): s.proxy for s in everything}
    kernels = sum(w.size for w in jax.tree.leaves(build(4, 16)[1]) if w.ndim > 1)
    biases = count - kernels
    value = lambda n, bits: n * (1 - math.exp(-bits / 2.6745))
    assert math.isclose(at[4, 16, 4, 0.0], value(kernels, 4) + value(biases, 32), rel_tol=1e-9)
    # A leaf with so few zeros that a mask does not pay is stored dense and counts as dense.
    half = value(kernels / 2, 4) + value(biases, 32)
    assert half <= at[4, 16, 4, 0.5] <= 1.05 * half


def test_building_happens_once_per_architecture():
    calls = []

    def counted(width):
        calls.append(width)
        return build(width, 16)

    students(
        counted, {"width": (4, 8), "bits": (2, 4, 8)}, IMAGE, device="stm32l4r5",
        recipe=lambda bits, **_: recipe(bits, 0.0), activations=lambda bits: max(bits, 8),
    )  # fmt: skip
    assert calls == [4, 8]


def test_what_cannot_be_is_refused():
    only = {"width": (4,), "hidden": (16,)}
    with pytest.raises(ValueError, match="none of 1 students fits.*weight_bytes .*at most 10"):
        students(build, only, IMAGE, device="stm32l4r5", budget=Budget(weight_bytes=10))
    with pytest.raises(ValueError, match="'depth'"):
        students(build, {**only, "depth": (1,)}, IMAGE, device="stm32l4r5")
    with pytest.raises(ValueError, match="'width' has no values"):
        students(build, {"width": (), "hidden": (16,)}, IMAGE, device="stm32l4r5")


def test_training_orders_by_score(everything):
    few = everything[:4]
    scores = dict(zip((id(s.packed) for s in few), (1.0, 3.0, 2.0, 0.0), strict=True))
    ranked = train_students(few, lambda s: scores[id(s.packed)])
    assert [s.score for s in ranked] == [3.0, 2.0, 1.0, 0.0]
    assert isinstance(ranked[0], Student) and ranked[0].options == few[1].options
    with pytest.raises(ValueError, match="NaN"):
        train_students(few, lambda s: math.nan)
    with pytest.raises(ValueError, match="no students"):
        train_students([], lambda s: 0.0)
