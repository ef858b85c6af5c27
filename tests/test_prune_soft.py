"""Pruning that is trained: thresholds, L0 gates, soft movement, proximal operators; float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from _trees import bits_equal, small_tree

import jaxcompress as jc
from jaxcompress.prune.soft.movement_gates import soft_movement, soft_movement_penalty
from jaxcompress.prune.soft.proximal_operators import prox_group_lasso, prox_l1, proximal
from jaxcompress.prune.soft.thresholds import l0, l0_penalty, soft_threshold, without_noise

pytestmark = pytest.mark.broad

RNG = np.random.default_rng(0)
W, G = RNG.normal(size=(6, 5)), RNG.normal(size=(6, 5))
PARAMS = jnp.asarray(W, jnp.float32)
SLOPES = jnp.asarray(G, jnp.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def close(got, want, rtol=2e-6):
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=rtol, atol=rtol)


def applied(params, updates) -> Any:
    return optax.apply_updates(params, updates)


def pulled(comp, state, w=PARAMS, slopes=SLOPES):
    """dL/dw and dL/dlearned of L = sum slopes * view, a loss of gradient `slopes` by the view."""

    def loss(w, learned):
        return jnp.sum(slopes * comp.apply(w, state._replace(learned=learned)))

    return jax.grad(loss, argnums=(0, 1))(w, state.learned)


# STR


@pytest.mark.parametrize("s", [-6.0, -1.0, 0.5])
def test_str_thresholds_and_its_gradients_are_those_of_the_paper(s):
    comp = soft_threshold(initial=s)
    state = comp.init(PARAMS)
    level = sigmoid(s)
    close(comp.apply(PARAMS, state), np.sign(W) * np.maximum(np.abs(W) - level, 0))
    by_w, by_s = pulled(comp, state)
    stays = np.abs(W) > level
    # dL/ds = -sigmoid'(s) sum g sign(w) 1[|w| > sigmoid(s)]
    close(by_s, -level * (1 - level) * np.sum(G * np.sign(W) * stays), 1e-5)
    close(by_w, G * stays)


def test_weight_decay_of_thresholds_makes_zeros_and_leaves_pass():
    tree = small_tree()
    comp = soft_threshold()
    state = comp.init(tree)
    is_empty = lambda s: isinstance(s, tuple) and not s
    assert state.learned["dense"]["kernel"].shape == ()
    assert is_empty(state.learned["dense"]["bias"]) and is_empty(state.learned["steps"])
    tx = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.5))
    learned, opt = state.learned, tx.init(state.learned)
    for _ in range(5):
        updates, opt = tx.update(jax.tree.map(jnp.zeros_like, learned), opt, learned)
        learned = applied(learned, updates)
    close(learned["dense"]["kernel"], -6 * 0.75**5)  # s <- s - 0.5 * 0.5 s
    before, after = (
        jc.prune.sparsity_of(comp.apply(tree, s)) for s in (state, state._replace(learned=learned))
    )
    assert before < after < 1
    view = comp.apply(tree, state)
    assert all(bits_equal(view[k], tree[k]) for k in ("scalar", "steps", "empty"))


# L0


def gates(log_alpha, u, beta=2 / 3, gamma=-0.1, zeta=1.1):
    s = sigmoid((np.log(u) - np.log1p(-u) + log_alpha) / beta)
    return np.clip(s * (zeta - gamma) + gamma, 0, 1)


@pytest.mark.parametrize("open_rate", [0.1, 0.5, 0.9])
def test_l0_penalty_is_the_probability_of_an_open_gate(open_rate):
    size = 400_000
    log_alpha = np.log(open_rate / (1 - open_rate))
    comp = l0(open_rate=open_rate, min_ndim=1)
    w = jnp.ones(size)
    state = comp.update(w, comp.init(w))
    z = np.asarray(comp.apply(w, state))
    expected = float(l0_penalty(state)) / size
    assert abs(np.mean(z > 0) - expected) < 3e-3
    own = gates(log_alpha, RNG.uniform(size=size))  # and the whole distribution
    assert abs(np.mean(own > 0) - expected) < 3e-3
    assert abs(z.mean() - own.mean()) < 3e-3 and abs(np.mean(z == 1) - np.mean(own == 1)) < 3e-3


def test_l0_gates_at_test_and_their_gradients():
    comp = l0(axis=-1)
    state = comp.init(PARAMS)
    assert state.learned.log_alpha.shape == (1, 5)
    log_alpha = np.array([[-4.0, -1.0, 0.0, 1.5, 4.0]])
    learned = state.learned.__class__(jnp.asarray(log_alpha, jnp.float32), state.learned.size)
    state = state._replace(learned=learned)
    s = sigmoid(log_alpha)
    z = np.clip(s * 1.2 - 0.1, 0, 1)
    assert z[0, 0] == 0 and z[0, 4] == 1
    close(comp.apply(PARAMS, state), W * z)
    by_w, by_gates = pulled(comp, state)
    close(by_w, G * z)
    inside = (z > 0) & (z < 1)
    close(by_gates.log_alpha, np.sum(G * W, 0) * 1.2 * s * (1 - s) * inside, 1e-5)
    # six weights behind each gate
    shift = 2 / 3 * np.log(0.1 / 1.1)
    close(l0_penalty(state), 6 * np.sum(sigmoid(log_alpha - shift)), 1e-5)
    slope = jax.grad(lambda g: l0_penalty(state._replace(learned=g)))(learned)
    p = sigmoid(log_alpha - shift)
    close(slope.log_alpha, 6 * p * (1 - p), 1e-5)


def test_l0_noise_is_new_at_every_update_and_of_its_own_in_every_leaf():
    tree = {"a": jnp.ones((20, 20)), "b": jnp.ones((20, 20))}
    comp = l0(open_rate=0.5)
    start = comp.init(tree)
    first = comp.update(tree, start)
    second = comp.update(tree, first)
    views = [comp.apply(tree, s) for s in (first, second)]
    assert not np.allclose(views[0]["a"], views[0]["b"])
    assert not np.allclose(views[0]["a"], views[1]["a"])
    assert bits_equal(views[0], comp.apply(tree, first))
    assert bits_equal(comp.apply(tree, without_noise(second)), comp.apply(tree, start))
    other = l0(open_rate=0.5, seed=1)
    assert not np.allclose(
        views[0]["a"], other.apply(tree, other.update(tree, other.init(tree)))["a"]
    )
    assert float(l0_penalty(jc.identity().init(tree))) == 0


# Soft movement


def test_soft_movement_gates_by_a_threshold_and_passes_gradients_straight_through():
    comp = soft_movement(threshold=0.3)
    state = comp.init(PARAMS)
    assert bits_equal(comp.apply(PARAMS, state), PARAMS)  # sigmoid(0) > 0.3
    scores = RNG.normal(size=W.shape)
    learned = type(state.learned)(jnp.asarray(scores, jnp.float32), 1)
    state = state._replace(learned=learned)
    stays = sigmoid(scores) > 0.3
    assert 0 < stays.mean() < 1
    close(comp.apply(PARAMS, state), np.where(stays, W, 0))
    by_w, by_scores = pulled(comp, state)
    close(by_w, G * stays)
    close(by_scores.scores, G * W)  # of hidden weights too
    close(soft_movement_penalty(state), np.sum(sigmoid(scores)), 1e-5)
    half = PARAMS.astype(jnp.bfloat16)
    by_half, by_scores = pulled(comp, state, half, SLOPES.astype(jnp.bfloat16))
    assert by_half.dtype == jnp.bfloat16 and by_scores.scores.dtype == jnp.float32
    close(by_scores.scores, G * W, 4e-2)


def test_soft_movement_of_groups_sums_over_them():
    comp = soft_movement(axis=-1, initial=1.0)
    state = comp.init(PARAMS)
    _, by_scores = pulled(comp, state)
    close(by_scores.scores, np.sum(G * W, 0, keepdims=True), 1e-5)
    close(soft_movement_penalty(state), 30 * sigmoid(1.0))
    closed = soft_movement(axis=-1, initial=-3.0)
    assert not np.any(closed.apply(PARAMS, closed.init(PARAMS)))
    packed = closed.pack(PARAMS, closed.init(PARAMS))
    assert jc.packed_bytes(packed) < PARAMS.nbytes / 4


def test_shrinking_weights_are_the_ones_that_soft_movement_hides():
    # (T) where g has the sign of w descent shrinks w, and S decreases at every step
    comp = soft_movement()
    state = comp.init(PARAMS)
    slopes = jnp.where(jnp.arange(30).reshape(6, 5) % 3 == 0, PARAMS, -PARAMS)
    step = jax.jit(lambda learned: pulled(comp, state._replace(learned=learned), slopes=slopes)[1])
    learned = state.learned
    for _ in range(4):
        before = learned.scores
        learned = jax.tree.map(lambda s, g: s - 2 * g, learned, step(learned))
        np.testing.assert_array_equal(learned.scores < before, slopes * PARAMS > 0)
    view = comp.apply(PARAMS, state._replace(learned=learned))
    # S = -8 w^2 < ln(0.1 / 0.9)
    hidden = (np.arange(30).reshape(6, 5) % 3 == 0) & (8 * W**2 > np.log(9))
    np.testing.assert_array_equal(np.asarray(view) == 0, hidden)


def test_the_penalty_alone_closes_gates_in_a_chain():
    tree = {"dense": {"kernel": PARAMS, "bias": jnp.ones(5)}}
    comp = jc.chain(soft_movement(), soft_threshold())
    state = comp.init(tree)
    tx = optax.sign_sgd(0.5)
    penalty = lambda learned: soft_movement_penalty(state._replace(learned=learned))

    def step(carry, _):
        learned, opt = carry
        updates, opt = tx.update(jax.grad(penalty)(learned), opt, learned)
        return (applied(learned, updates), opt), None

    (learned, _), _ = jax.lax.scan(step, (state.learned, tx.init(state.learned)), length=8)
    view = comp.apply(tree, state._replace(learned=learned))
    assert not np.any(view["dense"]["kernel"]) and np.all(view["dense"]["bias"] == 1)


# Proximal operators


def test_prox_l1_minimises_its_objective():
    amount = 0.7
    grid = np.linspace(-4, 4, 80_001)
    for w in (-2.3, -0.7, -0.2, 0.0, 0.69, 0.71, 3.0):
        best = grid[np.argmin((grid - w) ** 2 / 2 + amount * np.abs(grid))]
        assert abs(float(prox_l1(jnp.float32(w), amount)) - best) < 1e-4
    close(prox_l1(PARAMS, amount), np.sign(W) * np.maximum(np.abs(W) - amount, 0))
    zeros = np.asarray(prox_l1(jnp.array([-0.5, -0.0]), 0.5))
    assert not np.any(np.signbit(zeros))


@pytest.mark.parametrize("axis", [-1, 0, (0, 1), None])
def test_prox_group_lasso_meets_the_conditions_of_its_minimum(axis):
    amount = 2.0 if axis != (0, 1) else 0.5
    z = np.asarray(prox_group_lasso(PARAMS, amount, axis), np.float64)
    rest = {-1: 0, 0: 1, (0, 1): (), None: (0, 1)}[axis]
    norm = lambda a: np.sqrt(np.sum(a**2, axis=rest, keepdims=True))
    alive = norm(z) > 0
    assert np.all(alive == (norm(W) > amount)) and np.any(alive)
    # 0 in z - w + amount * d||z||: z / ||z|| where z is not 0, else anything of norm 1 or less
    safe = np.where(alive, norm(z), 1)
    close(np.where(alive, z - W + amount * z / safe, 0), np.zeros_like(W), 1e-5)
    assert np.all(norm(W)[~alive] <= amount)
    if axis == (0, 1):  # groups of one weight
        close(prox_l1(PARAMS, amount), z)


def test_prox_group_lasso_of_sizes_that_squares_cannot_hold():
    w = jnp.array([[3e30, 3e-30], [4e30, 4e-30]])
    got = np.asarray(prox_group_lasso(w, jnp.float32(2.5e-30)), np.float64)
    close(got[:, 0] / 1e30, [3, 4])
    close(got[:, 1] / 1e-30, [1.5, 2])
    assert not np.any(prox_group_lasso(jnp.zeros((2, 2)), 1.0))
    assert prox_group_lasso(jnp.ones((2, 2), jnp.bfloat16), 0.1).dtype == jnp.bfloat16
    assert prox_group_lasso(jnp.zeros((0, 3)), 1.0).shape == (0, 3)


def test_proximal_gradient_descent_reaches_the_lasso():
    # orthonormal inputs: the lasso is one soft threshold of the least squares
    q, _ = np.linalg.qr(RNG.normal(size=(8, 6)))
    y = RNG.normal(size=(8, 5))
    least = q.T @ y
    strength = float(np.median(np.abs(least)))
    x, y = jnp.asarray(q, jnp.float32), jnp.asarray(y, jnp.float32)
    loss = lambda p: jnp.sum((x @ p["w"] - y) ** 2) / 2 + jnp.sum((p["b"] - 1) ** 2) / 2
    tx = optax.chain(optax.sgd(0.5), proximal(0.5, lambda count: strength))
    params = {"w": jnp.ones((6, 5)), "b": jnp.zeros(2)}

    def step(carry, _):
        params, opt = carry
        updates, opt = tx.update(jax.grad(loss)(params), opt, params)
        return (applied(params, updates), opt), None

    (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), length=40)
    close(params["w"], np.sign(least) * np.maximum(np.abs(least) - strength, 0), 1e-5)
    assert int(jnp.sum(params["w"] == 0)) == 15 and int(optax.tree.get(state, "count")) == 40
    close(params["b"], [1, 1])  # vectors are left alone


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_proximal_zeros_are_exact_in_every_dtype_and_inside_masked(dtype):
    params = {"a": PARAMS.astype(dtype), "b": PARAMS.astype(dtype)}
    inner = proximal(1.0, 0.8, prox=functools.partial(prox_group_lasso, axis=0))
    tx = optax.chain(optax.sign_sgd(0.01), optax.masked(inner, {"a": True, "b": False}))
    updates, _ = tx.update(
        {"a": PARAMS.astype(dtype), "b": PARAMS.astype(dtype)}, tx.init(params), params
    )
    new = applied(params, updates)
    assert new["a"].dtype == dtype and np.all(new["b"] != 0)
    rows = np.all(np.asarray(new["a"] == 0), axis=1)
    moved = W - 0.01 * np.sign(W)
    norms = np.sqrt(np.sum(moved**2, 1))
    np.testing.assert_array_equal(rows, norms <= 0.8)


# Errors

NAN = {"a": {"w": jnp.array([[1.0, jnp.nan]])}}
TX = proximal(0.1, 0.1)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: soft_threshold(initial=float("nan")), "initial must be finite, got nan"),
        (lambda: soft_threshold().init(NAN), "a/w: a weight to prune must not be NaN"),
        (
            lambda: soft_threshold().apply(PARAMS, jc.identity().init(PARAMS)),
            "holds no threshold: it was made by another",
        ),
        (lambda: l0(open_rate=1.0), "open_rate must be between 0 and 1, got 1.0"),
        (lambda: l0().init(NAN), "a/w: a weight to prune must not be NaN"),
        (
            lambda: l0(axis=3).init({"w": PARAMS}),
            r"w: axis 3 is none of an array of shape \(6, 5\)",
        ),
        (
            lambda: l0().apply(PARAMS, soft_threshold().init(PARAMS)),
            "holds no gates: it was made by another",
        ),
        (lambda: soft_movement(threshold=0.0), "threshold must be between 0 and 1, got 0.0"),
        (lambda: soft_movement(initial=float("inf")), "initial must be finite, got inf"),
        (lambda: soft_movement().init(NAN), "a/w: a weight to prune must not be NaN"),
        (lambda: soft_movement(axis=2).init({"w": PARAMS}), "w: axis 2 is none of an array"),
        (
            lambda: soft_movement().apply(PARAMS, l0().init(PARAMS)),
            "holds no scores: it was made by another",
        ),
        (lambda: prox_group_lasso(PARAMS, 1.0, (0, 2)), r"axis \(0, 2\) is none of an array"),
        (lambda: proximal(-0.1, 0.1), "learning_rate must not be negative, got -0.1"),
        (lambda: proximal(0.1, -1), "strength must not be negative, got -1"),
        (lambda: TX.update(PARAMS, TX.init(PARAMS)), r"proximal\(\) needs params"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
