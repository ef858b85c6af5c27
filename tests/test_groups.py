"""Scores of coupled channels and choices among them, against sums written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.graph.coupling.dependency_graph import axes
from jaxcompress.prune.channels.choose import (
    channel_macs,
    choose_groups,
    group_macs,
    groups_for_macs,
)
from jaxcompress.prune.channels.coupled import group_masks
from jaxcompress.prune.channels.gate_scores import gated, group_fisher, group_norms, group_taylor
from jaxcompress.prune.masking.mask_state import apply_masks

pytestmark = pytest.mark.broad


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


PARAMS = {
    "conv": normal(3, 3, 2, 4),
    "bias": normal(4, seed=1),
    "dense": normal(36, 5, seed=2),
    "out": normal(5, 2, seed=3),
}
X, Y = normal(6, 3, 3, 2, seed=4), normal(6, 2, seed=5)


def network(p, x):
    dims = ("NHWC", "HWIO", "NHWC")
    h = jax.lax.conv_general_dilated(x, p["conv"], (1, 1), "SAME", dimension_numbers=dims)
    h = jax.nn.relu(h + p["bias"][None, None, None])
    return jnp.tanh(h.reshape(h.shape[0], -1) @ p["dense"]) @ p["out"]


def loss(p, x, y):
    return jnp.mean(jnp.square(network(p, x) - y))


FOUND = axes(network, PARAMS, X)
CONV, DENSE = "conv[3]", "dense[1]"


def by_hand(tree):
    """The sums over all that goes with a channel: kernel, bias, nine rows of the dense layer."""
    rows = tree["dense"].reshape(9, 4, 5)
    conv = tree["conv"].sum((0, 1, 2)) + tree["bias"] + rows.sum((0, 2))
    return {CONV: conv, DENSE: tree["dense"].sum(0) + tree["out"].sum(1)}


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, score in found.items():
        np.testing.assert_allclose(score, wanted[name], rtol=2e-5, err_msg=name)


def test_norms_are_those_of_all_coupled_weights():
    squares = {name: np.square(np.asarray(w, np.float64)) for name, w in PARAMS.items()}
    same(group_norms(FOUND, PARAMS), {n: np.sqrt(s) for n, s in by_hand(squares).items()})
    without = by_hand(squares | {"bias": np.zeros(4)})
    same(group_norms(FOUND, PARAMS, skip="bias"), {n: np.sqrt(s) for n, s in without.items()})


def test_taylor_and_fisher_are_squares_of_g_w():
    g_w = lambda x, y: jax.tree.map(jnp.multiply, jax.grad(loss)(PARAMS, x, y), PARAMS)
    whole = {n: jnp.square(s) for n, s in by_hand(g_w(X, Y)).items()}
    # batches of different lengths count by example
    same(group_taylor(FOUND, loss, PARAMS, [(X[:2], Y[:2]), (X[2:], Y[2:])]), whole)
    each = [by_hand(g_w(X[i : i + 1], Y[i : i + 1])) for i in range(6)]
    mean = {n: jnp.mean(jnp.stack([jnp.square(e[n]) for e in each]), 0) for n in whole}
    same(group_fisher(FOUND, loss, PARAMS, [(X[:2], Y[:2]), (X[2:], Y[2:])]), mean)
    # what is skipped is no part of the sum
    without = lambda x, y: by_hand(g_w(x, y) | {"bias": np.zeros(4)})
    whole = {n: jnp.square(s) for n, s in without(X, Y).items()}
    same(group_taylor(FOUND, loss, PARAMS, [(X, Y)], skip="bias"), whole)
    each = [without(X[i : i + 1], Y[i : i + 1]) for i in range(6)]
    mean = {n: sum(jnp.square(e[n]) for e in each) / 6 for n in whole}
    same(group_fisher(FOUND, loss, PARAMS, [(X, Y)], skip="bias"), mean)


def test_gates_of_zero_and_one_are_masks():
    kept = {CONV: np.arange(4) > 1, DENSE: np.arange(5) != 3}
    gates = {name: jnp.asarray(stays, jnp.float32) for name, stays in kept.items()}
    masked = apply_masks(PARAMS, group_masks(FOUND, kept))
    for name, w in gated(FOUND, PARAMS, gates).items():
        np.testing.assert_array_equal(w, masked[name])
    half = {k: w.astype(jnp.bfloat16) for k, w in PARAMS.items()} | {"bias": jnp.arange(4)}
    found = axes(lambda p, x: network(p | {"bias": PARAMS["bias"]}, x), PARAMS, X)
    assert gated(found, half, gates)["conv"].dtype == jnp.bfloat16
    assert gated(found, half, gates)["bias"].dtype == jnp.int32


def test_statistics_do_not_count():
    params = {"w": normal(3, 4), "norm": {"mean": normal(4), "var": jnp.ones(4)}, "v": normal(4, 2)}
    f = lambda p, x: (x @ p["w"] - p["norm"]["mean"][None]) / p["norm"]["var"][None] @ p["v"]
    found = axes(f, params, normal(2, 3))
    wanted = jnp.sqrt(jnp.square(params["w"]).sum(0) + jnp.square(params["v"]).sum(1))
    same(group_norms(found, params), {"w[1]": wanted})


def test_nan_is_refused_with_its_place():
    bad = PARAMS | {"bias": PARAMS["bias"].at[1].set(jnp.nan)}
    with pytest.raises(ValueError, match="bias: a weight to score must not be NaN"):
        group_norms(FOUND, bad)
    explode = lambda p, x, y: loss(p, x, y) / 0.0
    with pytest.raises(ValueError, match="a derivative of the loss is NaN or Inf"):
        group_taylor(FOUND, explode, PARAMS, [(X, Y)])
    with pytest.raises(ValueError, match="batches is empty"):
        group_fisher(FOUND, loss, PARAMS, [])
    with pytest.raises(ValueError, match="there is no group 'conv'; nearest: 'conv"):
        gated(FOUND, PARAMS, {"conv": jnp.ones(4)})
    with pytest.raises(ValueError, match="there is no group 'conv'; nearest: 'conv"):
        group_norms(FOUND, PARAMS, of=["conv"])


def counts(kept):
    return {name: int(stays.sum()) for name, stays in kept.items()}


def test_counts_of_a_choice_are_exact():
    rng = np.random.default_rng(0)
    scores = {"a": rng.random(10), "b": 100 * rng.random(7), "c": np.ones(3)}
    for sparsity in (0.0, 0.3, 0.5, 0.75, 1.0):
        layer = choose_groups(scores, sparsity)
        assert counts(layer) == {
            n: max(1, round((1 - sparsity) * s.size)) for n, s in scores.items()
        }
        whole = choose_groups(scores, sparsity, scope="global")
        assert sum(counts(whole).values()) == max(3, round((1 - sparsity) * 20))
        for name, s in scores.items():
            order = np.argsort(-s, kind="stable")
            for kept in (layer[name], whole[name]):
                assert set(np.flatnonzero(kept)) == set(order[: kept.sum()])
    assert counts(choose_groups(scores, 0.5, round_to=4)) == {"a": 8, "b": 4, "c": 3}
    assert counts(choose_groups(scores, 1.0, min_keep=2, scope="global")) == dict.fromkeys("abc", 2)


def test_global_scores_are_relative_to_their_group_and_to_costs():
    scores = {"a": np.array([1.0, 2.0, 3.0]), "b": np.array([100.0, 200.0, 301.0])}
    # relative: 0.5, 1, 1.5 and 0.499, 0.998, 1.503
    assert counts(choose_groups(scores, 1 / 6, scope="global")) == {"a": 3, "b": 2}
    assert counts(choose_groups(scores, 0.5, scope="global")) == {"a": 2, "b": 1}
    costs = {"b": 0.1}
    chosen = choose_groups(scores, 0.5, scope="global", channel_costs=costs)
    assert counts(chosen) == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scope": "local"}, 'scope must be "layer" or "global", got \'local\''),
        ({"sparsity": 1.5}, r"sparsity must be in \[0, 1\]"),
        ({"round_to": 0}, "round_to must be at least 1, got 0"),
        (
            {"channel_costs": {"a": 0.0}, "scope": "global"},
            "cost of a channel of 'a' must be positive",
        ),
        ({"scores": {"a": np.array([np.nan])}}, "group 'a' must be a vector without NaN"),
        ({"scores": {"a": np.ones((2, 2))}}, r"without NaN, got shape \(2, 2\)"),
    ],
)
def test_choices_that_cannot_be_made(settings, message):
    with pytest.raises(ValueError, match=message):
        choose_groups(**({"scores": {"a": np.ones(3)}, "sparsity": 0.5} | settings))


def macs(conv, dense):
    # per image, "SAME": 9 positions x 9 taps x 2 inputs; then 9 rows a channel
    return 6 * (9 * 9 * 2 * conv + 9 * conv * dense + 2 * dense)


def test_macs_are_those_of_the_small_network():
    assert group_macs(FOUND, {}) == macs(4, 5)
    assert group_macs(FOUND, {CONV: np.arange(4) < 3, DENSE: np.arange(5) < 2}) == macs(3, 2)
    assert channel_macs(FOUND) == {CONV: macs(4, 5) - macs(3, 5), DENSE: macs(4, 5) - macs(4, 4)}
    assert channel_macs(FOUND, of=[DENSE]) == {DENSE: macs(4, 5) - macs(4, 4)}
    with pytest.raises(ValueError, match="there is no group 'conv'; nearest: 'conv"):
        channel_macs(FOUND, of=["conv"])


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_share_of_macs_is_met_with_as_many_channels_as_can_be(scope):
    scores = {CONV: np.array([4.0, 3.0, 2.0, 1.0]), DENSE: np.array([5.0, 4.0, 3.0, 2.0, 1.0])}
    for share in (1.0, 0.7, 0.5, 0.3):
        kept = groups_for_macs(FOUND, scores, share, scope=scope)
        assert group_macs(FOUND, kept) <= share * macs(4, 5)
        choices = [choose_groups(scores, removed / 9, scope=scope) for removed in range(10)]
        fits = [c for c in choices if group_macs(FOUND, c) <= share * macs(4, 5)]
        assert counts(kept) == counts(fits[0])
    only = groups_for_macs(FOUND, {DENSE: scores[DENSE]}, 0.9, scope=scope)
    assert only.keys() == {DENSE}


def test_a_share_of_macs_that_cannot_be_met():
    scores = {CONV: np.ones(4), DENSE: np.ones(5)}
    least = macs(1, 1) / macs(4, 5)
    with pytest.raises(ValueError, match=f"0.010 of the MACs cannot be reached: {least:.3f} are"):
        groups_for_macs(FOUND, scores, 0.01)
    with pytest.raises(ValueError, match=r"share of the MACs must be in \(0, 1\], got 0"):
        groups_for_macs(FOUND, scores, 0)
    with pytest.raises(ValueError, match="there is no group 'conv'; nearest: 'conv"):
        groups_for_macs(FOUND, {"conv": np.ones(4)}, 0.5)
