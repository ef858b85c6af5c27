"""Scores from a loss against closed forms in float64: SNIP, GraSP, SynFlow, Fisher, OBD, OBS."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _trees import avals, bits_equal, small_tree
from jax import lax

from jaxcompress.core.numerics.top_k import keep_count, top_k_mask, top_k_masks
from jaxcompress.prune import channel, masks_of_scores, scored
from jaxcompress.prune.saliency import exponents
from jaxcompress.prune.saliency.at_init import grasp, snip, synflow
from jaxcompress.prune.saliency.block_fisher import WoodFisher, compensate, woodfisher
from jaxcompress.prune.saliency.second_order import fisher_diagonal, obd, obs

pytestmark = pytest.mark.broad

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(12, 6)), RNG.normal(size=(12, 3))
W, B = RNG.normal(size=(6, 3)), RNG.normal(size=(3,))
PARAMS = {"bias": jnp.asarray(B, jnp.float32), "kernel": jnp.asarray(W, jnp.float32)}
BATCH = (jnp.asarray(X, jnp.float32), jnp.asarray(Y, jnp.float32))


def linear_loss(params, x, y):
    error = x @ params["kernel"] + params["bias"][None] - y
    return jnp.mean(jnp.sum(error**2, axis=1)) / 2


def example_gradients(w=W, b=B):
    """[N, in, out] and [N, out], float64."""
    error = X @ w + b - Y
    return X[:, :, None] * error[:, None], error


def close(got, want, rtol=2e-5):
    want = np.asarray(want)
    np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol * max(np.abs(want).max(), 1e-30))


# SNIP


def test_snip_is_the_derivative_by_a_gate():
    def loss(gates):  # float64
        hidden = np.tanh(X @ (gates[0] * W))
        return np.mean(np.sum((hidden - Y) ** 2, axis=1))

    step, slopes = 1e-5, np.zeros_like(W)
    for place in np.ndindex(W.shape):
        up, down = np.ones_like(W), np.ones_like(W)
        up[place] += step
        down[place] -= step
        slopes[place] = (loss([up]) - loss([down])) / (2 * step)
    fn = lambda p, x, y: jnp.mean(jnp.sum((jnp.tanh(x @ p["kernel"]) - y) ** 2, axis=1))
    scores = snip(fn, PARAMS, BATCH)
    close(scores["kernel"], np.abs(slopes) / np.abs(slopes).sum())
    assert not np.any(scores["bias"])  # it has no gradient here


def test_snip_is_the_share_of_w_times_g_over_all_leaves():
    kernels, biases = (g.mean(0) for g in example_gradients())
    whole = np.abs(W * kernels).sum() + np.abs(B * biases).sum()
    scores = snip(linear_loss, PARAMS, BATCH)
    close(scores["kernel"], np.abs(W * kernels) / whole)
    close(scores["bias"], np.abs(B * biases) / whole)
    jitted = jax.jit(lambda p, b: snip(linear_loss, p, b))(PARAMS, BATCH)
    close(jitted["kernel"], scores["kernel"], 1e-6)
    flat = snip(lambda p, x: jnp.sum(x), PARAMS, (BATCH[0],))
    assert not np.any(flat["kernel"])  # and no NaN


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_scores_have_the_structure_of_the_params(dtype):
    tree = {**small_tree(dtype), "function": 3}
    loss = lambda p, x: (
        x * sum(jnp.sum(w.astype(jnp.float32) ** 2) for w in jax.tree.leaves(p) if w.dtype == dtype)
    )
    scores = snip(loss, tree, (jnp.float32(2),))
    assert jax.tree.structure(scores) == jax.tree.structure(tree)
    for s, w in zip(jax.tree.leaves(scores), jax.tree.leaves(tree), strict=True):
        assert s.dtype == jnp.float32 and s.shape == jnp.shape(w)
    assert not np.any(scores["steps"]) and scores["function"] == 0
    squares = np.asarray(tree["dense"]["kernel"], np.float64) ** 2
    close(scores["dense"]["kernel"] / np.sum(scores["dense"]["kernel"]), squares / squares.sum())


# GraSP


def softmax_gradient(w, labels, temperature):
    logits = X @ w / temperature
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    return X.T @ (p - np.eye(3)[labels]) / (len(X) * temperature)


def test_grasp_is_w_times_the_hessian_times_the_gradient():
    labels = np.arange(12) % 3
    scores = {}
    for temperature in (200.0, 2.0):
        g = softmax_gradient(W, labels, temperature)
        step = 1e-3 / np.abs(g).max()
        slope = softmax_gradient(W + step * g, labels, temperature)
        slope -= softmax_gradient(W - step * g, labels, temperature)
        found = grasp(
            lambda p, x: x @ p["kernel"],
            PARAMS,
            (BATCH[0], jnp.asarray(labels)),
            temperature=temperature,
        )
        close(found["kernel"], W * slope / (2 * step), 1e-4)
        scores[temperature] = np.asarray(found["kernel"])
    default = grasp(lambda p, x: x @ p["kernel"], PARAMS, (BATCH[0], jnp.asarray(labels)))
    np.testing.assert_array_equal(default["kernel"], scores[200.0])


def test_grasp_first_removes_what_raises_the_gradient_most():
    # L = 1/2 mean |x w / T - y|^2: |g|^2 is quadratic in w, so half its slope is exact.
    fn, squares = lambda p, x: x @ p["kernel"], lambda z, y: jnp.mean(jnp.sum((z - y) ** 2, 1)) / 2
    scores = grasp(fn, PARAMS, BATCH, temperature=4.0, loss=squares)["kernel"]

    def flow(w):
        return np.sum((X.T @ (X @ w / 4 - Y) / (4 * len(X))) ** 2)

    for place in np.ndindex(W.shape):
        change = np.zeros_like(W)
        change[place] = 1e-4 * W[place]
        slope = (flow(W - change) - flow(W + change)) / 2e-4
        np.testing.assert_allclose(-2 * scores[place], slope, rtol=1e-3, atol=1e-6)


# SynFlow


def mlp(params, x):
    for name in sorted(params):
        x = jax.nn.relu(x @ params[name])
    return x


def layers(*sizes, seed=1):
    rng = np.random.default_rng(seed)
    return {f"w{i}": rng.normal(size=s) for i, s in enumerate(zip(sizes, sizes[1:], strict=False))}


def float32(tree):
    return jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), tree)


def flows(weights):
    """|w| dR/d|w| / R of a chain of matrices, float64."""
    sizes = [np.abs(w) for w in weights]
    before = [np.ones(len(sizes[0]))]
    for w in sizes:
        before.append(before[-1] @ w)
    after = [np.ones(sizes[-1].shape[1])]
    for w in reversed(sizes):
        after.insert(0, w @ after[0])
    total = before[-1].sum()
    return [b[:, None] * w * a / total for b, w, a in zip(before, sizes, after[1:], strict=False)]


def test_synflow_conserves_flow_and_keeps_what_a_loop_with_a_sort_keeps():
    weights, rounds, sparsity = layers(5, 8, 7, 4), 5, 0.8
    calls = []

    def counted(params, x):
        calls.append(1)
        return mlp(params, x)

    plain = synflow(counted, float32(weights), jnp.zeros((2, 5)), sparsity=0.0, rounds=rounds)
    plain = [np.asarray(plain[name], np.float64) for name in weights]
    for got, want in zip(plain, flows(list(weights.values())), strict=True):
        close(got, want)
        np.testing.assert_allclose(got.sum(), 1, rtol=1e-5)
    for incoming, outgoing in zip(plain, plain[1:], strict=False):
        np.testing.assert_allclose(incoming.sum(0), outgoing.sum(1), rtol=1e-5)

    scores = synflow(counted, float32(weights), jnp.zeros((2, 5)), sparsity=sparsity, rounds=rounds)
    assert len(calls) == 1  # traced once, whatever the sparsity and the number of rounds
    names, kept = list(weights), {name: np.ones(w.shape, bool) for name, w in weights.items()}
    size = sum(w.size for w in weights.values())
    for k in range(1, rounds + 1):
        found = flows([np.where(kept[n], weights[n], 0) for n in names])
        flat = np.concatenate([s.ravel() for s in found])
        best = np.argsort(-flat, kind="stable")[: round((1 - sparsity) ** (k / rounds) * size)]
        chosen = np.zeros(size, bool)
        chosen[best] = True
        for name in names:
            kept[name], chosen = (
                chosen[: kept[name].size].reshape(kept[name].shape),
                chosen[kept[name].size :],
            )
        count = sum(int(m.sum()) for m in kept.values())
        masks = top_k_masks(scores, count)
        for name in names:
            np.testing.assert_array_equal(masks[name], kept[name])
    assert count == keep_count(size, sparsity)
    assert all(m.any() for m in kept.values())  # rounds empty no layer


def test_synflow_of_a_deep_residual_network_does_not_overflow():
    rng, depth, width = np.random.default_rng(2), 3, 12
    first = rng.normal(size=(depth, width, width)) * 1e30
    second = rng.normal(size=(depth, width, width)) * 0.5
    params = float32({"a": list(first), "b": list(second)})

    def apply(params, x):
        for a, b in zip(params["a"], params["b"], strict=True):
            x = x + jax.nn.relu(x @ a) @ b
        return x

    scores = synflow(apply, params, jnp.ones((1, width)), sparsity=0.0, rounds=1)
    # the same in float64, where that is a number
    states, after = [np.ones(width)], [np.ones(width)]
    blocks = [(np.abs(a), np.abs(b)) for a, b in zip(first, second, strict=True)]
    for a, b in blocks:
        states.append(states[-1] + states[-1] @ a @ b)
    for a, b in reversed(blocks):
        after.insert(0, after[0] + a @ (b @ after[0]))
    total = states[-1].sum()
    assert 1e80 < total < 1e300  # no float32
    for i in range(depth):
        a, b = blocks[i]
        close(scores["a"][i], states[i][:, None] * a * (b @ after[i + 1]) / total, 2e-4)
        close(scores["b"][i], (states[i] @ a)[:, None] * b * after[i + 1] / total, 2e-4)


def test_synflow_takes_norms_by_absolute_values_and_leaves_vectors_dense():
    def apply(p, x, token):
        x = (x @ p["w"] - p["mean"][None]) / jnp.sqrt(p["var"] + 1e-5)[None]
        x = x * p["scale"][None] + p["bias"][None]
        return jax.nn.gelu(x) * p["table"][token][None]

    params = float32({**{"w": W}, "mean": np.zeros(3), "var": np.ones(3) * 2, "scale": -B})
    params |= float32({"bias": B, "table": RNG.normal(size=(4, 3))}) | {"count": jnp.arange(2)}
    scores = synflow(apply, params, jnp.zeros((1, 6)), 1, sparsity=0.4, rounds=3)
    loss = lambda p: jnp.sum(apply(p, jnp.ones((1, 6)), 1))
    sizes = {k: jnp.abs(v) for k, v in params.items() if k != "count"}
    total, slopes = jax.jit(jax.value_and_grad(loss))(sizes)
    for name in ("w", "table"):
        gone = np.asarray(scores[name]) < 0
        assert np.all(np.isin(scores[name][gone], [-1, -2, -3]))
    left = sum(int(np.sum(np.asarray(scores[name]) >= 0)) for name in ("w", "table"))
    assert left == keep_count(30, 0.4)
    assert not np.any(scores["count"]) and np.all(scores["bias"] >= 0)
    first = synflow(apply, params, jnp.zeros((1, 6)), 1, sparsity=0.0, rounds=3)
    for name in sizes:
        close(first[name], sizes[name] * slopes[name] / total, 1e-4)


def test_every_array_has_its_own_exponent():
    def fn(x, w, image):
        y = jnp.concatenate([x @ w, x @ w * 2], 1)
        y = jnp.sqrt(y * y) + jnp.square(y) / jnp.maximum(y, 0.5)
        y = jnp.where(y > 1, y, -y).reshape(2, -1, 1).transpose(1, 0, 2)
        y = jnp.pad(lax.cumsum(y, 0), ((0, 1), (0, 0), (0, 0)))
        conv = lax.conv(image, jnp.ones((2, 1, 2, 2)), (1, 1), "SAME")
        pool = lax.reduce_window(conv, 0.0, lax.add, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
        pool = pool + lax.reduce_window(conv, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "SAME")
        looped = lax.fori_loop(0, 3, lambda _, s: s + 1.0, jnp.float32(0))
        return y, pool**3 * lax.rsqrt(conv[..., ::2, ::2] + 1e-3) + jnp.tanh(pool) * looped

    rng = np.random.default_rng(3)
    parts = [jnp.asarray(np.abs(rng.normal(size=s)), jnp.float32) for s in ((2, 3), (3, 4))]
    parts.append(jnp.asarray(np.abs(rng.normal(size=(1, 1, 4, 4))), jnp.float32))
    closed = jax.make_jaxpr(fn)(*parts)
    found = jax.jit(lambda *a: exponents.evaluate(closed, a))(*parts)
    for got, want in zip(found, jax.jit(fn)(*parts), strict=True):
        close(np.ldexp(np.asarray(got.value, np.float64), int(got.exponent)), want)
        assert 1 <= float(jnp.max(jnp.abs(got.value))) < 2
    # beyond float32, with gradients
    power = jax.make_jaxpr(lambda x: (x**6 + 2.0) / 3.0 - x)(jnp.float32(1))

    def log_size(x):
        (y,) = exponents.evaluate(power, [x])
        return jnp.log(y.value), y.exponent

    (log, exponent), slope = jax.jit(jax.value_and_grad(log_size, has_aux=True))(
        jnp.float32(2.0**40)
    )
    np.testing.assert_allclose(
        float(log) + int(exponent) * np.log(2), 240 * np.log(2) - np.log(3), rtol=1e-6
    )
    np.testing.assert_allclose(slope * 2.0**40, 6, rtol=1e-6)
    tanh = jax.make_jaxpr(lambda x: jnp.tanh(x**9))(jnp.float32(1))
    (huge,) = jax.jit(lambda x: exponents.evaluate(tanh, [x]))(jnp.float32(1e9))
    assert float(huge.value) == 1 and int(huge.exponent) == 0


# Fisher and OBD


def test_fisher_squares_the_gradient_of_each_example():
    batches = [tuple(a[i:j] for a in BATCH) for i, j in ((0, 5), (5, 10), (10, 12))]
    found = fisher_diagonal(linear_loss, PARAMS, iter(batches))
    kernels, biases = example_gradients()
    close(found["kernel"], (kernels**2).mean(0))
    close(found["bias"], (biases**2).mean(0))
    assert not np.allclose(found["kernel"], kernels.mean(0) ** 2, rtol=0.1)  # what Adam would say
    close(fisher_diagonal(linear_loss, PARAMS, [BATCH])["kernel"], found["kernel"], 1e-6)


def test_fisher_and_hessian_of_least_squares_are_the_mean_squares_of_the_inputs():
    signs = np.sign(RNG.normal(size=(12, 3)))
    unit = jnp.asarray(X @ W + B - signs, jnp.float32)  # all residuals are 1 or -1
    found = fisher_diagonal(linear_loss, PARAMS, [(BATCH[0], unit)])
    close(found["kernel"], np.broadcast_to((X**2).mean(0)[:, None], W.shape), 1e-4)
    close(found["bias"], np.ones(3), 1e-4)

    def hessian(loss_fn, params, batches):
        (batch,) = batches
        of_kernel = lambda w: loss_fn({**params, "kernel": w}, *batch)
        blocks = jax.jit(jax.hessian(of_kernel))(params["kernel"])
        diagonal = jnp.diagonal(blocks.reshape(18, 18)).reshape(6, 3)
        return {"kernel": diagonal, "bias": jnp.ones(3)}

    scores = obd(linear_loss, PARAMS, [BATCH], curvature=hessian)
    close(scores["kernel"], (X**2).mean(0)[:, None] * W**2 / 2)
    close(scores["bias"], B**2 / 2)
    default = obd(linear_loss, PARAMS, [(BATCH[0], unit)])
    close(default["kernel"], scores["kernel"], 1e-4)


# OBS


def quadratic(n=7, seed=4):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(n, n + 2))
    return root @ root.T / n, rng.normal(size=n)


def constrained(h, w, gone):
    """argmin 1/2 (z - w)^T H (z - w) with z = 0 on `gone`, in float64; and the minimum."""
    z, stay = np.zeros_like(w), ~gone
    z[stay] = w[stay] + np.linalg.solve(h[np.ix_(stay, stay)], h[np.ix_(stay, gone)] @ w[gone])
    return z, (z - w) @ h @ (z - w) / 2


@pytest.mark.parametrize("gone", [[3], [0, 2, 5], [1, 2, 3, 4, 5, 6], [], list(range(7))])
def test_obs_is_constrained_least_squares_and_reinversion(gone):
    h, w = quadratic()
    mask = np.isin(np.arange(7), gone)
    best, loss = constrained(h, w, mask)
    inverse = jnp.asarray(np.linalg.inv(h), jnp.float32)
    rest = np.zeros((7, 7))
    rest[np.ix_(~mask, ~mask)] = np.linalg.inv(h[np.ix_(~mask, ~mask)])
    found = obs(jnp.asarray(w, jnp.float32), inverse, jnp.asarray(mask))
    close(found.weights, best, 2e-4)
    close(found.loss, loss, 2e-4)
    close(found.inverse_hessian, rest, 2e-4)
    assert not np.any(np.asarray(found.weights)[mask])
    # one by one, by a traced index
    weights, left, total = jnp.asarray(w, jnp.float32), inverse, 0.0
    for p in gone:
        step = jax.jit(obs)(weights, left, p)
        weights, left, total = step.weights, step.inverse_hessian, total + float(step.loss)
    close(weights, best, 5e-4)
    close(left, rest, 5e-4)
    np.testing.assert_allclose(total, loss, rtol=5e-4, atol=1e-6)


def test_obs_of_one_weight_costs_its_saliency():
    h, w = quadratic(seed=5)
    inverse = np.linalg.inv(h)
    wide, narrow = jnp.asarray(inverse, jnp.float32), jnp.asarray(w, jnp.bfloat16)
    for p in (0, 6):
        found = obs(jnp.asarray(w, jnp.float32), wide, p)
        close(found.loss, w[p] ** 2 / (2 * inverse[p, p]))
    half = obs(narrow, wide, p)
    assert half.weights.dtype == jnp.bfloat16 and half.loss.dtype == jnp.float32
    close(half.weights.astype(jnp.float32), found.weights, 2e-2)


# WoodFisher


def blocked_inverses(gradients, size, damp):
    """inv(damp I + 1/N sum g g^T) of blocks of `size`, float64; gradients [N, d]."""
    count, d = gradients.shape
    gradients = np.pad(gradients, ((0, 0), (0, -d % size))).reshape(count, -1, size)
    fisher = np.einsum("nbi,nbj->bij", gradients, gradients) / count
    return np.linalg.inv(damp * np.eye(size) + fisher)


def test_woodfisher_inverts_the_damped_fisher_in_blocks():
    block, damp = 4, 1e-3
    batches = [tuple(a[i:j] for a in BATCH) for i, j in ((0, 8), (8, 12))]
    found = woodfisher(linear_loss, PARAMS, batches, block=block, damp=damp)
    kernels, biases = example_gradients()
    # outputs first: the inputs of one output are neighbours
    want = blocked_inverses(kernels.transpose(0, 2, 1).reshape(12, -1), block, damp)
    close(found.inverse["kernel"], want, 1e-4)
    close(found.inverse["bias"], blocked_inverses(biases, 3, damp), 1e-4)
    diagonal = np.diagonal(want, axis1=1, axis2=2).reshape(-1)[:18].reshape(3, 6).T
    close(found.scores["kernel"], W**2 / (2 * diagonal), 1e-4)

    mask = top_k_mask(found.scores["kernel"], 7)
    masks = {"kernel": mask, "bias": jnp.ones((), bool)}
    new = compensate(PARAMS, found, masks)
    np.testing.assert_array_equal(new["bias"], PARAMS["bias"])
    padded = lambda a: np.pad(a.T.reshape(-1), (0, want.shape[0] * want.shape[1] - 18))
    rows = padded(W).reshape(want.shape[:2])
    gone = padded(~np.asarray(mask)).reshape(want.shape[:2])
    best = [
        constrained(np.linalg.inv(f), w, g)[0] for f, w, g in zip(want, rows, gone, strict=True)
    ]
    close(new["kernel"], np.concatenate(best)[:18].reshape(3, 6).T, 1e-3)
    assert not np.any(np.asarray(new["kernel"])[~np.asarray(mask)])


def test_woodfisher_is_what_the_recursion_of_the_paper_gives():
    kernels, _ = example_gradients()
    # F^-1_0 = I / damp, F^-1 <- F^-1 - F^-1 g g^T F^-1 / (N + g^T F^-1 g)
    inverse = np.eye(18) / 1e-2
    for g in kernels.transpose(0, 2, 1).reshape(12, 18):
        fg = inverse @ g
        inverse -= np.outer(fg, fg) / (12 + g @ fg)
    found = woodfisher(linear_loss, PARAMS, [BATCH], damp=1e-2)
    close(found.inverse["kernel"][0], inverse, 1e-4)


def test_woodfisher_of_all_kinds_of_leaves():
    tree = {"kernel": small_tree()["dense"]["kernel"][:6, :5], "scalar": jnp.float32(0.7)}
    tree |= {"empty": jnp.zeros((0, 4)), "steps": jnp.arange(3)}
    loss = lambda p, x: jnp.mean(x) * sum(jnp.sum(jnp.sin(p[k])) for k in ("kernel", "scalar"))
    found = woodfisher(loss, tree, [(jnp.ones((3, 1)),)], block=8, damp=0.1)
    for s, w in zip(jax.tree.leaves(found.scores), jax.tree.leaves(tree), strict=True):
        assert s.shape == w.shape and s.dtype == jnp.float32 and np.all(np.isfinite(s))
    assert found.inverse["kernel"].shape == (4, 8, 8) and found.inverse["empty"].shape[0] == 0
    assert found.inverse["steps"].shape == (0, 0, 0)
    masks = masks_of_scores(found.scores, 0.5)
    new = compensate(tree, found, masks)
    assert avals(new) == avals(tree)
    assert int(jnp.sum(new["kernel"] != 0)) == 15
    assert all(bits_equal(new[k], tree[k]) for k in ("scalar", "steps"))  # dense


# From scores to masks


def test_scores_prune_through_scored_and_masks_of_scores():
    labels = jnp.asarray(np.arange(12) % 3)
    trees = [
        snip(linear_loss, PARAMS, BATCH),
        grasp(lambda p, x: x @ p["kernel"], PARAMS, (BATCH[0], labels)),
        obd(linear_loss, PARAMS, [BATCH]),
        woodfisher(linear_loss, PARAMS, [BATCH], damp=1e-2).scores,
    ]
    for scores in trees:
        masks = masks_of_scores(scores, 0.6)
        flat = np.asarray(scores["kernel"], np.float64).ravel()
        want = np.zeros(18, bool)
        want[np.argsort(-flat, kind="stable")[: keep_count(18, 0.6)]] = True
        np.testing.assert_array_equal(masks["kernel"].ravel(), want)
        assert masks["bias"].shape == ()  # dense, as vectors are unless min_ndim says otherwise
        recipe = scored(scores, 0.6)
        view = recipe.apply(PARAMS, recipe.init(PARAMS))
        np.testing.assert_array_equal(
            view["kernel"], np.where(want.reshape(6, 3), W, 0).astype("f4")
        )
    columns = masks_of_scores(trees[0], 1 / 3, structure=channel(-1), scope="layer")["kernel"]
    lightest = int(np.argmin(np.asarray(trees[0]["kernel"]).sum(0)))
    np.testing.assert_array_equal(columns.all(0), np.arange(3) != lightest)


# Errors


def _nan():
    return {"a": {"w": jnp.array([[1.0, jnp.nan]])}}


IDENTITY, PAIR = jnp.eye(2), jnp.ones(2)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: snip(linear_loss, _nan(), BATCH), ValueError, "a/w: a weight to score must not"),
        (
            lambda: snip(lambda p, x: jnp.sum(p["w"] / x), {"w": W[:1]}, (jnp.float32(0),)),
            ValueError,
            "w: a gradient of the loss is NaN or Inf",
        ),
        (lambda: grasp(mlp, PARAMS, BATCH, temperature=0.0), ValueError, "temperature must be pos"),
        (lambda: synflow(mlp, _nan(), sparsity=0.5), ValueError, "a/w: a weight"),
        (lambda: synflow(mlp, PARAMS, sparsity=0.5, rounds=0), ValueError, "rounds must be at"),
        (
            lambda: synflow(mlp, PARAMS, sparsity=1.5),
            ValueError,
            r"sparsity must be a share of zeros",
        ),
        (lambda: fisher_diagonal(linear_loss, PARAMS, []), ValueError, "batches is empty"),
        (
            lambda: fisher_diagonal(linear_loss, PARAMS, [(BATCH[0], BATCH[1][:3])]),
            ValueError,
            r"must have one first axis, the examples; got shapes \[\(12, 6\), \(3, 3\)\]",
        ),
        (
            lambda: obs(PARAMS["kernel"], IDENTITY, 0),
            ValueError,
            r"floats w \[n\] and inverse_hessian \[n, n\], got",
        ),
        (lambda: obs(PAIR, IDENTITY, 2), ValueError, r"remove must be in \[0, 2\), got 2"),
        (lambda: obs(PAIR, IDENTITY, 0.5), TypeError, r"bool \[2\] or one index, got float32"),
        (lambda: obs(PAIR, -IDENTITY, 1), ValueError, "positive definite where weights"),
        (lambda: obs(PAIR, -IDENTITY, np.array([True, False])), ValueError, "positive definite"),
        (
            lambda: woodfisher(linear_loss, PARAMS, [BATCH], block=0),
            ValueError,
            "block >= 1 and damp > 0, got block=0",
        ),
        (lambda: obs(jnp.arange(2), IDENTITY, 1), ValueError, r"floats w \[n\] and inv.*got int32"),
        (lambda: obs(PAIR * jnp.nan, IDENTITY, 1), ValueError, "a weight to score must not be NaN"),
        (
            lambda: woodfisher(
                lambda p, x: 1e6 * jnp.sum(p["w"] * x[0]), {"w": PAIR}, [(jnp.ones((3, 1)),)]
            ),
            ValueError,
            "w: the Fisher of these examples is too large beside damp=1e-05",
        ),
        (
            lambda: compensate(
                {"w": PAIR},
                WoodFisher({"w": PAIR}, {"w": -IDENTITY[None]}, -1),
                {"w": jnp.array([True, False])},
            ),
            ValueError,
            r"w: F\^-1 is not positive definite",
        ),
        (
            lambda: compensate(
                {"w": jnp.ones((2, 3))},
                woodfisher(
                    lambda p, x: jnp.sum(p["w"] * x), {"w": jnp.ones((2, 2))}, [(X[:2, :1],)]
                ),
                {"w": jnp.ones((2, 3), bool)},
            ),
            ValueError,
            r"w: F\^-1 of shape \(1, 4, 4\) is not of a leaf \(2, 3\)",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
