"""Losses on features against float64 NumPy, their invariances, degenerate inputs, errors."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from _distill import agrees, bounded, largest_gradient, normal

from jaxcompress import distill

pytestmark = pytest.mark.broad

MAP = (2, 3, 3, 4)


def f32(x):
    return jnp.asarray(x, jnp.float32)


def adaptive(x, bins):
    """[N, H, W, C] averaged over windows floor(i H / h) to ceil((i + 1) H / h)."""
    n, height, width, c = x.shape
    out = np.zeros((n, *bins, c))
    for i in range(bins[0]):
        for j in range(bins[1]):
            rows = slice(i * height // bins[0], -((-(i + 1) * height) // bins[0]))
            columns = slice(j * width // bins[1], -((-(j + 1) * width) // bins[1]))
            out[:, i, j] = x[:, rows, columns].mean((1, 2))
    return out


def attention_reference(s, t, power=2):
    def q(f):
        a = (np.abs(f) ** power).mean(-1).reshape(len(f), -1)
        return a / np.sqrt((a**2).sum(1, keepdims=True))

    size = tuple(min(a, b) for a, b in zip(s.shape[1:3], t.shape[1:3], strict=True))
    return ((q(adaptive(s, size)) - q(adaptive(t, size))) ** 2).mean()


def hcl_reference(s, t):
    total, weights = ((s - t) ** 2).mean(), 1.0
    weight = 1.0
    for n in (4, 2, 1):
        if n < s.shape[1]:
            weight /= 2
            total += weight * ((adaptive(s, (n, n)) - adaptive(t, (n, n))) ** 2).mean()
            weights += weight
    return total / weights


def overhaul_reference(s, t, margin):
    total = 0.0
    for i in np.ndindex(s.shape):
        a, b, m = s[i], t[i], margin[i[-1]]
        if b > 0 or (b > m and a > b):
            total += (a - b) ** 2
        elif b <= m and a > m:
            total += (a - m) ** 2
    return total / len(s)


MARGIN = np.array([-0.2, -0.5, -1.0, -2.0])
MASK = np.array([[1, 1, 0], [1, 0, 0]])


def masked_reference(s, t, pairs):
    keep = MASK[:, :, None] * np.ones(s.shape[-1])
    if pairs:
        keep = np.broadcast_to((MASK[:, :, None] * MASK[:, None, :])[:, None], s.shape)
    return (keep * (s - t) ** 2).sum() / keep.sum()


RAW = np.array([-1.0, 0.0, 1.0, 2.0])


def vid_reference(s, t):
    v = np.log1p(np.exp(RAW)) + 1e-5
    return (0.5 * ((s - t) ** 2 / v + np.log(v))).mean()


CASES = {
    "fitnets": (distill.fitnets, lambda s, t: ((s - t) ** 2).mean(), MAP),
    "attention_transfer": (distill.attention_transfer, attention_reference, MAP),
    "attention_transfer_p4": (
        functools.partial(distill.attention_transfer, power=4.0),
        functools.partial(attention_reference, power=4),
        MAP,
    ),
    "vid": (lambda s, t, **k: distill.vid(s, t, f32(RAW), **k), vid_reference, MAP),
    "hierarchical_context": (distill.hierarchical_context, hcl_reference, (2, 5, 5, 2)),
    "overhaul": (
        lambda s, t, **k: distill.overhaul([s], [t], [f32(MARGIN)], **k),
        lambda s, t: overhaul_reference(s, t, MARGIN),
        MAP,
    ),
    "tinybert_hidden": (distill.tinybert_hidden, lambda s, t: ((s - t) ** 2).mean(), (2, 3, 4)),
    "tinybert_attention": (
        distill.tinybert_attention,
        lambda s, t: ((s - t) ** 2).mean(),
        (2, 2, 3, 3),
    ),
    "tinybert_hidden_mask": (
        functools.partial(distill.tinybert_hidden, where=jnp.asarray(MASK)),
        functools.partial(masked_reference, pairs=False),
        (2, 3, 4),
    ),
    "tinybert_attention_mask": (
        functools.partial(distill.tinybert_attention, where=jnp.asarray(MASK)),
        functools.partial(masked_reference, pairs=True),
        (2, 2, 3, 3),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_float64_and_so_does_the_gradient(name):
    loss, reference, shape = CASES[name]
    agrees(loss, reference, normal(0, *shape), normal(1, *shape))


@pytest.mark.parametrize("name", [name for name in CASES if not name.endswith("mask")])
def test_per_example_is_the_loss_of_each_and_bfloat16_is_computed_in_float32(name):
    loss, _, shape = CASES[name]
    s, t = (jnp.asarray(normal(i, *shape), jnp.bfloat16) for i in (2, 3))
    loss = jax.jit(loss, static_argnames="per_example")
    each = loss(s, t, per_example=True)
    assert each.shape == (shape[0],) and each.dtype == jnp.float32
    alone = jnp.stack([loss(s[i : i + 1], t[i : i + 1]) for i in range(shape[0])])
    np.testing.assert_allclose(each, alone, rtol=1e-6)
    np.testing.assert_allclose(loss(s, t), each.mean(), rtol=1e-6)
    wide = loss(s.astype(jnp.float32), t.astype(jnp.float32))
    np.testing.assert_allclose(loss(s, t), wide, rtol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_zero_gradient_at_equality(name):
    loss, _, shape = CASES[name]
    x = np.abs(normal(4, *shape)) + 0.1
    assert largest_gradient(loss, x, x) <= 1e-6
    if name != "vid":
        assert float(loss(f32(x), f32(x))) == pytest.approx(0.0, abs=1e-9)


# --- attention transfer


def test_attention_ignores_channels_signs_and_scales():
    s, t = f32(normal(5, *MAP)), f32(normal(6, *MAP))
    base = distill.attention_transfer(s, t)
    for same in (
        s[..., jnp.array([2, 0, 3, 1])],
        jnp.concatenate([s, s], axis=-1),
        s * f32([3.0, 0.2])[:, None, None, None],
        s * f32([1.0, -1.0, 1.0, -1.0])[None, None, None],
    ):
        np.testing.assert_allclose(distill.attention_transfer(same, t), base, rtol=1e-5)
    # maps that light up at one place each: the bound 2 / places
    one = np.zeros(MAP)
    one[:, 0, 0] = 1
    other = np.zeros(MAP)
    other[:, 1, 1] = 1
    np.testing.assert_allclose(distill.attention_transfer(f32(one), f32(other)), 2 / 9, rtol=1e-6)
    assert float(base) < 2 / 9


@pytest.mark.parametrize(
    ("student", "teacher"), [((4, 4), (7, 6)), ((7, 6), (4, 4)), ((4, 7), (7, 4))]
)
def test_attention_averages_the_larger_map(student, teacher):
    agrees(
        distill.attention_transfer,
        attention_reference,
        normal(7, 1, *student, 1),
        normal(8, 1, *teacher, 2),
    )


def test_attention_of_dead_maps_has_bounded_gradients():
    s, t = normal(9, *MAP), normal(10, *MAP)
    usual = largest_gradient(distill.attention_transfer, s, t)
    for dead in (0.0, 1e-25, 1e-12, 1e-6):
        few = s.copy()
        few[0] *= dead
        bounded(distill.attention_transfer, few, t, 1e4 * usual)
        bounded(distill.attention_transfer, dead * s, t, 1e4 * usual)
        bounded(distill.attention_transfer, s, dead * t, 10 * usual)
    for power in (1.0, 3.0):
        loss = functools.partial(distill.attention_transfer, power=power)
        bounded(loss, np.zeros(MAP), t, 1e4 * largest_gradient(loss, s, t))
    assert np.isfinite(
        jax.grad(lambda p: distill.attention_transfer(f32(s * 0), f32(t), power=p))(2.0)
    )


# --- VID


def test_vid_variance_starts_as_asked_and_its_optimum_is_the_squared_error():
    for initial in (1e-3, 1.0, 5.0, 200.0):
        raw = distill.vid_variance(2, initial=initial)
        np.testing.assert_allclose(jax.nn.softplus(raw) + 1e-5, initial, rtol=1e-4)
    s, t = f32(normal(11, 64, 2) * [0.5, 2.0]), jnp.zeros((64, 2))
    error = np.mean(np.asarray(s) ** 2, axis=0)
    at_optimum = jnp.log(jnp.expm1(f32(error - 1e-5)))
    grad = jax.grad(distill.vid, argnums=2)
    np.testing.assert_allclose(grad(s, t, at_optimum), 0.0, atol=1e-6)
    assert np.all(np.asarray(grad(s, t, at_optimum + 1)) > 1e-3)
    assert np.all(np.asarray(grad(s, t, at_optimum - 1)) < -1e-3)


def test_vid_trains_projector_and_variance_with_optax():
    student, teacher = f32(normal(12, 32, 3)), f32(normal(13, 32, 2))
    projector = distill.mlp_projector(2, hidden=8)
    learned = {
        "projector": projector.init(jax.random.key(0), student),
        "raw_variance": distill.vid_variance(2),
    }

    def loss(learned):
        projected = projector.apply(learned["projector"], student)
        return distill.vid(projected, teacher, learned["raw_variance"])

    tx = optax.sgd(1.0)

    @jax.jit
    def step(learned, opt):
        updates, opt = tx.update(jax.grad(loss)(learned), opt)
        return optax.apply_updates(learned, updates), opt

    before, opt = learned, tx.init(learned)
    for _ in range(60):
        learned, opt = step(learned, opt)
    assert float(loss(learned)) < float(loss(before)) - 0.2
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), learned, before)
    assert all(jax.tree.leaves(moved))


def test_vid_stays_finite_at_extreme_variances():
    s, t = normal(14, *MAP), normal(15, *MAP)
    for raw in (-200.0, 200.0):
        loss = lambda s, t, raw=raw: distill.vid(s, t, jnp.full(4, raw, jnp.float32))
        bounded(loss, s, t, 1e5)
        slope = jax.grad(lambda a: distill.vid(f32(s), f32(t), a))(jnp.full(4, raw))
        assert np.all(np.isfinite(slope))


# --- HCL


def test_hierarchical_context_is_the_squared_error_on_one_place_and_pools_what_is_not_square():
    s, t = f32(normal(16, 2, 1, 1, 3)), f32(normal(17, 2, 1, 1, 3))
    np.testing.assert_allclose(distill.hierarchical_context(s, t), distill.fitnets(s, t), rtol=1e-6)
    s, t = normal(18, 2, 3, 5, 2), normal(19, 2, 3, 5, 2)
    agrees(distill.hierarchical_context, hcl_reference, s, t)
    # differences that average to zero count in the full map only: 1 / (1 + 1/2 + 1/4)
    board = np.indices((4, 4)).sum(0) % 2 * 2.0 - 1
    board = f32(board[None, :, :, None])
    np.testing.assert_allclose(distill.hierarchical_context(board, 0 * board), 1 / 1.75, rtol=1e-6)


# --- OFD


def test_margins_are_means_of_the_negative_part():
    margins = jax.jit(distill.ofd_margin)
    rng = np.random.default_rng(20)
    scale, bias = np.array([1.0, -2.0, 0.5, 1.5]), np.array([0.0, 1.0, -1.0, 2.0])
    draws = rng.normal(size=(100_000, 4)) * scale + bias
    expected = [draws[draws[:, c] < 0, c].mean() for c in range(4)]
    np.testing.assert_allclose(margins(f32(scale), f32(bias)), expected, rtol=0.02)
    # exact in float64, near and past the switch to -3 |scale| at P(x < 0) = 0.001
    betas, expected = [3.0, 3.08, 3.1, 9.0, -50.0, 0.3], []
    for beta in betas:
        below = 0.5 * math.erfc(beta / math.sqrt(2))
        density = math.exp(-(beta**2) / 2) / math.sqrt(2 * math.pi)
        expected.append(beta - density / below if below > 1e-3 else -3.0)
    signs = f32([1, -1] * 3)
    np.testing.assert_allclose(margins(signs, f32(betas)), expected, rtol=2e-4)
    edge = margins(jnp.zeros(3), f32([0.0, 1.0, -1.0]))
    np.testing.assert_allclose(edge, [0.0, 0.0, -1.0])  # scale 0: x is its bias


def test_overhaul_leaves_the_student_alone_where_both_are_silent():
    s, t = f32([[-2.0, -0.5, 0.3, -0.7]]), f32([[-3.0, -3.0, -3.0, -0.4]])
    margin = f32([-1.0, -1.0, -1.0, -1.0])
    grad = jax.grad(lambda s: distill.overhaul([s], [t], [margin]))(s)
    np.testing.assert_allclose(grad, [[0.0, 1.0, 2.6, 0.0]], rtol=1e-6)


def test_overhaul_halves_the_weight_of_earlier_layers_and_averages_the_teacher():
    s = [normal(21, 2, 2, 2, 4), normal(22, 2, 1, 1, 3)]
    t = [normal(23, 2, 4, 4, 4), normal(24, 2, 1, 1, 3)]
    margins = [MARGIN, MARGIN[:3]]
    expected = overhaul_reference(s[0], adaptive(t[0], (2, 2)), MARGIN) / 2
    expected += overhaul_reference(s[1], t[1], MARGIN[:3])
    layers = [list(map(f32, x)) for x in (s, t, margins)]
    np.testing.assert_allclose(distill.overhaul(*layers), expected, rtol=1e-5)
    np.testing.assert_allclose(
        distill.overhaul(*layers, per_example=True).mean(), expected, rtol=1e-5
    )


# --- TinyBERT


@pytest.mark.parametrize("name", ["tinybert_hidden", "tinybert_attention"])
def test_padding_has_no_influence_and_no_gradient(name):
    loss, _, shape = CASES[name]
    mask = jnp.asarray(MASK)
    s, t = normal(25, *shape), normal(26, *shape)
    base = loss(f32(s), f32(t), where=mask)
    spoiled_s, spoiled_t = s.copy(), t.copy()
    for a in (spoiled_s, spoiled_t):
        if a.ndim == 3:
            a[MASK == 0] = np.nan
        else:
            a[np.broadcast_to((MASK[:, :, None] * MASK[:, None] == 0)[:, None], shape)] = np.nan
    value, grad = jax.value_and_grad(loss)(f32(spoiled_s), f32(spoiled_t), where=mask)
    np.testing.assert_allclose(value, base, rtol=1e-6)
    assert np.all(np.isfinite(grad)) and not np.any(np.asarray(grad)[np.isnan(spoiled_s)])
    assert np.any(np.asarray(grad)[~np.isnan(spoiled_s)])
    axes = [(0, 0)] + [(0, 2 * (n == 3)) for n in shape[1:]]
    longer = loss(*(f32(np.pad(a, axes)) for a in (s, t)), where=jnp.pad(mask, ((0, 0), (0, 2))))
    np.testing.assert_allclose(longer, base, rtol=1e-6)
    each = loss(f32(s), f32(t), where=mask, per_example=True)
    for i in range(2):
        alone = loss(f32(s[i : i + 1]), f32(t[i : i + 1]), where=mask[i : i + 1])
        np.testing.assert_allclose(each[i], alone, rtol=1e-6)
    assert float(loss(f32(s), f32(t), where=0 * mask)) == 0.0
    np.testing.assert_allclose(
        loss(f32(s), f32(t), where=0 * mask + 1), loss(f32(s), f32(t)), rtol=1e-6
    )


def test_scores_that_the_network_masked_count_as_zero():
    s, t = normal(27, 1, 2, 3, 3), normal(28, 1, 2, 3, 3)
    s[..., 2] = -1e4
    t[..., 2] = -9999.0
    loss, grad = jax.value_and_grad(distill.tinybert_attention)(f32(s), f32(t))
    np.testing.assert_allclose(loss, ((s - t)[..., :2] ** 2).sum() / s.size, rtol=1e-5)
    assert not np.any(np.asarray(grad)[..., 2])
    textbrewer = distill.tinybert_attention(f32(s), f32(t), masked_below=-1e-3)
    cut = lambda a: np.where(a <= -1e-3, 0, a)
    np.testing.assert_allclose(textbrewer, ((cut(s) - cut(t)) ** 2).mean(), rtol=1e-5)


# --- projectors


def test_projectors_equal_their_definition():
    x = normal(29, 2, 4, 4, 3)
    bias, scale = f32(normal(30, 5)), f32(normal(31, 5))

    @jax.jit
    def run(x, half):
        key, shape = jax.random.key(1), jax.ShapeDtypeStruct(x.shape, x.dtype)
        linear, mlp = distill.linear_projector(5), distill.mlp_projector(5, hidden=7)
        conv = distill.conv_projector(5, activation=jax.nn.relu)
        halving = distill.conv_projector(5, kernel_size=3, strides=2)
        a, b, c = (projector.init(key, shape) for projector in (linear, mlp, conv))
        a["bias"] = bias
        c |= {"bias": bias, "scale": scale}
        outputs = linear.apply(a, x), mlp.apply(b, x), conv.apply(c, x)
        return (a, b, c), outputs, halving.apply(halving.init(key, shape), half)

    params, outputs, half = run(f32(x), jnp.asarray(x, jnp.bfloat16))
    assert half.shape == (2, 2, 2, 5) and half.dtype == jnp.float32
    assert [w.shape for w in params[1]] == [(3, 7), (7, 7), (7, 5)]
    a, b, c = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
    expected = [x @ a["kernel"] + a["bias"]]
    expected.append(np.maximum(np.maximum(x @ b[0], 0) @ b[1], 0) @ b[2])
    y = x @ c["kernel"][0, 0]
    y = (y - y.mean((0, 1, 2))) / np.sqrt(y.var((0, 1, 2)) + 1e-5)
    expected.append(np.maximum(y * c["scale"] + c["bias"], 0))
    for found, right in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-5)


def test_a_projector_of_constant_maps_has_bounded_gradients():
    conv = distill.conv_projector(2)
    params = conv.init(jax.random.key(2), jnp.ones(MAP))
    t = normal(33, 2, 3, 3, 2)
    for dtype in (jnp.float32, jnp.bfloat16):
        fn = lambda p, x: distill.fitnets(conv.apply(p, x), f32(t))
        grads = jax.grad(fn, argnums=(0, 1))(params, jnp.ones(MAP, dtype))
        assert all(float(jnp.max(jnp.abs(g))) < 1e3 for g in jax.tree.leaves(grads))


# --- errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: distill.fitnets(x, x[..., :2]),
            r"one shape \[N, \.\.\.\].*\(2, 3, 3, 2\).*linear_proj",
        ),
        (lambda x: distill.fitnets(x[:0], x[:0]), r"one shape .* got \(0, 3, 3, 4\)"),
        (
            lambda x: distill.attention_transfer(x, x[:1]),
            r"same N and axes, got \(2, 3, 3, 4\) and \(1,",
        ),
        (
            lambda x: distill.attention_transfer(x, x, power=0.5),
            "power must be at least 1, got 0.5",
        ),
        (lambda x: distill.vid(x, x, jnp.ones(3)), r"raw_variance \[C\] must agree in C.*\(3,\)"),
        (lambda x: distill.vid_variance(0), "channels must be at least 1, got 0"),
        (
            lambda x: distill.vid_variance(2, initial=0.0),
            "initial must be above 1e-05 and finite, got 0",
        ),
        (
            lambda x: distill.hierarchical_context(x[0], x[0]),
            r"one shape \[N, H, W, C\], got \(3, 3, 4\)",
        ),
        (lambda x: distill.ofd_margin(x, x), r"must both be \[C\], got \(2, 3, 3, 4\)"),
        (lambda x: distill.overhaul([x], [x], []), "as many, at least one of each, got 1, 1 and 0"),
        (
            lambda x: distill.overhaul([x, x], [x, x], [jnp.ones(4), jnp.ones(3)]),
            r"layer 1: .* the margin \[C\], got .* and \(3,\)",
        ),
        (lambda x: distill.tinybert_hidden(x, x), r"one shape \[B, T, D\], got \(2, 3, 3, 4\)"),
        (
            lambda x: distill.tinybert_hidden(x[0], x[0], where=jnp.ones((3, 2))),
            r"where must be a mask of shape \(3, 3\), got \(3, 2\)",
        ),
        (
            lambda x: distill.tinybert_attention(x, x),
            r"scores must be \[B, heads, T, T\], got \(2, 3, 3, 4\)",
        ),
        (lambda x: distill.linear_projector(0), "must be at least 1, got 0"),
        (
            lambda x: distill.linear_projector(2).apply({"kernel": jnp.ones((3, 2)), "bias": 0}, x),
            r"initialized for 3 channels, got features \(2, 3, 3, 4\)",
        ),
        (
            lambda x: distill.conv_projector(2).apply({}, x[0]),
            r"features must be \[N, H, W, C\], got \(3, 3, 4\)",
        ),
    ],
)
def test_errors_say_what_would_be_right(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.ones(MAP))
