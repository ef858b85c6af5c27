"""Schedules: closed forms, exact ends, and the steps at which masks change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.prune import masks
from jaxcompress.prune.masking.magnitudes import magnitude
from jaxcompress.prune.masking.schedules import (
    as_schedule,
    constant,
    cubic,
    exponential,
    linear,
    one_shot,
)

pytestmark = pytest.mark.broad

RAMPS = [cubic, linear, exponential]
STEPS = np.arange(0, 130)


def values(schedule, steps=STEPS):
    return np.asarray(jax.vmap(schedule)(jnp.asarray(steps, jnp.int32)))


def fired(schedule, steps=STEPS):
    return [int(t) for t in steps if bool(schedule.fires(jnp.int32(t)))]


@pytest.mark.parametrize(
    "ramp, law",
    [
        (cubic, lambda x: 0.85 + (0.1 - 0.85) * (1 - x) ** 3),
        (linear, lambda x: 0.1 + 0.75 * x),
        (exponential, lambda x: 1 - 0.9 * (0.15 / 0.9) ** x),
    ],
)
def test_closed_forms(ramp, law):
    got = values(ramp(0.1, 0.85, start=7, end=107))
    np.testing.assert_allclose(got, law(np.clip((STEPS - 7) / 100, 0, 1)), atol=1e-6)
    assert np.all(np.diff(got) >= 0)


@pytest.mark.parametrize("ramp", RAMPS)
def test_ends_are_exact_and_the_end_always_fires(ramp):
    schedule = ramp(0.3, 0.8, start=10, end=100, every=30)
    got = values(schedule)
    assert np.all(got[:11] == np.float32(0.3)) and np.all(got[100:] == np.float32(0.8))
    assert fired(schedule) == [10, 40, 70, 100]
    assert fired(ramp(0.0, 0.8, start=10, end=90, every=30)) == [10, 40, 70, 90]
    at_once = ramp(0.0, 0.8, start=5, end=5)
    assert fired(at_once) == [5] and values(at_once)[4:6].tolist() == [0.0, np.float32(0.8)]


def test_cubic_is_at_seven_eighths_half_way():
    assert abs(float(cubic(0.2, 0.8, start=20, end=60)(jnp.int32(40))) - (0.2 + 7 / 8 * 0.6)) < 1e-6


def test_exponential_prunes_the_same_share_of_what_is_left():
    # 1 - d^(t / T): iterative pruning of a fifth of what remains, ten rounds
    left = 1 - values(exponential(0.0, 1 - 0.8**10, end=10), STEPS[:11]).astype(float)
    np.testing.assert_allclose(left[1:] / left[:-1], 0.8, rtol=1e-5)


def test_ramps_may_be_traced():
    end = jax.jit(lambda s: linear(0.0, s, end=4)(jnp.int32(2)))(jnp.float32(0.5))
    assert float(end) == 0.25


def test_one_shot_changes_masks_once():
    w = jnp.arange(1.0, 11.0)[None]
    comp = magnitude(one_shot(0.5, at=2))
    state, kept = comp.init(w), []
    update = jax.jit(comp.update)
    for step in range(4):
        state = update(w if step < 2 else -w[:, ::-1], state)
        kept.append(np.flatnonzero(np.asarray(masks(state, w))))
    assert len(kept[0]) == 10
    np.testing.assert_array_equal(kept[1], np.arange(5, 10))
    np.testing.assert_array_equal(kept[3], kept[1])  # though the weights have turned round
    assert int(jnp.sum(magnitude(one_shot(0.3)).init(w).buffers.masks)) == 7


def test_constant_follows_the_weights():
    w = jnp.arange(1.0, 11.0)[None]
    comp = magnitude(constant(0.5))
    state = comp.update(w[:, ::-1], comp.init(w))
    np.testing.assert_array_equal(np.flatnonzero(np.asarray(state.buffers.masks)), np.arange(5))


@pytest.mark.parametrize("ramp", RAMPS)
def test_errors_of_ramps(ramp):
    with pytest.raises(ValueError, match="initial must be a share"):
        ramp(-0.1, 0.5, end=5)
    with pytest.raises(ValueError, match="final must be a share"):
        ramp(0.0, 1.5, end=5)
    with pytest.raises(ValueError, match=f"{ramp.__name__} needs start <= end and every >= 1"):
        ramp(0.0, 0.5, start=9, end=5)
    with pytest.raises(ValueError, match="every=0"):
        ramp(0.0, 0.5, end=5, every=0)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: exponential(0.0, 1.0, end=5), ValueError, "a density above 0 .* final=1"),
        (lambda: one_shot(1.5), ValueError, "sparsity must be a share of zeros"),
        (lambda: one_shot(0.5, at=-1), ValueError, "at >= 0, got at=-1"),
        (lambda: constant(-0.5), ValueError, "sparsity must be a share of zeros"),
        (lambda: as_schedule("half"), TypeError, "a number, a schedule or step -> number"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
