"""Activation quantization through the graph, against hand-made references."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.formats import integer

u8 = integer(8, symmetric=False)


def mlp(params, x):
    for layer in params:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"][None])
    return x


def layers(sizes=(6, 16, 4), seed=0):
    rng = np.random.default_rng(seed)
    return [
        {
            "kernel": jnp.asarray(rng.normal(size=(a, b)), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=(b,)), jnp.float32),
        }
        for a, b in zip(sizes, sizes[1:], strict=False)
    ]


def inputs(count=3):
    return [
        (jnp.asarray(np.random.default_rng(i).normal(size=(32, 6)), jnp.float32),)
        for i in range(count)
    ]


def test_ranges_and_outputs_equal_a_hand_written_forward():
    params, batches = layers(), inputs()
    act = jc.quantize.activations(mlp, u8)
    grids = jc.quantize.calibrate_activations(act, params, batches)
    assert set(grids) == {"0/kernel", "1/kernel"}
    x = np.concatenate([np.asarray(b) for (b,) in batches])
    hidden = np.maximum(x @ np.asarray(params[0]["kernel"]) + np.asarray(params[0]["bias"]), 0)
    for name, seen in (("0/kernel", x), ("1/kernel", hidden)):
        span = max(seen.max(), 0) - min(seen.min(), 0)
        np.testing.assert_allclose(np.ravel(grids[name].qparams.scale), [span / 255], rtol=1e-5)
    x = batches[0][0]
    h = grids["0/kernel"].snap(x) @ params[0]["kernel"] + params[0]["bias"][None]
    h = grids["1/kernel"].snap(jax.nn.relu(h)) @ params[1]["kernel"] + params[1]["bias"][None]
    np.testing.assert_allclose(act.apply(grids, params, x), jax.nn.relu(h), rtol=1e-6)


def test_streaming_batches_equals_one_batch():
    params, batches = layers(), inputs()
    act = jc.quantize.activations(mlp, u8)
    many = jc.quantize.calibrate_activations(act, params, batches)
    one = jc.quantize.calibrate_activations(
        act, params, [(jnp.concatenate([x for (x,) in batches]),)]
    )
    np.testing.assert_allclose(
        many["1/kernel"].qparams.scale, one["1/kernel"].qparams.scale, rtol=1e-6
    )


def test_each_layer_of_a_scan_has_its_own_grid():
    params = jax.tree.map(lambda *w: jnp.stack(w), *layers((6, 6, 6, 6)))

    def scanned(params, x):
        body = lambda h, p: (jax.nn.relu(h @ p["kernel"] + p["bias"][None]), None)
        return jax.lax.scan(body, x, params)[0]

    loop = layers((6, 6, 6, 6))
    batches = inputs()
    scan_act, loop_act = jc.quantize.activations(scanned, u8), jc.quantize.activations(mlp, u8)
    grids = jc.quantize.calibrate_activations(scan_act, params, batches)
    by_layer = jc.quantize.calibrate_activations(loop_act, loop, batches)
    got = np.ravel(grids["kernel"].qparams.scale)
    want = [float(np.ravel(by_layer[f"{i}/kernel"].qparams.scale)[0]) for i in range(3)]
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(
        scan_act.apply(grids, params, batches[0][0]),
        loop_act.apply(by_layer, loop, batches[0][0]),
        rtol=1e-5,
    )


def test_gradients_pass_straight_through():
    params, ((x,), *_) = layers(), inputs()
    act = jc.quantize.activations(mlp, u8)
    grids = jc.quantize.calibrate_activations(act, params, [(x,)])
    plain = jax.grad(lambda p: jnp.sum(mlp(p, x)))(params)
    through = jax.grad(lambda p: jnp.sum(act.apply(grids, p, x)))(params)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(through), strict=True):
        assert float(jnp.linalg.norm(a - b)) < 0.1 * float(jnp.linalg.norm(a)) + 1e-3


def test_errors_name_the_contraction():
    params, batches = layers(), inputs(1)
    with pytest.raises(ValueError, match="sites='9/.*' matches no contraction; nearest: .*kernel"):
        jc.quantize.activations(mlp, u8, sites="9/.*").init(params, *batches[0])
    act = jc.quantize.activations(mlp, u8)
    with pytest.raises(ValueError, match="activations of '0/kernel' must have been observed"):
        act.grids(act.init(params, *batches[0]))
    with pytest.raises(TypeError, match=r"batches must hold tuples of inputs, \(x,\) for one"):
        jc.quantize.calibrate_activations(act, params, [batches[0][0]])  # type: ignore
    with pytest.raises(ValueError, match=r"sites='\*' is not a regular expression"):
        jc.quantize.activations(mlp, u8, sites="*").init(params, *batches[0])
    with pytest.raises(ValueError, match="activations of '0/kernel' .* finite"):
        jc.quantize.calibrate_activations(act, params, [(batches[0][0].at[1, 2].set(jnp.nan),)])
    with pytest.raises(ValueError, match="batches is empty"):
        jc.quantize.calibrate_activations(act, params, [])
