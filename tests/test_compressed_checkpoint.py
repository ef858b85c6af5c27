"""Files in a Zstandard frame, their entropy, and files that lie: refused, and nothing allocated."""

import itertools
import os
import sys
import tracemalloc
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zstandard
from _trees import bits_equal, small_tree

import jaxcompress as jc
from experiments._mutate import frame, seal, split
from jaxcompress.core import Bitmask, Groups, Rows
from jaxcompress.core.packed import mask_leaf
from jaxcompress.export import container, entropy_bytes, file_size, inspect, load, save
from jaxcompress.export.checkpoint.streaming import quantize_file
from jaxcompress.formats import integer, k_means

pytestmark = pytest.mark.broad

MIB = 2**20


def sparse_int4():
    params = small_tree()
    recipe = jc.chain(
        jc.prune.magnitude(0.8, scope="global"), jc.quantize.weights(integer(4), axis=0)
    )
    return recipe.pack(params, recipe.init(params))


def gaussian(format, shape=(256, 512), keep=None):
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    if keep is not None:
        w[np.abs(w) < np.quantile(np.abs(w), 1 - keep)] = 0.0
    comp = jc.quantize.weights(format)
    packed = comp.pack(jnp.asarray(w), comp.init(jnp.asarray(w)))
    return packed if keep is None else mask_leaf(w != 0, packed)


@pytest.mark.parametrize("codec, level", [("zstd", 19), ("zstd:1", 1), ("zstd:22", 22)])
def test_a_compressed_file_is_the_plain_one_in_a_frame(tmp_path, codec, level):
    packed, plain, small = sparse_int4(), tmp_path / "p", tmp_path / "p.zst"
    sizes = save(plain, packed), save(small, packed, compress=codec)
    assert sizes[1] == file_size(packed, compress=codec)
    assert sizes[1].file_bytes == os.path.getsize(small) < sizes[0].file_bytes
    assert sizes[1].raw_bytes == sizes[0].file_bytes == sizes[0].raw_bytes
    assert sizes[1].ratio == sizes[0].file_bytes / sizes[1].file_bytes and sizes[0].ratio == 1
    content = zstandard.ZstdDecompressor().decompress(small.read_bytes())
    assert content == plain.read_bytes()
    frame = zstandard.get_frame_parameters(small.read_bytes())
    assert frame.content_size == len(content) and not frame.has_checksum
    # Parts have tables of their own, which costs small files a little.
    plainly = len(zstandard.ZstdCompressor(level=level).compress(content))
    assert sizes[1].file_bytes < plainly + 64
    assert bits_equal(load(small).params, packed)
    assert inspect(small) == inspect(plain)


@pytest.mark.parametrize("codec", ["zstd:0", "zstd:23", "zstd:", "gzip", "zstd:x", ""])
def test_unknown_codecs(tmp_path, codec):
    with pytest.raises(ValueError, match="compress must be 'zstd', or 'zstd:1' to 'zstd:22'"):
        save(tmp_path / "p", {"w": jnp.ones(3)}, compress=codec)
    assert not os.listdir(tmp_path)


def test_without_zstandard_the_error_says_what_to_install(tmp_path, monkeypatch):
    save(tmp_path / "p", {"w": jnp.ones(3)}, compress="zstd")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    for call in (load, inspect, lambda path: save(path, {"w": jnp.ones(3)}, compress="zstd")):
        with pytest.raises(ImportError, match=r'pip install "jaxcompress\[export\]"'):
            call(tmp_path / "p")
    assert load(tmp_path / "p") if save(tmp_path / "p", {"w": jnp.ones(3)}) else None


def _streamed(raw):
    """A frame that does not say its size."""
    return zstandard.ZstdCompressor(write_content_size=False).compress(raw)


COMPRESS = zstandard.ZstdCompressor().compress
FRAMES = {
    "truncated": (lambda raw: COMPRESS(raw)[:-4], "truncated"),
    "only magic": (lambda raw: COMPRESS(raw)[:4], "truncated or damaged"),
    "bytes behind": (lambda raw: COMPRESS(raw) + b"xy", "its frame ends at byte"),
    "two frames": (lambda raw: COMPRESS(raw) * 2, "its frame ends at byte"),
    "no size": (_streamed, "does not say its size"),
    "says less": (lambda raw: frame(len(raw) - 1, raw, 0), "damaged"),
    "says more": (lambda raw: frame(len(raw) + 1, raw, 1), "bytes follow"),
    "says far more": (lambda raw: frame(2**62, raw, 1), "decompress|window|much memory"),
    "beyond blocks": (lambda raw: frame(MIB, raw, 0), "its blocks hold"),
    "more than allowed": (lambda raw: frame(len(raw) + MIB, raw, 8), "max_bytes is 1,048,576"),
    "zeros behind": (lambda raw: frame(len(raw) + 2**17, raw, 1), "131072 bytes follow"),
    "frame in a frame": (lambda raw: COMPRESS(COMPRESS(raw)), "header should have"),
    "damaged inside": (lambda raw: COMPRESS(raw[:-1] + b"\x99"), "checksum"),
    "window": (
        lambda raw: b"\x28\xb5\x2f\xfd\xc0\xff" + frame(len(raw), raw, 0)[5:],
        "window|much memory",
    ),
    "header that explodes": (
        lambda raw: COMPRESS((2 * MIB).to_bytes(8, "little") + b"[" * (2 * MIB)),
        "max_bytes|header should have 2097152 bytes",
    ),
}


@pytest.mark.parametrize("case", FRAMES)
def test_frames_that_are_not_whole_or_lie_are_refused(tmp_path, case):
    save(tmp_path / "p", sparse_int4())
    change, message = FRAMES[case]
    (tmp_path / "p").write_bytes(change((tmp_path / "p").read_bytes()))
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path / "p", max_bytes=MIB)
    assert str(tmp_path / "p") in str(error.value)


def test_every_byte_of_a_frame_counts(tmp_path):
    packed = {"w": gaussian(integer(4), (8, 16)), "b": jnp.arange(3.0)}
    save(tmp_path / "p", packed, compress="zstd:3")
    raw, refused = (tmp_path / "p").read_bytes(), 0
    for place in range(0, len(raw), 3):
        changed = bytearray(raw)
        changed[place] ^= 1 << place % 8
        (tmp_path / "p").write_bytes(changed)
        try:
            assert bits_equal(load(tmp_path / "p").params, packed)
        except ValueError as error:
            assert str(tmp_path / "p") in str(error)
            refused += 1
    assert refused > len(raw) // 3 * 0.9


def test_a_compressed_source_cannot_be_quantized_in_place(tmp_path):
    save(tmp_path / "p.safetensors", {"w": jnp.ones((4, 4))}, compress="zstd")
    with pytest.raises(ValueError, match="is compressed; `zstd -d` gives the file to read"):
        quantize_file(tmp_path / "p.safetensors", tmp_path / "q", format="int4")


ONE = np.ones(1, np.float32)
NOTHING = np.zeros(0, np.uint8)
ROWS = {"w.mask.pointers": np.array([0, 1], np.uint8), "w.values": ONE}
LIES = {
    "|||2000000000|float32|1|csr:0": ROWS | {"w.mask.indices": np.zeros(1, np.uint32)},
    "|||1x9999999999|float32|1|csr:1": ROWS | {"w.mask.indices": np.zeros(1, np.uint64)},
    "|||4x2000000000|float32|0|groups:0:2:1": {"w.mask.offsets": NOTHING, "w.values": ONE[:0]},
    "|||2000000000x4|float32|0|groups:0:4:1": {"w.mask.offsets": NOTHING, "w.values": ONE[:0]},
    "int4||4000000000|2|float32": {"w.codes": np.zeros(1, np.uint8), "w.scale": ONE.reshape(1, 1)},
    "int4||x4000000000|2|float32": {"w.codes": np.zeros(1, np.uint8), "w.scale": ONE.reshape(1, 1)},
    "|||-4x-4|float32|1": {"w.mask": np.ones(2, np.uint8), "w.values": ONE},
    "int4|||2|float64": {"w.codes": np.zeros(1, np.uint8), "w.scale": ONE},
}


@pytest.mark.parametrize("scheme", LIES)
def test_small_files_that_say_they_are_enormous_are_refused(tmp_path, scheme):
    content, _ = container.encode(LIES[scheme], {"jaxcompress": "3", "leaf:w": scheme})
    (tmp_path / "p").write_bytes(content)
    tracemalloc.start()
    with pytest.raises(ValueError, match="max_bytes is|an axis of|number below|jax_enable_x64"):
        load(tmp_path / "p")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * MIB


def test_max_bytes_allows_what_is_meant(tmp_path):
    leaf = mask_leaf(np.arange(MIB) == 5, jnp.zeros(MIB).at[5].set(1.0))
    save(tmp_path / "p", {"w": leaf})
    with pytest.raises(ValueError, match=r"are 4,194,304 when unpacked, most of them of 'w'"):
        load(tmp_path / "p", max_bytes=MIB)
    assert bits_equal(load(tmp_path / "p", max_bytes=4 * MIB).params, {"w": leaf})


def test_headers_that_no_writer_makes_are_refused(tmp_path):
    save(tmp_path / "p", {"flag": jnp.array([True, False]), "w": jnp.ones(2)})
    raw = (tmp_path / "p").read_bytes()
    header, data = split(raw)
    length = int.from_bytes(raw[:8], "little")
    twice = raw[8 : 8 + length].rstrip()[:-1] + b',".F32":0}'
    more = {**header, ".F32": {**header[".F32"], "more": 1}}
    files = {
        "not JSON": len(twice).to_bytes(8, "little") + twice + data,
        "no more": seal(more, data),
        "neither true nor false": seal(header, data[:-1] + b"\x07"),
    }
    for message, content in files.items():
        (tmp_path / "p").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "p")


def test_a_leaf_needs_a_name(tmp_path):
    with pytest.raises(ValueError, match="a leaf is named ''"):
        save(tmp_path / "p", {"": jnp.ones(2), "a": jnp.ones(3)})
    content, _ = container.encode({"": ONE}, {"jaxcompress": "3"})
    (tmp_path / "p").write_bytes(content)
    with pytest.raises(ValueError, match="p: holds a leaf without a name"):
        load(tmp_path / "p")


FORMS = {
    "bitmask": (lambda nnz: Bitmask.like((2, 5)), 2),
    "rows": (lambda nnz: Rows.like((3, 4), nnz), 4),
    "one row": (lambda nnz: Rows.like((3, 4), nnz, split=0), 4),
    "2:4": (lambda nnz: Groups.like((2, 4), 2, 4), 4),
    "1:3, ragged": (lambda nnz: Groups.like((2, 5), 1, 3), 4),
    "fan-in": (lambda nnz: Groups.like((3, 2), 1, 3, along=0), 2),
    "none": (lambda nnz: Groups.like((3, 2), 0, 3, along=0), 0),
}


@pytest.mark.parametrize("kind", FORMS)
def test_positions_are_in_order_exactly_if_packing_their_mask_gives_them(kind):
    """All arrays of small numbers: against the definition."""
    make, nnz = FORMS[kind]
    form, rng = make(nnz), np.random.default_rng(1)
    fields, treedef = jax.tree.flatten(form)
    found = Counter()
    for trial in range(150):
        mask = rng.permutation(np.arange(np.prod(form.shape)) < nnz).reshape(form.shape)
        if form.fits(mask) and trial % 3 == 0:
            arrays = [np.array(a) for a in jax.tree.leaves(form.pack(mask))]
            if trial % 2 and arrays[-1].size:
                arrays[-1][rng.integers(arrays[-1].size)] ^= 1 << int(rng.integers(3))
        else:
            arrays = [rng.integers(0, 5, f.shape).astype(f.dtype) for f in fields]
        candidate = treedef.unflatten(arrays)
        mask = np.asarray(candidate.mask())
        expected = mask.sum() == nnz and form.fits(mask)
        if expected:
            again = jax.tree.leaves(form.pack(mask))
            expected = all(map(np.array_equal, again, arrays))
        assert candidate.in_order(nnz) == expected, (kind, arrays)
        found[bool(expected)] += 1
        assert not (expected and candidate.in_order(nnz + 1))
    assert found[True] and (found[False] or kind == "none")


def entropy_bits(symbols) -> float:
    """Symbol by symbol, in float64."""
    counts = Counter(np.asarray(symbols).reshape(-1).tolist())
    total = sum(counts.values())
    return sum(-n * np.log2(n / total) for n in counts.values())


@pytest.mark.parametrize(
    "format, near", [(integer(3), 1.4), (integer(4), 1.05), (k_means(4), 1.04), (integer(8), 1.03)]
)
@pytest.mark.parametrize("keep", [None, 0.2])
def test_entropy_against_counting_and_zstd_comes_near(format, near, keep):
    leaf = gaussian(format, keep=keep)
    inner = leaf if keep is None else leaf.values
    values = np.asarray(jc.unpack(leaf))
    symbols = values if keep is None else values[values != 0]
    scales = jc.packed_bytes(inner.qparams)
    mask = 0 if keep is None else entropy_bits(values != 0) / 8
    stored = entropy_bytes({"w": leaf, "b": jnp.ones(5)})
    # A kept number may be rounded to zero: its code is counted, here it is not.
    assert stored == pytest.approx(entropy_bits(symbols) / 8 + mask + scales + 20, rel=2e-3)
    size = file_size({"w": leaf}, compress="zstd")
    # Codes of three bits straddle bytes, which zstd cannot know.
    assert size.file_bytes < near * entropy_bytes(leaf) + size.header_bytes


def test_entropy_of_even_masks_counts_what_is_stored():
    mask = np.tile(np.eye(4, dtype=bool), (16, 16))
    leaf = mask_leaf(mask, jnp.where(mask, 1.5, 0.0))
    assert leaf.positions.name.startswith("groups:1:4")
    # 2 bits for each of 1024 kept numbers; the entropy of a mask without structure is 0.81 of 4096.
    assert entropy_bytes(leaf) == 1024 * 2 // 8 + 4 * 1024
    assert entropy_bytes({"n": jnp.zeros((0, 3)), "k": gaussian(integer(4), (0, 4))}) <= 4


def test_entropy_of_rows_of_whole_bytes_and_of_one_long_row_agree():
    w = np.random.default_rng(2).normal(size=(64, 30)).astype(np.float32)
    sizes = {
        entropy_bytes(dict(c=comp.pack(jnp.asarray(x), comp.init(jnp.asarray(x)))))
        for comp, x in itertools.product([jc.quantize.weights(integer(4))], [w, w.reshape(-1)])
    }
    assert len(sizes) == 1
