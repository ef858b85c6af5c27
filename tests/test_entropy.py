"""Entropy of activations: the theorems, the streaming state, and networks against NumPy."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _trees import bits_equal
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxcompress as jc
from jaxcompress.prune.channels import entropies as en
from jaxcompress.prune.channels import input_channels
from jaxcompress.prune.channels.entropies import activation_entropy

pytestmark = pytest.mark.broad

RNG = np.random.default_rng(0)
B = 30


@functools.partial(jax.jit, static_argnames=("range", "bins"))
def counted(x, *, range, bins):
    span = en.widen(en.empty_span(x.shape[-1:]), x)
    state = en.add(en.init(*en.limits(span, range), bins=bins), x)
    return state, en.entropy(state)


def one_pass(x, range="layer", bins=B):
    return counted(jnp.asarray(x, jnp.float32), range=range, bins=bins)[0]


def entropies(x, range="layer"):
    return np.asarray(counted(jnp.asarray(x, jnp.float32), range=range, bins=B)[1])


def by_numpy(z, low, high):
    """Entropies of the columns of z over given ranges, in float64."""
    found = []
    for column, a, b in zip(z.T.astype(np.float64), low, high, strict=True):
        p = np.histogram(column, B, (float(a), float(b)))[0] / len(column)
        found.append(-sum(x * np.log(x) for x in p if x))
    return np.array(found)


def test_bounds_and_the_cases_that_reach_them():
    uniform = (np.arange(600) % B + 0.5) / B
    x = np.stack([np.full(600, 0.37), uniform, RNG.beta(0.3, 4, 600)], axis=1)
    state = en.add(en.init(jnp.zeros(3), jnp.ones(3), bins=B), jnp.asarray(x, jnp.float32))
    h = np.asarray(en.entropy(state))
    assert h[0] == 0 and not np.signbit(h[0])
    np.testing.assert_allclose(h[1], np.log(B), rtol=1e-6)
    assert 0 < h[2] < np.log(B)
    np.testing.assert_array_equal(state.counts[1], np.full(B, 20))
    for range in ("layer", "channel"):  # a range without width is one bin
        np.testing.assert_array_equal(entropies(np.full((9, 2), -4.2), range), [0, 0])


def test_rare_binary_channel():
    x = np.zeros((500, 1))
    x[:10] = 1.0  # q = 0.02
    want = -0.02 * np.log(0.02) - 0.98 * np.log(0.98)
    assert round(want, 3) == 0.098
    np.testing.assert_allclose(entropies(x), [want], rtol=1e-6)


@pytest.mark.parametrize("range", ["layer", "channel"])
def test_entropy_is_that_of_numpys_histogram(range):
    x = RNG.gamma(2.0, size=(400, 5)) * np.array([1.0, 0.1, 3.0, 1.0, 0.01])
    x = x.astype(np.float32)
    low, high = (np.broadcast_to(f(x), 5) for f in (np.min, np.max))
    if range == "channel":
        low, high = x.min(0), x.max(0)
    state = one_pass(x, range)
    np.testing.assert_allclose(en.entropy(state), by_numpy(x, low, high), rtol=1e-5)
    np.testing.assert_array_equal(state.low, low)
    np.testing.assert_array_equal(state.high, high)


def test_a_dead_noisy_channel():
    # FORMULAS 2.4: of at most 3.40 nats, 2.93 per channel and 0.00 per layer, a live one 2.84, 2.59
    live = np.abs(RNG.normal(size=(2000, 6))) * np.array([1.0, 1.2, 0.8, 1.1, 0.9, 1.0])
    dead = 1e-4 * RNG.uniform(size=(2000, 1))
    x = np.concatenate([live, dead], axis=1)
    layer, channel = (entropies(x, r) for r in ("layer", "channel"))
    assert layer[-1] == 0 and layer[:-1].min() > 2.0
    assert channel[-1] > channel[:-1].max() > 2.5


def test_a_range_per_channel_does_not_see_affine_rescaling():
    x = RNG.integers(-40, 90, size=(300, 4))  # integers and powers of two: without rounding
    y = x * np.array([1.0, 2.0**-13, 2.0, 2.0**10]) + np.array([0.0, 0.0, 64.0, -(2.0**12)])
    a, b = one_pass(x, "channel"), one_pass(y, "channel")
    np.testing.assert_array_equal(a.counts, b.counts)
    np.testing.assert_array_equal(en.entropy(a), en.entropy(b))
    assert float(entropies(y, "layer")[1]) < 0.1 < float(en.entropy(b)[1])


def test_samples_may_come_in_any_order_and_shards_merge_exactly():
    x = jnp.asarray(RNG.normal(size=(90, 2, 3, 4)), jnp.float32)  # positions are averaged
    whole, add = one_pass(x), jax.jit(en.add)
    empty = en.init(whole.low, whole.high, bins=B)
    assert bits_equal(add(empty, x[RNG.permutation(90)]), whole)
    assert bits_equal(en.add(empty, x), whole)
    shards = [x[:30], x[30:60], x[60:]]
    parts = [add(empty, part) for part in shards]
    assert bits_equal(functools.reduce(jax.jit(en.merge), parts), whole)
    assert bits_equal(en.merge(parts[0], en.merge(parts[2], parts[1])), whole)
    assert bits_equal(functools.reduce(add, shards, empty), whole)
    spans = [en.widen(en.empty_span((4,)), part) for part in shards]
    assert bits_equal(en.limits(functools.reduce(en.join, spans)), (whole.low, whole.high))
    # as a mapped axis adds its shards
    mapped = jax.vmap(lambda part: en.across(en.add(empty, part), "d"), axis_name="d")
    assert bits_equal(jax.tree.map(lambda s: s[1], mapped(jnp.stack(shards))), whole)


def test_numbers_beyond_a_range_and_ranges_of_all_sizes():
    state = en.init(jnp.zeros(1), jnp.ones(1), bins=4)
    state = en.add(state, jnp.array([[-3e38], [0.0], [0.25], [1.0], [7.0]]))
    np.testing.assert_array_equal(state.counts, [[2, 1, 0, 2]])
    wide = jnp.array([[-3.3e38], [3.3e38], [0.0]])
    np.testing.assert_array_equal(one_pass(wide, bins=2).counts, [[1, 2]])
    narrow = jnp.array([[1.0], [1.0 + 2.0**-23]])
    np.testing.assert_array_equal(one_pass(narrow, bins=2).counts, [[1, 1]])


def test_what_is_not_finite_or_not_there_is_nan():
    x = jnp.asarray(RNG.normal(size=(5000, 3)), jnp.float32)  # jnp.max may drop NaN at this size
    add = jax.jit(en.add)
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        broken = x.at[4000, 1].set(bad)
        assert np.isnan(entropies(broken)).tolist() == [True] * 3
        assert np.isnan(entropies(broken, "channel")).tolist() == [False, True, False]
        given = add(en.init(-jnp.ones(3), jnp.ones(3)), broken)
        assert np.isnan(en.entropy(given)).tolist() == [False, True, False]
        np.testing.assert_array_equal(given.skipped, [0, 1, 0])
    assert np.isnan(en.entropy(en.init(jnp.zeros(2), jnp.ones(2)))).all()
    assert np.isnan(entropies(np.zeros((0, 2)))).all()
    assert entropies(np.zeros((4, 0))).shape == (0,)
    merged = jax.jit(en.merge)(
        *(en.init(jnp.zeros(1), high) for high in (jnp.ones(1), jnp.full(1, 2.0)))
    )
    assert np.isnan(merged.low).all()


def test_half_precision_and_integers_are_counted_in_float32():
    x = RNG.integers(0, 200, size=(64, 2, 3))
    want, add = one_pass(x), jax.jit(en.add)
    for dtype in (jnp.int32, jnp.bfloat16, jnp.uint8):
        part = jnp.asarray(x).astype(dtype)
        assert bits_equal(add(en.init(want.low, want.high), part), want)


def test_the_entropy_of_each_weight_is_its_magnitude():
    w = RNG.normal(size=(30, 20)).astype(np.float32)
    p = np.abs(w).astype(np.float64) / np.abs(w).sum(dtype=np.float64)
    assert p.max() < 1 / np.e
    mask = jc.prune.magnitude(0.7).init({"w": jnp.asarray(w)}).buffers.masks["w"]
    order = np.argsort((p * np.log(p)).ravel(), kind="stable")  # largest -p log p first
    want = np.isin(np.arange(600), order[:180]).reshape(w.shape)
    np.testing.assert_array_equal(mask, want)
    p = np.array([0.9, 0.1])  # not above 1/e: the larger one has the smaller term
    assert np.argmax(-p * np.log(p)) == 1


# Networks


def conv(x, w, groups=1):
    return lax.conv_general_dilated(
        x,
        w,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def hidden(params, x):
    """What enters the second, the third and the last layer."""
    a = jax.nn.relu(conv(x, params["stem"]) - 0.3)
    b = jax.nn.relu(conv(a, params["grouped"], groups=2))
    return a, b, b.mean((1, 2))


def net(params, x):
    return hidden(params, x)[2] @ params["head"]


def fill(*shape):
    return jnp.asarray(RNG.normal(size=shape) * 0.4, jnp.float32)


PARAMS = {"stem": fill(3, 3, 2, 6), "grouped": fill(3, 3, 3, 4), "head": fill(4, 5)}
X = fill(48, 5, 4, 2) * 3
DATA = [(X[:16],), (X[16:32],), (X[32:],)]


@functools.cache
def expected(range):
    found = {}
    for name, x in zip(("stem", "grouped", "head"), (X, *hidden(PARAMS, X)[::2]), strict=True):
        z = np.asarray(x, np.float64)
        z = z.mean((1, 2)) if z.ndim == 4 else z
        low, high = (z.min(0), z.max(0)) if range == "channel" else (z.min(), z.max())
        found[name] = by_numpy(z, *(np.broadcast_to(end, z.shape[1:]) for end in (low, high)))
    return found


@pytest.mark.parametrize("range", ["layer", "channel"])
def test_channels_of_a_network_are_those_that_enter_its_layers(range):
    got = activation_entropy(net, PARAMS, DATA, range=range)
    assert {name: h.shape for name, h in got.items()} == {
        "stem": (2,),
        "grouped": (6,),
        "head": (4,),
    }
    for name, h in expected(range).items():
        np.testing.assert_allclose(got[name], h, rtol=1e-4, atol=1e-6)


def test_given_ranges_take_one_pass_and_give_the_same():
    a, _, b = hidden(PARAMS, X)
    ends = {name: (x.min(), x.max()) for name, x in (("grouped", a.mean((1, 2))), ("head", b))}
    got = activation_entropy(net, PARAMS, iter(DATA), range=ends, sites="grouped|head")
    for name in ends:
        np.testing.assert_allclose(got[name], expected("layer")[name], rtol=1e-4, atol=1e-6)


def test_a_second_call_does_not_compile_again_and_shards_give_the_same():
    ends = {"grouped": (0.0, 1.0)}
    run = lambda x: activation_entropy(net, PARAMS, [(x,)], sites="grouped", range=ends)
    whole = run(X)
    observe: Any = input_channels._observe
    programs = observe._cache_size()
    assert bits_equal(run(X + 0.0), whole) and observe._cache_size() == programs
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    sharded = run(jax.device_put(X, NamedSharding(mesh, PartitionSpec("d"))))
    assert bits_equal(jax.device_get(sharded), jax.device_get(whole))


def test_every_trip_of_a_scan_has_its_own_channels():
    def apply(params, x):
        return lax.scan(lambda x, w: (jax.nn.relu(x @ w), None), x, params["w"])[0]

    w, x = fill(3, 4, 4), fill(60, 4)
    got = activation_entropy(apply, {"w": w}, [(x[:30],), (x[30:],)])["w"]
    assert got.shape == (3, 4)
    for row, weight in zip(got, w, strict=True):
        z = np.asarray(x)
        ends = (np.full(4, end) for end in (z.min(), z.max()))
        np.testing.assert_allclose(row, by_numpy(z, *ends), rtol=1e-5)
        x = jax.nn.relu(x @ weight)


def test_channels_of_products_with_batch_axes_and_of_other_layouts():
    experts = lambda p, x: jnp.einsum("etk,ekn->etn", x, p["w"])
    x = fill(2, 50, 3)
    got = activation_entropy(experts, {"w": fill(2, 3, 4)}, [(x,)], range="channel")["w"]
    z = np.moveaxis(np.asarray(x), 1, 0).reshape(50, 6)  # [tokens, experts * K]
    np.testing.assert_allclose(got, by_numpy(z, z.min(0), z.max(0)), rtol=1e-5)
    first = lambda p, x: lax.conv(x, p["w"], (1, 1), "VALID")  # channels first
    x = fill(40, 3, 2, 2)
    got = activation_entropy(first, {"w": fill(5, 3, 1, 1)}, [(x,)], range="channel")["w"]
    z = np.asarray(x).mean((2, 3))
    np.testing.assert_allclose(got, by_numpy(z, z.min(0), z.max(0)), rtol=1e-4)


BROKEN = [(X.at[3, 0, 0, 1].set(jnp.inf),)]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: activation_entropy(net, PARAMS, []), "data is empty"),
        (lambda: activation_entropy(net, PARAMS, DATA, bins=1), "bins must be at least 2, got 1"),
        (lambda: activation_entropy(net, PARAMS, DATA, range="net"), 'range must be "layer"'),
        (lambda: activation_entropy(net, PARAMS, DATA, sites="steam"), "sites: .*'stem'"),
        (lambda: activation_entropy(net, PARAMS, DATA, range={}), "there is none for 'stem'"),
        (
            lambda: activation_entropy(
                net, PARAMS, DATA, sites="head", range={"head": (1.0, jnp.zeros(4))}
            ),
            "range: 'head': needs finite low <= high",
        ),
        (
            lambda: activation_entropy(
                net, PARAMS, DATA, sites="head", range={"head": (0.0, jnp.ones(3))}
            ),
            "range: 'head': ",
        ),
        (lambda: activation_entropy(net, PARAMS, BROKEN), "what enters 'stem' holds NaN or Inf"),
        (
            lambda: activation_entropy(net, PARAMS, BROKEN, sites="stem", range={"stem": (0, 1)}),
            "what enters 'stem' holds NaN or Inf",
        ),
        (lambda: activation_entropy(lambda p, x: x, (), DATA), "no contraction of an activation"),
        (lambda: en.init(jnp.ones(1), jnp.zeros(1)), "low must not lie above high"),
        (
            lambda: en.merge(*(en.init(jnp.zeros(1), jnp.ones(1), bins=b) for b in (4, 5))),
            r"shapes \(1, 4\) and \(1, 5\)",
        ),
        (
            lambda: en.merge(*(en.init(jnp.zeros(1), jnp.full(1, b)) for b in (4.0, 5.0))),
            "different ranges",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
