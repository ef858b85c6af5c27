"""The laws of every number format, in every granularity, with every calibrator.

For one draw of the qparams p:  Q(0) = 0;  Q(Q(x)) = Q(x);  x <= y => Q(x) <= Q(y);
Q(-x) = -Q(x) where symmetric;  |x - Q(x)| is the distance to the nearest number of the grid, so at
most half a step inside the range;  unpack(pack(x)) = Q(x), bit for bit;  eager = jit = vmap.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcompress import formats, quantize
from jaxcompress.core.packed import fake_quantize, unpack
from jaxcompress.core.packed import quantize as pack
from jaxcompress.quantize.fake_quantized_weights import qparams_of

pytestmark = pytest.mark.broad

SHAPE = (6, 10)
WHERE = {
    "tensor": {},
    "channel": {"axis": -1},
    "group": {"axis": 0, "group": 4},  # the last group of each row has two numbers
    "block": {"block": (4, 3)},  # ragged at both ends
}
FORMATS = """int1 int2 int3 int4 int5 int6 int7 int8 int4_full int8_full uint2 uint4 uint8 q0.7 q2.5
q1.2 pot3 pot4 apot4 apot5 ternary ternary_absmean ternary_ttq binary nf4 nf4_float32_scale kmeans2
kmeans4 float8_e4m3 float8_e5m2 float6_e2m3 float6_e3m2 float4_e2m1 mxfp4 mxfp6_e2m3 mxfp6_e3m2
mxfp8_e4m3 mxfp8_e5m2 mxint8 nvfp4""".split()
CALIBRATORS = {
    "percentile": quantize.percentile(90),
    "mse": quantize.mse(),
    "moving_average": quantize.moving_average(),
    "octav": quantize.octav(),
    "kl": quantize.kl(),
}
COMBINATIONS = (
    [(name, where, None) for name in FORMATS for where in WHERE]
    + [
        (name, where, calibrator)
        for name in ("int3", "int8", "uint4", "nf4", "mxfp4", "float8_e4m3")
        for where in ("tensor", "group")
        for calibrator in ("percentile", "mse", "moving_average")
    ]
    + [
        (name, where, calibrator)
        for name in ("int4", "uint8")
        for where in ("tensor", "channel")
        for calibrator in ("octav", "kl")
    ]
)
# The law that a format breaks by its definition.
NO_ZERO = ("binary",)  # sign(0) = +1
NOT_ODD = ("binary", "ternary_ttq", "int1", "int4_full", "int8_full")  # ends differ
NOT_NEAREST = ("ternary", "ternary_ttq")  # thresholds of their own


def test_there_are_200_combinations():
    assert len(set(COMBINATIONS)) >= 200


@functools.cache
def laws(name, where, calibrator):
    format = formats.parse(name)
    place = {"format": format, "granularity": formats.granularity_for(format, **WHERE[where])}
    calibrate = CALIBRATORS.get(calibrator)

    @jax.jit
    def run(x, more):
        p = qparams_of(x, format, place["granularity"], calibrate=calibrate)
        q = lambda v: fake_quantize(v, p, **place)
        several = jnp.stack([x, x + jnp.abs(more), -x, jnp.zeros_like(x)])
        now, above, minus, zero = jax.vmap(q)(several)
        packed = pack(x, p, **place)
        found = {"vmap": now, "above": above, "minus": minus, "zero": zero, "twice": q(now)}
        return found | {"unpacked": unpack(packed), "bytes": packed, "qparams": p}

    @jax.jit
    def grid(p):
        """The numbers of all codes [2**bits, *SHAPE], float32; NaN where a code is never given."""
        count = 3 if format.bits == 1.6 else 2 ** int(format.bits)
        shipped = formats.shipped(format, p)
        decode = functools.partial(format.decode, qparams=shipped, where=place["granularity"])
        codes = jnp.arange(count, dtype=jnp.int32)[:, None, None]
        levels = jax.vmap(decode)(jnp.broadcast_to(codes, (count, *SHAPE)))
        again = jax.vmap(lambda v: fake_quantize(v, p, **place))(levels)
        return jnp.where(again == levels, levels, jnp.nan)

    return format, place, run, grid


def same_bits(a, b):
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


# Every other one in the default run, all of them with the long tests.
@pytest.mark.parametrize(
    "name, where, calibrator",
    [pytest.param(*c, marks=pytest.mark.long if i % 2 else ()) for i, c in enumerate(COMBINATIONS)],
)
@given(
    seed=st.integers(0, 2**31),
    size=st.sampled_from([2.0**-9, 1.0, 3.7, 1000.0]),
    heavy=st.booleans(),
)
@settings(max_examples=2, deadline=None, derandomize=True)
def test_laws(name, where, calibrator, seed, size, heavy):
    format, place, run, grid = laws(name, where, calibrator)
    rng = np.random.default_rng(seed)
    draw = np.clip(rng.standard_t(2, SHAPE), -50, 50) if heavy else rng.normal(size=SHAPE)
    draw[:, 3] = 0.0  # an empty channel
    draw[2] = np.abs(draw[2])
    more = rng.normal(size=SHAPE)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        x = jnp.asarray(draw * size, dtype)
        got = run(x, jnp.asarray(more * size, dtype))
        q = np.asarray(got["vmap"], np.float64)
        assert np.isfinite(q).all() and got["vmap"].dtype == dtype
        assert same_bits(got["twice"], got["vmap"])
        assert same_bits(got["unpacked"], got["vmap"])  # without vmap
        assert (np.asarray(got["above"], np.float64) >= q).all()
        if name not in NO_ZERO:
            assert not np.asarray(got["zero"]).any()
        if format.symmetric and name not in NOT_ODD:
            np.testing.assert_array_equal(got["minus"], -got["vmap"])
        if name not in NOT_NEAREST:
            exact = np.asarray(x, np.float64)
            levels = np.asarray(grid(got["qparams"]), np.float64)
            distance = np.nanmin(np.abs(levels - exact), axis=0)
            slack = 4e-7 * np.abs(exact) + 1e-30
            if dtype != jnp.float32:  # the numbers of the grid are rounded once more, to dtype
                slack = float(jnp.finfo(dtype).eps) * np.maximum(np.abs(q), np.abs(exact)) + 6e-8
            assert (np.abs(exact - q) <= distance + slack).all()
        assert jc_bytes(got["bytes"]) == formats.predicted_bytes(
            SHAPE, format, place["granularity"]
        )


def jc_bytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


EVERY_KIND = """int4 uint4 q2.5 pot4 apot4 ternary_ttq binary nf4 kmeans2 float8_e4m3 mxfp4
nvfp4""".split()


@pytest.mark.parametrize("name", EVERY_KIND)
def test_eager_is_jit(name):
    format, place, run, _ = laws(name, "channel", None)
    x = jnp.asarray(np.random.default_rng(1).normal(size=SHAPE), jnp.float32)
    got = run(x, x)
    eager = format.fake_quant(x, got["qparams"], where=place["granularity"])
    assert same_bits(eager, got["vmap"])
    with jax.disable_jit():
        codes = format.encode(x, got["qparams"], where=place["granularity"])
        p = got["bytes"].qparams
        decoded = format.decode(codes, p, where=place["granularity"], dtype=x.dtype)
    assert same_bits(decoded, got["vmap"])


@pytest.mark.parametrize("name", FORMATS)
def test_names_round_trip(name):
    assert formats.parse(name).name == name
    assert len({formats.parse(name), formats.parse(name)}) == 1  # equal, and of one hash
