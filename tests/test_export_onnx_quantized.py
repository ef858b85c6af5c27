"""Quantized ONNX files: codes are the library's own, and ONNX Runtime's integers are in it."""

import collections
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from jax import lax
from onnx import numpy_helper

import jaxcompress as jc
from experiments.situations import fallbacks
from jaxcompress.export.marks import mark
from jaxcompress.export.onnx_format.constants.codes import Codes, of_leaf
from jaxcompress.export.onnx_format.constants.stored import Stored

pytestmark = pytest.mark.broad

integer = jc.formats.integer
# The tests run the files themselves.
export = functools.partial(jc.export.onnx, verify=False)


def optimized(path, tmp_path):
    """The operators that ONNX Runtime runs, with their numbers."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    model = onnx.load(options.optimized_model_filepath)
    return collections.Counter(node.op_type for node in model.graph.node)


def run(path, *inputs, exact=False) -> list[Any]:
    """The results of a file; `exact` without ONNX Runtime's own rewriting.

    Products of uint8 and int8 do not saturate, on no processor.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.add_session_config_entry("session.x64quantprecision", "1")
    if exact:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    found = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [port.name for port in found.get_inputs()]
    given = {n: np.asarray(x) for n, x in zip(names, inputs, strict=True)}
    return [np.asarray(y) for y in found.run(None, given)]


def packed(x, format, **where):
    weights = jc.quantize.weights(format, **where)
    return weights.pack(x, weights.init(x))


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


SHAPES = [(64, 48), (4, 32, 64), (3, 3, 32, 16)]
PLACES = [
    {}, {"axis": -1}, {"axis": 0}, {"axis": (0, 1)}, {"axis": -1, "group": 32},
    {"axis": 0, "group": 16}, {"axis": 1, "group": 16}, {"block": (16, 16)},
    {"axis": -1, "group": 5},
]  # fmt: skip
FORMATS = [integer(4), integer(3), integer(8, symmetric=False), integer(8, narrow=False)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("place", PLACES)
def test_codes_are_what_is_unpacked_and_follow_views(shape, place):
    x = normal(*shape)
    for format in FORMATS:
        leaf = packed(x, format, **place)
        want, codes = np.asarray(jc.unpack(leaf)), of_leaf(leaf)
        if place.get("group") == 5 and len(shape) > 2:  # groups that run over the ends of rows
            assert isinstance(codes, Stored)
            np.testing.assert_array_equal(codes.numbers, want)
            continue
        assert isinstance(codes, Codes)
        np.testing.assert_array_equal(codes.array(), want)
        assert codes.codes.min() >= -(2 ** (codes.bits - 1))
        back = tuple(range(len(shape)))[::-1]
        np.testing.assert_array_equal(codes.transposed(back).array(), want.T)
        turned = codes.sliced((slice(None, None, -1),))
        assert (turned is None) == codes.ragged(0)  # a shorter block would come first
        if turned is not None:
            np.testing.assert_array_equal(turned.array(), want[::-1])
        for new in [(1, *shape), (*shape, 1), (shape[0], -1), (-1, shape[-1])]:
            size = want.reshape(new).shape
            if (moved := codes.reshaped(size)) is not None:
                np.testing.assert_array_equal(moved.array(), want.reshape(size))
        cut = (slice(1, 3), *[slice(None)] * (len(shape) - 1))
        if (part := codes.sliced(cut)) is not None:
            np.testing.assert_array_equal(part.array(), want[cut])


def test_which_views_codes_follow():
    codes = of_leaf(packed(normal(4, 32, 64), integer(4), axis=-1, group=32))
    joined = codes.reshaped((128, 64))  # blocks of 32 stay blocks
    assert joined is not None and joined.scale.shape == (4, 64)
    assert codes.reshaped((4, 2048)) is None  # here the scales lie in the middle
    heads = of_leaf(packed(normal(16, 4, 8), integer(4), axis=-1))
    joined = heads.reshaped((16, 32))  # columns of several heads have a scale each then
    assert joined is not None and joined.scale.shape == (1, 32)
    np.testing.assert_array_equal(joined.array(), heads.array().reshape(16, 32))
    ends = of_leaf(packed(normal(40, 8), integer(4), axis=-1, group=16))
    assert ends.scale.shape == (3, 8) and ends.ragged(0)
    part = ends.sliced((slice(16, 40), slice(2, 5)))
    assert part is not None and part.scale.shape == (2, 3)
    np.testing.assert_array_equal(part.array(), ends.array()[16:, 2:5])
    rows = of_leaf(packed(normal(8, 4), integer(8), axis=0, group=2))
    assert rows.sliced((slice(None), slice(0, 3))) is None  # a block would be cut
    sparse = jc.prune.magnitude(0.5)
    x = normal(16, 8)
    both = jc.chain(sparse, jc.quantize.weights(integer(8, symmetric=False)))
    leaf = both.pack(x, both.init(x))
    np.testing.assert_array_equal(of_leaf(leaf).array(), jc.unpack(leaf))
    other = packed(x, jc.formats.parse("float8_e4m3"))
    np.testing.assert_array_equal(of_leaf(other).numbers, jc.unpack(other))


def network(params, x):
    """Convolutions, a shortcut of more channels, additions, pooling and a dense layer."""
    conv = lambda x, w, s: lax.conv_general_dilated(
        x, w, (s, s), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    bias = lambda b: b.reshape(1, 1, 1, -1)
    x = jax.nn.relu(conv(x, params["a"], 1) + bias(params["ba"]))
    y = jax.nn.relu(conv(x, params["b"], 2) + bias(params["bb"]))
    x = jax.nn.relu(y + jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (4, 4))))
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return jnp.mean(x, axis=(1, 2)) @ params["c"] + params["bc"].reshape(1, -1)


def network_params():
    return {
        "a": 0.3 * normal(3, 3, 3, 8), "ba": 0.1 * normal(8, seed=1),
        "b": 0.2 * normal(3, 3, 8, 16, seed=2), "bb": 0.1 * normal(16, seed=3),
        "c": 0.3 * normal(16, 5, seed=4), "bc": normal(5, seed=5),
    }  # fmt: skip


@pytest.fixture(scope="module", params=[False, True], ids=["asymmetric", "symmetric"])
def program(request):
    format = integer(8, symmetric=request.param)
    return jc.quantize.integer_only(
        network, network_params(), [normal(8, 12, 12, 3)], activations=format
    )


def codes_of(program, numbers):
    grid = program.grids[program.output]
    zero = 0 if grid.format.symmetric else int(grid.qparams.zero_point)
    return np.rint(numbers / np.asarray(grid.qparams.scale)).astype(int) + zero


def test_an_integer_program(program, tmp_path):
    report = export(program, path=tmp_path / "f.onnx")
    # Each convolution, addition and product is one of integers in ONNX Runtime.
    ops = optimized(report.path, tmp_path)
    assert (ops["QLinearConv"], ops["QLinearAdd"], ops["QGemm"]) == (2, 1, 1)
    assert not {"Conv", "Add", "Gemm", "MatMul"} & set(ops)
    assert ops["DequantizeLinear"] == 2  # of the mean and of the result
    x = 1.5 * normal(5, 12, 12, 3, seed=9)
    (found,) = run(report.path, x)
    want = np.asarray(program.run(program.quantize_input(x))).astype(int)
    apart = np.abs(codes_of(program, found) - want)
    assert apart.max() <= 2 and (apart > 0).mean() < 0.3
    weights = [numpy_helper.to_array(t) for t in onnx.load(report.path).graph.initializer]
    stored = [w for w in weights if w.dtype == np.int8 and w.size > 1 and w.any()]
    mine = [np.asarray(c["weight"]) for c in program.constants if "weight" in c]
    assert sorted(w.size for w in stored) == sorted(w.size for w in mine)
    oihw = next(w for w in stored if w.shape == (16, 8, 3, 3))
    np.testing.assert_array_equal(oihw.transpose(2, 3, 1, 0), mine[1])


def test_steps_round_the_exact_accumulator_once(program, tmp_path):
    # With the runtime's own inputs, every code of a step is its accumulator's, rounded to the
    # nearest: where that is no tie up to float32, exactly.
    report = export(program, path=tmp_path / "f.onnx")
    model = onnx.load(report.path)
    quantizers = [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
    kind = onnx.TensorProto.UINT8
    clips = {n.input[0]: n.output[0] for n in model.graph.node if n.op_type == "Clip"}
    codes = [clips.get(n.output[0], n.output[0]) for n in quantizers]
    results = [onnx.helper.make_tensor_value_info(name, kind, None) for name in codes]
    model.graph.output.extend(results)
    onnx.save(model, tmp_path / "all.onnx")
    x = 1.5 * normal(5, 12, 12, 3, seed=9)
    _, *found = run(tmp_path / "all.onnx", x)
    place = 128 if program.grids[0].format.symmetric else 0
    nhwc = lambda a: a.transpose(0, 2, 3, 1) if a.ndim == 4 else a
    # The input lies as it is given; what comes from convolutions has the channels first.
    steps = [found[0].astype(int) - place, *(nhwc(a).astype(int) - place for a in found[1:])]
    compared = 0
    convolutions = [k for k, node in enumerate(program.nodes) if node.kind == "conv"]
    for taken, number in enumerate(convolutions):  # they come first
        node, c = program.nodes[number], program.constants[number]
        zero = int(np.asarray(c["zeros"]).reshape(-1)[0])
        w = np.asarray(c["weight"], np.float64)
        acc = lax.conv_general_dilated(
            jnp.asarray(steps[taken] - zero, jnp.float32), jnp.asarray(w, jnp.float32),
            node.get("strides"), node.get("padding"), dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        acc = np.asarray(acc, np.float64) + np.asarray(c["bias"], np.float64)
        real = (
            acc
            * np.asarray(c["multiplier"], np.float64)
            * 2.0 ** (np.asarray(c["shift"], np.float64) - 31)
        )
        low, high = (int(np.asarray(c[k])) for k in ("low", "high"))
        want = np.clip(np.rint(real) + int(np.asarray(c["zero"])), low, high)
        certain = np.abs(real - np.floor(real) - 0.5) > 1e-4
        np.testing.assert_array_equal(steps[taken + 1][certain], want[certain])
        compared += certain.sum()
    assert compared > 5000


def test_int8_activations(program, tmp_path):
    a = export(program, path=tmp_path / "a.onnx")
    b = export(program, path=tmp_path / "b.onnx", activations="int8")
    x = normal(3, 12, 12, 3, seed=7)
    apart = codes_of(program, run(a.path, x)[0]) - codes_of(program, run(b.path, x)[0])
    assert np.abs(apart).max() <= 1
    graph = onnx.load(b.path).graph
    assert onnx.TensorProto.UINT8 not in {t.data_type for t in graph.initializer}
    # A mean is one operation, and no two grids share a zero point: OpenVINO counts one twice else.
    assert b.nodes["ReduceMean"] == 1 and not {"ReduceSum", "AveragePool"} & set(b.nodes)
    grids = {tuple(n.input[1:]) for n in graph.node if n.op_type == "QuantizeLinear"}
    assert len({zero for _, zero in grids}) == len({scale for scale, _ in grids}) == len(grids)


def test_an_integer_program_has_its_inputs(program, tmp_path):
    with pytest.raises(TypeError, match="IntegerProgram has its weights"):
        export(program, {}, normal(1, 12, 12, 3), path=tmp_path / "f.onnx")


def test_narrow_grids_stay_narrow(tmp_path):
    fn = lambda p, x: mark(x, scale=0.5, zero_point=0, bits=8, narrow=True)
    x = jnp.array([[-100.0, -63.5, -0.3, 0.25, 200.0]], jnp.float32)
    for activations in ("uint8", "int8"):
        path = tmp_path / f"{activations}.onnx"
        export(fn, {}, x, path=path, activations=activations)
        np.testing.assert_array_equal(run(path, x)[0], fn({}, x))


def test_clamps_before_a_grid_are_clamps_of_codes(tmp_path):
    def fn(params, x):
        x = jnp.minimum(jnp.maximum(x, -0.33), jnp.float32(0.61))
        return mark(jnp.clip(x, -0.2, 9.0), scale=0.1, zero_point=3, bits=8, narrow=False)

    x = normal(9, 4)
    report = export(fn, {}, x, path=tmp_path / "f.onnx")
    assert report.nodes["Clip"] == 1 and not {"Max", "Min"} & set(report.nodes)
    np.testing.assert_array_equal(run(report.path, x)[0], fn({}, x))


def test_views_move_codes(tmp_path):
    def fn(params, x):
        x = mark(x, scale=0.05, zero_point=-3, bits=8, narrow=False)
        y = jnp.transpose(jnp.pad(x[:, ::2], ((0, 0), (1, 0), (0, 0))), (0, 2, 1))
        y = jnp.concatenate([y, y], axis=1).reshape(x.shape[0], -1)
        return mark(y, scale=0.05, zero_point=-3, bits=8, narrow=False)

    x = normal(2, 6, 3)
    report = export(fn, {}, x, path=tmp_path / "f.onnx")
    assert report.nodes["QuantizeLinear"] == report.nodes["DequantizeLinear"] == 1
    np.testing.assert_array_equal(run(report.path, x)[0], fn({}, x))


def test_every_move_moves_codes(tmp_path):
    def fn(params, x):
        x = mark(x, scale=0.05, zero_point=-3, bits=8, narrow=False)
        x = lax.optimization_barrier(lax.stop_gradient(x))
        first, *_, last = jnp.unstack(jnp.tile(jnp.stack([x, x[:, ::-1]], 2), (1, 2, 1, 2)), axis=3)
        y = jnp.broadcast_to(lax.pad(first, jnp.float32(0), ((0, 0, 0), (1, 0, 1), (0, 0, 0))), (
            2, first.shape[0], 24, 2))  # fmt: skip
        y = jnp.concatenate([jnp.moveaxis(y, 0, 1)[:, 0, :12], last], axis=1)
        return mark(y, scale=0.05, zero_point=-3, bits=8, narrow=False)

    x = normal(2, 6, 3)
    report = export(fn, {}, x, path=tmp_path / "f.onnx")
    assert report.nodes["QuantizeLinear"] == report.nodes["DequantizeLinear"] == 1
    np.testing.assert_array_equal(run(report.path, x)[0], fn({}, x))


def test_marked_activations_and_weights(tmp_path):
    params = {"w": normal(16, 8), "v": normal(8, 4, seed=1)}
    fn = lambda p, x: jax.nn.relu(x @ p["w"]) @ p["v"]
    x = normal(32, 16, seed=2)
    act = jc.quantize.activations(fn, integer(8, symmetric=False))
    grids = jc.quantize.calibrate_activations(act, params, [(x,)])
    recipe = jc.quantize.weights(integer(8), axis=-1)
    leaves = {name: recipe.pack(w, recipe.init(w)) for name, w in params.items()}
    marked = jc.export.mark_activations(fn, grids)
    report = export(marked, leaves, x, path=tmp_path / "f.onnx")
    want = np.asarray(act.apply(grids, jc.unpack(leaves), x))
    np.testing.assert_allclose(run(report.path, x, exact=True)[0], want, rtol=1e-4, atol=1e-4)
    near = run(report.path, x)[0]
    assert np.abs(near - want).max() < 0.1
    again = export(
        lambda p, x: marked(jc.export.mark_weights(leaves), x), {}, x, path=tmp_path / "g.onnx"
    )
    np.testing.assert_array_equal(run(again.path, x)[0], near)


def biased(p, x):
    """A convolution and two dense layers, all with a bias of fewer axes than its result."""
    with jax.numpy_rank_promotion("allow"):
        x = lax.conv_general_dilated(
            x, p["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jnp.mean(jax.nn.relu(x + p["kb"]), (1, 2))
        return jax.nn.relu(x @ p["w"] + p["b"]) @ p["v"] + p["c"]


@pytest.mark.parametrize("learned", [True, False])
def test_trained_grids_and_biases_with_a_free_batch(learned, tmp_path):
    shapes = {"k": (3, 3, 3, 8), "kb": (8,), "w": (8, 16), "b": (16,), "v": (16, 5), "c": (5,)}
    params = {n: normal(*shape, seed=k) for k, (n, shape) in enumerate(shapes.items())}
    x = normal(4, 6, 6, 3, seed=9)
    if learned:
        act = jc.quantize.lsq_activations(biased, 8)
        grids = act.grids(act.init(params, x))
    else:
        act = jc.quantize.activations(biased, integer(8, symmetric=False))
        grids = jc.quantize.calibrate_activations(act, params, [(x,)])
    marked = jc.export.mark_activations(biased, grids)
    report = export(marked, params, x, path=tmp_path / "f.onnx")
    assert report.inputs[0].shape[0] == "batch"
    for rows in (1, 3, 8):
        x = normal(rows, 6, 6, 3, seed=rows)
        want = np.asarray(act.apply(grids, params, x))
        (found,) = run(report.path, x)
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


DENSE = {
    "int8": (integer(8), {"axis": -1}, 0.26, 19),
    "int8_tensor": (integer(8), {}, 0.26, 19),
    "uint8": (integer(8, symmetric=False), {"axis": -1}, 0.26, 19),
    "int4_blocks": (integer(4), {"axis": -1, "group": 32}, 0.165, 19),
    "uint4_blocks": (integer(4, symmetric=False), {"axis": -1, "group": 32}, 0.175, 19),
    "int3_blocks": (integer(3), {"axis": -1, "group": 64}, 0.15, 19),
    "int4_channels": (integer(4), {"axis": -1}, 0.14, 19),
    "int8_blocks": (integer(8), {"axis": -1, "group": 32}, 0.29, 19),
    "int4_odd_blocks": (integer(4), {"axis": -1, "group": 12}, 0.22, 21),
    "int4_tiles": (integer(4), {"block": (32, 32)}, 0.165, 19),
    "int6_input_channels": (integer(6), {"axis": 0}, 0.27, 19),
    "both_axes": (integer(8), {"axis": (0, 1)}, 2.1, 19),
    "codebook": ("nf4", {"axis": -1}, 0.15, 21),
    "int2_channels": (integer(2), {"axis": -1}, 0.08, 19),
    "int4_ragged_blocks": (integer(4), {"axis": -1, "group": 128}, 0.18, 19),
}


@pytest.mark.parametrize("name", DENSE)
def test_packed_dense_layers(name, tmp_path):
    format, where, most, opset = DENSE[name]
    format = jc.formats.parse(format) if isinstance(format, str) else format
    w = normal(192, 320)
    leaf, x = {"w": packed(w, format, **where)}, normal(3, 5, 192, seed=1)
    fn = lambda p, x: x @ p["w"]
    report = export(fn, leaf, x, path=tmp_path / "f.onnx")
    want = np.asarray(x, np.float64) @ np.asarray(jc.unpack(leaf)["w"], np.float64)
    np.testing.assert_allclose(run(report.path, x, exact=True)[0], want, rtol=1e-4, atol=1e-4)
    assert report.opset == opset
    assert report.file_bytes < most * 4 * w.size + 1500
    assert ("MatMulNBits" in report.nodes) == (name not in MADE)
    assert bool(report.larger) == (name in LARGER)


MADE = ("int4_odd_blocks", "both_axes", "codebook")  # float32 before it is multiplied
LARGER = ("int3_blocks", "int6_input_channels", "codebook")


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("axis", [None, -1, 0])
def test_float_products_are_exact_in_the_default_session(bits, axis, tmp_path):
    x, leaf = normal(4, 96, seed=1), {"w": packed(normal(96, 40), integer(bits), axis=axis)}
    path, fn = tmp_path / "f.onnx", lambda p, x: x @ p["w"]
    want = np.asarray(x, np.float64) @ np.asarray(jc.unpack(leaf)["w"], np.float64)
    report = export(fn, leaf, x, path=path)
    plain = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = np.asarray(plain.run(None, {plain.get_inputs()[0].name: np.asarray(x)})[0])
    assert np.abs(found - want).max() < 2e-6 * np.abs(want).max()
    assert report.domains == ("com.microsoft",) and not report.larger
    # For other runtimes: operators of ONNX alone, and exact in the library's own session.
    report = export(fn, leaf, x, path=path, operators="standard")
    (found,) = jc.export.session(path).run(np.asarray(x))
    assert np.abs(found - want).max() < 2e-6 * np.abs(want).max() and not report.domains


def test_attention_kernels_and_ragged_groups_stay_packed(tmp_path):
    p = {"q": normal(64, 4, 16), "o": normal(4, 16, 64, seed=1), "w": normal(40, 256, seed=2)}
    recipe = jc.by_path(
        {
            "[qo]": jc.quantize.weights(integer(4), axis=-1),
            "w": jc.quantize.weights(integer(4), axis=-1, group=32),
        }
    )
    leaves = recipe.pack(p, recipe.init(p))

    def fn(p, x):
        y = jnp.einsum("thk,hkd->td", jnp.einsum("td,dhk->thk", x, p["q"]), p["o"])
        return y[:, :40] @ p["w"]

    x = normal(3, 64, seed=3)
    report = export(fn, leaves, x, path=tmp_path / "f.onnx")
    assert report.nodes["MatMulNBits"] == 3 and not any(row.why for row in report.larger)
    wide = jax.tree.map(lambda w: np.asarray(w, np.float64), jc.unpack(leaves))
    y = np.einsum("td,dhk->thk", np.asarray(x, np.float64), wide["q"])
    want = np.einsum("thk,hkd->td", y, wide["o"])[:, :40] @ wide["w"]
    np.testing.assert_allclose(run(report.path, x)[0], want, atol=1e-5 * np.abs(want).max())
    assert report.file_bytes < 1.3 * jc.packed_bytes(leaves) + 2000  # 40 is padded to 64


@pytest.mark.parametrize("method", ["int4 group 24", "nf4", "float16", "half zero, float32"])
@pytest.mark.parametrize("situation", ["heads_out", "conv", "gain"])
def test_codes_stay_codes_or_the_report_says_so(method, situation, tmp_path):
    cells, file = fallbacks.onnx_cells(method, [situation], 0, tmp_path)
    assert cells[situation].holds and file.holds, (cells, file)


def test_what_becomes_float32_is_warned_of_once(tmp_path):
    recipe = jc.prune.magnitude(0.5)
    w = normal(32, 48)
    leaf = {"a": {"w": recipe.pack(w, recipe.init(w))}}
    with pytest.warns(UserWarning, match=r"stored as float32 though packed: 'a/w'") as said:
        report = export(lambda p, x: x @ p["a"]["w"], leaf, normal(2, 32), path=tmp_path / "f.onnx")
    (row,) = report.larger
    assert len(said) == 1 and row.leaf == "a/w" and row.why
    assert row.lost_bytes == 4 * w.size - jc.packed_bytes(leaf)


@pytest.mark.parametrize("bits, group", [(8, None), (4, 32)])
def test_dynamic_products(bits, group, tmp_path):
    leaf = {"w": packed(normal(192, 320), integer(bits), axis=-1, group=group), "b": normal(320)}
    x = normal(4, 192, seed=1)
    fn = lambda p, x: jax.nn.relu(x @ p["w"] + p["b"].reshape(1, -1))
    report = export(fn, leaf, x, path=tmp_path / "f.onnx", products="dynamic")
    (found,) = run(report.path, x)
    want = np.asarray(fn(jc.unpack(leaf), x))
    error = np.linalg.norm(found - want) / np.linalg.norm(want)
    assert 1e-4 < error < 0.02  # the activations have eight bits
    if bits == 8:
        assert report.nodes["MatMulInteger"] == 1
        # As ONNX defines it: the range with zero in it, 255 steps.
        low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
        scale = np.float32((high - low) / 255)
        zero = np.rint(-low / scale)
        q = np.clip(np.rint(np.asarray(x) / scale) + zero, 0, 255)
        exact = fn(jc.unpack(leaf), jnp.asarray((q - zero) * scale, jnp.float32))
        np.testing.assert_allclose(found, exact, rtol=1e-3, atol=1e-3)


TABLES = {
    "int8_rows": (integer(8), {"axis": 0}, 0.27),
    "int8_columns": (integer(8), {"axis": -1}, 0.27),
    "int8_tensor": (integer(8), {}, 0.27),
    "uint8_rows": (integer(8, symmetric=False), {"axis": 0}, 0.28),
    "int4_blocks": (integer(4), {"axis": 0, "group": 32}, 0.18),
    "uint4_blocks": (integer(4, symmetric=False), {"axis": 0, "group": 32}, 0.18),
    "int4_rows": (integer(4), {"axis": 0}, 0.15),
    "int4_columns": (integer(4), {"axis": -1}, 0.27),
    "int8_blocks": (integer(8), {"axis": 0, "group": 32}, 1.01),
}


@pytest.mark.parametrize("name", TABLES)
def test_packed_tables(name, tmp_path):
    format, where, most = TABLES[name]
    table = normal(500, 128)
    leaf = {"table": packed(table, format, **where)}
    ids = jnp.array([[0, 499, 7, 7], [-1, 250, 3, 2]], jnp.int32)
    fn = lambda p, ids: p["table"][ids]
    report = export(fn, leaf, ids, path=tmp_path / "f.onnx")
    np.testing.assert_allclose(run(report.path, ids)[0], fn(jc.unpack(leaf), ids), rtol=1e-6)
    assert report.file_bytes < most * 4 * table.size + 1500


@pytest.mark.parametrize("format", [integer(8), integer(4), integer(8, symmetric=False)])
def test_packed_convolutions(format, tmp_path):
    leaf = {"w": packed(normal(3, 3, 16, 32), format, axis=-1)}
    fn = lambda p, x: lax.conv_general_dilated(
        x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = normal(2, 6, 6, 16, seed=1)
    report = export(fn, leaf, x, path=tmp_path / "f.onnx")
    want = np.asarray(fn(jc.unpack(leaf), x))
    np.testing.assert_allclose(run(report.path, x)[0], want, rtol=1e-4, atol=1e-4)
    assert report.file_bytes < 9 * 16 * 32 + 2500


def test_stacked_layers_stay_packed(tmp_path):
    leaf = {"w": packed(normal(3, 64, 64), integer(4), axis=(0, -1), group=32)}
    fn = lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]
    x = normal(2, 64, seed=1)
    report = export(fn, leaf, x, path=tmp_path / "f.onnx")
    assert report.nodes["MatMulNBits"] == 3
    np.testing.assert_allclose(run(report.path, x)[0], fn(jc.unpack(leaf), x), atol=1e-5)


@pytest.mark.parametrize("axes", [(-1, -1), (None, -1)], ids=["alike", "tensor and columns"])
def test_stacked_weights_stay_packed(axes, tmp_path):
    recipe = [jc.quantize.weights(integer(4), axis=axis, group=None) for axis in axes]
    arrays = normal(64, 64), normal(64, 64, seed=2)
    leaves = [r.pack(w, r.init(w)) for r, w in zip(recipe, arrays, strict=True)]

    def fn(p, x):
        stacked = jnp.stack([lax.stop_gradient(p[0]), lax.optimization_barrier(p[1])])
        x = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stacked)[0]
        for w in jnp.unstack(stacked[::-1]):
            x = jnp.tanh(x @ w.T)
        return x @ jnp.concatenate(p, 1)

    x = normal(2, 64, seed=1)
    report = export(fn, leaves, x, path=tmp_path / "f.onnx")
    assert report.nodes["MatMulNBits"] == 5 and not any(row.why for row in report.larger)
    np.testing.assert_allclose(run(report.path, x)[0], fn(jc.unpack(leaves), x), atol=1e-4)


def test_grids_that_no_runtime_has(tmp_path):
    def two(params, x):
        return mark(x, scale=[0.1, 0.2], zero_point=0, bits=8, narrow=True, axis=1)

    with pytest.raises(ValueError, match="must have one scale"):
        export(two, {}, normal(3, 2), path=tmp_path / "f.onnx")
    four = lambda p, x: mark(x, scale=0.1, zero_point=0, bits=4, narrow=True)
    with pytest.raises(ValueError, match="stored in 8 bits"):
        export(four, {}, normal(3, 2), path=tmp_path / "f.onnx")
