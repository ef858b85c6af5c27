"""The distillation loss against float64 NumPy and its invariants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.distill import kd


def reference(s, t, temperature):
    def log_softmax(z):
        z = np.asarray(z, np.float64) / temperature
        z = z - z.max(-1, keepdims=True)
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    ls, lt = log_softmax(s), log_softmax(t)
    return temperature**2 * (np.exp(lt) * (lt - ls)).sum(-1)


def logits(seed, shape=(6, 10)):
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape) * 3, rng.normal(size=shape) * 3


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0, 20.0])
def test_equals_float64_and_its_gradient_is_the_closed_form(temperature):
    s, t = logits(0)
    js, jt = jnp.asarray(s, jnp.float32), jnp.asarray(t, jnp.float32)
    each = kd(js, jt, temperature=temperature, per_example=True)
    np.testing.assert_allclose(each, reference(s, t, temperature), rtol=2e-5)
    loss, grad = jax.value_and_grad(lambda z: kd(z, jt, temperature=temperature))(js)
    np.testing.assert_allclose(loss, reference(s, t, temperature).mean(), rtol=2e-5)
    softmax = lambda z: np.exp(z / temperature) / np.exp(z / temperature).sum(-1, keepdims=True)
    np.testing.assert_allclose(grad, temperature / 6 * (softmax(s) - softmax(t)), atol=2e-6)


def test_invariants():
    s, t = (jnp.asarray(z, jnp.float32) for z in logits(1))
    np.testing.assert_allclose(kd(s + 5.0, t - 3.0), kd(s, t), rtol=1e-5)
    assert abs(float(kd(s, s + 2.0))) < 1e-5
    labels = jnp.arange(6)
    hard = jnp.where(jax.nn.one_hot(labels, 10) > 0, 0.0, -jnp.inf)  # one-hot teacher, T = 1: CE
    ce = -jax.nn.log_softmax(s)[jnp.arange(6), labels].mean()
    np.testing.assert_allclose(kd(s, hard, temperature=1.0), ce, rtol=1e-6)


def test_degenerate_inputs_have_finite_gradients():
    far = jnp.array([[400.0, -400.0, 0.0]])
    masked = jnp.array([[1.0, 2.0, -jnp.inf]])
    for dtype in (jnp.float32, jnp.bfloat16):
        for s, t in ((far, -far), (masked, masked + 1.0), (jnp.zeros((1, 3)), far)):
            loss, grad = jax.value_and_grad(kd)(s.astype(dtype), t.astype(dtype))
            assert bool(jnp.isfinite(loss)) and bool(jnp.all(jnp.isfinite(grad)))
            assert loss.dtype == jnp.float32 and grad.dtype == dtype


def test_the_teacher_gets_no_gradient_and_shapes_must_agree():
    s, t = (jnp.asarray(z, jnp.float32) for z in logits(2))
    assert not np.any(np.asarray(jax.grad(kd, argnums=1)(s, t)))
    with pytest.raises(ValueError, match=r"one shape .* got \(6, 10\) and \(6, 9\)"):
        kd(s, t[:, :9])
