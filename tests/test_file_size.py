"""Headers are short, and sizes of files are known before they are written."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from _trees import bits_equal

import jaxcompress as jc
from experiments.models import digits, mlperf_tiny
from jaxcompress.core.storage.scheme import parse_table, table_text
from jaxcompress.export import file_size, load, save
from jaxcompress.formats import integer

pytestmark = pytest.mark.broad

int8, int4 = (jc.quantize.weights(integer(bits), axis=-1) for bits in (8, 4))
RULES = {
    "int8": lambda: jc.by_path({".*kernel": int8}, default=jc.identity()),
    "int4": lambda: jc.by_path({".*kernel": int4}, default=jc.identity()),
    "sparse": lambda: jc.chain(jc.prune.magnitude(0.7), RULES["int4"]()),
    "sparser": lambda: jc.chain(jc.prune.magnitude(0.97), RULES["int8"]()),
    "nf4": lambda: jc.by_path(
        {".*kernel": jc.quantize.weights(jc.formats.nf4(), axis=-1)}, default=int8
    ),
    "float": jc.identity,
}


def normal(shapes):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), shapes)


def variables(model, *shape):
    return jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))


NETWORKS = {
    "DS-CNN": lambda: variables(mlperf_tiny.DsCnn(), 1, 49, 10, 1),
    "digits": lambda: variables(digits.DigitsCNN(features=(16, 32), hidden=96), 1, 8, 8, 1),
    "matrices": lambda: {"a/b c": jax.ShapeDtypeStruct((70, 90), jnp.bfloat16), "é{": {
        "kernel": jax.ShapeDtypeStruct((30, 10), jnp.float32)},
        "n": jax.ShapeDtypeStruct((5,), jnp.int32)},
    "one array": lambda: jax.ShapeDtypeStruct((40, 60), jnp.float32),
}  # fmt: skip


@pytest.mark.parametrize("network", NETWORKS)
def test_the_size_of_a_file_is_predicted_exactly_from_shapes(tmp_path, network):
    params = normal(NETWORKS[network]())
    scale = jc.formats.QParams(jnp.float32(0.5))
    grids = {f"tap {k}": jc.core.Grid(scale, integer(8)) for k in range(3)}
    for rule in RULES:
        if network in ("one array", "matrices") and rule not in ("float", "sparse"):
            continue
        recipe = RULES[rule]()
        if network in ("one array", "matrices") and rule == "sparse":
            recipe = jc.chain(jc.prune.magnitude(0.7), int4 if network == "one array" else int8)
        packed = recipe.pack(params, recipe.init(params))
        shapes = jax.eval_shape(lambda p=packed: p)
        for activations, metadata in (({}, {}), (grids, {"model": 'a "net" {1}'})):
            more = {"activations": activations, "metadata": metadata}
            path = tmp_path / "p.safetensors"
            size = save(path, packed, **more)
            assert size == file_size(shapes, **more) == file_size(packed, **more)
            assert size.file_bytes == os.path.getsize(path) == jc.core.file_bytes(shapes, **more)
            assert size.payload_bytes == jc.packed_bytes((packed, activations))
            if size.payload_bytes > 20_000:
                assert size.header_bytes <= 0.08 * size.payload_bytes
            found = load(path, like=packed if network == "one array" else None)
            assert bits_equal(jax.tree.leaves(found.params), jax.tree.leaves(packed))
            assert found.metadata == metadata and list(found.activations) == list(activations)
            assert all(grid.format == integer(8) for grid in found.activations.values())
            assert safetensors.numpy.load_file(path)


def test_the_header_of_a_small_network_is_short():
    params = normal(NETWORKS["DS-CNN"]())
    recipe = RULES["int8"]()
    size = file_size(recipe.pack(params, recipe.init(params)))
    assert 20_000 < size.payload_bytes < 60_000
    assert size.header_bytes <= 0.08 * size.payload_bytes
    assert size.header_bytes < 2_000


def test_files_of_the_former_version_are_larger_and_say_so(tmp_path):
    (tmp_path / "p").write_bytes(b"")
    save(tmp_path / "p", {"w": jnp.ones(3)})
    raw = (tmp_path / "p").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert json.loads(raw[8 : 8 + length])["__metadata__"]["jaxcompress"] == "4"


NAMES = ["a", "a b", "a{b}", "x;y|z", "50%", "é", 'q"uo\\te', "e=m&c>2,1", "new\nline", "%20"]


def test_tables_come_back_whatever_the_names_are(tmp_path):
    tree = {name: {inner: jnp.full(3, k, jnp.float32) for inner in NAMES[: 1 + k]}
            for k, name in enumerate(NAMES)}  # fmt: skip
    save(tmp_path / "p", tree)
    assert bits_equal(load(tmp_path / "p").params, tree)
    grids = {name: jc.core.Grid(jc.formats.QParams(jnp.float32(k + 1)), integer(8))
             for k, name in enumerate(NAMES)}  # fmt: skip
    save(tmp_path / "p", tree, activations=grids)
    found = load(tmp_path / "p").activations
    assert {n: float(g.qparams.scale) for n, g in found.items()} == dict(
        zip(NAMES, range(1, 1 + len(NAMES)), strict=True)
    )


@pytest.mark.parametrize(
    "text",
    [
        "", ">", ">a", ">a 3,", ">a 3 0", ">b 3,a 3", ">a 3}", ">a{b 3", ">a{}", ">a 03",
        "int4|>a 3 0", ";int4|>a 3", ">a 3 1", "int4||||>a 3", ">a 3,a{b 3}", ">a%61 3",
        "int4|||float32>a 3", ">a{b 3}}",
    ],
)  # fmt: skip
def test_tables_that_no_writer_makes_are_refused(text):
    with pytest.raises((ValueError, IndexError)):
        assert table_text(parse_table(text)) == text


def test_a_budget_of_the_file_is_kept_to_the_byte(tmp_path):
    rng = np.random.default_rng(0)
    square = lambda: jnp.asarray(rng.normal(size=(24, 24)), jnp.float32)
    params: dict = {f"layer{k}": {"kernel": square()} for k in range(5)}
    params["bias"] = jnp.ones(24)

    def apply_fn(p, x):
        for k in range(5):
            x = jnp.tanh(x @ p[f"layer{k}"]["kernel"])
        return x + p["bias"][None]

    x = jnp.asarray(rng.normal(size=(16, 24)), jnp.float32)
    search = jc.search.Search(
        apply_fn, params, [(x,)], device="stm32l4r5",
        options=jc.search.integer_options((2, 4, 8)), fitted=False,
    )  # fmt: skip
    least = None
    for limit in (4400, 3600, 3000, 2600):
        plan = search.plans(jc.Budget(file_bytes=limit), candidates=4)[0]
        found = search.apply(plan)
        size = save(tmp_path / "p", found.packed, activations=found.grids)
        assert plan.predicted["file_bytes"] == found.plan.predicted["file_bytes"]
        assert size.file_bytes == os.path.getsize(tmp_path / "p") == plan.predicted["file_bytes"]
        assert size.file_bytes <= limit
        assert size.payload_bytes - jc.packed_bytes(found.grids) == jc.packed_bytes(found.packed)
        least = size.file_bytes
    # To the byte: what the smallest plan takes is enough, one byte less than all int2 is not.
    smallest = search.apply(search.uniform("int2"))
    exact = file_size(smallest.packed, activations=smallest.grids).file_bytes
    assert search.plans(jc.Budget(file_bytes=exact))[0].predicted["file_bytes"] == exact <= least
    with pytest.raises(jc.search.Infeasible, match="file_bytes"):
        search.plans(jc.Budget(file_bytes=exact - 1))


@pytest.mark.parametrize(
    "dtype, low, high, payload",
    [
        (jnp.int4, -8, 8, 18 + 4096),  # 35 and 8,192 codes, two to a byte
        (jnp.uint4, 0, 16, 18 + 4096),
        (jnp.int2, -2, 2, 9 + 2048),
        (jnp.uint2, 0, 4, 9 + 2048),
        (jnp.float4_e2m1fn, 0, 4, 18 + 4096),
    ],
)
def test_arrays_of_nibbles_take_their_bits(tmp_path, dtype, low, high, payload):
    rng = np.random.default_rng(0)
    numbers = {"a": rng.integers(low, high, (5, 7)), "b": rng.integers(low, high, (64, 128))}
    params = {name: jnp.asarray(x, jnp.int32).astype(dtype) for name, x in numbers.items()}
    assert jc.core.packed_bytes(params) == payload
    product = lambda p, x: x @ p["b"].astype(jnp.float32)
    cost = jc.cost.estimate(product, {"b": params["b"]}, jnp.ones((1, 64)), device="stm32l4r5")
    assert cost.weight_bytes == jc.core.packed_bytes(params["b"])
    jc.export.save(tmp_path / "p", params)
    size = (tmp_path / "p").stat().st_size
    assert size == jc.core.file_bytes(params) == jc.core.file_bytes(jax.eval_shape(lambda: params))
    found = jc.export.load(tmp_path / "p").params
    for name, x in numbers.items():
        assert found[name].dtype == dtype
        np.testing.assert_array_equal(np.asarray(found[name]).astype(np.float32), x)


@pytest.mark.parametrize(
    "dtype, low, high, wider", [("int4", -8, 8, 1), ("uint4", 0, 16, 2), ("int8", -8, 8, 1)]
)
def test_integers_that_no_method_packed_are_codes_in_every_file(tmp_path, dtype, low, high, wider):
    # As others' quantizers leave them: whole numbers, a zero point, a scale for each output.
    rng = np.random.default_rng(0)
    codes, x = rng.integers(low, high, (64, 64)), rng.normal(size=(4, 64)).astype(np.float32)
    scale = rng.uniform(0.1, 0.2, (1, 64)).astype(np.float32)
    params = {"w": jnp.asarray(codes, dtype), "scale": jnp.asarray(scale)}
    fn = lambda p, x: x @ (p["w"].astype(jnp.float32) * p["scale"])
    want = x.astype(np.float64) @ (codes * scale.astype(np.float64))
    payload = jc.packed_bytes(params)
    for kind, suffix, more in (("onnx", "onnx", 800), ("litert", "tflite", 2000)):
        path = tmp_path / f"a.{suffix}"
        write = lambda kind=kind, path=path: getattr(jc.export, kind)(
            fn, params, jnp.asarray(x), path=path
        )
        if kind == "litert" and wider > 1:
            with pytest.warns(UserWarning, match="'w' .int8: LiteRT has no uint4; up to 2,048 byt"):
                report = write()
            assert report.widened == {"w": "int8: LiteRT has no uint4"}
        else:
            write()
        # 64 x 64 float32 are 16,384 bytes
        assert path.stat().st_size < payload * (wider if kind == "litert" else 1) + more
        (found,) = jc.export.session(path).run(x)
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-4)
    jc.export.stablehlo(fn, params, jnp.asarray(x), path=tmp_path / "a.stablehlo")
    assert (tmp_path / "a.stablehlo").stat().st_size < payload + 7500
    found = jc.export.load_stablehlo(tmp_path / "a.stablehlo")(x)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-4)


def test_a_codebook_is_looked_up_in_a_stablehlo_file(tmp_path):
    rng = np.random.default_rng(0)
    codes, table = rng.integers(0, 16, (8, 6)), rng.normal(size=16).astype(np.float32)
    params = {"w": jnp.asarray(codes, "uint4"), "table": table}
    x, path = rng.normal(size=(3, 8)).astype(np.float32), tmp_path / "a.stablehlo"
    fn = lambda p, x: x @ p["table"][p["w"].astype(jnp.int32)]
    jc.export.stablehlo(fn, params, jnp.asarray(x), path=path)
    want = x.astype(np.float64) @ table.astype(np.float64)[codes]
    np.testing.assert_allclose(jc.export.load_stablehlo(path)(x), want, rtol=1e-5, atol=1e-5)


def test_scales_and_results_that_litert_has_not_for_codes_are_floats(tmp_path):
    # A scale for each input of a layer; a weight that is a result.
    rng = np.random.default_rng(0)
    codes, x = rng.integers(-128, 128, (8, 6)), rng.normal(size=(3, 8)).astype(np.float32)
    scale, path = rng.uniform(0.1, 0.2, (8, 1)).astype(np.float32), tmp_path / "a.tflite"
    params = {"w": jnp.asarray(codes, "int8"), "out": jnp.asarray(codes, "int8"), "scale": scale}

    def fn(p, x):
        return x @ (p["w"].astype(jnp.float32) * p["scale"]), p["out"].astype(jnp.float32)

    report = jc.export.litert(fn, params, jnp.asarray(x), path=path)
    want = x.astype(np.float64) @ (codes * scale.astype(np.float64))
    found = jc.export.session(path).run(x)
    np.testing.assert_allclose(found[0], want, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(found[1], codes)
    assert {name: why[:7] for name, why in report.widened.items()} == {
        "w": "float32",
        "out": "float32",
    }


@pytest.mark.parametrize(
    "dtype, instead", [("uint2", "int4"), ("uint4", "uint8"), ("float8_e4m3", "bfloat16")]
)
def test_leaves_that_orbax_cannot_store_are_named_before_anything_is_written(
    tmp_path, dtype, instead
):
    step = jc.train.make_step(jc.train.stateless(lambda p, x: x @ p["w"]), optax.sgd(0.1))
    state = jc.train.create({"w": jnp.ones((4, 2))}, jc.identity(), optax.sgd(0.1))
    state = dataclasses.replace(state, model_state={"codes": jnp.ones((3, 5), dtype)})
    data = jc.train.batches((np.eye(4, dtype="f4"), np.arange(4) % 2), size=2, seed=0)
    there = tmp_path / "run"
    with pytest.raises(TypeError, match=rf"model_state/codes: .* {dtype}\[3, 5\]; .* {instead},"):
        jc.train.fit(step, state, data, steps=1, checkpoints=jc.train.Checkpoints(there))
    assert not there.exists()
