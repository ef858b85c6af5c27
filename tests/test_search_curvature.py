"""Traces of Hessians and estimates of the loss, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.search import curvature, hessian_trace


def mean_squares(params, x, y):
    return 0.5 * jnp.mean(jnp.sum((x @ params["w"] + params["b"][None] - y) ** 2, -1))


@pytest.fixture
def linear():
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    batches = [(normal(64, 6), normal(64, 3)) for _ in range(2)]
    params = {"w": normal(6, 3), "b": jnp.zeros(3)}
    return params, batches


def test_the_trace_of_a_linear_model(linear):
    params, batches = linear
    found = hessian_trace(mean_squares, params, batches, key=jax.random.key(0), samples=256)
    x = np.concatenate([np.asarray(x, np.float64) for x, _ in batches])
    # H of one output is E[x x^T], the same for all three.
    np.testing.assert_allclose(found["w"], 3 * np.mean(np.sum(x**2, -1)), rtol=0.05)
    np.testing.assert_allclose(found["b"], 3.0, rtol=0.25)


def test_a_diagonal_hessian_needs_one_sample():
    params = {"a": jnp.arange(4.0), "count": jnp.arange(3)}
    loss = lambda p, c: jnp.sum(c * p["a"] ** 3)
    c = jnp.array([1.0, -2.0, 3.0, 4.0])
    found = hessian_trace(loss, params, [(c,), (3 * c,)], key=jax.random.key(1), samples=1)
    np.testing.assert_allclose(found["a"], float(jnp.sum(2 * c * 6 * params["a"])), rtol=1e-6)
    assert set(found) == {"a"}


def test_estimates_are_their_formulas(linear):
    params, batches = linear
    options = {f"int{b}": jc.quantize.weights(jc.formats.integer(b), axis=-1) for b in (2, 4)}
    key = jax.random.key(0)
    found = curvature(mean_squares, params, batches, weights=options, key=key, samples=64)
    trace = hessian_trace(mean_squares, params, batches, key=key, samples=64)["w"]
    x, y = (np.concatenate([np.asarray(b[i], np.float64) for b in batches]) for i in (0, 1))
    w = np.asarray(params["w"], np.float64)
    gradients = x[:, :, None] * (x @ w - y)[:, None, :]
    assert set(found.weights) == {"w"} and not found.activations
    for name, recipe in options.items():
        view = np.asarray(recipe.apply(params, recipe.init(params))["w"], np.float64)
        values, square = found.weights["w"][name], (view - w) ** 2
        np.testing.assert_allclose(values["squared_error"], square.sum(), rtol=1e-5)
        np.testing.assert_allclose(values["hessian_trace"], trace * square.sum() / 36, rtol=1e-5)
        fisher = 0.5 * np.sum(np.mean(gradients**2, 0) * square)
        np.testing.assert_allclose(values["fisher"], fisher, rtol=1e-4)
    assert found.increase("fisher")["w"]["int2"] > found.increase("fisher")["w"]["int4"] > 0


def test_bad_input(linear):
    params, batches = linear
    with pytest.raises(ValueError, match="samples must be at least 1"):
        hessian_trace(mean_squares, params, batches, key=jax.random.key(0), samples=0)
    with pytest.raises(ValueError, match="at least one option"):
        curvature(mean_squares, params, batches, weights={}, key=jax.random.key(0))
    with pytest.raises(ValueError, match="batches"):
        hessian_trace(mean_squares, params, [], key=jax.random.key(0))
