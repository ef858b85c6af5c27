"""Files in their runtimes side by side, and the commands around them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.cli import main
from jaxcompress.cli_models import function, shaped
from jaxcompress.export.benchmarks import outputs
from jaxcompress.export.sessions import example, session

pytestmark = pytest.mark.broad

pytest.importorskip("onnxruntime")
pytest.importorskip("ai_edge_litert")
pytest.importorskip("litert_converter")


def apply_fn(params, x):
    """Two dense layers; the tests name it on the command line."""
    return jax.nn.relu(x @ params["up"]) @ params["down"]


def scaled(factor):
    """What a factory returns."""
    return lambda params, x: apply_fn(params, x * factor)


@pytest.fixture(scope="module")
def network():
    rng = np.random.default_rng(0)
    params = {"up": rng.normal(size=(6, 16)), "down": rng.normal(size=(16, 4))}
    x = rng.normal(size=(10, 6)).astype(np.float32)
    return jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), params), x


@pytest.fixture(scope="module")
def files(network, tmp_path_factory):
    params, _ = network
    folder, one = tmp_path_factory.mktemp("files"), jax.ShapeDtypeStruct((1, 6), jnp.float32)
    paths = {n: folder / f"a{s}" for n, s in
             (("onnx", ".onnx"), ("litert", ".tflite"), ("jax", ".stablehlo"))}  # fmt: skip
    jc.export.onnx(apply_fn, params, one, path=paths["onnx"])
    jc.export.litert(apply_fn, params, one, path=paths["litert"])
    jc.export.stablehlo(apply_fn, params, one, path=paths["jax"], batch="b")
    return paths


def reference(params, x):
    """In float64."""
    up, down = (np.asarray(params[name], np.float64) for name in ("up", "down"))
    return np.maximum(x.astype(np.float64) @ up, 0) @ down


def test_all_runtimes_give_the_same(network, files):
    params, x = network
    want = reference(params, x)
    found = jc.export.benchmark(files, x, reference=want, repeats=2)
    assert list(found) == ["onnx", "litert", "jax"]
    for name, row in found.items():
        assert row.file_bytes == files[name].stat().st_size and row.latency_s > 0
        assert row.argmax_agreement == 1.0
        assert row.largest_difference is not None and row.largest_difference < 1e-4
        np.testing.assert_allclose(outputs(session(files[name]), x, batch=4), want, atol=1e-4)


def test_codes_are_compared_as_numbers(network, tmp_path):
    params, x = network
    program = jc.quantize.integer_only(apply_fn, params, [x])
    paths = {name: tmp_path / f"{name}.tflite" for name in ("numbers", "codes")}
    jc.export.litert(program, path=paths["numbers"])
    jc.export.litert(program, path=paths["codes"], interface="int8")
    loaded = session(paths["codes"])
    (taken,), (made,) = loaded.takes, loaded.gives
    assert taken is not None and made is not None
    (scale, zero), (step, start) = taken, made
    codes = np.clip(np.rint(x / scale) + zero, -128, 127).astype(np.int8)
    given = outputs(loaded, codes)  # codes in, codes out
    assert given.dtype == np.int8
    want = (given.astype(np.float64) - start) * step
    np.testing.assert_allclose(outputs(loaded, x), want, rtol=1e-6)
    np.testing.assert_allclose(outputs(session(paths["numbers"]), x), want, rtol=1e-5, atol=1e-6)
    found = jc.export.benchmark(paths, x, reference=want, repeats=1)
    differences = [row.largest_difference for row in found.values()]
    assert len(differences) == len(paths)
    assert all(apart is not None and apart < 1e-5 for apart in differences)


def test_differences_are_counted(network, files):
    params, x = network
    changed = reference(params, x)
    worst = changed[3].argmin()
    changed[3, worst] = changed[3].max() + 5
    row = jc.export.benchmark(files["onnx"], x, reference=changed, repeats=1)[str(files["onnx"])]
    assert row.argmax_agreement == 0.9 and (row.largest_difference or 0.0) > 5
    same = jc.export.benchmark(
        files["jax"], x, reference=lambda x: apply_fn(params, x), repeats=1, batch=10
    )
    assert same[str(files["jax"])].equal_rows == 1.0


def test_without_inputs_random_ones_are_timed(files):
    found = jc.export.benchmark(files, repeats=1, batch=3)
    assert {name: row.batch for name, row in found.items()} == {"onnx": 3, "litert": 1, "jax": 3}
    assert all(row.argmax_agreement is None for row in found.values())
    (x,) = example(session(files["onnx"]), batch=5)
    assert x.shape == (5, 6) and x.dtype == np.float32


def test_errors(network, files, tmp_path):
    params, x = network
    with pytest.raises(ValueError, match="says the runtime"):
        session(tmp_path / "model.pb")
    with pytest.raises(FileNotFoundError, match="no such file"):
        session(tmp_path / "model.onnx")
    for suffix in (".onnx", ".tflite", ".stablehlo"):
        (tmp_path / f"bad{suffix}").write_bytes(b"nothing of the kind")
        with pytest.raises(ValueError):
            session(tmp_path / f"bad{suffix}")
    with pytest.raises(ValueError, match="threads"):
        session(files["onnx"], threads=0)
    with pytest.raises(ValueError, match="there are no files"):
        jc.export.benchmark({})
    with pytest.raises(ValueError, match=r"onnx: input 0 must be float32 \[N, 6\]"):
        jc.export.benchmark(files, x[:, :5])
    with pytest.raises(ValueError, match="takes 1 inputs, got 2"):
        jc.export.benchmark(files, x, x)
    with pytest.raises(ValueError, match="9 rows for 10"):
        jc.export.benchmark(files, x, reference=reference(params, x)[:9])
    with pytest.raises(ValueError, match="no inputs to compare on"):
        jc.export.benchmark(files, reference=x)


def test_commands_go_from_a_packed_file_to_a_timed_one(network, tmp_path, capsys, monkeypatch):
    params, x = network
    monkeypatch.chdir(tmp_path)
    recipe = jc.quantize.weights(jc.formats.integer(8), axis=-1)
    jc.export.save("packed.safetensors", recipe.pack(params, recipe.init(params)))
    np.save("x.npy", np.tile(x, (13, 1)))
    common = ["--model", f"{__name__}:apply_fn", "--input", "float32[1,6]"]
    assert main(["cost", "packed.safetensors", *common, "--device", "stm32l4r5", "--json"]) == 0
    cost = json.loads(capsys.readouterr().out)
    assert cost["weight_bytes"] == 6 * 16 + 16 * 4 + 4 * 20 and cost["macs"] == 160
    for target, extra in (
        ("a.onnx", ["--integers", "x.npy"]),
        ("b.onnx", ["--dynamic"]),
        ("c.tflite", ["--integers", "x.npy"]),
        ("d.tflite", []),
        ("e.stablehlo", []),
    ):
        assert main(["export", "packed.safetensors", target, *common, *extra]) == 0, target
        assert "bytes" in capsys.readouterr().out
    names = ["e.stablehlo", "a.onnx", "b.onnx", "c.tflite", "d.tflite"]
    assert main(["bench", *names, "--inputs", "x.npy", "--repeats", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    spread = float(np.abs(reference(params, x)).max())
    for name in names:
        # Of eight bits: what weights, inputs and results lose each.
        assert found[name]["largest_difference"] < 0.05 * spread, name
    assert main(["bench", "e.stablehlo", "a.onnx", "--repeats", "1"]) == 0
    assert "a.onnx" in capsys.readouterr().out


def test_inspect_looks_into_all_files(files, capsys):
    found = {}
    for name, path in files.items():
        assert main(["inspect", str(path), "--json"]) == 0
        found[name] = json.loads(capsys.readouterr().out)
        assert found[name]["file_bytes"] == path.stat().st_size
        assert main(["inspect", str(path)]) == 0
        assert "float32[" in capsys.readouterr().out
    assert found["litert"]["inputs"] == ["float32[1,6]"] and not found["litert"]["integer"]
    assert sum(found["litert"]["operators"].values()) == 2
    assert found["onnx"]["operators"]["MatMul"] == 2


def test_names_of_functions_and_shapes():
    assert function(f"{__name__}:apply_fn") is apply_fn
    params = {"up": jnp.eye(2), "down": jnp.eye(2)}
    x = jnp.array([[1.0, 2.0]])
    np.testing.assert_array_equal(function(f"{__name__}:scaled(3)")(params, x), [[3.0, 6.0]])
    assert shaped("float32[1, 6]").shape == (1, 6) and shaped("int32[]").shape == ()
    for text, message in (
        ("no_colon", "MODULE:NAME"),
        ("no.such.module:f", "No module"),
        (f"{__name__}:nothing", "nothing"),
        (f"{__name__}:scaled(a+)", "must be literals"),
        ("json:__name__", "cannot be called"),
    ):
        with pytest.raises(ValueError, match=message):
            function(text)
    for text in ("float32", "float99[1]", "float32[a]"):
        with pytest.raises(ValueError, match="--input must be"):
            shaped(text)


def test_bad_commands(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jc.export.save("p.safetensors", {"up": jnp.ones((6, 16)), "down": jnp.ones((16, 4))})
    common = ["--model", f"{__name__}:apply_fn", "--input", "float32[1,6]"]
    for arguments, message in (
        (["export", "p.safetensors", "a.pb", *common], "target must be"),
        (["export", "p.safetensors", "a.stablehlo", *common, "--dynamic"], "--dynamic is for"),
        (["export", "none.safetensors", "a.onnx", *common], "none.safetensors"),
        (["bench", "none.onnx"], "no such file"),
        (["cost", "p.safetensors", *common, "--device", "toaster"], "toaster"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("a.*"))
