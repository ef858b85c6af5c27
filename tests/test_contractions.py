"""Contractions beside dense ones: experts, kernels that no pass enters, integers."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress.cost import devices, estimate
from jaxcompress.formats import integer
from jaxcompress.graph import Unentered, axes, trace, walk
from jaxcompress.graph.layers.matrices import columns, layers, rows
from jaxcompress.graph.layers.statistics import capture
from jaxcompress.graph.scaling.migration import absorbable, rescale
from jaxcompress.prune import shrink, sparse_gpt, wanda
from jaxcompress.quantize import Spec, per_token, weights
from jaxcompress.quantize import activations as quantize_activations
from jaxcompress.search import Budget, Search, integer_options, sensitivity

Q = jc.quantize
EXPERT = Spec(integer(3), axis=(0, 2))


def draw(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


# --- experts -------------------------------------------------------------------------------------

SIZES = jnp.array([4, 0, 9])
BOUNDS = ((0, 4), (4, 4), (4, 13))  # rows 13 and 14 reach no expert


def experts(p, x):
    return lax.ragged_dot(x, p["w"], SIZES)


def numbers(contract, batch, ragged, group):
    return lax.RaggedDotDimensionNumbers((contract, batch), ragged, group)


# name -> (function of a weight and rows, shapes, group sizes [prefix, g])
MODES = {
    "plain": (lambda w, x, s: lax.ragged_dot(x, w, s), (3, 4, 5), (8, 4), [2, 1, 4]),
    "transposed": (
        lambda w, x, s: lax.ragged_dot_general(x, w, s, numbers(((1,), (2,)), ((), ()), [0], [1])),
        (5, 3, 4),
        (8, 4),
        [2, 1, 4],
    ),
    "batch": (
        lambda w, x, s: lax.ragged_dot_general(
            x, w, s, numbers(((2,), (2,)), ((0,), (1,)), [1], [0])
        ),
        (3, 2, 4, 5),
        (2, 8, 4),
        [[2, 1, 4], [0, 3, 5]],
    ),
    "rows within rows": (
        lambda w, x, s: lax.ragged_dot_general(x, w, s, numbers(((3,), (1,)), ((), ()), [1], [0])),
        (3, 4, 5),
        (2, 6, 3, 4),
        [[2, 1, 3], [0, 3, 1]],
    ),
    "batch is ragged": (
        lambda w, x, s: lax.ragged_dot_general(
            x, w, s, numbers(((2,), (1,)), ((0,), (0,)), [0], [])
        ),
        (3, 4, 5),
        (3, 8, 4),
        [2, 1],
    ),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_is_a_product_of_matrices_of_the_rows_that_reach_them(name):
    fn, shape, inputs, sizes = MODES[name]
    w, x, sizes = draw(*shape), draw(*inputs, seed=1), jnp.array(sizes)
    model = lambda p, x: fn(p["w"], x, sizes)
    seen = {}

    def visit(tap, x, state):
        seen["rows"] = rows(tap, x)
        return x, state

    (layer,) = layers(model, {"w": w}, x).layers
    out, _ = walk(model, visit)({layer.tap.name: ()}, {"w": w}, x)
    left, right = (np.asarray(a, np.float64) for a in (seen["rows"], layer.take(w)[0]))
    product = np.einsum("grk,gkn->grn", left, right)
    arranged = np.asarray(columns(layer.tap, out))
    batch = len(product) // 3 if name != "batch is ragged" else len(product)
    groups = len(product) // batch
    summed = product.reshape(groups, batch, *product.shape[1:]).sum(0)
    np.testing.assert_allclose(arranged[:batch], summed, rtol=1e-4, atol=1e-5)
    assert len(arranged) == len(product)
    assert layer.site.macs == x.size * shape[-1 if name != "transposed" else 0]


def test_moments_are_those_of_the_rows_that_reach_an_expert():
    w, x = draw(3, 6, 5), draw(15, 6, seed=1) + 2
    chosen = layers(experts, {"w": w}, x).layers
    found = capture(experts, {"w": w}, [(x,), (3 * x,)], layers=chosen)["w"]
    assert found.count.tolist() == [[8, 0, 18]]
    for e, (start, end) in enumerate(BOUNDS):
        mine = np.concatenate([x[start:end], 3 * x[start:end]]).astype(np.float64)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
        close(found.gram[0, e], mine.T @ mine)
        close(found.total[0, e], mine.sum(0))
        close(found.magnitude[0, e], np.abs(mine).sum(0))
        close(found.largest[0, e], np.abs(mine).max(0, initial=0))
        if len(mine):
            close(found.variance[0, e], mine.var(0))


def alone(method):
    """What a method makes of each expert as a dense layer of its own, with just its rows."""
    w, x = draw(3, 6, 5), draw(15, 6, seed=1)
    parts, dense = [], lambda p, x: x @ p["w"]
    for e, (start, end) in enumerate(BOUNDS):
        data = x[start:end] if end > start else jnp.eye(6)  # nothing known: all inputs alike
        parts.append(method(dense, {"w": w[e]}, [(data,)], Spec(integer(3)))[0]["w"])
    with pytest.warns(UserWarning, match=r"no row of the data reaches these experts.*: w\[1\]$"):
        together = method(experts, {"w": w}, [(x,)], EXPERT)[0]["w"]
    return w, np.stack(parts), np.asarray(together)


METHODS = {
    "gptq": lambda fn, p, data, spec: Q.gptq(fn, p, data, {"w": spec}),
    "gptq, sweeps": lambda fn, p, data, spec: Q.gptq(fn, p, data, {"w": spec}, sweeps=2),
    "wanda": lambda fn, p, data, spec: wanda(fn, p, data, 0.5),
    "sparse_gpt": lambda fn, p, data, spec: sparse_gpt(fn, p, data, (1, 2)),
}


@pytest.mark.parametrize("name", METHODS)
def test_an_expert_is_a_dense_layer_with_just_its_rows(name):
    w, parts, together = alone(METHODS[name])
    np.testing.assert_allclose(together, parts, atol=1e-5)
    if name == "gptq":  # the expert that no row reaches
        nearest = Spec(integer(3)).weights()
        want = nearest.apply(w[1], nearest.init(w[1]))
        np.testing.assert_array_equal(together[1], want)


def test_a_bias_that_experts_share_moves_by_the_mean_over_their_rows():
    fn = lambda p, x: experts(p, x) + p["b"]
    params, x = {"w": draw(3, 6, 5), "b": jnp.zeros((1, 5))}, draw(13, 6, seed=1) + 1
    fixed, state = Q.correct_bias(fn, params, [(x,)], {"w": EXPERT})
    view = Q.recipe({"w": EXPERT}).apply(fixed, state)
    away = np.asarray(fn(view, x), np.float64) - np.asarray(fn(params, x), np.float64)
    np.testing.assert_allclose(away.mean(0), 0, atol=1e-5)


def test_activations_of_experts_see_the_rows_that_are_taken():
    w, x = {"w": draw(3, 6, 5)}, draw(15, 6, seed=1).at[13:].set(100.0)
    made = quantize_activations(experts, integer(8))
    grid = made.grids(made.observe(made.init(w, x), w, x))["w"]
    span = np.abs(np.asarray(x[:13])).max()
    np.testing.assert_allclose(float(grid.qparams.scale.reshape(())), span / 127, rtol=1e-6)
    got = np.asarray(made.apply({"w": grid}, w, x))[:13]
    on_grid = np.round(np.asarray(x, np.float64) * 127 / span)[:13] * span / 127
    want = [on_grid[a:b] @ np.asarray(w["w"][e], np.float64) for e, (a, b) in enumerate(BOUNDS)]
    np.testing.assert_allclose(got, np.concatenate(want), rtol=1e-4, atol=1e-4)


WIDTH, HIDDEN, EXPERTS = 16, 32, 4


def moe(p, x):
    """A top-2 mixture of experts."""
    probabilities = jax.nn.softmax(x @ p["router"])
    top, chosen = lax.top_k(probabilities, 2)
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat)
    taken = jnp.repeat(x, 2, axis=0)[order]
    sizes = jnp.bincount(flat, length=EXPERTS)
    h = jax.nn.relu(lax.ragged_dot(taken, p["up"], sizes))
    y = lax.ragged_dot(h, p["down"], sizes)
    y = jnp.zeros_like(y).at[order].set(y).reshape(-1, 2, x.shape[-1])
    return jnp.sum(y * top[..., None], axis=1) @ p["head"]


@pytest.fixture(scope="module")
def mixture():
    params = {
        "router": draw(WIDTH, EXPERTS),
        "up": draw(EXPERTS, WIDTH, HIDDEN, seed=1) / 4,
        "down": draw(EXPERTS, HIDDEN, WIDTH, seed=2) / 4,
        "head": draw(WIDTH, 4, seed=3),
    }
    return params, draw(64, WIDTH, seed=4)


def test_a_scale_passes_between_experts(mixture):
    params, x = mixture
    (group,) = (g for g in absorbable(moe, params, x).groups if g.name == "up -> down")
    assert group.channels == HIDDEN
    moved = rescale(params, group, jnp.exp2(jnp.arange(HIDDEN, dtype=jnp.float32) % 5))
    assert not np.array_equal(moved["up"], params["up"])
    np.testing.assert_array_equal(moe(moved, x), moe(params, x))


def test_hidden_channels_of_experts_can_be_cut(mixture):
    params, x = mixture
    (group,) = (g for g in axes(moe, params, x).groups.values() if g.size == HIDDEN)
    assert {member.path for member in group.members} == {"up", "down"} and not group.inexact
    keep = jnp.arange(HIDDEN) % 2 == 0
    masked = {
        **params,
        "up": jnp.where(keep[None, None], params["up"], 0),
        "down": jnp.where(keep[None, :, None], params["down"], 0),
    }
    fn, small, _ = shrink(moe, params, {group.name: keep}, x)
    assert small["up"].shape == (EXPERTS, WIDTH, HIDDEN // 2)
    np.testing.assert_allclose(fn(small, x), moe(masked, x), rtol=1e-4, atol=1e-4)


def test_the_cost_of_experts(mixture):
    params, x = mixture
    spec = {"up|down": Spec(integer(4), axis=(0, 2))}
    recipe = Q.recipe(spec)
    packed = recipe.pack(params, recipe.init(params))
    cost = estimate(moe, packed, x, device="stm32h743")
    found = {layer.name: layer for layer in cost.layers}
    assert found["up"].macs == found["down"].macs == 2 * 64 * WIDTH * HIDDEN
    assert found["up"].weight_bytes == jc.core.packed_bytes(packed["up"])
    assert cost.weight_bytes == jc.core.packed_bytes(packed)
    one = {layer.name: layer for layer in estimate(moe, packed, x[:1], device="stm32h743").layers}
    assert one["up"].weight_read_bytes == found["up"].weight_bytes // 2  # two of four at most


def test_a_plan_covers_the_experts(mixture):
    params, x = mixture
    four = integer_options((4, 8))
    floats = 4 * sum(w.size for w in params.values())
    budget = Budget(weight_bytes=floats / 5)  # out of reach unless the experts take part
    search = Search(
        moe, params, [(x,)], device="stm32h743", options=four, budget=budget, fitted=False
    )
    (plan, *_) = search.plans(budget, candidates=2)
    assert set(plan.weights) == set(params)
    assert search.apply(plan).cost.weight_bytes <= floats / 5


# --- what no pass enters -------------------------------------------------------------------------


def kernel(x, w):
    body = lambda x, w, o: o.__setitem__(..., x[...] @ w[...])
    shape = jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), x.dtype)
    return pl.pallas_call(body, out_shape=shape, interpret=True)(x, w)


def sharded(x, w):
    mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))
    return jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(P(), P()), out_specs=P())(x, w)


def foreign(x, w):
    shape = jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), x.dtype)
    return jax.pure_callback(lambda x, w: np.asarray(x) @ np.asarray(w), shape, x, w)


SHUT = {"pallas_call": kernel, "shard_map": sharded, "pure_callback": foreign}


def network(product):
    return lambda p, x: jax.nn.relu(product(x, p["in"]) @ p["up"]) @ p["down"]


PARAMS = {"in": draw(6, 8), "up": draw(8, 8, seed=1), "down": draw(8, 4, seed=2)}
X = draw(5, 6, seed=3)
SPEC = {"up|down": Spec(integer(4))}
LSQ = jc.quantize.lsq_activations

# Every pass that goes by contractions.
PASSES = {
    "activations": lambda fn: quantize_activations(fn, integer(8)).init(PARAMS, X),
    "lsq_activations": lambda fn: LSQ(fn, bits=4).init(PARAMS, X),
    "lsq_activations, by site": lambda fn: LSQ(fn, bits={"up": 4}).init(PARAMS, X),
    "per_token": lambda fn: per_token(fn)(PARAMS, X),
    "sensitivity": lambda fn: sensitivity(
        fn, PARAMS, [(X,)], weights={"int4": weights(integer(4))}, activations={"int8": integer(8)}
    ),
    "compress": lambda fn: jc.search.compress(
        fn, PARAMS, [(X,)], device="h100", budget=Budget(weight_bytes=1000),
        options=integer_options((4, 8)), candidates=2, fitted=False,
    ),
    "gptq": lambda fn: Q.gptq(fn, PARAMS, [(X,)], SPEC),
    "adaround": lambda fn: Q.adaround(fn, PARAMS, [(X,)], SPEC, steps=2),
    "round_to_nearest": lambda fn: Q.round_to_nearest(fn, PARAMS, [(X,)], SPEC),
    "hqq": lambda fn: Q.hqq(fn, PARAMS, [(X,)], SPEC),
    "awq": lambda fn: Q.awq(fn, PARAMS, [(X,)], SPEC, grid=2),
    "smooth_quant": lambda fn: Q.smooth_quant(fn, PARAMS, [(X,)], SPEC),
    "equalize": lambda fn: Q.equalize(fn, PARAMS, [(X,)], SPEC),
    "reconstruct": lambda fn: Q.reconstruct(fn, PARAMS, [(X,)], SPEC, epochs=1),
    "wanda": lambda fn: wanda(fn, PARAMS, [(X,)], {"up|down": 0.5}),
    "sparse_gpt": lambda fn: sparse_gpt(fn, PARAMS, [(X,)], {"up|down": 0.5}),
    "activity": lambda fn: jc.prune.apoz(fn, PARAMS, [(X,)]),
    "estimate": lambda fn: estimate(fn, PARAMS, X, device="h100"),
}  # fmt: skip


QUICK = "activations per_token sensitivity compress gptq wanda activity estimate".split()
EACH = [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.broad]) for n in PASSES]


@pytest.mark.parametrize("name", EACH)
def test_every_pass_says_once_what_it_could_not_enter(name):
    # what runs once on each device is not shut for the cost
    shut = "pure_callback" if name == "estimate" else "shard_map"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PASSES[name](network(SHUT[shut]))
    said = [str(w.message) for w in caught if issubclass(w.category, Unentered)]
    assert said == [f"not looked into, left as they are: {shut}: in"]


@pytest.mark.parametrize("shut", SHUT)
def test_what_cannot_be_entered_is_named_with_its_leaves(shut):
    both = lambda p, x: SHUT[shut](x, p["in"] * p["scale"]) @ p["up"]
    graph = trace(both, {**PARAMS, "scale": jnp.ones((6, 1))}, X)
    assert [site.name for site in graph.sites] == ["up"]
    assert len(graph.unentered) == 1 and graph.unentered[0].startswith(f"{shut}: ")
    assert graph.unentered[0].endswith(": in, scale")


def test_without_any_other_contraction_the_error_names_it():
    with pytest.raises(
        ValueError, match="weight of no layer; .*not looked into: pure_callback: in"
    ):
        Q.gptq(lambda p, x: foreign(x, p["in"]), PARAMS, [(X,)], {"in": Spec(integer(4))})


# --- integers ------------------------------------------------------------------------------------


def with_integers(p, x):
    """Positions, a mask from comparisons and integer parameters meet floats, and each other."""
    dot = functools.partial(lax.dot_general, preferred_element_type=jnp.float32)
    positions = jnp.cumsum((x[:, 0] == x[:, 0]).astype(jnp.int32))
    angles = dot(positions, p["rate"], (((), ()), ((), ())))
    x = x * jnp.cos(angles)
    mask = (x @ p["up"] > 0).astype(jnp.int32)
    ones = dot(mask, p["sum"], (((1,), (0,)), ((), ())))
    shared = lax.dot_general(mask, mask, (((1,), (1,)), ((), ())))
    return (x @ p["up"] + ones[:, None]) @ p["down"] + shared.sum(1).astype(jnp.float32)[:, None]


INTEGERS = {
    "rate": draw(6), "up": draw(6, 6, seed=1), "down": draw(6, 4, seed=2), "sum": jnp.arange(6)
}  # fmt: skip


def test_integers_stay_as_they_are():
    made = quantize_activations(with_integers, integer(8))
    stats = made.observe(made.init(INTEGERS, X), INTEGERS, X)
    assert sorted(stats) == ["down", "up", "up#1"]
    assert sorted(LSQ(with_integers, bits=4).init(INTEGERS, X).buffers) == sorted(stats)
    near = np.asarray(with_integers(INTEGERS, X))
    for fn in (per_token(with_integers), functools.partial(made.apply, made.grids(stats))):
        got = np.asarray(fn(INTEGERS, X))
        assert 0 < np.abs(got - near).max() < 0.1 * np.abs(near).max()
    with pytest.raises(ValueError, match=r"no floating-point numbers: .*sum \(int32\)"):
        quantize_activations(with_integers, integer(8), sites="sum").init(INTEGERS, X)
    with pytest.raises(TypeError, match="what enters 'sum' is int32, which has no grid"):
        made.apply({"sum": made.grids(stats)["up"]}, INTEGERS, X)


def test_a_network_with_integers_is_searched():
    found = jc.search.compress(
        with_integers, INTEGERS, [(X,)], device="stm32h743", budget=Budget(weight_bytes=400),
        options=integer_options((4, 8)), candidates=2, fitted=False,
    )  # fmt: skip
    assert set(found.plan.weights) == {"rate", "up", "down"}


@pytest.mark.parametrize("activations", [None, 8])
def test_integers_cost_what_their_promoted_type_costs(activations):
    def product(w, x):
        return lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    w, integers = jnp.ones((16, 8)), jnp.ones((4, 16), jnp.int32)
    for device in devices():
        floats = functools.partial(estimate, product, w, device=device)
        try:
            want = floats(integers.astype(jnp.float32)).latency_s
        except ValueError:  # no floats on it
            continue
        if activations is None:
            assert floats(integers).latency_s == want, device
            leaf = estimate(product, integers.T, jnp.ones((8, 16)), device=device)
            assert leaf.layers[0].weight_dtype == "float32" == leaf.layers[0].activation_dtype
        estimate(with_integers, INTEGERS, X, device=device, activations=activations)
