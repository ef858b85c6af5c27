"""Coupled dimensions and shrinking: small networks compute what masked ones do."""

import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from experiments.models.shrinkable import NETWORKS
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.graph.coupling.dependency_graph import axes
from jaxcompress.prune.channels.coupled import group_masks, masked_groups
from jaxcompress.prune.channels.smaller_networks import readmit, shrink
from jaxcompress.prune.masking.mask_state import apply_masks

pytestmark = pytest.mark.broad

# The benchmark compares all of them.
SMALL = [name for name in NETWORKS if name not in ("resnet56_a", "resnet20_b")]


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def some(found, seed=0):
    """A random half of the channels of every group that can be cut without a trace."""
    rng = np.random.default_rng(seed)
    exact = [g for g in found.groups.values() if not g.inexact]
    return {g.name: rng.permutation(g.size) < max(1, g.size // 2) for g in exact}


def error(y, z):
    return float(jnp.max(jnp.abs(y - z)) / jnp.max(jnp.abs(y)))


@functools.cache
def case(name):
    network = NETWORKS[name]()
    found = axes(network.apply, network.params, *network.inputs)
    kept = some(found)
    small = shrink(network.apply, network.params, kept, network.inputs, axes=found)
    masked = apply_masks(network.params, group_masks(found, kept))
    return network, found, masked, small


@functools.cache
def outputs(name):
    network, _, masked, small = case(name)
    masked_y = jax.jit(network.apply)(masked, *network.inputs)
    return masked_y, jax.jit(small.fn)(small.params, *network.inputs)


@pytest.mark.parametrize("name", SMALL)
def test_masked_and_shrunk_networks_agree(name):
    masked, small = outputs(name)
    assert float(jnp.max(jnp.abs(masked))) > 1e-3
    assert error(masked, small) < 1e-5
    network, found, _, (_, params, report) = case(name)
    assert not found.unknown
    assert report.params < 0.6 * report.params_before
    assert {p: x.shape for p, x in leaves_with_paths(params)} == dict(report.shapes)
    assert jax.tree.structure(params) == jax.tree.structure(network.params)


def sizes(name):
    return sorted(group.size for group in case(name)[1].groups.values())


def test_groups_of_known_networks():
    assert sizes("mlp") == [16, 24]
    assert sizes("vgg") == [8, 12, 20]
    # nine blocks inside; the streams of width 8, 16 and 32, each but the first of two new parts
    assert sizes("resnet20_a") == sorted([8] * 3 + [16] * 3 + [32] * 3 + [8, 4, 4, 8, 8])
    assert sizes("resnet20_b") == sorted([8] * 3 + [16] * 3 + [32] * 3 + [8, 16, 32])
    # depthwise: 8; 16 = 4 groups of 4, 24 = 4 groups of 6 outputs; 12 = 12 groups, 2 outputs each
    assert sizes("separable") == sorted([8, 4, 4, 6, 12, 2])
    assert sizes("densenet") == [6, 6, 6, 8]
    assert sizes("attention") == [4, 4, 4, 16]  # heads, their size for q and k, for v, the stream
    assert sizes("grouped_query") == sorted([2, 3, 4, 4, 12])
    assert sizes("transformer") == sorted([16] + 2 * [4, 4, 4, 64])
    assert sizes("scanned") == sorted([8, 2, 4, 4, 32])


def test_members_of_a_group_and_reasons_for_the_rest():
    _, found, _, _ = case("vgg")
    group = found.groups["params/Conv_1/kernel[3]"]
    assert [(m.path, m.axis, m.part) for m in group.members] == [
        ("params/Conv_1/bias", 0, ""),
        ("params/Conv_1/kernel", 3, ""),
        ("params/Dense_0/kernel", 0, ".2"),
    ]
    assert ("params/Conv_0/kernel", 2, "an input") in found.frozen
    assert ("params/Dense_1/bias", 0, "a result") in found.frozen


@pytest.mark.parametrize("name", ["nnx_cnn", "attention"])
def test_gradients_are_those_of_the_masked_network(name):
    network, _, masked, small = case(name)
    loss = lambda fn: lambda p: jnp.sum(jnp.square(fn(p, *network.inputs)))
    dense = jax.jit(jax.grad(loss(network.apply)))(masked)
    cut = shrink(network.apply, dense, small.report.kept, network.inputs).params
    new = jax.jit(jax.grad(loss(small.fn)))(small.params)
    for (path, x), y in zip(leaves_with_paths(cut), jax.tree.leaves(new), strict=True):
        atol = 1e-5 * float(jnp.abs(x).max()) + 1e-6
        np.testing.assert_allclose(y, x, rtol=1e-4, atol=atol, err_msg=path)


def test_vmap_and_export_of_a_small_network():
    network, _, _, small = case("nnx_cnn")
    x, wanted = network.inputs[0], outputs("nnx_cnn")[1]
    several = jax.jit(jax.vmap(small.fn, (None, 0)))(small.params, jnp.stack([x, x]))
    np.testing.assert_allclose(several[1], wanted, rtol=1e-5, atol=1e-6)
    flat, treedef = jax.tree.flatten(small.params)
    call = jax.jit(lambda flat, x: small.fn(treedef.unflatten(flat), x))
    exported = jax.export.export(call)(flat, x)
    np.testing.assert_allclose(exported.call(flat, x), wanted, rtol=1e-5, atol=1e-6)


def mlp(activation=jnp.tanh):
    params = {"a": normal(4, 6), "c": normal(6, seed=1), "b": normal(6, 3, seed=2)}
    return lambda p, x: activation(x @ p["a"] + p["c"][None]) @ p["b"], params, normal(5, 4, seed=3)


def test_batches_of_another_length():
    f, params, x = mlp()
    keep = np.arange(6) % 2 == 0
    fn, small, _ = shrink(f, params, {"a[1]": keep}, x)
    y = jnp.tanh(x @ params["a"][:, ::2] + params["c"][None, ::2]) @ params["b"][::2]
    for n in (5, 1, 2):
        np.testing.assert_allclose(fn(small, x[:n]), y[:n], rtol=1e-5, atol=1e-6)
    (b,) = jax.export.symbolic_shape("b")
    free = jax.ShapeDtypeStruct((b, 4), jnp.float32)
    wide = lambda p, x: f(p, jnp.concatenate([x, x], 0))  # an axis of 2 b
    both = shrink(wide, params, {"a[1]": keep}, x).fn
    for g, times in ((fn, 1), (both, 2)):
        exported = jax.export.export(jax.jit(g))(small, free)
        for n in (5, 1):
            want = np.tile(y[:n], (times, 1))
            got = exported.call(small, x[:n])
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    one = shrink(f, params, {"a[1]": keep}, x[:1])
    with pytest.raises(ValueError, match="traced was .1, 4.; axis 0 cannot have another length"):
        one.fn(small, x)
    centred = lambda p, x: f(p, x - jnp.mean(x, 0, keepdims=True))
    with pytest.raises(ValueError, match="axis 0 cannot have another length, trace again"):
        shrink(centred, params, {"a[1]": keep}, x).fn(small, x[:2])


def test_an_unknown_primitive_freezes_what_it_touches_and_is_reported():
    f, params, x = mlp(lambda h: jnp.fft.fft(h).real)
    params["head"] = normal(3, 2)
    g = lambda p, x: f(p, x) @ p["head"]
    found = axes(g, params, x)
    assert list(found.groups) == ["b[1]"] and found.unknown == ("fft",)
    assert ("a", 1, "fft has no rule") in found.frozen
    fn, small, report = shrink(g, params, {"b[1]": np.array([True, False, True])}, x)
    assert report.shapes == {"a": (4, 6), "b": (6, 2), "c": (6,), "head": (2, 2)}
    assert "without a rule, all axes frozen: fft" in str(report)
    masked = apply_masks(params, group_masks(found, report.kept))
    np.testing.assert_allclose(fn(small, x), g(masked, x), rtol=1e-4, atol=1e-5)


def test_a_softmax_over_channels_is_refused_unless_it_is_allowed():
    f, params, x = mlp(jax.nn.softmax)
    keep = {"a[1]": np.arange(6) > 1}
    with pytest.raises(ValueError, match=r"group 'a\[1\]' cannot be cut without a trace: reduce_"):
        shrink(f, params, keep, x)
    _, _, report = shrink(f, params, keep, x, allow_inexact=True)
    assert report.inexact.keys() == {"a[1]"} and "not what masks compute" in str(report)


def test_a_variance_around_the_mean_is_inexact_and_one_of_squares_is_not():
    def norm(fast):
        def of(h):
            mean = jnp.mean(h, -1, keepdims=True)
            square = jnp.mean(h * h, -1, keepdims=True) - mean * mean
            slow = jnp.mean(jnp.square(h - mean), -1, keepdims=True)
            return (h - mean) * lax.rsqrt((square if fast else slow) + 1e-3)

        return of

    for fast in (True, False):
        f, params, x = mlp(norm(fast))
        group = axes(f, params, x).groups["a[1]"]
        assert bool(group.inexact) is not fast
        assert group.summed


def test_means_divide_by_what_is_left_if_asked_to():
    module = lambda h: nn.LayerNorm(use_bias=False, use_scale=False).apply({}, h)
    f, params, x = mlp(module)
    keep = np.arange(6) % 2 == 0
    fn, small, _ = shrink(f, params, {"a[1]": keep}, x, renormalise=True)
    np.testing.assert_allclose(fn(small, x), f(small, x), rtol=1e-5, atol=1e-6)
    traced = shrink(f, params, {"a[1]": keep}, x).fn
    assert error(f(small, x), traced(small, x)) > 0.01


def agrees(f, params, x, masks):
    """Whether a mask tree alone, nothing added, gives the output of the shrunk network."""
    fn, small, report = shrink(f, params, masks, x)
    np.testing.assert_allclose(fn(small, x), f(apply_masks(params, masks), x), rtol=1e-4, atol=1e-5)
    return {name: stays.astype(int).tolist() for name, stays in report.kept.items()}


def trees(params, **masked):
    # Masks that hide the given index along the given axis of a leaf.
    masks = {name: jnp.ones((), bool) for name in params}
    for name, (axis, index) in masked.items():
        shape = [-1 if a == axis else 1 for a in range(params[name].ndim)]
        side = (np.arange(params[name].shape[axis]) != index).reshape(shape)
        masks[name] = jnp.asarray(np.broadcast_to(side, params[name].shape))
    return masks


def test_a_mask_tree_cuts_what_is_masked_where_it_is_written_or_read():
    f, params, x = mlp()
    without_bias = params | {"c": jnp.zeros(6)}
    gone = {"a[1]": [1, 1, 0, 1, 1, 1]}
    assert agrees(f, without_bias, x, trees(params, a=(1, 2))) == gone
    assert agrees(f, params, x, trees(params, b=(0, 2))) == gone
    assert agrees(f, params, x, trees(params, a=(1, 2), c=(0, 2))) == gone
    # the bias of a channel goes with it
    report = shrink(f, params, trees(params, a=(1, 2)), x).report
    assert report.kept["a[1]"].sum() == 5 and report.followed == ("c",)
    # what is masked in part stays
    part = trees(params)
    part["a"] = jnp.ones((4, 6), bool).at[1:, 2].set(False)
    assert agrees(f, params, x, part) == {"a[1]": [1] * 6}


def test_a_mask_tree_does_not_cut_what_a_sigmoid_revives():
    f, params, x = mlp(jax.nn.sigmoid)
    assert agrees(f, params, x, trees(params, a=(1, 2))) == {"a[1]": [1] * 6}
    report = shrink(f, params, trees(params, a=(1, 2)), x).report
    assert report.held["a[1]"] == "masked in a: dot_general over values that a mask leaves"
    assert "a[1]: some stay, masked in a" in str(report)
    assert agrees(f, params, x, trees(params, b=(0, 2))) == {"a[1]": [1, 1, 0, 1, 1, 1]}


def test_a_mask_tree_cuts_a_residual_stream_only_where_all_that_write_it_are_masked():
    def f(p, x):
        h = x @ p["stem"]
        return (h + jax.nn.relu(h @ p["up"]) @ p["down"] * p["scale"][None]) @ p["head"]

    params = {"stem": normal(4, 5), "up": normal(5, 6, seed=1), "down": normal(6, 5, seed=2)}
    params |= {"head": normal(5, 2, seed=3), "scale": normal(5, seed=4)}
    x = normal(3, 4, seed=5)
    whole = {"down[1]": [1] * 5, "up[1]": [1] * 6}
    gone = whole | {"down[1]": [1, 0, 1, 1, 1]}
    assert agrees(f, params, x, trees(params, stem=(1, 1))) == whole
    assert agrees(f, params, x, trees(params, down=(1, 1))) == whole
    assert agrees(f, params, x, trees(params, scale=(0, 1))) == whole
    assert agrees(f, params, x, trees(params, stem=(1, 1), down=(1, 1))) == gone
    assert agrees(f, params, x, trees(params, stem=(1, 1), scale=(0, 1))) == gone
    assert agrees(f, params, x, trees(params, up=(0, 1), head=(0, 1))) == gone


def test_masks_of_groups_and_groups_of_masks_are_inverse():
    for name in ("separable", "fused_qkv", "scanned", "densenet"):
        network, found, _, small = case(name)
        kept = masked_groups(found, group_masks(found, small.report.kept))
        for group, stays in small.report.kept.items():
            np.testing.assert_array_equal(kept[group], stays, err_msg=f"{name} {group}")


def test_numbers_of_channels_are_rounded_up():
    f, params, x = mlp()
    settings: dict[str, Any]
    keep = np.array([False, False, False, True, False, True])
    for settings, wanted in (
        ({}, [0, 0, 0, 1, 0, 1]),
        ({"round_to": 3}, [1, 0, 0, 1, 0, 1]),
        ({"round_to": 4}, [1, 1, 0, 1, 0, 1]),
        ({"round_to": 5}, [1, 1, 1, 1, 0, 1]),
        ({"round_to": 100}, [1] * 6),
        ({"min_keep": 4}, [1, 1, 0, 1, 0, 1]),
    ):
        report = shrink(f, params, {"a[1]": keep}, x, **settings).report
        assert report.kept["a[1]"].astype(int).tolist() == wanted
    nothing = shrink(f, params, {"a[1]": np.zeros(6, bool)}, x).report
    assert nothing.shapes == {"a": (4, 1), "b": (1, 3), "c": (1,)}
    for name in ("round_to", "min_keep"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            readmit(keep, **{name: 0})


def test_a_report_reads_well():
    f, params, x = mlp()
    report = shrink(f, params, {"a[1]": np.arange(6) < 2}, x).report
    assert str(report) == "48 parameters -> 16\n  a[1]: 6 -> 2"
    assert report.changed == {"a": ((4, 6), (4, 2)), "b": ((6, 3), (2, 3)), "c": ((6,), (2,))}


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"a": np.ones(6, bool)}, r"there is no group 'a'; nearest: 'a\[1\]'"),
        ({"a[1]": np.ones(5, bool)}, r"group 'a\[1\]' needs bool \[6\], got bool \[5\]"),
        ({"a[1]": np.ones(6)}, r"needs bool \[6\], got float64 \[6\]"),
        ((1, 2), "masks must have the params' structure, or be a dict"),
        (
            {"a": np.ones((4, 5), bool), "b": np.True_, "c": np.True_},
            r"masks: 'a' needs bool \[4, 6\] or a 0-d True, got bool \[4, 5\]",
        ),
    ],
)
def test_masks_that_do_not_fit(masks, message):
    f, params, x = mlp()
    with pytest.raises(ValueError, match=message):
        shrink(f, params, masks, x)


def test_parameters_that_do_not_fit():
    f, params, x = mlp()
    found = axes(f, params, x)
    other = params | {"a": normal(4, 7)}
    with pytest.raises(ValueError, match=r"'a' has shape \(4, 7\), the network was traced with"):
        shrink(f, other, {}, x, axes=found)
    fn, small, _ = shrink(f, params, {"a[1]": np.arange(6) < 2}, x)
    with pytest.raises(ValueError, match=r"params: 'a' must have the shape \(4, 2\), got \(4, 6\)"):
        fn(params, x)
    with pytest.raises(ValueError, match="the small network takes the leaves"):
        fn({"a": small["a"]}, x)
    with pytest.raises(ValueError, match="inputs: the structure must be"):
        fn(small, x, x)
    with pytest.raises(ValueError, match="must have 2 axes"):
        fn(small, x[0])
    with pytest.raises(ValueError, match="masks: the leaves must be those of the params"):
        masked_groups(found, {"a": np.True_})


def check(f, params, x, groups):
    """Groups as they should be, and masked and shrunk outputs and gradients alike."""
    found = axes(f, params, x)
    assert {g.name: g.size for g in found.groups.values()} == groups
    kept = some(found)
    fn, small, _ = shrink(f, params, kept, x, axes=found)
    masked = apply_masks(params, group_masks(found, kept))
    assert error(jax.jit(f)(masked, x), jax.jit(fn)(small, x)) < 1e-5
    assert any(
        a.shape != b.shape for a, b in zip(*map(jax.tree.leaves, (params, small)), strict=True)
    )
    return found, fn, small


def test_tied_weights_are_one_group():
    params = {"words": normal(7, 6), "w": normal(6, 6, seed=1)}
    f = lambda p, x: jnp.tanh(p["words"][x] @ p["w"] + p["words"][x]) @ p["words"].T
    found, _, _ = check(f, params, jnp.array([1, 0, 6]), {"w[1]": 6})
    members = [(m.path, m.axis) for m in found.groups["w[1]"].members]
    assert members == [("w", 0), ("w", 1), ("words", 1)]


def test_scan_carries_tie_and_layers_stay():
    def f(p, x):
        h, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x @ p["in"], p["layers"])
        return h @ p["out"]

    params = {"in": normal(4, 6), "layers": normal(3, 6, 6, seed=1), "out": normal(6, 2, seed=2)}
    found, _, _ = check(f, params, normal(5, 4), {"in[1]": 6})
    assert found.layers["layers[0]"].inexact == "a layer of zeros changes what it passes on"
    with pytest.raises(ValueError, match="group 'layers.0.' cannot be cut without a trace"):
        shrink(f, params, {"layers[0]": np.arange(3) > 0}, normal(5, 4))


def test_layers_of_a_scan_over_residual_blocks_can_go():
    network, found, _, _ = case("scanned")
    (layers,) = found.layers.values()
    assert layers.size == 3 and not layers.inexact
    kept = {layers.name: np.array([True, False, True]), **some(found)}
    fn, small, report = shrink(network.apply, network.params, kept, network.inputs, axes=found)
    assert report.shapes["params/blocks/mlp/up/kernel"] == (2, 4, 16)
    masks = group_masks(found, kept)
    masked = network.apply(apply_masks(network.params, masks), *network.inputs)
    assert error(masked, fn(small, *network.inputs)) < 1e-5
    assert masked_groups(found, masks)[layers.name].tolist() == [True, False, True]


def test_while_and_cond_tie_what_they_carry():
    def f(p, x):
        h = x @ p["in"]
        h = lax.fori_loop(0, lax.convert_element_type(x[0, 0], jnp.int32), lambda _, h: h * 2, h)
        h = lax.while_loop(lambda h: jnp.sum(h) < 0, lambda h: h + p["bias"][None] ** 2, h)
        return lax.cond(x[0, 0] > 0, lambda h: h @ p["one"], lambda h: jnp.sin(h) @ p["two"], h)

    params = {"in": normal(4, 6), "bias": normal(6), "one": normal(6, 2), "two": normal(6, 2)}
    found, fn, small = check(f, params, jnp.abs(normal(5, 4)) + 1, {"in[1]": 6})
    assert fn(small, -jnp.abs(normal(5, 4))).shape == (5, 2)


def test_derivative_rules_and_remat_stay_in_force():
    @jax.custom_vjp
    def step(x):
        return jnp.sign(x)

    step.defvjp(lambda x: (jnp.sign(x), x), lambda x, g: (jnp.where(jnp.abs(x) < 1, g, 0),))

    @jax.checkpoint
    def f(p, x):
        return (step(x @ p["a"]) + jax.nn.relu(x @ p["zero"])) @ p["b"]

    params = {"a": normal(4, 6), "b": normal(6, 2, seed=1), "zero": jnp.zeros((4, 6))}
    _, fn, small = check(f, params, normal(3, 4), {"a[1]": 6})
    grads = jax.grad(lambda p: jnp.sum(fn(p, normal(3, 4))))(small)
    # relu has the derivative 0 at 0, which max(x, 0) has not; sign has none at all
    assert not jnp.any(grads["zero"]) and jnp.any(grads["a"])


def test_zeros_at_one_of_two_indices_are_no_zeros():
    # h_i + h_j is not zero where one of them is masked, h_i h_j is
    def pairs(op):
        def f(p, x):
            h = x @ p["a"]
            return jnp.exp(op(h[:, :, None], h[:, None, :])).sum(2) @ p["b"]

        def g(p, x):
            h = x @ p["a"]
            return op(h[:, :, None], h[:, None, :]).sum(2) @ p["b"]

        params = {"a": normal(4, 6), "b": normal(6, 2, seed=1)}
        return [axes(k, params, normal(3, 4)).groups["a[1]"].inexact for k in (f, g)]

    assert all(pairs(jnp.add))
    exponential, plain = pairs(jnp.multiply)
    assert exponential and not plain


def test_a_concatenated_zero_does_not_hide_what_is_beside_it():
    def f(p, x):
        h = jax.nn.sigmoid(x @ p["a"])
        return jnp.sum(jnp.concatenate([jnp.zeros((3, 6)), h], axis=0), 1)

    assert axes(f, {"a": normal(4, 6)}, normal(3, 4)).groups["a[1]"].inexact


def test_constants_of_the_program_are_cut_too():
    scale = normal(6, seed=7)
    f = lambda p, x: (jnp.tanh(x @ p["a"]) * scale[None]) @ p["b"]
    check(f, {"a": normal(4, 6), "b": normal(6, 2, seed=1)}, normal(3, 4), {"a[1]": 6})


def test_odd_leaves():
    f = lambda p, x: (
        (x @ p["a"] + p["none"].sum() + p["scalar"]) @ p["b"] * p["count"].astype(x.dtype)
    )
    params = {"a": normal(4, 6).astype(jnp.bfloat16), "b": normal(6, 2).astype(jnp.bfloat16)}
    params |= {"none": jnp.zeros((0, 3), jnp.bfloat16), "scalar": jnp.bfloat16(0.5)}
    params |= {"count": jnp.int32(2)}
    x = normal(3, 4).astype(jnp.bfloat16)
    _, small, report = shrink(f, params, {"a[1]": np.arange(6) < 3}, x)
    assert small["a"].dtype == jnp.bfloat16 and report.shapes["none"] == (0, 3)
    assert small["count"] == 2 and report.params == 4 * 3 + 3 * 2 + 2


def test_an_integer_that_is_added_makes_a_group_inexact():
    f = lambda p, x: (x @ p["a"] + p["n"].astype(jnp.float32)[None] + 0.0) ** 2 @ p["b"]
    params = {"a": normal(4, 3), "b": normal(3, 2), "n": jnp.arange(3)}
    assert axes(f, params, normal(2, 4)).groups["a[1]"].inexact == ""  # b is masked too
    g = lambda p, x: jnp.sum(f(p, x) @ p["b"].T, 1)
    assert axes(g, params, normal(2, 4)).groups["a[1]"].inexact == ""
    h = lambda p, x: jnp.sum(x @ p["a"] + p["n"].astype(jnp.float32)[None], 1)
    assert "reduce_sum over values" in axes(h, params, normal(2, 4)).groups["a[1]"].inexact


# Small graphs: a list of steps on a value [B, n]; weights are made as they are needed.
STEPS = st.lists(
    st.sampled_from(
        "dense4 dense6 act gelu residual glu concat pad slice heads rms roll square softmax".split()
    ),
    min_size=3,
    max_size=9,
)


def interpret(steps, params, x):
    """The network of the steps; `params` is a dict to fill, or is read if it is full."""
    filling = not params
    seen = [x]

    def weight(*shape):
        name = f"w{len(used):02d}"
        used.append(name)
        if filling:
            params[name] = normal(*shape, seed=len(used)) / shape[0] ** 0.5
        return params[name]

    used = []
    h = x
    for step in steps:
        n = h.shape[1]
        if step.startswith("dense"):
            h = h @ weight(n, int(step[5:])) + weight(1, int(step[5:]))
        elif step in ("act", "gelu", "softmax"):
            h = {"act": jnp.tanh, "gelu": jax.nn.gelu, "softmax": jax.nn.softmax}[step](h)
        elif step == "residual":
            h = h + jax.nn.sigmoid(h @ weight(n, 5)) @ weight(5, n)
        elif step == "glu":
            a, b = jnp.split(h @ weight(n, 12), 2, axis=1)
            h = a * jax.nn.sigmoid(b)
        elif step == "concat":
            h = jnp.concatenate([h, seen[-1]], axis=1)
        elif step == "pad":
            h = jnp.pad(h, ((0, 0), (1, 2)))
        elif step == "slice":
            h = h[:, 1:] if n > 2 else h
        elif step == "heads":
            q = (h @ weight(n, 12)).reshape(-1, 3, 4)
            h = jnp.einsum("bhd,bgd->bhg", q, q).reshape(-1, 9)
        elif step == "rms":
            h = h * lax.rsqrt(jnp.mean(h * h, 1, keepdims=True) + 1e-2)
        elif step == "roll":
            h = jnp.roll(h, 1, axis=1)
        else:
            h = (h * weight(1, n)) ** 2
        seen.append(h)
    return h @ weight(h.shape[1], 3)


@hypothesis.settings(max_examples=8, deadline=None, derandomize=True, database=None)
@hypothesis.given(STEPS, st.integers(0, 3))
def test_small_graphs_agree(steps, seed):
    params, x = {}, normal(2, 4, seed=9)
    interpret(steps, params, x)
    f = lambda p, x: interpret(steps, p, x)
    found = axes(f, params, x)
    kept = some(found, seed)
    fn, small, _ = shrink(f, params, kept, x, axes=found)
    masked = apply_masks(params, group_masks(found, kept))
    wanted = f(masked, x)
    scale = float(jnp.max(jnp.abs(f(params, x)))) + 1e-3
    np.testing.assert_allclose(fn(small, x), wanted, rtol=1e-5, atol=1e-5 * scale)
