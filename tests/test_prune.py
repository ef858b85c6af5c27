"""Exact counts, schedules, masks through optimizers."""

from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from jaxcompress.prune import cubic, magnitude, masked_optimizer, masks
from jaxcompress.prune.masking.cost_weighting import cost_weighted
from jaxcompress.prune.masking.given_masks import fixed, masks_of_scores, scored
from jaxcompress.prune.masking.n_to_m import n_m
from jaxcompress.prune.masking.scopes_of_comparison import Units, erk, erk_counts
from jaxcompress.prune.masking.scored import Criterion, by_score
from jaxcompress.prune.masking.structures import block


class counted:
    """A function under jit that counts how often it is traced."""

    def __init__(self, function):
        self.traced = 0

        def run(*args, **kwargs):
            self.traced += 1
            return function(*args, **kwargs)

        self.run = jax.jit(run)

    def __call__(self, *args, **kwargs):
        return self.run(*args, **kwargs)


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


def test_by_score_keeps_the_best_by_any_score_and_compiles_once():
    params = tree()
    comp = by_score(
        Criterion(lambda w, stats: w), cubic(0.0, 0.6, end=3)
    )  # signed: -inf goes first
    update, state = counted(comp.update), comp.init(params)
    for _ in range(3):
        state = update(params, state)
    w, mask = (np.asarray(t["a"]["kernel"]) for t in (params, masks(state, params)))
    assert mask.sum() == 400 and w[mask].min() > w[~mask].max()
    assert update.traced == 1 and state.buffers.stats == ()
    eager = comp.init(params)
    for _ in range(3):
        eager = comp.update(params, eager, grads=params)
    np.testing.assert_array_equal(eager.buffers.masks["a"]["kernel"], mask)


def test_given_scores_are_those_of_magnitude_when_they_are():
    params = tree()
    scores = jax.tree.map(jnp.abs, params)
    want = masks(magnitude(0.7, scope="global").init(params), params)
    comp = scored(scores, cubic(0.0, 0.7, end=2))
    state = comp.init(params)
    for _ in range(2):
        state = comp.update(jax.tree.map(jnp.zeros_like, params), state)  # whatever the weights
    for got in (masks(state, params), jax.jit(lambda s: masks_of_scores(scores, s))(0.7)):
        jax.tree.map(np.testing.assert_array_equal, got, want)
    inside = jc.by_path({"a/.*": scored(scores, 0.5)}, default=jc.identity())
    assert int(masks(inside.init(params), params)["a"]["kernel"].sum()) == 500


def test_fixed_masks_stay():
    params = tree() | {"steps": jnp.arange(3)}
    given = masks(magnitude(0.7).init(params), params)
    comp = fixed(given)
    state = jax.jit(comp.init)(params)
    new = comp.update(params, state, grads=params)
    jax.tree.map(np.testing.assert_array_equal, new.buffers.masks, given)
    view = comp.apply(params, new)
    np.testing.assert_array_equal(view["a"]["kernel"] != 0, given["a"]["kernel"])
    jax.tree.map(np.testing.assert_array_equal, jc.unpack(comp.pack(params, new)), view)
    assert int(new.buffers.step) == 1


def resnet20():
    conv = lambda n, i, o: [(3, 3, i, o)] + [(3, 3, o, o)] * (n - 1)
    stages = [conv(6, 16, 16), conv(6, 16, 32), conv(6, 32, 64)]
    layers = {f"s{s}b{k // 2}c{k % 2}": w for s, ws in enumerate(stages) for k, w in enumerate(ws)}
    return {"stem": (3, 3, 3, 16), **layers, "fc": (64, 10)}


def units_of(shapes):
    one = np.ones(1, int)
    return [Units(path, s, jnp.zeros((int(np.prod(s)),)), one) for path, s in shapes.items()]


def densities_of_rigl(shapes, sparsity):
    # The published procedure: make the densest layers dense until no density exceeds 1.
    n = {p: float(np.prod(s)) for p, s in shapes.items()}
    raw = {p: sum(s) / np.prod(s) for p, s in shapes.items()}
    dense = set()
    while True:
        rest = [p for p in shapes if p not in dense]
        left = (1 - sparsity) * sum(n[p] for p in rest) - sparsity * sum(n[p] for p in dense)
        eps = left / sum(raw[p] * n[p] for p in rest)
        top = max(raw[p] for p in rest)
        if eps * top <= 1:
            return {p: 1.0 if p in dense else eps * raw[p] for p in shapes}
        dense |= {p for p in rest if raw[p] == top}


@pytest.mark.parametrize(
    "sparsity, dense, s2, s0",
    [
        (0.8, {"stem", "fc"}, 0.1362, 0.6178),
        (0.9, None, 0.0667, 0.3026),
        (0.95, {"fc"}, 0.0325, 0.1475),
    ],
)
def test_erk_of_resnet20(sparsity, dense, s2, s0):
    shapes = resnet20()
    want = densities_of_rigl(shapes, sparsity)
    counts = np.asarray(erk_counts(units_of(shapes), sparsity))
    sizes = np.array([np.prod(s) for s in shapes.values()])
    assert counts.sum() == round((1 - sparsity) * int(sizes.sum())) and np.all(counts <= sizes)
    got = dict(zip(shapes, counts / sizes, strict=True))
    for name in shapes:
        assert abs(got[name] - want[name]) * np.prod(shapes[name]) <= 2.0, name
    assert abs(got["s2b2c1"] - s2) < 1e-4 and abs(got["s0b0c0"] - s0) < 5e-4
    if dense is not None:
        assert {name for name, d in got.items() if d == 1} == dense
    traced = jax.jit(lambda s: erk_counts(units_of(shapes), s))(sparsity)
    assert abs(np.asarray(traced) - counts).max() <= 1


def test_erk_is_exact_at_every_sparsity_and_grows_with_the_density():
    shapes = resnet20()
    total = sum(int(np.prod(s)) for s in shapes.values())
    shares = jnp.linspace(0.0, 1.0, 41)
    counts = np.asarray(jax.vmap(lambda s: erk_counts(units_of(shapes), s))(shares))
    want = [round((1 - float(s)) * total) for s in shares]
    np.testing.assert_array_equal(counts.sum(1), want)
    # a leaf may be one off when another of its shape is
    assert np.all(np.diff(counts, axis=0) <= 1) and np.all(counts >= 0)


def test_erk_keeps_leaves_dense_and_the_rest_makes_up_for_it():
    params = tree()
    comp = magnitude(0.6, scope=erk(dense=["b/.*"]))
    mask = masks(comp.init(params), params)
    assert bool(mask["b"]["kernel"].all()) and int(mask["a"]["kernel"].sum()) == 520 - 300
    with pytest.raises(
        ValueError, match="erk: sparsity 0.9 leaves 130 of 1300.*sparsity is 0.7692"
    ):
        magnitude(0.9, scope=erk(dense=["b/.*"])).init(params)
    with pytest.raises(ValueError, match="matches no parameter"):
        magnitude(0.9, scope=erk(dense=["c/.*"])).init(params)


COSTS = {"a/.*": 1.0, "b/.*": 4.0}


def spent(mask):
    return float(mask["a"]["kernel"].sum() + 4 * mask["b"]["kernel"].sum())


def test_cost_weighted_meets_its_budget_to_an_element_and_is_monotone():
    params = tree()
    scores = jax.tree.map(lambda w: jnp.round(4 * jnp.abs(w)), params)  # many ties
    choose = jax.jit(lambda b: masks_of_scores(scores, 1.0, scope=cost_weighted(COSTS, b)))
    before = None
    for budget in (0.0, 3.0, 100.0, 777.0, 1500.0, 2199.0, 2200.0, 9999.0):
        mask = jax.tree.map(np.asarray, choose(budget))
        assert spent(mask) <= budget and min(budget, 2200.0) - spent(mask) < 4.0
        if before is not None:
            jax.tree.map(
                lambda new, old: np.testing.assert_array_equal(new | old, new), mask, before
            )
        before = mask


def test_cost_weighted_is_the_best_of_all_choices():
    # items of 1 and 3: the best sum for what was spent, by dynamic programming over the budget
    rng = np.random.default_rng(2)
    scores = {"x": jnp.asarray(rng.random((3, 4))), "y": jnp.asarray(rng.random((2, 5)) * 3)}
    costs = {"x": 1, "y": 3}
    choose = jax.jit(lambda b: masks_of_scores(scores, 1.0, scope=cost_weighted(costs, b)))
    for budget in (5.0, 12.0, 20.0, 33.0):
        mask = choose(budget)
        kept = sum(float(jnp.sum(jnp.where(mask[k], scores[k], 0))) for k in "xy")
        used = int(mask["x"].sum() + 3 * mask["y"].sum())
        best = np.zeros(used + 1)
        for key, cost in (("x", 1), ("y", 3)):
            for value in np.asarray(scores[key], float).ravel():
                best[cost:] = np.maximum(best[cost:], best[: used + 1 - cost] + value)
        np.testing.assert_allclose(kept, best[used], rtol=1e-6)


def test_cost_weighted_counts_edge_blocks_and_what_n_m_always_keeps():
    scores = jax.tree.map(jnp.abs, tree())

    def choose(budget, structure):
        scope = cost_weighted(COSTS, budget)
        return jax.jit(lambda s: masks_of_scores(s, 1.0, scope=scope, structure=structure))(scores)

    assert 1000.0 - 28 * 4 < spent(choose(1000.0, block((7, 4)))) <= 1000.0
    assert 1500.0 - 2 * 4 < spent(choose(1500.0, n_m(2, 4))) <= 1500.0
    with pytest.raises(ValueError, match="budget 1000.0 cannot be met: .* always keeps costs 1100"):
        choose(1000.0, n_m(2, 4))


def test_cost_weighted_follows_a_schedule_to_its_budget():
    params = tree()
    comp = magnitude(cubic(0.0, 1.0, end=2), scope=cost_weighted(COSTS, 600.0))
    state, used = comp.init(params), []
    used.append(spent(masks(state, params)))
    for _ in range(2):
        state = comp.update(params, state)
        used.append(spent(masks(state, params)))
    assert used[0] == 2200.0 and 796 < used[1] <= 800 and 596 < used[2] <= 600


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: magnitude(1.5), r"sparsity must be a share of zeros in \[0, 1\], got 1.5"),
        (lambda: magnitude(0.5, scope="world"), 'scope must be "layer" or "global"'),
        (
            lambda: magnitude(0.5, scope="erk"),
            r"or erk\(\.\.\.\) or cost_weighted\(\.\.\.\), got 'erk'",
        ),
        (lambda: cost_weighted({"a": 0.0}, 1), "the cost of 'a' must be positive, got 0.0"),
        (lambda: cost_weighted({"a": 1.0}, -1), "budget must not be negative, got -1.0"),
        (
            lambda: magnitude(1.0, scope=cost_weighted({"a/.*": 1.0}, 9.0)).init(tree()),
            "costs: no rule matches 'b/kernel'",
        ),
        (
            lambda: magnitude(0.5).init({"w": jnp.full((2, 2), jnp.nan)}),
            "w: a weight to prune must",
        ),
        (lambda: scored({}, 0.5).init(tree()), "a/kernel: a leaf to prune has no scores"),
        (
            lambda: scored({"w": jnp.ones((3, 2))}, 0.5).init({"w": jnp.ones((2, 3))}),
            r"w: scores have shape \(3, 2\), the leaf \(2, 3\)",
        ),
        (
            lambda: scored({"w": jnp.full((1, 2), jnp.nan)}, 0.5).init({"w": jnp.ones((1, 2))}),
            "w: scores must not be NaN",
        ),
        (lambda: masks_of_scores({"w": jnp.full((1, 2), jnp.nan)}, 0.5), "w: scores must not be"),
        (lambda: fixed({"w": jnp.array(True)}).init(tree()), "masks do not have the params'"),
        (lambda: fixed({"w": 1.0}).init({"w": jnp.ones(2)}), "w: a mask must be bool, got float32"),
        (
            lambda: fixed({"w": jnp.ones(3, bool)}).init({"w": jnp.ones(2)}),
            r"w: the mask has shape \(3,\), the leaf \(2,\)",
        ),
        (
            lambda: fixed({"w": jnp.array(False)}).init({"w": jnp.ones(2)}),
            "w: a 0-d mask must be True; to prune all, give zeros",
        ),
        (
            lambda: fixed({"w": jnp.ones(2, bool)}).init({"w": jnp.arange(2)}),
            "w: only arrays of floats are pruned",
        ),
        (lambda: cubic(0.0, 2.0, end=5), "final must be a share"),
        (lambda: cubic(0.0, 0.5, start=9, end=5), "start <= end"),
        (lambda: jc.prune.project().update({}, (), None, masks={}), "needs params"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
