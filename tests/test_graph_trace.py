"""graph.trace: names, provenance, MACs, loops, what cannot be entered; the JAX internals used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _models import equinox_mlp, nnx_cnn, resnet20, transformer
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import AxisType, PartitionSpec

from jaxcompress.graph import compat, trace


def names(fn, *args):
    return [site.name for site in trace(fn, *args).sites]


def shape(*dims):
    return jax.ShapeDtypeStruct(dims, jnp.float32)


def conv(x, w, **options):
    options = {"window_strides": (1, 1), "padding": "SAME"} | options
    return lax.conv_general_dilated(x, w, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)


def test_a_dense_layer_by_hand():
    graph = trace(
        lambda p, x: x @ p["w"] + p["b"][None], {"w": shape(4, 5), "b": shape(5)}, shape(3, 4)
    )
    (site,), (tap,) = graph.sites, graph.taps
    assert (site.name, site.primitive, site.params, site.weight) == ("w", "dot_general", ("w",), 1)
    assert (site.calls, site.macs, site.valid_macs, site.loops) == (1, 60, 60, ())
    assert site.operands == (shape(3, 4), shape(4, 5)) and site.out == shape(3, 5)
    assert site.config["dimension_numbers"] == (((1,), (0,)), ((), ()))
    assert (tap.site, tap.operand, tap.name, tap.aval) == (site, 0, "w", shape(3, 4))
    assert graph.out == shape(3, 5) and graph.params == {"w": shape(4, 5), "b": shape(5)}
    assert graph.unused == ("b",) and hash(tap) == hash(graph.taps[0])


def test_resnet20_has_the_published_macs():
    model = resnet20(batch=1)
    graph = trace(model.apply, model.params, model.x)
    stem = 32**2 * 9 * 3 * 16
    stage1 = 6 * 32**2 * 9 * 16 * 16
    stage2 = 16**2 * 9 * 16 * 32 + 5 * 16**2 * 9 * 32 * 32
    stage3 = 8**2 * 9 * 32 * 64 + 5 * 8**2 * 9 * 64 * 64
    assert graph.macs == stem + stage1 + stage2 + stage3 + 64 * 10 == 40_551_040
    expected = [f"params/Conv_{i}/kernel" for i in range(19)] + ["params/Dense_0/kernel"]
    assert [site.name for site in graph.sites] == [tap.name for tap in graph.taps] == expected
    assert not graph.folds and not graph.unentered and not graph.unknown_trips


@pytest.mark.parametrize(
    ("kernel", "options", "dense_flops", "valid_flops"),
    [
        ((3, 3, 8, 16), {}, 589_824, 541_696),
        ((3, 3, 8, 16), {"rhs_dilation": (2, 2)}, 589_824, 495_616),
        ((3, 3, 8, 16), {"lhs_dilation": (2, 2), "padding": ((1, 1),) * 2}, 2_214_144, 541_696),
        ((3, 3, 2, 16), {"feature_group_count": 4}, 147_456, 135_424),
        ((3, 3, 1, 8), {"feature_group_count": 8}, 36_864, 33_856),
        ((3, 3, 8, 16), {"window_strides": (2, 2)}, 147_456, 135_424),
    ],
)
def test_convolutions_of_the_published_table(kernel, options, dense_flops, valid_flops):
    graph = trace(lambda w, x: conv(x, w, **options), shape(*kernel), shape(1, 16, 16, 8))
    assert (2 * graph.sites[0].macs, 2 * graph.sites[0].valid_macs) == (dense_flops, valid_flops)


@pytest.mark.parametrize(
    ("x", "kernel", "options"),
    [
        ((2, 7, 9, 4), (3, 5, 4, 6), {"padding": ((2, 0), (1, 3)), "window_strides": (2, 1)}),
        (
            (1, 6, 5, 4),
            (2, 3, 2, 6),
            {"lhs_dilation": (3, 1), "padding": ((1, 0),) * 2} | {"feature_group_count": 2},
        ),
        ((4, 6, 6, 3), (3, 3, 3, 4), {"batch_group_count": 2, "rhs_dilation": (2, 1)}),
        ((1, 5, 5, 2), (7, 7, 2, 3), {"padding": ((-1, 4), (3, -2)), "rhs_dilation": (1, 2)}),
    ],
)
def test_valid_macs_are_the_sum_of_a_convolution_of_ones(x, kernel, options):
    def fn(w, x):
        return conv(x, w, **options)

    (site,) = trace(fn, shape(*kernel), shape(*x)).sites
    # Every valid tap adds 1 * 1 to the outputs.
    assert site.valid_macs == int(fn(jnp.ones(kernel), jnp.ones(x)).sum())
    assert site.macs == np.prod(site.out.shape) * np.prod(kernel[:3])


def test_the_gradient_of_a_depthwise_convolution_counts_batch_groups():
    def grad(w, x):
        return jax.grad(lambda w: conv(x, w, feature_group_count=8).sum())(w)

    sites = trace(grad, shape(3, 3, 1, 8), shape(1, 16, 16, 8)).sites
    backward = sites[-1]
    assert backward.config["batch_group_count"] == 8
    assert 2 * backward.valid_macs == 33_856


def test_names_in_every_framework():
    model = nnx_cnn()
    assert names(*model) == ["conv/kernel", "depthwise/kernel", "head/kernel"]
    assert names(*equinox_mlp()) == [f"layers/{i}/weight" for i in range(3)]
    assert names(*resnet20())[:2] == ["params/Conv_0/kernel", "params/Conv_1/kernel"]
    assert names(lambda p, x: x @ p[0], [shape(2, 2)], shape(2, 2)) == ["0"]
    assert names(lambda p, x: x @ p, shape(2, 2), shape(2, 2)) == ["dot_general"]


def test_a_scanned_transformer():
    model = transformer(layers=3)
    graph = trace(*model)
    by_name = {site.name: site for site in graph.sites}
    assert {site.calls for site in graph.sites} == {3} and graph.sites[0].loops == (3,)
    assert by_name["layers/query"].operands[1] == shape(8, 8)
    scores = by_name["bthd,bshd->bhts"]  # einsum's own scope: no parameter feeds it
    assert scores.params == () and scores.weight is None and scores.macs == 2 * 2 * 5 * 5 * 4
    assert [t.name for t in graph.taps if t.site is scores] == [
        f"{scores.name}/{s}" for s in ("lhs", "rhs")
    ]
    assert graph.unused == tuple(f"layers/norm{i}/{p}" for i in (1, 2) for p in ("bias", "scale"))


def test_weights_stay_recognised_through_compression():
    mask = jnp.ones((4, 6))

    def view(p, bits):
        scale = jnp.abs(p["v"]["kernel"]).max(0, keepdims=True) / (2.0**bits - 1.0)
        w = jax.jit(lambda w: jnp.round(w / scale) * scale)(p["v"]["kernel"] * mask)
        w = jnp.where(p["mask"], w, 0.0).astype(jnp.bfloat16).astype(jnp.float32)
        return lax.stop_gradient(w).T.reshape(6, 4)

    p = {"v": {"kernel": shape(4, 6)}, "mask": jax.ShapeDtypeStruct((4, 6), bool)}
    (site,) = trace(lambda p, x, bits: view(p, bits) @ x, p, shape(4, 3), shape()).sites
    assert (site.name, site.params, site.weight) == ("v/kernel", ("mask", "v/kernel"), 0)


def test_a_scale_among_the_inputs_keeps_the_weight_and_a_full_array_cuts_it():
    fn = lambda p, x, s: x @ (p["w"] * s)
    (site,) = trace(fn, {"w": shape(4, 6)}, shape(3, 4), shape(1, 6)).sites
    assert (site.name, site.weight) == ("w", 1)
    (site,) = trace(fn, {"w": shape(4, 6)}, shape(3, 4), shape(4, 6)).sites
    assert (site.name, site.weight, site.params) == ("dot_general", None, ())


def test_activations_scaled_by_parameters_are_activations():
    def fn(p, x, ids, t):
        x = x + p["table"][ids] + p["pos"]  # gathered rows depend on the input
        x = x * p["gamma"][None] @ p["w1"]
        y = (p["pos"] * t) @ p["w2"]  # the smaller input t moves this one
        return x + y

    p = {
        "table": shape(9, 4),
        "pos": shape(3, 4),
        "gamma": shape(4),
        "w1": shape(4, 4),
        "w2": shape(4, 4),
    }
    graph = trace(fn, p, shape(3, 4), jax.ShapeDtypeStruct((3,), jnp.int32), shape())
    assert [(s.name, s.weight, s.params) for s in graph.sites] == [
        ("w1", 1, ("w1",)),
        ("w2", 1, ("w2",)),
    ]
    assert graph.unused == ("gamma", "pos", "table") and not graph.folds


def test_a_low_rank_update_is_a_fold_and_feeds_the_site():
    p = {"a": shape(4, 2), "b": shape(2, 6), "w": shape(4, 6)}
    graph = trace(lambda p, x: x @ (p["w"] + p["a"] @ p["b"]), p, shape(3, 4))
    (site,), (fold,) = graph.sites, graph.folds
    assert site.name == "w" and site.params == ("a", "b", "w")
    assert fold.name == "b" and fold.macs == 4 * 2 * 6 and len(graph.taps) == 1


def test_tied_weights_are_numbered_and_dynamic_slices_followed():
    p = {"w": shape(4, 4), "experts": shape(8, 4, 4)}

    def fn(p, x, expert):
        return x @ p["w"] @ p["w"].T @ lax.dynamic_index_in_dim(p["experts"], expert, 0, False)

    index = jax.ShapeDtypeStruct((), jnp.int32)
    assert names(fn, p, shape(3, 4), index) == ["w", "w#1", "experts"]


def test_loops_branches_and_calls():
    def fn(p, x, n):
        x = lax.fori_loop(0, 4, lambda i, x: lax.map(lambda row: row @ p["a"][i], x), x)
        x = lax.fori_loop(0, n, lambda i, x: x @ p["b"], x)
        return lax.cond(n > 2, lambda x: x @ p["c"], lambda x: x @ p["b"] @ p["c"], x)

    p = {"a": shape(4, 5, 5), "b": shape(5, 5), "c": shape(5, 5)}
    graph = trace(fn, p, shape(3, 5), jax.ShapeDtypeStruct((), jnp.int32))
    found = [(s.name, s.calls, s.loops, s.branches) for s in graph.sites]
    assert found == [
        ("a", 12, (4, 3), ()),
        ("b", 1, (), ()),
        ("b#1", 1, (), ((0, 0),)),
        ("c", 1, (), ((0, 0),)),
        ("c#1", 1, (), ((0, 1),)),
    ]
    assert graph.unknown_trips == ("b",)
    assert graph.macs == 12 * 25 + 4 * 75


def test_a_carry_that_turns_from_parameter_to_activation():
    # w is multiplied by x in the first trip, so from the second on it is no weight any more.
    def fn(p, x):
        return lax.scan(lambda w, _: (w @ x, None), p["w"], None, length=3)[0]

    (site,) = trace(fn, {"w": shape(4, 4)}, shape(4, 4)).sites
    assert site.weight is None and site.params == ()
    fixed = lambda p, x: lax.scan(lambda w, _: (w * 0.5, x @ w), p["w"], None, length=3)[1]
    assert names(fixed, {"w": shape(4, 4)}, shape(4, 4)) == ["w"]


def test_name_stacks_are_joined_and_cleaned():
    @jax.jit
    def inner(x, y):
        with jax.named_scope("inner"):
            return x @ y

    def fn(_, x):
        with jax.named_scope("outer"):
            f = lambda x: jax.checkpoint(inner)(x, x.T).sum()
            return jax.value_and_grad(f)(x)

    stacks = names(fn, (), shape(3, 3))
    assert stacks[0] == "outer/inner" and all("(" not in name for name in stacks)
    clean = compat.strip
    assert clean("transpose(jvp(Net))/vmap(a/b(3))/vmap()/c") == "Net/a/b(3)/c"


def test_what_cannot_be_entered_is_listed():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": (PartitionSpec(), PartitionSpec("d")), "out_specs": PartitionSpec("d")}
    kernel = lambda x, o: o.__setitem__(..., x[...] @ x[...])
    square = shape(4, 4)

    def fn(p, x):
        with jax.named_scope("sharded"):
            x = jax.shard_map(lambda w, x: jnp.tanh(x @ w), mesh=mesh, **specs)(p["w"], x)
        x = pl.pallas_call(kernel, out_shape=square, interpret=True)(x)
        x = lax.ragged_dot(x, p["experts"], jnp.array([1, 3]))
        return x @ p["head"]

    graph = trace(fn, {"w": square, "head": square, "experts": shape(2, 4, 4)}, square)
    assert [site.name for site in graph.sites] == ["experts", "head"]
    assert graph.unentered == ("shard_map at 'sharded': w", "pallas_call: dot_general")


def test_errors_name_the_leaf():
    with pytest.raises(ValueError, match=r"leaf 'a/name' must be an array, got str; split static"):
        trace(lambda p, x: x, {"a": {"name": "relu"}}, 1.0)
    with pytest.raises(ValueError, match="two leaves have the path 'a/b'"):
        trace(lambda p, x: x, {"a/b": 1.0, "a": {"b": 1.0}}, 1.0)


def test_the_jax_internals_are_as_compat_expects():
    w = jnp.eye(2)
    rule = jax.custom_jvp(lambda x: x @ w)
    rule.defjvp(lambda p, t: (rule(*p), t[0] @ w))
    back = jax.custom_vjp(lambda x: x @ w)
    back.defvjp(lambda x: (x @ w, ()), lambda _, g: (g @ w.T,))
    double = lambda carry, row: ((carry[0] @ w, carry[1] + 1), row)

    def fn(x):
        x = back(rule(jax.checkpoint(jax.jit(lambda x: x @ w))(x)))
        (x, _), _ = lax.scan(double, (x, 0), (x, x, x))
        x = lax.while_loop(lambda x: x.sum() < 0.0, lambda x: x @ w, x)
        return lax.cond(x.sum() > 0.0, lambda x: x @ w, lambda x: x, x)

    eqns = {e.primitive.name: e for e in jax.make_jaxpr(fn)(w).jaxpr.eqns}
    known = compat.REMAT | compat.CUSTOM | {"scan", "while", "cond"}
    assert len(known & set(eqns)) == 6, f"unknown names in JAX {jax.__version__}: {sorted(eqns)}"
    assert compat.scan_sizes(eqns["scan"].params)[1] == 2
    assert sum(compat.scan_sizes(eqns["scan"].params)) + 3 == len(eqns["scan"].invars)
    remat = eqns[next(iter(compat.REMAT & set(eqns)))]
    assert set(compat.remat_options(remat.params)) == {"prevent_cse", "policy"}
    (jit,) = compat.call_body(remat).jaxpr.eqns
    assert jit.primitive.name in compat.JIT and compat.jit_options(jit.params) == {}
    for eqn in eqns.values():
        assert hasattr(eqn.ctx, "manager") and str(eqn.source_info.name_stack) == ""
    (out,) = compat.evaluate(jit, [jnp.ones((2, 2)) for _ in jit.invars])
    assert out.shape == (2, 2)


def test_bits_of_a_few_elements_may_be_more_elements():
    # a scale of 4 float32 numbers, as 16 bytes: as many as the weight has, so it is no mere scale
    fn = lambda p, x, s: (p["w"] * jax.lax.bitcast_convert_type(s, jnp.uint8)) @ x
    params = {"w": jnp.ones((4, 4), jnp.uint8)}
    graph = trace(fn, params, jnp.ones((4, 2), jnp.uint8), jnp.ones(4, jnp.float32))
    assert [site.params for site in graph.sites] == [()]
