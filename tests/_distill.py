"""What the tests of distillation losses share: float64 gradients and their comparison."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def numeric_gradient(fn, x, step=1e-5):
    """Central differences of a float64 scalar function of one array."""
    grad = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        move = np.zeros_like(x)
        move[i] = step
        grad[i] = (fn(x + move) - fn(x - move)) / (2 * step)
    return grad


def agrees(loss, reference, s, t, rtol=2e-5):
    """Value and gradient of loss(s, t), eager and jitted, equal those of a float64 reference."""
    js, jt = jnp.asarray(s, jnp.float32), jnp.asarray(t, jnp.float32)
    # the reference takes the inputs that float32 holds
    s, t = np.asarray(js, np.float64), np.asarray(jt, np.float64)
    value, (grad, none) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(js, jt)
    expected = reference(s, t)
    np.testing.assert_allclose(value, expected, rtol=rtol)
    np.testing.assert_allclose(loss(js, jt), value, rtol=1e-6)
    numeric = numeric_gradient(lambda x: reference(x, t), s)
    assert np.abs(numeric).max() > 0
    np.testing.assert_allclose(grad, numeric, rtol=0, atol=max(rtol, 1e-4) * np.abs(numeric).max())
    assert not np.any(np.asarray(none)), "the teacher gets no gradient"
    assert value.dtype == jnp.float32 and value.shape == ()


@functools.cache
def gradient(loss):
    return jax.jit(jax.value_and_grad(loss))


def bounded(loss, s, t, bound):
    """The largest entry of the gradient is finite and within the bound, in both float dtypes."""
    for dtype in (jnp.float32, jnp.bfloat16):
        value, grad = gradient(loss)(jnp.asarray(s, dtype), jnp.asarray(t, dtype))
        assert value.dtype == jnp.float32 and grad.dtype == dtype
        assert np.isfinite(value)
        largest = np.abs(np.asarray(grad, np.float64)).max()
        assert largest <= bound, (dtype, largest)


def largest_gradient(loss, s, t):
    _, grad = gradient(loss)(jnp.asarray(s, jnp.float32), jnp.asarray(t, jnp.float32))
    return float(jnp.max(jnp.abs(grad)))
