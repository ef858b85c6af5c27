"""Equalization, smoothing, AWQ, folded BatchNorm: laws and oracles."""

from typing import Any

import _models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from experiments.models import resnet_cifar
from jaxcompress import formats, quantize
from jaxcompress.core.compressor import CompressState
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.graph import walk
from jaxcompress.graph.scaling.bias_absorption import shiftable
from jaxcompress.graph.scaling.migration import absorbable, ranges
from jaxcompress.quantize.ptq.batch_norm import fold_batch_norm
from jaxcompress.quantize.ptq.cross_layer_equalization import (
    absorb_high_bias,
    equal_scales,
    equalize,
)
from jaxcompress.quantize.ptq.leaf_specs import Spec, recipe
from jaxcompress.quantize.ptq.smooth import activation_scales, awq, smooth_quant

pytestmark = pytest.mark.broad


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape), jnp.float32)


def close(fn, new, old, x, tolerance=1e-5):
    want = np.asarray(fn(old, x))
    np.testing.assert_allclose(fn(new, x), want, atol=tolerance * np.abs(want).max())


def mlp(p, x):
    h = jax.nn.relu(x @ p["a"] + p["a_bias"][None])
    h = jax.nn.relu(h @ p["b"] + p["b_bias"][None])
    return h @ p["c"] + p["c_bias"][None]


def mlp_params(**changes):
    params = {"a": normal(4, 8), "b": normal(8, 6), "c": normal(6, 3)}
    params |= {"a_bias": normal(8), "b_bias": normal(6), "c_bias": normal(3)}
    return params | changes


X = normal(50, 4, seed=1)
PER_TENSOR = {"a|b|c": Spec(formats.integer(8), axis=None)}


def chain(p, x):
    # pointwise, depthwise, pointwise
    numbers = ("NHWC", "HWIO", "NHWC")
    conv = lambda x, w, groups: lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups
    )
    x = jax.nn.relu(conv(x, p["expand"], 1))
    x = jax.nn.relu(conv(x, p["depthwise"], 8))
    return conv(x, p["project"], 1)


def chain_params():
    spread = jnp.exp(3 * normal(1, 1, 1, 8))
    return {
        "expand": normal(1, 1, 3, 8) * spread,
        "depthwise": normal(3, 3, 1, 8) * spread[..., ::-1],
        "project": normal(1, 1, 8, 4),
    }


@pytest.mark.parametrize(
    ("fn", "params", "x"),
    [(mlp, mlp_params(a=normal(4, 8) * jnp.exp(2 * normal(1, 8))), X),
     (chain, chain_params(), normal(2, 4, 4, 3))],
    ids=["mlp", "depthwise"],
)  # fmt: skip
def test_ranges_become_equal_and_stay(fn, params, x):
    spec = {".*[^s]": Spec(formats.integer(8), axis=None)}
    spec = PER_TENSOR if fn is mlp else spec
    new, state = equalize(fn, params, [(x,)], spec, absorb_bias=False, tolerance=1e-6)
    close(fn, new, params, x)
    groups = absorbable(fn, new, x).groups
    assert len(groups) == 2
    for group in groups:
        front = [elements for elements in group.producers if elements.weight]
        behind = ranges(new, group.consumers, group.channels)
        np.testing.assert_allclose(ranges(new, front, group.channels), behind, rtol=1e-4)
    again, _ = equalize(fn, new, [(x,)], spec, absorb_bias=False)
    for path, leaf in leaves_with_paths(again):
        np.testing.assert_allclose(leaf, dict(leaves_with_paths(new))[path], rtol=1e-4)
    assert isinstance(state, CompressState)
    packed = recipe(spec).pack(new, state)
    assert {type(leaf).__name__ for leaf in packed.values()} <= {"QTensor", "ArrayImpl"}


def test_two_layers_by_hand():
    # r1 = (8, 2), r2 = (2, 8): t = sqrt(r2 / r1) = (1/2, 2), all ranges are 4.
    fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    params = {"a": jnp.array([[8.0, -2.0]]), "b": jnp.array([[2.0], [-8.0]])}
    (group,) = absorbable(fn, params, jnp.ones((1, 1))).groups
    (t,) = equal_scales(params, [group])
    np.testing.assert_allclose(t, [0.5, 2.0], rtol=1e-6)
    spec = {"a|b": Spec(formats.integer(8), axis=None)}
    new, _ = equalize(fn, params, [(jnp.ones((1, 1)),)], spec)
    np.testing.assert_allclose(new["a"], [[4.0, -4.0]], rtol=1e-6)
    np.testing.assert_allclose(new["b"], [[4.0], [-4.0]], rtol=1e-6)


def test_dead_channels_and_limits():
    fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    params = {"a": jnp.array([[0.0, 1.0, 1e-9]]), "b": jnp.array([[1.0], [0.0], [1e9]])}
    (group,) = absorbable(fn, params, jnp.ones((1, 1))).groups
    (t,) = equal_scales(params, [group], limit=16.0)
    np.testing.assert_allclose(t, [1.0, 1.0, 16.0])
    spec = {"a|b": Spec(formats.integer(8), axis=None)}
    wrongs: tuple[dict[str, Any], ...] = ({"iterations": 0}, {"tolerance": 0.0}, {"limit": 0.5})
    for wrong in wrongs:
        with pytest.raises(ValueError, match="iterations must be at least 1"):
            equalize(fn, params, [(jnp.ones((1, 1)),)], spec, **wrong)


def test_high_bias_moves_through_relu():
    # Pre-activations of `a` lie far above 0: the move is exact where none is below its c.
    params = mlp_params(a_bias=jnp.full(8, 40.0), a=0.1 * normal(4, 8))
    groups = absorbable(mlp, params, X).groups
    found = shiftable(mlp, params, (X,), groups)
    assert [shift.front.path for shift in found] == ["a_bias", "b_bias"]
    new = absorb_high_bias(mlp, params, [(X,)], groups[:1])
    hidden = np.asarray(X, np.float64) @ np.asarray(params["a"], np.float64) + 40.0
    c = np.maximum(hidden.mean(0) - 3 * hidden.std(0), 0)
    above = np.all(hidden >= c, axis=1)
    assert above.sum() > 45
    close(mlp, new, params, X[above])
    np.testing.assert_allclose(new["a_bias"], 40.0 - c, atol=1e-4)
    more = np.asarray(params["b_bias"]) + c @ np.asarray(params["b"], np.float64)
    np.testing.assert_allclose(new["b_bias"], more, atol=1e-3)
    # Channels around 0 keep their biases.
    low = mlp_params()
    assert jax.tree.all(
        jax.tree.map(np.array_equal, absorb_high_bias(mlp, low, [(X,)], groups), low)
    )


@pytest.mark.parametrize(
    "fn",
    [
        lambda p, x: jax.nn.relu(x @ p["a"] + p["a_bias"][None]) @ p["b"],  # no bias behind
        lambda p, x: jax.nn.leaky_relu(x @ p["a"] + p["a_bias"][None]) @ p["b"] + p["b_bias"][None],
        lambda p, x: jax.nn.relu(jax.nn.relu(x @ p["a"]) + p["a_bias"][None]) @ p["b"] + p["b_bias"][None],  # noqa: E501
        lambda p, x: jax.nn.relu(x @ p["a"] + p["a_bias"][None]) @ p["b"] + p["b_bias"][None] * jnp.sum(p["b_bias"]),  # noqa: E501
    ],
)  # fmt: skip
def test_high_bias_stays_where_it_would_not_be_exact(fn):
    params = mlp_params()
    assert not shiftable(fn, params, (X,), absorbable(fn, params, X).groups)


def test_high_bias_and_padding():
    class Convs(nn.Module):
        padding: str

        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(4, (1, 1))(x))
            return nn.Conv(5, (3, 3), padding=self.padding)(x)

    x = normal(2, 6, 6, 3)
    for padding, count in (("VALID", 1), ("SAME", 0)):
        model = Convs(padding)
        params = _models._filled(jax.eval_shape(model.init, jax.random.key(0), x))
        params["params"]["Conv_0"]["bias"] += 30.0
        groups = absorbable(model.apply, params, x).groups
        assert len(shiftable(model.apply, params, (x,), groups)) == count
        new = absorb_high_bias(model.apply, params, [(x,)], groups)
        moved = new["params"]["Conv_0"]["bias"] != params["params"]["Conv_0"]["bias"]
        assert bool(moved.all()) == bool(count)
        close(model.apply, new, params, x)


def test_nothing_to_scale_warns():
    fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
    params, spec = {"a": normal(4, 3), "b": normal(3, 2)}, {"a|b": Spec(formats.integer(8))}
    with pytest.warns(UserWarning, match="nothing to equalize: a: an input .*; b: it comes from"):
        new, _ = equalize(fn, params, [(X,)], spec)
    jax.tree.map(np.testing.assert_array_equal, new, params)
    for method in smooth_quant, awq:
        with pytest.warns(UserWarning, match="no input of these layers can be scaled: a: an inp"):
            method(fn, params, [(X,)], spec)


def normed(p, x):
    x = x - jnp.mean(x, -1, keepdims=True)
    x = x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
    return (x * p["scale"][None] + p["bias"][None]) @ p["w"]


def normed_params():
    spread = jnp.exp(2 * normal(6))
    return {"scale": spread, "bias": normal(6), "w": normal(6, 5, seed=2)}


def test_smooth_quant_makes_inputs_and_weights_alike():
    params, x = normed_params(), normal(40, 6)
    spec = {"w": Spec(formats.integer(8))}
    new, state = smooth_quant(normed, params, [(x[:25],), (x[25:],)], spec)
    close(normed, new, params, x)
    inputs = np.abs(np.asarray(normed(new | {"w": jnp.eye(6)}, x))).max(0)
    np.testing.assert_allclose(inputs, np.abs(new["w"]).max(1), rtol=1e-4)
    # alpha = 0 makes all ranges of weights 1, alpha = 1 those of inputs.
    zero, _ = smooth_quant(normed, params, [(x,)], spec, alpha=0.0)
    np.testing.assert_allclose(np.abs(zero["w"]).max(1), 1, rtol=1e-5)
    one, _ = smooth_quant(normed, params, [(x,)], spec, alpha=1.0)
    inputs = np.abs(np.asarray(normed(one | {"w": jnp.eye(6)}, x))).max(0)
    np.testing.assert_allclose(inputs, 1, rtol=1e-5)
    with pytest.raises(ValueError, match="alpha must be between 0 and 1, got 2"):
        smooth_quant(normed, params, [(x,)], spec, alpha=2)


def test_smooth_quant_of_transformer_in_a_scan():
    model = _models.transformer(remat=False)
    spec = {".*(query|key|value|out|up|down)": Spec(formats.integer(8), axis=(0, -1))}
    new, _ = smooth_quant(model.apply, model.params, [(model.x,)], spec)
    close(model.apply, new, model.params, model.x)
    # max|X / s| = max|s W| for each channel of each layer of the stack, W all that read X.
    for readers, scale in (("query", "key", "value"), "norm1"), (("up",), "norm2"):
        weights = np.stack([np.abs(new["layers"][name]).max(-1) for name in readers]).max(0)
        s = np.asarray(model.params["layers"][scale]["scale"] / new["layers"][scale]["scale"])
        largest = np.stack([moments(model)[name] for name in readers]).max(0)
        np.testing.assert_allclose(largest / s, weights, rtol=1e-4)


def moments(model):
    # Largest inputs [3 layers, channels] of every site.
    largest = lambda tap, x, most: (x, jnp.maximum(most, jnp.max(jnp.abs(x), axis=(0, 1))))
    names = ("query", "key", "value", "up")
    states = {f"layers/{name}": jnp.zeros((3, 8)) for name in names}
    _, states = walk(model.apply, largest)(states, model.params, model.x)
    return {name: np.asarray(states[f"layers/{name}"]) for name in names}


def test_activation_scales():
    s = activation_scales(jnp.array([1.0, 4.0, 16.0, 0.0]), jnp.float32(0.5))
    np.testing.assert_allclose(s, [0.5, 1.0, 2.0, 1.0])
    ones = activation_scales(jnp.array([1.0, 4.0, 0.0]), jnp.float32(0.0))
    np.testing.assert_array_equal(ones, jnp.ones(3))
    np.testing.assert_array_equal(activation_scales(jnp.zeros(3), jnp.float32(0.5)), jnp.ones(3))


@pytest.mark.parametrize("calibrate", [None, quantize.mse()], ids=["range", "mse"])
def test_awq_is_never_worse_than_nearest(calibrate):
    spec = {"w": Spec(formats.integer(3), calibrate=calibrate)}
    comp = recipe(spec)
    for seed in range(2):
        x = normal(64, 6, seed=seed)
        params = normed_params() | {"w": normal(6, 5, seed=seed)}
        new, state = awq(normed, params, [(x,)], spec)
        close(normed, new, params, x)
        want = np.float64(normed(params, x))
        loss = np.sum((np.float64(normed(comp.apply(new, state), x)) - want) ** 2)
        nearest = comp.apply(params, comp.init(params))
        assert loss <= np.sum((np.float64(normed(nearest, x)) - want) ** 2) * (1 + 1e-5)
        # The best of the grid, by running the network with each scale.
        inputs = jnp.mean(jnp.abs(normed(params | {"w": jnp.eye(6)}, x)), 0)
        losses = []
        for exponent in np.linspace(0, 1, 20):  # the default grid
            s = activation_scales(inputs, jnp.float32(exponent))
            scaled = params | {"w": params["w"] * s[:, None]}
            scaled |= {name: params[name] / s for name in ("scale", "bias")}
            view = comp.apply(scaled, comp.init(scaled))
            losses.append(np.sum((np.float64(normed(view, x)) - want) ** 2))
        np.testing.assert_allclose(loss, min(losses), rtol=1e-3)
    with pytest.raises(ValueError, match="grid must be at least 2, got 1"):
        awq(normed, params, [(x,)], spec, grid=1)


def test_awq_of_even_inputs_is_nearest():
    # All channels of one magnitude: every exponent gives scales of 1.
    fn = lambda p, x: jnp.sign(x) * p["scale"][None] @ p["w"]
    params = {"scale": jnp.full(6, 0.5), "w": normal(6, 5)}
    new, _ = awq(fn, params, [(normal(64, 6),)], {"w": Spec(formats.integer(4))})
    jax.tree.map(np.testing.assert_array_equal, new, params)


def test_awq_with_several_layers_and_a_gate():
    def fn(p, x):
        h = x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * p["norm"][None]
        return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]

    params = {"norm": jnp.exp(2 * normal(4)), "gate": normal(4, 8), "up": normal(4, 8, seed=1)}
    params |= {"down": normal(8, 4)}
    x, spec = normal(50, 4), {"gate|up|down": Spec(formats.integer(4))}
    new, state = awq(fn, params, [(x,)], spec)
    close(fn, new, params, x)
    assert not np.array_equal(new["norm"], params["norm"])
    assert recipe(spec).pack(new, state)["down"].format == formats.integer(4)


def test_batch_norm_of_resnet20():
    rng = np.random.default_rng(0)
    x = normal(1, 8, 8, 3)
    fn = resnet_cifar.standard_apply_fn(20)
    shapes = jax.eval_shape(resnet_cifar.ResNetCifar(20).init, jax.random.key(0), x)
    params = _models._filled(shapes)
    params["params"] = jax.tree.map(
        lambda w: w * jnp.asarray(rng.choice([-1, 1], w.shape), w.dtype), params["params"]
    )
    small_fn, new = fold_batch_norm(fn, params, [(x,)])
    y = np.asarray(jax.jit(fn)(params, x))
    np.testing.assert_allclose(jax.jit(small_fn)(new, x), y, atol=1e-5 * np.abs(y).max())
    want = dict(leaves_with_paths(resnet_cifar.fold_batch_norm(params)))
    got = dict(leaves_with_paths(new["params"]))
    # 19 kernels and biases, of the linear layer too: nothing else is left.
    assert sum(w.size for w in got.values()) == sum(w.size for w in want.values())
    assert "batch_stats" not in new
    kernels = [path for path in want if path.endswith("kernel")]
    assert len(kernels) == 20
    for path in kernels:
        largest = np.abs(want[path]).max()
        np.testing.assert_allclose(got[path], want[path], atol=1e-6 * largest)
    spec = {"params/.*kernel": Spec(formats.integer(8))}
    state = recipe(spec).init(new)
    view, reference = (
        recipe(spec).apply(new, state),
        quantize.weights(formats.integer(8), axis=-1),
    )
    path = "conv1/kernel"
    np.testing.assert_allclose(
        dict(leaves_with_paths(view["params"]))[path],
        reference.apply(want[path], reference.init(want[path])),
        atol=1e-5,
    )


def test_batch_norm_of_nnx_behind_a_convolution_with_bias():
    model = _models.nnx_cnn()
    fn, new = fold_batch_norm(model.apply, model.params, [(model.x,)])
    want = np.asarray(model.apply(model.params, model.x))
    np.testing.assert_allclose(fn(new, model.x), want, atol=1e-5 * np.abs(want).max())
    got, old = (dict(leaves_with_paths(p)) for p in (new, model.params))
    assert set(old) - set(got) == {"conv/bias", "norm/scale", "norm/var", "norm/mean"}
    factor = np.float64(old["norm/scale"]) / np.sqrt(np.float64(old["norm/var"]) + 1e-5)
    np.testing.assert_allclose(
        got["conv/kernel"], np.asarray(old["conv/kernel"]) * factor, rtol=1e-5
    )
    shift = (np.float64(old["conv/bias"]) - old["norm/mean"]) * factor + old["norm/bias"]
    np.testing.assert_allclose(got["norm/bias"], shift, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(got["depthwise/kernel"], old["depthwise/kernel"])


def test_batch_norm_behind_relu_with_negative_factors_stays():
    # relu(-x) is not -relu(x).
    fn = lambda p, x: (jax.nn.relu(x @ p["w"]) - p["mean"][None]) * p["scale"][None] @ p["out"]
    params = {"w": normal(4, 3), "mean": normal(3), "out": normal(3, 2)}
    params["scale"] = jnp.array([-2.0, 0.0, 4.0])
    with pytest.warns(UserWarning, match=r"not folded: scale: its factor is negative, and 'max'"):
        _, new = fold_batch_norm(fn, params, [(X,)])
    jax.tree.map(np.testing.assert_array_equal, new, params)


def test_batch_norm_without_scale():
    fn = lambda p, x: (x @ p["w"] - p["mean"][None]) * lax.rsqrt(p["var"] + 1e-5)[None]
    params = {"w": normal(4, 3), "mean": normal(3), "var": jnp.abs(normal(3))}
    small_fn, new = fold_batch_norm(fn, params, [(X,)])
    assert set(new) == {"w", "mean"}
    want = np.asarray(fn(params, X))
    np.testing.assert_allclose(small_fn(new, X), want, atol=1e-5 * np.abs(want).max())
    plain = lambda p, x: x @ p["w"]
    same, new = fold_batch_norm(plain, params, [(X,)])
    assert new is params and same is plain
    with pytest.raises(ValueError, match="data is empty"):
        fold_batch_norm(plain, params, [])


def test_equalization_after_folding_reaches_the_kernels():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(8, (1, 1))(x)))
            return nn.Dense(3)(jnp.mean(x, (1, 2)))

    model, x = Net(), normal(2, 4, 4, 3)
    params = _models._filled(jax.eval_shape(model.init, jax.random.key(0), x))
    params["params"]["BatchNorm_0"]["scale"] *= jnp.exp(3 * normal(8))
    spec = {"params/.*kernel": Spec(formats.integer(8), axis=None)}
    fn, folded = fold_batch_norm(model.apply, params, [(x,)])
    new, _ = equalize(fn, folded, [(x,)], spec)
    want = np.asarray(model.apply(params, x))
    np.testing.assert_allclose(fn(new, x), want, atol=1e-5 * np.abs(want).max())
    front = np.abs(new["params"]["Conv_0"]["kernel"]).max((0, 1, 2))
    behind = np.abs(new["params"]["Dense_0"]["kernel"]).max(1)
    np.testing.assert_allclose(front, behind, rtol=1e-4)
