"""LSQ+, PACT, TTQ, DoReFa, XNOR, A2Q, moving ranges, annealed bits: against float64 formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from _trees import bits_equal

import jaxcompress as jc
from jaxcompress import quantize
from jaxcompress.formats import integer
from jaxcompress.quantize.qat.accumulator_aware import toward_zero

pytestmark = pytest.mark.broad

f64 = lambda x: np.asarray(x, np.float64)
f32 = lambda x: jnp.asarray(x, jnp.float32)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def site(params, x):
    return x @ params["w"]


EYE = {"w": jnp.eye(6)}  # outputs are the quantized inputs
X = f32(3.0 * normal(8, 6))
COTANGENT = normal(8, 6, seed=1)


def gradients(act, learned, x=X):
    """Outputs, and the gradients by the one activation and by what is learned of it."""
    state = act.init(EYE, x)
    state = state._replace(learned={"w": learned})

    def loss(learned, x):
        out, _ = act.train(state._replace(learned=learned), EYE, x)
        return jnp.sum(out * f32(COTANGENT)), out

    run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (dlearned, dx), out = run(state.learned, x)
    assert bits_equal(out, jax.jit(act.apply)(act.grids(state), EYE, x))  # what ships
    return f64(out), dlearned["w"], f64(dx)


def test_lsq_plus_offset_and_step_have_the_papers_gradients():
    s, beta, top = f64(np.float32(0.4)), f64(np.float32(-1.1)), 15
    learned = quantize.StepOffset(jnp.full((1, 1), 0.4), jnp.full((1, 1), -1.1))
    x = X.at[0, 0].set(-1.2).at[0, 1].set(20.0)  # the low end, and far above
    out, grad, dx = gradients(quantize.lsq_plus_activations(site, 4), learned, x)
    beta = s * np.round(beta / s)
    u = (f64(x) - beta) / s
    np.testing.assert_allclose(out, s * np.round(np.clip(u, 0, top)) + beta, atol=1e-6)
    assert 0 < np.mean(u < 0) < 1 and np.any(u > top)
    outside = (u < -1e-6) | (u > top)
    np.testing.assert_allclose(dx, np.where(outside, 0, COTANGENT), rtol=1e-6)
    factor = 1 / np.sqrt(6 * top)
    slope = np.where(u <= 1e-6, 0.0, np.where(u >= top, top, np.round(u) - u))
    np.testing.assert_allclose(grad.step.item(), factor * (COTANGENT * slope).sum(), rtol=1e-4)
    np.testing.assert_allclose(grad.offset.item(), factor * COTANGENT[outside].sum(), rtol=1e-4)


def test_lsq_plus_starts_from_the_range_of_least_squares_or_of_min_max():
    x = f32(jax.nn.silu(f32(normal(64, 6))))
    act = quantize.lsq_plus_activations(site, 4, calibrate=quantize.min_max())
    learned = act.init(EYE, x).learned["w"]
    low, high = f64(x).min(), f64(x).max()
    step = (high - low) / 15
    np.testing.assert_allclose(learned.step.item(), step, rtol=1e-5)
    np.testing.assert_allclose(learned.offset.item(), step * np.round(low / step), rtol=1e-5)
    error = lambda act: float(jnp.sum((act.apply(act.grids(act.init(EYE, x)), EYE, x) - x) ** 2))
    assert error(quantize.lsq_plus_activations(site, 2)) < error(
        quantize.lsq_plus_activations(site, 2, calibrate=quantize.min_max())
    )


@pytest.mark.parametrize("signed", [False, True])
def test_pact_clip_gets_the_gradient_of_what_is_clipped(signed):
    x = X if signed else jnp.abs(X)
    x = x.at[0, 0].set(2.0)  # at alpha: clipped, says the paper
    act = quantize.pact_activations(site, 4, initial=2.0)
    learned = act.init(EYE, x).learned["w"]
    assert learned.clip.item() == 2.0
    out, grad, dx = gradients(act, learned, x)
    low, high = (-8, 7) if signed else (0, 15)
    u = f64(x) * high / 2
    np.testing.assert_allclose(out, np.round(np.clip(u, low, high)) * 2 / high, atol=1e-6)
    inside = (u >= low) & (u < high)
    np.testing.assert_allclose(dx, np.where(inside, COTANGENT, 0), rtol=1e-6)
    ends = np.where(u >= high, 1.0, low / high)
    want = (COTANGENT * np.where(inside, 0, ends)).sum()
    np.testing.assert_allclose(grad.clip.item(), want, rtol=1e-5)


def test_pact_starts_from_the_largest_magnitude_and_refuses_a_bad_one():
    act = quantize.pact_activations(site, 4)
    learned = act.init(EYE, X).learned["w"]
    np.testing.assert_allclose(learned.clip.item(), np.abs(X).max(), rtol=1e-6)
    assert quantize.pact_activations(site, 4).init(EYE, 0 * X).learned["w"].clip.item() == 1.0
    with pytest.raises(ValueError, match="initial must be positive, got -1"):
        quantize.pact_activations(site, 4, initial=-1.0)


def test_dorefa_activations_are_codes_of_zero_to_one():
    out, _, dx = gradients(quantize.dorefa_activations(site, 3), ())
    np.testing.assert_allclose(out, np.round(7 * np.clip(f64(X), 0, 1)) / 7, atol=1e-6)
    inside = (f64(X) >= 0) & (f64(X) <= 1)
    np.testing.assert_allclose(dx, np.where(inside, COTANGENT, 0), rtol=1e-6)


def weight_gradients(comp, w, cotangent):
    state = comp.init(w)
    loss = lambda w, learned: jnp.sum(
        comp.apply(w, state._replace(learned=learned)) * f32(cotangent)
    )
    return comp.apply(w, state), state, *jax.grad(loss, argnums=(0, 1))(w, state.learned)


def test_ttq_scales_and_weights_have_the_papers_gradients():
    w, cotangent = f32(normal(20, 3)), normal(20, 3, seed=1)
    view, state, dw, dlearned = weight_gradients(quantize.ttq(axis=-1), w, cotangent)
    x = f64(w)
    threshold = 0.05 * np.abs(x).max(0, keepdims=True)
    up, down = x > threshold, x < -threshold
    scale, negative = ((m * np.abs(x)).sum(0) / m.sum(0) for m in (up, down))
    np.testing.assert_allclose(np.ravel(state.learned.scale), scale, rtol=1e-5)
    np.testing.assert_allclose(np.ravel(state.learned.negative), negative, rtol=1e-5)
    np.testing.assert_allclose(view, up * scale - down * negative, rtol=1e-5)
    slope = np.where(up, scale, np.where(down, negative, 1.0))
    np.testing.assert_allclose(dw, cotangent * slope, rtol=1e-5)
    np.testing.assert_allclose(np.ravel(dlearned.scale), (up * cotangent).sum(0), rtol=1e-4)
    np.testing.assert_allclose(np.ravel(dlearned.negative), -(down * cotangent).sum(0), rtol=1e-4)


@pytest.mark.parametrize("bits", [1, 3])
def test_dorefa_weights_have_all_levels_but_zero_and_the_gradient_of_tanh(bits):
    w, cotangent = f32(normal(64, 8)), normal(64, 8, seed=1)
    comp = quantize.dorefa(bits)
    view, _, dw, _ = weight_gradients(comp, w, cotangent)
    x = f64(w)
    if bits == 1:
        want, slope = np.where(x >= 0, 1, -1) * np.abs(x).mean(), np.ones_like(x)
    else:
        n, top = 2**bits - 1, np.tanh(np.abs(x).max())
        want = 2 * np.round(n * (np.tanh(x) / (2 * top) + 0.5)) / n - 1
        slope = (1 - np.tanh(x) ** 2) / top
    np.testing.assert_allclose(view, want, rtol=1e-5)
    np.testing.assert_allclose(dw, cotangent * slope, rtol=1e-5, atol=1e-6)
    levels = np.unique(np.asarray(view))
    assert len(levels) == 2**bits and 0 not in levels


def test_quantized_gradients_are_unbiased_on_their_levels_and_zero_where_all_are():
    g = f32(np.r_[normal(3, 5), np.zeros((1, 5))])
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = jax.jit(jax.vmap(lambda key: quantize.quantized_gradient(g, key, bits=2)))(keys)
    top = 2 * np.abs(g).max(1, keepdims=True)
    codes = (f64(drawn[:, :3]) / top[:3] + 0.5) * 3
    np.testing.assert_allclose(codes, np.round(codes), atol=1e-5)
    assert set(np.unique(np.round(codes))) == {0.0, 1.0, 2.0, 3.0}
    # levels lie top / 3 apart, so one draw spreads by half of that at most: five standard errors
    assert np.all(np.abs(f64(drawn).mean(0) - f64(g)) <= 5 * top / 6 / np.sqrt(4000))
    assert not np.any(drawn[:, 3])
    assert np.all(
        np.isnan(quantize.quantized_gradient(g.at[0, 0].set(jnp.inf), keys[0], bits=2)[0])
    )

    x, key = f32(normal(4, 5, seed=2)), keys[0]
    back = jax.jit(jax.grad(lambda x: jnp.sum(quantize.dorefa_gradients(x, key, bits=2) * g)))(x)
    assert bits_equal(back, jax.jit(lambda: quantize.quantized_gradient(g, key, bits=2))())


def test_the_transform_of_gradients_has_its_own_noise_every_step():
    tx = quantize.quantized_gradients(2, seed=3)
    grads = {"a": f32(normal(50)), "b": f32(normal(50)), "n": jnp.arange(3)}
    state = tx.init(grads)
    update = jax.jit(tx.update)
    first, state = update(grads, state)
    second, _ = update(grads, state)
    assert len(np.unique(first["a"])) <= 4 and bits_equal(first["n"], grads["n"])
    assert not bits_equal(first["a"], second["a"]) and not bits_equal(first["a"], first["b"])
    assert bits_equal(update(grads, tx.init(grads))[0], first)


def test_xnor_has_the_gradient_of_sign_and_mean():
    w, cotangent = f32(2 * normal(10, 4)), normal(10, 4, seed=1)
    view, _, dw, _ = weight_gradients(quantize.xnor(axis=-1), w, cotangent)
    alpha = np.abs(f64(w)).mean(0, keepdims=True)
    np.testing.assert_allclose(view, np.where(f64(w) >= 0, alpha, -alpha), rtol=1e-6)
    slope = 1 / 10 + alpha * (np.abs(f64(w)) <= 1)
    np.testing.assert_allclose(dw, cotangent * slope, rtol=1e-5)


def test_bitnet_activations_have_a_scale_per_token():
    x = X.at[3].set(0.0)
    run = quantize.per_token(site, bits=8)
    size = np.abs(f64(x)).max(1, keepdims=True)
    scale = np.where(size == 0, 1, size) / 127
    np.testing.assert_allclose(run(EYE, x), np.round(f64(x) / scale) * scale, rtol=1e-5, atol=1e-6)
    dx = jax.grad(lambda x: jnp.sum(run(EYE, x) * f32(COTANGENT)))(x)
    np.testing.assert_allclose(dx, COTANGENT, rtol=1e-6)


@pytest.mark.parametrize("make", [quantize.twn, quantize.bitnet_b158])
def test_ternary_weights_by_name_pass_gradients_straight(make):
    w, cotangent = f32(normal(30, 4)), normal(30, 4, seed=1)
    view, _, dw, _ = weight_gradients(make(), w, cotangent)
    mean = np.abs(f64(w)).mean()
    kept = np.abs(f64(w)) > (0.7 if make is quantize.twn else 0.5) * mean
    scale = np.abs(f64(w))[kept].mean() if make is quantize.twn else mean
    np.testing.assert_allclose(view, np.sign(f64(w)) * kept * scale, rtol=1e-5)
    np.testing.assert_allclose(dw, cotangent, rtol=1e-6)


# --- A2Q


def codes_of(comp, w, state):
    """Integer codes from what ships, int64 [n, channels]."""
    packed = comp.pack(w, state)
    q = f64(jc.unpack(packed)) / f64(packed.qparams.scale)
    np.testing.assert_allclose(q, np.round(q), atol=1e-3)
    return np.round(q).astype(np.int64)


def wrapped(sums, bits):
    """A `bits`-bit two's complement accumulator that wraps around at every addition."""
    total = np.zeros(sums.shape[1:], np.int64)
    for row in sums:
        total = (total + row + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)
    return total


@pytest.mark.parametrize(
    "bits, accumulator, inputs, signed",
    [(8, 16, 8, False), (8, 12, 8, False), (4, 10, 4, True), (3, 9, 8, True), (8, 10, 8, False)],
)
def test_no_input_overflows_the_accumulator(bits, accumulator, inputs, signed):
    comp = quantize.a2q(bits, accumulator_bits=accumulator, input_bits=inputs, input_signed=signed)
    low, high = (-(2 ** (inputs - 1)), 2 ** (inputs - 1) - 1) if signed else (0, 2**inputs - 1)
    limit = 2 ** (accumulator - 1) - 1
    bound = limit * 2.0 ** (int(signed) - inputs)
    rng = np.random.default_rng(bits + accumulator)
    fullest = 0.0
    for trial in range(4):
        w = rng.normal(size=(257, 8)).astype(np.float32)
        w[:, 0] = 0.0
        w[1:, 1] = 0.0  # one weight alone
        w[:, 2] = 1.0  # all alike: the bound in whole codes, or none
        w[3:, 3] *= 1e-6
        few = int(bound // 2 ** (bits - 1)) + 1
        w[:few, 4], w[few:, 4] = 2.0, 0.0  # few large ones, which truncation takes little from
        state = comp.init(f32(w))
        if trial:  # whatever training makes of steps and norms
            spread = lambda s: s * f32(np.exp(rng.normal(0, 2, s.shape)))
            state = state._replace(learned=jax.tree.map(spread, state.learned))
        if trial == 3:
            state = state._replace(learned=jax.tree.map(lambda s: 1e6 * s, state.learned))
        q = codes_of(comp, f32(w), state)
        worst = np.where(q > 0, high, low)
        best = np.where(q > 0, low, high)
        for x in (worst, best, rng.integers(low, high + 1, q.shape)):
            exact = (x * q).sum(0)
            assert np.abs(exact).max() <= limit
            np.testing.assert_array_equal(wrapped(x * q, accumulator), exact)
        assert np.all(np.abs(q).sum(0) * max(-low, high) <= limit)  # so partial sums fit too
        fullest = max(fullest, np.abs(q).sum(0).max() * max(-low, high) / limit)
    assert fullest > 0.7 * np.floor(bound) * max(-low, high) / limit  # the bound is used


def test_a2q_starts_from_the_weights_where_the_accumulator_is_wide():
    w = f32(normal(64, 5))
    comp = quantize.a2q(8, accumulator_bits=32, input_bits=8)
    state = comp.init(w)
    step = np.abs(f64(w)).max(0, keepdims=True) / 127
    np.testing.assert_allclose(state.learned.step, step, rtol=1e-5)
    q = np.trunc(f64(w) / f64(state.learned.step) * (1 + 1e-6))
    np.testing.assert_allclose(comp.apply(w, state), q * step, rtol=1e-5)


@pytest.mark.parametrize("bounded", [False, True])
def test_gradients_of_a2q_go_through_the_normalization(bounded):
    w, cotangent = f32(normal(12, 2)), normal(12, 2, seed=1)
    comp = quantize.a2q(6, accumulator_bits=12, input_bits=6)
    state = comp.init(w)
    norm = state.learned.norm * (4.0 if bounded else 0.25)
    state = state._replace(learned=state.learned._replace(norm=norm))
    loss = lambda w, learned: jnp.sum(
        comp.apply(w, state._replace(learned=learned)) * f32(cotangent)
    )
    dw, learned = jax.jit(jax.grad(loss, argnums=(0, 1)))(w, state.learned)

    v, s = f64(w), f64(state.learned.step)
    total = np.abs(v).sum(0, keepdims=True)
    limit = (2**11 - 1) / 2**6 * (1 - (12 + 32) * 2.0**-24 - 2.0**-19)
    g = np.minimum(f64(norm), s * limit)
    assert np.all((g < f64(norm)) == bounded)
    u = g * v / total / s
    inside = np.abs(u) <= 31
    d = cotangent * inside
    want = (g / total) * (d - np.sign(v) * (d * v).sum(0) / total)
    np.testing.assert_allclose(dw, want, rtol=1e-4, atol=1e-5)
    by_norm = (d * v / total).sum(0)
    by_step = (cotangent * np.where(inside, np.trunc(u) - u, np.sign(u) * 31)).sum(0)
    by_step = by_step + (limit * by_norm if bounded else 0)
    np.testing.assert_allclose(learned.norm[0], 0 * by_norm if bounded else by_norm, rtol=1e-4)
    np.testing.assert_allclose(learned.step[0], by_step, rtol=1e-3)


def test_truncation_keeps_integers_and_an_impossible_accumulator_is_refused():
    whole = jnp.arange(-128.0, 128.0)
    step = jnp.float32(0.1)
    assert bits_equal(toward_zero(whole * step * (1 / step)), whole)
    assert bits_equal(toward_zero(jnp.array([0.99, -3.7])), jnp.array([0.0, -3.0]))
    comp = quantize.a2q(8, accumulator_bits=16, input_bits=8)
    state = comp.init(f32(normal(9, 2)))
    broken = comp.apply(f32(normal(9, 2)).at[4, 1].set(jnp.nan), state)
    assert np.all(np.isfinite(broken[:, 0])) and np.all(np.isnan(broken[:, 1]))
    with pytest.raises(ValueError, match="accumulator_bits=8 .* at least 10 are needed"):
        quantize.a2q(8, accumulator_bits=8, input_bits=8)
    quantize.a2q(8, accumulator_bits=10, input_bits=8)


# --- ranges and bits over time


def test_ranges_follow_the_weights_slowly():
    comp = quantize.ema_ranges(integer(8), decay=0.9)
    w = f32(normal(30))
    state = comp.init(w)
    state = comp.update(3 * w, state)
    low, high = (f64(end) * (0.9 + 0.1 * 3) for end in (w.min(), w.max()))
    np.testing.assert_allclose(state.buffers.qparams.scale.item(), max(-low, high) / 127, rtol=1e-6)
    with pytest.raises(ValueError, match="decay must be at least 0 and below 1"):
        quantize.ema_ranges(integer(8), decay=1.0)


def test_bits_follow_their_schedule_in_one_program_and_pack_at_their_size():
    schedule = optax.linear_schedule(8.0, 2.0, 3)
    w = f32(normal(64, 3))
    comp = quantize.annealed_bits(lambda b: quantize.lsq(b, axis=-1, from_bits=8), schedule)
    state, sizes = comp.init(w), []
    apply, update = jax.jit(comp.apply), jax.jit(comp.update)
    for bits in (8, 6, 4, 2, 2):
        assert int(state.buffers.bits) == bits
        # the same start as LSQ at these bits
        plain = quantize.lsq(bits, axis=-1)
        view = apply(w, state)
        np.testing.assert_allclose(view, plain.apply(w, plain.init(w)), rtol=1e-5, atol=1e-6)
        packed = comp.pack(w, state)
        assert bits_equal(jc.unpack(packed), view)
        sizes.append(jc.packed_bytes(packed))
        state = update(w, state)
    assert sizes == [64 * 3 * bits // 8 + 12 for bits in (8, 6, 4, 2, 2)]
    assert apply._cache_size() == update._cache_size() == 1  # type: ignore
    with pytest.raises(TypeError, match="pack of annealed bits needs their number"):
        jax.eval_shape(comp.pack, w, state)


def test_bits_of_activations_follow_their_schedule_in_one_program():
    x = jnp.abs(X)
    uint = lambda bits: integer(bits, symmetric=False)
    for make in (
        lambda bits: quantize.pact_activations(site, bits),
        lambda bits: quantize.activations(site, uint(bits)),
    ):
        act = quantize.annealed_activations(make, lambda step: 8 - 3 * step)
        state, train = act.init(EYE, x), jax.jit(act.train)
        for bits in (8, 5, 2):
            assert int(state.buffers.bits) == bits
            out, state = train(state, EYE, x)
            scale = f64(x).max() / (2**bits - 1)
            np.testing.assert_allclose(out, np.round(f64(x) / scale) * scale, rtol=1e-4, atol=1e-5)
        assert train._cache_size() == 1  # type: ignore
    grids = act.grids(state._replace(buffers=state.buffers._replace(bits=jnp.int32(4))))
    assert grids["w"].bits == 4


def test_bits_of_dorefa_and_a2q_may_be_traced():
    w = f32(normal(32, 3))

    @jax.jit
    def views(bits, wide):
        bounded = quantize.a2q(bits, accumulator_bits=wide, input_bits=bits)
        return [c.apply(w, c.init(w)) for c in (quantize.dorefa(bits), bounded)]

    for bits, wide in ((3, 9), (6, 14)):
        got = views(jnp.int32(bits), jnp.int32(wide))
        bounded = quantize.a2q(bits, accumulator_bits=wide, input_bits=bits)
        for view, comp in zip(got, (quantize.dorefa(bits), bounded), strict=True):
            np.testing.assert_allclose(view, comp.apply(w, comp.init(w)), rtol=1e-5, atol=1e-6)
    assert views._cache_size() == 1  # type: ignore


# --- all of them

WEIGHTS = {
    "lsq": quantize.lsq(2, axis=-1),
    "lsq_plus": quantize.lsq_plus(4),
    "a2q": quantize.a2q(8, accumulator_bits=16, input_bits=8),
    "ttq": quantize.ttq(axis=-1),
    "dorefa": quantize.dorefa(2),
    "xnor": quantize.xnor(),
    "ema_ranges": quantize.ema_ranges(integer(4)),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_zeros_and_short_floats_give_finite_views_and_gradients(name):
    comp = WEIGHTS[name]
    params = {
        "zero": jnp.zeros((4, 3)),
        "bfloat16": jnp.asarray(normal(4, 3), jnp.bfloat16),
        "float16": jnp.asarray(1e3 * normal(4, 3), jnp.float16),
        "tiny": jnp.full((4, 3), 1e-38),
    }
    state = comp.init(params)

    @jax.jit
    def run(params, learned):
        loss = lambda params, learned: sum(
            jnp.sum(v.astype(jnp.float32))
            for v in jax.tree.leaves(comp.apply(params, state._replace(learned=learned)))
        )
        view = comp.apply(params, state._replace(learned=learned))
        return view, jax.grad(loss, argnums=(0, 1))(params, learned)

    view, grads = run(params, state.learned)
    assert [v.dtype for v in jax.tree.leaves(view)] == [w.dtype for w in jax.tree.leaves(params)]
    for leaf in jax.tree.leaves((view, grads)):
        assert np.all(np.isfinite(f64(leaf)))
    if name != "dorefa":  # its grid has no zero
        assert not np.any(view["zero"])


@pytest.fixture
def optax_mixes_dtypes():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize(
    "weights, activations",
    [
        (
            quantize.lsq_plus(2, axis=-1),
            functools.partial(quantize.lsq_plus_activations, calibrate=quantize.min_max()),
        ),
        (quantize.ttq(axis=-1), quantize.pact_activations),
        (
            quantize.a2q(4, accumulator_bits=12, input_bits=4, input_signed=True),
            quantize.lsq_activations,
        ),
    ],
    ids=["lsq_plus", "ttq_pact", "a2q_lsq"],
)
def test_training_with_learned_quantizers_lowers_the_loss(weights, activations, optax_mixes_dtypes):
    del optax_mixes_dtypes

    def mlp(params, x):
        return jax.nn.silu(x @ params["a"]) @ params["b"]

    params = {"a": f32(normal(6, 16)), "b": f32(normal(16, 3, seed=1))}
    x = f32(normal(64, 6, seed=2))
    labels = jnp.argmax(mlp(params, x), axis=-1)
    recipe = jc.chain(jc.prune.magnitude(0.3), weights)
    act = activations(mlp, 3)
    tx = optax.multi_transform(
        {"params": optax.adam(0.01), "learned": optax.adam(0.005)}, jc.train.label_learned
    )
    step = jc.train.make_step(jc.train.stateless(mlp), tx, recipe=recipe, activations=act)
    view = recipe.apply(params, recipe.init(params))
    state = jc.train.create(params, recipe, tx, activations=act.init(view, x))
    start, losses = jax.tree.map(np.asarray, state.activations.learned), []
    for _ in range(30):
        state, metrics = step(state, (), (x, labels))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.6 * losses[0] and step._cache_size() == 1
    assert not bits_equal(jax.tree.map(np.asarray, state.activations.learned), start)
    view, packed = (f(state.params, state.compress) for f in (recipe.apply, recipe.pack))
    assert bits_equal(jc.unpack(packed), view)
    assert jc.packed_bytes(packed) < 0.35 * sum(w.nbytes for w in jax.tree.leaves(params))
