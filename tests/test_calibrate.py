"""Calibrators, rounding and straight-through estimators against closed forms and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import core, formats, quantize
from jaxcompress.formats import granularity, half_away, half_even, integer, stochastic
from jaxcompress.quantize import fake_quant
from jaxcompress.quantize.ranges.min_max import range_of

pytestmark = pytest.mark.broad

CALIBRATORS = {
    "min_max": quantize.min_max(),
    "moving_average": quantize.moving_average(0.9),
    "percentile": quantize.percentile(99),
    "mse": quantize.mse(),
    "octav": quantize.octav(),
    "kl": quantize.kl(),
}
INT4, UINT8 = integer(4), integer(8, symmetric=False)
RNG = np.random.default_rng(0)
HEAVY = jnp.asarray(RNG.standard_t(4, size=(8, 4096)), jnp.float32)


def seen(calibrator, *batches, axes=(0, 1)):
    shape = tuple(1 if a in axes else n for a, n in enumerate(batches[0].shape))
    state = calibrator.init(shape)
    for x in batches:
        state = jax.jit(lambda s, x: calibrator.update(s, x, axes=axes, where=None))(state, x)
    return state


@pytest.mark.parametrize("name", CALIBRATORS)
@pytest.mark.parametrize("format", [INT4, UINT8], ids=["int4", "uint8"])
def test_ranges_contain_zero_and_lie_within_the_data(name, format):
    for x in (HEAVY, jnp.abs(HEAVY), -jnp.abs(HEAVY), jnp.zeros((3, 5))):
        low, high = range_of(CALIBRATORS[name], x, format, axes=(0, 1))
        assert low.shape == high.shape == (1, 1)
        assert -jnp.abs(x).max() <= low.item() <= 0 <= high.item() <= jnp.abs(x).max()
        if format.symmetric:
            assert low.item() == -high.item() or name in ("min_max", "moving_average", "mse")


@pytest.mark.parametrize("name", CALIBRATORS)
def test_shards_merge(name):
    c = CALIBRATORS[name]
    parts = HEAVY[:4], HEAVY[4:] * 7.3  # the second has another range
    a, b = (seen(c, part) for part in parts)
    merged = c.range(jax.jit(c.merge)(a, b), INT4)
    if name == "moving_average":  # two batches of equal weight
        ends = [c.range(s, INT4) for s in (a, b)]
        want = [(x + y) / 2 for x, y in zip(*ends, strict=True)]
        np.testing.assert_allclose(merged, want, rtol=1e-6)
    else:
        both = c.range(seen(c, *parts), INT4)
        np.testing.assert_array_equal(merged, both)
        np.testing.assert_array_equal(merged, c.range(c.merge(b, a), INT4))
        np.testing.assert_array_equal(both, c.range(seen(c, jnp.concatenate(parts)), INT4))


@pytest.mark.parametrize("name", CALIBRATORS)
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_what_is_not_finite_is_refused(name, bad):
    x = HEAVY.at[5, 3000].set(bad)  # jnp.max may drop NaN at this size
    c = CALIBRATORS[name]
    assert np.isnan(c.range(seen(c, x, HEAVY), UINT8)).all()
    with pytest.raises(ValueError, match="must be finite"):
        fake_quant(x, INT4, calibrate=c)
    assert bool(jnp.isnan(jax.jit(lambda v: fake_quant(v, INT4, calibrate=c))(x)).all())
    small = x[:, 2990:3010]  # groups take the other path
    assert bool(jnp.isnan(jax.jit(lambda v: fake_quant(v, INT4, axis=0, group=5))(small)).any())


def test_nothing_seen_is_no_range():
    for c in CALIBRATORS.values():
        assert np.isnan(c.range(c.init((1, 1)), INT4)).all()


@pytest.mark.parametrize("axes", [(0, 1), (1,)])
def test_percentile_is_that_of_numpy(axes):
    for p in (90.0, 99.5):
        c = quantize.percentile(p)
        for format, values in ((INT4, np.abs(HEAVY)), (UINT8, np.asarray(HEAVY))):
            low, high = range_of(c, HEAVY, format, axes=axes)
            want = np.percentile(values, p, axis=axes, method="inverted_cdf", keepdims=True)
            np.testing.assert_array_equal(high, want)
            down = np.percentile(-values, p, axis=axes, method="inverted_cdf", keepdims=True)
            np.testing.assert_array_equal(low, -want if format.symmetric else -down)
            # streaming: within one bin
            stream = c.range(seen(c, HEAVY[:3], HEAVY[3:], axes=(0, 1)), format)
            if axes == (0, 1):
                span = 2.0 ** np.ceil(np.log2(np.abs(HEAVY).max()))
                assert 0 <= stream[1].item() - want.item() <= span / 2048


def test_percentile_100_is_min_max():
    for x in (HEAVY, HEAVY[:, :30]):
        for format in (INT4, UINT8, formats.mxfp4()):
            for axes in ((0, 1), (1,), (0,)):
                a = range_of(quantize.percentile(100), x, format, axes=axes)
                b = range_of(quantize.min_max(), x, format, axes=axes)
                spans = [np.maximum(-low, high) for low, high in (a, b)]
                np.testing.assert_array_equal(spans[0], spans[1])
                if not format.symmetric:
                    np.testing.assert_array_equal(a, b)
    c = quantize.percentile(100)
    low, high = c.range(seen(c, HEAVY), UINT8)
    assert (low.item(), high.item()) == (HEAVY.min().item(), HEAVY.max().item())


def test_ragged_groups_leave_their_padding_out():
    x = HEAVY[:, :50]
    for c in (quantize.percentile(80), quantize.mse(), quantize.octav()):
        got = fake_quant(x, INT4, axis=0, group=32, calibrate=c)
        tail = fake_quant(x[:, 32:], INT4, axis=0, calibrate=c)
        np.testing.assert_allclose(got[:, 32:], tail, rtol=1e-6)


@pytest.mark.parametrize("name", ["int2", "int4", "int8", "uint4", "pot4", "nf4_float32_scale"])
@pytest.mark.parametrize("where", [{}, {"axis": 0}, {"axis": 0, "group": 64}])
def test_mse_is_never_worse_than_min_max(name, where):
    format = formats.parse(name)
    error = lambda c: jnp.sum((fake_quant(HEAVY, format, calibrate=c, **where) - HEAVY) ** 2)
    assert float(error(quantize.mse())) <= float(error(quantize.min_max()))


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_octav_and_mse_find_the_best_clipping_of_normal_numbers(bits):
    # The least error over all clipping levels, by brute force in float64.
    x = np.random.default_rng(bits).normal(size=200_000)
    top = 2 ** (bits - 1) - 1
    levels = np.linspace(0.5, np.abs(x).max(), 400)
    errors = [
        np.mean((np.clip(np.round(x / (c / top)), -top, top) * c / top - x) ** 2) for c in levels
    ]
    got = {}
    for name in ("mse", "octav"):
        q = fake_quant(jnp.asarray(x, jnp.float32), integer(bits), calibrate=CALIBRATORS[name])
        got[name] = np.mean((np.asarray(q, np.float64) - x) ** 2)
    assert got["mse"] <= min(errors) * 1.005
    # OCTAV's noise model, 4**-b / 3, is that of a full range with many levels.
    assert got["octav"] <= min(errors) * {2: 1.6, 3: 1.25, 4: 1.08}.get(bits, 1.03)


def test_octav_is_its_fixed_point():
    x = np.asarray(HEAVY[0], np.float64)
    c, b = 1.0, 5
    for _ in range(50):
        above, below = np.abs(x) > c, (np.abs(x) > 0) & (np.abs(x) <= c)
        c = np.mean(np.abs(x) * above) / (4.0**-b / 3 * below.mean() + above.mean())
    _, high = range_of(quantize.octav(), HEAVY[:1], integer(b), axes=(0, 1))
    assert high.item() == pytest.approx(c, rel=1e-5)


def reference_kl(x, candidates=128):
    """Migacz 2017 in NumPy for int8, on the same bins and candidates."""
    x = np.abs(np.asarray(x, np.float64)).ravel()
    width = 2.0 ** np.floor(np.log2(x.max()) + 1) / 2048
    counts = np.bincount((x / width).astype(int), minlength=2048).astype(np.float64)
    last = np.flatnonzero(counts)[-1] + 1
    scores = {}
    for k in range(candidates):
        keep = 128 + (last - 128) * k // (candidates - 1)
        p = counts[:keep].copy()
        p[-1] += counts[keep:].sum()
        q, level = np.zeros(keep), np.arange(keep) * 128 // keep
        for j in range(128):
            full = (level == j) & (counts[:keep] > 0)
            if full.any():
                q[full] = counts[:keep][level == j].sum() / full.sum()
        p, q = p / p.sum(), np.maximum(q / q.sum(), 1e-9)
        scores[keep] = np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0]))
    return min(scores, key=lambda keep: scores[keep]) * width


def test_kl_is_that_of_numpy():
    for x in (HEAVY, jnp.asarray(RNG.normal(size=(2, 5000)), jnp.float32)):
        _, high = range_of(quantize.kl(), x, integer(8), axes=(0, 1))
        assert high.item() == pytest.approx(reference_kl(x), rel=0.02)


def test_moving_average_by_hand():
    c = quantize.moving_average(0.75)
    state = seen(c, jnp.array([[1.0, -2.0]]), jnp.array([[3.0, -1.0]]))
    low, high = c.range(state, UINT8)
    assert (low.item(), high.item()) == (0.75 * -2 + 0.25 * -1, 0.75 * 1 + 0.25 * 3)


def test_histogram_grows_without_losing_a_count():
    from jaxcompress.quantize.ranges import histogram

    x = [HEAVY[:2] * 1e-3, HEAVY[2:5], jnp.zeros((1, 7)), HEAVY[5:] * 1e6]
    state = histogram.empty((1, 1))
    for part in x:
        state = histogram.update(state, part, axes=(0, 1))
    flat = np.concatenate([np.asarray(part, np.float64).ravel() for part in x])
    edges = np.append(
        np.asarray(histogram.edges(state), np.float64).ravel(), 2.0 ** state.exponent.item()
    )
    want, _ = np.histogram(flat, edges)
    np.testing.assert_array_equal(state.counts.ravel(), want)


def test_activations_take_every_calibrator():
    apply_fn = lambda params, x: x @ params["w"]
    params = {"w": jnp.eye(4096)[:, :3]}
    for name, c in CALIBRATORS.items():
        act = quantize.activations(apply_fn, UINT8, calibrate=c)
        grids = quantize.calibrate_activations(act, params, [(HEAVY[:4],), (HEAVY[4:],)])
        out = act.apply(grids, params, HEAVY)
        assert bool(jnp.all(jnp.isfinite(out))), name


def test_too_many_blocks_for_histograms():
    with pytest.raises(ValueError, match=r"16384 bytes per block.*groups with min_max"):
        jax.eval_shape(lambda: quantize.kl().init((2**20, 1)))


def test_a_calibrator_that_needs_the_format_says_so():
    for name in ("percentile", "mse", "octav", "kl"):
        with pytest.raises(TypeError, match=f"{name}: the range depends on the format"):
            CALIBRATORS[name].range(CALIBRATORS[name].init((1,)))
    with pytest.raises(ValueError, match="octav: nf4 is no uniform grid"):
        fake_quant(HEAVY, formats.nf4(), calibrate=quantize.octav())
    with pytest.raises(ValueError, match="percent must be above 50"):
        quantize.percentile(50)
    with pytest.raises(ValueError, match="decay must be at least 0"):
        quantize.moving_average(1.0)


# Rounding


def test_rounding_of_ties():
    t = np.arange(-8, 9) / 2
    np.testing.assert_array_equal(half_even(jnp.asarray(t)), np.round(t))
    away = np.sign(t) * np.floor(np.abs(t) + 0.5)
    np.testing.assert_array_equal(half_away(jnp.asarray(t)), away)
    below = jnp.float32(0.49999997)  # + 0.5 rounds to 1
    assert float(half_away(below)) == 0.0


@pytest.mark.parametrize(
    "name, x, even, away",
    [
        ("int8", [0.5, 1.5, -0.5, -2.5], [0, 2, 0, -2], [1, 2, -1, -3]),
        ("q3.0", [0.5, 1.5, -0.5, -2.5], [0, 2, 0, -2], [1, 2, -1, -3]),
        ("float4_e2m1", [2.5, -2.5, 5.0, 0.25], [2, -2, 4, 0], [3, -3, 6, 0.5]),
        ("mxint8", [1 / 128, -1 / 128, 3 / 128], [0, 0, 2 / 64], [1 / 64, -1 / 64, 2 / 64]),
        ("apot3", [0.5, -0.5], [1 / 3, -1 / 3], [2 / 3, -2 / 3]),
    ],
)
def test_formats_round_as_told(name, x, even, away):
    format = formats.parse(name)
    largest = {"int8": 127.0, "float4_e2m1": 6.0, "mxint8": 1.5, "apot3": 1.0}.get(name, 1.0)
    p = format.qparams(jnp.float32(-largest), jnp.float32(largest))
    x = jnp.asarray(x, jnp.float32)
    for rounding, want in ((half_even, even), (half_away, away)):
        got = format.fake_quant(x, p, rounding=rounding)
        np.testing.assert_allclose(got, want, rtol=1e-6)
        codes = format.encode(x, p, rounding=rounding)
        np.testing.assert_array_equal(format.decode(codes, p), got)


@pytest.mark.parametrize(
    "name",
    [
        "int4",
        "uint4",
        "q0.3",
        "float8_e4m3",
        "mxfp4",
        "nf4",
        "kmeans3",
        "ternary_absmean",
        "binary",
    ],
)
def test_stochastic_rounding_is_unbiased_and_picks_a_neighbour(name):
    format = formats.parse(name)
    x = jnp.asarray(np.random.default_rng(3).uniform(-0.9, 0.9, 64), jnp.float32)
    where = formats.granularity_for(format)
    blocked = where.scale_shape(x.shape)
    p = format.qparams(jnp.full(blocked, -1.0), jnp.full(blocked, 1.0))
    draw = lambda key: format.fake_quant(x, p, where=where, rounding=stochastic, key=key)
    many = jax.vmap(draw)(jax.random.split(jax.random.key(0), 4000))
    gap = np.ptp(np.asarray(many), axis=0)
    assert np.unique(np.asarray(many), axis=0).shape[0] > 100
    error = np.abs(np.mean(np.asarray(many, np.float64), axis=0) - x)
    assert (error <= 5 * gap / 2 / np.sqrt(4000) + 1e-6).all()  # five sigma
    for column, value in zip(np.asarray(many).T, np.asarray(x), strict=True):
        assert len(np.unique(column)) <= 2 and column.min() <= value <= column.max()


def test_stochastic_key_lies_in_the_state_and_differs_by_leaf():
    comp = quantize.weights(integer(3), rounding=stochastic, seed=5)
    params = {"a": HEAVY, "b": HEAVY}
    state = comp.init(params)
    view = comp.apply(params, state)
    assert not bool(jnp.array_equal(view["a"], view["b"]))
    np.testing.assert_array_equal(comp.apply(params, state)["a"], view["a"])
    np.testing.assert_array_equal(core.unpack(comp.pack(params, state))["a"], view["a"])
    again = comp.apply(params, comp.update(params, state))
    assert not bool(jnp.array_equal(again["a"], view["a"]))
    other = quantize.weights(integer(3), rounding=stochastic, seed=6)
    assert not bool(jnp.array_equal(other.apply(params, other.init(params))["a"], view["a"]))


# Straight-through estimators


def grad(x, format, **options):
    where = formats.granularity_for(format)
    p = format.qparams(*(jnp.full(where.scale_shape(x.shape), end) for end in (-1.0, 1.0)))
    return jax.grad(lambda v: jnp.sum(fake_quant(v, format, qparams=p, **options)))(x)


UNIFORM = [
    "int4",
    "uint4",
    "q0.3",
    "float8_e4m3",
    "float4_e2m1",
    "pot4",
    "mxfp4",
    "nvfp4",
    "nf4",
    "apot4",
]


@pytest.mark.parametrize("name", UNIFORM)
def test_clipped_and_identity(name):
    format = formats.parse(name)
    x = jnp.asarray([-3.0, -0.3, 0.0, 0.4, 0.74, 3.0])
    clipped = [0.0, 1.0, 1.0, 1.0, 1.0, 0.0]
    np.testing.assert_array_equal(grad(x, format), clipped)
    np.testing.assert_array_equal(grad(x, format, ste=formats.identity_ste), np.ones(6))
    np.testing.assert_array_equal(
        fake_quant(x, format, ste=formats.identity_ste), fake_quant(x, format)
    )


@pytest.mark.parametrize("name", ["ternary", "ternary_ttq", "binary", "kmeans4"])
def test_means_let_every_gradient_through(name):
    x = jnp.asarray([-3.0, -0.3, 0.0, 0.4, 3.0])
    np.testing.assert_array_equal(grad(x, formats.parse(name)), np.ones(5))


def test_scale_gradient_of_every_scaled_grid_is_the_learned_step_rule():
    # dq/ds = level - x / s inside, the end outside (LSQ, eq. 3); numerically with frozen levels
    format = formats.float4_e2m1()
    x, scale = jnp.linspace(-9.0, 9.0, 37), jnp.float32(1.1)
    q = lambda s: format.fake_quant(x, formats.QParams(s))
    got = jax.jacobian(q)(scale)
    u = np.asarray(x, np.float64) / 1.1
    levels = np.asarray(q(scale), np.float64) / 1.1
    want = np.where(np.abs(u) <= 6, levels - u, np.sign(u) * 6)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_blocks_have_scales_of_their_own():
    x = HEAVY[:, :20]
    got = np.asarray(fake_quant(x, INT4, block=(3, 8)))
    for i in range(0, 8, 3):
        for j in range(0, 20, 8):
            part = x[i : i + 3, j : j + 8]
            np.testing.assert_array_equal(got[i : i + 3, j : j + 8], fake_quant(part, INT4))
    assert granularity(block=(3, 8)).scale_shape((2, 8, 20)) == (2, 3, 1, 3, 1)
