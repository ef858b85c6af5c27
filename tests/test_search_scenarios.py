"""Automatic compression with no data, with labels, with zeros, widths and training."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.graph import axes
from jaxcompress.prune.channels.choose import groups_for_macs
from jaxcompress.prune.channels.gate_scores import group_norms
from jaxcompress.prune.channels.smaller_networks import shrink
from jaxcompress.search import (
    Budget,
    Infeasible,
    Option,
    Search,
    Training,
    compress,
    finetune,
    integer_options,
    narrow,
)

pytestmark = pytest.mark.broad

DEVICE = "stm32l4r5"


def apply_fn(params, x):
    for name in ("one", "two"):
        x = jax.nn.relu(x @ params[name]["w"] + params[name]["b"].reshape(1, -1))
    return x @ params["out"]["w"]


@pytest.fixture(scope="module")
def network():
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = {"one": (12, 16), "two": (16, 16), "out": (16, 4)}
    params = {
        name: {"w": jax.random.normal(key, shape) / 4, "b": jnp.full(shape[1:], 0.1)}
        for key, (name, shape) in zip(keys, sizes.items(), strict=False)
    }
    del params["out"]["b"]
    x = jax.random.normal(keys[3], (2, 64, 12))
    return params, [(part,) for part in x]


def labels_of(params, batches):
    return [jnp.argmax(apply_fn(params, *inputs), -1) for inputs in batches]


def test_zeros_are_options_and_ship_as_such(network):
    params, batches = network
    options = integer_options((4, 8), sparsity=(0.0, 0.75))
    search = Search(apply_fn, params, batches, device=DEVICE, options=options)
    sparse = search.apply(search.uniform("int4, 75 % zeros"))
    weights = jc.unpack(sparse.packed)
    for name in ("one", "two", "out"):
        assert (np.asarray(weights[name]["w"]) == 0).mean() >= 0.75
    dense = search.uniform("int4").predicted["weight_bytes"]
    assert sparse.cost.weight_bytes == jc.packed_bytes(sparse.packed) < dense
    # Under a limit between the two, some layers have zeros, and it is what was predicted.
    least = sparse.cost.weight_bytes
    plan = search.plans(Budget(weight_bytes=(least + dense) // 2), candidates=4)[0]
    found = search.apply(plan)
    assert found.cost.weight_bytes == plan.predicted["weight_bytes"] <= (least + dense) // 2
    assert any("zeros" in option for option in plan.weights.values())


def test_without_data(network):
    params, batches = network
    shape = jax.ShapeDtypeStruct((1, 12), jnp.float32)
    budget = Budget(weight_bytes=500)
    found = compress(apply_fn, params, device=DEVICE, budget=budget, example=(shape,))
    assert found.cost.weight_bytes <= 500 and found.grids
    # Rounded to nearest: no weight is further than half a step from what it was.
    leaf = found.packed["one"]["w"]
    off = np.abs(np.asarray(jc.unpack(leaf)) - np.asarray(params["one"]["w"]))
    scale = np.asarray(leaf.qparams.scale)
    inside = np.abs(np.asarray(params["one"]["w"])) <= scale * (2 ** (leaf.format.bits - 1) - 1)
    assert (off <= scale / 2 * 1.001)[inside].all()
    assert np.isfinite(np.asarray(found(batches[0][0]))).all()
    with pytest.raises(ValueError, match="give example"):
        compress(apply_fn, params, device=DEVICE, budget=budget)
    with pytest.raises(ValueError, match="must be floating point, got int32"):
        ids = jax.ShapeDtypeStruct((1, 12), jnp.int32)
        compress(apply_fn, params, device=DEVICE, budget=budget, example=(ids,))
    with pytest.raises(ValueError, match="need batches of the data"):
        sparse = integer_options((8,), sparsity=(0.5,))
        compress(apply_fn, params, device=DEVICE, budget=budget, example=(shape,), options=sparse)


def test_labels_decide_where_there_are_some(network):
    params, batches = network
    found = compress(
        apply_fn, params, batches, device=DEVICE, budget=Budget(weight_bytes=450),
        targets=labels_of(params, batches), options=integer_options((2, 4)), candidates=4,
    )  # fmt: skip
    assert set(found.plan.measured) == {"cross_entropy"}
    outputs = np.concatenate([jc.unpack(found(*x)) for x in batches]).astype(np.float64)
    known = np.concatenate(labels_of(params, batches))
    log = outputs - np.log(np.exp(outputs).sum(-1, keepdims=True))
    truth = -log[np.arange(len(known)), known].mean()
    # Plans are compared with float activations, what ships has eight bits.
    np.testing.assert_allclose(found.plan.measured["cross_entropy"], truth, rtol=0.05)


def test_a_narrow_network_has_the_share_and_less_error_than_cut_alone(network):
    params, batches = network
    fn, small, _ = narrow(apply_fn, params, batches, 0.5)
    macs = lambda p: sum(p[name]["w"].size for name in p)
    assert macs(small) <= 0.5 * macs(params)
    want = np.concatenate([apply_fn(params, *x) for x in batches])
    fitted = np.concatenate([fn(small, *x) for x in batches])
    found = axes(apply_fn, params, *batches[0])
    chosen = groups_for_macs(found, dict(group_norms(found, params)), 0.5)
    cut_fn, cut, _ = shrink(apply_fn, params, chosen, batches[0], axes=found)
    alone = np.concatenate([cut_fn(cut, *x) for x in batches])
    assert ((fitted - want) ** 2).mean() < 0.9 * ((alone - want) ** 2).mean()


def test_only_the_groups_that_are_named_lose_channels(network):
    params, batches = network
    small = narrow(apply_fn, params, batches, 0.8, groups="two.*").params
    assert small["one"]["w"].shape == (12, 16) and small["two"]["w"].shape[1] < 16
    with pytest.raises(ValueError, match="matches no group of channels; nearest: .*two"):
        narrow(apply_fn, params, batches, 0.8, groups="tow.*")


def test_a_narrower_network_wins_where_the_network_does_not_fit(network):
    params, batches = network
    inputs = np.concatenate([x for (x,) in batches])
    options = integer_options((4, 8), sparsity=(0.0, 0.5))
    whole = Search(apply_fn, params, batches, device=DEVICE, options=options)
    least = min(whole.uniform(name).predicted["weight_bytes"] for name in options)
    budget = Budget(weight_bytes=0.8 * least)
    how: Any = {"device": DEVICE, "options": options, "candidates": 4, "budget": budget}
    with pytest.raises(Infeasible, match="the least possible"):
        compress(apply_fn, params, batches, **how)
    training = Training(inputs, np.concatenate(labels_of(params, batches)), steps=5, size=32)
    found = compress(apply_fn, params, batches, widths=(1.0, 0.4), training=training, **how)
    assert found.cost.weight_bytes == jc.packed_bytes(found.packed) <= 0.8 * least
    again = compress(apply_fn, params, batches, widths=(1.0, 0.4), training=training, **how)
    jax.tree.map(np.testing.assert_array_equal, found.packed, again.packed)
    with pytest.raises(Infeasible, match=r"100 % of the MACs: .*; 90 % of the MACs"):
        compress(apply_fn, params, batches, widths=(1.0, 0.9), **how | {"budget": Budget(9)})
    with pytest.raises(ValueError, match="widths must be shares"):
        compress(apply_fn, params, batches, widths=(), **how)


def test_training_lowers_the_divergence_and_keeps_zeros(network):
    params, batches = network
    inputs = np.concatenate([x for (x,) in batches])
    options = {"int3": Option(jc.quantize.Spec(jc.formats.integer(3)), 0.5)}
    how: Any = {"device": DEVICE, "options": options, "budget": Budget(), "candidates": 1}
    before = compress(apply_fn, params, batches, **how)
    training = Training(inputs, steps=150, size=64, learning_rate=0.05)
    after = compress(apply_fn, params, batches, training=training, **how)
    loss = lambda found: float(
        np.mean([jc.distill.kd(found(*x), apply_fn(params, *x), temperature=1.0) for x in batches])
    )
    assert loss(after) < 0.7 * loss(before)
    assert after.cost.weight_bytes == jc.packed_bytes(after.packed) <= before.cost.weight_bytes
    for name in ("one", "two", "out"):
        was, now = (np.asarray(jc.unpack(x.packed)[name]["w"]) for x in (before, after))
        assert (was == 0).mean() >= 0.5 and not now[was == 0].any()
        assert (now != was).any()


def test_seconds_bound_the_training(network):
    params, batches = network
    inputs = np.concatenate([x for (x,) in batches])
    state = finetune(
        apply_fn, params, Training(inputs, seconds=0.2, size=32), teacher=(apply_fn, params)
    )
    assert 1 <= int(state.step) < 20_000


@pytest.mark.parametrize(
    "how, message",
    [
        ({}, "either seconds or steps"),
        ({"seconds": 1.0, "steps": 2}, "either seconds or steps"),
        ({"steps": 0}, r"Training\(steps\) must be positive"),
        ({"steps": 1, "labels": np.zeros(3)}, r"must have the shape \(8,\)"),
        ({"steps": 1, "ce_weight": 2.0}, "ce_weight"),
        ({"steps": 1, "size": 9}, "9 examples a step, there are 8"),
    ],
)
def test_bad_training(how, message):
    with pytest.raises(ValueError, match=message):
        Training(np.zeros((8, 2)), **{"size": 4} | how)


def test_bad_options(network):
    params, batches = network
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\)"):
        Option(jc.quantize.Spec(jc.formats.integer(4)), 1.0)
    with pytest.raises(TypeError, match="must be a quantize.Spec"):
        Option(jc.formats.integer(4))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"options\['a'\]"):
        Search(apply_fn, params, batches, device=DEVICE, options={"a": 4})  # type: ignore
    with pytest.raises(ValueError, match="at least one"):
        Search(apply_fn, params, batches, device=DEVICE, options={})
