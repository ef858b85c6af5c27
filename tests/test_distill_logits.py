"""Losses on logits against float64 NumPy, their invariances and degenerate inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import distill

pytestmark = pytest.mark.broad

LABELS = np.array([3, 0, 4, 4, 1, 2])
T = 1.7


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(p, q):
    return np.sum(p * np.log(p / q), axis=-1)


def without_target(z):
    keep = np.arange(z.shape[-1]) != LABELS[:, None]
    return z[keep].reshape(len(z), -1)


def dkd(s, t):
    p, q = (softmax(z / T)[np.arange(6), LABELS] for z in (t, s))
    binary = kl(np.stack([p, 1 - p], -1), np.stack([q, 1 - q], -1))
    others = kl(*(softmax(without_target(z) / T) for z in (t, s)))
    return T**2 * (0.7 * binary + 3.0 * others)


def nkd(s, t):
    p, q = (softmax(z)[np.arange(6), LABELS] for z in (t, s))
    others_p, others_q = (softmax(without_target(z) / T) for z in (t, s))
    return -p * np.log(q) - 1.5 * T**2 * np.sum(others_p * np.log(others_q), -1)


def top_k(s, t):
    p, q = softmax(t / T), softmax(s / T)
    total = np.zeros(len(s))
    for n in range(len(s)):
        best = np.argsort(-p[n])[:2]
        a, b = (np.append(x[n][best], 1 - x[n][best].sum()) for x in (p, q))
        total[n] = T**2 * kl(a, b)
    return total


def jsd(s, t, beta):
    p, q = softmax(t / T), softmax(s / T)
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def skewed(s, t, share, *, reverse):
    p, q = softmax(t / T), softmax(s / T)
    if reverse:
        p, q = q, p
    return kl(p, share * p + (1 - share) * q)


def dist(s, t):
    p, q = softmax(s / T), softmax(t / T)
    rows = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)])
    columns = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(p.T, q.T, strict=True)])
    return T**2 * (1.5 * (1 - rows) + 0.5 * (1 - columns))


def standardized(s, t):
    a, b = ((z - z.mean(-1, keepdims=True)) / z.std(-1, ddof=1, keepdims=True) for z in (s, t))
    return T**2 * kl(softmax(b / T), softmax(a / T))


def _standardized(s, t, *, temperature, **options):
    s, t = (distill.standardize_logits(z) for z in (s, t))
    return distill.kd(s, t, temperature=temperature, **options)


def _labelled(loss, **options):
    return lambda s, t, **given: loss(s, t, jnp.asarray(LABELS[: len(s)]), **options, **given)


with_options = functools.partial
LOSSES = {
    "dkd": (_labelled(distill.dkd, target_weight=0.7, other_weight=3.0), dkd),
    "nkd": (_labelled(distill.nkd), nkd),
    "top_k": (with_options(distill.top_k_kd, k=2), top_k),
    "jsd": (with_options(distill.generalized_jsd, beta=0.3), lambda s, t: jsd(s, t, 0.3)),
    "jsd0": (
        with_options(distill.generalized_jsd, beta=0.0),
        lambda s, t: kl(softmax(t / T), softmax(s / T)),
    ),
    "jsd1": (
        with_options(distill.generalized_jsd, beta=1.0),
        lambda s, t: kl(softmax(s / T), softmax(t / T)),
    ),
    "reverse": (distill.reverse_kd, lambda s, t: kl(softmax(s / T), softmax(t / T))),
    "skew": (
        with_options(distill.skew_kd, skew=0.2),
        lambda s, t: skewed(s, t, 0.2, reverse=False),
    ),
    "reverse_skew": (
        with_options(distill.reverse_skew_kd, skew=0.2),
        lambda s, t: skewed(s, t, 0.2, reverse=True),
    ),
    "standardized": (_standardized, standardized),
    "dist": (with_options(distill.dist, row_weight=1.5, column_weight=0.5), dist),
}
SEPARABLE = sorted(set(LOSSES) - {"dist"})


def logits(seed, shape=(6, 5)):
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape) * 2, rng.normal(size=shape) * 2


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_equal_float64(name):
    s, t = logits(0)
    loss, formula = LOSSES[name]
    value, grad = jax.value_and_grad(lambda z: loss(z, jnp.float32(t), temperature=T))(
        jnp.float32(s)
    )
    np.testing.assert_allclose(value, np.mean(formula(s, t)), rtol=3e-5)
    slopes, h = np.zeros_like(s), 1e-5
    for place in np.ndindex(s.shape):
        step = np.zeros_like(s)
        step[place] = h
        slopes[place] = (np.mean(formula(s + step, t)) - np.mean(formula(s - step, t))) / (2 * h)
    np.testing.assert_allclose(grad, slopes, rtol=1e-3, atol=3e-6)


@pytest.mark.parametrize("name", SEPARABLE)
def test_per_example_is_what_is_averaged(name):
    s, t = map(jnp.float32, logits(1))
    loss = LOSSES[name][0]
    each = loss(s, t, temperature=T, per_example=True)
    assert each.shape == (6,)
    np.testing.assert_allclose(jnp.mean(each), loss(s, t, temperature=T), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_degenerate_inputs_have_finite_bounded_gradients(name, dtype):
    far = jnp.tile(jnp.array([[400.0, -400.0, 0.0, 1.0, 2.0]]), (6, 1))
    hidden = jnp.where(jnp.arange(5) == 3, -jnp.inf, jnp.float32(logits(2)[0]))
    constant = jnp.zeros((6, 5))
    normal = jnp.float32(logits(3)[1])
    loss = LOSSES[name][0]
    both = jax.jit(jax.value_and_grad(lambda s, t, k: loss(s, t, temperature=k), argnums=(0, 2)))
    pairs = [(far, -far), (-far, far), (constant, normal), (normal, constant)]
    pairs += [(far, normal), (hidden, hidden[::-1] + 1.0), (constant, constant)]
    for s, t in pairs:
        value, (grad, by_temperature) = both(s.astype(dtype), t.astype(dtype), jnp.float32(T))
        assert value.dtype == jnp.float32 and grad.dtype == dtype
        assert np.isfinite(value) and np.isfinite(by_temperature)
        assert np.max(np.abs(np.float32(grad))) <= 1e4
    grad = both(hidden.astype(dtype), hidden.astype(dtype), jnp.float32(T))[1][0]
    assert not np.any(np.asarray(grad, np.float32)[:, 3])


@pytest.mark.parametrize("name", LOSSES)
def test_one_program_for_all_temperatures_and_no_gradient_to_the_teacher(name):
    s, t = map(jnp.float32, logits(4))
    loss = LOSSES[name][0]
    traced = []

    @jax.jit
    def both(t, k):
        traced.append(k)
        return jax.value_and_grad(lambda t: loss(s, t, temperature=k))(t)

    for k in (1.0, 4.0):
        value, grad = both(t, jnp.float32(k))
        assert not np.any(np.asarray(grad))
        np.testing.assert_allclose(value, loss(s, t, temperature=k), rtol=2e-5)
    assert len(traced) == 1


def test_kd_is_the_binary_part_and_the_others_weighted_by_the_teacher():
    s, t = map(jnp.float32, logits(5))
    labels = jnp.asarray(LABELS)
    part = lambda a, b: distill.dkd(
        s, t, labels, target_weight=a, other_weight=b, temperature=T, per_example=True
    )
    sure = jnp.take_along_axis(jax.nn.softmax(t / T), labels[:, None], axis=1)[:, 0]
    whole = distill.kd(s, t, temperature=T, per_example=True)
    np.testing.assert_allclose(part(1.0, 0.0) + (1 - sure) * part(0.0, 1.0), whole, rtol=1e-5)


def test_dkd_of_two_classes_is_kd():
    s, t = (jnp.float32(z[:, :2]) for z in logits(6))
    labels = jnp.asarray(LABELS % 2)
    np.testing.assert_allclose(distill.dkd(s, t, labels), distill.kd(s, t), rtol=1e-5)
    assert float(distill.dkd(s, t, labels, target_weight=0.0)) == 0.0


def test_a_bucket_loses_little_and_all_classes_nothing():
    s, t = map(jnp.float32, logits(7))
    full = distill.kd(s, t, temperature=1.0, per_example=True)
    parts = [distill.top_k_kd(s, t, k=k, per_example=True) for k in range(1, 6)]
    for less, more in zip(parts, parts[1:], strict=False):
        assert np.all(np.asarray(less) <= np.asarray(more) + 1e-6) and np.all(less >= 0)
    np.testing.assert_allclose(parts[-1], full, rtol=1e-6)


def test_bounds_and_symmetries_of_divergences():
    s, t = (20 * jnp.float32(z) for z in logits(8))
    half = distill.generalized_jsd(s, t, per_example=True)
    np.testing.assert_allclose(half, distill.generalized_jsd(t, s, per_example=True), rtol=1e-5)
    assert np.all(half <= np.log(2) + 1e-6) and np.max(half) > 0.6
    one, other = distill.generalized_jsd(s, t, beta=0.2), distill.generalized_jsd(t, s, beta=0.8)
    np.testing.assert_allclose(one, other, rtol=1e-5)
    for loss in (distill.skew_kd, distill.reverse_skew_kd):
        assert np.max(loss(s, t, skew=0.1, per_example=True)) <= -np.log(0.1) + 1e-5
    np.testing.assert_allclose(
        distill.skew_kd(s, t, skew=0.0), distill.generalized_jsd(s, t, beta=0.0)
    )
    np.testing.assert_allclose(distill.reverse_skew_kd(s, t, skew=0.0), distill.reverse_kd(s, t))


def test_dist_knows_relations_only():
    s, t = map(jnp.float32, logits(9))
    assert abs(float(distill.dist(s, s))) <= 1e-5
    value = distill.dist(s, t, temperature=1.0)
    assert 0 <= float(value) <= 8
    np.testing.assert_allclose(distill.dist(s[::-1], t[::-1], temperature=1.0), value, rtol=1e-5)
    order = jnp.array([2, 0, 1, 4, 3])
    np.testing.assert_allclose(distill.dist(s[:, order], t[:, order], temperature=1.0), value, 1e-5)


def test_standardized_logits_forget_scale_and_offset():
    z = jnp.float32(logits(10)[0])
    once = distill.standardize_logits(z)
    np.testing.assert_allclose(distill.standardize_logits(3.0 * z + 7.0), once, atol=2e-6)
    np.testing.assert_allclose(np.std(once, axis=-1, ddof=1), 1.0, rtol=1e-5)
    hidden = jnp.concatenate([z, jnp.full((6, 1), -jnp.inf)], axis=1)
    np.testing.assert_allclose(distill.standardize_logits(hidden)[:, :5], once, atol=2e-6)


def test_the_temperature_climbs_while_the_student_descends():
    s, t = map(jnp.float32, logits(11))

    def loss(theta, weight):
        return distill.kd(s, t, temperature=distill.ctkd_temperature(theta, weight=weight))

    theta = jnp.float32(1.0)
    assert float(distill.ctkd_temperature(theta, weight=1.0)) == pytest.approx(15.6212, rel=1e-5)
    grad = jax.grad(loss)
    plain = jax.grad(lambda x: distill.kd(s, t, temperature=1.0 + 20.0 * jax.nn.sigmoid(x)))(theta)
    np.testing.assert_allclose(grad(theta, 0.5), -0.5 * plain, rtol=1e-5)
    assert float(grad(theta, 0.0)) == 0.0
    weights = [float(distill.ctkd_weight(step, steps=10)) for step in (0, 5, 10, 50)]
    np.testing.assert_allclose(weights, [0.0, 0.5, 1.0, 1.0], atol=1e-6)


def test_errors_name_what_is_wrong():
    s, t = map(jnp.float32, logits(12))
    with pytest.raises(ValueError, match=r"one shape"):
        distill.dist(s, t[:, :4])
    with pytest.raises(ValueError, match=r"\[examples, classes\], got \(5,\)"):
        distill.dist(s[0], t[0])
    with pytest.raises(ValueError, match=r"labels must be integers \(6,\)"):
        distill.dkd(s, t, jnp.zeros(6))
    with pytest.raises(ValueError, match="at least 2 classes"):
        distill.nkd(s[:, :1], t[:, :1], jnp.asarray(LABELS))
    with pytest.raises(ValueError, match=r"k must be in 1 to 5, .* got 6"):
        distill.top_k_kd(s, t, k=6)
    with pytest.raises(ValueError, match=r"skew must be in \[0, 1\], got 2"):
        distill.skew_kd(s, t, skew=2)
    with pytest.raises(ValueError, match=r"beta must be in \[0, 1\]"):
        distill.generalized_jsd(s, t, beta=-0.1)
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        distill.reverse_kd(s, t, temperature=0)
