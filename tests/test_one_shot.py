"""Wanda and SparseGPT: the theorems, an independent SparseGPT in float64, and what errors say."""

import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxcompress as jc
from jaxcompress import core, quantize
from jaxcompress.core.numerics.top_k import keep_count
from jaxcompress.formats import binary, integer
from jaxcompress.graph.layers.matrices import layers
from jaxcompress.graph.layers.statistics import capture
from jaxcompress.graph.layers.uses import merged
from jaxcompress.prune import magnitude
from jaxcompress.prune.from_calibration.sparsegpt import sparse_gpt
from jaxcompress.prune.from_calibration.wanda_masks import wanda
from jaxcompress.quantize import Spec, gptq

pytestmark = pytest.mark.broad

K, N = 24, 6
METHODS = pytest.mark.parametrize("method", [wanda, sparse_gpt], ids=lambda m: m.__name__)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def dense(params, x):
    return x @ params["w"]


def correlated(rows, k, *, seed=0):
    mix = np.eye(k) + 1.5 * np.asarray(draw(k, k, seed=seed + 1)) / np.sqrt(k)
    return jnp.asarray(np.asarray(draw(rows, k, seed=seed)) @ mix, jnp.float32)


def hadamard(k):
    # K orthogonal columns of equal norms, exact in float32.
    h = np.ones((1, 1))
    while len(h) < k:
        h = np.block([[h, h], [h, -h]])
    return jnp.asarray(h[:, :k], jnp.float32)


def prune(method, w, x, share, **how):
    params, state = method(dense, {"w": w}, [(x,)], share, **how)
    mask = np.asarray(state.buffers.masks["w"])
    assert not np.asarray(params["w"])[~mask].any()
    return np.asarray(params["w"]), mask


def losses(w, view, x):
    x, delta = np.asarray(x, np.float64), np.asarray(view, np.float64) - np.asarray(w, np.float64)
    return ((x @ delta) ** 2).sum(0)


def largest(scores, keep):
    mask = np.zeros(scores.size, bool)
    mask[np.argsort(-scores.reshape(-1), kind="stable")[:keep]] = True
    return mask.reshape(scores.shape)


def per_output(scores, keep):
    return np.stack([largest(column, keep) for column in scores.T], 1)


def per_block(scores, share, block):
    parts = np.split(scores, range(block, len(scores), block))
    return np.concatenate([largest(part, keep_count(part.size, share)) for part in parts])


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_wanda_keeps_the_largest_products_with_the_norms_of_every_output(share):
    w, x = draw(K, N), correlated(32, K)
    norms = np.linalg.norm(np.asarray(x, np.float64), axis=0)
    pruned, mask = prune(wanda, w, x, share)
    keep = round((1 - share) * K)
    np.testing.assert_array_equal(mask, per_output(np.abs(w) * norms[:, None], keep))
    np.testing.assert_array_equal(pruned, np.where(mask, w, 0))
    assert (mask.sum(0) == keep).all()


def test_wanda_of_equal_norms_is_magnitude_of_every_output_and_scales_of_inputs_do_not_matter():
    w, x = draw(K, N), hadamard(K)
    _, mask = prune(wanda, w, x, 0.5)
    np.testing.assert_array_equal(mask, per_output(np.abs(np.asarray(w)), K // 2))
    scale = np.exp(np.asarray(draw(K, seed=3)))
    for share in (0.5, (2, 4)):
        _, plain = prune(wanda, w, x, share)
        _, moved = prune(wanda, w / scale[:, None], x * scale[None], share)
        np.testing.assert_array_equal(plain, moved)


def test_wanda_is_the_best_mask_per_output_where_inputs_are_orthogonal():
    w, x = draw(6, 4), jnp.diag(jnp.asarray(np.exp(draw(6, seed=1))))
    pruned, mask = prune(wanda, w, x, 0.5)
    every = [np.isin(np.arange(6), kept)[:, None] for kept in itertools.combinations(range(6), 3)]
    best = np.min([losses(w, np.where(kept, w, 0), x) for kept in every], axis=0)
    np.testing.assert_allclose(losses(w, pruned, x), best, rtol=1e-6)


@METHODS
def test_n_of_m_inputs_stay_of_every_output(method):
    w, x = draw(22, N), correlated(32, 22)
    _, mask = prune(method, w, x, (2, 4))
    assert (mask[:20].reshape(5, 4, N).sum(1) == 2).all()
    assert (mask[20:].sum(0) == 1).all()  # of the two left, ceil(2 * 2 / 4)
    if method is wanda:
        scores = np.abs(w) * np.linalg.norm(np.asarray(x, np.float64), axis=0)[:, None]
        parts = [per_output(scores[i : i + 4], min(2, (22 - i) // 2)) for i in range(0, 22, 4)]
        np.testing.assert_array_equal(mask, np.concatenate(parts))


@pytest.mark.parametrize("share", [0.5, 0.75, (2, 4)], ids=str)
def test_sparse_gpt_of_orthogonal_inputs_is_magnitude_of_every_block_and_changes_nothing(share):
    w, x = draw(K, N), hadamard(K)
    pruned, mask = prune(sparse_gpt, w, x, share, block=10)
    sizes = np.abs(np.asarray(w))
    if share == (2, 4):
        want = np.concatenate([per_output(sizes[i : i + 4], 2) for i in range(0, K, 4)])
    else:
        want = per_block(sizes, share, 10)
    np.testing.assert_array_equal(mask, want)
    np.testing.assert_array_equal(pruned, np.where(want, w, 0))


def by_inverse(w, x, share, *, block, damping=0.01):
    """SparseGPT in float64, by downdates of the inverse: no Cholesky factor."""
    w, x = np.asarray(w, np.float64).copy(), np.asarray(x, np.float64)
    h = x.T @ x / len(x)
    h += damping * np.mean(np.diag(h)) * np.eye(len(h))
    mask = np.zeros(w.shape, bool)
    inverse = np.linalg.inv(h)
    for i in range(len(w)):
        if i % block == 0:
            # 1 / [(H_FF)^-1]_ii of the inputs that are reached one by one
            rest = [np.linalg.inv(h[j:, j:])[0, 0] for j in range(i, min(i + block, len(w)))]
            scores = w[i : i + block] ** 2 / np.array(rest)[:, None]
            nm = isinstance(share, tuple)
            keep = share[0] if nm else round((1 - share) * scores.size)
            mask[i : i + block] = (per_output if nm else largest)(scores, keep)
        q = np.where(mask[i], w[i], 0)
        w -= np.outer(inverse[:, i] / inverse[i, i], w[i] - q)
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        w[i] = q
        inverse[i], inverse[:, i] = 0.0, 0.0
    return w, mask


@pytest.mark.parametrize("share, block", [(0.5, 10), (0.75, 10), ((2, 4), 4)], ids=str)
def test_sparse_gpt_is_the_sequence_of_optimal_updates(share, block):
    w, x = draw(K, N), correlated(32, K)
    want, chosen = by_inverse(w, x, share, block=block)
    got, mask = prune(sparse_gpt, w, x, share, block=10)
    np.testing.assert_array_equal(mask, chosen)
    masked = losses(w, np.where(mask, w, 0), x)
    better = losses(w, want, x) < masked  # else the weights stay
    assert better.sum() >= 3
    np.testing.assert_allclose(got[:, better], want[:, better], atol=2e-5)
    np.testing.assert_array_equal(got[:, ~better], np.where(mask, w, 0)[:, ~better])


def least_squares(w, mask, x):
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    best = np.zeros_like(w)
    for j, kept in enumerate(mask.T):
        best[kept, j] = np.linalg.lstsq(x[:, kept], x @ w[:, j], rcond=None)[0]
    return best


def test_least_squares_on_the_mask_is_a_lower_bound_that_sweeps_reach():
    w, x = draw(K, N), correlated(32, K)
    found = {n: prune(sparse_gpt, w, x, 0.5, block=10, sweeps=n) for n in (0, 300)}
    mask = found[0][1]
    best = losses(w, least_squares(w, mask, x), x)
    mine = {n: losses(w, pruned, x) for n, (pruned, _) in found.items()}
    masked = losses(w, np.where(mask, w, 0), x)
    for n, (_, same) in found.items():
        np.testing.assert_array_equal(same, mask)
        assert (best <= mine[n] * (1 + 1e-5)).all() and (mine[n] <= masked * (1 + 1e-5)).all()
    assert mine[0].sum() < 0.7 * masked.sum()
    assert (mine[300] <= mine[0] * (1 + 1e-5)).all()
    np.testing.assert_allclose(mine[300], best, rtol=1e-2)


@pytest.mark.parametrize("share", [0.31, 0.5, 0.99, 1.0])
def test_sparse_gpt_keeps_exactly_the_share_of_a_leaf_and_of_its_blocks(share):
    w, x = draw(K, N), correlated(32, K)
    _, mask = prune(sparse_gpt, w, x, share, block=10)
    assert mask.sum() == keep_count(K * N, share)
    for part in np.split(mask, [10, 20]):
        assert abs(part.sum() - (1 - share) * part.size) < 1.01


@METHODS
def test_what_masks_hide_stays_hidden_and_inputs_that_never_come_go_first(method):
    w = draw(K, N)
    _, first = prune(method, w, correlated(32, K), 0.5)
    given = {"w": jnp.asarray(first)}
    _, second = prune(method, w, correlated(32, K, seed=7), 0.75, masks=given)
    assert second.sum() == K * N // 4 and not (second & ~first).any()
    x = correlated(32, K).at[:, jnp.array([3, 9])].set(0.0)
    pruned, mask = prune(method, w, x, 2 / K)
    np.testing.assert_array_equal(~mask.any(1), np.isin(np.arange(K), [3, 9]))
    np.testing.assert_allclose(pruned, np.where(mask, w, 0), atol=1e-6)


def test_sparse_gpt_says_when_the_factorization_fails():
    w, few = draw(K, N), correlated(32, K).at[5:].set(0.0)
    with pytest.warns(UserWarning, match="w: X.T X is not positive definite with damping 0; "):
        with pytest.raises(ValueError, match="w: X.T X has no Cholesky factor at any damping"):
            prune(sparse_gpt, w, few, 0.5, damping=0.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pruned, mask = prune(sparse_gpt, w, few, 0.5, damping=1e-9)
    assert np.isfinite(pruned).all() and mask.sum() == K * N // 2
    assert "with damping 1e-09; trying ten times as much" in str(caught[0].message)


def network(params, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    for name, groups in (("stem", 1), ("depthwise", 6)):
        w = params[name]
        x = jax.nn.relu(
            lax.conv_general_dilated(
                x, w, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups
            )
        )
    return x.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"][None]


def test_all_layers_of_a_network():
    kernels = {"stem": draw(3, 3, 4, 6), "depthwise": draw(3, 3, 1, 6, seed=1)}
    params = {**kernels, "head": {"kernel": draw(6, 4, seed=8), "bias": draw(4, seed=9)}}
    data = [(draw(6, 5, 5, 4, seed=seed),) for seed in (20, 21)]
    shares = {"depthwise": 0.5, "stem": (2, 4)}
    pruned, state = sparse_gpt(network, params, data, shares)
    masks = state.buffers.masks
    assert jax.tree.structure(masks) == jax.tree.structure(params)
    assert all(mask.ndim == 0 and bool(mask) for mask in jax.tree.leaves(masks["head"]))
    # channels are the consecutive inputs of a convolution
    assert (np.asarray(masks["stem"]).reshape(9, 4, 6).sum(1) == 2).all()
    assert int(masks["depthwise"].sum()) == 27
    # what comes back is what its compressor applies and packs
    comp = magnitude(0.5)
    packed = comp.pack(pruned, state)
    jax.tree.map(np.testing.assert_array_equal, pruned, comp.apply(pruned, state))
    jax.tree.map(np.testing.assert_array_equal, pruned, core.unpack(packed))
    assert core.packed_bytes(packed) < core.packed_bytes(params)
    _, state = wanda(network, params, data, {"depthwise": 0.5})
    assert (np.asarray(state.buffers.masks["depthwise"]).reshape(9, 6).sum(0) == 4).all()


def test_trips_of_a_scan_are_layers_of_their_own():
    w, x = draw(3, 8, 8, seed=5), draw(20, 8)
    stacked = lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p)[0]
    together, _ = sparse_gpt(stacked, w, [(x,)], 0.5)
    for kernel, pruned in zip(w, together, strict=True):
        assert (pruned != 0).sum() == 32
        np.testing.assert_allclose(pruned, prune(sparse_gpt, kernel, x, 0.5)[0], atol=1e-5)
        x = jnp.tanh(x @ kernel)


def test_pruned_inputs_are_those_of_the_layers_before_pruned():
    fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
    params, data = {"a": draw(8, 8), "b": draw(8, 8, seed=1)}, [(draw(20, 8),)]
    seen = []
    track = lambda items: seen.append(len(items)) or items
    got, state = sparse_gpt(fn, params, data, 0.5, inputs="pruned", progress=track)
    assert seen == [2]
    first, _ = sparse_gpt(fn, params, data, {"a": 0.5})
    second, after = sparse_gpt(fn, first, data, {"b": 0.5})
    np.testing.assert_array_equal(got["a"], first["a"])
    np.testing.assert_allclose(got["b"], second["b"], atol=1e-6)
    np.testing.assert_array_equal(state.buffers.masks["b"], after.buffers.masks["b"])
    together, _ = sparse_gpt(fn, params, data, {"a": 0.5, "b": 0.5})
    np.testing.assert_array_equal(together["a"], got["a"])
    assert np.abs(together["b"] - got["b"]).max() > 1e-3
    one_by_one, _ = sparse_gpt(fn, params, data, 0.5, layer_at_a_time=True)
    np.testing.assert_allclose(together["b"], one_by_one["b"], atol=1e-6)


@METHODS
def test_uses_of_one_weight_count_together(method):
    w, a, b = draw(K, N), correlated(16, K), 3 * correlated(16, K, seed=5)
    twice = lambda p, a, b: (a @ p["w"], b @ p["w"])
    got, state = method(twice, {"w": w}, [(a, b)], 0.5)
    want, mask = prune(method, w, jnp.concatenate([a, b]), 0.5)
    np.testing.assert_array_equal(state.buffers.masks["w"], mask)
    np.testing.assert_allclose(got["w"], want, atol=1e-4)
    tied = lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T
    with pytest.warns(UserWarning, match="left dense, .*: w .'w', 'w#1' sum over different axes"):
        x = jnp.concatenate([a, b])
        got, _ = method(tied, {"w": w}, [(x,)], 0.5)
    np.testing.assert_array_equal(got["w"], w)


def test_merged_moments_are_those_of_all_rows():
    w, a, b = {"w": draw(K, N)}, correlated(32, K), 2 + 3 * correlated(32, K, seed=5)
    found = layers(dense, w, a).layers
    both = merged([capture(dense, w, [(x,)], layers=found)["w"] for x in (a, b)])
    x = np.concatenate([a, b]).astype(np.float64)
    assert both.count[0] == 64
    np.testing.assert_allclose(both.variance[0, 0], x.var(0), rtol=1e-5)
    np.testing.assert_allclose(both.mean[0, 0], x.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(both.largest[0, 0], np.abs(x).max(0))
    np.testing.assert_allclose(both.hessian[0, 0], x.T @ x / 64, rtol=1e-4, atol=1e-4)


def test_quantized_on_the_way():
    w, x = draw(K, N), correlated(32, K)
    spec = {"w": Spec(integer(4), group=10)}
    alone, scales = gptq(dense, {"w": w}, [(x,)], spec)
    same, state = sparse_gpt(dense, {"w": w}, [(x,)], 0.0, quantize=spec, block=32)
    np.testing.assert_array_equal(alone["w"], same["w"])
    jax.tree.map(np.testing.assert_array_equal, scales.buffers, state.buffers[0])
    got, state = sparse_gpt(dense, {"w": w}, [(x,)], 0.5, quantize=spec, block=10)
    comp = jc.chain(quantize.recipe(spec), magnitude(0.5))
    view = comp.apply(got, state)["w"]
    np.testing.assert_array_equal(view, got["w"])
    np.testing.assert_array_equal(core.unpack(comp.pack(got, state))["w"], view)
    mask = jc.prune.masks(state, got)["w"]
    assert int(mask.sum()) == K * N // 2 and not np.asarray(view)[~np.asarray(mask)].any()
    rounded = Spec(integer(4), group=10).weights()
    plain = jnp.where(mask, rounded.apply(w, rounded.init(w)), 0)
    assert losses(w, view, x).sum() < 0.85 * losses(w, plain, x).sum()
    # With that mask given, GPTQ makes the same of it: the choice is all that is new.
    given, _ = gptq(dense, {"w": w}, [(x,)], spec, masks={"w": mask})
    np.testing.assert_allclose(given["w"], view, atol=1e-6)


def test_layers_that_are_quantized_only_and_grids_without_zero():
    fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
    params, data = {"a": draw(8, 8), "b": draw(8, 8, seed=1)}, [(draw(20, 8),)]
    spec = {".": Spec(binary())}
    got, state = sparse_gpt(fn, params, data, {"b": 0.5}, quantize=spec)
    comp = jc.chain(quantize.recipe(spec), magnitude(0.5))
    jax.tree.map(np.testing.assert_array_equal, got, comp.apply(got, state))
    jax.tree.map(np.testing.assert_array_equal, got, core.unpack(comp.pack(got, state)))
    assert jc.prune.masks(state, got)["a"].ndim == 0 and (got["a"] != 0).all()
    assert int((got["b"] == 0).sum()) == 32


@METHODS
def test_half_precision_and_leaves_that_are_no_weights(method):
    fn = lambda p, x: (x @ p["w"].astype(jnp.float32)) @ p["none"] * p["step"].astype(jnp.float32)
    params = {
        "w": draw(K, N).astype(jnp.bfloat16),
        "none": jnp.zeros((N, 0)),
        "step": jnp.array(2),
        "key": jax.random.key(0),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got, state = method(fn, params, [(correlated(32, K),)], 0.5)
    assert got["w"].dtype == jnp.bfloat16 and int(state.buffers.masks["w"].sum()) == K * N // 2
    assert got["step"] == 2 and got["none"].shape == (N, 0) and got["key"] == params["key"]
    assert all(state.buffers.masks[name].ndim == 0 for name in ("none", "step", "key"))


@METHODS
def test_errors_name_what_is_wrong(method):
    w, x = draw(K, N), correlated(32, K)
    fails = lambda kind, match: pytest.raises(kind, match=match)
    with fails(ValueError, r"sparsity must be a share of zeros in \[0, 1\], got 1.5"):
        prune(method, w, x, 1.5)
    with fails(TypeError, r"sparsity of 'w' must be a share .*, or \(n, m\) to keep n of m"):
        prune(method, w, x, {"w": "half"})
    with fails(ValueError, r"sparsity: \(n, m\) needs whole numbers 0 < n <= m, got \(5, 4\)"):
        prune(method, w, x, (5, 4))
    with fails(ValueError, "rule 'kernel' matches no parameter; nearest: 'w'"):
        prune(method, w, x, {"kernel": 0.5})
    biased = lambda p, x: x @ p["w"] + p["b"][None]
    with fails(ValueError, "sparsity: its rules take the weight of no layer; layers: .'w'"):
        method(biased, {"w": w, "b": draw(N)}, [(x,)], {"b": 0.5})
    with pytest.warns(UserWarning, match="left dense, since no contraction takes them .*: b"):
        method(biased, {"w": w, "b": draw(N)}, [(x,)], {".*": 0.5})
    with fails(ValueError, "data is empty"):
        method(dense, {"w": w}, [], 0.5)
    with fails(TypeError, "data must hold tuples of inputs"):
        method(dense, {"w": w}, [x], 0.5)
    with fails(ValueError, "w: a weight to prune must not be NaN or Inf"):
        prune(method, w.at[3, 2].set(jnp.nan), x, 0.5)
    with fails(ValueError, "data: what enters 'w' holds NaN or Inf"):
        prune(method, w, x.at[3, 2].set(jnp.inf), 0.5)
    with fails(ValueError, "inputs must be 'dense' or 'pruned', got 'float'"):
        prune(method, w, x, 0.5, inputs="float")
    with fails(ValueError, "masks must have the structure of params"):
        prune(method, w, x, 0.5, masks=jnp.ones((K, N), bool))
    with fails(ValueError, r"w: a mask must be bool of shape \(\) or \(24, 6\), got bool \(6,\)"):
        prune(method, w, x, 0.5, masks={"w": jnp.ones(N, bool)})


def test_errors_of_sparse_gpt_alone():
    w, x = draw(K, N), correlated(32, K)
    with pytest.raises(ValueError, match="block must be at least 1, got 0"):
        prune(sparse_gpt, w, x, 0.5, block=0)
    with pytest.raises(TypeError, match="quantize: 'w' must be a quantize.Spec, got Integer"):
        prune(sparse_gpt, w, x, 0.5, quantize={"w": integer(4)})
    with pytest.raises(ValueError, match="rule 'v' matches no parameter; nearest: 'w'"):
        prune(sparse_gpt, w, x, 0.5, quantize={"v": Spec(integer(4))})
