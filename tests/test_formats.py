"""Grids and packing against closed forms, NumPy float64 and the definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import formats
from jaxcompress.core.packed import fake_quantize
from jaxcompress.formats import (
    clip_ste,
    granularity,
    pack_bits,
    row_bytes,
    uniform_ste,
    unpack_bits,
)
from jaxcompress.quantize import fake_quant, min_max
from jaxcompress.quantize.fake_quantized_weights import qparams_of


def reference_affine(x, bits, symmetric, narrow=True):
    """Jacob et al. in NumPy float64, one scale for the tensor."""
    x = np.asarray(x, np.float64)
    low, high = min(x.min(), 0.0), max(x.max(), 0.0)
    if symmetric:
        qmax = 2 ** (bits - 1) - 1
        qmin = -qmax if narrow else -qmax - 1
        scale, zero = max(-low, high) / qmax, 0
    else:
        qmin, qmax = 0, 2**bits - 1
        scale = (high - low) / qmax
        zero = np.clip(np.round(qmin - low / scale), qmin, qmax)
    q = np.clip(np.round(x / scale) + zero, qmin, qmax)
    return scale * (q - zero), scale


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_integer_equals_float64(bits, symmetric):
    x = np.random.default_rng(bits).normal(size=(50, 40)).astype(np.float32)
    got = fake_quant(jnp.asarray(x), formats.integer(bits, symmetric=symmetric))
    want, scale = reference_affine(x, bits, symmetric)
    # A number at the middle of two codes may go either way; all others agree to rounding.
    middle = np.abs((x / scale) % 1 - 0.5) < 1e-4
    np.testing.assert_allclose(np.where(middle, 0, got), np.where(middle, 0, want), atol=2e-6)
    assert np.abs(np.asarray(got) - x).max() <= scale / 2 * (1 + 1e-5)


def test_hand_computed_example():
    x = jnp.array([-1.0, 0.2, 0.6, 1.4])
    q = formats.integer(3)  # codes -3..3, step 1.4 / 3
    p = q.qparams(jnp.float32(-1.0), jnp.float32(1.4))
    np.testing.assert_array_equal(q.encode(x, p), [0b110, 0, 1, 3])  # -2, 0, 1, 3
    u = formats.integer(2, symmetric=False)  # codes 0..3, step 0.8, zero point round(1.25) = 1
    p = u.qparams(jnp.float32(-1.0), jnp.float32(1.4))
    assert int(p.zero_point) == 1
    np.testing.assert_array_equal(u.encode(x, p), [0, 1, 2, 3])


@pytest.mark.parametrize("m, n", [(0, 7), (2, 5), (1, 2), (3, 9), (-2, 6), (5, -1)])
def test_fixed_point_definition(m, n):
    x = np.linspace(-(2.0**m) * 1.5, 2.0**m * 1.5, 997)
    got = np.asarray(formats.fixed_point(m, n).fake_quant(jnp.asarray(x, jnp.float32)))
    scaled = np.round(np.asarray(x, np.float32).astype(np.float64) * 2.0**n)
    want = np.clip(scaled, -(2.0 ** (m + n)), 2.0 ** (m + n) - 1) * 2.0**-n
    np.testing.assert_array_equal(got, want.astype(np.float32))


@pytest.mark.parametrize("bits", range(1, 17))
def test_packing_is_the_bit_string(bits):
    for count in (0, 1, 13):
        codes = np.random.default_rng(bits).integers(0, 2**bits, (2, count))
        packed = np.asarray(pack_bits(codes.astype(np.uint16), bits))
        assert packed.shape == (2, row_bytes(count, bits)) and packed.dtype == np.uint8
        for row, got in zip(codes, packed, strict=True):  # Python integers as the reference
            value = sum(int(c) << (k * bits) for k, c in enumerate(row))
            assert got.tobytes() == value.to_bytes(row_bytes(count, bits), "little")
        back = unpack_bits(packed, bits, count)
        np.testing.assert_array_equal(back, codes)


def test_unpack_refuses_a_wrong_length():
    with pytest.raises(ValueError, match="have 4 bytes, got 3"):
        unpack_bits(jnp.zeros((2, 3), jnp.uint8), 3, 10)


@pytest.mark.parametrize("shape", [(3, 3, 4, 10), (7, 5), (11,), (), (0, 4)])
@pytest.mark.parametrize("axis", [None, -1, 0])
@pytest.mark.parametrize("group", [None, 1, 4, 1000])
def test_split_and_join(shape, axis, group):
    where = granularity(axis, group)
    x = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
    blocked = where.split(x)
    scale = jnp.zeros(where.scale_shape(shape))
    assert (
        scale.ndim == blocked.ndim
        and jnp.broadcast_shapes(scale.shape, blocked.shape) == blocked.shape
    )
    np.testing.assert_array_equal(where.join(blocked, shape), x)


def test_group_of_everything_is_per_channel_and_middle_axes_transpose():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 5, 4)), jnp.float32)
    for axis in (0, 1, -1, (0, 2)):
        whole = fake_quant(x, formats.integer(4), axis=axis, group=1000)
        channel = fake_quant(x, formats.integer(4), axis=axis)
        np.testing.assert_array_equal(whole, channel)


def test_ragged_tail_is_its_own_group():
    x = jnp.array([[1.0, 2.0, 4.0, 0.5, 0.25]])
    got = fake_quant(x, formats.integer(2), axis=0, group=2)  # groups [1 2] [4 .5] [.25]
    np.testing.assert_array_equal(got, [[0.0, 2.0, 4.0, 0.0, 0.25]])  # 1/2 rounds to even, 0


def test_straight_through_gradient_is_one_inside_and_zero_outside():
    format = formats.integer(4)
    p = format.qparams(jnp.float32(-0.7), jnp.float32(0.7))
    x = jnp.array([-2.0, -0.7, 0.0, 0.31, 0.7, 0.8])
    grad = jax.grad(lambda v: jnp.sum(format.fake_quant(v, p)))(x)
    np.testing.assert_array_equal(grad, [0, 1, 1, 1, 1, 0])
    assert float(jax.grad(lambda v: jnp.round(v))(0.3)) == 0.0  # what naive autodiff would give


def test_gradient_of_the_largest_weight_is_whole():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(300, 20)), jnp.float32)
    for format in (formats.integer(8), formats.integer(3), formats.integer(8, narrow=False)):
        grad = jax.grad(
            lambda v, f=format: jnp.sum(
                fake_quant(v, f, axis=-1, qparams=qparams_of(x, f, granularity(-1)))
            )
        )(x)
        np.testing.assert_array_equal(grad, jnp.ones_like(x))


def test_gradient_of_the_scale_is_that_of_lsq():
    x, scale = jnp.linspace(-4.0, 4.0, 41), jnp.float32(0.37)
    low, high = jnp.float32(-7), jnp.float32(7)
    got = jax.vmap(jax.grad(uniform_ste, argnums=1), (0, None, None, None))(x, scale, low, high)
    v = np.asarray(x, np.float64) / float(scale)
    want = np.where(v < -7, -7, np.where(v > 7, 7, np.round(v) - v))  # arXiv 1902.08153, eq. 3
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_clip_at_a_tie_keeps_the_gradient():
    assert float(jax.grad(lambda v: clip_ste(v, -1.0, 1.0))(1.0)) == 1.0


def test_traced_bits_compile_once():
    x = jnp.linspace(-1.0, 1.0, 33)
    calls = []

    @jax.jit
    def f(bits):
        calls.append(1)
        return fake_quant(x, formats.integer(bits))

    for bits in (2, 5, 8):
        np.testing.assert_array_equal(f(jnp.int32(bits)), fake_quant(x, formats.integer(bits)))
    swept = jax.vmap(lambda b: fake_quant(x, formats.integer(b)))(jnp.arange(1, 9))
    np.testing.assert_array_equal(swept[0], fake_quant(x, formats.integer(1)))
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("size", [1e-38, 1e-7, 1.0, 3e4])
def test_extreme_sizes_stay_finite_and_idempotent(dtype, size):
    x = jnp.asarray(np.linspace(-1, 1, 101) * size, dtype)
    for format in (formats.integer(8), formats.integer(8, symmetric=False)):
        where = granularity()
        p = qparams_of(x, format, where)
        once = fake_quantize(x, p, format=format, granularity=where)
        twice = fake_quantize(once, p, format=format, granularity=where)
        assert bool(jnp.all(jnp.isfinite(once)))
        np.testing.assert_array_equal(twice, once)
        assert not bool(jnp.any(once[50:51]))  # Q(0) = 0


def test_calibrator_merges_shards_and_poisons_nan_under_jit():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 512)), jnp.float32)
    c = min_max()
    see = lambda part: c.update(c.init((1, 1)), part, axes=(0, 1))
    merged, whole = c.merge(see(x[:20]), see(x[20:])), see(x)
    for a, b in zip(merged, whole, strict=True):
        np.testing.assert_array_equal(a, b)
    bad = x.at[3, 400].set(jnp.nan)  # jnp.max may drop it at this size
    assert bool(jnp.isnan(c.range(see(bad))[1]).all())
    assert bool(jnp.isnan(jax.jit(lambda v: fake_quant(v, formats.integer(8)))(bad)).all())


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: formats.integer(9), "bits must be 1 to 8, got 9"),
        (lambda: formats.integer(0), "bits must be 1 to 8, got 0"),
        (lambda: formats.fixed_point(12, 8), "21 bits; the sum must be 1 to 16"),
        (lambda: formats.parse("int9"), "unknown format 'int9'; known: int1"),
        (lambda: granularity(-1, 0), "group must be an integer of at least 1"),
        (
            lambda: fake_quant(jnp.ones((2, 2)), formats.integer(4), axis=2),
            "axis 2 is out of range",
        ),
        (lambda: fake_quant(jnp.array([1.0, jnp.nan]), formats.integer(4)), "must be finite"),
        (lambda: fake_quant(jnp.array([1.0, jnp.inf]), formats.integer(4)), "must be finite"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_names_round_trip():
    for name in ("int1", "int8", "int4_full", "uint3", "q0.7", "q-2.6", "q3.-1"):
        assert formats.parse(name).name == name
