"""LiteRT files for TFLite-Micro: what is in them, and what that runtime makes of them."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxcompress as jc
from jaxcompress.formats import integer
from tests.test_export_litert import normal, pack, types

schema = pytest.importorskip("litert_converter.schema_py_generated")


def net(p, x):
    """Convolution, groups, depthwise; dense layers on rows and on their mean."""
    numbers = ("NHWC", "HWIO", "NHWC")
    for name, groups in (("conv", 1), ("grouped", 2), ("depthwise", 6)):
        x = lax.conv_general_dilated(
            x, p[name], (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups
        )
        x = jax.nn.relu(x)
    x = jax.nn.relu(x.mean((1, 2)) @ p["hidden"] + p["bias"])
    return x @ p["even"]


def params():
    even = np.random.default_rng(5).uniform(-1, 1, (8, 5))
    even[0] = 1.0  # the same largest number in every column: one scale for all
    return {
        "conv": normal(1, 3, 3, 3, 6),
        "grouped": normal(2, 3, 3, 3, 6),
        "depthwise": normal(3, 3, 3, 1, 6),
        "hidden": normal(4, 6, 8),
        "bias": normal(6, 1, 8),
        "even": jnp.asarray(even, jnp.float32),
    }


X = normal(0, 4, 5, 5, 3)


@pytest.fixture(scope="module", params=[8, 4])
def program(request):
    return jc.quantize.integer_only(net, params(), [X], weights=integer(request.param))


def weights_in(path):
    """{operator: [(bits, scales, numbers in float64)]} of a file, in its order."""
    model = schema.ModelT.InitFromPackedBuf(path.read_bytes())
    names = {v: k for k, v in vars(schema.BuiltinOperator).items() if not k.startswith("_")}
    (graph,), found = model.subgraphs, {}
    for operator in graph.operators:
        code = model.operatorCodes[operator.opcodeIndex]
        name = names[max(code.builtinCode, code.deprecatedBuiltinCode)]
        if name not in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"):
            continue
        tensor = graph.tensors[operator.inputs[1]]
        raw = np.asarray(model.buffers[tensor.buffer].data, np.uint8)
        bits, shape = (8, 4)[tensor.type == schema.TensorType.INT4], tuple(tensor.shape)
        if bits == 4:  # low nibble first
            raw = np.stack([raw & 15, raw >> 4], -1).reshape(-1)[: np.prod(shape)]
            codes = (raw.astype(np.int64) ^ 8) - 8
        else:
            codes = raw.view(np.int8).astype(np.int64)
        scale = np.asarray(tensor.quantization.scale, np.float64)
        along = [1] * len(shape)
        along[tensor.quantization.quantizedDimension] = len(scale)
        numbers = codes.reshape(shape) * scale.reshape(along if len(scale) > 1 else (1,))
        found.setdefault(name, []).append((bits, len(scale), numbers))
    return found


@pytest.mark.parametrize("runtime", ["litert", "micro"])
def test_bits_and_scales_in_the_file(program, runtime, tmp_path):
    report = jc.export.litert(program, path=tmp_path / "a.tflite", runtime=runtime, verify=False)
    found = weights_in(report.path)
    codes = [np.asarray(c["weight"]) for c in program.constants if "weight" in c]
    four = max(np.abs(c).max() for c in codes) <= 7
    bits = 4 if four else 8
    assert [b for b, *_ in found["CONV_2D"] + found["DEPTHWISE_CONV_2D"]] == [bits] * 3
    hidden, even = found["FULLY_CONNECTED"]
    assert hidden[:2] == (8 if runtime == "micro" else bits, 8)
    assert even[0] == bits and even[1] == (1 if four and runtime == "micro" else 5)
    if four and runtime == "micro":
        (name,) = report.widened
        assert name.startswith("step ") and "dot at" in name
        assert report.widened[name] == (
            "int8: TFLite-Micro has int4 dense layers with one scale only"
        )
    else:
        assert not report.widened
    # The same numbers in whatever bits: those of the program.
    dots = [
        np.asarray(c["weight"], np.float64) * np.asarray(scale, np.float64)
        for node, c, scale in zip(
            program.nodes, program.constants, program.weight_scales, strict=True
        )
        if node.kind == "dot"
    ]
    for (*_, numbers), want in zip((hidden, even), dots, strict=True):
        np.testing.assert_allclose(numbers, want.T, rtol=1e-6, atol=0)


def test_micro_gives_the_integers_of_the_program(program, tmp_path):
    runtime = pytest.importorskip("tflite_micro.python.tflite_micro.runtime")
    report = jc.export.litert(
        program, path=tmp_path / "a.tflite", interface="int8", runtime="micro"
    )
    assert report.verified.reason == "" and report.verified.largest_difference is not None
    micro = runtime.Interpreter.from_bytes(report.path.read_bytes(), arena_size=2**20)
    codes = np.asarray(program.quantize_input(X))
    for row, want in zip(codes, np.asarray(program.run(codes)), strict=True):
        micro.set_input((row[None].astype(np.int16) - 128).astype(np.int8), 0)
        micro.invoke()
        # Means are rounded in their own way.
        assert np.abs(micro.get_output(0)[0].astype(int) + 128 - want).max() <= 1


def test_without_micro_another_runtime_is_named(program, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tflite_micro.python.tflite_micro", None)
    report = jc.export.litert(program, path=tmp_path / "a.tflite", runtime="micro")
    assert "in LiteRT, because tflite-micro is not installed" in report.verified.reason
    assert report.verified.largest_difference is not None


def dense(p, x):
    return jax.nn.relu(x @ p["a"]) @ p["b"]


def dense_params():
    return {"a": normal(1, 8, 16), "b": normal(2, 16, 4)}


def grids(packed, x):
    act = jc.quantize.activations(dense, integer(8, symmetric=False))
    return act, jc.quantize.calibrate_activations(act, jc.unpack(packed), [(x,)])


@pytest.mark.parametrize(
    "bits, axis, activations, message",
    [
        (
            8,
            -1,
            None,
            r"DEQUANTIZE of int8 \[.*\] with 16 scales \(it uses the first",
        ),
        (4, None, None, r"DEQUANTIZE of int4 .*\(it takes no int4\)"),
        (8, -1, "dynamic", "TFLite-Micro has no dynamic grids"),
        # The last layer's result is on no grid: its weights are turned into floats.
        (8, -1, "grids", r"DEQUANTIZE of int8 \[.*\] with 4 scales"),
    ],
)
def test_what_micro_computes_wrong_is_refused(bits, axis, activations, message, tmp_path):
    packed, x = pack(dense_params(), bits, axis=axis), normal(3, 6, 8)
    how = grids(packed, x)[1] if activations == "grids" else activations
    with pytest.raises(ValueError, match=f"runtime='micro'.*{message}.*integer_only"):
        jc.export.litert(
            dense, packed, x, path=tmp_path / "a.tflite", activations=how, runtime="micro"
        )
    assert not list(tmp_path.iterdir())


def test_one_scale_and_floats_are_taken(tmp_path):
    packed, x, path = pack(dense_params(), 8, axis=None), normal(3, 6, 8), tmp_path / "a.tflite"
    act, found = grids(packed, x)
    report = jc.export.litert(dense, packed, x, path=path, activations=found, runtime="micro")
    assert {("FULLY_CONNECTED", "int8", "int8"), ("DEQUANTIZE", "int8")} <= types(report)
    assert not report.widened and report.verified.largest_difference is not None
    report = jc.export.litert(dense, dense_params(), x, path=path, runtime="micro")
    assert types(report) == {("FULLY_CONNECTED", "float32", "float32")}


def test_packed_weights_on_grids_are_widened(tmp_path):
    # The second layer's weights are float32.
    packed, x = pack(dense_params(), 4, names="a"), normal(3, 6, 8)
    found = {runtime: jc.export.litert(
        dense, packed, x, path=tmp_path / "a.tflite", activations=grids(packed, x)[1],
        runtime=runtime, verify=False,
    ) for runtime in ("litert", "micro")}  # fmt: skip
    assert ("FULLY_CONNECTED", "int8", "int4") in types(found["litert"])
    assert ("FULLY_CONNECTED", "int8", "int8") in types(found["micro"])
    assert set(found["micro"].widened) == {"a"} and not found["litert"].widened


def test_unknown_runtimes(program, tmp_path):
    with pytest.raises(ValueError, match=r"runtime.*'litert', 'micro'.*'tflm'"):
        jc.export.litert(program, path=tmp_path / "a.tflite", runtime="tflm")  # type: ignore
