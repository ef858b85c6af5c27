"""Every lowering to ONNX gives JAX's numbers in ONNX Runtime."""

import functools
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import jaxcompress as jc
from jaxcompress.export.onnx_format import onnx_graph

EMPTY: dict = {}
# The tests run the files themselves.
export = functools.partial(jc.export.onnx, verify=False)


def session(path):
    """A quiet session on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(path, *inputs) -> list[Any]:
    """The results of a file."""
    found = session(path)
    names = [port.name for port in found.get_inputs()]
    given = {n: np.asarray(x) for n, x in zip(names, inputs, strict=True)}
    return [np.asarray(y) for y in found.run(None, given)]


def check(fn, params, *inputs, tmp_path, atol=1e-5, shapes: str | None = "batch, ..."):
    """Exports, runs and compares with JAX; the same with one row less. Gives the report."""
    path = tmp_path / "f.onnx"
    report = export(fn, params, *inputs, path=path, shapes=shapes)
    several = [inputs] if shapes is None else [inputs, tuple(x[:-1] for x in inputs)]
    for given in several:
        want = jax.tree.leaves(fn(jc.unpack(params), *given))
        found = run(report.path, *given)
        for a, b in zip(found, want, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol)
    return report


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def identities(x):
    """x, by way of all identities that a network outside of a mesh may say."""
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    x = lax.with_sharding_constraint(jax.device_put(lax.stop_gradient(x), one), one)
    return checkpoint_name(lax.copy_p.bind(lax.optimization_barrier((x, 2 * x))[0]), "name")


def horner(x, coefficients):
    """A polynomial, which newer versions of JAX have as a primitive."""
    return functools.reduce(lambda sum_, a: sum_ * x + a, reversed(coefficients))


ELEMENTWISE = {
    "arithmetic": lambda x: (x + 2.0) * x - x / 3.0 + (-x),
    "extremes": lambda x: jnp.maximum(x, 0.3) + jnp.minimum(x, -x),
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "clip": lambda x: jnp.clip(x, -x, 0.5 * x + 1.0),
    "exp": lambda x: jnp.exp(x) + jnp.exp2(x),
    "expm1": lambda x: jnp.expm1(1e-3 * x) + jnp.expm1(x),
    "log": lambda x: jnp.log(jnp.abs(x) + 0.1),
    "log1p": lambda x: 1e6 * jnp.log1p(1e-6 * jnp.abs(x)) + jnp.log1p(jnp.abs(x)),
    "softplus": jax.nn.softplus,
    "sigmoid": lambda x: jax.nn.sigmoid(x) + jax.nn.silu(x),
    "hard_swish": jax.nn.hard_swish,
    "tanh": jnp.tanh,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": jax.nn.gelu,
    "erf": lax.erf,
    "elu": jax.nn.elu,
    "powers": lambda x: x**2 + x**3 + jnp.abs(x) ** 0.5 + 1.0 / (1.0 + x**2) + x**-1,
    "power": lambda x: jnp.power(jnp.abs(x), x),
    "roots": lambda x: lax.rsqrt(jnp.square(x) + 1.0) + jnp.sqrt(jnp.abs(x)) + jnp.cbrt(x),
    "rounding": lambda x: jnp.floor(x) + jnp.ceil(x) + jnp.round(2 * x) + jnp.sign(x),
    "away": lambda x: lax.round(x, lax.RoundingMethod.AWAY_FROM_ZERO),
    "trigonometry": lambda x: jnp.sin(x) * jnp.cos(x) + jnp.tan(0.1 * x) + jnp.arctan(x),
    "compare": lambda x: jnp.stack([x > 0, x >= 0, x < 0.1, x <= 0.1, x == x, x != 0.0]),
    "logic": lambda x: ((x > 0) & (x < 1)) | ~(x > -1) ^ (x > 2),
    "where": lambda x: jnp.where(x > 0, x, 0.01 * x),
    "finite": lambda x: jnp.isfinite(x / jnp.floor(jnp.abs(x))),
    "remainder": lambda x: lax.rem(x, jnp.full_like(x, 0.3)),
    "integers": lambda x: (3 * x).astype(jnp.int32) // 2 + (x > 0).astype(jnp.int32),
    "bools": lambda x: jnp.where(x > 0, x > 1, x < -1) != (x < 0.5),
    "bits": lambda x: (x.astype(jnp.int32) & 3) | ~x.astype(jnp.int32),
    "counts": lambda x: jnp.sum(x.astype(jnp.int32), 1) // 7 + jnp.cumsum(x > 0, axis=1)[:, 0],
    "softmax": lambda x: jax.nn.softmax(x, axis=-1),
    "log_softmax": lambda x: jax.nn.log_softmax(x, axis=-1),
    "stop": lambda x: lax.stop_gradient(x) + lax.reduce_precision(x, 8, 23),
    "fewer digits": lambda x: lax.reduce_precision(x, 8, 7) + lax.reduce_precision(x, 5, 10),
    "identities": lambda x: identities(x) @ identities(jnp.full((7, 2), 0.25)),
    "log2": lambda x: jnp.log2(jnp.abs(x) + 0.1),
    "tanh squared": lambda x: getattr(lax, "one_minus_square", lambda x: 1 - x * x)(jnp.tanh(x)),
    "polynomial": lambda x: getattr(lax, "polynomial", horner)(x, (jnp.cos(x), 0.5 + 0 * x, x)),
    "polyval": lambda x: jnp.polyval(jnp.array([0.5, -2.0, 3.0]), x),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise(name, tmp_path):
    fn = ELEMENTWISE[name]
    check(lambda p, x: fn(x), EMPTY, 2 * normal(5, 7), tmp_path=tmp_path)


IMAGES = (3, 6, 8, 4)  # [B, H, W, C]
VIEWS = {
    "transpose": lambda x: jnp.transpose(x, (0, 3, 2, 1)) + 1.0,
    "there_and_back": lambda x: jnp.tanh(x.transpose(3, 0, 2, 1)).transpose(1, 3, 2, 0),
    "reshape": lambda x: x.reshape(x.shape[0], 48, 4),
    "flat": lambda x: x.reshape(x.shape[0], -1),
    "rows": lambda x: x.reshape(-1, 4),
    "expand": lambda x: x[:, None, :, :, :, None] * 2.0,
    "squeeze": lambda x: jnp.squeeze(x[:, :1, :, 2:3], (1, 3)),
    "broadcast": lambda x: x[:, :1] + jnp.zeros((1, 5, 8, 4)) + jnp.sum(x, 3, keepdims=True)[:, :1],
    "broadcast_result": lambda x: jnp.broadcast_to(x[:, :1], (x.shape[0], 3, 8, 4)),
    "slice": lambda x: x[:, 1:5:2, ::-1, -2:],
    "strides": lambda x: x[:, ::2, ::3],
    "one": lambda x: x[:, 2] + x[:, 0],
    "last": lambda x: x[..., -1],
    "at_places": lambda x: x[:, jnp.array([0, 3, 1])][..., jnp.array([1, 1])],
    "dynamic_slice": lambda x: lax.dynamic_slice_in_dim(x, 2, 3, 1),
    "pad": lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 3), (2, 0)), constant_values=0.5),
    "crop": lambda x: lax.pad(x, jnp.float32(0), ((0, 0, 0), (-1, 2, 0), (1, -2, 0), (0, 0, 0))),
    "pad between": lambda x: lax.pad(
        x, jnp.float32(7), ((0, 0, 0), (1, -2, 2), (0, 3, 1), (-1, 0, 0))
    ),
    "pad by the batch": lambda x: jnp.pad(x[:, 0, 0], ((1, x.shape[0]), (0, 0))),
    "pad the batch": lambda x: lax.pad(x[:, 0, 0], jnp.float32(1), ((0, 1, 1), (0, 0, 0))),
    "tile": lambda x: jnp.tile(x, (2, 1, 3, 1)) + jnp.tile(x[:, :1], (2, 6, 3, 1)),
    "broadcast_to": lambda x: jnp.broadcast_to(x, (2, *x.shape)) * 2.0,
    "repeated, then moved": lambda x: (
        jnp.broadcast_to(x[:, :1, None], (x.shape[0], 2, 3, 8, 4))[:, 1:, ::-1].reshape(-1, 12, 8)
    ),
    "unstack": lambda x: sum(jnp.unstack(x, axis=1)) + jnp.unstack(x, axis=1)[2],
    "stack and unstack": lambda x: jnp.unstack(jnp.stack([x, 2 * x], axis=-1), axis=2)[1],
    "stack of others": lambda x: jnp.stack([x[..., 0], jnp.ones_like(x[..., 0])], axis=1),
    "permuting reshape": lambda x: lax.reshape(x, (4, x.shape[0] * 48), (3, 0, 1, 2)),
    "concatenate": lambda x: jnp.concatenate([x, 2 * x, jnp.ones_like(x)[:, :1]], axis=1),
    "stack": lambda x: jnp.stack([x, -x], axis=2),
    "split": lambda x: jnp.split(x, [1, 3], axis=3)[1] * jnp.split(x, 2, axis=3)[0],
    "flip": lambda x: jnp.flip(x, (1, 3)),
    "sums": lambda x: jnp.sum(x, (1, 2)) + jnp.mean(x, (1, 2)),
    "mean_kept": lambda x: x - jnp.mean(x, -1, keepdims=True),
    "products": lambda x: jnp.prod(x, 3),
    "extremes": lambda x: jnp.max(x, (1, 3)) - jnp.min(x, (1, 3)),
    "all_any": lambda x: jnp.all(x > -1, 3) ^ jnp.any(x > 1, 3),
    "argmax": lambda x: jnp.argmax(x, -1)[:, :4, :4] + jnp.argmin(x, 1)[:, :4],
    "cumsum": lambda x: jnp.cumsum(x, 1) + lax.cumsum(x, 2, reverse=True),
    "iota": lambda x: x * jnp.arange(4, dtype=jnp.float32).reshape(1, 1, 1, 4),
    "rows_numbered": lambda x: x[..., 0, 0] + jnp.arange(x.shape[0])[:, None].astype(jnp.float32),
    "computed_sizes": lambda x: (
        jnp.arange(2 * x.shape[0] + 1) + jnp.asarray(x.shape[0] % 2 - x.shape[0] // 2, jnp.int32)
    ),
    "size": lambda x: x * jnp.asarray(x.shape[0], jnp.float32) + jnp.mean(x),
    "max_pool": lambda x: lax.reduce_window(
        x, -jnp.inf, lax.max, (1, 3, 2, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (0, 0), (0, 0))
    ),
    "sum_pool": lambda x: lax.reduce_window(
        x, 0.0, lax.add, (1, 3, 3, 1), (1, 2, 1, 1), ((0, 0), (1, 1), (1, 1), (0, 0))
    ),
    "dilated_pool": lambda x: lax.reduce_window(
        x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 1, 1, 1), "VALID", window_dilation=(1, 2, 3, 1)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("after", ["as it is", "in another order"])
def test_views_and_reductions(name, after, tmp_path):
    fn = VIEWS[name]
    # Transposed twice, the tensor lies in another order than the value.
    lazy = lambda x: jnp.transpose(jnp.tanh(jnp.transpose(x, (0, 3, 1, 2))), (0, 2, 3, 1))
    run_it = (lambda p, x: fn(x)) if after == "as it is" else (lambda p, x: fn(lazy(x)))
    check(run_it, EMPTY, normal(*IMAGES), tmp_path=tmp_path)


CONVOLUTIONS = {
    "same": dict(window_strides=(1, 1), padding="SAME"),
    "strided": dict(window_strides=(2, 1), padding=((0, 1), (2, 0))),
    "dilated": dict(window_strides=(1, 1), padding="VALID", rhs_dilation=(2, 1)),
    "transposed": dict(window_strides=(1, 1), padding=((1, 2), (2, 1)), lhs_dilation=(2, 2)),
    "transposed_more": dict(window_strides=(1, 1), padding=((2, 3), (1, 2)), lhs_dilation=(2, 2)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolutions(name, groups, tmp_path):
    params = {"w": normal(3, 3, 4 // groups, 8), "b": normal(8, seed=1)}
    conv = functools.partial(
        lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups, **CONVOLUTIONS[name],
    )  # fmt: skip
    fn = lambda p, x: jax.nn.relu(conv(x, p["w"]) + p["b"].reshape(1, 1, 1, -1)) + 1.0
    report = check(fn, params, normal(3, 7, 6, 4), tmp_path=tmp_path, atol=1e-4)
    op = "ConvTranspose" if name.startswith("trans") else "Conv"
    assert report.nodes[op] == 1 and report.nodes["Add"] == 1  # the bias is the convolution's
    assert report.nodes["Transpose"] == 2  # of the input and of the result


def test_other_layouts_and_ranks(tmp_path):
    params = {"w": normal(5, 4, 3), "v": normal(2, 3, 3, 3, 5)}
    one = lambda p, x: lax.conv_general_dilated(
        x, p["w"], (1,), "VALID", dimension_numbers=("NCH", "OIH", "NCH")
    )
    report = check(one, params, normal(2, 4, 9), tmp_path=tmp_path, atol=1e-4)
    assert "Transpose" not in report.nodes
    three = lambda p, x: lax.conv_general_dilated(
        x, p["v"], (1, 2, 1), "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )
    check(three, params, normal(2, 4, 5, 6, 3), tmp_path=tmp_path, atol=1e-4)


PRODUCTS = {
    "dense": ("btd,de->bte", (3, 5, 4), (4, 6)),
    "weight_first": ("de,bd->eb", (4, 6), (3, 4)),
    "heads_in": ("btd,dhe->bthe", (3, 5, 4), (4, 2, 3)),
    "heads_out": ("bthe,hed->btd", (3, 5, 2, 4), (2, 4, 6)),
    "scores": ("bthd,bshd->bhts", (3, 5, 2, 4), (3, 6, 2, 4)),
    "mixed": ("bhts,bshd->bthd", (3, 2, 5, 6), (3, 6, 2, 4)),
    "several": ("bij,bijk->bk", (3, 4, 5), (3, 4, 5, 2)),
    "outer": ("bi,bj->bij", (3, 4), (3, 5)),
    "inner": ("bi,bi->b", (3, 4), (3, 4)),
}


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("known", [True, False])
def test_products(name, known, tmp_path):
    spec, left, right = PRODUCTS[name]
    a, b = normal(*left), normal(*right, seed=1)
    if not known:
        fn = lambda p, a, b: jnp.einsum(spec, a, b)
        batched = spec.split(",")[1].startswith("b") and spec.startswith("b")
        shapes = "batch, ..." if batched else None
        check(fn, EMPTY, a, b, tmp_path=tmp_path, shapes=shapes)
        return
    first = name == "weight_first"
    params, x = ({"w": a}, b) if first else ({"w": b}, a)
    fn = lambda p, x: jnp.einsum(spec, *((p["w"], x) if first else (x, p["w"])))
    free = "b" not in spec.split("->")[0].split(",")[0 if first else 1]
    check(fn, params, x, tmp_path=tmp_path, shapes="batch, ..." if free else None)


def test_products_of_other_dtypes(tmp_path):
    w = jnp.asarray(np.arange(-6, 6).reshape(4, 3), jnp.int8)
    fn = lambda p, x: lax.dot_general(
        x.astype(jnp.int8), p["w"], (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32
    )
    check(fn, {"w": w}, 40 * normal(5, 4), tmp_path=tmp_path)
    half = lambda p, x: jnp.tanh(x.astype(jnp.float16) @ p["w"]).astype(jnp.float32)
    params = {"w": normal(4, 3).astype(jnp.float16)}
    check(half, params, normal(5, 4), tmp_path=tmp_path, atol=1e-2)


@pytest.mark.parametrize("mode", ["fill", "clip"])
def test_lookup(mode, tmp_path):
    params = {"table": normal(9, 4)}
    ids = jnp.array([[0, 8, 3], [2, -1, 5]], jnp.int32)
    fn = lambda p, ids: 2.0 * jnp.take(p["table"], ids, axis=0, mode=mode)
    check(fn, params, ids, tmp_path=tmp_path)
    other = lambda p, ids: jnp.take(p["table"], ids, axis=1, mode=mode)
    check(other, params, ids % 4, tmp_path=tmp_path, shapes=None)


def test_a_live_start(tmp_path):
    fn = lambda p, x, at: lax.dynamic_slice(x, (0, at, 0), (x.shape[0], 2, 3))
    x = normal(2, 6, 3)
    for at in (-3, 1, 5, 9):
        check(fn, EMPTY, x, jnp.int32(at), tmp_path=tmp_path, shapes=None)


def layers(params, x):
    step = lambda x, w: (jnp.tanh(x @ w), jnp.sum(x, axis=1))
    x, sums = lax.scan(step, x, params["w"])
    return {"y": x, "sums": sums}


def test_scans_are_unrolled(tmp_path):
    params = {"w": normal(3, 4, 4)}
    report = check(layers, params, normal(5, 4), tmp_path=tmp_path)
    assert report.nodes["MatMul"] == 3
    assert [port.name for port in report.outputs] == ["sums", "y"]
    back = lambda p, x: lax.scan(lambda c, w: (c @ w, c), x, p["w"], reverse=True)
    check(back, params, normal(5, 4), tmp_path=tmp_path)
    long = lambda p, x: lax.scan(lambda c, _: (c * 1.01, None), x, length=65)[0]
    with pytest.raises(ValueError, match="more than 64 trips"):
        export(long, EMPTY, normal(2, 3), path=tmp_path / "g.onnx")


def test_sizes_with_names(tmp_path):
    def fn(params, ids, mask):
        x = params["table"][ids] + params["place"][jnp.arange(ids.shape[1])][None]
        scores = jnp.einsum("btd,bsd->bts", x, x)
        scores = jnp.where(mask[:, None] > 0, scores, jnp.finfo(jnp.float32).min)
        y = jnp.einsum("bts,bsd->btd", jax.nn.softmax(scores, axis=-1), x)
        return y.reshape(-1, 2, 2), jnp.mean(y, axis=1)

    params = {"table": normal(9, 4), "place": normal(16, 4)}
    shape = jax.ShapeDtypeStruct((2, 5), jnp.int32)
    path = tmp_path / "f.onnx"
    report = export(
        fn, params, shape, shape, path=path, shapes="batch, time", constraints=["time <= 16"]
    )
    assert [(p.name, p.shape) for p in report.inputs] == [
        ("ids", ("batch", "time")), ("mask", ("batch", "time")),
    ]  # fmt: skip
    rng = np.random.default_rng(0)
    for batch, time in [(1, 3), (4, 16), (2, 1)]:
        ids = rng.integers(0, 9, (batch, time)).astype(np.int32)
        mask = (rng.random((batch, time)) < 0.8).astype(np.int32)
        want = fn(params, jnp.asarray(ids), jnp.asarray(mask))
        for a, b in zip(run(path, ids, mask), want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_shared_and_trivial_results(tmp_path):
    fn = lambda p, x: {"x": x, "one": jnp.ones(3), "again": (x + 1.0, x + 1.0)}
    report = check(fn, EMPTY, normal(4, 2), tmp_path=tmp_path)
    assert len({port.name for port in (*report.inputs, *report.outputs)}) == 5
    assert report.nodes["Add"] == 1  # equal nodes are there once


def test_the_report_is_the_file(tmp_path):
    report = export(
        lambda p, x: jax.nn.relu(x @ p["w"]), {"w": normal(3, 2)}, normal(4, 3),
        path=tmp_path / "new" / "f.onnx", shapes=None,
    )  # fmt: skip
    model = onnx.load(report.path)
    assert report.file_bytes == report.path.stat().st_size
    assert model.opset_import[0].version == report.opset == 19
    assert dict(report.nodes) == {"Identity": 1, "MatMul": 1, "Relu": 1}
    assert report.inputs[0].shape == (4, 3) and report.outputs[0].shape == (4, 2)
    assert not model.graph.value_info


@pytest.mark.parametrize("kind", ["linen", "nnx", "equinox"])
def test_libraries(kind, tmp_path):
    import equinox
    from flax import linen, nnx

    x = normal(3, 6)
    if kind == "linen":
        model = linen.Sequential([linen.Dense(8), linen.gelu, linen.LayerNorm(), linen.Dense(2)])
        variables = model.init(jax.random.key(0), x)
        fn, params = (lambda p, x: model.apply(p, x)), variables
    elif kind == "nnx":
        graph, params = nnx.split(nnx.Linear(6, 2, rngs=nnx.Rngs(0)))
        fn = lambda p, x: nnx.merge(graph, p)(x)
    else:
        net = equinox.nn.MLP(6, 2, 5, 1, key=jax.random.key(0))
        params, static = equinox.partition(net, equinox.is_array)
        fn = lambda p, x: jax.vmap(equinox.combine(p, static))(x)
    check(fn, params, x, tmp_path=tmp_path)


ERRORS = {
    "sort": (lambda p, x: jnp.sort(x), r"sort at .*float32\[batch,3\].*no lowering"),
    "while": (lambda p, x: lax.while_loop(lambda x: jnp.sum(x) < 9.0, jnp.exp, x), "while.*no low"),
    "batch": (
        lambda p, x: x if x.shape[0] == 2 * (x.shape[0] // 2) else jnp.sort(x), "traced|no low"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_write_nothing(name, tmp_path):
    fn, message = ERRORS[name]
    scoped = lambda p, x: jax.named_scope("block")(fn)(p, x)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        export(scoped, EMPTY, normal(2, 3), path=tmp_path / "f.onnx")
    assert not list(tmp_path.iterdir())


def test_bad_arguments(tmp_path):
    path, fn, x = tmp_path / "f.onnx", (lambda p, x: x), normal(2, 3)
    with pytest.raises(TypeError, match="needs the inputs"):
        export(fn, EMPTY, path=path)
    with pytest.raises(ValueError, match=r"products.*must be one of"):
        export(fn, EMPTY, x, path=path, products="int8")  # type: ignore
    with pytest.raises(ValueError, match=r"activations.*must be one of"):
        export(fn, EMPTY, x, path=path, activations="int4")  # type: ignore
    fixed = lambda p, x: x.reshape(6) if x.shape[0] > 1 else x.reshape(3)
    with pytest.raises(ValueError, match="(?s)free sizes 'batch.*shapes=None"):
        export(fixed, EMPTY, x, path=path)
    check(fixed, EMPTY, x, tmp_path=tmp_path, shapes=None)


def test_a_failed_export_leaves_the_old_file(tmp_path):
    path = tmp_path / "f.onnx"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="no lowering"):
        export(lambda p, x: jnp.sort(x), EMPTY, normal(2, 3), path=path)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_too_large_for_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_graph, "_MOST_BYTES", 100)
    with pytest.raises(ValueError, match="2 GiB, the constants have 144 bytes"):
        export(lambda p, x: x @ p, normal(6, 6), normal(2, 6), path=tmp_path / "f.onnx")
    assert not list(tmp_path.iterdir())


def test_sizes_that_no_input_has(tmp_path):
    fn = lambda p, x: x + jnp.arange(x.shape[0] // 2).astype(jnp.float32).sum()
    with pytest.raises(ValueError, match="'half' is no size of an input by itself"):
        export(fn, EMPTY, normal(4), path=tmp_path / "f.onnx", shapes="2*half")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r'pip install "jaxcompress\[export\]"'):
        export(lambda p, x: x, EMPTY, normal(2, 3), path=tmp_path / "f.onnx")


def test_the_import_is_light():
    code = "import sys, jaxcompress; assert not {'onnx', 'onnxruntime'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
