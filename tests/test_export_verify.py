"""Files that differ from their function: found, said, and not left behind."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.export.perturbed import with_rounding
from jaxcompress.export.verify import example_inputs, verified


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


W, X = normal(0, 16, 8), normal(1, 5, 16)


def dense(params, x):
    return jnp.tanh(x @ params["w"])


def test_no_noise_is_the_function_and_noise_is_its_rounding():
    moved = with_rounding(dense)  # one operation after the other: programs may be fused otherwise
    (y,), _ = moved(jnp.zeros(101), {"w": W}, X)
    np.testing.assert_array_equal(y, dense({"w": jnp.asarray(W)}, jnp.asarray(X)))
    (z,), _ = moved(jnp.asarray(np.random.default_rng(2).uniform(-1, 1, 101)), {"w": W}, X)
    want = np.tanh(X.astype(np.float64) @ W)
    apart, rounding = np.abs(np.asarray(z, np.float64) - want).max(), np.abs(y - want).max()
    # By the definition: at most sqrt(K) eps of |x| |w|, and 4 eps of each of two results.
    eps, products = 2.0**-23, np.abs(X) @ np.abs(W)
    most = eps * (4 * products + 4 * np.abs(X @ W) + 4 + 4)
    assert rounding / 8 < apart < most.max()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda y: np.roll(y, 1, 0),
        lambda y: y * np.float32(1.0001),
        lambda y: y + np.float32(1e-4),
        lambda y: np.where(np.arange(8) == 3, 0, y).astype(np.float32),
        lambda y: y[:, :7],
        lambda y: y.astype(np.float64),
        lambda y: np.where(y == y.max(), np.nan, y).astype(np.float32),
    ],
)
def test_what_rounding_does_not_explain_is_an_error(wrong):
    right = lambda x: [np.tanh(x.astype(np.float64) @ W).astype(np.float32)]
    found = verified(right, dense, {"w": W}, (X,), where="here")
    assert found.largest_difference is not None and found.bound is not None
    assert 0 < found.largest_difference <= found.bound < 1e-5 and not found.reason
    with pytest.raises(ValueError, match="here: the file that was written (differs|gives)"):
        verified(lambda x: [wrong(right(x)[0])], dense, {"w": W}, (X,), where="here")


def test_codes_may_differ_by_one_step_and_not_by_two():
    program = jc.quantize.integer_only(dense_only, {"w": W}, [jnp.asarray(X)])
    from jaxcompress.export.litert_format.marked_program import marked_program

    marked, step = marked_program(program), float(program.grids[program.output].qparams.scale)
    y = np.asarray(marked(jnp.asarray(X)))
    one = lambda n: lambda x: [y + np.float32(n * step) * (np.arange(8) == 2)]
    assert verified(one(1), lambda _, x: marked(x), (), (X,), where="here").largest_difference
    with pytest.raises(ValueError, match="rounding explains"):
        verified(one(12), lambda _, x: marked(x), (), (X,), where="here")


def dense_only(params, x):
    return x @ params["w"]


def test_examples():
    spec = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    (drawn,) = example_inputs((spec,), None, where="e")
    assert drawn.std() > 0.3
    (ones,) = example_inputs((jnp.ones((2, 3)),), None, where="e")
    np.testing.assert_array_equal(ones, drawn)
    tokens = np.array([[3, 5]])
    np.testing.assert_array_equal(example_inputs((tokens,), None, where="e")[0], tokens)
    np.testing.assert_array_equal(
        example_inputs((jax.ShapeDtypeStruct((3,), jnp.int32),), None, where="e")[0], [0, 1, 0]
    )
    with pytest.raises(ValueError, match=r"e\(examples\): must be"):
        example_inputs((spec,), (np.ones((2, 4), np.float32),), where="e")


def test_stablehlo_reports_what_its_run_showed(tmp_path):
    path = tmp_path / "a.stablehlo"
    report = jc.export.stablehlo(dense, {"w": W}, X, path=path, batch="b")
    assert report.verified.largest_difference is not None and not report.verified.reason
    other = jc.export.stablehlo(dense, {"w": W}, X, path=path, platforms=("tpu",))
    assert other.verified.largest_difference is None and "tpu" in other.verified.reason
    off = jc.export.stablehlo(dense, {"w": W}, X, path=path, verify=False)
    assert off.verified.reason == "verify=False"


def test_a_litert_file_that_is_wrong_is_not_left(tmp_path, monkeypatch):
    pytest.importorskip("litert_converter")
    pytest.importorskip("ai_edge_litert")
    path = tmp_path / "a.tflite"
    report = jc.export.litert(dense, {"w": W}, X, path=path)
    assert report.verified.largest_difference is not None
    path.write_bytes(b"old")
    other = jc.export.litert(dense, {"w": W + 0.01}, X, path=tmp_path / "b.tflite")
    content = other.path.read_bytes()
    monkeypatch.setattr(
        sys.modules["jaxcompress.export.litert_format.litert_file"], "convert", lambda *_: content
    )
    with pytest.raises(ValueError, match="litert: the file that was written differs"):
        jc.export.litert(dense, {"w": W}, X, path=path)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2
    assert jc.export.litert(dense, {"w": W}, X, path=path, verify=False).file_bytes


def test_onnx_reports_what_its_run_showed(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    path, several = tmp_path / "a.onnx", lambda p, x: {"y": dense(p, x), "a": (x[:, 0] > 0, x + 1)}
    shown = jc.export.onnx(several, {"w": W}, X, path=path).verified
    assert shown.largest_difference is not None and shown.bound and not shown.reason
    assert shown.largest_difference <= shown.bound < 1e-5
    recipe = jc.quantize.weights(jc.formats.integer(8), axis=-1)
    packed, shape = (
        recipe.pack({"w": W}, recipe.init({"w": W})),
        jax.ShapeDtypeStruct(X.shape, "f4"),
    )
    shown = jc.export.onnx(dense, packed, shape, path=path, products="dynamic").verified
    # Activations on 256 codes: half a step of each moves the result, by far more than float32.
    assert shown.largest_difference is not None and 1e-4 < shown.largest_difference < 0.1
    for x in (X[:, :3], X.astype(np.float16)):
        with pytest.raises(ValueError, match=r"export.onnx\(examples\): must be"):
            jc.export.onnx(dense, {"w": W}, shape, path=path, examples=x)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    shown = jc.export.onnx(dense, packed, X, path=path).verified
    assert shown.largest_difference is None and "onnxruntime is not installed" in shown.reason


@pytest.mark.parametrize("activations", ["uint8", "int8"])
def test_an_integer_program_runs_as_it_is_written(activations, tmp_path):
    pytest.importorskip("onnxruntime")
    program = jc.quantize.integer_only(dense_only, {"w": W}, [X])
    path, step = tmp_path / "a.onnx", float(program.grids[program.output].qparams.scale)
    for examples in (None, X, (X[:2],)):
        shown = jc.export.onnx(
            program, path=path, activations=activations, examples=examples
        ).verified
        assert shown.largest_difference is not None and shown.largest_difference <= 1.01 * step
    with pytest.raises(ValueError, match=r"export.onnx\(examples\): must have the shape"):
        jc.export.onnx(program, path=path, examples=X[:, :3])


def test_an_onnx_file_that_is_wrong_is_not_left(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    module = sys.modules["jaxcompress.export.onnx_format.onnx_file"]
    path, other = tmp_path / "a.onnx", tmp_path / "b.onnx"
    path.write_bytes(b"old")
    wrong = {
        "differs from the function by": lambda p, x: dense({"w": p["w"] + 0.01}, x),
        r"gives float32\[5, 4\] as output 0": lambda p, x: dense(p, x)[:, :4],
        "has 2 outputs, the function 1": lambda p, x: (dense(p, x), x),
    }
    for message, fn in wrong.items():
        jc.export.onnx(fn, {"w": W}, X, path=other)
        with monkeypatch.context() as patch:
            loaded = jc.export.session(other)
            patch.setattr(module, "of_bytes", lambda *_, loaded=loaded: loaded)
            with pytest.raises(
                ValueError, match=f"export.onnx: the file that was written {message}"
            ):
                jc.export.onnx(dense, {"w": W}, X, path=path)
        assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2
    patched = lambda *_: jc.export.session(path)
    monkeypatch.setattr(module, "of_bytes", patched)
    with pytest.raises(ValueError, match=r"export.onnx: nothing was written.*Runtime refuses"):
        jc.export.onnx(dense, {"w": W}, X, path=path)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2
    assert jc.export.onnx(dense, {"w": W}, X, path=path, verify=False).verified.reason
