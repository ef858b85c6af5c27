"""Numbers at the ends of float32, degenerate blocks, empty data, and axes that are none."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from experiments.situations import calibrators
from jaxcompress import formats, quantize
from jaxcompress.formats import integer

TINY = float(np.finfo(np.float32).tiny)
# Half of the largest gap between neighbours over the largest number, some roundings added; for
# means (ternary, binary) all that a mean may be away from a number.
BOUNDS = {
    "int2": 0.5, "int4": 1 / 14, "int8": 1 / 254, "uint4": 1 / 15, "uint8": 1 / 255,
    "nf4": 0.17, "nf4_float32_scale": 0.153, "kmeans1": 1.0, "kmeans4": 0.14, "apot4": 0.21,
    "pot4": 0.34, "float8_e4m3": 1 / 28, "float8_e5m2": 1 / 14, "float6_e2m3": 1 / 30,
    "float6_e3m2": 1 / 14, "float4_e2m1": 1 / 6, "mxfp4": 0.26, "mxfp6_e2m3": 0.07,
    "mxfp6_e3m2": 0.13, "mxfp8_e4m3": 0.13, "mxfp8_e5m2": 0.13, "mxint8": 1 / 64, "nvfp4": 0.21,
    "ternary": 1.0, "ternary_absmean": 1.0, "ternary_absmean_refit": 1.0, "ternary_ttq": 1.0,
    "binary": 1.0,
}  # fmt: skip


@pytest.mark.parametrize("largest", [3.3e38, 2e38, 1.0, 1e-37, 1e-38, 1e-40])
@pytest.mark.parametrize("name", BOUNDS)
def test_every_format_holds_every_magnitude(name, largest):
    x = np.random.default_rng(0).uniform(-1, 1, 256)
    x = np.r_[x[:-1], 1.0] * largest
    format = formats.parse(name)
    q = np.asarray(quantize.fake_quant(jnp.asarray(x, jnp.float32), format), np.float64)
    assert np.isfinite(q).all()
    bound = BOUNDS[name]
    if name == "pot4" and largest == 3.3e38:  # 2**128 is none of its scales: it ends at 2**127
        bound = 1 - 2.0**127 / largest
    # Scales are no smaller than the smallest normal number, below which XLA has zeros.
    smallest = {"nf4": 2, "float8_e4m3": 2}.get(name, 1) * 8 * TINY
    assert np.abs(q - x).max() <= 1.001 * bound * largest + smallest
    if largest > 1e-37:
        assert np.abs(q).max() >= 0.25 * largest or name.startswith(("ternary", "binary"))
        assert np.abs(q).max() >= 0.05 * largest


@pytest.mark.parametrize(
    "name", ["int2", "int4", "nf4_float32_scale", "kmeans4", "ternary", "nvfp4"]
)
def test_a_power_of_two_changes_nothing_but_the_scale(name):
    x = jnp.asarray(np.random.default_rng(1).uniform(-1, 1, 256), jnp.float32)
    q = lambda x: np.asarray(quantize.fake_quant(x, formats.parse(name)), np.float64)
    np.testing.assert_array_equal(q(x * 2.0**127), q(x) * 2.0**127)


QUICK = ("octav", "octav, streamed", "percentile(75)", "kl", "lsq_plus")


@pytest.mark.parametrize("name", QUICK)
def test_ranges_of_degenerate_blocks(name):
    method, kinds = calibrators.methods()[name]
    columns = calibrators.blocks(0)
    for format in (kinds[1], kinds[-1]):
        judged = calibrators._judged(name, method, format, columns)
        assert [k for k, (_, holds) in judged.items() if not holds] == []


def test_octav_keeps_numbers_of_one_magnitude():
    for x in (jnp.full(16, 0.4), jnp.asarray([0.4, -0.4] * 8), jnp.full(1, 0.37)):
        for n in (1, 20):
            got = quantize.fake_quant(x, integer(8), calibrate=quantize.octav(iterations=n))
            np.testing.assert_allclose(got, x, rtol=1e-6)


@pytest.mark.parametrize(
    "calibrate", [quantize.min_max(), quantize.moving_average(), quantize.percentile()]
)
def test_an_empty_batch_is_no_calibration(calibrate):
    fn, p, x = lambda p, x: x @ p["w"], {"w": jnp.ones((3, 2))}, jnp.ones((4, 3))
    act = quantize.activations(fn, integer(8), calibrate=calibrate)
    state = act.observe(act.init(p, x), p, x[:0])
    with pytest.raises(ValueError, match="activations of 'w' must have been observed"):
        act.grids(state)
    once = act.observe(act.init(p, x), p, x)
    again = act.observe(act.observe(state, p, x), p, x[:0])
    jax.tree.map(np.testing.assert_array_equal, act.grids(again), act.grids(once))
    with pytest.raises(ValueError, match="activations of 'w' must have been observed"):
        quantize.lsq_activations(fn, 4).init(p, x[:0])
    assert quantize.fake_quant(jnp.ones((0, 4)), integer(8), calibrate=calibrate).shape == (0, 4)


@pytest.mark.parametrize("how", [{}, {"inputs": "quantized"}, {"groups": "current"}])
def test_weights_of_no_elements_change_nothing(how):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    w, x, spec = draw(6, 3), draw(20, 6), {".*": quantize.Spec(integer(4), group=3)}
    params = {"w": w, "out": draw(6, 0), "in": draw(0, 4)}
    fn = lambda p, x: (x @ p["w"], x @ p["out"] @ p["in"])
    got = quantize.recipe(spec).apply(*quantize.gptq(fn, params, [(x,)], spec, **how))
    alone = quantize.gptq(lambda p, x: x @ p["w"], {"w": w}, [(x,)], spec, **how)
    np.testing.assert_array_equal(got["w"], quantize.recipe(spec).apply(*alone)["w"])
    assert got["out"].shape == (6, 0) and got["in"].shape == (0, 4)
    act = quantize.activations(fn, integer(8))
    assert list(quantize.calibrate_activations(act, params, [(x,)])) == ["w"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_averages_of_params_are_float32(dtype):
    params = {"w": jnp.zeros(2, dtype)}
    step = jc.train.make_step(
        jc.train.stateless(lambda p, x: p["w"] + x * 0),
        optax.sgd(0.0),
        loss=lambda z, *_: (jnp.sum(z.astype(jnp.float32)), {}),
        ema_decay=0.999,
    )
    state = jc.train.create(params, jc.identity(), optax.sgd(0.0), with_ema=True)
    assert state.ema["w"].dtype == jnp.float32
    state = state.replace(params={"w": jnp.ones(2, dtype)})
    for _ in range(300):
        state, _ = step(state, (), (jnp.zeros(2, dtype), ()))
    np.testing.assert_allclose(state.ema["w"], 1 - 0.999**300, rtol=1e-4)


W = jnp.ones((4, 6))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: quantize.weights(integer(8), axis=(0, 0)), ValueError, "names an axis twice"),
        (lambda: quantize.fake_quant(W, integer(8), axis=(1, -1)), ValueError, "twice"),
        (lambda: quantize.weights(integer(8), axis=True), TypeError, "axis must be"),
        (lambda: quantize.fake_quant(W, integer(8), block=(2, 2, 2)), ValueError, "has 3 axes"),
        (lambda: jc.search.Budget(weight_bytes=float("inf")), ValueError, "must be finite"),
        (lambda: jc.search.Budget(weight_bytes=float("nan")), ValueError, "must be finite"),
        (lambda: jc.search.Budget(weight_bytes=-1), ValueError, "at least 0"),
        (lambda: jc.search.Budget(weight_bytes=True), ValueError, "must be a number"),
        (
            lambda: jc.train.make_step(lambda *a: a, optax.sgd(1.0), ema_decay=1.0),
            ValueError,
            "below 1",
        ),
    ],
)
def test_what_is_no_axis_or_limit_is_said_at_once(call, error, message):
    with pytest.raises(error, match=message):
        call()
