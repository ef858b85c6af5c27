"""Channels by the least squares error of what reads them, against NumPy's least squares."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.graph.coupling.dependency_graph import axes
from jaxcompress.prune.channels.least_squares import group_obs

pytestmark = pytest.mark.broad

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def patches(h):
    """[images * positions, 9 * channels] of a 3x3 convolution with stride 1 and zeros around."""
    padded = np.pad(h, ((0, 0), (1, 1), (1, 1), (0, 0)))
    views = [padded[:, i : i + h.shape[1], j : j + h.shape[2]] for i in range(3) for j in range(3)]
    return np.concatenate(views, -1).reshape(-1, 9 * h.shape[-1])


def conv(x, w):
    dims = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=dims)


PARAMS = {"one": normal(3, 3, 2, 6), "two": normal(3, 3, 6, 3), "side": normal(6, 4)}
X = normal(8, 5, 5, 2)


def hidden(p, x):
    return jax.nn.relu(conv(x, p["one"]))


def network(p, x):
    h = hidden(p, x)
    return conv(h, p["two"]), h @ p["side"]


def by_hand():
    """Greedy: all subsets one smaller, each solved anew in float64."""
    h = np.asarray(hidden(PARAMS, X), np.float64)
    readers = []
    two = np.asarray(PARAMS["two"], np.float64).reshape(54, 3)
    readers.append((patches(h), two, lambda c: np.arange(9) * 6 + c))
    readers.append((h.reshape(-1, 6), np.asarray(PARAMS["side"], np.float64), lambda c: [c]))

    def error(stay):
        shares = []
        for x, w, rows in readers:
            y = x @ w
            left = x[:, np.concatenate([rows(c) for c in stay])] if stay else x[:, :0]
            fitted = left @ np.linalg.lstsq(left, y, rcond=None)[0]
            shares.append(np.square(y - fitted).sum() / np.square(y).sum())
        return np.mean(shares)

    stay, score = list(range(6)), np.zeros(6)
    while stay:
        costs = [error([d for d in stay if d != c]) for c in stay]
        channel = stay[int(np.argmin(costs))]
        score[channel] = min(costs)
        stay.remove(channel)
    return score


def test_scores_are_the_errors_of_least_squares_one_channel_after_the_other():
    found = axes(network, PARAMS, X)
    score = group_obs(found, network, PARAMS, [(X[:3],), (X[3:],)], damping=1e-7)
    assert list(score) == ["one[3]"] and score["one[3]"].dtype == jnp.float32
    np.testing.assert_allclose(score["one[3]"], by_hand(), rtol=2e-4)
    assert np.max(score["one[3]"]) == pytest.approx(1, abs=1e-4)  # all are gone: no output is left


def test_the_fit_has_the_error_that_the_score_says():
    found = axes(lambda p, x: network(p, x)[0], PARAMS, X)
    fn = lambda p, x: network(p, x)[0]
    score = group_obs(found, fn, PARAMS, [(X,)], damping=1e-7)["one[3]"]
    kept = jc.prune.choose_groups({"one[3]": score}, 0.5)
    masks = jc.prune.group_masks(found, kept)
    fitted, _ = jc.prune.sparse_gpt(
        fn, PARAMS, [(X,)], {"two": 0.0}, masks=masks, sweeps=200, damping=1e-7
    )
    y = np.asarray(fn(PARAMS, X), np.float64)
    error = np.square(np.asarray(fn(fitted, X), np.float64) - y).sum() / np.square(y).sum()
    assert error == pytest.approx(float(np.sort(score)[2]), rel=1e-2)


def test_a_copy_is_as_dear_as_both_and_a_dead_channel_costs_nothing():
    up = normal(4, 5).at[:, 2].set(0.0)
    up = up.at[:, 4].set(up[:, 0])
    params = {"up": up, "down": normal(5, 3)}
    fn = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
    x = normal(64, 4)
    score = np.asarray(group_obs(axes(fn, params, x), fn, params, [(x,)], damping=1e-6)["up[1]"])
    order = np.argsort(score, kind="stable")
    assert order[0] == 2 and order[1] in (0, 4) and np.all(score[order[:2]] < 1e-4)
    assert score[order[2]] > 1e-2


def test_scanned_and_grouped_layers_count_too():
    params = {"w": normal(1, 1, 2, 4), "v": normal(1, 1, 2, 6), "out": normal(6, 2)}

    def fn(p, x):
        h = jax.nn.relu(conv(x, p["w"]))
        dims = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            h, p["v"], (1, 1), "SAME", dimension_numbers=dims, feature_group_count=2
        )
        return y @ p["out"]

    found = axes(fn, params, X)
    for name, score in group_obs(found, fn, params, [(X,)]).items():
        assert score.shape == (found.groups[name].size,) and np.all(np.isfinite(score))
        assert np.max(score) > 0.1

    stacked = {"in": normal(3, 6), "up": normal(2, 6, 4), "down": normal(2, 4, 6)}
    block = lambda x, w: (x + jax.nn.relu(x @ w[0]) @ w[1], None)
    run = lambda p, x: jax.lax.scan(block, x @ p["in"], (p["up"], p["down"]))[0]
    x = normal(16, 3)
    found = axes(run, stacked, x)
    inner = [name for name, group in found.groups.items() if group.size == 4]
    score = group_obs(found, run, stacked, [(x,)], of=inner)[inner[0]]
    assert score.shape == (4,) and np.all(np.isfinite(score)) and np.max(score) > 0.1


def test_a_layer_used_twice_is_fitted_to_both_uses():
    params = {"up": normal(4, 6), "down": normal(6, 4)}

    def twice(p, x):
        for _ in range(2):
            x = jnp.tanh(jax.nn.relu(x @ p["up"]) @ p["down"])
        return x

    x = normal(40, 4)
    score = group_obs(axes(twice, params, x), twice, params, [(x,)], damping=1e-6)["up[1]"]
    first = jax.nn.relu(x @ params["up"])
    second = jax.nn.relu(jnp.tanh(first @ params["down"]) @ params["up"])
    both = {"eye": jnp.eye(6), "down": params["down"]}
    stacked = jnp.concatenate([first, second])
    once = lambda p, h: jax.nn.relu(h @ p["eye"]) @ p["down"]
    alone = group_obs(axes(once, both, stacked), once, both, [(stacked,)], damping=1e-6)["eye[1]"]
    np.testing.assert_allclose(score, alone, rtol=1e-3)


def test_bad_input_is_named():
    found = axes(network, PARAMS, X)
    with pytest.raises(ValueError, match="damping must be positive, got 0"):
        group_obs(found, network, PARAMS, [(X,)], damping=0)
    with pytest.raises(ValueError, match="there is no group 'one'"):
        group_obs(found, network, PARAMS, [(X,)], of=["one"])
    with pytest.raises(ValueError, match="no contraction with a weight reads the channels of"):
        scaled = {"w": normal(3, 4), "s": normal(4)}
        fn = lambda p, x: (x @ p["w"] * p["s"][None]).sum(-1)
        group_obs(axes(fn, scaled, normal(2, 3)), fn, scaled, [(normal(2, 3),)], of=["w[1]"])
    with pytest.raises(ValueError, match="must not be NaN"):
        bad = PARAMS | {"side": PARAMS["side"].at[0, 0].set(jnp.nan)}
        group_obs(found, network, bad, [(X,)])
    with pytest.raises(ValueError, match="holds NaN or Inf"):
        group_obs(found, network, PARAMS, [(X.at[0].set(jnp.inf),)])
    with pytest.raises(ValueError, match="empty"):
        group_obs(found, network, PARAMS, [])
