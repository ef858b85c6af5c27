"""StableHLO files: bit for bit the function, in a process without its code, as small as packed."""

import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.formats import integer
from tests._models import nnx_cnn

pytest.importorskip("flatbuffers")


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


PARAMS = {"a": normal(1, 64, 96), "b": normal(2, 96, 4)}


def fn(p, x):
    return {"logits": jax.nn.relu(x @ p["a"]) @ p["b"], "rows": x.sum(1)}


def pack(params, bits, names=".*", **how):
    recipe = jc.by_path(
        {names: jc.quantize.weights(integer(bits), axis=-1, **how)}, default=jc.identity()
    )
    return recipe.pack(params, recipe.init(params))


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_packed_constants_and_the_same_bits(bits, tmp_path):
    packed, x = pack(PARAMS, bits, group=16), normal(3, 5, 64)
    path = tmp_path / "a.stablehlo"
    written = jc.export.stablehlo(fn, packed, x, path=path)
    size = jc.packed_bytes(packed)
    assert written.file_bytes == path.stat().st_size
    assert size < written.file_bytes < size + 10_000
    program = jc.export.load_stablehlo(path)
    assert program.platforms == ("cpu", "cuda", "rocm", "tpu")
    assert program.inputs == (("x", "float32", (5, 64)),)
    assert [port.shape for port in program.outputs] == [(5, 4), (5,)]
    want = jax.jit(lambda x: fn(jc.unpack(packed), x))(x)
    same(program(x), want)
    same(jax.jit(program)(x), want)
    same(written(x), want)


def test_masked_leaves_stay_sparse(tmp_path):
    w = jnp.where(jnp.arange(64 * 96).reshape(64, 96) % 9 == 0, PARAMS["a"], 0.0)
    recipe = jc.chain(
        jc.prune.fixed({"a": w != 0, "b": jnp.ones((), bool)}),
        jc.quantize.weights(integer(8), axis=-1),
    )
    params = {"a": w, "b": PARAMS["b"]}
    packed, x = recipe.pack(params, recipe.init(params)), normal(3, 2, 64)
    assert isinstance(packed["a"], jc.Masked)
    written = jc.export.stablehlo(fn, packed, x, path=tmp_path / "a", platforms=["cpu"])
    assert written.file_bytes < jc.packed_bytes(packed) + 12_000
    same(written(x), jax.jit(lambda x: fn(jc.unpack(packed), x))(x))


def test_a_free_batch(tmp_path):
    packed = pack(PARAMS, 8)
    jc.export.stablehlo(fn, packed, normal(3, 5, 64), path=tmp_path / "a", batch="b")
    program = jc.export.load_stablehlo(tmp_path / "a")
    assert program.inputs[0].shape == ("b", 64)
    assert program.outputs[0].shape == ("b", 4)
    for rows in (1, 7):
        x = normal(rows, rows, 64)
        same(program(x), jax.jit(lambda x: fn(jc.unpack(packed), x))(x))
    with pytest.raises(ValueError, match="shape"):
        program(normal(0, 2, 63))


def test_another_framework(tmp_path):
    model = nnx_cnn()
    packed = pack(model.params, 8, ".*kernel")
    written = jc.export.stablehlo(model.apply, packed, model.x, path=tmp_path / "a")
    same(written(model.x), jax.jit(lambda x: model.apply(jc.unpack(packed), x))(model.x))


def test_an_integer_program(tmp_path):
    x = normal(4, 6, 64)
    network = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    program = jc.quantize.integer_only(network, PARAMS, [x])
    codes = program.quantize_input(x)
    want = program.run(codes)
    whole = jc.export.stablehlo(program, path=tmp_path / "a", interface="codes", batch="b")
    assert (whole.inputs[0].dtype, whole.outputs[0].dtype) == ("uint8", "uint8")
    same(jc.export.load_stablehlo(tmp_path / "a")(codes[:3]), want[:3])
    float32 = jc.export.stablehlo(program, x, path=tmp_path / "b", input_names=["image"])
    assert float32.inputs == (("image", "float32", (6, 64)),)
    same(float32(x), program.dequantize(want))


ONLY_EXPORT = """
import sys, numpy as np
from jaxcompress.export import load_stablehlo
np.save(sys.argv[3], load_stablehlo(sys.argv[1])(np.load(sys.argv[2]))["logits"])
"""
ONLY_JAX = """
import sys, numpy as np, jax.export
raw = open(sys.argv[1], "rb").read()
start = 8 + int.from_bytes(raw[:8], "little")
program = jax.export.deserialize(bytearray(raw[start:]))
np.save(sys.argv[3], program.call(np.load(sys.argv[2]))["logits"])
assert "jaxcompress" not in sys.modules
"""


@pytest.mark.parametrize("script", [ONLY_EXPORT, ONLY_JAX], ids=["export", "jax"])
def test_another_process(script, tmp_path):
    packed, x = pack(PARAMS, 4), normal(5, 3, 64)
    jc.export.stablehlo(fn, packed, x, path=tmp_path / "a", batch="n")
    np.save(tmp_path / "x.npy", x)
    files = [str(tmp_path / name) for name in ("a", "x.npy", "y.npy")]
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), *files], check=True)
    want = jax.jit(lambda x: fn(jc.unpack(packed), x))(x)["logits"]
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), want)


def test_the_library_imports_no_extra():
    script = (
        "import sys, jaxcompress; "
        "print([m for m in ('litert_converter', 'ai_edge_litert', 'tflite_micro') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_damaged_and_foreign_files(tmp_path):
    path = tmp_path / "a.stablehlo"
    jc.export.stablehlo(fn, PARAMS, normal(1, 1, 64), path=path)
    raw = path.read_bytes()
    for content, message in (
        (raw[:5], "truncated"),
        (raw[:400], "truncated"),
        (raw[:-1], "truncated"),
        (raw + b"x", "bytes follow"),
        (raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:], "checksum"),
        (b"ML\xefR" + raw, "not a packed file"),
        (b"", "truncated"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            jc.export.load_stablehlo(path)
    jc.export.save(path, PARAMS)
    with pytest.raises(ValueError, match="of another kind; this program reads StableHLO files 1"):
        jc.export.load_stablehlo(path)
    path.write_bytes(raw.replace(b'"stablehlo":"1"', b'"stablehlo":"2"'))
    with pytest.raises(ValueError, match="checksum"):
        jc.export.load_stablehlo(path)
    with pytest.raises(FileNotFoundError):
        jc.export.load_stablehlo(tmp_path / "none")
    path.write_bytes(raw)
    with pytest.raises(
        ValueError, match="a.stablehlo: it is a program that export.stablehlo wrote.*load_stablehlo"
    ):
        jc.export.load(path)


def test_a_program_that_jax_cannot_read(tmp_path):
    from jaxcompress.export import container

    metadata = {"stablehlo": "1", "jax": "99.0", "inputs": "[]", "outputs": "[]"}
    content, _ = container.encode({"program": np.zeros(64, np.uint8)}, metadata)
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match="written by JAX 99.0, this is JAX .* cannot read"):
        jc.export.load_stablehlo(tmp_path / "a")
    content, _ = container.encode({"program": np.zeros(64, np.uint8)}, {"stablehlo": "2"})
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match="a file of version '2'; this program reads"):
        jc.export.load_stablehlo(tmp_path / "a")


def test_bad_arguments(tmp_path):
    path, x = tmp_path / "a", normal(1, 2, 64)
    with pytest.raises(ValueError, match=r"platforms.*known are .*got \['gpu'\]"):
        jc.export.stablehlo(fn, PARAMS, x, path=path, platforms=["gpu"])
    with pytest.raises(ValueError, match="known are"):
        jc.export.stablehlo(fn, PARAMS, x, path=path, platforms=[])
    with pytest.raises(ValueError, match="must be a name, 'b' say, got '2'"):
        jc.export.stablehlo(fn, PARAMS, x, path=path, batch="2")
    with pytest.raises(ValueError, match="one first axis"):
        jc.export.stablehlo(lambda p, x, y: x, PARAMS, x, x[0], path=path, batch="b")
    with pytest.raises(TypeError, match="a function, its params and its inputs"):
        jc.export.stablehlo(fn, PARAMS, path=path)
    with pytest.raises(TypeError, match="must be an array, got float"):
        jc.export.stablehlo(fn, PARAMS, 1.0, path=path)
    with pytest.raises(ValueError, match="input_names.*needs 1 different names"):
        jc.export.stablehlo(fn, PARAMS, x, path=path, input_names=["a", "b"])
    back = lambda p, x: jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
    with pytest.raises(ValueError, match="stablehlo: JAX cannot export the program"):
        jc.export.stablehlo(back, PARAMS, x, path=path, platforms=["cpu"])
    program = jc.quantize.integer_only(lambda p, x: x @ p["a"], PARAMS, [x])
    with pytest.raises(ValueError, match="'float32' or 'codes', got 'int8'"):
        jc.export.stablehlo(program, path=path, interface="int8")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="takes one input, got 2"):
        jc.export.stablehlo(program, x, x, path=path)
    assert not list(tmp_path.iterdir())


def test_without_flatbuffers(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(ImportError, match=r"flatbuffers: pip install 'jaxcompress\[export\]'"):
        jc.export.stablehlo(fn, PARAMS, normal(1, 1, 64), path=tmp_path / "a")
