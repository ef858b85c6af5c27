"""LiteRT files against the runtime, the simulation and NumPy; reports and errors."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

import jaxcompress as jc
from jaxcompress.core.packed import quantize
from jaxcompress.export.litert_format.marked_program import marked_program
from jaxcompress.export.litert_format.marked_weights import marked_weights
from jaxcompress.formats import granularity_for, integer
from jaxcompress.formats.scales import QParams
from tests._models import equinox_mlp, nnx_cnn, transformer

pytest.importorskip("litert_converter")
interpreter = pytest.importorskip("ai_edge_litert.interpreter")


def run(report, *inputs, kernels="AUTO"):
    """The first output of a file for inputs in the order of the report."""
    runtime = interpreter.Interpreter(
        model_path=str(report.path),
        num_threads=1,
        experimental_op_resolver_type=interpreter.OpResolverType[kernels],
    )
    runtime.allocate_tensors()
    for port, x in zip(runtime.get_input_details(), inputs, strict=True):
        runtime.set_tensor(port["index"], np.asarray(x))
    runtime.invoke()
    return runtime.get_tensor(runtime.get_output_details()[0]["index"])


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def pack(params, bits, *, axis: Any = -1, names=".*", group=None, **rules):
    how = jc.quantize.weights(integer(bits), axis=axis, group=group)
    recipe = jc.by_path({names: how, **rules}, default=jc.identity())
    return recipe.pack(params, recipe.init(params))


def types(report):
    return {(o.name, *o.inputs) for o in report.operators}


def close(a, b, tolerance=2e-6):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


class Cnn(nn.Module):
    """Convolution, BatchNorm, depthwise, a shortcut, pooling, dense."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(8, (3, 3))(x)))
        y = nn.relu(nn.Conv(8, (3, 3), feature_group_count=8)(x))
        x = nn.max_pool(nn.relu(x + nn.Conv(8, (1, 1))(y)), (2, 2), (2, 2))
        return nn.Dense(5)(x.mean((1, 2)))


CNN = Cnn()


@pytest.fixture(scope="module")
def cnn():
    x = normal(0, 4, 8, 8, 3)
    variables = CNN.init(jax.random.key(0), x)
    return lambda v, x: CNN.apply(v, x), variables, x


@pytest.fixture(scope="module", params=[8, 4])
def program(request, cnn):
    fn, variables, x = cnn
    return jc.quantize.integer_only(fn, variables, [x], weights=integer(request.param)), x


def test_a_program_is_in_integers_from_end_to_end(program, tmp_path):
    program, x = program
    report = jc.export.litert(program, x, path=tmp_path / "a.tflite")
    assert report.file_bytes == report.path.stat().st_size
    assert report.integer
    for operator in report.operators:
        if operator.name not in ("QUANTIZE", "DEQUANTIZE"):
            assert set(operator.inputs) | set(operator.outputs) <= {"int8", "int4", "int32"}
    kinds = {operator.name for operator in report.operators}
    assert {"CONV_2D", "DEPTHWISE_CONV_2D", "ADD", "MAX_POOL_2D", "FULLY_CONNECTED"} <= kinds
    step = float(program.grids[program.output].qparams.scale)
    apart = np.abs(run(report, x) - np.asarray(marked_program(program)(x))) / step
    assert apart.max() < 1.01 and (apart > 0.5).mean() < 0.2
    (given,), (found,) = report.inputs, report.outputs
    assert given[:3] == ("x", "float32", (4, 8, 8, 3)) and found[:3] == ("y", "float32", (4, 5))
    assert jc.export.litert(program, path=tmp_path / "b.tflite", verify=False).inputs[0].shape == (
        1,
        8,
        8,
        3,
    )


def test_the_int8_interface_takes_codes(program, tmp_path):
    program, x = program
    wide = jc.export.litert(program, x, path=tmp_path / "a.tflite", verify=False)
    report = jc.export.litert(
        program,
        x,
        path=tmp_path / "b.tflite",
        interface="int8",
        input_names=["image"],
        verify=False,
    )
    assert report.integer and not {"QUANTIZE", "DEQUANTIZE"} & {o.name for o in report.operators}
    (given,), (found,) = report.inputs, report.outputs
    grid = program.grids[0].qparams
    assert (given.name, given.dtype) == ("image", "int8")
    assert given.scale == float(grid.scale) and given.zero_point == int(grid.zero_point) - 128
    codes = np.asarray(program.quantize_input(x)).astype(np.int16) - 128
    y = run(report, codes.astype(np.int8)).astype(np.float32)
    assert found.scale is not None and found.zero_point is not None
    np.testing.assert_allclose((y - found.zero_point) * found.scale, run(wide, x), atol=1e-6)
    # The signature still names the tensors that are left.
    runtime = interpreter.Interpreter(model_path=str(report.path), num_threads=1)
    runner = runtime.get_signature_runner()
    np.testing.assert_array_equal(runner(image=codes.astype(np.int8))["y"], y)


def test_a_dense_layer_on_dynamic_grids_is_numpys(tmp_path):
    w, x = normal(1, 24, 6), 3.0 * normal(2, 5, 24).at[3].set(0.0)
    packed = pack({"w": w}, 8)
    report = jc.export.litert(
        lambda p, x: x @ p["w"], packed, x, path=tmp_path / "a.tflite", activations="dynamic"
    )
    assert types(report) == {("FULLY_CONNECTED", "float32", "int8")}
    rows = np.asarray(x, np.float64)
    low, high = np.minimum(rows.min(1), 0), np.maximum(rows.max(1), 0)
    step = np.where(high > low, (high - low) / 255, 1.0)
    zero = np.rint(-128 - low / step)
    codes = np.clip(np.rint(rows / step[:, None]) + zero[:, None], -128, 127)
    want = (codes - zero[:, None]) * step[:, None] @ np.asarray(jc.unpack(packed)["w"], np.float64)
    # One code may fall on the other side of a tie of float32.
    assert np.abs(run(report, x) - want).max() < 1.1 * step.max() * np.abs(np.asarray(w)).max()
    assert np.median(np.abs(run(report, x) - want)) < 1e-5


def linen_attention():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
            return x + nn.Dense(8)(nn.gelu(nn.Dense(16)(x)))

    block, x = Block(), normal(3, 2, 5, 8)
    params = block.init(jax.random.key(1), x)["params"]
    return lambda p, x: block.apply({"params": p}, x), params, x, {"names": ".*kernel"}


def scanned():
    model = transformer(layers=2)
    return model.apply, model.params, model.x, {"names": ".*(query|key|value|out|up|down)",
                                                "axis": (0, -1)}  # fmt: skip


def nnx():
    return *nnx_cnn(), {"names": ".*kernel"}


def vmapped():
    return *equinox_mlp(), {"names": ".*weight", "axis": 0}


def lookup():
    params = {"table": normal(4, 9, 6), "kernel": normal(5, 6, 3)}
    fn = lambda p, i: jnp.take(p["table"], i, axis=0) @ p["kernel"]
    return fn, params, jnp.array([[0, 8, 3]], jnp.int32), {"table": jc.quantize.weights(
        integer(8), axis=0), "names": "kernel"}  # fmt: skip


NETWORKS = [(linen_attention, 4), (scanned, 8), (nnx, 4), (vmapped, 8), (lookup, 8)]
OTHERS = [(network, 12 - bits) for network, bits in NETWORKS]


@pytest.mark.parametrize(
    "network, bits",
    [*NETWORKS, *(pytest.param(*other, marks=pytest.mark.broad) for other in OTHERS)],
)
def test_dynamic_grids_and_stored_weights(network, bits, tmp_path):
    fn, params, x, how = network()
    packed = pack(params, bits, **how)
    path = tmp_path / "a.tflite"
    stored = jc.export.litert(fn, packed, x, path=path, verify=False)
    close(run(stored, x), fn(jc.unpack(packed), x))
    assert any(name == "DEQUANTIZE" and f"int{bits}" in rest for name, *rest in types(stored))
    report = jc.export.litert(fn, packed, x, path=path, activations="dynamic", verify=False)
    close(run(report, x), jax.jit(marked_weights(fn, packed, dynamic=True))(x))
    dense = {t for t in types(report) if t[0] == "FULLY_CONNECTED"}
    assert dense and all(f"int{bits}" in t for t in dense)
    assert not report.integer


def test_bytes_of_a_dense_stack(tmp_path):
    params = {f"layer{i}": normal(i, 256, 256) for i in range(3)}

    def fn(p, x):
        for w in p.values():
            x = jax.nn.relu(x @ w)
        return x

    x = normal(9, 1, 256)
    path = tmp_path / "a.tflite"
    bytes = [jc.export.litert(fn, params, x, path=path, verify=False).file_bytes]
    for bits in (8, 4):
        report = jc.export.litert(fn, pack(params, bits), x, path=path, verify=False)
        bytes.append(report.file_bytes)
    # 4 bytes, 1 and a half per weight, scales and tables besides.
    assert bytes[0] > 4 * 3 * 256**2
    assert bytes[1] < 0.27 * bytes[0] and bytes[2] < 0.145 * bytes[0]


def test_activations_on_their_grids(tmp_path):
    params = {"a": normal(1, 8, 16), "b": normal(2, 16, 4)}
    fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    x, packed = normal(3, 6, 8), pack(params, 8)
    act = jc.quantize.activations(fn, integer(8, symmetric=False))
    grids = jc.quantize.calibrate_activations(act, jc.unpack(packed), [(x,)])
    report = jc.export.litert(
        fn, packed, x, path=tmp_path / "a.tflite", activations=grids, verify=False
    )
    # The first layer lies between two grids, the last one has none behind it.
    assert ("FULLY_CONNECTED", "int8", "int8") in {t[:3] for t in types(report)}
    step = (
        np.asarray(grids["b"].qparams.scale).item() * np.abs(np.asarray(params["b"])).sum(0).max()
    )
    assert np.abs(run(report, x) - act.apply(grids, jc.unpack(packed), x)).max() < 0.1 * step


def test_inputs_outputs_and_names(tmp_path):
    fn = lambda p, a, b, unused: {"sum": (a + b) * p, "difference": a - b}
    a, b = normal(1, 2, 3), normal(2, 2, 3)
    report = jc.export.litert(
        fn, jnp.float32(2), a, b, b, path=tmp_path / "deep" / "a.tflite",
        input_names=["z", "b", "a"], output_names=["difference", "sum"],
    )  # fmt: skip
    assert [port.name for port in report.inputs] == ["z", "b", "a"]
    assert [port.name for port in report.outputs] == ["difference", "sum"]
    runtime = interpreter.Interpreter(model_path=str(report.path), num_threads=1)
    found = runtime.get_signature_runner()(z=np.asarray(a), b=np.asarray(b), a=np.asarray(b))
    np.testing.assert_allclose(found["sum"], 2 * (a + b), rtol=1e-6)
    np.testing.assert_allclose(found["difference"], a - b, rtol=1e-6)


@pytest.mark.parametrize(
    "leaf, message",
    [
        (pack(jnp.ones((8, 4)), 4, group=4), "its scales are those of groups"),
        (pack(jnp.ones((8, 4)), 8, axis=0), r"its scales vary along the axes \[0\]"),
        (
            jc.quantize.weights(integer(8, symmetric=False)).pack(
                jnp.ones((8, 4)),
                jc.quantize.weights(integer(8, symmetric=False)).init(jnp.ones((8, 4))),
            ),
            "it is in the format uint8",
        ),
    ],
)
def test_leaves_that_it_cannot_store(leaf, message, tmp_path):
    uneven = jax.tree.map(lambda x: x, leaf)
    if "vary" in message:
        uneven = pack(normal(0, 8, 4), 8, axis=0)
    fn = lambda p, x: x @ p["w"]
    with pytest.raises(ValueError, match=f"litert: w: {message}.*jc.unpack"):
        jc.export.litert(fn, {"w": uneven}, jnp.ones((1, 8)), path=tmp_path / "a.tflite")
    assert not list(tmp_path.iterdir())


def test_operations_that_it_cannot_do(tmp_path):
    path, x = tmp_path / "a.tflite", jnp.ones((4, 4))
    path.write_bytes(b"old")
    loop = lambda p, x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: 2 * x, x)
    back = lambda p, x: jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
    for fn, message in (
        (lambda p, x: jnp.fft.fft(x).real, "cannot do stablehlo.fft"),
        (loop, "tfl.while; it has no loops"),
        (back, "JAX cannot export the program"),
        (lambda p, x: jnp.sort(x), "the runtime cannot run .*STABLEHLO_SORT"),
        (lambda p, x: x.astype(jnp.bfloat16) @ x.astype(jnp.bfloat16), "tfl.batch_matmul"),
    ):
        with pytest.raises(ValueError, match=f"litert: .*{message}"):
            jc.export.litert(fn, (), x, path=path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.tflite"] and path.read_bytes() == b"old"


def test_bad_arguments(program, tmp_path):
    program, x = program
    path, fn = tmp_path / "a.tflite", lambda p, x: x @ p
    w = jnp.ones((3, 2))
    with pytest.raises(ValueError, match="interface.*'float32' or 'int8', got 'uint8'"):
        jc.export.litert(program, path=path, interface="uint8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="floats remain"):
        jc.export.litert(fn, w, jnp.ones((1, 3)), path=path, interface="int8")
    with pytest.raises(TypeError, match="has grids of its own"):
        jc.export.litert(program, path=path, activations="dynamic")
    with pytest.raises(ValueError, match=r"must have the shape \(B, 8, 8, 3\)"):
        jc.export.litert(program, x[0], path=path)
    with pytest.raises(TypeError, match="takes one input, got 2"):
        jc.export.litert(program, x, x, path=path)
    with pytest.raises(TypeError, match="None, 'dynamic' or grids"):
        jc.export.litert(fn, w, jnp.ones((1, 3)), path=path, activations="static")  # type: ignore
    with pytest.raises(TypeError, match="a function, its params and its inputs"):
        jc.export.litert(fn, w, path=path)
    with pytest.raises(ValueError, match="input_names.*needs 1 different names, got 2|needs 1"):
        jc.export.litert(fn, w, jnp.ones((1, 3)), path=path, input_names=["a", "b"])
    with pytest.raises(TypeError, match="inputs must be arrays, got float"):
        jc.export.litert(fn, w, 1.0, path=path)
    assert not list(tmp_path.iterdir())


def test_without_the_converter(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "litert_converter", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxcompress\[export\]'"):
        jc.export.litert(lambda p, x: x, (), jnp.ones(3), path=tmp_path / "a.tflite")


@pytest.mark.parametrize("activations", [None, "dynamic"])
def test_gates_that_are_split_and_joined_keep_their_steps(activations, tmp_path):
    packed = pack({"w": normal(1, 6, 12), "v": normal(2, 6, 4)}, 8)
    fn = lambda p, x: x @ jnp.concatenate([jnp.split(p["w"], 2, 1)[0], p["v"], p["w"][:, 6:]], 1)
    report = jc.export.litert(
        fn, packed, normal(3, 2, 6), path=tmp_path / "a.tflite", activations=activations
    )
    assert report.verified.largest_difference is not None and not report.widened
    assert any("int8" in o.inputs for o in report.operators)


@pytest.mark.parametrize("activations", [None, "dynamic"])
def test_weights_behind_identities_and_stacks_keep_their_steps(activations, tmp_path):
    packed = pack({"w": normal(1, 6, 6), "v": normal(2, 6, 6), "u": normal(4, 6, 4)}, 8)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def fn(p, x):
        w, x = lax.optimization_barrier((lax.stop_gradient(p["w"]), x))
        v = lax.with_sharding_constraint(jax.device_put(p["v"], one), one)
        stacked = jnp.stack([w, v])
        x = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stacked)[0]
        for w in jnp.unstack(stacked):
            x = x @ w[:, jnp.array([4, 0, 1, 3, 2, 5])]
        return x @ jnp.tile(p["u"], (1, 3)), jnp.einsum("nk,bkm->nbm", x, jnp.broadcast_to(
            p["u"], (2, 6, 4)))  # fmt: skip

    report = jc.export.litert(
        fn, packed, normal(3, 2, 6), path=tmp_path / "a.tflite", activations=activations
    )
    assert report.verified.largest_difference is not None and not report.widened
    (product,) = [o for o in report.operators if o.name == "FULLY_CONNECTED"]
    assert product.count == 6 and product.inputs[1] == ("int8" if activations else "float32")
    assert any("int8" in o.inputs for o in report.operators)


def test_the_lowest_code_of_four_bits_is_read_by_all_kernels(tmp_path):
    # From 32 inputs on, a kernel that runs without XNNPACK reads the int4 code -8 as +8.
    form = integer(4, narrow=False)
    codes = np.random.default_rng(1).integers(-8, 8, (64, 6))
    codes[0] = -8
    w, step = jnp.asarray(0.25 * codes, jnp.float32), QParams(jnp.full((1, 6), 0.25))
    packed = {"w": quantize(w, step, format=form, granularity=granularity_for(form, -1))}
    np.testing.assert_array_equal(jc.unpack(packed)["w"], w)
    x, path = normal(3, 5, 64), tmp_path / "a.tflite"
    report = jc.export.litert(lambda p, x: x @ p["w"], packed, x, path=path, activations="dynamic")
    assert set(report.widened) == {"w"} and "-8" in report.widened["w"]
    assert types(report) == {("FULLY_CONNECTED", "float32", "int8")}
    want = np.asarray(x, np.float64) @ (0.25 * codes)
    rows = np.asarray(x, np.float64)
    steps = (np.maximum(rows.max(1), 0) - np.minimum(rows.min(1), 0)) / 255
    # Activations are off by a step at most (half of it, and the zero point's rounding).
    bound = steps[:, None] * np.abs(0.25 * codes).sum(0)
    for kernels in ("BUILTIN", "BUILTIN_WITHOUT_DEFAULT_DELEGATES", "BUILTIN_REF"):
        assert (np.abs(run(report, x, kernels=kernels) - want) <= bound).all()
    # In int4, as it would be without: that this kernel runs here at all.
    narrow = pack({"w": w}, 4)
    report = jc.export.litert(lambda p, x: x @ p["w"], narrow, x, path=path, activations="dynamic")
    assert types(report) == {("FULLY_CONNECTED", "float32", "int4")} and not report.widened


def test_what_is_widened_is_said(tmp_path):
    path = tmp_path / "a.tflite"
    packed = pack({"w": normal(1, 6, 12)}, 8)
    pick = lambda p, x: x @ jnp.pad(p["w"], ((0, 0), (1, 1)))
    report = jc.export.litert(pick, packed, normal(3, 2, 6), path=path)
    assert "float32" in report.widened["w"]
