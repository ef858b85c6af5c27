"""APoZ, on and off, HRank, filter norms, FPGM, AFIE, slimming: theorems and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxcompress as jc
from jaxcompress.graph import compat
from jaxcompress.prune.channels import activity
from jaxcompress.prune.channels.activity import apoz, hrank, map_ranks, on_off_entropy
from jaxcompress.prune.channels.filters import (
    afie,
    filter_norms,
    fpgm,
    slimming,
    slimming_masks,
    slimming_penalty,
)

pytestmark = pytest.mark.broad

RNG = np.random.default_rng(0)


def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(RNG.normal(size=shape), dtype)


def conv(x, w):
    return lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def hidden(params, x):
    a = jax.nn.relu(conv(x, params["one"]) - 1.0)
    return a, jax.nn.relu(conv(a, params["two"])).mean((1, 2))


def net(params, x):
    return hidden(params, x)[1] @ params["head"]


PARAMS = {"one": normal(3, 3, 2, 5), "two": normal(1, 1, 5, 4), "head": normal(4, 3)}
X = normal(24, 6, 5, 2)
DATA = [(X[:12],), (X[12:],)]


def test_apoz_is_the_share_of_zeros_over_images_and_positions():
    got = apoz(net, PARAMS, iter(DATA))
    a, b = (np.asarray(x) for x in hidden(PARAMS, X))
    assert list(got) == ["one", "two", "head"]
    np.testing.assert_array_equal(got["one"], [1.0, 1.0])  # the data has no zeros
    np.testing.assert_allclose(1 - got["two"], (a == 0).mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(1 - got["head"], (b == 0).mean(0), atol=1e-6)
    assert 0.2 < float(got["two"].mean()) < 0.8


def test_on_off_entropy_is_that_of_the_share_above_zero():
    got = on_off_entropy(net, PARAMS, DATA, sites="two")["two"]
    before = np.asarray(conv(X, PARAMS["one"]) - 1.0)  # P(pre-activation > 0)
    q = (before > 0).mean((0, 1, 2))
    np.testing.assert_allclose(got, -q * np.log(q) - (1 - q) * np.log(1 - q), rtol=1e-5)
    # always on, always off, on for one in fifty
    relu = lambda p, x: jax.nn.relu(x) @ p["w"]
    x = np.stack([np.full(50, 2.0), np.full(50, -2.0), np.r_[1.0, np.full(49, -1.0)]], 1)
    got = on_off_entropy(relu, {"w": jnp.ones((3, 1))}, [(jnp.asarray(x, jnp.float32),)])["w"]
    np.testing.assert_allclose(got, [0, 0, 0.0980391], rtol=1e-6)
    assert not np.signbit(got).any()


def test_tallies_of_shards_add_up():
    tap = jc.graph.trace(net, PARAMS, X).taps[1]
    a, _ = hidden(PARAMS, X)
    empty = activity.empty_tally(tap)
    whole = activity.count_nonzero(tap, a, empty)
    count = lambda x: lax.psum(activity.count_nonzero(tap, x, empty), "d")
    sharded = jax.vmap(count, axis_name="d")(a.reshape(4, 6, *a.shape[1:]))
    for got, want in zip(sharded, whole, strict=True):
        np.testing.assert_array_equal(got[2], want)


def test_ranks_of_known_maps():
    h, w = 7, 5
    outer = np.outer(RNG.normal(size=h), RNG.normal(size=w))
    two = outer + np.outer(RNG.normal(size=h), RNG.normal(size=w))
    x = np.stack([np.zeros((h, w)), np.full((h, w), 3.7), outer, two, RNG.normal(size=(h, w))], -1)
    x = np.stack([x, 1e-20 * x, 1e20 * x])
    want = [0, 1, 1, 2, 5]  # at most min(h, w), whatever the scale
    np.testing.assert_array_equal(map_ranks(jnp.asarray(x, jnp.float32)), [want] * 3)
    # Rounding to bfloat16 fills the rank up; the tolerance is that of the dtype.
    low = jnp.asarray(x[0, None, ..., :4], jnp.bfloat16)
    np.testing.assert_array_equal(map_ranks(low), [want[:4]])
    assert map_ranks(low.astype(jnp.float32))[0, 2] > 1
    noisy = x[0, None, ..., 2:3] + 1e-3 * RNG.normal(size=(1, h, w, 1))
    assert map_ranks(jnp.asarray(noisy, jnp.float32), 0.1).item() == 1
    for shape in ((0, 3, 3, 2), (2, 0, 3, 1)):
        np.testing.assert_array_equal(map_ranks(jnp.zeros(shape)), np.zeros((shape[0], shape[3])))


def test_hrank_is_the_mean_rank_of_the_maps_that_enter_a_convolution():
    got = hrank(net, PARAMS, DATA)
    assert list(got) == ["one", "two"]  # a dense layer has no maps
    for name, x in zip(got, (X, hidden(PARAMS, X)[0]), strict=True):
        want = np.linalg.matrix_rank(np.moveaxis(np.asarray(x), -1, 1)).mean(0)
        np.testing.assert_allclose(got[name], want, rtol=1e-6)
        assert (np.asarray(got[name]) <= 5).all()
    assert float(got["two"].min()) < 5  # ReLU leaves rows of zeros
    np.testing.assert_array_equal(hrank(net, PARAMS, DATA, tol=1.0, sites="two")["two"], [0.0] * 5)


def test_channels_of_a_branch_that_is_never_taken_are_nan():
    def apply(params, x):
        return lax.cond(x.sum() > 1e9, lambda: x @ params["a"], lambda: x @ params["b"])

    got = apoz(apply, {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 3))}, [(jnp.eye(2),)])
    assert np.isnan(got["a"]).all()
    np.testing.assert_array_equal(got["b"], [0.5, 0.5])


@pytest.mark.parametrize("axis", [0, 2, -1])
@pytest.mark.parametrize("order", [1, 2, 3.5, np.inf])
def test_filter_norms(axis, order):
    w = RNG.normal(size=(4, 3, 6))
    rows = np.moveaxis(w, axis, 0).reshape(w.shape[axis], -1)
    want = np.linalg.norm(rows, ord=order, axis=1)
    w = jnp.asarray(w, jnp.float32)
    np.testing.assert_allclose(filter_norms(w, axis, order=order), want, rtol=1e-5)
    if order > 1:  # no power overflows or vanishes
        for scale in (1e-30, 1e30):
            got = filter_norms(w * scale, axis, order=order) / scale
            np.testing.assert_allclose(got, want, rtol=1e-5)


def test_fpgm_against_all_pairs():
    w = RNG.normal(size=(3, 2, 8))
    f = np.moveaxis(w, -1, 0).reshape(8, -1)
    pairs = [[np.linalg.norm(a - b) for b in f] for a in f]
    np.testing.assert_allclose(fpgm(jnp.asarray(w, jnp.float32)), np.sum(pairs, 1), rtol=1e-5)
    # The filter nearest to the geometric median goes first, not the smallest one.
    line = jnp.array([[-1.0, 10.0, 11.0, 12.5, 14.0]])
    assert int(jnp.argmin(fpgm(line))) == 2 and int(jnp.argmin(filter_norms(line))) == 0


def test_fpgm_duplicates_and_translations():
    w = normal(5, 4, 7)
    w = w.at[..., 6].set(w[..., 1])
    s = fpgm(w)
    assert s[6] == s[1] and len(set(np.asarray(s).tolist())) == 6
    moved = w + normal(5, 4)[..., None]  # one filter added to all
    np.testing.assert_allclose(fpgm(moved), s, rtol=1e-5)
    assert np.abs(np.asarray(filter_norms(moved) - filter_norms(w))).max() > 1
    np.testing.assert_array_equal(np.argsort(fpgm(w + 100.0)), np.argsort(s))
    np.testing.assert_array_equal(fpgm(jnp.ones((9, 4))), np.zeros(4))


def sizes(jaxpr):
    for eqn in jaxpr.eqns:
        yield from (int(np.prod(v.aval.shape)) for v in eqn.outvars)
        for inner in compat.bodies(eqn.params):
            yield from sizes(inner.jaxpr)


def test_fpgm_holds_no_array_of_all_pairs():
    n, d = 64, 48
    closed = jax.make_jaxpr(fpgm)(jax.ShapeDtypeStruct((d, n), jnp.float32))
    text = str(closed)
    assert "scan" in text and f"f32[{n},{d}]" in text
    assert f"{n},{n}" not in text and max(sizes(closed.jaxpr)) <= n * d


def test_odd_weights():
    for score in (filter_norms, fpgm):
        assert score(jnp.zeros((0, 4))).tolist() == [0.0] * 4
        assert score(jnp.zeros((4, 0))).shape == (0,)
        assert score(jnp.arange(6, dtype=jnp.int32).reshape(2, 3)).dtype == jnp.float32
        low = normal(6, 4, dtype=jnp.bfloat16)
        wide = score(low.astype(jnp.float32))
        np.testing.assert_array_equal(score(low), wide)
        np.testing.assert_allclose(jax.jit(jax.vmap(score))(low[None])[0], wide, rtol=1e-6)


def test_afie():
    # Equal singular values: log(p) / outputs. It sees neither scale nor rotation.
    q, _ = np.linalg.qr(RNG.normal(size=(6, 6)))
    np.testing.assert_allclose(afie(jnp.asarray(q[:4], jnp.float32)), np.log(4) / 6, rtol=1e-4)
    w = RNG.normal(size=(3, 3, 6, 9))
    s = np.linalg.svd(w.mean((0, 1)), compute_uv=False)
    e = np.exp((s - s.min()) / (s.max() - s.min()))
    want = -np.sum(e / e.sum() * np.log(e / e.sum())) / 9
    for x in (w, 1e-3 * w, np.einsum("hwio,ij->hwjo", w, q)):
        np.testing.assert_allclose(afie(jnp.asarray(x, jnp.float32)), want, rtol=1e-5)
    np.testing.assert_allclose(afie(jnp.ones((1, 5))), 0.0, atol=1e-7)
    # Within 0.124 of the logarithm of the width, whatever the weights.
    for k in range(2, 30, 8):
        diagonal = np.diag(np.r_[np.ones(k), np.zeros(30 - k)])
        h = 30 * float(afie(jnp.asarray(diagonal, jnp.float32)))
        assert np.log(30) - 0.124 < h <= np.log(30) + 1e-5


NORMS = {
    "a": {"scale": jnp.array([0.9, -0.1, 0.3, 0.0]), "bias": jnp.full(4, 7.0)},
    "b": {"scale": jnp.array([-2.0, 0.2, 0.25], jnp.bfloat16), "kernel": jnp.ones((3, 3))},
}


def test_slimming_keeps_the_largest_scales_of_all_layers():
    scores = slimming(NORMS, ".*/scale")
    assert list(scores) == ["a/scale", "b/scale"]
    np.testing.assert_array_equal(scores["a/scale"], np.array([0.9, 0.1, 0.3, 0.0], np.float32))
    everything = np.concatenate([np.asarray(s) for s in scores.values()])
    for prune in range(6):
        masks = slimming_masks(NORMS, ".*/scale", sparsity=prune / 7)
        kept = np.concatenate([np.asarray(m) for m in masks.values()])
        want = np.isin(np.arange(7), np.argsort(-everything, kind="stable")[: 7 - prune])
        np.testing.assert_array_equal(kept, want)


def test_slimming_empties_no_layer():
    small = {"a": NORMS["a"], "b": {"scale": jnp.array([1e-3, 2e-3, 3e-3])}}
    masks = slimming_masks(small, ".*/scale", sparsity=5 / 7)
    assert [m.tolist() for m in masks.values()] == [[True] + [False] * 3, [False, False, True]]
    masks = slimming_masks(small, ".*/scale", sparsity=5 / 7, at_least=0)
    assert [int(m.sum()) for m in masks.values()] == [2, 0]
    traced = jax.jit(lambda s: slimming_masks(small, ".*/scale", sparsity=s))
    for sparsity in (0.0, 4 / 7, 1.0):
        total = sum(int(m.sum()) for m in traced(jnp.float32(sparsity)).values())
        assert total == max(round(7 * (1 - sparsity)), 2)


def test_slimming_penalty_and_its_subgradient():
    params = {"a": NORMS["a"]}
    value, grads = jax.value_and_grad(slimming_penalty)(params, "a/scale", strength=0.5)
    np.testing.assert_allclose(value, 0.5 * 1.3, rtol=1e-6)
    np.testing.assert_allclose(grads["a"]["scale"], [0.5, -0.5, 0.5, 0.0])
    np.testing.assert_array_equal(grads["a"]["bias"], np.zeros(4))


BAD = jnp.ones((2, 3)).at[1, 1].set(jnp.nan)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: apoz(net, PARAMS, [(X.at[0, 0, 0, 0].set(jnp.nan),)]), "enters 'one' holds NaN"),
        (
            lambda: hrank(net, PARAMS, [(X.at[0, 0, 0, 0].set(jnp.inf),)], sites="one"),
            "enters 'one' holds NaN or Inf",
        ),
        (lambda: hrank(net, PARAMS, DATA, tol=-1.0), "tol must not be negative"),
        (lambda: hrank(net, PARAMS, DATA, sites="head"), "sites: rule 'head' matches"),
        (lambda: hrank(lambda p, x: x @ p, jnp.ones((2, 2)), [(X,)]), "no convolution over two"),
        (lambda: on_off_entropy(net, PARAMS, []), "data is empty"),
        (lambda: filter_norms(BAD, 0), "must not be NaN"),
        (lambda: filter_norms(jnp.ones(3), 1), r"axis 1 is none of an array of shape \(3,\)"),
        (lambda: filter_norms(jnp.ones(3), order=0), "order must be positive, got 0"),
        (lambda: fpgm(BAD), "must not be NaN"),
        (lambda: fpgm(jnp.float32(1.0)), "axis -1 is none of"),
        (lambda: afie(jnp.ones(3)), r"kernel \[\*space, in, out\], got shape \(3,\)"),
        (lambda: afie(BAD), "must not be NaN"),
        (lambda: slimming(NORMS, ".*gamma"), "matches no parameter"),
        (lambda: slimming({"a": {"scale": BAD}}, "a/scale"), "a/scale: weights must not be NaN"),
        (
            lambda: slimming({"a": {"scale": jnp.arange(3)}}, "a/scale"),
            "a/scale: a BatchNorm scale must be an array of floats",
        ),
        (
            lambda: slimming_masks(NORMS, ".*/scale", sparsity=0.9),
            "leaves 1 of 7 channels, but at_least=1 keeps 2; the highest sparsity is 0.7143",
        ),
        (
            lambda: slimming_masks(NORMS, ".*/scale", sparsity=0.5, at_least=-1),
            "at_least must not be negative, got -1",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
