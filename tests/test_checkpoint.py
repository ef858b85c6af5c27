"""Packed files: exact sizes, exact contents, strict reading, nothing half-written."""

import json
import os
import subprocess
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from _trees import bits_equal, small_tree

import jaxcompress as jc
from jaxcompress.export import container, inspect, load, save
from jaxcompress.formats import fixed_point, integer

w = jc.quantize.weights
RECIPES = {
    "plain": jc.identity(),
    "int3": w(integer(3), axis=-1),
    "uint4_groups": w(integer(4, symmetric=False), axis=-1, group=5),
    "int8_full": w(integer(8, narrow=False)),
    "q1.10": w(fixed_point(1, 10)),
    "sparse": jc.prune.magnitude(0.9),
    "sparser": jc.prune.magnitude(0.97),
    "sparse_int4": jc.chain(jc.prune.magnitude(0.8, scope="global"), w(integer(4), axis=0)),
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_round_trip_and_exact_bytes(tmp_path, recipe, dtype):
    params = small_tree(dtype)
    comp = RECIPES[recipe]
    state = comp.init(params)
    packed = comp.pack(params, state)
    size = save(tmp_path / "p.safetensors", packed, metadata={"model": "small"})
    assert size.payload_bytes == jc.packed_bytes(packed)
    assert size.file_bytes == os.path.getsize(tmp_path / "p.safetensors")
    assert size.file_bytes == size.header_bytes + size.payload_bytes
    loaded, grids, metadata = load(tmp_path / "p.safetensors")
    assert not grids and metadata == {"model": "small"}
    assert bits_equal(loaded, packed)
    assert bits_equal(jc.unpack(loaded), comp.apply(params, state))


def test_the_format_s_own_reader_reads_it(tmp_path):
    params = small_tree()
    packed = w(integer(4)).pack(params, w(integer(4)).init(params))
    save(tmp_path / "p.safetensors", packed)
    arrays = safetensors.numpy.load_file(tmp_path / "p.safetensors")
    # Small arrays lie in pools, in the order of their names.
    dense = packed["dense"]
    leaves = [packed["conv"]["kernel"], dense["bias"], dense["kernel"]]
    leaves += [packed["empty"], packed["scalar"]]
    scales = [leaf.qparams.scale for leaf in leaves]
    np.testing.assert_array_equal(arrays[".F32"], np.concatenate([s.reshape(-1) for s in scales]))
    codes = [np.asarray(leaf.codes).reshape(-1) for leaf in leaves]
    np.testing.assert_array_equal(arrays[".U8"], np.concatenate(codes))
    np.testing.assert_array_equal(arrays[".I32"], params["steps"].reshape(-1))
    # Large ones have their own names.
    large = {"net": {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(64, 200)), "f4")}}
    packed = w(integer(4)).pack(large, w(integer(4)).init(large))
    save(tmp_path / "p.safetensors", {**packed, "table": large["net"]["kernel"]})
    arrays = safetensors.numpy.load_file(tmp_path / "p.safetensors")
    assert set(arrays) == {"net/kernel.codes", ".F32", "table"}
    np.testing.assert_array_equal(arrays["net/kernel.codes"], packed["net"]["kernel"].codes)
    np.testing.assert_array_equal(arrays["table"], large["net"]["kernel"])


def test_like_gives_lists_and_single_arrays_back(tmp_path):
    tree = [jnp.ones((3, 4)), (jnp.zeros(2), jnp.ones((4, 4)))]
    save(tmp_path / "a", tree)
    assert bits_equal(load(tmp_path / "a", like=tree)[0], tree)
    save(tmp_path / "b", tree[0])
    assert bits_equal(load(tmp_path / "b")[0], tree[0])
    save(tmp_path / "c", {"params": tree[0]})
    assert bits_equal(load(tmp_path / "c").params, {"params": tree[0]})
    with pytest.raises(ValueError, match="no leaf 'kernel'"):
        load(tmp_path / "a", like={"kernel": 0})


def test_fresh_process_reads_it_without_the_models_code(tmp_path):
    params = small_tree()
    comp = RECIPES["sparse_int4"]
    state = comp.init(params)
    save(tmp_path / "p", comp.pack(params, state))
    code = (
        "import sys, jaxcompress as jc, numpy as np;"
        "tree = jc.unpack(jc.export.load(sys.argv[1]).params);"
        "print(np.asarray(tree['dense']['kernel']).tobytes().hex())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "p")],
        capture_output=True,
        text=True,
        check=True,
    )
    view = comp.apply(params, state)
    assert run.stdout.strip() == np.asarray(view["dense"]["kernel"]).tobytes().hex()


def _rewrite_header(raw, change):
    """A file with another header and a checksum that fits it."""
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    change(header)
    header["__metadata__"].pop("crc32")
    plain = json.dumps(header, separators=(",", ":")).encode()
    header["__metadata__"]["crc32"] = f"{zlib.crc32(plain + data):08x}"
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def _set(*keys, value):
    def change(header):
        for key in keys[:-1]:
            header = header[key]
        header[keys[-1]] = value

    return change


DAMAGE = {
    "empty": (lambda raw: b"", "truncated"),
    "cut length": (lambda raw: raw[:5], "truncated"),
    "cut header": (lambda raw: raw[:60], "truncated"),
    "cut data": (lambda raw: raw[:-3], "truncated"),
    "more data": (lambda raw: raw + b"xx", "2 bytes follow"),
    "flipped data": (lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]), "checksum"),
    "not JSON": (lambda raw: raw[:8] + b"\x00" * 40 + raw[48:], "not JSON"),
    "huge header": (lambda raw: (2**60).to_bytes(8, "little") + raw[8:], "truncated or not"),
    "huge shape": (
        lambda raw: _rewrite_header(raw, _set(".I32", "shape", value=[2**47, 2**47])),
        "does not lie where its shape says",
    ),
    "negative shape": (
        lambda raw: _rewrite_header(raw, _set(".I32", "shape", value=[-3])),
        "impossible sizes",
    ),
    "unknown dtype": (
        lambda raw: _rewrite_header(raw, _set(".I32", "dtype", value="I3")),
        "malformed",
    ),
    "newer": (
        lambda raw: _rewrite_header(raw, _set("__metadata__", "jaxcompress", value="9")),
        "scheme version 9, this program reads 2, 3 and 4 with a checksum; a later version",
    ),
    "wrong scheme": (
        lambda raw: _rewrite_header(
            raw, _set("__metadata__", "leaves", value="int4|>dense{kernel 24x99}")
        ),
        "its pools: its parts do not fit",
    ),
    "another table": (
        lambda raw: _rewrite_header(raw, _set("__metadata__", "leaves", value="int4|>a 3,a 3")),
        "its table of leaves: its parts do not fit",
    ),
    "no such format": (
        lambda raw: _rewrite_header(raw, _set("__metadata__", "leaves", value="int77|>a 3")),
        "a: its parts do not fit",
    ),
}


def test_files_of_the_version_that_knew_bitmasks_alone_are_read(tmp_path):
    comp, params = RECIPES["sparse_int4"], small_tree()
    packed = comp.pack(params, comp.init(params))
    # By hand: an array for every part, a scheme for every packed leaf.
    arrays, schemes = {}, {}
    for name, leaf in jc.core.leaves_with_paths(packed, is_leaf=jc.core.is_packed):
        inner = leaf.values if isinstance(leaf, jc.Masked) else leaf
        if not jc.core.is_packed(inner):
            arrays[name] = np.asarray(leaf)
            continue
        arrays[f"{name}.codes"] = np.asarray(inner.codes)
        arrays[f"{name}.scale"] = np.asarray(inner.qparams.scale)
        shape = "x".join(map(str, leaf.shape))
        schemes[f"leaf:{name}"] = f"int4|0||{shape}|float32"
        if isinstance(leaf, jc.Masked):
            arrays[f"{name}.mask"] = np.asarray(leaf.bitmask)
            schemes[f"leaf:{name}"] += f"|{leaf.nnz}"
    scale = np.array([0.5, 0.25], np.float32)
    arrays["activations.scale"] = scale
    grids = {"activations": "in|int8|;out|int8|"}
    for version in ("2", "3"):
        content, _ = container.encode(arrays, {"jaxcompress": version, **schemes, **grids})
        (tmp_path / "p").write_bytes(content)
        found = load(tmp_path / "p")
        assert bits_equal(found.params, packed)
        steps = {name: float(grid.qparams.scale) for name, grid in found.activations.items()}
        assert steps == {"in": 0.5, "out": 0.25}
        assert sum(leaf.stored_bytes for leaf in inspect(tmp_path / "p")) == (
            jc.packed_bytes(packed) + scale.nbytes
        )


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused(tmp_path, damage):
    params = small_tree()
    comp = RECIPES["sparse_int4"]
    save(tmp_path / "p", comp.pack(params, comp.init(params)))
    harm, message = DAMAGE[damage]
    (tmp_path / "p").write_bytes(harm((tmp_path / "p").read_bytes()))
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path / "p")
    assert str(tmp_path / "p") in str(error.value)


def test_a_changed_header_is_refused_even_where_it_still_parses(tmp_path):
    save(tmp_path / "p", {"a": {"bias": jnp.array([1.0, 2.0])}})
    raw = (tmp_path / "p").read_bytes()
    for old, new in ((b'"F32"', b'"I32"'), (b"a{bias", b"b{bias"), (b"crc32", b"crc33")):
        assert old in raw
        (tmp_path / "p").write_bytes(raw.replace(old, new))
        with pytest.raises(ValueError, match="checksum"):
            load(tmp_path / "p")


def test_wide_numbers_survive_and_another_network_is_refused(tmp_path):
    save(tmp_path / "p", {"big": np.array([2**40]), "third": np.array([1 / 3])})
    params = load(tmp_path / "p").params
    assert params["big"][0] == 2**40 and params["third"][0] == 1 / 3
    like = {"big": np.zeros(2), "third": np.zeros(1)}
    with pytest.raises(ValueError, match=r"big has the shape \(1,\), `like` has \(2,\)"):
        load(tmp_path / "p", like=like)


def test_random_damage_is_refused_or_changes_nothing(tmp_path):
    params = small_tree()
    comp = RECIPES["sparse_int4"]
    packed = comp.pack(params, comp.init(params))
    save(tmp_path / "p", packed)
    raw = (tmp_path / "p").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(raw)
        damaged[rng.integers(len(raw))] ^= 1 << rng.integers(8)
        (tmp_path / "p").write_bytes(
            damaged[: rng.integers(len(raw)) if rng.random() < 0.3 else None]
        )
        try:
            loaded = load(tmp_path / "p").params
        except ValueError as error:
            assert str(tmp_path / "p") in str(error)
        else:  # white space of the header, say
            assert bits_equal(loaded, packed)


def test_nothing_half_written_stays(tmp_path, monkeypatch):
    save(tmp_path / "p", {"a": jnp.ones(3)})
    before = (tmp_path / "p").read_bytes()
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path / "p", {"a": jnp.zeros(3)})
    assert (tmp_path / "p").read_bytes() == before and os.listdir(tmp_path) == ["p"]
    with pytest.raises(ValueError, match="metadata key 'crc32' is taken"):
        save(tmp_path / "q", {"a": jnp.ones(3)}, metadata={"crc32": "x"})


def test_grids_of_activations_round_trip(tmp_path):
    low, high = jnp.full((3, 1, 1), -1.0), jnp.linspace(1.0, 2.0, 3).reshape(3, 1, 1)
    formats = {"a/kernel": integer(8, symmetric=False), "b": integer(4), "c/lhs": fixed_point(2, 5)}
    grids = {name: jc.core.Grid(f.qparams(low, high), f) for name, f in formats.items()}
    size = save(tmp_path / "p", {"w": jnp.ones(3)}, activations=grids)
    assert size.payload_bytes == 12 + 3 * 4 + 3 + 3 * 4
    assert bits_equal(load(tmp_path / "p").activations, grids)


def test_zero_size_and_scalars(tmp_path):
    tree = {"none": jnp.zeros((0, 3)), "one": jnp.float32(2.5), "flag": jnp.ones((), bool)}
    comp = w(integer(8))
    packed = comp.pack(tree, comp.init(tree))
    save(tmp_path / "p", packed)
    back = jax.tree.map(np.asarray, jc.unpack(load(tmp_path / "p")[0]))
    assert back["none"].shape == (0, 3) and back["one"] == np.float32(2.5) and back["flag"]
