"""Products of int8 and int4 matrices against NumPy's, in int64 and float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import formats, quantize
from jaxcompress.core.packed import mask_leaf, unpack
from jaxcompress.core.pytrees import packed_bytes
from jaxcompress.quantize import FastMatrix, fast_matmul, fast_matrix
from jaxcompress.quantize.matmul import layout

pytestmark = pytest.mark.broad


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def packed(w, format, axis: int | None = -1, group=None):
    quantizer = quantize.weights(format, axis=axis, group=group)
    return quantizer.pack(w, quantizer.init(w))


def reference(x, leaf, group=None):
    """The product in int64 with scales in float64, and the sum of its terms' magnitudes."""
    x, w = np.asarray(x, np.float64), np.asarray(unpack(leaf), np.float64)
    w_scale = np.asarray(leaf.qparams.scale, np.float64).reshape(-1, w.shape[1])
    w_codes = np.rint(w / np.repeat(w_scale, group or w.shape[0], axis=0)).astype(np.int64)
    largest = np.abs(x).max(-1, keepdims=True)
    x_scale = np.where(largest == 0, 1.0, largest / 127)
    x_codes = np.rint(x / x_scale).astype(np.int64)
    parts = [
        (x_codes[..., i : i + (group or w.shape[0])] @ w_codes[i : i + (group or w.shape[0])])
        for i in range(0, w.shape[0], group or w.shape[0])
    ]
    terms = [x_scale * part * scale for part, scale in zip(parts, w_scale, strict=True)]
    return sum(terms), sum(np.abs(term) for term in terms)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "shape, out",
    [
        ((64,), 48),
        ((1, 64), 48),
        ((2, 3, 37), 5),
        pytest.param((5, 1), 3, marks=pytest.mark.broad),
        pytest.param((9, 130), 1, marks=pytest.mark.broad),
        pytest.param((0, 64), 48, marks=pytest.mark.broad),
    ],
)
def test_product_is_that_of_the_codes(bits, shape, out):
    x = normal(*shape)
    leaf = packed(normal(shape[-1], out, seed=1), formats.integer(bits))
    y = fast_matmul(x, fast_matrix(leaf))
    expected, _ = reference(x, leaf) if x.size else (np.zeros((0, out)), 0)
    assert y.shape == (*shape[:-1], out) and y.dtype == jnp.float32
    # No sum is rounded: a few roundings of the result, whatever cancels.
    np.testing.assert_allclose(y, expected, rtol=4e-7, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_come_out_exactly(bits):
    rng = np.random.default_rng(2)
    top = 2 ** (bits - 1) - 1
    x, w = rng.integers(-127, 128, (4, 301)), rng.integers(-top, top + 1, (301, 70))
    x[:, 0], w[0] = 127, -top  # all scales are 1
    y = fast_matmul(
        jnp.asarray(x, jnp.float32), fast_matrix(jnp.asarray(w, jnp.float32), bits=bits)
    )
    np.testing.assert_array_equal(np.asarray(y, np.int64), x @ w)


def test_the_largest_sum_does_not_wrap():
    # 132,104 products of 127 and -128: the last size that int32 holds
    width = (2**31 - 1) // (127 * 128)
    matrix = FastMatrix(jnp.full((1, width), -128, jnp.int8), jnp.ones(1), 8, (width, 1))
    y = fast_matmul(jnp.ones((1, width)), matrix)
    np.testing.assert_allclose(y, [[-128.0 * width]], rtol=4e-7)


@pytest.mark.parametrize("width, group", [(96, 32), (12, 2)])
def test_groups_along_the_inputs(width, group):
    x = normal(3, width)
    leaf = packed(normal(width, 21, seed=1), formats.integer(4), group=group)
    y = fast_matmul(x, fast_matrix(leaf))
    expected, magnitude = reference(x, leaf, group)
    assert (np.abs(y - expected) <= 4e-7 * magnitude).all()
    same = fast_matmul(x, fast_matrix(normal(width, 21, seed=1), bits=4, group=group))
    np.testing.assert_array_equal(y, same)


@pytest.mark.parametrize("group", [None, 8])
def test_channels_in_several_blocks(monkeypatch, group):
    # 24 inputs: blocks of 1000 // 24 channels at most, 103 in three of 35, two of them padding
    monkeypatch.setattr(layout, "_BLOCK_BYTES", 1000)
    x = normal(3, 24)
    leaf = packed(normal(24, 103, seed=1), formats.integer(4), group=group)
    matrix = fast_matrix(leaf)
    assert matrix.codes.shape == (3, 3 if group else 1, 35, 4 if group else 12)
    expected, magnitude = reference(x, leaf, group)
    assert (np.abs(fast_matmul(x, matrix) - expected) <= 4e-7 * magnitude).all()
    np.testing.assert_array_equal(matrix.dequantize(), unpack(leaf))


@pytest.mark.parametrize("bits, shape", [(8, (33, 7)), (4, (32, 7)), (4, (33, 6))])
def test_the_codes_stay_and_little_is_added(bits, shape):
    leaf = packed(normal(*shape), formats.integer(bits))
    matrix = fast_matrix(leaf)
    np.testing.assert_array_equal(matrix.dequantize(), unpack(leaf))
    width = shape[0] + (bits == 4) * shape[0] % 2
    assert packed_bytes(matrix) == shape[1] * (width * bits // 8 + 4)
    assert matrix.bits_per_weight == 8 * packed_bytes(matrix) / (shape[0] * shape[1])
    assert jax.eval_shape(fast_matrix, leaf).shape == shape


def test_rows_and_channels_of_zeros():
    w = normal(16, 6).at[:, 2].set(0.0)
    x = normal(3, 16, seed=1).at[1].set(0.0)
    for bits in (4, 8):
        y = np.asarray(fast_matmul(x, fast_matrix(w, bits=bits)))
        assert not y[1].any() and not y[:, 2].any() and y[0, [0, 1, 3, 4, 5]].all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_nan_and_no_other(bad):
    x = normal(3, 16)
    for bits in (4, 8):
        matrix = fast_matrix(normal(16, 6, seed=1), bits=bits)
        y = fast_matmul(x.at[1, 5].set(bad), matrix)
        assert np.isnan(y[1]).all()
        np.testing.assert_array_equal(y[::2], fast_matmul(x, matrix)[::2])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_in_and_out(dtype):
    x = normal(4, 40, dtype=dtype)
    leaf = packed(normal(40, 8, seed=1, dtype=dtype), formats.integer(8))
    y = fast_matmul(x, fast_matrix(leaf))
    exact = fast_matmul(x.astype(jnp.float32), fast_matrix(leaf))
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, exact.astype(dtype))


@pytest.mark.parametrize("magnitude", [1e-35, 1e30])
def test_small_and_large_rows_keep_their_precision(magnitude):
    x, matrix = normal(2, 32), fast_matrix(normal(32, 8, seed=1), bits=8)
    y = fast_matmul(x * magnitude, matrix) / magnitude
    np.testing.assert_allclose(y, x @ matrix.dequantize(), atol=0.2, rtol=0)


def test_agrees_with_the_simulation_per_token():
    x, w = normal(5, 64), normal(64, 16, seed=1)
    leaf = packed(w, formats.integer(8))
    simulated = quantize.per_token(lambda w, x: x @ w)(unpack(leaf), x)
    y = fast_matmul(x, fast_matrix(leaf))
    np.testing.assert_allclose(y, simulated, rtol=0, atol=2e-6 * float(jnp.abs(y).max()))


def test_one_program_for_all_matrices_of_a_shape_also_in_scan_and_vmap():
    traced = []

    @jax.jit
    def step(x, matrix):
        traced.append(matrix.bits)
        return fast_matmul(x, matrix)

    ws = normal(3, 32, 32, seed=1)
    for bits in (4, 8):
        pack = jax.jit(functools.partial(fast_matrix, bits=bits))
        matrices = [pack(w) for w in ws]
        np.testing.assert_array_equal(matrices[0].codes, fast_matrix(ws[0], bits=bits).codes)
        x = normal(2, 32)
        each = jnp.stack([step(x, matrix) for matrix in matrices])
        assert traced.count(bits) == 1
        stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *matrices)
        np.testing.assert_array_equal(jax.vmap(fast_matmul, (None, 0))(x, stack), each)
        rows = jax.vmap(fast_matmul, (0, None))(x, matrices[0])
        np.testing.assert_array_equal(rows, each[0])
        _, scanned = jax.lax.scan(lambda x, m: (x, fast_matmul(x, m)), x, stack)
        np.testing.assert_array_equal(scanned, each)


def test_gradient_is_straight_through():
    x, v = normal(2, 3, 20), normal(2, 3, 7, seed=2)
    for bits in (4, 8):
        matrix = fast_matrix(normal(20, 7, seed=1), bits=bits)
        found = jax.grad(lambda x, m: jnp.sum(v * fast_matmul(x, m)))(x, matrix)
        np.testing.assert_allclose(found, v @ matrix.dequantize().T, rtol=1e-5, atol=1e-6)
    assert (
        jax.grad(lambda x: fast_matmul(x, matrix).sum())(x.astype(jnp.bfloat16)).dtype == "bfloat16"
    )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 5])
def test_no_copy_of_the_weights_is_made(bits, rows):
    # What made products of a single row slow: weights converted to int32 first.
    x, w = (jax.ShapeDtypeStruct((n, 2048), jnp.float32) for n in (rows, 2048))
    matrix = jax.eval_shape(lambda w: fast_matrix(w, bits=bits), w)
    compiled = jax.jit(fast_matmul).lower(x, matrix).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    allowed = 2**18 if bits == 8 else 2 * layout._BLOCK_BYTES + 2**19
    assert analysis.temp_size_in_bytes < allowed


@pytest.mark.parametrize(
    "leaf, options, error, message",
    [
        (lambda w: packed(w, formats.integer(8)), {"bits": 8}, TypeError, "has its own"),
        (lambda w: packed(w, formats.integer(4)), {"group": 8}, TypeError, "has its own"),
        (lambda w: w, {}, ValueError, "needs bits 8 or 4, got None"),
        (lambda w: w, {"bits": 5}, ValueError, "needs bits 8 or 4, got 5"),
        (lambda w: w.astype(jnp.int8), {"bits": 8}, TypeError, "need a QTensor or a float array"),
        (lambda w: [1.0], {"bits": 8}, TypeError, "got list"),
        (lambda w: w[0], {"bits": 8}, ValueError, r"need a matrix \[in, out\], got shape \(8,\)"),
        (lambda w: w[:0], {"bits": 8}, ValueError, r"got shape \(0, 8\)"),
        (lambda w: w.at[0, 0].set(jnp.nan), {"bits": 8}, ValueError, "NaN or Inf"),
        (lambda w: w, {"bits": 4, "group": 3}, ValueError, "even size that divides"),
        (lambda w: w, {"bits": 4, "group": 10}, ValueError, "even size that divides"),
        (lambda w: w, {"bits": 8, "group": 8}, ValueError, "of 4 bits"),
        (lambda w: packed(w, formats.integer(6)), {}, ValueError, "int8 or int4, got int6"),
        (lambda w: packed(w, formats.integer(8, symmetric=False)), {}, ValueError, "got uint8"),
        (lambda w: packed(w, formats.parse("float8_e4m3")), {}, ValueError, "got float8_e4m3"),
        (lambda w: packed(w, formats.integer(8), axis=0), {}, ValueError, "scale per output"),
        (lambda w: packed(w, formats.integer(8), axis=None), {}, ValueError, "scale per output"),
        (lambda w: packed(w[None], formats.integer(8)), {}, ValueError, r"shape \(1, 16, 8\)"),
        (
            lambda w: mask_leaf(np.arange(128).reshape(16, 8) < 9, jnp.where(w > 9, w, 0.0)),
            {"bits": 8},
            TypeError,
            "got Masked of float32; of a Masked, give",
        ),
    ],
)
def test_what_has_no_fast_form_is_refused(leaf, options, error, message):
    with pytest.raises(error, match=message):
        fast_matrix(leaf(normal(16, 8)), **options)


def test_sums_that_int32_may_not_hold_are_refused():
    long = jax.ShapeDtypeStruct((132_105, 1), jnp.float32)
    make = lambda w: fast_matrix(w, bits=8)
    with pytest.raises(ValueError, match="int32 may overflow with more than 132104"):
        jax.eval_shape(make, long)
    assert jax.eval_shape(make, jax.ShapeDtypeStruct((132_104, 1), jnp.float32)).bits == 8


def test_inputs_that_do_not_fit_are_refused():
    matrix = fast_matrix(normal(16, 8), bits=8)
    assert isinstance(matrix, FastMatrix)
    with pytest.raises(ValueError, match=r"need shape \[\.\.\., 16\].*got \(2, 15\)"):
        fast_matmul(normal(2, 15), matrix)
    with pytest.raises(ValueError, match=r"got \(\)"):
        fast_matmul(jnp.float32(1), matrix)
    with pytest.raises(TypeError, match="need an array of float32.*got int8"):
        fast_matmul(jnp.ones((2, 16), jnp.int8), matrix)
    with pytest.raises(TypeError, match="need an array of float32.*got list"):
        fast_matmul([1.0], matrix)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="need a FastMatrix, got ArrayImpl"):
        fast_matmul(normal(2, 16), normal(16, 8))  # pyright: ignore[reportArgumentType]
