"""Criteria of weights and gradients: closed forms, theorems, the figures of L1 thresholds."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcompress.prune import PruneState, mask_gradients, masks, sparsity_of
from jaxcompress.prune.masking.magnitudes import magnitude
from jaxcompress.prune.masking.schedules import linear, one_shot
from jaxcompress.prune.saliency.criteria import (
    filter_norm,
    movement,
    quantile,
    random,
    taylor,
    threshold,
)
from jaxcompress.prune.saliency.layer_adaptive import lamp, lamp_scores

pytestmark = pytest.mark.broad

RNG = np.random.default_rng(0)
TREE = {
    "a": jnp.asarray(RNG.normal(size=(40, 25)), jnp.float32),
    "b": jnp.asarray(3 * RNG.normal(size=(30, 10)), jnp.float32),
    "bias": jnp.asarray(RNG.normal(size=(10,)), jnp.float32),
}


def mask_of(comp, params=TREE):
    return jax.tree.map(np.asarray, masks(comp.init(params), params))


def uniform_like(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape), jnp.float32), tree)


# At c = 1 the share of |w| below its mean: 2 Phi(sqrt(2 / pi)) - 1, 1/2, 1 - 1/e.
@pytest.mark.parametrize(
    "draw, share",
    [
        (RNG.normal, math.erf(math.sqrt(1 / math.pi))),
        (lambda size: RNG.uniform(-1, 1, size), 0.5),
        (lambda size: RNG.laplace(size=size), 1 - math.exp(-1)),
    ],
    ids=["normal", "uniform", "laplace"],
)
def test_a_threshold_of_the_mean_prunes_what_the_distribution_says(draw, share):
    w = jnp.asarray(draw(size=(400, 500)), jnp.float32)
    comp = threshold(1.0)
    realised = sparsity_of(comp.apply(w, comp.init(w)))
    assert abs(realised - share) < 0.004
    magnitudes = np.abs(np.asarray(w, float))
    assert abs(realised - np.mean(magnitudes < magnitudes.mean())) < 1e-4


def test_a_threshold_empties_no_leaf_and_ignores_scale():
    # nothing reaches a hundred times its mean
    mask = mask_of(threshold(100.0, at_least=3))
    for key in ("a", "b"):
        largest = np.argsort(-np.abs(np.asarray(TREE[key])).ravel(), kind="stable")[:3]
        assert set(np.flatnonzero(mask[key])) == set(largest)
    assert not mask_of(threshold(100.0, at_least=0))["a"].any()
    assert mask_of(threshold(5.0), {"zeros": jnp.zeros((3, 4)), "none": jnp.zeros((0, 4))})[
        "zeros"
    ].all()
    scaled = jax.tree.map(lambda w: w * 4.0, TREE)
    np.testing.assert_array_equal(
        mask_of(threshold(1.0), scaled)["a"], mask_of(threshold(1.0))["a"]
    )


def test_the_quantile_reading_is_exact_and_layerwise():
    mask, want = mask_of(quantile(0.37)), mask_of(magnitude(0.37))
    assert [int(mask[k].sum()) for k in ("a", "b")] == [630, 189]
    np.testing.assert_array_equal(mask["a"], want["a"])


@pytest.mark.parametrize("order", [1, 2, np.inf])
@pytest.mark.parametrize("axis", [-1, 0])
def test_filter_norms_rank_whole_filters(order, axis):
    w = jnp.asarray(RNG.normal(size=(6, 3, 10)) * RNG.uniform(size=(6, 1, 10)), jnp.float32)
    mask = np.moveaxis(mask_of(filter_norm(0.3, axis=axis, order=order), w), axis, 0)
    rows = mask.reshape(mask.shape[0], -1)
    stays = rows.all(1)
    assert np.all(stays == rows.any(1)) and stays.sum() == round(0.7 * len(rows))
    filters = np.moveaxis(np.asarray(w, float), axis, 0).reshape(len(rows), -1)
    norms = np.linalg.norm(filters, ord=order, axis=1)
    assert norms[stays].min() > norms[~stays].max()


def test_random_is_a_function_of_the_key_and_the_path_alone():
    comp = random(0.7, key=jax.random.key(1))
    mask, other = mask_of(comp), mask_of(comp, uniform_like(TREE, 5))
    for key, kept in (("a", 300), ("b", 90)):
        np.testing.assert_array_equal(mask[key], other[key])
        assert mask[key].sum() == kept
    again = mask_of(random(0.7, key=jax.random.PRNGKey(1)))  # a raw key is the same key
    np.testing.assert_array_equal(mask["a"], again["a"])
    assert (mask["a"] != mask_of(random(0.7, key=jax.random.key(2)))["a"]).any()
    # leaves of one shape and other paths differ; a leaf keeps its mask in another tree
    twins = mask_of(comp, {"a": TREE["a"], "c": TREE["a"]})
    np.testing.assert_array_equal(twins["a"], mask["a"])
    assert (twins["c"] != mask["a"]).any()


def test_random_masks_are_nested_as_the_sparsity_grows():
    comp = random(linear(0.0, 0.9, end=3), key=jax.random.key(0))
    update, state = jax.jit(comp.update), comp.init(TREE)
    before = masks(state, TREE)["a"]
    for _ in range(3):
        state = update(TREE, state)
        now = masks(state, TREE)["a"]
        assert not np.any(np.asarray(now & ~before))
        before = now
    assert int(now.sum()) == 100


def test_taylor_is_the_gradient_of_a_gate_summed_over_steps():
    def loss(params, x):
        return jnp.sum(jnp.tanh(x @ params["w"]) ** 2)

    params = {"w": jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32)}
    batches = [jnp.asarray(RNG.normal(size=(6, 5)), jnp.float32) for _ in range(3)]
    comp = taylor(one_shot(0.5, at=3))
    update, state = jax.jit(comp.update), comp.init(params)
    want = np.zeros((5, 4))
    for x in batches:
        gated = lambda gate, x=x: loss({"w": params["w"] * gate}, x)
        want += np.abs(np.asarray(jax.grad(gated)(jnp.ones((5, 4)))))
        state = update(params, state, grads=jax.grad(loss)(params, x))
    np.testing.assert_allclose(state.buffers.stats["w"], want, rtol=1e-5)
    mask = np.asarray(state.buffers.masks["w"])
    assert mask.sum() == 10 and want[mask].min() > want[~mask].max()


def test_statistics_stay_without_gradients_and_are_float32():
    params = {"w": jnp.ones((2, 3), jnp.bfloat16), "steps": jnp.arange(3)}
    comp = taylor(0.5)
    state = comp.update(params, comp.init(params), grads=jax.tree.map(jnp.ones_like, params))
    after = comp.update(params, state)
    assert isinstance(after.buffers, PruneState) and after.buffers.stats["w"].dtype == jnp.float32
    np.testing.assert_array_equal(after.buffers.stats["w"], np.ones((2, 3)))
    assert int(after.buffers.step) == 2


def test_movement_scores_fall_when_weights_shrink():
    # g of the sign of w: descent takes w towards zero, and S must fall
    w = jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32)
    shrinks = jnp.arange(24).reshape(6, 4) % 2 == 0
    grads = jnp.where(shrinks, jnp.sign(w), -jnp.sign(w))
    comp = movement(one_shot(0.5, at=2))
    state = comp.init(w)
    for _ in range(2):
        state = comp.update(w, state, grads=grads)
    scores = np.asarray(state.buffers.stats)
    np.testing.assert_allclose(scores, -2 * np.asarray(w * grads), rtol=1e-6)
    assert np.all(scores[shrinks] < 0) and np.all(scores[~shrinks] > 0)
    np.testing.assert_array_equal(state.buffers.masks, ~shrinks)


def test_movement_is_straight_through_and_lets_weights_come_back():
    w = jnp.array([[1.0, 2.0, 3.0, 4.0]])
    x = jnp.array([[1.0, -1.0, 2.0, 0.5]])
    comp = movement(one_shot(0.5, at=1))
    state = comp.update(w, comp.init(w), grads=jnp.array([[1.0, 1.0, -1.0, -1.0]]))
    assert comp.apply(w, state).tolist() == [[0.0, 0.0, 3.0, 4.0]]
    grads = jax.jit(jax.grad(lambda w: jnp.sum(comp.apply(w, state) * x)))(w)
    np.testing.assert_array_equal(grads, x)  # by hidden weights too
    hard = jax.grad(lambda w: jnp.sum(magnitude(0.5).apply(w, state) * x))(w)
    np.testing.assert_array_equal(hard, [[0.0, 0.0, 2.0, 0.5]])
    tx = optax.chain(mask_gradients(), optax.sgd(0.1))
    updates, _ = tx.update(grads, tx.init(w), w, masks=masks(state, w))
    stepped = np.asarray(optax.apply_updates(w, updates))
    np.testing.assert_allclose(stepped, [[1.0, 2.0, 2.8, 3.95]], rtol=1e-6)
    # the second weight moves away from zero long enough
    comp = movement(linear(0.5, 0.5, end=9))
    for _ in range(6):
        state = comp.update(w, state, grads=jnp.array([[0.0, -1.0, 0.0, 0.0]]))
    assert np.asarray(state.buffers.masks).tolist() == [[False, True, False, True]]


def test_lamp_is_its_definition_and_one_at_most():
    w = RNG.normal(size=(13, 7)).astype(np.float32)
    scores = np.asarray(lamp_scores(jnp.asarray(w)))
    squares = np.square(w.astype(float)).ravel()
    want = [s / squares[squares >= s].sum() for s in squares]
    np.testing.assert_allclose(scores.ravel(), want, rtol=1e-5)
    assert scores.max() == 1.0
    np.testing.assert_array_equal(np.argsort(scores.ravel()), np.argsort(np.abs(w).ravel()))
    ties = lamp_scores(jnp.array([2.0, -2.0, 0.0, 2.0], jnp.bfloat16))
    np.testing.assert_allclose(ties, [1, 1 / 2, 0, 1 / 3], rtol=1e-6)
    assert not np.any(np.asarray(lamp_scores(jnp.zeros((2, 3)))))
    np.testing.assert_array_equal(lamp_scores(jnp.array([1.0, -jnp.inf])), [0, 1])
    huge = lamp_scores(jnp.array([6e37, 2e37, 1e-30]))
    np.testing.assert_allclose(huge, [1.0, 0.1, 0.0], rtol=1e-5)


def test_lamp_empties_no_layer_and_ignores_scale():
    params = {"a": TREE["a"], "tiny": 1e-6 * TREE["b"]}
    kept = mask_of(lamp(1 - 2 / 1300), params)
    assert kept["a"].sum() == 1 and kept["tiny"].sum() == 1
    assert mask_of(magnitude(0.5, scope="global"), params)["tiny"].sum() == 0
    half, scaled = mask_of(lamp(0.5), params), mask_of(lamp(0.5), {**params, "tiny": TREE["b"]})
    assert half["a"].sum() + half["tiny"].sum() == 650
    np.testing.assert_array_equal(half["a"], scaled["a"])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: threshold(-1.0), "multiple must not be negative, got -1.0"),
        (lambda: threshold(1.0, at_least=-1), "at_least must not be negative, got -1"),
        (lambda: filter_norm(0.5, order=0), "order must be positive, got 0"),
        (lambda: filter_norm(0.5, axis=3).init(TREE), "a: channel: axis 3 is none"),
        (lambda: random(1.5, key=jax.random.key(0)), "sparsity must be a share"),
        (lambda: lamp(0.5).init({"w": jnp.full((2, 2), jnp.nan)}), "w: a weight to prune must not"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
