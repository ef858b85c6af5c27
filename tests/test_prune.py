"""Exact counts, schedules, masks through optimizers."""

from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from jaxcompress.prune import cubic, magnitude, masked_optimizer, masks


def tree(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "a": {"kernel": jnp.asarray(rng.normal(size=(40, 25)), jnp.float32)},
        "b": {"kernel": jnp.asarray(3 * rng.normal(size=(30, 10)), jnp.float32)},
        "bias": jnp.asarray(rng.normal(size=(10,)), jnp.float32),
    }


@pytest.mark.parametrize("sparsity", [0.0, 0.1234, 0.5, 0.9, 1.0])
def test_exact_counts_per_layer_and_global(sparsity):
    params = tree()
    layer, whole = magnitude(sparsity), magnitude(sparsity, scope="global")
    view = layer.apply(params, layer.init(params))
    for key in ("a", "b"):
        n = view[key]["kernel"].size
        assert int(jnp.sum(view[key]["kernel"] != 0)) == round((1 - sparsity) * n)
    view = whole.apply(params, whole.init(params))
    kept = sum(int(jnp.sum(view[k]["kernel"] != 0)) for k in ("a", "b"))
    assert kept == round((1 - sparsity) * 1300)
    np.testing.assert_array_equal(view["bias"], params["bias"])


def test_global_keeps_what_a_sort_would_keep():
    params = tree()
    comp = magnitude(0.7, scope="global")
    mask = masks(comp.init(params), params)
    scores = np.concatenate([np.abs(params[k]["kernel"]).ravel() for k in ("a", "b")])
    order = np.argsort(-scores, kind="stable")[: round(0.3 * 1300)]
    want = np.zeros(1300, bool)
    want[order] = True
    got = np.concatenate([np.asarray(mask[k]["kernel"]).ravel() for k in ("a", "b")])
    np.testing.assert_array_equal(got, want)
    assert mask["bias"].shape == () and bool(mask["bias"])


def test_layerwise_masks_ignore_the_scale_of_a_layer():
    params = tree()
    comp = magnitude(0.6)
    scaled = jax.tree.map(lambda w: w * 8.0, params)
    np.testing.assert_array_equal(
        masks(comp.init(params), params)["a"]["kernel"],
        masks(comp.init(scaled), params)["a"]["kernel"],
    )


def test_cubic_closed_form_and_exact_ends():
    s = cubic(0.1, 0.85, start=7, end=107)
    steps = np.arange(0, 130)
    got = np.asarray([float(s(jnp.int32(t))) for t in steps])
    x = np.clip((steps - 7) / 100, 0, 1)
    np.testing.assert_allclose(got, 0.85 + (0.1 - 0.85) * (1 - x) ** 3, atol=1e-6)
    assert got[107] == np.float32(0.85) and np.all(np.diff(got) >= 0)
    np.testing.assert_allclose(got[57], 0.1 + 7 / 8 * 0.75, atol=1e-6)


def test_masks_change_when_the_schedule_fires_and_always_at_the_end():
    params = tree()
    comp = magnitude(cubic(0.0, 0.8, start=2, end=9, every=3))
    state = comp.init(params)
    update = jax.jit(comp.update)
    counts = []
    for _ in range(11):
        state = update(params, state)
        counts.append(int(jnp.sum(masks(state, params)["a"]["kernel"])))
    changed = [step for step in range(2, 12) if counts[step - 1] != counts[step - 2]]
    assert changed == [5, 8, 9] and counts[-1] == round(0.2 * 1000)


def test_sparsity_may_be_traced_and_any_optax_schedule():
    params = tree()
    count = lambda s: jnp.sum(magnitude(s).init(params).buffers.masks["a"]["kernel"])
    np.testing.assert_array_equal(jax.vmap(count)(jnp.array([0.0, 0.25, 0.9])), [1000, 750, 100])
    comp = magnitude(optax.linear_schedule(0.0, 0.5, 4))
    state = comp.init(params)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes int and float
        for _ in range(4):
            state = comp.update(params, state)
    assert int(jnp.sum(state.buffers.masks["a"]["kernel"])) == 500


@pytest.mark.parametrize(
    "tx",
    [
        optax.sgd(0.1, momentum=0.9, nesterov=True),
        optax.adamw(0.1, weight_decay=0.1),
        optax.lion(0.1),
    ],
)
def test_pruned_weights_are_exactly_zero_under_any_optimizer(tx):
    params = tree()
    comp = magnitude(cubic(0.2, 0.9, start=0, end=4))
    state, tx = comp.init(params), masked_optimizer(tx)
    opt = tx.init(params)
    with jax.numpy_dtype_promotion("standard"):
        for step in range(5):
            state = comp.update(params, state)
            mask = masks(state, params)
            grads = jax.tree.map(lambda w, s=step: jnp.sin(w + s), params)
            updates, opt = tx.update(grads, opt, params, masks=mask)
            params = cast(dict, optax.apply_updates(params, updates))
            gone = jnp.where(mask["a"]["kernel"], 0.0, params["a"]["kernel"])
            assert not np.any(np.asarray(gone)) and bool(jnp.any(params["bias"] != 0))


def test_masks_are_found_through_chains_and_rules():
    params = tree()
    comp = jc.chain(
        jc.by_path({"a/.*": magnitude(0.5)}, default=jc.identity()),
        jc.by_path({"b/.*": magnitude(0.25)}, default=jc.identity()),
    )
    mask = masks(comp.init(params), params)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    assert [int(jnp.sum(m)) for m in jax.tree.leaves(mask)] == [500, 225, 1]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: magnitude(1.5), r"sparsity must be a share of zeros in \[0, 1\], got 1.5"),
        (lambda: magnitude(0.5, scope="world"), 'scope must be "layer" or "global"'),
        (lambda: cubic(0.0, 2.0, end=5), "final must be a share"),
        (lambda: cubic(0.0, 0.5, start=9, end=5), "start <= end"),
        (lambda: jc.prune.project().update({}, (), None, masks={}), "needs params"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
