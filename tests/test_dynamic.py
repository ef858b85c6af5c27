"""Sparse training: what drops and grows (brute force), phases, backward passes beyond the mask."""

import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from jaxcompress.prune import cubic, masks
from jaxcompress.prune.sparse_training.backward import (
    backward_masks,
    sr_ste,
    ste,
    top_kast,
    top_kast_penalty,
)
from jaxcompress.prune.sparse_training.dense_and_sparse import ac_dc, alternating
from jaxcompress.prune.sparse_training.dynamic import rigl, snfs, sparse_evolutionary, static_sparse
from jaxcompress.prune.sparse_training.optimizers import dynamic_optimizer
from jaxcompress.prune.sparse_training.rewiring import Cosine, rewire

pytestmark = pytest.mark.broad

KEY = jax.random.key(3)
STEPS = 12


def tree(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"a": (10, 9), "b": (4, 5), "bias": (5,)}
    return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}


def best(scores, allowed, count):
    # The first in flat order of those that score highest.
    rows = [(-float(s), i) for i, s in enumerate(scores.ravel()) if allowed.ravel()[i]]
    chosen = np.zeros(scores.size, bool)
    chosen[[i for _, i in sorted(rows)[:count]]] = True
    return chosen.reshape(scores.shape)


def rewired(w, mask, scores, count):
    kept = best(np.abs(w), mask, mask.sum() - count)
    return kept | best(scores, ~kept, count)


def cosine(alpha, step, end):
    return alpha / 2 * (1 + math.cos(math.pi * step / end))


def run(comp, params=None):
    """Masks and stats before the first and after every one of STEPS updates, as one scan."""
    params = params or tree()
    state = comp.init(params)

    def step(state, t):
        grads = jax.tree.map(lambda w: jnp.sin(3 * w + t.astype(jnp.float32)), params)
        state = comp.update(params, state, grads=grads)
        return state, (state.buffers.masks, state.buffers.stats, grads)

    _, rows = jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(1, STEPS + 1)))(state)
    found, stats, grads = jax.tree.map(np.asarray, rows)
    start = jax.tree.map(lambda m: np.asarray(m)[None], state.buffers.masks)
    found = jax.tree.map(lambda s, m: np.concatenate([s, m]), start, found)
    return jax.tree.map(np.asarray, params), found, stats, grads


def test_rewiring_is_that_of_brute_force_with_ties():
    rng = np.random.default_rng(0)
    fast = jax.jit(rewire)
    for _ in range(60):
        w, scores = rng.integers(-2, 3, (4, 5)), rng.integers(0, 3, (4, 5))
        mask = rng.random((4, 5)) < rng.random()
        count = int(rng.integers(0, mask.sum() + 1))
        got = fast(jnp.asarray(w, jnp.float32), mask, jnp.asarray(scores, jnp.float32), count)
        np.testing.assert_array_equal(got, rewired(w, mask, scores, count))
    everything = fast(jnp.ones((4, 5)), np.ones((4, 5), bool), jnp.ones((4, 5)), 99)
    assert np.all(everything)  # what dropped returns
    nan = jnp.full((4, 5), jnp.nan)
    assert np.sum(fast(nan, mask, nan, count)) == mask.sum()


def test_the_share_that_drops_falls_to_exactly_zero():
    steps = np.arange(0, 90)
    got = np.asarray(jax.vmap(Cosine(0.3, 75))(jnp.asarray(steps)))
    want = [cosine(0.3, t, 75) if t < 75 else 0.0 for t in steps]
    np.testing.assert_allclose(got, want, atol=1e-7)
    assert np.all(got[75:] == 0) and got[0] == np.float32(0.3) and np.all(np.diff(got) <= 0)


OPTIONS = {"key": KEY, "every": 2, "end": 9, "fraction": 0.6}
METHODS = {
    "set": sparse_evolutionary(0.7, scope="layer", **OPTIONS),
    "rigl": rigl(0.7, scope="layer", **OPTIONS),
    "snfs": snfs(0.7, scope="layer", decay=0.5, **OPTIONS),
}


@pytest.fixture(scope="module", params=METHODS)
def history(request):
    return request.param, *run(METHODS[request.param])


def test_counts_stay_and_masks_change_when_they_should(history):
    _, params, found, _, _ = history
    assert found["bias"].shape == (STEPS + 1,) and np.all(found["bias"])
    for key in ("a", "b"):
        counts = found[key].reshape(STEPS + 1, -1).sum(1)
        assert np.all(counts == round(0.3 * params[key].size))
        changed = [t for t in range(1, STEPS + 1) if np.any(found[key][t] != found[key][t - 1])]
        assert set(changed) <= {2, 4, 6, 8}
        for t in changed:
            assert np.sum(found[key][t] & ~found[key][t - 1]) <= cosine(0.6, t, 9) * counts[0]
    assert np.any(found["a"][8] != found["a"][0])


def test_what_drops_and_grows_is_that_of_brute_force(history):
    name, params, found, stats, grads = history
    momentum = {k: np.zeros(w.shape) for k, w in params.items()}
    for t in range(1, STEPS + 1):
        for key in ("a", "b"):
            before, w, g = found[key][t - 1], params[key], grads[key][t - 1]
            momentum[key] = 0.5 * momentum[key] + 0.5 * g
            if name == "snfs":
                np.testing.assert_allclose(stats[key][t - 1], momentum[key], atol=1e-6)
            k = math.floor(cosine(0.6, t, 9) * before.sum()) if t in (2, 4, 6, 8) else 0
            leaf = jax.random.fold_in(jax.random.fold_in(KEY, t), zlib.crc32(key.encode()))
            scores = {
                "set": np.asarray(jax.random.uniform(leaf, w.shape)),
                "rigl": np.abs(g),
                "snfs": np.abs(momentum[key]),
            }[name]
            np.testing.assert_array_equal(found[key][t], rewired(w, before, scores, k))


def test_without_gradients_nothing_grows_by_them():
    params = tree()
    comp = METHODS["rigl"]
    state = comp.init(params)
    new = comp.update(params, comp.update(params, state))
    jax.tree.map(np.testing.assert_array_equal, new.buffers.masks, state.buffers.masks)
    assert int(new.buffers.step) == 2


def test_the_derivative_by_hidden_weights_is_that_of_the_view():
    params = tree()
    comp = METHODS["rigl"]
    state = comp.init(params)
    seen = lambda p: sum(jnp.sum(jnp.sin(w + 1.0)) for w in jax.tree.leaves(p))
    got = jax.grad(lambda p: seen(comp.apply(p, state)))(params)
    want = jax.grad(seen)(comp.apply(params, state))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert np.all(np.asarray(got["a"])[~np.asarray(state.buffers.masks["a"])] != 0)


def test_random_masks_are_given_by_the_key_and_follow_erk():
    params = tree()
    make = lambda seed: static_sparse(0.7, key=jax.random.key(seed))
    first, again, other = (make(seed).init(params) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    a, b = (first.buffers.masks[k] for k in "ab")
    assert not np.array_equal(a, other.buffers.masks["a"])
    assert int(a.sum() + b.sum()) == round(0.3 * 110)
    # densities are in the ratio (10 + 9) / 90 to (4 + 5) / 20
    assert abs(int(a.sum()) - 33 * 19 / 28) <= 1
    new = make(0).update(tree(1), first, grads=params)
    jax.tree.map(np.testing.assert_array_equal, new.buffers.masks, first.buffers.masks)


def test_the_train_step_gives_the_recipe_gradients_and_compiles_once():
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32), "b": jnp.zeros(4)}
    forward = jc.train.stateless(lambda p, x: x @ p["w"] + p["b"][None])
    batch = jax.device_put((np.asarray(rng.normal(size=(8, 6)), np.float32), np.arange(8) % 4))
    recipe = rigl(0.5, key=KEY, every=2, end=100, fraction=0.5, scope="layer")
    tx = dynamic_optimizer(optax.adamw(0.1))
    step = jc.train.make_step(forward, tx, recipe=recipe, recipe_sees="gradients")
    state, seen = jc.train.create(params, recipe, tx), []
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(4):
            state, _ = step(state, (), batch)
            mask = np.asarray(masks(state.compress, state.params)["w"])
            seen.append(mask)
            assert mask.sum() == 12 and not np.any(np.asarray(state.params["w"])[~mask])
    assert step._cache_size() == 1 and np.any(np.asarray(state.params["b"]))
    changed = [np.any(x != y) for x, y in zip(seen, seen[1:], strict=False)]
    assert changed == [True, False, True]


def test_top_kast_keeps_a_in_b_and_gradients_in_b():
    params = tree()
    comp = top_kast(cubic(0.0, 0.8, end=4), 0.5)
    state = comp.init(params)
    descend = jax.jit(jax.grad(lambda p, s: jnp.sum(jnp.exp(comp.apply(p, s)["a"]))))
    for step in range(1, 6):
        state = comp.update(params, state)
        a, b = (np.asarray(m["a"]) for m in (state.buffers.masks, backward_masks(state)))
        want = 0.8 * (1 - (1 - min(step / 4, 1)) ** 3)
        assert abs(a.sum() - (1 - want) * 90) <= 0.5 and not np.any(a & ~b)
        assert b.sum() == max(45, a.sum())
        if step <= 4:  # a ramp renews its masks up to its end
            size = np.abs(np.asarray(params["a"]))
            np.testing.assert_array_equal(a, best(size, np.ones_like(a), a.sum()))
        grads = np.asarray(descend(params, state)["a"])
        view = np.asarray(comp.apply(params, state)["a"])
        np.testing.assert_array_equal(view, np.where(a, params["a"], 0))
        np.testing.assert_array_equal(grads == 0, ~b)
        np.testing.assert_allclose(grads[b], np.exp(view[b]), rtol=1e-6)
        old = params
        params = jax.tree.map(lambda w, g: w - 0.1 * g, params, descend(params, state))
        np.testing.assert_array_equal(np.asarray(params["a"])[~b], np.asarray(old["a"])[~b])


def test_the_penalty_of_top_kast():
    params = tree() | {"empty": jnp.zeros((0, 3))}
    comp = top_kast(0.8, 0.5)
    state = comp.init(params)
    want = 0.0
    for key in ("a", "b"):
        w = np.sort(np.abs(np.asarray(params[key], float)).ravel())[::-1]
        inner, outer = round(0.2 * w.size), round(0.5 * w.size)
        density = inner / w.size
        want += (w[:inner] ** 2).sum() / 2 + (w[inner:outer] ** 2).sum() / (2 * density)
    np.testing.assert_allclose(top_kast_penalty(params, state), want, rtol=1e-6)
    nothing = top_kast(1.0, 0.5)
    assert np.isfinite(top_kast_penalty(params, nothing.init(params)))


def test_phases_are_dense_and_sparse_in_turn():
    schedule = alternating(0.75, start=3, sparse=2, dense=3, end=15)
    #       step 0  1  2  3  4  5  6  7  8  9  10 11 12 13 14 15 16
    sparse = [0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 1]
    steps = jnp.arange(17)
    np.testing.assert_array_equal(jax.vmap(schedule)(steps), 0.75 * np.asarray(sparse))
    fires = np.flatnonzero(jax.vmap(schedule.fires)(steps))
    np.testing.assert_array_equal(fires, [3, 5, 8, 10, 13, 15])
    params = tree()
    comp = ac_dc(0.75, start=3, sparse=2, dense=3, end=15, scope="layer")
    state, update, seen = comp.init(params), jax.jit(comp.update), []
    for step in range(1, 17):
        weights = tree(step)  # whatever they do
        state = update(weights, state)
        seen.append(np.asarray(state.buffers.masks["a"]))
        assert seen[-1].sum() == (22 if sparse[step] else 90)
        if step in fires and sparse[step]:
            want = best(np.abs(np.asarray(weights["a"])), np.ones((10, 9), bool), 22)
            np.testing.assert_array_equal(seen[-1], want)
    for step in (4, 9, 14, 16):  # one mask for a phase
        np.testing.assert_array_equal(seen[step - 1], seen[step - 2])


def test_straight_through_trains_hidden_weights_which_come_back():
    comp = ste(0.5)
    w = jnp.array([[1.0, 0.9]])
    state = comp.init(w)
    np.testing.assert_array_equal(comp.apply(w, state), [[1.0, 0.0]])
    w = w - jax.grad(lambda w: jnp.sum(comp.apply(w, state) * jnp.array([[0.5, -0.5]])))(w)
    np.testing.assert_allclose(w, [[0.5, 1.4]], rtol=1e-6)
    state = comp.update(w, state)
    np.testing.assert_array_equal(comp.apply(w, state) != 0, [[False, True]])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sr_ste_is_n_m_and_adds_its_decay_to_the_gradient(dtype):
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(8, 6)), dtype), "b": jnp.ones(6, dtype)}
    comp = sr_ste(2, 4, decay=0.5)
    target = jnp.asarray(rng.normal(size=(8, 6)), dtype)
    fn = lambda p, s: jnp.sum(jnp.square(comp.apply(p, s)["w"] - target)) + jnp.sum(p["b"])
    state, descend = comp.init(params), jax.jit(jax.grad(fn))
    flips = 0
    for _ in range(4):
        mask = np.asarray(state.buffers.masks["w"])
        assert np.all(mask.reshape(2, 4, 6).sum(1) == 2)
        grads, w = descend(params, state), np.asarray(params["w"], float)
        want = 2 * (np.where(mask, w, 0) - np.asarray(target, float)) + 0.5 * np.where(mask, 0, w)
        assert grads["w"].dtype == dtype
        tol = 1e-5 if dtype == jnp.float32 else 0.05
        np.testing.assert_allclose(np.asarray(grads["w"], float), want, atol=tol)
        np.testing.assert_array_equal(grads["b"], jnp.ones(6, dtype))
        params = jax.tree.map(lambda p, g: p - jnp.asarray(0.2, dtype) * g, params, grads)
        state = comp.update(params, state)
        flips += np.sum(mask != np.asarray(state.buffers.masks["w"]))
    assert flips > 0


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: rigl(1.2, key=KEY, end=9), "sparsity must be a share of zeros"),
        (lambda: rigl(0.5, key=KEY, end=9, fraction=1.5), r"fraction must be in \[0, 1\], got 1.5"),
        (
            lambda: rigl(0.5, key=KEY, end=0),
            "rewiring needs every >= 1 and end >= 1, got every=100",
        ),
        (lambda: snfs(0.5, key=KEY, end=9, decay=1.0), r"decay must be in \[0, 1\), got 1.0"),
        (lambda: sparse_evolutionary(0.5, key=KEY, every=0), "rewiring needs every >= 1"),
        (
            lambda: rigl(0.5, key=KEY, end=9).init({"w": jnp.full((2, 2), jnp.nan)}),
            "w: a weight to prune must not be NaN",
        ),
        (lambda: METHODS["rigl"].update(tree(), jc.CompressState()), "the state holds no masks"),
        (lambda: METHODS["rigl"].apply(tree(), jc.CompressState()), "the state holds no masks"),
        (lambda: top_kast(0.5, 0.8), "backward pass must not be sparser than the forward pass"),
        (lambda: backward_masks(jc.CompressState()), "the state holds no masks"),
        (
            lambda: top_kast_penalty(tree(), METHODS["rigl"].init(tree())),
            "the state is not one of top_kast",
        ),
        (lambda: sr_ste(2, 4, decay=-1.0), "decay must not be negative, got -1.0"),
        (lambda: sr_ste(5, 4), "n_m needs 0 < n <= m"),
        (lambda: alternating(0.5, start=5, sparse=1, dense=1, end=4), "0 <= start <= end"),
        (lambda: ac_dc(0.5, start=0, sparse=0, dense=1, end=4), "phases of at least 1 step"),
        (
            lambda: jc.train.make_step(lambda p, s, x: (x, s), optax.sgd(0.1), recipe_sees="all"),
            'recipe_sees must be "params" or "gradients", got \'all\'',
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
