"""Automatic compression: plans that fit, and are what they say."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from experiments.models import digits
from jaxcompress.search import Budget, Plan, Search, compress, integer_options, load_plan

pytestmark = pytest.mark.broad

OPTIONS = integer_options((2, 4, 8))


@pytest.fixture(scope="module")
def network():
    model = digits.DigitsCNN(features=(4, 8), hidden=16)
    rng = np.random.default_rng(0)
    batches = [(jnp.asarray(rng.random((32, 8, 8, 1)), jnp.float32),) for _ in range(2)]
    params = model.init(jax.random.key(0), batches[0][0])["params"]
    return digits.apply_fn(model), params, batches


@pytest.fixture(scope="module")
def search(network):
    return Search(*network, device="stm32l4r5", options=OPTIONS)


def test_predicted_costs_are_those_of_what_ships(network, search):
    apply_fn, _, batches = network
    least, most = (search.uniform(name).predicted["weight_bytes"] for name in ("int2", "int8"))
    for share in (0.1, 0.5, 0.8):
        budget = Budget(weight_bytes=least + share * (most - least))
        plan = search.plans(budget, candidates=4)[0]
        found = search.apply(plan)
        assert found.cost.weight_bytes == plan.predicted["weight_bytes"] <= budget.weight_bytes
        assert found.cost.weight_bytes == jc.packed_bytes(found.packed)
        assert found.cost.macs == plan.predicted["macs"]
        assert found.cost.peak_bytes == plan.predicted["peak_bytes"]
        np.testing.assert_allclose(found.cost.latency_s, plan.predicted["latency_s"], rtol=1e-6)
        # The weights it was chosen by are those that ship.
        view = jc.unpack(found.packed)
        out, reference = (apply_fn(p, batches[0][0]) for p in (view, network[1]))
        second = (apply_fn(p, batches[1][0]) for p in (view, network[1]))
        kd = lambda a, b: float(jc.distill.kd(a, b, temperature=1.0))
        measured = (kd(out, reference) + kd(*second)) / 2
        np.testing.assert_allclose(measured, plan.measured["kl"], rtol=1e-3, atol=1e-7)
        assert found(batches[0][0]).shape == (32, 10) and len(found.grids) == 4


def test_never_worse_than_uniform_of_the_same_size(search):
    for option in OPTIONS:
        uniform = search.uniform(option)
        best = search.plans(Budget(weight_bytes=uniform.predicted["weight_bytes"]), candidates=8)[0]
        assert best.measured["kl"] <= uniform.measured["kl"]


def test_candidates_are_ordered_by_what_they_measure(search):
    middle = search.uniform("int4").predicted["weight_bytes"]
    found = search.plans(Budget(weight_bytes=middle), candidates=12)
    measured = [plan.measured["kl"] for plan in found]
    assert len(found) == 12 and measured == sorted(measured)
    assert len({tuple(plan.weights.items()) for plan in found}) == 12


def test_a_plan_is_a_file_that_can_be_edited(search, tmp_path):
    plan = search.uniform("int4")
    plan.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    found = json.loads((tmp_path / "plan.json").read_text())
    found["weights"]["conv1/kernel"] = "int8"
    (tmp_path / "plan.json").write_text(json.dumps({"weights": found["weights"]}))
    edited = load_plan(tmp_path / "plan.json")
    assert edited.weights["conv1/kernel"] == "int8" and edited.activations is None
    packed = search.apply(edited).packed
    assert packed["conv1"]["kernel"].format.bits == 8
    assert packed["linear"]["kernel"].format.bits == 4
    assert "conv1/kernel" in str(edited)
    for text, message in (
        ("{", "no JSON"), ("[]", 'object "weights"'), ('{"weights": {"a": 4}}', "must be names"),
        ('{"weights": {}, "bits": 4}', "unknown \\['bits'\\]"),
    ):  # fmt: skip
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_plan(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="no site 'conv9/kernel'"):
        search.apply(Plan({"conv9/kernel": "int4"}))
    with pytest.raises(ValueError, match="unknown 'int3'"):
        search.apply(Plan({"conv1/kernel": "int3"}))


def test_what_cannot_be_met_says_what_is_least(search):
    with pytest.raises(ValueError, match="weight_bytes"):
        search.plans(Budget(weight_bytes=10))


def test_layers_left_alone_and_several_budgets(network):
    found = compress(
        *network, device="stm32l4r5", options=OPTIONS, sites="conv2/kernel|hidden.*",
        activations=None,
        budget=Budget(weight_bytes=3000, latency_s=1.0, energy_j=1.0, peak_bytes=100_000),
    )  # fmt: skip
    assert set(found.plan.weights) == {"conv2/kernel", "hidden_layer/kernel"}
    kept = found.packed["linear"]["kernel"]
    np.testing.assert_array_equal(kept, network[1]["linear"]["kernel"])
    assert found.cost.weight_bytes <= 3000 and not found.grids
    assert found(network[2][0][0]).shape == (32, 10)


def test_plots(search):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    axes = jc.plot.sensitivity(search.sensitivity, plt.figure().gca())
    assert [tick.get_text() for tick in axes.get_xticklabels()] == list(OPTIONS)
    assert [tick.get_text() for tick in axes.get_yticklabels()] == search.sites
    shown = axes.images[0].get_array()
    increase = search.sensitivity.increase("kl")["conv2/kernel"]["int2"]
    np.testing.assert_allclose(shown[search.sites.index("conv2/kernel"), 0], increase, rtol=1e-6)
    found = jc.search.front(search.problem)
    line = jc.plot.front(found, plt.figure().gca()).lines[0]
    np.testing.assert_array_equal(line.get_xdata(), found.cost)
    with pytest.raises(ValueError, match="was not measured"):
        jc.plot.sensitivity(search.sensitivity, metric="loss")
    plt.close("all")
