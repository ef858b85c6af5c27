"""A leaf that several contractions use: what calibration does holds over all of them."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxcompress.formats import integer
from jaxcompress.graph.layers.matrices import layers
from jaxcompress.graph.layers.statistics import capture
from jaxcompress.graph.layers.uses import pools
from jaxcompress.prune.channels.least_squares import group_obs
from jaxcompress.prune.from_calibration.sparsegpt import sparse_gpt
from jaxcompress.prune.from_calibration.wanda_masks import wanda
from jaxcompress.prune.masking.n_to_m import n_m
from jaxcompress.quantize import Spec, ptq
from jaxcompress.quantize.ptq import adaround, gptq, recipe

K, N = 24, 8
INT4 = {".*w": Spec(integer(4))}


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def mixed(rows, k, seed):
    """Correlated inputs, for which rounding to nearest is not the best."""
    return draw(rows, k, seed=seed) @ draw(k, k, seed=seed + 1) * 0.3


W, A, B = draw(K, N), mixed(64, K, 1), 5 * mixed(64, K, 3)
EVERY = {
    "gptq": gptq,
    "gptq in order": lambda *a: gptq(*a, act_order=True),
    "gptq of groups": lambda *a: gptq(*a, groups="current"),
    "gptq with sweeps": lambda *a: gptq(*a, sweeps=2),
    "gptq of quantized inputs": lambda *a: gptq(*a, inputs="quantized"),
    "gptq one by one": lambda *a: gptq(*a, layer_at_a_time=True),
    "adaround": lambda *a: adaround(*a, steps=150),
}


def error(inputs, new, w=W):
    """Squared error of each output over all uses, float64."""
    off = np.asarray(new, np.float64) - np.asarray(w, np.float64)
    return np.sum([np.sum((np.asarray(x, np.float64) @ off) ** 2, 0) for x in inputs], 0)


def rounded(method, fn, params, data, spec=INT4):
    view = recipe(spec).apply(*method(fn, params, data, spec))
    return {path: np.asarray(leaf) for path, leaf in view.items()}


def nearest(params, spec=INT4):
    comp = recipe(spec)
    return comp.apply(params, comp.init(params))


two_towers = lambda p, a, b: (a @ p["w"], b @ p["w"])


@pytest.mark.parametrize("name", EVERY)
def test_two_sites_count_as_their_rows_together(name):
    pooled = jnp.concatenate([A, B])
    got = rounded(EVERY[name], two_towers, {"w": W}, [(A, B)])["w"]
    want = rounded(EVERY[name], lambda p, a: a @ p["w"], {"w": W}, [(pooled,)])["w"]
    plain = error([A, B], nearest({"w": W})["w"])
    np.testing.assert_allclose(error([A, B], got).sum(), error([pooled], want).sum(), rtol=0.02)
    assert (error([A, B], got) <= plain * (1 + 1e-5)).all()
    assert error([A, B], got).sum() < 0.8 * plain.sum()


class Views(NamedTuple):
    """A leaf [K, N] used more than once, and the inputs of its columns as NumPy sees them."""

    fn: Callable[..., Any]
    data: tuple[jax.Array, ...]
    seen: Callable[[int], list[Any]]  # output -> inputs [rows, K] that meet its weights


def _padded(x, at):
    wide = np.zeros((len(x), K))
    wide[:, at] = x
    return wide


def _twice(p, x):
    step = lambda x, _: (jnp.tanh(x @ p["w"] @ jnp.ones((N, K)) / N), None)
    return lax.scan(step, x, None, length=2)[0]


def _carried(x):
    return np.tanh(np.asarray(x, np.float64) @ np.asarray(W, np.float64) @ np.ones((N, K)) / N)


SITUATIONS = {
    "three sites": Views(
        lambda p, a, b: (a @ p["w"], b @ p["w"], (a - b) @ p["w"]),
        (A, B),
        lambda n: [A, B, A - B],
    ),
    "a scan": Views(_twice, (A,), lambda n: [A, _carried(A)]),
    "slices of inputs": Views(
        lambda p, a, b: (a @ p["w"], b[:, :6] @ p["w"][:6], b[:, 6:] @ p["w"][6:]),
        (A, B),
        lambda n: [A, _padded(B[:, :6], range(6)), _padded(B[:, 6:], range(6, K))],
    ),
    "slices of outputs": Views(
        lambda p, a, b: (a @ p["w"], b @ p["w"][:, 2:5]),
        (A, B),
        lambda n: [A, B] if 2 <= n < 5 else [A],
    ),
    "turned about": Views(
        lambda p, a, b: (a @ p["w"], b @ p["w"][::-1, ::-1]),
        (A, B),
        lambda n: [A, B[:, ::-1]],
    ),
    "branches": Views(
        lambda p, a, b: (a @ p["w"], lax.cond(b.sum() > 0, lambda: b @ p["w"], lambda: b @ p["w"])),
        (A, B),
        lambda n: [A, B],
    ),
}


@pytest.mark.parametrize("name", SITUATIONS)
def test_views_that_lie_along_each_other_are_one_problem(name):
    fn, data, seen = SITUATIONS[name]
    found = layers(fn, {"w": W}, *data)
    solved, apart = pools(found.layers, found.readers)
    assert not apart
    moments = capture(fn, {"w": W}, [data], layers=found.layers)
    covered = []
    for pool in solved:
        gram = np.asarray(pool.moments(moments).gram)
        for column in pool.layer.index[0, 0].T:
            rows, outputs = np.unravel_index(column, W.shape)
            (output,) = set(outputs.tolist())
            xs = [np.asarray(x, np.float64) for x in seen(output)]
            want = np.sum([x.T @ x for x in xs], 0)[np.ix_(rows, rows)]
            np.testing.assert_allclose(gram[0, 0], want, rtol=1e-3, atol=1e-2)
            covered += column.tolist()
    assert sorted(covered) == list(range(W.size))
    got = rounded(gptq, fn, {"w": W}, [data])["w"]
    plain = nearest({"w": W})["w"]
    mine, theirs = (np.array([error(seen(n), v)[n] for n in range(N)]) for v in (got, plain))
    assert (mine <= theirs * (1 + 1e-5)).all() and mine.sum() < theirs.sum()


APART = {
    "across": (lambda p, a, b: (a @ p["w"], b[:, :N] @ p["w"].T), "'w', 'w#1' sum over diff"),
    "lookup": (lambda p, a, b: (a @ p["w"].T[:, :K], p["w"][jnp.arange(3)]), "read by gather"),
    "arithmetic": (lambda p, a, b: (a @ p["w"], b @ (2 * p["w"])), "also read by mul"),
    "result": (lambda p, a, b: (a @ p["w"], p["w"]), "also read by the result"),
    "joined": (lambda p, a, b: (a @ p["w"], b @ jnp.concatenate([p["w"], p["w"]], 1)), "concat"),
    "carried": (
        lambda p, a, b: (
            a @ p["w"],
            lax.fori_loop(0, 2, lambda _, c: (c[0] / 2, c[1] @ c[0]), (p["w"][:N], b[:, :N])),
        ),
        "also read by a loop that carries it",
    ),
}


@pytest.mark.parametrize("method", [gptq, adaround, wanda, sparse_gpt], ids=lambda m: m.__name__)
@pytest.mark.parametrize("name", APART)
def test_uses_without_inputs_in_common_are_left_alone_and_named(name, method):
    fn, why = APART[name]
    w = draw(K, K) if name == "lookup" else W
    params, data = {"w": w, "other": draw(N, 3)}, [(A, B)]
    both = lambda p, a, b: (fn(p, a, b), a[:, :N] @ p["other"])
    rules = 0.5 if method in (wanda, sparse_gpt) else {".*": Spec(integer(4))}
    with pytest.warns(UserWarning, match=f"no inputs in common: w .*{why}") as said:
        new, _ = method(both, params, data, rules)
    assert len(said) == 1
    want = w if method in (wanda, sparse_gpt) else nearest({"w": w})["w"]
    np.testing.assert_array_equal(new["w"], want)
    assert (new["other"] != params["other"]).any()


def test_what_is_read_for_nothing_does_not_count():
    def fn(p, a):
        _ = jnp.sum(p["w"] ** 2)
        return lax.scan(lambda x, _: (x, x @ p["w"]), a, None, length=2)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rounded(gptq, fn, {"w": W}, [(A,)])


@pytest.mark.parametrize("method", [wanda, sparse_gpt], ids=lambda m: m.__name__)
def test_pruning_counts_slices_too(method):
    fn = lambda p, a, b: (a @ p["w"], b[:, :6] @ p["w"][:6])
    rows = jnp.concatenate([A, jnp.asarray(_padded(B[:, :6], range(6)), jnp.float32)])
    got, state = method(fn, {"w": W}, [(A, B)], 0.5)
    want, mask = method(lambda p, a: a @ p["w"], {"w": W}, [(rows,)], 0.5)
    np.testing.assert_array_equal(state.buffers.masks["w"], mask.buffers.masks["w"])
    np.testing.assert_allclose(got["w"], want["w"], atol=1e-3)


def test_scales_that_others_share_stay_where_groups_are_found_on_the_way():
    # The scale of a column belongs to both slices: neither may move it.
    fn = lambda p, a: (a[:, :6] @ p["w"][:6], a[:, 6:] @ p["w"][6:])
    _, state = gptq(fn, {"w": W}, [(A,)], INT4, groups="current")
    want = recipe(INT4).init({"w": W})
    jax.tree.map(np.testing.assert_array_equal, state, want)
    got = rounded(EVERY["gptq of groups"], fn, {"w": W}, [(A,)])["w"]
    for at in (slice(6), slice(6, K)):
        mine = error([A[:, at]], got[at], W[at])
        assert (mine <= error([A[:, at]], nearest({"w": W})["w"][at], W[at]) * (1 + 1e-5)).all()


def test_group_obs_names_what_it_does_not_count():
    from jaxcompress.graph.coupling.dependency_graph import axes

    params = {"up": draw(4, 6), "down": draw(6, 4), "tied": draw(4, 6, seed=2)}

    def fn(p, x):
        h = jax.nn.relu(x @ p["up"] + x @ p["tied"])
        return h @ p["down"] + jnp.tanh(h @ p["tied"].T)

    x = draw(40, 4)
    with pytest.warns(UserWarning, match="not fitted and not counted, .*: tied .'tied', 'tied#1'"):
        group_obs(axes(fn, params, x), fn, params, [(x,)], of=["tied[1]"])


METHODS_WITH_DATA = [gptq, adaround, ptq.awq, ptq.smooth_quant, ptq.correct_bias, ptq.equalize]
METHODS_WITH_DATA += [ptq.reconstruct, ptq.hqq, ptq.mse_clip, ptq.round_to_nearest]


@pytest.mark.parametrize(
    "method", [*METHODS_WITH_DATA, wanda, sparse_gpt], ids=lambda m: m.__name__
)
def test_batches_without_rows_are_refused(method):
    fn = lambda p, x: jax.nn.relu(x @ p["w"] + p["b"][None])
    params = {"w": W, "b": jnp.zeros(N)}
    rules = 0.5 if method in (wanda, sparse_gpt) else INT4
    for data in ([(A[:0],)], [(A,), (A[:0],)]):
        with pytest.raises(ValueError, match=r"data: batch \d has no rows: input 0 has"):
            method(fn, params, data, rules)


def means(view, params, uses):
    """Mean output error of every use [uses, N], and the rows, float64."""
    off = [
        np.asarray(x, np.float64) @ (np.asarray(view["w"], np.float64) - np.float64(params["w"]))
        for x in uses
    ]
    return np.stack([x.mean(0) for x in off]), np.array([len(x) for x in off])


@pytest.mark.parametrize("inputs", ["float", "quantized"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_bias_that_several_layers_add_moves_by_the_mean_over_their_rows(count, inputs):
    xs = [mixed(8 * (k + 1), K, 3 * k) + 2 * k for k in range(count)]
    fn = lambda p, *xs: [x @ p["w"] + p["b"][None] for x in xs]
    params = {"w": W, "b": draw(N, seed=5)}
    got, _ = ptq.correct_bias(fn, params, [tuple(xs)], INT4, inputs=inputs)
    shift, rows = means(nearest(params), params, xs)
    want = -(shift * rows[:, None]).sum(0) / rows.sum()
    np.testing.assert_allclose(got["b"] - params["b"], want, rtol=1e-3, atol=1e-5)
    # The least squared error that a common bias can have: no other shift is better.
    total = lambda b: sum(r * np.sum((s + b) ** 2) for s, r in zip(shift, rows, strict=True))
    moved = np.float64(got["b"] - params["b"])
    assert total(moved) <= min(total(0), total(2 * moved), total(moved / 2)) * (1 + 1e-5)


def test_uses_of_a_bias_beside_weights_that_stay_count_as_no_change():
    fn = lambda p, a, b: (a @ p["w"] + p["b"][None], b @ p["kept"] + p["b"][None])
    params = {"w": W, "kept": draw(K, N, seed=9), "b": jnp.zeros(N)}
    got, _ = ptq.correct_bias(fn, params, [(A, B[:32])], {"w": Spec(integer(4))})
    view = nearest(params, {"w": Spec(integer(4))})
    shift, _ = means(view, params, [A])
    np.testing.assert_allclose(got["b"], -shift[0] * 64 / 96, rtol=1e-3, atol=1e-5)


def test_outputs_that_share_an_element_of_a_bias_share_the_mean_of_their_shifts():
    fn = lambda p, a: a @ p["w"] + jnp.repeat(p["b"], 2)[None]
    params = {"w": W, "b": jnp.zeros(N // 2)}
    got, _ = ptq.correct_bias(fn, params, [(A,)], INT4)
    shift, _ = means(nearest(params), params, [A])
    np.testing.assert_allclose(got["b"], -shift[0].reshape(-1, 2).mean(1), rtol=1e-3, atol=1e-5)


def test_a_bias_that_something_else_reads_stays_and_is_named():
    fn = lambda p, a: (a @ p["w"] + p["b"][None], a @ p["v/w"] + p["c"][None], jnp.sum(p["b"]))
    params = {"w": W, "b": jnp.zeros(N), "v/w": W + 1, "c": jnp.zeros(N)}
    with pytest.warns(UserWarning, match="no bias to correct: w .b is also read by reduce_sum"):
        got, _ = ptq.correct_bias(fn, params, [(A,)], INT4)
    assert not got["b"].any() and got["c"].all()


def scaled_towers(p, a, b):
    return (jnp.tanh(a) * p["s1"][None]) @ p["w"], (jnp.tanh(b) * p["s2"][None]) @ p["w"]


TOWERS = {"s1": jnp.exp(draw(K, seed=20)), "s2": 5 * jnp.exp(draw(K, seed=21)), "w": W}


def entering(params, a, b):
    return [np.tanh(np.float64(x)) * np.float64(params[s]) for x, s in ((a, "s1"), (b, "s2"))]


def test_smooth_quant_counts_the_inputs_of_all_uses():
    new, _ = ptq.smooth_quant(scaled_towers, TOWERS, [(A, B)], INT4)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3),
        scaled_towers(new, A, B),
        scaled_towers(TOWERS, A, B),
    )
    # max|X / s| = max|s W|, X being what enters either use.
    largest = np.abs(np.concatenate(entering(new, A, B))).max(0)
    np.testing.assert_allclose(largest, np.abs(new["w"]).max(1), rtol=1e-4)


def test_awq_chooses_by_the_error_of_all_uses():
    from jaxcompress.quantize.ptq.smooth import activation_scales

    new, state = ptq.awq(scaled_towers, TOWERS, [(A, B[:16])], INT4)
    xs = entering(TOWERS, A, B[:16])
    pooled = jnp.asarray(np.abs(np.concatenate(xs)).mean(0), jnp.float32)
    total = lambda s: error(xs, nearest({"w": W * s[:, None]})["w"] / s[:, None]).sum()
    losses = [total(activation_scales(pooled, jnp.float32(a))) for a in np.linspace(0, 1, 20)]
    view = recipe(INT4).apply(new, state)
    got = error(entering(new, A, B[:16]), view["w"], new["w"]).sum()
    np.testing.assert_allclose(got, min(losses), rtol=1e-3)
    assert got < losses[0]


def test_awq_looks_at_slices_that_share_the_grid_and_leaves_what_else_is_read():
    spec = {"w": Spec(integer(3))}

    def fn(p, a, b):
        return (jnp.tanh(a) * p["s"][None]) @ p["w"][:12], b @ p["w"][12:]

    params = {"s": jnp.exp(2 * draw(12, seed=20)), "w": W}
    new, state = ptq.awq(fn, params, [(A[:, :12], B[:, :12])], spec)
    xs = np.tanh(np.float64(A[:, :12])) * np.float64(params["s"]), np.float64(B[:, :12])
    view, s = recipe(spec).apply(new, state)["w"], np.asarray(params["s"] / new["s"], np.float64)
    back = np.concatenate([np.float64(view[:12]) / s[:, None], view[12:]])
    both = lambda v: error(xs[:1], v[:12], W[:12]).sum() + error(xs[1:], v[12:], W[12:]).sum()
    assert both(back) <= both(nearest(params, spec)["w"]) * (1 + 1e-5)
    looked_up = lambda p, a: (fn(p, a, a), jnp.sum(p["w"][12:] ** 2))
    with pytest.warns(UserWarning, match="not scaled, .*: w .also read by"):
        new, _ = ptq.awq(looked_up, params, [(A[:, :12],)], spec)
    jax.tree.map(np.testing.assert_array_equal, new, params)


def conv(x, w, groups=1):
    return lax.conv_general_dilated(
        x,
        w,
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


KERNELS = {
    "channels no multiple of 4": (conv, (3, 3, 6, 8), (2, 5, 5, 6)),
    "fewer channels than 4": (conv, (3, 3, 3, 4), (2, 5, 5, 3)),
    "depthwise": (lambda x, w: conv(x, w, 6), (3, 3, 1, 6), (2, 5, 5, 6)),
    "two axes": (lambda x, w: jnp.einsum("bhd,hdn->bn", x, w), (3, 6, 5), (40, 3, 6)),
    "two axes the other way": (lambda x, w: jnp.einsum("bdh,hdn->bn", x, w), (3, 6, 5), (40, 6, 3)),
}


@pytest.mark.parametrize("method", [wanda, sparse_gpt], ids=lambda m: m.__name__)
@pytest.mark.parametrize("name", KERNELS)
def test_n_of_m_goes_along_input_channels_tap_by_tap(name, method):
    apply, shape, inputs = KERNELS[name]
    w, x = draw(*shape), draw(*inputs, seed=7)
    got, state = method(lambda p, x: apply(x, p), w, [(x,)], (2, 4))
    mask = np.asarray(state.buffers.masks)
    np.testing.assert_array_equal(mask, np.asarray(got) != 0)
    for start in range(0, shape[-2], 4):
        span = mask[..., start : start + 4, :]
        assert (span.sum(-2) == -(-2 * span.shape[-2] // 4)).all()
    if method is wanda:  # inputs of one size: the largest magnitudes, where `n_m` keeps them
        ones, _ = wanda(lambda p, x: apply(x, p), w, [(jnp.sign(x),)], (2, 4))
        want = n_m(2, 4).expand(jnp.zeros((1,) * w.ndim, bool), jnp.abs(w))
        np.testing.assert_array_equal(np.asarray(ones) != 0, want)
