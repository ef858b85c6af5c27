"""Gradients of convolution kernels as matrix products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxcompress.train import fast_kernel_gradients


def _conv(strides, padding, **options):
    numbers = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), **options}
    return lambda params, x: lax.conv_general_dilated(x, params["w"], strides, padding, **numbers)


def _reference(x, dy, shape, strides, padding):
    # float64, one tap after the other
    x = np.pad(np.float64(x), ((0, 0), *padding, (0, 0)))
    out = np.zeros(shape)
    for i in range(shape[0]):
        for j in range(shape[1]):
            rows = slice(i, i + strides[0] * (dy.shape[1] - 1) + 1, strides[0])
            cols = slice(j, j + strides[1] * (dy.shape[2] - 1) + 1, strides[1])
            out[i, j] = np.einsum("nhwc,nhwo->co", x[:, rows, cols], np.float64(dy))
    return out


@pytest.mark.parametrize(
    ("kernel", "strides", "padding", "n"),
    [
        ((3, 3), (1, 1), ((1, 1), (1, 1)), 4),
        ((3, 2), (2, 1), ((0, 1), (2, 0)), 17),  # a prime number of images
        ((1, 1), (2, 3), ((0, 0), (0, 0)), 1),
        ((5, 4), (3, 2), ((2, 2), (1, 3)), 32),
    ],
)
def test_equal_to_a_sum_over_taps(kernel, strides, padding, n):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(n, 9, 8, 3)), jnp.float32)
    params = {"w": jnp.asarray(rng.normal(size=(*kernel, 3, 2)), jnp.float32)}
    plain = _conv(strides, padding)
    fast = fast_kernel_gradients(plain)
    y = plain(params, x)
    dy = jnp.asarray(rng.normal(size=y.shape), jnp.float32)
    out, back = jax.vjp(fast, params, x)
    np.testing.assert_array_equal(out, y)
    grads, dx = jax.jit(back)(dy)
    wanted = _reference(x, dy, params["w"].shape, strides, padding)
    np.testing.assert_allclose(grads["w"], wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dx, jax.vjp(plain, params, x)[1](dy)[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("fn", "channels"),
    [
        (_conv((1, 1), "SAME", rhs_dilation=(2, 2)), 8),
        (_conv((1, 1), ((-1, 0), (0, 0))), 8),
        (_conv((1, 1), "SAME", feature_group_count=2), 4),
        (_conv((1, 1), "SAME", dimension_numbers=("NCHW", "HWIO", "NCHW")), 8),
    ],
)
def test_others_stay(fn, channels):
    params, x = {"w": jnp.ones((3, 3, channels, 8))}, jnp.ones((2, 8, 8, 8))
    assert "custom_vjp" not in str(jax.make_jaxpr(fast_kernel_gradients(fn))(params, x))


def test_bfloat16_stays_and_calls_are_entered():
    inner = jax.jit(_conv((1, 1), "SAME"))
    fn = fast_kernel_gradients(lambda params, x: jax.nn.relu(inner(params, x)))
    params, x = {"w": jnp.ones((3, 3, 3, 3))}, jnp.ones((2, 8, 8, 3))
    assert "custom_vjp_call" in str(jax.make_jaxpr(fn)(params, x))
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (params, x))
    assert "custom_vjp_call" not in str(jax.make_jaxpr(fn)(*half))


def test_a_split_batch_stays_right():
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("batch",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    params, x = {"w": jnp.ones((3, 3, 3, 2))}, jnp.arange(4.0 * 4 * 4 * 3).reshape(4, 4, 4, 3)
    fn = _conv((1, 1), "SAME")
    loss = lambda f: jax.grad(lambda p, x: jnp.sum(jnp.square(f(p, x))))
    wanted = loss(fn)(params, x)["w"]
    found = jax.jit(loss(fast_kernel_gradients(fn)))(params, jax.device_put(x, split))["w"]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
