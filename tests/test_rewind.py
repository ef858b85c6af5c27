"""Lottery tickets: densities, nested masks, weights bit for bit, learning rates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from _trees import bits_equal, small_tree

from jaxcompress.prune.sparse_training.lottery_tickets import (
    iterative,
    iterative_magnitude,
    nested_magnitude_masks,
    rewind_schedule,
    rewind_weights,
)

pytestmark = pytest.mark.broad

SIZE = 24 * 16 + 3 * 3 * 4 * 8


def trained(params, masks, round):
    """Noise of the round where the masks keep, as masked training would leave it."""
    rng = np.random.default_rng(100 + round)
    move = lambda w: w + jnp.asarray(rng.normal(size=w.shape), w.dtype) if w.ndim > 1 else w
    moved = jax.tree.map(move, params)
    return jax.tree.map(lambda m, w: w if m.ndim == 0 else jnp.where(m, w, 0), masks, moved)


def kept(masks):
    return {k: np.asarray(masks[k]["kernel"]) for k in ("dense", "conv")}


@pytest.fixture(scope="module")
def tickets():
    params = small_tree()
    rewind = lambda now, masks: rewind_weights(params, masks)
    return params, iterative_magnitude(trained, params, rounds=6, rewind=rewind)


def test_densities_are_powers_and_masks_nested(tickets):
    _, rounds = tickets
    before = {"dense": np.ones((24, 16), bool), "conv": np.ones((3, 3, 4, 8), bool)}
    for r, (masks, params) in enumerate(rounds, start=1):
        now = kept(masks)
        assert sum(m.sum() for m in now.values()) == round(0.8**r * SIZE)
        assert not any(np.any(now[k] & ~before[k]) for k in now)
        assert jax.tree.structure(masks) == jax.tree.structure(params)
        assert masks["dense"]["bias"].shape == masks["steps"].shape == ()
        before = now


def test_survivors_are_those_of_the_start_bit_for_bit(tickets):
    start, rounds = tickets
    for masks, params in rounds:
        for key, mask in kept(masks).items():
            now, then = (np.asarray(t[key]["kernel"]).view(np.int32) for t in (params, start))
            np.testing.assert_array_equal(now[mask], then[mask])
            assert not np.any(now[~mask])  # +0, whatever the sign was
        for path in ("scalar", "steps", "empty"):
            assert bits_equal(params[path], start[path])


def test_each_round_keeps_the_largest_weights_that_were_left(tickets):
    start, rounds = tickets
    masks, params = jax.tree.map(lambda w: jnp.ones((), bool), start), start
    for r, left in enumerate(rounds):
        after = trained(params, masks, r)
        old, new = kept(masks), kept(left.masks)
        sizes = {k: np.abs(np.asarray(after[k]["kernel"])) for k in new}
        old = {k: np.broadcast_to(m, sizes[k].shape) for k, m in old.items()}
        worst = min(sizes[k][new[k]].min() for k in new)
        assert all(np.all(sizes[k][old[k] & ~new[k]] <= worst) for k in new)
        masks, params = left


def test_values_stay_without_rewinding():
    params = small_tree()
    (masks, now), *_ = iterative_magnitude(trained, params, rounds=1, rate=0.5, scope="layer")
    after = trained(params, jax.tree.map(lambda w: jnp.ones((), bool), params), 0)
    for key, mask in kept(masks).items():
        assert mask.sum() == mask.size // 2
        np.testing.assert_array_equal(
            now[key]["kernel"], np.where(mask, after[key]["kernel"], np.float32(0))
        )


def test_what_was_pruned_ranks_behind_weights_that_are_zero():
    w, masks = jnp.zeros((1, 4)), jnp.array([[False, False, True, True]])
    new = nested_magnitude_masks(w, masks, 0.75, scope="layer")
    np.testing.assert_array_equal(new, [[False, False, True, False]])
    half = nested_magnitude_masks(w.astype(jnp.bfloat16), masks, 0.5)
    np.testing.assert_array_equal(half, masks)


def test_signed_zeros_and_bits_of_low_precision_survive():
    w = jnp.array([[-0.0, 1.5, jnp.inf, 3.0]], jnp.bfloat16)
    got = rewind_weights(w, jnp.array([[True, True, True, False]]))
    assert np.signbit(np.asarray(got, np.float32)[0, 0]) and got[0, 2] == jnp.inf and got[0, 3] == 0


def test_the_learning_rate_is_that_of_the_step_it_is_rewound_to():
    schedule = optax.cosine_decay_schedule(0.1, 100)
    again = rewind_schedule(schedule, 70)
    with jax.numpy_dtype_promotion("standard"):
        got = [float(again(jnp.int32(t))) for t in (0, 15, 30)]
    want = [0.05 * (1 + np.cos(np.pi * t / 100)) for t in (70, 85, 100)]
    np.testing.assert_allclose(got, want, atol=1e-7)
    tx = optax.sgd(again)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = tx.update(jnp.ones(1), tx.init(jnp.ones(1)))
    np.testing.assert_allclose(-np.asarray(updates), want[:1], rtol=1e-6)


def test_sparsities_of_the_rounds():
    np.testing.assert_allclose(iterative(4), [0.2, 0.36, 0.488, 0.5904])
    assert iterative(2, rate=1.0) == (1.0, 1.0) and iterative(2, rate=0.0) == (0.0, 0.0)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: iterative(0), "iterative needs rounds >= 1 and rate in"),
        (lambda: iterative(3, rate=1.5), r"got rounds=3, rate=1.5"),
        (lambda: rewind_schedule(lambda t: t, -1), "to_step must not be negative, got -1"),
        (
            lambda: rewind_weights({"w": jnp.ones(2)}, {"v": jnp.array(True)}),
            "masks do not have the params' structure",
        ),
        (
            lambda: rewind_weights({"w": jnp.ones(2)}, {"w": jnp.ones(3, bool)}),
            r"w: the mask has shape \(3,\), the leaf \(2,\)",
        ),
        (
            lambda: nested_magnitude_masks(
                {"w": jnp.ones((1, 4))}, {"w": jnp.array([[True, False, False, False]])}, 0.5
            ),
            "w: sparsity 0.5 is below that of the masks",
        ),
        (
            lambda: iterative_magnitude(
                lambda p, m, r: p, {"w": jnp.full((2, 2), jnp.nan)}, rounds=1
            ),
            "w: scores must not be NaN",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
