"""Storages of sparse arrays: bytes by hand, every bit back, the smallest of all, files."""

import itertools
import json
import math
import os
import zlib
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _trees import bits_equal

import jaxcompress as jc
from jaxcompress.core import Bitmask, Groups, Rows, condense, condensed_matmul, packed_bytes
from jaxcompress.core.mask_storage import smallest_form
from jaxcompress.core.packed import (
    Masked,
    dense,
    kept,
    mask_leaf,
    masked_bytes,
    unpack,
    unsigned_codes,
)
from jaxcompress.core.sparse import positions_like
from jaxcompress.core.storage import container
from jaxcompress.core.storage.leaves import disassemble
from jaxcompress.export import inspect, load, save
from jaxcompress.formats import integer

pytestmark = pytest.mark.broad

SHAPE = jax.ShapeDtypeStruct


def even(shape, along, keep, group, seed=0) -> np.ndarray:
    """A random mask that keeps ceil(keep * r / group) of every group of r <= group elements."""
    rng = np.random.default_rng(seed)
    order = [a for a in range(len(shape)) if a not in along] + list(along)
    length = math.prod(shape[a] for a in along)
    lines = np.zeros((math.prod(shape) // length, length), bool)
    for line, start in itertools.product(lines, range(0, length, group)):
        part = line[start : start + group]
        part[rng.permutation(len(part))[: -(-keep * len(part) // group)]] = True
    return lines.reshape([shape[a] for a in order]).transpose(np.argsort(order))


def scattered(shape, nnz, seed=0) -> np.ndarray:
    mask = np.arange(math.prod(shape)) < nnz
    return np.random.default_rng(seed).permutation(mask).reshape(shape)


@pytest.mark.parametrize(
    "form, position_bytes",
    [
        (Bitmask.like((5, 7)), 5),  # 35 bits
        (Bitmask.like(()), 1),
        (Rows.like((300, 70), 1000), 1000 + 2 * 301),  # columns in 8 bits, counts to 1000 in 16
        (Rows.like((4, 257), 10), 2 * 10 + 5),  # columns in 16 bits, counts in 8
        (Rows.like((4, 256), 255), 255 + 5),
        (Rows.like((4, 256), 256), 256 + 2 * 5),
        (Rows.like((3, 70_000), 70_000), 4 * 70_000 + 4 * 4),  # 32 bits, and 32 * (rows + 1)
        (Rows.like((3, 4, 5), 6, split=1), 6 + 4),
        (Rows.like((60,), 6), 6 + 2),
        (Groups.like((16, 8), 2, 4), 128 // 8),  # 64 of 2 bits
        (Groups.like((16, 8), 1, 8), 16 * 3 // 8),
        (Groups.like((3, 10), 2, 4), 4),  # 4 + 4 + 2 elements keep 2 + 2 + 1: 15 of 2 bits
        (Groups.like((24, 10), 3, 24, along=0), 19),  # fan-in 3 of 24: 30 of 5 bits
        (Groups.like((3, 3, 4, 5), 7, 36, along=(0, 1, 2)), 27),  # 35 of 6 bits
        (Groups.like((65_536, 3), 5, 65_536, along=0), 15 * 2),
        (Groups.like((8, 4), 0, 8, along=0), 0),
    ],
)
def test_bytes_by_hand(form, position_bytes):
    assert packed_bytes(form) == position_bytes


def test_two_of_four_of_float16_is_nine_sixteenths():
    leaf, mask = SHAPE((32, 32), jnp.float16), even((32, 32), (0,), 2, 4)
    assert masked_bytes(mask, leaf) == 0.5625 * packed_bytes(leaf)
    assert smallest_form(mask).name == "bitmask"  # as many bits as 2:4, and simpler


def test_break_even_points():
    # bitmask: density < 1 - 1 / b; CSR with 16-bit columns: density < b / (b + 16)
    ones = jnp.ones(64, jnp.int8)
    assert isinstance(mask_leaf(scattered((64,), 55), ones), jc.Masked)
    assert mask_leaf(scattered((64,), 56), ones) is ones
    pays = lambda nnz: packed_bytes(Rows.like((2, 1024), nnz)) + 2 * nnz < 2 * 2048
    assert pays(1020) and not pays(1024)  # but for 3 pointers of 2 bytes


def test_layouts_by_hand():
    mask = np.array([[0, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 1]], bool)
    rows = Rows.like((3, 5), 3).pack(mask)
    np.testing.assert_array_equal(rows.pointers, [0, 1, 1, 3])
    np.testing.assert_array_equal(rows.indices, [1, 0, 4])
    np.testing.assert_array_equal(Bitmask.like((3, 5)).pack(mask).bits, [0b00000010, 0b01000100])
    mask = np.zeros((4, 6), bool)  # 1:4 along axis 1, whose last group has two elements
    mask[np.arange(4), [0, 1, 2, 3]] = mask[np.arange(4), [4, 5, 4, 5]] = True
    groups = Groups.like((4, 6), 1, 4).pack(mask)
    codes = [0, 0, 1, 1, 2, 0, 3, 1]
    packed = [sum(c << 2 * k for k, c in enumerate(codes[i : i + 4])) for i in (0, 4)]
    np.testing.assert_array_equal(groups.offsets, packed)
    np.testing.assert_array_equal(groups.columns(), [[0, 4], [1, 5], [2, 4], [3, 5]])


FORMS = {
    "rows": (Rows.like((6, 9), 11), scattered((6, 9), 11)),
    "one row": (Rows.like((3, 5, 7), 30, split=0), scattered((3, 5, 7), 30)),
    "many rows": (Rows.like((300, 300), 300), scattered((300, 300), 300)),
    "nothing": (Rows.like((4, 4), 0), np.zeros((4, 4), bool)),
    "empty": (Rows.like((0, 4), 0), np.zeros((0, 4), bool)),
    "1:4": (Groups.like((6, 8), 1, 4), even((6, 8), (1,), 1, 4)),
    "3:7 ragged, first axis": (Groups.like((17, 3), 3, 7, along=0), even((17, 3), (0,), 3, 7)),
    "2:16 middle axis": (Groups.like((2, 32, 3), 2, 16, along=1), even((2, 32, 3), (1,), 2, 16)),
    "fan-in": (
        Groups.like((3, 2, 4, 5), 5, 24, along=(0, 1, 2)),
        even((3, 2, 4, 5), (0, 1, 2), 5, 24),
    ),
    "fan-in of the first axis": (
        Groups.like((5, 3, 7), 2, 21, along=(1, 2)),
        even((5, 3, 7), (1, 2), 2, 21),
    ),
    "fan-in 0": (Groups.like((5, 7), 0, 5, along=0), np.zeros((5, 7), bool)),
    "all": (Groups.like((5, 7), 5, 5, along=0), np.ones((5, 7), bool)),
    "wide": (Groups.like((40_000, 2), 3, 40_000, along=0), even((40_000, 2), (0,), 3, 40_000)),
}


@pytest.mark.parametrize("case", FORMS)
def test_masks_come_back(case):
    form, mask = FORMS[case]
    full = form.pack(mask)
    avals = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
    assert avals(full) == avals(form) and packed_bytes(full) == packed_bytes(form)
    got = jax.jit(lambda p: p.mask())(full)
    np.testing.assert_array_equal(got, mask)
    assert got.dtype == bool and jax.eval_shape(lambda p: p.mask(), form).shape == mask.shape
    again = positions_like(full.name, mask.shape, int(mask.sum()))
    assert avals(again) == avals(form) and jax.tree.structure(again) == jax.tree.structure(form)
    more = mask.copy()
    more.reshape(-1)[np.flatnonzero(~mask)[:1]] = True
    assert form.fits(mask) and form.fits(more) == bool(mask.all())
    assert not form.fits(np.ones((2, 2), bool))


def all_storages(mask):
    """Bits of every storage that fits, found by counting, in order of simplicity."""
    size, nnz, ndim = mask.size, int(mask.sum()), mask.ndim
    width = lambda n: 8 if n < 2**8 else 16 if n < 2**16 else 32
    yield 8 * -(-size // 8)
    for split in range(max(ndim - 1, 0), -1, -1):
        rows, columns = math.prod(mask.shape[:split]), math.prod(mask.shape[split:])
        yield width(columns - 1) * nnz + width(nnz) * (rows + 1)
    alongs = [(a,) for a in range(ndim)] + [tuple({*range(ndim)} - {a}) for a in range(ndim)]
    for along in filter(None, alongs):
        rest = [a for a in range(ndim) if a not in along]
        length = math.prod(mask.shape[a] for a in along)
        lines = mask.transpose(rest + list(along)).reshape(-1, length)
        small = range(2, 17) if len(along) == 1 else []
        for group in {*(g for g in small if g <= length), length} - {1}:
            counts = {
                (min(group, length - start), int(part))
                for start in range(0, length, group)
                for part in lines[:, start : start + group].sum(axis=1)
            }
            if any(all(c == math.ceil(n * r / group) for r, c in counts) for n in range(group + 1)):
                yield 8 * -(-nnz * math.ceil(math.log2(group)) // 8)


def masks_of_all_kinds():
    for seed, shape in enumerate([(8,), (33,), (6, 8), (20, 9), (12, 1), (1, 40), (3, 3, 4, 6)]):
        size = math.prod(shape)
        for nnz in {0, 1, 2, size // 20, size // 9, size // 3, size // 2, size - 1, size}:
            yield scattered(shape, nnz, seed)
        for axis, group, keep in itertools.product(range(len(shape)), (2, 3, 4, 8, 16), (1, 2)):
            if keep < group:
                yield even(shape, (axis,), keep, group, seed)
        for axis in range(len(shape) if len(shape) > 1 else 0):
            along = tuple(a for a in range(len(shape)) if a != axis)
            yield even(shape, along, 2, size // shape[axis], seed)


def test_the_choice_is_the_smallest_of_all():
    kinds = set()
    for mask in masks_of_all_kinds():
        form, bits = smallest_form(mask), list(all_storages(mask))
        assert 8 * packed_bytes(form) == min(bits), (mask.shape, form.name)
        kinds.add(form.name.split(":")[0])
        # Of equals the simplest: a bitmask, then rows.
        assert (form.name == "bitmask") == (bits[0] == min(bits))
        assert isinstance(form, Rows) == (
            min(bits) in bits[1 : 1 + mask.ndim] and bits[0] > min(bits)
        )
    assert kinds == {"bitmask", "csr", "groups"}


SPARSE = {
    "bitmask": scattered((12, 16), 60),
    "csr": scattered((12, 16), 3),
    "groups:1:8:0": even((12, 16), (0,), 1, 8),
    "groups:1:4:1": even((12, 16), (1,), 1, 4),
    "groups:2:36:0,1,2": even((3, 3, 4, 6), (0, 1, 2), 2, 36),
}


def awkward(shape, dtype):
    """Weights with NaN, infinities and zeros of both signs."""
    w = np.random.default_rng(1).normal(size=math.prod(shape)).astype(np.float32)
    w[::3] = np.resize([-0.0, np.nan, 0.0, np.inf, -np.inf], len(w[::3]))
    return jnp.asarray(w.reshape(shape), dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "kind", [*SPARSE, "none", "all", "1-D", "scalar", "scalar kept", "no size"]
)
def test_every_bit_comes_back(kind, dtype):
    odd = {
        "none": np.zeros((4, 6), bool),
        "all": np.ones((4, 6), bool),
        "1-D": scattered((50,), 9),
        "scalar": np.zeros((), bool),
        "scalar kept": np.ones((), bool),
        "no size": np.ones((0, 3), bool),
    }
    mask = {**SPARSE, **odd}[kind]
    w = jnp.where(mask, awkward(mask.shape, dtype), jnp.zeros((), dtype))
    leaf = mask_leaf(jnp.asarray(mask), w)
    assert isinstance(leaf, jc.Masked) == (kind not in ("all", "scalar kept", "no size"))
    assert bits_equal(jax.device_get(jc.unpack(leaf)), jax.device_get(w))
    aval = jax.eval_shape(jc.unpack, leaf)
    assert (aval.shape, aval.dtype) == (w.shape, w.dtype)
    assert packed_bytes(leaf) == min(masked_bytes(mask, w), w.nbytes)
    assert masked_bytes(mask, w) <= masked_bytes(int(mask.sum()), w)
    if isinstance(leaf, jc.Masked):
        np.testing.assert_array_equal(kept(leaf), mask)
        bits = np.packbits(mask.reshape(-1), bitorder="little")
        np.testing.assert_array_equal(leaf.bitmask, bits)
        assert jax.eval_shape(lambda: leaf).bitmask.shape == bits.shape
        assert leaf.positions.name.startswith(kind) or kind in odd


def masked_by(mask):
    hide = lambda w: jnp.where(mask, w, jnp.zeros((), w.dtype))
    return jc.per_leaf(
        lambda w: jc.CompressState(),
        lambda w, s: hide(w),
        pack=lambda w, s: mask_leaf(mask, hide(w)),
    )


@pytest.mark.parametrize("quantizer_first", [False, True])
def test_quantized_values_keep_the_form_of_their_mask(quantizer_first):
    # Some kept weights become zero at 3 bits: without them the mask has no form.
    mask = jnp.asarray(even((64, 16), (0,), 1, 8))
    w = jnp.asarray(np.random.default_rng(2).normal(size=(64, 16)), jnp.float32)
    both = [masked_by(mask), jc.quantize.weights(integer(3), axis=-1)]
    recipe = jc.chain(*reversed(both)) if quantizer_first else jc.chain(*both)
    state = recipe.init(w)
    leaf, view = recipe.pack(w, state), recipe.apply(w, state)
    assert np.count_nonzero(view) < 128 == leaf.nnz
    assert leaf.positions.name == "groups:1:8:0"
    assert packed_bytes(leaf) == 128 * 3 // 8 + 128 * 3 // 8 + 4 * 16
    assert bits_equal(jax.device_get(jc.unpack(leaf)), jax.device_get(view))


def test_zeros_that_free_a_form_are_not_stored():
    mask = jnp.asarray(even((64, 16), (0,), 1, 8))
    w = jnp.zeros((64, 16)).at[tuple(np.argwhere(mask)[70])].set(1.0)
    recipe = jc.chain(masked_by(mask), jc.quantize.weights(integer(3), axis=-1))
    leaf = recipe.pack(w, recipe.init(w))
    # Scales, a code; two pointers and a column of 8 and 16 bits.
    assert leaf.nnz == 1 and packed_bytes(leaf) == 4 * 16 + 1 + 2 + 2


FAN_IN = {
    "fan-in": ((24, 10), (0,), 3, 24),
    "1:4": ((24, 10), (0,), 1, 4),
    "convolution": ((3, 3, 4, 6), (0, 1, 2), 5, 36),
    "half, stored as a bitmask": ((24, 10), (0,), 12, 24),
    "nothing": ((24, 10), (0,), 0, 24),
}


@pytest.mark.parametrize("case", FAN_IN)
def test_condensed_product_is_the_masked_product(case):
    shape, along, keep, group = FAN_IN[case]
    mask = even(shape, along, keep, group)
    rng = np.random.default_rng(3)
    w = jnp.where(mask, jnp.asarray(rng.normal(size=shape), jnp.float32), 0.0)
    leaf = mask_leaf(mask, w)
    x = jnp.asarray(rng.normal(size=(2, 5, math.prod(shape[:-1]))), jnp.float32)
    wide = np.asarray(w, np.float64).reshape(-1, shape[-1])
    condensed = condense(leaf)
    run = jax.jit(condensed_matmul)
    got = run(x, condensed)
    np.testing.assert_allclose(got, np.asarray(x, np.float64) @ wide, rtol=1e-5, atol=1e-5)
    per_output = mask.sum() // shape[-1]
    assert condensed.values.shape == condensed.inputs.shape == (shape[-1], per_output)
    if case == "fan-in":  # the leaf itself, under jit
        np.testing.assert_array_equal(run(x, leaf), got)
    back = jax.grad(lambda x: run(x, condensed).sum())(x)
    np.testing.assert_allclose(back, np.broadcast_to(wide.sum(1), x.shape), rtol=1e-5, atol=1e-5)


def test_condensed_codes_have_the_values_of_their_grid():
    mask = jnp.asarray(even((64, 4), (0,), 5, 64))
    w = jnp.asarray(np.random.default_rng(4).normal(size=(64, 4)), jnp.float32)
    recipe = jc.chain(masked_by(mask), jc.quantize.weights(integer(8), axis=-1))
    state = recipe.init(w)
    leaf, x = recipe.pack(w, state), jnp.ones(64)
    assert isinstance(leaf.values, jc.QTensor)
    view = np.asarray(recipe.apply(w, state), np.float64)
    np.testing.assert_allclose(condensed_matmul(x, leaf), view.sum(axis=0), rtol=1e-5)


def tree(dtype=jnp.float32):
    quantizer = jc.quantize.weights(integer(4), axis=-1)
    leaves = {}
    for kind, mask in SPARSE.items():
        w = jnp.where(mask, awkward(mask.shape, dtype), jnp.zeros((), dtype))
        leaves[kind.replace(":", "_")] = mask_leaf(mask, w)
        w = jnp.where(mask, jnp.cos(jnp.arange(mask.size, dtype=dtype)).reshape(mask.shape), 0)
        codes = quantizer.pack(w, quantizer.init(w))
        leaves[kind.replace(":", "_") + "_int4"] = mask_leaf(mask, codes)
    return leaves


def test_files_hold_exactly_the_predicted_bytes(tmp_path):
    packed = tree()
    forms = [leaf.positions.name.split(":")[0] for leaf in packed.values()]
    assert sorted(set(forms)) == ["bitmask", "csr", "groups"]
    size = save(tmp_path / "p", packed)
    assert size == jc.export.file_size(packed)
    assert (
        size.payload_bytes == packed_bytes(packed) == packed_bytes(jax.eval_shape(lambda: packed))
    )
    assert os.path.getsize(tmp_path / "p") == size.header_bytes + packed_bytes(packed)
    loaded = load(tmp_path / "p").params
    assert bits_equal(jax.device_get(loaded), jax.device_get(packed))
    assert jax.tree.structure(loaded) == jax.tree.structure(packed)
    for leaf in inspect(tmp_path / "p"):
        assert leaf.sparse and leaf.stored_bytes == packed_bytes(packed[leaf.name])


def rewritten(raw, change):
    """A file with another header, or other bytes, and a checksum that fits."""
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), bytearray(raw[8 + length :])
    change(header, data)
    header["__metadata__"].pop("crc32")
    plain = json.dumps(header, separators=(",", ":")).encode()
    header["__metadata__"]["crc32"] = f"{zlib.crc32(plain + bytes(data)):08x}"
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


def _scheme(header, data, old, new):
    del data
    text = header["__metadata__"]["leaf:w"]
    assert old in text
    header["__metadata__"]["leaf:w"] = text.replace(old, new)


def _swap_columns(header, data):
    start, _ = header["w.mask.indices"]["data_offsets"]
    data[start], data[start + 1] = data[start + 1], data[start]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda h, d: _scheme(h, d, "csr:1", "coo:1"), "unknown storage of positions 'coo:1'"),
        (lambda h, d: _scheme(h, d, "csr:1", "csr:7"), r"split must be in \[0, 1\]"),
        (
            lambda h, d: _scheme(h, d, "csr:1", "csr:0"),
            r"should be uint8 \(2,\), it is uint8 \(5,\)",
        ),
        (lambda h, d: _scheme(h, d, "csr:1", "groups:1:4:0"), "'w.mask.offsets'"),
        (lambda h, d: _scheme(h, d, "|3|", "|4|"), r"should be uint8 \(4,\), it is uint8 \(3,\)"),
        (_swap_columns, "the positions 'csr:1' are not in order"),
    ],
)
def test_damaged_positions_are_refused(tmp_path, change, message):
    w = jnp.zeros((4, 200)).at[1, 3].set(1.0).at[1, 8].set(2.0).at[2, 5].set(3.0)
    # A file of version 3, where each array of a leaf lies under its own name.
    arrays, _ = disassemble("w", mask_leaf(w != 0, w))
    scheme = "|||4x200|float32|3|csr:1"
    raw = b"".join(container.encode_parts(arrays, {"jaxcompress": "3", "leaf:w": scheme})[0])
    (tmp_path / "p").write_bytes(raw)
    np.testing.assert_array_equal(unpack(load(tmp_path / "p").params["w"]), w)
    (tmp_path / "p").write_bytes(rewritten(raw, change))
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path / "p")
    assert f"{tmp_path / 'p'}: w: its parts do not fit" in str(error.value)


def lone():
    return mask_leaf(SPARSE["csr"], jnp.ones((12, 16)))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: Groups.like((4, 4), 5, 4), ValueError, "N:M needs 0 <= N <= M"),
        (lambda: Groups.like((4, 4), 1, 2, along=2), ValueError, r"axes \(2,\) are not all of"),
        (
            lambda: Groups.like((4, 4), 1, 2).pack(np.ones((4, 4), bool)),
            ValueError,
            "the form 'gro",
        ),
        (lambda: Rows.like((4, 4), 2).pack(np.ones((4, 4), bool)), ValueError, "the form 'csr:1'"),
        (lambda: Bitmask.like((4,)).pack(np.ones((4, 4), bool)), ValueError, "the form 'bitmask'"),
        (lambda: condense(cast(Any, jnp.ones((3, 3)))), TypeError, "needs a Masked leaf, got"),
        (lambda: condense(lone()), ValueError, "the outputs keep 0 to 1 inputs"),
        (lambda: jax.jit(condense)(lone()), TypeError, "stored as 'csr:0' say no fan-in"),
        (
            lambda: condensed_matmul(
                jnp.ones((2, 5)), mask_leaf(even((24, 10), (0,), 3, 24), jnp.ones((24, 10)))
            ),
            ValueError,
            r"x must be \[..., 24\] for a leaf of shape \(24, 10\), got \(2, 5\)",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("name", ["uint4", "uint8", "int4", "kmeans3", "float4_e2m1"])
def test_storing_the_zeros_of_a_masked_leaf_changes_no_number(name):
    # Zero has a code of its own: in an asymmetric grid the zero point's, in a table its place.
    x = np.random.default_rng(0).uniform(-0.5, 1.0, (16, 24)).astype(np.float32)
    x[np.random.default_rng(1).random(x.shape) < 0.9] = 0.0
    comp = jc.quantize.weights(jc.formats.parse(name))
    leaf = comp.pack(jnp.asarray(x), comp.init(jnp.asarray(x)))
    masked = mask_leaf(np.asarray(jc.unpack(leaf)) != 0, leaf)
    assert isinstance(masked, Masked)
    stored = dense(masked)
    np.testing.assert_array_equal(jc.unpack(stored), jc.unpack(masked))
    if name != "float4_e2m1":  # -0 was left out there, and comes back as 0
        np.testing.assert_array_equal(unsigned_codes(stored), unsigned_codes(leaf))


def test_zeros_keep_their_sign_when_mask_and_codes_are_joined():
    # -0.01 becomes -0 in float4: the view has it, and so has what ships
    w = jnp.asarray(np.tile([6.0, -0.01, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], (16, 8)), jnp.float32)
    quantizer = jc.quantize.weights(jc.formats.float4_e2m1())
    for comp in (
        jc.chain(jc.prune.magnitude(0.75), quantizer),
        jc.chain(quantizer, jc.prune.magnitude(0.75)),
    ):
        state = comp.init(w)
        view, packed = np.asarray(comp.apply(w, state)), comp.pack(w, state)
        assert np.signbit(view).any()
        np.testing.assert_array_equal(np.signbit(jc.unpack(packed)), np.signbit(view))


def test_a_kept_weight_that_rounds_to_negative_zero_keeps_its_sign():
    w = np.zeros((8, 40), np.float32)
    w[0], w[1, :3] = np.linspace(-448, -400, 40), -1e-9
    comp = jc.chain(jc.prune.magnitude(0.85), jc.quantize.weights(jc.formats.float8_e4m3()))
    params = {"w": jnp.asarray(w)}
    packed = comp.pack(params, comp.init(params))
    assert isinstance(packed["w"], jc.Masked)
    got = np.asarray(jc.unpack(packed)["w"])
    assert np.all(np.signbit(got) == np.signbit(w)) and not got[1:].any()
