"""Folded normalizations are gone: from the tree, from the bytes, from the program."""

import importlib.util
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

import jaxcompress as jc
from experiments.models.mlperf_tiny import DsCnn
from jaxcompress.core.paths import leaves_with_paths


@pytest.fixture(autouse=True)
def as_written():
    """Functions broadcast their biases as their authors would."""
    with jax.numpy_rank_promotion("allow"):
        yield


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape), jnp.float32)


def filled(variables):
    """Statistics as after training: none is 0 or 1, variances are positive."""
    rng = np.random.default_rng(0)
    draw = lambda w: jnp.asarray(rng.normal(size=w.shape) * 0.5, jnp.float32)
    positive = lambda w: jnp.asarray(rng.uniform(0.2, 2.0, w.shape), jnp.float32)
    stats = variables.get("batch_stats", {})
    stats = jax.tree_util.tree_map_with_path(
        lambda at, w: positive(w) if "var" in str(at[-1]) else draw(w), stats
    )
    return {"params": jax.tree.map(draw, variables["params"]), "batch_stats": stats}


def paths(tree):
    return [path for path, _ in leaves_with_paths(tree)]


def norm(p, y, name):
    mean, var, scale, bias = (p[f"{name}_{key}"] for key in ("mean", "var", "scale", "bias"))
    shape = [1] * (y.ndim - 1) + [-1]
    a, b, c, d = (v.reshape(shape) for v in (mean, var, scale, bias))
    return (y - a) * (lax.rsqrt(b + 1e-5) * c) + d


def statistics(*shape, name="bn"):
    return {
        f"{name}_mean": normal(*shape, seed=1),
        f"{name}_var": jnp.abs(normal(*shape, seed=2)) + 0.1,
        f"{name}_scale": normal(*shape, seed=3),
        f"{name}_bias": normal(*shape, seed=4),
    }


def agree(fn, params, x, gone, again=None):
    """The folded function is the function, at another batch size too; no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small_fn, small = jc.quantize.fold_batch_norm(fn, params, [(x,)])
    assert sorted(set(paths(params)) - set(paths(small))) == sorted(gone)
    for y in (x, x[:1]) if again is None else again:
        want, got = np.asarray(jax.jit(fn)(params, y)), np.asarray(jax.jit(small_fn)(small, y))
        np.testing.assert_allclose(got, want, atol=3e-6 * np.abs(want).max())
    return small_fn, small


def test_every_batch_norm_of_ds_cnn_is_gone():
    model, x = DsCnn(), normal(2, 49, 10, 1)
    variables = filled(model.init(jax.random.key(0), x))
    biases = [f"{name}/conv/bias" for name in variables["params"] if name != "linear"]
    norms = [f"{name.rsplit('/', 2)[0]}/bn/scale" for name in biases]
    stats = [f"batch_stats/{path}" for path in paths(variables["batch_stats"])]
    gone = [f"params/{path}" for path in biases + norms] + stats
    fn, small = agree(model.apply, variables, x, gone, again=(x[:1],))
    # 22,016 weights of a byte; a bias and a scale of four for each of 588 outputs.
    weights = jc.quantize.weights(jc.formats.integer(8), axis=-1)
    comp = jc.by_path({".*kernel": weights, ".*bias": jc.identity()})
    packed = comp.pack(small, comp.init(small))
    assert jc.packed_bytes(packed) == 22016 + 588 * 4 + 588 * 4 == 26720
    closed = jax.make_jaxpr(fn)(small, x)
    assert "sqrt" not in str(closed) and str(closed).count(" mul ") <= 1


def dense(p, x):
    return norm(p, x @ p["w"] + p["b"], "bn") @ p["out"]


def convolved(p, x, *, padding: Any = "SAME", groups=1, dilation=None, strides=(1, 1)):
    numbers = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(
        x, p["w"], strides, padding, lhs_dilation=dilation, dimension_numbers=numbers,
        feature_group_count=groups,
    )  # fmt: skip
    y = y + p["b"] if "b" in p else y
    return jnp.mean(jax.nn.relu(norm(p, y, "bn")), (1, 2)) @ p["out"]


def kernel(inputs, **more):
    return {"w": normal(3, 3, inputs, 8), "out": normal(8, 2), **statistics(8), **more}


def roots(p, x):
    y = (x @ p["w"] - p["bn_mean"]) / jnp.sqrt(p["bn_var"] + 1e-3)
    return (y * p["bn_scale"] + p["bn_bias"]) @ p["out"]


def towers(p, x):
    tower = lambda x: jnp.tanh(norm(p, x @ p["w"] + p["b"], "bn"))
    return tower(x) - tower(2 * x)


def residual(p, x):
    h = x @ p["w"]
    return norm(p, h + jax.nn.relu(h @ p["b"]) @ p["c"], "bn") @ p["out"]


def by_hand(p, x):
    scale = p["bn_scale"] * lax.rsqrt(p["bn_var"] + 1e-3)
    return jnp.tanh(x @ p["w"] * scale + (p["bn_bias"] - p["bn_mean"] * scale))


def in_kernel(p, x):
    scale = jax.jit(lambda a, b: a / jnp.sqrt(b + 1e-3))(p["bn_scale"], p["bn_var"])
    return jnp.tanh(x @ (p["w"] * scale) + (p["bn_bias"] - p["bn_mean"] * scale))


def stacked_by_hand(p, x):
    return lax.scan(lambda h, row: (h + by_hand(row, h), None), x, p)[0]


def weight_norm(p, x):
    return x @ (p["w"] * (p["bn_scale"] / jnp.linalg.norm(p["w"], axis=0))) + p["bn_bias"]


def stacked(p, x):
    def layer(h, row):
        y = jnp.einsum("bi,io->bo", h, row["w"]) + row["b"]
        return h + jnp.tanh(norm(row, y, "bn")), None

    return lax.scan(layer, x, p)[0]


IMAGE, MATRIX = normal(2, 5, 5, 4), normal(6, 4)
BOTH = ["bn_mean", "bn_scale", "bn_var"]
FOLDED = {
    "dense, bias": (
        dense, {"w": normal(4, 8), "b": normal(8), "out": normal(8, 2), **statistics(8)},
        MATRIX, ["b", *BOTH],
    ),
    "convolution": (convolved, kernel(4), IMAGE, BOTH),
    "convolution, bias": (convolved, kernel(4, b=normal(8)), IMAGE, ["b", *BOTH]),
    "valid": (lambda p, x: convolved(p, x, padding="VALID"), kernel(4), IMAGE, BOTH),
    "grouped": (lambda p, x: convolved(p, x, groups=2), kernel(2, b=normal(8)), IMAGE,
                ["b", *BOTH]),
    "depthwise": (lambda p, x: convolved(p, x, groups=4), kernel(1), IMAGE, BOTH),
    "transposed": (
        lambda p, x: convolved(p, x, dilation=(2, 2), padding=((1, 2), (2, 1))),
        kernel(4, b=normal(8)), IMAGE, ["b", *BOTH],
    ),
    "root and scale apart": (
        roots, {"w": normal(4, 8), "out": normal(8, 2), **statistics(8)}, MATRIX, BOTH,
    ),
    "one kernel, two towers": (
        towers, {"w": normal(4, 8), "b": normal(8), **statistics(8)}, MATRIX,
        ["bn_scale", "bn_var"],
    ),
    "layers of a scan": (
        stacked, {"w": normal(3, 4, 4), "b": normal(3, 4), **statistics(3, 4)}, MATRIX,
        ["b", *BOTH],
    ),
    "a shift by hand": (by_hand, {"w": normal(4, 8), **statistics(8)}, MATRIX, BOTH),
    "a factor in the kernel": (in_kernel, {"w": normal(4, 8), **statistics(8)}, MATRIX, BOTH),
    "by hand in a scan": (
        stacked_by_hand, {"w": normal(3, 4, 4), **statistics(3, 4)}, MATRIX, BOTH,
    ),
    "weight normalization": (
        weight_norm, {"w": normal(4, 8), "bn_scale": normal(8), "bn_bias": normal(8)}, MATRIX,
        ["bn_scale"],
    ),
    "in a call, rematerialized": (
        jax.checkpoint(jax.jit(dense)),
        {"w": normal(4, 8), "b": normal(8), "out": normal(8, 2), **statistics(8)},
        MATRIX, ["b", *BOTH],
    ),
    "float16 products": (
        lambda p, x: norm(p, (x.astype(jnp.bfloat16) @ p["w"]).astype(jnp.float32), "bn"),
        {"w": jnp.round(normal(4, 8)).astype(jnp.bfloat16),
         **statistics(8), "bn_scale": jnp.exp2(jnp.arange(8.0)),
         "bn_var": jnp.full(8, 1 - 1e-5)},
        jnp.round(MATRIX), BOTH,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDED)
def test_folded(name):
    fn, params, x, gone = FOLDED[name]
    agree(fn, params, x, gone)


def test_a_dead_channel_and_a_scale_alone():
    params = {"w": normal(4, 3), "scale": jnp.array([2.0, 0.0, -1.0])}
    small_fn, small = agree(lambda p, x: (x @ p["w"]) * p["scale"], params, MATRIX, ["scale"])
    np.testing.assert_array_equal(small["w"], np.asarray(params["w"]) * [2.0, 0.0, -1.0])
    del small_fn
    # Behind a ReLU too, while no factor is negative.
    params = {**params, **statistics(3), "bn_scale": jnp.array([0.5, 0.0, 2.0])}
    del params["scale"]
    relu = lambda p, x: norm(p, jax.nn.relu(x @ p["w"]), "bn")
    agree(relu, params, MATRIX, BOTH)


def test_values_by_hand():
    params = {"w": jnp.array([[2.0, 3.0]]), "b": jnp.array([1.0, -1.0])}
    params |= {"bn_mean": jnp.array([5.0, 0.0]), "bn_var": jnp.array([4.0, 0.25]) - 1e-5}
    params |= {"bn_scale": jnp.array([1.0, 3.0]), "bn_bias": jnp.array([10.0, 20.0])}
    fn = lambda p, x: norm(p, x @ p["w"] + p["b"], "bn")
    _, small = jc.quantize.fold_batch_norm(fn, params, [(jnp.ones((1, 1)),)])
    # A = (1/2, 6): w A = (1, 18), (b - mean) A + bias = (-4/2 + 10, -6 + 20)
    np.testing.assert_allclose(small["w"], [[1.0, 18.0]], rtol=1e-6)
    np.testing.assert_allclose(small["bn_bias"], [8.0, 14.0], rtol=1e-6)


def small_net(p, x):
    return norm(p, x @ p["w"], "bn")


P = {
    "w": normal(4, 4),
    "v": normal(4, 4),
    **statistics(4),
    **statistics(4, name="b2"),
    "b2_scale": normal(4, seed=9),
}


def padded(p, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    h = norm(p, x, "bn")
    return lax.conv_general_dilated(h, p["k"], (1, 1), "SAME", dimension_numbers=numbers)


def choice(p, x):
    return lax.cond(x[0, 0] > 0, lambda y: y, jnp.tanh, small_net(p, x))


STAYS = {
    "the raw output is a result": (lambda p, x: (small_net(p, x), x @ p["w"]), "result"),
    "one product, normalized and raw": (
        lambda p, x: (norm(p, y := x @ p["w"], "bn"), jnp.exp(y)), "exp",
    ),
    "raw beside it": (lambda p, x: (lambda y: norm(p, y, "bn") + y)(x @ p["w"]), "w in front"),
    "a number is added": (
        lambda p, x: norm(p, (x @ p["w"]) * 0.5 + 1, "bn"), "'add' combines it with 1.0",
    ),
    "of an input": (lambda p, x: norm(p, x, "bn") @ p["w"], "no layer in front of it"),
    "a function without a scale between": (
        lambda p, x: norm(p, jnp.tanh(x @ p["w"]), "bn"), "tanh",
    ),
    "a negative factor behind a ReLU": (
        lambda p, x: norm(p, jax.nn.relu(x @ p["w"]), "bn"), "negative, and 'max' lies in front",
    ),
    "two norms of one product": (
        lambda p, x: (lambda y: norm(p, y, "bn") - norm(p, y, "b2"))(x @ p["w"]),
        "from that of another norm",
    ),
    "a conditional": (choice, "a conditional"),
}  # fmt: skip


def first(y):
    return jax.tree.leaves(y)[0]


@pytest.mark.parametrize("name", STAYS)
def test_what_stays_is_said(name):
    fn, why = STAYS[name]
    if name == "the raw output is a result":
        fn = lambda p, x: (lambda y: (norm(p, y, "bn"), y))(x @ p["w"])
    with pytest.warns(UserWarning) as caught:
        small_fn, small = jc.quantize.fold_batch_norm(fn, P, [(MATRIX,)])
    (warning,) = caught
    message = str(warning.message)
    assert message.startswith("not folded: ") and "bn_scale, bn_var: " in message
    assert why in message, message
    # The factor stays, as one leaf: scale / sqrt(var + eps), computed once.
    stay = {"two norms of one product": ["bn", "b2"], "a conditional": []}.get(name, ["bn"])
    assert set(P) - set(small) == {f"{norm}_var" for norm in stay}
    p = {key: np.asarray(leaf, np.float64) for key, leaf in P.items()}
    once = {f"{n}_scale": p[f"{n}_scale"] / np.sqrt(p[f"{n}_var"] + 1e-5) for n in stay}
    for key, leaf in small.items():
        np.testing.assert_allclose(leaf, once.get(key, p[key]), rtol=1e-6)
    np.testing.assert_array_equal(first(small_fn(small, MATRIX)), first(fn(P, MATRIX)))


def test_what_cannot_be_computed_once_is_said():
    params = {"w": normal(4, 8), **statistics(8)}
    half = {key: leaf.astype(jnp.bfloat16) for key, leaf in params.items()}
    fine = lambda p: jax.tree.map(lambda leaf: leaf.astype(jnp.float32), p)
    cases = {
        # A leaf of bfloat16 would round the float32 shift; the outer product has no leaf.
        "no leaf among them has a place for its value, float32[8]": (
            lambda p, x: by_hand(fine(p), x), half,
        ),
        "no leaf among them has a place for its value, float32[8,8]": (
            lambda p, x: x @ p["w"] @ jnp.outer(p["bn_mean"], 1 / p["bn_bias"]), params,
        ),
        "bn_scale, w has another use too": (
            lambda p, x: weight_norm(p, x) + x @ jnp.sin(p["w"]) * jnp.sin(p["bn_scale"]), params,
        ),
    }  # fmt: skip
    for why, (fn, given) in cases.items():
        with pytest.warns(UserWarning) as caught:
            small_fn, small = jc.quantize.fold_batch_norm(fn, given, [(MATRIX,)])
        assert why in str(caught[0].message) and len(caught) == 1, str(caught[0].message)
        np.testing.assert_allclose(small_fn(small, MATRIX), fn(given, MATRIX), atol=0.05)


def test_what_is_written_is_what_is_read():
    """A leaf that is rounded on its way, or that a loop's test reads, takes no other value."""
    p = {"w": normal(4, 4), **statistics(4)}
    p["bn_bias"] = p["bn_bias"] * 100
    scale = lambda q: q["bn_scale"] / np.sqrt(q["bn_var"] + 1e-3)
    q = {key: np.asarray(leaf, np.float64) for key, leaf in p.items()}
    x = np.asarray(MATRIX, np.float64)
    y = x @ q["w"]

    def rounded(dtype):
        def fn(p, x):
            y = x @ p["w"]
            scale = p["bn_scale"] * lax.rsqrt(p["bn_var"] + 1e-3)
            bias = p["bn_bias"].astype(dtype).astype(jnp.float32)
            return y * scale + (bias - p["bn_mean"] * scale), (y - p["bn_mean"]) * scale + bias

        return fn

    for dtype in (jnp.bfloat16, jnp.int32):
        fn = rounded(dtype)
        for which in (0, 1) if dtype == jnp.bfloat16 else (0,):
            one = lambda p, x, fn=fn, which=which: fn(p, x)[which]
            small_fn, small = jc.quantize.fold_batch_norm(one, p, [(MATRIX,)])
            bias = np.asarray(p["bn_bias"].astype(dtype), np.float64)
            want = (y - q["bn_mean"]) * scale(q) + bias
            np.testing.assert_allclose(small_fn(small, MATRIX), want, rtol=1e-5, atol=1e-4)
            assert set(small) == {"w", "bn_mean"}
    # Integers hold no sum of floats.
    whole = {**p, "bn_bias": jnp.arange(4)}
    one = lambda p, x: rounded(jnp.int32)(p, x)[1]
    small_fn, small = jc.quantize.fold_batch_norm(one, whole, [(MATRIX,)])
    want = (y - q["bn_mean"]) * scale(q) + np.arange(4)
    np.testing.assert_allclose(small_fn(small, MATRIX), want, rtol=1e-5, atol=1e-5)


def test_tests_of_loops_and_operations_of_several_results():
    p = {"w": normal(4, 4), **statistics(4)}
    p["bn_bias"] = jnp.array([3.0, -1.0, 1.0, 0.5])

    def counted(until, p, x):
        h = x @ p["w"]
        end = lambda: until(p, h)
        n = lax.while_loop(lambda c: c < end(), lambda c: c + 0.25, jnp.float32(0))
        return norm(p, h, "bn") + n

    q = {key: np.asarray(leaf, np.float64) for key, leaf in p.items()}
    h = np.asarray(MATRIX, np.float64) @ q["w"]
    y = (h - q["bn_mean"]) * q["bn_scale"] / np.sqrt(q["bn_var"] + 1e-5) + q["bn_bias"]
    ends = {"bn_bias": lambda p, h: p["bn_bias"][0], "h": lambda p, h: h.max()}
    for name, until in ends.items():
        fn = lambda p, x, until=until: counted(until, p, x)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            small_fn, small = jc.quantize.fold_batch_norm(fn, p, [(MATRIX,)])
        n = np.ceil(until(q, h) * 4) / 4
        np.testing.assert_allclose(small_fn(small, MATRIX), y + n, rtol=1e-5, atol=1e-5)
        assert len(caught) == (name == "h")

    def ordered(p, x):
        _, b = lax.sort((p["bn_mean"], p["bn_scale"]), num_keys=1)
        return x @ p["w"] + b / p["bn_var"] + x * p["bn_var"]

    with pytest.warns(UserWarning, match="bn_mean, bn_scale, bn_var: bn_var has another use too"):
        small_fn, small = jc.quantize.fold_batch_norm(ordered, p, [(MATRIX,)])
    b = q["bn_scale"][np.argsort(q["bn_mean"])]
    want = h + b / q["bn_var"] + np.asarray(MATRIX) * q["bn_var"]
    np.testing.assert_allclose(small_fn(small, MATRIX), want, rtol=1e-5, atol=1e-5)


def test_in_front_of_a_padded_convolution_and_others_are_folded():
    def fn(p, x):
        return padded(p, x), norm(p, x @ p["w"], "b2")

    params = {**P, "k": normal(3, 3, 4, 2)}
    with pytest.warns(UserWarning, match=r"not folded: bn_scale, bn_var: k behind it pads its in"):
        _, small = jc.quantize.fold_batch_norm(fn, params, [(IMAGE,)])
    assert set(params) - set(small) == {"b2_mean", "b2_scale", "b2_var", "bn_var"}


def test_norms_of_inputs_are_none():
    model = nn.Sequential([nn.Dense(6), nn.LayerNorm(), nn.Dense(3), nn.RMSNorm()])
    params = model.init(jax.random.key(0), MATRIX)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fn, small = jc.quantize.fold_batch_norm(model.apply, params, [(MATRIX,)])
    assert small is params or jax.tree.all(jax.tree.map(np.array_equal, small, params))
    assert fn == model.apply


@pytest.mark.broad
def test_compress_meets_a_budget_that_the_statistics_alone_would_exceed():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = nn.BatchNorm(use_running_average=True)
            return nn.Dense(4)(nn.relu(norm(nn.Dense(16, use_bias=False)(x))))

    variables = filled(Net().init(jax.random.key(0), MATRIX))
    fn, small = jc.quantize.fold_batch_norm(Net().apply, variables, [(MATRIX,)])
    # 128 weights of 2 bits; scales and biases of 20 outputs
    least = 128 // 4 + 20 * 4 + 20 * 4
    codes = jc.by_path({".*kernel": jc.quantize.weights(jc.formats.integer(2), axis=-1)})
    size = lambda p: jc.packed_bytes(codes.pack(p, codes.init(p)))
    assert size(small) == least and size(variables) == least + 16 * 3 * 4
    found = jc.search.compress(
        fn,
        small,
        [(MATRIX,)],
        device="stm32h743",
        budget=jc.Budget(weight_bytes=least + 60),
        candidates=1,
    )
    assert jc.packed_bytes(found.packed) <= least + 60


def test_errors():
    params = {"w": normal(4, 8), "b": normal(8), "out": normal(8, 2), **statistics(8)}
    with pytest.raises(ValueError, match="data is empty"):
        jc.quantize.fold_batch_norm(dense, params, [])
    fn, small = jc.quantize.fold_batch_norm(dense, params, [(MATRIX,)])
    with pytest.raises(ValueError, match="params has besides 'b'"):
        fn(params, MATRIX)
    with pytest.raises(ValueError, match="params lacks 'w'"):
        fn({k: v for k, v in small.items() if k != "w"}, MATRIX)

    def shaped(p, x):
        return dense(p, jnp.tanh(x) if len(x) > 3 else x)

    fn, small = jc.quantize.fold_batch_norm(shaped, params, [(MATRIX,)])
    with pytest.raises(ValueError, match="fold it with such inputs"):
        fn(small, MATRIX[:2])


def test_transforms():
    params = {"w": normal(4, 8), "b": normal(8), "out": normal(8, 2), **statistics(8)}
    fn, small = jc.quantize.fold_batch_norm(dense, params, [(MATRIX,)])
    want = dense(params, MATRIX)
    np.testing.assert_allclose(jax.jit(fn)(small, MATRIX), want, rtol=1e-4, atol=1e-5)
    each = jax.vmap(fn, (None, 0))(small, MATRIX[:, None])[:, 0]
    np.testing.assert_allclose(each, want, rtol=1e-4, atol=1e-5)
    loss = lambda fn: lambda p: jnp.sum(fn(p, MATRIX) ** 2)
    got, old = jax.grad(loss(fn))(small)["out"], jax.grad(loss(dense))(params)["out"]
    np.testing.assert_allclose(got, old, rtol=1e-4, atol=1e-3)


def test_exporters_and_methods_take_what_is_folded(tmp_path):
    params = {"w": normal(4, 6), "b": normal(6), "out": normal(6, 2), **statistics(6)}
    p = {key: np.asarray(leaf, np.float64) for key, leaf in params.items()}
    x = np.asarray(MATRIX, np.float64)
    hidden = (x @ p["w"] + p["b"] - p["bn_mean"]) / np.sqrt(p["bn_var"] + 1e-5)
    want = np.maximum(hidden * p["bn_scale"] + p["bn_bias"], 0) @ p["out"]

    def net(p, x):
        return jax.nn.relu(norm(p, x @ p["w"] + p["b"], "bn")) @ p["out"]

    fn, small = jc.quantize.fold_batch_norm(net, params, [(MATRIX,)])
    size = jc.packed_bytes(small)
    assert size == 4 * (4 * 6 + 6 + 6 * 2)
    assert jc.cost.estimate(fn, small, MATRIX, device="stm32h743").weight_bytes == size

    def close(got, share):
        np.testing.assert_allclose(np.asarray(got), want, atol=share * np.abs(want).max())

    spec = {"w|out": jc.quantize.Spec(jc.formats.integer(8), axis=-1)}
    new, state = jc.quantize.gptq(fn, small, [(MATRIX,)], spec)
    packed = jc.quantize.recipe(spec).pack(new, state)
    close(fn(jc.unpack(packed), MATRIX), 0.02)
    program = jc.quantize.integer_only(fn, small, [(MATRIX,)])
    close(program.dequantize(program.run(program.quantize_input(MATRIX))), 0.05)
    writers = {"stablehlo": jc.export.stablehlo, "onnx": jc.export.onnx}
    if importlib.util.find_spec("ai_edge_litert") and importlib.util.find_spec("litert_converter"):
        writers["tflite"] = jc.export.litert
    for suffix, write in writers.items():
        path = tmp_path / f"f.{suffix}"
        write(fn, small, MATRIX, path=path)
        close(jc.export.session(path).run(np.asarray(MATRIX))[0], 1e-5)
