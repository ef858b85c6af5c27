"""Scales that move between layers: what is found, what is refused, and that the function stays."""

import _models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.formats import integer
from jaxcompress.graph.layers.matrices import layers
from jaxcompress.graph.scaling.migration import absorbable, channels_of, ranges, rescale
from jaxcompress.quantize import Spec, fold_batch_norm, ptq

pytestmark = pytest.mark.broad


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape), jnp.float32)


def rescaled(params, groups, draw):
    rng = np.random.default_rng(0)
    for group in groups:
        t = jnp.asarray(draw(rng, group.channels), jnp.float32)
        params = rescale(params, group, t)
    return params


def check(fn, params, *inputs):
    """The groups; powers of two leave the function as it is bit for bit, other scales nearly."""
    found = absorbable(fn, params, *inputs)
    run = jax.jit(fn)
    want = run(params, *inputs)
    exact = rescaled(params, found.groups, lambda rng, n: 2.0 ** rng.integers(-3, 4, n))
    jax.tree.map(np.testing.assert_array_equal, run(exact, *inputs), want)
    near = rescaled(params, found.groups, lambda rng, n: rng.uniform(0.1, 10, n))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.max(np.abs(b))),
        run(near, *inputs),
        want,
    )
    changed = {
        path
        for (path, a), (_, b) in zip(
            leaves_with_paths(exact), leaves_with_paths(params), strict=True
        )
        if not np.array_equal(a, b)
    }
    moved = {e.path for g in found.groups for e in (*g.producers, *g.consumers)}
    assert changed == moved
    return found


def paths(parts):
    return {elements.path for elements in parts}


def summary(found):
    return [(g.name, g.channels, paths(g.producers), paths(g.consumers)) for g in found.groups]


def test_mlp_with_relus_and_biases():
    def fn(p, x):
        h = jax.nn.relu(x @ p["a"] + p["a_bias"][None])
        h = jax.nn.leaky_relu(h @ p["b"])
        return jnp.abs(h) @ p["c"]

    params = {"a": normal(4, 8), "a_bias": normal(8), "b": normal(8, 6), "c": normal(6, 3)}
    found = check(fn, params, normal(5, 4))
    assert summary(found) == [
        ("a -> b", 8, {"a", "a_bias"}, {"b"}),
        ("b -> c", 6, {"b"}, {"c"}),
    ]
    assert found.refused == {"a": "an input or constant of the function is part of it"}
    assert [e.weight for e in found.groups[0].producers] == [True, False]
    assert found.groups[0].through == ("add", "max")


def test_scales_by_hand():
    # y = relu(x a) b with t = (2, 4): a * t by columns, b / t by rows.
    fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    params = {"a": jnp.ones((3, 2)), "b": jnp.ones((2, 3))}
    (group,) = absorbable(fn, params, jnp.ones((1, 3))).groups
    new = rescale(params, group, jnp.array([2.0, 4.0]))
    np.testing.assert_array_equal(new["a"], np.broadcast_to([2.0, 4.0], (3, 2)))
    np.testing.assert_array_equal(new["b"], np.broadcast_to([[0.5], [0.25]], (2, 3)))
    np.testing.assert_array_equal(ranges(new, group.producers, 2), [2.0, 4.0])
    np.testing.assert_array_equal(ranges(new, group.consumers, 2), [0.5, 0.25])
    (first, second) = layers(fn, params, jnp.ones((1, 3))).layers
    np.testing.assert_array_equal(channels_of(group, second), [[[0, 1]]])
    with pytest.raises(ValueError, match="'a' is no consumer of 'a -> b'"):
        channels_of(group, first)
    with pytest.raises(ValueError, match=r"t must have one scale for each of the 2 channels"):
        rescale(params, group, jnp.ones(3))
    with pytest.raises(ValueError, match="params: no leaf 'b'"):
        rescale({"a": params["a"]}, group, jnp.ones(2))


def test_rescale_is_jitted_and_differentiable():
    fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    params, x = {"a": normal(3, 4), "b": normal(4, 2)}, normal(5, 3)
    (group,) = absorbable(fn, params, x).groups
    loss = jax.jit(jax.grad(lambda t: jnp.sum(fn(rescale(params, group, t), x) ** 2)))
    np.testing.assert_allclose(loss(jnp.full(4, 1.5)), 0, atol=1e-4)
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    assert rescale(half, group, jnp.ones(4))["a"].dtype == jnp.bfloat16


def test_shapes_are_enough():
    fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    shapes = {"a": jax.ShapeDtypeStruct((3, 4), jnp.float32)}
    shapes["b"] = jax.ShapeDtypeStruct((4, 2), jnp.float32)
    x = jax.ShapeDtypeStruct((5, 3), jnp.float32)
    assert absorbable(fn, shapes, x).groups[0].channels == 4


class Cnn(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.relu(nn.Conv(8, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.relu(nn.Conv(16, (3, 3), feature_group_count=8)(x))  # depthwise, two per channel
        x = nn.relu(nn.Conv(12, (1, 1))(x))
        x = lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4.0
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        x = nn.relu(nn.Conv(12, (3, 3), feature_group_count=4, padding="VALID")(x))
        return nn.Dense(3)(x.reshape(len(x), -1))


def test_convolutions_depthwise_grouped_pooled_flattened():
    model, x = Cnn(), normal(2, 8, 8, 3)
    params = _models._filled(jax.eval_shape(model.init, jax.random.key(0), x))
    found = check(model.apply, params, x)
    assert [(g.producer, g.layers, g.channels) for g in found.groups] == [
        ("params/Conv_0/kernel", ("params/Conv_1/kernel",), 8),
        ("params/Conv_1/kernel", ("params/Conv_2/kernel",), 16),
        ("params/Conv_2/kernel", ("params/Conv_3/kernel",), 12),
        ("params/Conv_3/kernel", ("params/Dense_0/kernel",), 12),
    ]


def test_linen_nnx_equinox():
    mlp = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(8), nn.relu, nn.Dense(2)])
    x = normal(3, 4)
    params = _models._filled(jax.eval_shape(mlp.init, jax.random.key(0), x))
    found = check(mlp.apply, params, x)
    assert [g.channels for g in found.groups] == [8, 8]
    model = _models.equinox_mlp()
    found = check(model.apply, model.params, model.x)
    assert [g.name for g in found.groups] == [
        "layers/0/weight -> layers/1/weight",
        "layers/1/weight -> layers/2/weight",
    ]
    model = _models.nnx_cnn()  # gelu between the first two
    found = check(model.apply, model.params, model.x)
    assert [g.name for g in found.groups] == ["depthwise/kernel -> head/kernel"]
    assert "'integer_pow'" in found.refused["depthwise/kernel"]


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(2)(y, y)
        y = nn.LayerNorm()(x)
        return x + nn.Dense(8)(nn.relu(nn.Dense(16)(y)))


def test_transformer_block_of_linen():
    model, x = Block(), normal(2, 3, 8)
    params = _models._filled(jax.eval_shape(model.init, jax.random.key(0), x))
    found = check(model.apply, params, x)
    attention = "params/MultiHeadDotProductAttention_0"
    got = {g.producer: set(g.layers) for g in found.groups}
    assert got == {
        "params/LayerNorm_0/scale": {f"{attention}/{n}/kernel" for n in ("query", "key", "value")},
        f"{attention}/value/kernel": {f"{attention}/out/kernel"},
        "params/LayerNorm_1/scale": {"params/Dense_1/kernel"},
        "params/Dense_1/kernel": {"params/Dense_0/kernel"},
    }
    assert paths(found.groups[0].producers) == {
        "params/LayerNorm_0/scale",
        "params/LayerNorm_0/bias",
    }


def test_scan_over_stacked_layers_has_scales_per_layer():
    model = _models.transformer(layers=3, d=8)
    found = check(model.apply, model.params, model.x)
    assert [(g.producer, g.channels) for g in found.groups] == [
        ("layers/norm1/scale", 24),
        ("layers/value", 24),
        ("layers/norm2/scale", 24),
    ]
    assert set(found.refused) == {"layers/down"}


def rms_norm(x, scale):
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def test_gate_leaves_the_linear_factor():
    def fn(p, x):
        h = rms_norm(x, p["norm"][None])
        return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]

    params = {"norm": normal(4), "gate": normal(4, 8), "up": normal(4, 8), "down": normal(8, 4)}
    assert summary(check(fn, params, normal(5, 4))) == [
        ("norm -> gate, up", 4, {"norm"}, {"gate", "up"}),
        ("up -> down", 8, {"up"}, {"down"}),
    ]


@pytest.mark.parametrize("repeat", [True, False])
def test_grouped_query_attention_shares_scales_of_values(repeat):
    def fn(p, x):
        b, t, _ = x.shape
        q, k, v = jnp.split(rms_norm(x, p["norm"][None, None]) @ p["qkv"], [8, 12], -1)
        q, k, v = q.reshape(b, t, 2, 2, 2), k.reshape(b, t, 2, 2), v.reshape(b, t, 2, 2)
        if repeat:
            q = q.reshape(b, t, 4, 2)
            k, v = (jnp.repeat(a, 2, 2) for a in (k, v))
            weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
            mixed = jnp.einsum("bhts,bshd->bthd", weights, v)
        else:
            weights = jax.nn.softmax(jnp.einsum("btkgd,bskd->bkgts", q, k))
            mixed = jnp.einsum("bkgts,bskd->btkgd", weights, v)
        return x + mixed.reshape(b, t, 8) @ p["out"]

    params = {"norm": normal(4), "qkv": normal(4, 16), "out": normal(8, 4)}
    found = check(fn, params, normal(2, 3, 4))
    assert [(g.name, g.channels) for g in found.groups] == [("norm -> qkv", 4), ("qkv -> out", 4)]
    # Only the columns of the values are scaled, and heads of one group together.
    (weight,) = found.groups[1].producers
    np.testing.assert_array_equal(weight.channel[0], [-1] * 12 + [0, 1, 2, 3])
    (out,) = found.groups[1].consumers
    np.testing.assert_array_equal(out.channel[:, 0], [0, 1, 0, 1, 2, 3, 2, 3])


def test_residual_branches_are_scaled_together():
    def fn(p, x):
        x = jax.nn.relu(x @ p["stem"])
        x = x + jax.nn.relu(x @ p["up"]) @ p["down"]
        return x @ p["head"]

    params = {"stem": normal(3, 4), "up": normal(4, 8), "down": normal(8, 4), "head": normal(4, 2)}
    assert summary(check(fn, params, normal(5, 3))) == [
        ("stem + down -> up, head", 4, {"stem", "down"}, {"up", "head"}),
        ("up -> down", 8, {"up"}, {"down"}),
    ]


def test_resnet20_with_padded_shortcuts():
    model = _models.resnet20(size=8, batch=1)
    found = check(model.apply, model.params, model.x)
    # A stream of 16, 32, 64 channels: 16 of all blocks, 16 of two stages, 32 of the last.
    streams = [g.channels for g in found.groups if "params/Dense_0/kernel" in g.layers]
    assert sorted(streams) == [16, 16, 32]
    assert len(found.groups) == 12


def test_shared_weights_and_parts():
    # Both uses of `a` scale alike.
    fn = lambda p, x: (
        jax.nn.relu(x @ p["a"]) @ p["b"] + jax.nn.relu(jnp.square(x) @ p["a"]) @ p["c"]
    )
    params = {"a": normal(4, 4), "b": normal(4, 3), "c": normal(4, 3)}
    (group,) = check(fn, params, normal(5, 4)).groups
    assert group.name == "a + a#1 -> b, c"
    # Of a joined tensor the channels that a layer makes.
    fn = lambda p, x: jnp.concatenate([x, jax.nn.relu(x @ p["a"])], -1) @ p["b"]
    params = {"a": normal(4, 3), "b": normal(7, 2)}
    (group,) = check(fn, params, normal(5, 4)).groups
    np.testing.assert_array_equal(group.consumers[0].channel[:, 0], [-1, -1, -1, -1, 0, 1, 2])
    # Sums of matrices: all of them.
    fn = lambda p, x: jax.nn.relu(x @ (p["w"] + p["down"] @ p["up"])) @ p["b"]
    params = {"w": normal(4, 8), "down": normal(4, 2), "up": normal(2, 8), "b": normal(8, 3)}
    (group,) = check(fn, params, normal(5, 4)).groups
    assert paths(group.producers) == {"w", "up"}


def between(act):
    return lambda p, x: act(x @ p["a"]) @ p["b"]


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (between(jax.nn.gelu), "'integer_pow', which does not pass a scale on"),
        (between(jax.nn.sigmoid), "it comes from 'logistic'"),
        (between(jnp.tanh), "it comes from 'tanh'"),
        (between(jax.nn.relu6), "'min' combines it with 6.0"),
        (between(lambda h: jax.nn.relu(h + 1.0)), "'add' combines it with 1.0"),
        (between(lambda h: h * h), "it comes from 'mul'"),
        (between(lambda h: jnp.where(h > 0.5, h, 0.0)), "'gt' combines it with 0.5"),
        (between(lambda h: h / jnp.sum(h)), "it is a divisor"),
        (between(lambda h: h.astype(jnp.int32).astype(jnp.float32)), "it becomes int32"),
        (lambda p, x: (x + jax.nn.relu(x @ p["a"])) @ p["b"], "an input or constant"),
        (lambda p, x: [h := jax.nn.relu(x @ p["a"]), h @ p["b"]], "it is a result"),
        (
            lambda p, x: lax.cond(x[0, 0] > 0, jnp.abs, jnp.tanh, x @ p["a"]) @ p["b"],
            "the function has a conditional",
        ),
        (
            lambda p, x: lax.fori_loop(0, 3, lambda i, h: jax.nn.relu(h), x @ p["a"]) @ p["b"],
            "a loop carries it",
        ),
    ],
)
def test_refused(fn, reason):
    found = check(fn, {"a": normal(4, 4), "b": normal(4, 3)}, normal(5, 4))
    assert not found.groups
    assert reason in found.refused["b"]


def test_weights_used_as_both_ends_are_refused():
    fn = lambda p, x: jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["a"]) @ p["b"]
    found = check(fn, {"a": normal(4, 4), "b": normal(4, 3)}, normal(5, 4))
    assert not found.groups and set(found.refused) == {"a", "a#1", "b"}


def test_split_over_devices_is_refused():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("d")
    inside = jax.shard_map(jax.nn.relu, mesh=mesh, in_specs=spec, out_specs=spec)
    fn = lambda p, x: inside(x @ p["a"]) @ p["b"]
    found = absorbable(fn, {"a": normal(4, 3), "b": normal(3, 2)}, normal(8, 4))
    assert not found.groups and "it is split over devices" in found.refused["b"]


def test_token_mixing_carries_channels():
    def fn(p, x):
        h = jax.nn.relu(jnp.einsum("btc,ts->bsc", jax.nn.relu(x @ p["a"]), p["mix"]))
        h = h - jnp.mean(h, 1, keepdims=True)
        return jnp.flip(jnp.cumsum(h, 1), -1) @ p["b"]

    params = {"a": normal(4, 8), "mix": normal(3, 5), "b": normal(8, 3)}
    for batch in (1, 2):
        found = check(fn, params, normal(batch, 3, 4))
        assert summary(found) == [("a -> b", 8, {"a"}, {"b"})]
        assert "mix" in found.refused


def test_embeddings_and_positions_that_are_inputs():
    def fn(p, tokens, at):
        h = jax.nn.relu(p["embed"][tokens] + p["position"][None])
        return lax.dynamic_slice_in_dim(h, at, 2, axis=1) @ p["out"]

    params = {"embed": normal(7, 4), "position": normal(3, 4), "out": normal(4, 2)}
    found = check(fn, params, jnp.array([[1, 2, 6], [0, 3, 3]]), 1)
    assert summary(found) == [("embed -> out", 4, {"embed", "position"}, {"out"})]


def test_empty_arrays_end():
    fn = lambda p, x: jax.nn.relu(x @ p["a"]).reshape(0, 2, 4) @ p["b"]
    found = absorbable(fn, {"a": normal(4, 8), "b": normal(4, 3)}, jnp.zeros((0, 4)))
    assert not found.groups


def test_normalizations_of_hand_written_code():
    # y = conv s + shift, with s and shift computed from the statistics.
    def fn(p, x):
        scale = p["scale"] * lax.rsqrt(p["var"] + 1e-3)
        shift = p["bias"] - p["mean"] * scale
        return jax.nn.relu(x @ p["w"] * scale[None] + shift[None]) @ p["out"]

    params = {name: jnp.abs(normal(6, seed=k)) + 0.5 for k, name in enumerate(("scale", "var"))}
    params |= {"bias": normal(6), "mean": normal(6), "w": normal(4, 6), "out": normal(6, 2)}
    x = normal(5, 4)
    folded, small = fold_batch_norm(fn, params, [(x,)])
    p = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    scale = p["scale"] / np.sqrt(p["var"] + 1e-3)
    hidden = np.maximum((np.asarray(x, np.float64) @ p["w"] - p["mean"]) * scale + p["bias"], 0)
    np.testing.assert_allclose(folded(small, x), hidden @ p["out"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(small["w"], p["w"] * scale, rtol=1e-6)
    assert sorted(small) == ["bias", "out", "w"]
    np.testing.assert_allclose(small["bias"], p["bias"] - p["mean"] * scale, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "same",
    [lax.stop_gradient, lambda w: jax.device_put(w, jax.devices()[0]), lax.optimization_barrier],
    ids=["stop_gradient", "device_put", "barrier"],
)
def test_a_weight_behind_an_identity_is_the_leaf(same):
    params = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 2))}

    def network(through):
        return lambda p, x: jax.nn.relu(x @ through(p["up"])) @ through(p["down"])

    x = jnp.ones((3, 4))
    plain, behind = (absorbable(network(f), params, x).groups for f in (lambda w: w, same))
    assert len(plain) == len(behind) == 1
    for a, b in ((plain[0].producers, behind[0].producers),
                 (plain[0].consumers, behind[0].consumers)):  # fmt: skip
        assert [e.path for e in a] == [e.path for e in b]
        assert all(np.array_equal(c.channel, d.channel) for c, d in zip(a, b, strict=True))
    found = [layers(network(f), params, x) for f in (lambda w: w, same)]
    assert not found[1].refused
    for a, b in zip(found[0].layers, found[1].layers, strict=True):
        assert a.path == b.path
        assert np.array_equal(a.index, b.index)


def test_pieces_of_a_split_leaf_are_views():
    found = layers(
        lambda p, x: sum(x @ w for w in jnp.split(p, 2, 1)), jnp.ones((4, 8)), jnp.ones((3, 4))
    )
    assert not found.refused
    assert [layer.index[0, 0, 0].tolist() for layer in found.layers] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_data_driven_methods_take_a_weight_behind_an_identity():
    # it used to be only rounded to nearest, as no layer
    params = {
        "up": jax.random.normal(jax.random.key(0), (6, 8)),
        "down": jax.random.normal(jax.random.key(1), (8, 5)),
    }
    x = jax.random.normal(jax.random.key(2), (64, 6))
    spec = {".*": Spec(integer(3))}
    for method in (ptq.gptq, ptq.awq, ptq.adaround, ptq.equalize):
        views = []
        for same in (lambda w: w, lax.stop_gradient, lambda w: jnp.stack(jnp.unstack(w))):
            fn = lambda p, x, same=same: jax.nn.relu(x @ same(p["up"])) @ same(p["down"])
            new, state = method(fn, params, [(x,)], spec)
            views.append(ptq.recipe(spec).apply(new, state))
        for view in views[1:]:
            for a, b in zip(jax.tree.leaves(views[0]), jax.tree.leaves(view), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
