"""Masks that change under any optimizer: exact zeros, moments of 0, pauses."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from jaxcompress.prune import mask_gradients, masked_optimizer, project
from jaxcompress.prune.sparse_training.dynamic import rigl
from jaxcompress.prune.sparse_training.moments import reset_moments
from jaxcompress.prune.sparse_training.optimizers import dynamic_optimizer, hold, pausing_optimizer

pytestmark = pytest.mark.broad

LABELS = {"up": "adam", "down": "sgd", "up_bias": "sgd", "down_bias": "adam"}
OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda: optax.adamw(0.1, weight_decay=0.1),
    "lion": lambda: optax.lion(0.05),
    "rmsprop": lambda: optax.rmsprop(0.05, momentum=0.9),
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=4, momentum=0.9),
    "lamb": lambda: optax.lamb(0.1),
    "multi_steps": lambda: optax.MultiSteps(optax.adam(0.1), 2),
    "schedule_free": lambda: contrib.schedule_free(optax.adam(0.1, b1=0.0), 0.1),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(
        optax.linear_schedule(0.1, 0.01, 9)
    ),
    "partition": lambda: optax.partition(
        {"adam": optax.adam(0.1), "sgd": optax.sgd(0.1, momentum=0.9)}, LABELS
    ),
    "chain_with_clipping": lambda: optax.chain(
        optax.clip_by_global_norm(0.5), optax.add_decayed_weights(0.1), optax.adam(0.1)
    ),
    "sgd_with_momentum": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "muon": lambda: contrib.muon(0.1),
}
RIGL = rigl(0.6, key=jax.random.key(1), end=100, every=2, fraction=0.5, scope="layer")


@pytest.fixture(autouse=True)
def _optax_mixes_dtypes():
    with jax.numpy_dtype_promotion("standard"):
        yield


def problem(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = {"up": (6, 10), "down": (10, 4), "up_bias": (10,), "down_bias": (4,)}
    params = {k: jnp.asarray(0.5 * rng.normal(size=s), dtype) for k, s in shapes.items()}
    return params, jnp.asarray(rng.normal(size=(8, 6)), dtype)


def loss(params, x):
    hidden = jax.nn.relu(x @ params["up"] + params["up_bias"][None])
    return jnp.mean(jnp.square(hidden @ params["down"] + params["down_bias"][None] - 1.0))


@jax.jit
def gradients_and_masks(params, state, x, step):
    # Other data at every step, so that gradients change and with them what grows.
    x = x * jnp.cos(step + jnp.arange(x.shape[1]))[None].astype(x.dtype)
    grads = jax.grad(lambda p: loss(RIGL.apply(p, state), x))(params)
    return grads, RIGL.update(params, state, grads=grads)


def train(tx, dtype=jnp.float32, steps=7):
    """Yields (params, masks now, masks before, optimizer state) after every step."""
    params, x = problem(dtype)
    state, opt = RIGL.init(params), tx.init(params)

    @jax.jit
    def descend(params, opt, grads, masks):
        updates, opt = tx.update(grads, opt, params, masks=masks)
        return optax.apply_updates(params, updates), opt

    for step in range(steps):
        before = state.buffers.masks
        grads, state = gradients_and_masks(params, state, x, step)
        params, opt = descend(params, opt, grads, state.buffers.masks)
        yield jax.tree.map(np.asarray, (params, state.buffers.masks, before)) + (opt,)


def arrays_like(opt, shape):
    return [
        np.asarray(leaf, np.float64)
        for leaf in jax.tree.leaves(opt)
        if leaf.shape == shape and jnp.issubdtype(leaf.dtype, jnp.floating)
    ]


CASES = [(name, jnp.float32) for name in OPTIMIZERS]
CASES += [(name, jnp.bfloat16) for name in ("adamw", "multi_steps", "sgd_with_momentum")]


@pytest.mark.parametrize("name, dtype", CASES)
def test_pruned_weights_are_exactly_zero_after_every_step_of_rigl(name, dtype):
    tx = dynamic_optimizer(OPTIMIZERS[name]())
    changes, first = 0, None
    for params, masks, before, opt in train(tx, dtype):
        params = cast(dict, params)
        first = params if first is None else first
        for key in ("up", "down"):
            mask, grown = masks[key], masks[key] & ~before[key]
            assert params[key].dtype == dtype and mask.sum() == round(0.4 * mask.size)
            assert not np.any(params[key][~mask]) and not np.any(params[key][grown])
            assert np.all(np.isfinite(params[key].astype(float))) and np.any(params[key])
            kept = arrays_like(opt.inner, mask.shape)
            assert kept and all(np.abs(m[~mask | grown]).max() < 1e-20 for m in kept)
            changes += grown.sum()
        if name == "schedule_free":
            averages = contrib.schedule_free_eval_params(opt.inner[1], params)
            assert not np.any(np.asarray(averages["up"])[~masks["up"]])
    assert changes >= 10
    assert np.any(params["up_bias"] != first["up_bias"])  # pyright: ignore


@pytest.mark.parametrize("name", ["adamw", "schedule_free"])
def test_masks_that_do_not_change_are_those_of_masked_optimizer(name):
    params, x = problem()
    masks = RIGL.init(params).buffers.masks
    ends = []
    for wrap in (masked_optimizer, dynamic_optimizer):
        tx, p = wrap(OPTIMIZERS[name]()), params
        opt, update = tx.init(p), jax.jit(tx.update)
        for _ in range(4):
            updates, opt = update(jax.grad(loss)(p, x), opt, p, masks=masks)
            p = optax.apply_updates(p, updates)
        ends.append(p)
    # moments of what never lived may differ: nothing that is seen
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), *ends)


def ones_for(tx, params):
    # A state of ones, without running the optimizer.
    shapes = jax.eval_shape(tx.init, params)
    return jax.tree.map(lambda s: jnp.asarray(np.ones(s.shape, s.dtype)), shapes)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_reset_moments_keeps_structure_and_survivors(name):
    params, _ = problem()
    params = {k: params[k] for k in LABELS}
    rng = np.random.default_rng(1)
    masks = {k: rng.random(w.shape) < 0.5 if w.ndim == 2 else True for k, w in params.items()}
    tx = OPTIMIZERS[name]()
    opt = ones_for(tx, params)
    new = reset_moments(tx, opt, jax.tree.map(jnp.asarray, masks))
    assert jax.tree.structure(new) == jax.tree.structure(opt)
    found = 0
    for old, now in zip(jax.tree.leaves(opt), jax.tree.leaves(new), strict=True):
        assert (old.shape, old.dtype) == (now.shape, now.dtype)
        mask = {(6, 10): masks["up"], (10, 4): masks["down"]}.get(old.shape, True)
        np.testing.assert_array_equal(now, np.broadcast_to(mask, old.shape))
        found += mask is not True
    assert found >= 2


def test_factored_moments_of_adafactor_stay():
    params = {"w": jnp.ones((8, 6))}
    tx = optax.adafactor(0.1, min_dim_size_to_factor=4)
    opt = ones_for(tx, params)
    assert {(8,), (6,)} <= {leaf.shape for leaf in jax.tree.leaves(opt)}
    new = reset_moments(tx, opt, {"w": jnp.zeros((8, 6), bool)})
    jax.tree.map(np.testing.assert_array_equal, new, opt)


def test_weights_that_return_begin_with_no_momentum_and_stay_at_zero_for_a_step():
    steps = [[True, True], [True, False], [True, True], [True, True]]
    tx = dynamic_optimizer(optax.sgd(1.0, momentum=0.5))
    w, seen = jnp.array([1.0, 1.0]), []
    opt = tx.init(w)
    for mask in steps:
        updates, opt = tx.update(jnp.ones(2), opt, w, masks=jnp.array(mask))
        w = cast(jax.Array, optax.apply_updates(w, updates))
        seen.append(np.asarray(w).tolist())
    # by hand: momentum 1, 1.5, 1.75, 1.875 where it lives; 1 at the second weight at the end
    assert seen == [[0.0, 0.0], [-1.5, 0.0], [-3.25, 0.0], [-5.125, -1.0]]


def test_pausing_trains_nothing_where_something_grew_and_only_there():
    steps = [[True, False], [True, True], [True, True], [True, False]]
    tx = pausing_optimizer(optax.adam(0.5))
    w, seen, counts = jnp.array([1.0, 1.0]), [], []
    opt = tx.init(w)
    for mask in steps:
        updates, opt = tx.update(jnp.ones(2), opt, w, masks=jnp.array(mask))
        w = cast(jax.Array, optax.apply_updates(w, updates))
        seen.append(np.asarray(w))
        counts.append(int(optax.tree_utils.tree_get(opt, "count")))
    np.testing.assert_allclose(seen[0], [0.5, 0.0], atol=1e-5)
    np.testing.assert_array_equal(seen[1], seen[0])
    assert counts == [1, 1, 2, 3] and seen[2][1] < 0 and seen[3][1] == 0 < seen[2][0] + 1


def test_pausing_sends_what_dropped_to_zero_all_the_same():
    tx = pausing_optimizer(optax.sgd(0.5))
    w = jnp.array([1.0, 1.0, 0.0])
    _, opt = tx.update(jnp.ones(3), tx.init(w), w, masks=jnp.array([True, True, False]))
    updates, _ = tx.update(jnp.ones(3), opt, w, masks=jnp.array([True, False, True]))
    np.testing.assert_array_equal(cast(Any, optax.apply_updates(w, updates)), [1.0, 0.0, 0.0])


def test_an_update_of_fewer_bits_takes_a_weight_to_zero():
    narrow = lambda updates, params: jax.tree.map(lambda u: u.astype(jnp.bfloat16), updates)
    tx = optax.chain(optax.stateless(narrow), project())
    w = jnp.array([1.2345678, 3.3333333])
    updates, _ = tx.update(jnp.ones(2), tx.init(w), w, masks=jnp.array([False, False]))
    assert not np.any(cast(Any, optax.apply_updates(w, updates)))


def test_hold_leaves_hidden_weights_as_they_are():
    tx = optax.chain(mask_gradients(), optax.adamw(0.1, weight_decay=0.5), hold())
    w, masks = jnp.array([1.5, 2.5]), jnp.array([True, False])
    opt = tx.init(w)
    for _ in range(2):
        updates, opt = tx.update(jnp.ones(2), opt, w, masks=masks)
        w = cast(jax.Array, optax.apply_updates(w, updates))
    assert w[1] == 2.5 and w[0] < 1.5


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda tx, w: tx.update(w, tx.init(w), w), r"dynamic_optimizer\(\) needs masks"),
        (lambda tx, w: tx.update(w, tx.init(w), masks=w), r"dynamic_optimizer\(\) needs params"),
        (
            lambda tx, w: hold().update(w, optax.EmptyState(), w),
            r"hold\(\) needs masks: call tx.update",
        ),
        (
            lambda tx, w: reset_moments(optax.adam(0.1), optax.sgd(0.1).init(w), w),
            "opt_state or masks do not belong to tx",
        ),
        (
            lambda tx, w: reset_moments(optax.adam(0.1), optax.adam(0.1).init({"w": w}), [w]),
            "opt_state or masks do not belong to tx",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(dynamic_optimizer(optax.sgd(0.1)), jnp.ones(2))
