"""Every number format against an independent reference: ml_dtypes, closed forms, the papers."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import formats, quantize
from jaxcompress.core.packed import quantize as quantize_array
from jaxcompress.formats import granularity_for
from jaxcompress.quantize.fake_quantized_weights import qparams_of

pytestmark = pytest.mark.broad

SMALL_FLOATS = {
    "float8_e4m3": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float6_e2m3": ml_dtypes.float6_e2m3fn,
    "float6_e3m2": ml_dtypes.float6_e3m2fn,
    "float4_e2m1": ml_dtypes.float4_e2m1fn,
}


def element_of(name):
    format = formats.parse(name)
    assert isinstance(format, formats.Scaled)
    return format.element


@pytest.mark.parametrize("name", SMALL_FLOATS)
def test_all_codes_equal_ml_dtypes(name):
    element, dtype = element_of(name), SMALL_FLOATS[name]
    codes = np.arange(2**element.bits, dtype=np.uint8)
    want = codes.view(dtype).astype(np.float32)
    got = np.asarray(element.decode(codes))
    np.testing.assert_array_equal(
        got.view(np.uint32)[~np.isnan(want)], want.view(np.uint32)[~np.isnan(want)]
    )
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    finite = np.isfinite(want)
    np.testing.assert_array_equal(element.encode(want[finite]), codes[finite])  # -0 included
    assert element.largest == float(ml_dtypes.finfo(dtype).max)
    assert element.smallest_normal == float(ml_dtypes.finfo(dtype).smallest_normal)


@pytest.mark.parametrize("name", SMALL_FLOATS)
def test_rounding_equals_ml_dtypes_and_saturates(name):
    element, dtype = element_of(name), SMALL_FLOATS[name]
    rng = np.random.default_rng(0)
    top = element.largest
    x = (rng.normal(size=20_000) * np.exp2(rng.integers(-18, 4, 20_000)) * top / 8).astype(
        np.float32
    )
    levels = np.arange(2 ** (element.bits - 1), dtype=np.uint8).view(dtype).astype(np.float32)
    levels = levels[np.isfinite(levels)]
    middles = ((levels[1:] + levels[:-1]) / 2).astype(np.float32)  # ties
    x = np.concatenate([x, middles, -middles, [0.0, -0.0, top * 1.4, -top * 3, 1e30]]).astype(
        np.float32
    )
    want = np.clip(x, -top, top).astype(dtype)
    np.testing.assert_array_equal(element.encode(x), want.view(np.uint8))
    got = np.asarray(element.snap(x))
    np.testing.assert_array_equal(got.view(np.uint32), want.astype(np.float32).view(np.uint32))


def mx_reference(x, dtype, emax, block=32):
    """OCP Microscaling in NumPy float64: one block per row of 32."""
    x = np.asarray(x, np.float64).reshape(-1, block)
    top = np.abs(x).max(axis=1, keepdims=True)
    exponent = np.where(top > 0, np.floor(np.log2(np.where(top > 0, top, 1.0))) - emax, -127)
    scale = 2.0 ** np.clip(exponent, -127, 127)
    if dtype is None:  # MXINT8
        return scale, np.clip(np.round(x / scale * 64), -127, 127) / 64 * scale
    largest = float(ml_dtypes.finfo(dtype).max)
    return scale, np.clip(x / scale, -largest, largest).astype(dtype).astype(np.float64) * scale


MX = {
    "mxfp4": (ml_dtypes.float4_e2m1fn, 2),
    "mxfp6_e2m3": (ml_dtypes.float6_e2m3fn, 2),
    "mxfp6_e3m2": (ml_dtypes.float6_e3m2fn, 4),
    "mxfp8_e4m3": (ml_dtypes.float8_e4m3fn, 8),
    "mxfp8_e5m2": (ml_dtypes.float8_e5m2, 15),
    "mxint8": (None, 0),
}


@pytest.mark.parametrize("name", MX)
def test_mx_is_the_ocp_definition(name):
    rng = np.random.default_rng(1)
    x = (rng.normal(size=(500, 32)) * np.exp2(rng.integers(-100, 100, (500, 1)))).astype(np.float32)
    # just below, at and above powers of two, where a float log2 is wrong; a block of zeros
    for row, size in enumerate([2.0**-3, 2.0**5, 1.0, 2.0**60]):
        x[row] = size * np.linspace(-1, 1, 32)
        x[10 + row] = x[row] * np.float32(1 - 2**-24)
        x[20 + row] = x[row] * np.float32(1 + 2**-23)
    x[30] = 0.0
    format = formats.parse(name)
    got = quantize.fake_quant(jnp.asarray(x), format, axis=0)
    scale, want = mx_reference(x, *MX[name])
    np.testing.assert_array_equal(np.asarray(got, np.float64), want.reshape(x.shape))
    p = qparams_of(jnp.asarray(x), format, granularity_for(format, 0))
    np.testing.assert_array_equal(2.0 ** (np.asarray(p.exponent[..., 0], np.float64) - 127), scale)


def test_mx_at_the_ends_of_float32():
    format = formats.mxfp4()
    x = jnp.asarray([[3.0e38] + [1e38] * 31, [2.0**-125] + [2.0**-126] * 31], jnp.float32)
    p = qparams_of(x, format, granularity_for(format, 0))
    assert p.exponent.ravel().tolist() == [127 - 2 + 127, 0]  # 2**(127 - 2); 2**-127
    got = np.asarray(quantize.fake_quant(x, format, axis=0), np.float64)
    assert got[0, 0] == 2.0**125 * 6  # saturates: 3.0e38 / 2**125 = 7.05
    assert got[1, 0] == 2.0**-125 and got[1, 1] == 2.0**-126


def nvfp4_reference(x, block=16):
    x = np.asarray(x, np.float64).reshape(-1, block)
    tensor = np.abs(x).max() / (6 * 448)
    scale = (np.abs(x).max(axis=1, keepdims=True) / 6 / tensor).astype(np.float32)
    scale = scale.astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * tensor
    ratio = np.where(scale > 0, x / np.where(scale > 0, scale, 1.0), 0.0)
    return np.clip(ratio, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float64) * scale


def test_nvfp4_is_the_definition():
    x = np.random.default_rng(2).normal(size=(300, 64)).astype(np.float32)
    x[5, :16] = 0.0
    x[7] *= 1e-6  # blocks below the smallest float8 scale become zero
    got = np.asarray(quantize.fake_quant(jnp.asarray(x), formats.nvfp4(), axis=0))
    want = nvfp4_reference(x).reshape(x.shape)
    np.testing.assert_allclose(got, want, rtol=3e-7, atol=0)
    assert not got[5, :16].any() and not got[7].any()


def test_nvfp4_error_does_not_depend_on_the_size_of_the_weights():
    x = np.random.default_rng(3).normal(size=(256, 256)).astype(np.float32)
    errors = []
    for size in 10.0 ** np.arange(-6, 5):
        scaled = jnp.asarray(x * np.float32(size))
        q = quantize.fake_quant(scaled, formats.nvfp4(), axis=0)
        errors.append(float(jnp.sum((q / size - x) ** 2) / np.sum(x**2)))
    assert max(errors) / min(errors) < 1.01


NORMAL = jnp.asarray(np.random.default_rng(4).normal(size=(2**14, 128)), jnp.float32)


def relative_error(format, x=NORMAL, **where):
    q = quantize.fake_quant(x, format, **where)
    return float(jnp.mean((q - x) ** 2) / jnp.mean(x**2))


# Relative mean squared error of N(0, 1): quadrature for the formats with one scale, measured on
# 16.7 million samples for the block formats (FORMULAS 3.8).
ONE_SCALE = {
    "binary": 1 - 2 / np.pi,
    "ternary": 0.19163,
    "ternary_absmean": 0.26338,
    "ternary_absmean_refit": 0.21304,
}
BLOCKS = {
    "nf4": (0.006529, 0.007622, 0.008459, 0.009141),
    "int4": (0.007255, 0.009412, 0.011583, 0.013769),
    "uint4": (0.004829, 0.006524, 0.008295, 0.010107),
    "int3": (0.039572, 0.051298, 0.063135, 0.074982),
    "float4_e2m1": (0.008860, 0.010219, 0.011175, 0.011856),
    "mxfp4": (0.013865, 0.013222, 0.012789, 0.012704),
    "nvfp4": (0.009044, 0.010326, 0.011234, 0.011891),
}


@pytest.mark.parametrize("name", ONE_SCALE)
def test_error_of_one_scale_on_normal_numbers(name):
    assert relative_error(formats.parse(name)) == pytest.approx(ONE_SCALE[name], rel=0.01)


@pytest.mark.parametrize("name", BLOCKS)
def test_error_of_blocks_on_normal_numbers(name):
    got = [relative_error(formats.parse(name), axis=0, group=g) for g in (16, 32, 64, 128)]
    assert got == pytest.approx(BLOCKS[name], rel=0.01)


@pytest.mark.parametrize(
    "name, table",
    [("int8", (2.2e-5, 2.9e-5, 3.5e-5, 4.2e-5)), ("mxint8", (5.3e-5, 6.8e-5, 7.9e-5, 8.3e-5))],
)
def test_error_of_eight_bits_on_normal_numbers(name, table):
    # The table has two digits: half a unit of the last one.
    got = [relative_error(formats.parse(name), axis=0, group=g) for g in (16, 32, 64, 128)]
    assert got == pytest.approx(table, abs=0.06e-5)


BEST_FULL = {2: 0.149431, 3: 0.040638, 4: 0.011864, 5: 0.003526, 6: 0.001043, 8: 0.000088}
BEST_NARROW = {2: 0.190174, 3: 0.046860, 4: 0.012889}


@pytest.mark.parametrize("bits", BEST_FULL)
def test_best_uniform_step_on_normal_numbers(bits):
    # mse() brings the full-range signed grid to the least error there is.
    error = relative_error(formats.integer(bits, narrow=False), calibrate=quantize.mse())
    assert error == pytest.approx(BEST_FULL[bits], rel=0.01 if bits < 8 else 0.03)


@pytest.mark.parametrize("bits", BEST_NARROW)
def test_best_narrow_step_on_normal_numbers(bits):
    error = relative_error(formats.integer(bits), calibrate=quantize.mse())
    assert error == pytest.approx(BEST_NARROW[bits], rel=0.01)


def test_nf4_levels_are_normal_quantiles():
    from statistics import NormalDist

    offset, inverse = 0.9677083, NormalDist().inv_cdf
    above = [inverse(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    below = [-inverse(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    levels = np.sort([*above, 0.0, *below]) / max(above)
    np.testing.assert_allclose(formats.nf4().element.levels, levels, atol=2e-7)


def test_double_quantization_costs_little_and_counts_its_bits():
    x = NORMAL[:4096]
    single, double = (formats.nf4(double_quantization=d) for d in (False, True))
    assert relative_error(double, x, axis=0) == pytest.approx(
        relative_error(single, x, axis=0), rel=0.01
    )
    assert formats.bits_per_value(double) == 4 + 8 / 64 + 32 / (64 * 256)
    assert round(formats.bits_per_value(double), 3) == 4.127


@pytest.mark.parametrize("bits", range(2, 9))
def test_powers_of_two(bits):
    x = np.random.default_rng(bits).normal(size=(40, 50)).astype(np.float32)
    q = np.asarray(quantize.fake_quant(jnp.asarray(x), formats.power_of_two(bits)), np.float64)
    mantissa, exponent = np.frexp(q[q != 0])
    assert (np.abs(mantissa) == 0.5).all()  # no mantissa bits: x * q is a shift
    # INQ: the largest exponent is floor(log2(4/3 max)); there are 2**(bits - 1) - 1 of them
    top = np.floor(np.log2(4 / 3 * np.abs(x).max()))
    lowest = top - (2 ** (bits - 1) - 2)
    assert exponent.max() - 1 == top and exponent.min() - 1 >= lowest
    magnitudes = np.append(2.0 ** np.arange(lowest, top + 1), 0.0)
    nearest = np.abs(np.abs(np.float64(x))[..., None] - magnitudes).min(axis=-1)
    np.testing.assert_array_equal(np.abs(np.float64(x) - q), nearest)


def test_additive_powers_of_two_of_the_paper():
    # Li et al., section 2.2: 5 bits signed, two terms of two bits each, gamma-scaled
    first, second = (0, 1, 2**-2, 2**-4), (0, 2**-1, 2**-3, 2**-5)
    sums = sorted({a + b for a in first for b in second})
    levels = formats.additive_power_of_two(5).element.levels
    np.testing.assert_allclose(levels[15:], np.array(sums) / max(sums), rtol=1e-12)
    assert len(levels) == 31 and levels[15] == 0


def test_ternary_by_hand():
    w = jnp.asarray([2.0, -1.0, 0.5, -0.1, 0.0, 0.0])  # mean 0.6, threshold 0.42
    got = quantize.fake_quant(w, formats.ternary())
    np.testing.assert_allclose(got, np.array([1, -1, 1, 0, 0, 0]) * (3.5 / 3), rtol=1e-6)
    got = quantize.fake_quant(w, formats.ternary_absmean())
    np.testing.assert_allclose(got, np.array([1, -1, 1, 0, 0, 0]) * 0.6, rtol=1e-6)
    got = quantize.fake_quant(w, formats.ternary_ttq())  # threshold 0.1
    np.testing.assert_allclose(got, [1.25, -1.0, 1.25, 0, 0, 0], rtol=1e-6)


def stored(x, format):
    where = granularity_for(format)
    p = qparams_of(x, format, where)
    return quantize_array(x, p, format=format, granularity=where)


def test_binary_dot_product_is_popcount():
    rng = np.random.default_rng(5)
    a, b = (jnp.asarray(rng.normal(size=77), jnp.float32) for _ in range(2))
    packed = [stored(v, formats.binary()) for v in (a, b)]
    same = np.bitwise_count(np.asarray(packed[0].codes ^ packed[1].codes)).sum()
    scale = np.prod([p.qparams.scale.item() for p in packed])
    assert packed[0].codes.nbytes == 10
    dot = np.dot(*(np.asarray(jc.unpack(p), np.float64) for p in packed))
    assert dot == pytest.approx(scale * (77 - 2 * int(same)), rel=1e-6)


def test_five_trits_to_a_byte():
    codes = np.random.default_rng(6).integers(0, 3, (4, 23)).astype(np.uint8)
    packed = np.asarray(formats.pack_bits(codes, 1.6))
    assert packed.shape == (4, 5)
    for row, got in zip(codes, packed, strict=True):
        padded = [*map(int, row), 0, 0]
        want = [sum(c * 3**k for k, c in enumerate(padded[i : i + 5])) for i in range(0, 25, 5)]
        assert got.tolist() == want
    np.testing.assert_array_equal(formats.unpack_bits(packed, 1.6, 23), codes)


def test_k_means_finds_clusters_and_keeps_zero():
    rng = np.random.default_rng(7)
    centres = np.array([-3.0, -1.0, 0.0, 1.0, 2.0, 3.0, -2.0, 4.0])
    x = (rng.choice(centres, 4000) + 0.01 * rng.normal(size=4000)).astype(np.float32)
    table = qparams_of(jnp.asarray(x), formats.k_means(3), granularity_for(formats.k_means(3)))
    np.testing.assert_allclose(np.asarray(table.codebook)[0], np.sort(centres), atol=2e-3)
    assert 0.0 in np.asarray(table.codebook)


def test_k_means_is_lloyds_algorithm():
    x = np.random.default_rng(8).normal(size=(50, 30)).astype(np.float32)
    levels = np.linspace(x.min(), x.max(), 16)
    levels[np.argmin(np.abs(levels))] = 0
    for _ in range(100):
        code = np.searchsorted((levels[1:] + levels[:-1]) / 2, x.ravel().astype(np.float64))
        for k in range(16):
            if (code == k).any():
                levels[k] = x.ravel()[code == k].astype(np.float64).mean()
        levels[np.argmin(np.abs(levels))] = 0
    got = qparams_of(jnp.asarray(x), formats.k_means(4), granularity_for(formats.k_means(4)))
    np.testing.assert_allclose(np.asarray(got.codebook)[0, 0], levels, atol=1e-5)


ALL_NAMES = [
    "int1", "int3", "int8", "int4_full", "uint4", "q2.5", "q3.9", "pot4", "apot4", "ternary",
    "ternary_absmean", "ternary_absmean_refit", "ternary_ttq", "binary", "nf4",
    "nf4_float32_scale", "kmeans4", "float8_e4m3", "float8_e5m2", "float6_e2m3", "float6_e3m2",
    "float4_e2m1", "mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2", "mxint8",
    "nvfp4",
]  # fmt: skip


@pytest.mark.parametrize("name", ALL_NAMES)
def test_bytes_in_memory_and_on_disk_are_the_predicted_bytes(name, tmp_path):
    format = formats.parse(name)
    rng = np.random.default_rng(9)
    params = {
        "conv": jnp.asarray(rng.normal(size=(3, 3, 5, 7)), jnp.float32),
        "dense": jnp.asarray(rng.normal(size=(70, 13)), jnp.bfloat16),
    }
    comp = quantize.weights(format, axis=-1)
    state = comp.init(params)
    packed = comp.pack(params, state)
    where = granularity_for(format, -1)
    predicted = sum(formats.predicted_bytes(w.shape, format, where) for w in params.values())
    assert jc.packed_bytes(packed) == predicted
    path = tmp_path / "w.safetensors"
    size = jc.export.save(path, packed)
    assert size.payload_bytes == predicted == path.stat().st_size - size.header_bytes
    back = jc.export.load(path).params
    view = comp.apply(params, state)
    for key in params:
        np.testing.assert_array_equal(jc.unpack(back)[key], view[key])
        assert jc.unpack(back)[key].dtype == params[key].dtype
        assert back[key].format == format


def test_grids_of_activations_are_saved_in_every_format(tmp_path):
    apply_fn = lambda params, x: x @ params["w"]
    params, x = {"w": jnp.eye(8)}, jnp.asarray(np.random.default_rng(12).normal(size=(4, 8)))
    for name in ("uint8", "q2.5", "mxfp4", "nf4", "nvfp4", "kmeans3", "ternary_ttq", "float8_e5m2"):
        act = quantize.activations(apply_fn, formats.parse(name))
        grids = quantize.calibrate_activations(act, params, [(x,)])
        path = tmp_path / "w.safetensors"
        size = jc.export.save(path, params, activations=grids)
        assert size.payload_bytes == 4 * 64 + grids["w"].format.metadata_bytes(1)
        back = jc.export.load(path).activations
        np.testing.assert_array_equal(
            quantize.with_activations(apply_fn)(back, params, x), act.apply(grids, params, x)
        )


def test_pruned_weights_stay_zero_in_every_format_that_has_a_zero():
    params = {"w": jnp.asarray(np.random.default_rng(13).normal(size=(40, 24)), jnp.float32)}
    for name in ("uint4", "nf4", "ternary", "kmeans3", "float4_e2m1", "mxint8", "apot5", "pot3"):
        format = formats.parse(name)
        recipe = jc.chain(jc.prune.magnitude(0.9), quantize.weights(format, axis=-1))
        state = recipe.init(params)
        view, packed = recipe.apply(params, state), recipe.pack(params, state)
        assert jc.prune.sparsity_of(view) >= 0.9
        assert isinstance(packed["w"], jc.Masked)
        np.testing.assert_array_equal(jc.unpack(packed)["w"], view["w"])
        where = granularity_for(format, -1)
        exact = formats.predicted_bytes((40, 24), format, where, nnz=packed["w"].nnz)
        assert jc.packed_bytes(packed) == exact


@pytest.mark.parametrize("name", ALL_NAMES)
def test_codes_waste_no_bit(name):
    format = formats.parse(name)
    x = jnp.asarray(np.random.default_rng(10).normal(size=(9, 11)), jnp.float32)
    packed = jax.eval_shape(lambda x: stored(x, format), x)
    bits = 8 / 5 if name.startswith("ternary") else format.bits
    assert packed.codes.size == int(np.ceil(round(99 * bits / 8, 9)))


def test_a_user_defined_codebook_in_a_few_lines(tmp_path):
    cubic = formats.codebook("cubic3", [(k / 3) ** 3 for k in range(-3, 4)], group=16)
    comp = quantize.weights(cubic, axis=-1)
    params = {"w": jnp.asarray(np.random.default_rng(11).normal(size=(32, 8)), jnp.float32)}
    packed = comp.pack(params, comp.init(params))
    assert cubic.bits == 3 and jc.packed_bytes(packed) == 32 * 8 * 3 // 8 + 4 * 16
    jc.export.save(tmp_path / "w.safetensors", packed)
    back = jc.export.load(tmp_path / "w.safetensors", formats=[cubic]).params
    np.testing.assert_array_equal(jc.unpack(back)["w"], jc.unpack(packed)["w"])
    with pytest.raises(ValueError, match="unknown format 'cubic3'"):
        jc.export.load(tmp_path / "w.safetensors")


def test_a_user_defined_float():
    e3m4 = formats.Scaled(formats.FloatElement("float8_e3m4", 3, 4, "ieee"))
    codes = np.arange(256, dtype=np.uint8)
    want = codes.view(ml_dtypes.float8_e3m4).astype(np.float32)
    np.testing.assert_array_equal(e3m4.element.decode(codes), want)
    assert relative_error(e3m4, NORMAL[:512]) < relative_error(formats.float8_e4m3(), NORMAL[:512])


@pytest.mark.parametrize(
    "name, bits",
    [
        ("mxfp4", 4.25),
        ("mxfp6_e2m3", 6.25),
        ("mxfp8_e4m3", 8.25),
        ("mxint8", 8.25),
        ("nvfp4", 4.5),
        ("ternary", 1.6),
        ("binary", 1.0),
        ("nf4_float32_scale", 4.5),
    ],
)
def test_bits_per_value(name, bits):
    format = formats.parse(name)
    assert formats.bits_per_value(format) == bits
    shape = (512, 640)
    where = granularity_for(format)
    exact = 8 * formats.predicted_bytes(shape, format, where) / (512 * 640)
    assert formats.bits_per_value(format, shape=shape) == exact == pytest.approx(bits, abs=1e-3)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: formats.power_of_two(1), ValueError, "bits must be an integer from 2 to 8, got 1"),
        (lambda: formats.k_means(9), ValueError, "bits must be an integer from 1 to 8, got 9"),
        (lambda: formats.k_means(4, iterations=0), ValueError, "iterations must be at least 1"),
        (lambda: formats.additive_power_of_two(4, terms=4), ValueError, "terms must be 1 to"),
        (lambda: formats.codebook("x", [1.0]), ValueError, "2 to 256 numbers, got 1"),
        (lambda: formats.codebook("x", [1.0, 1.0]), ValueError, "distinct as float32"),
        (lambda: formats.codebook("x", [1.0, np.nan]), ValueError, "finite"),
        (lambda: formats.FloatElement("x", 6, 3), ValueError, "at most 8 bits"),
        (lambda: formats.FloatElement("x", 4, 3, "inf"), ValueError, "specials must be"),
        (lambda: formats.granularity(-1, block=(2, 2)), ValueError, "no axis and no group"),
        (lambda: formats.granularity(block=(2, 0)), ValueError, "block must be an integer of at"),
        (lambda: formats.granularity(1.5),  # type: ignore
          TypeError, "axis must be None, an integer or several"),
        (lambda: formats.parse("float9"), ValueError, "unknown format 'float9'; known: int1"),
        (lambda: formats.pack_bits(jnp.zeros(3, jnp.uint8), 1.5), ValueError, "1 to 16 or 1.6"),
        (lambda: formats.stochastic(jnp.zeros(3)), ValueError, "needs a key"),
    ],
)  # fmt: skip
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
