"""Layers as matrices: views of leaves, rows of inputs, biases, and statistics of what enters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from jaxcompress.core import leaves_with_paths
from jaxcompress.formats import (
    granularity,
    granularity_for,
    integer,
    k_means,
    mxfp4,
    nf4,
    nvfp4,
    power_of_two,
    ternary,
)
from jaxcompress.formats.elementwise import elementwise
from jaxcompress.graph import walk
from jaxcompress.graph.layers.biases import biases
from jaxcompress.graph.layers.matrices import columns, layers, rows
from jaxcompress.graph.layers.statistics import capture, stream
from jaxcompress.quantize.fake_quantized_weights import qparams_of


def draw(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def conv(x, w, **config):
    numbers = config.pop("dimension_numbers", ("NHWC", "HWIO", "NHWC"))
    strides = config.pop("strides", (1, 1))
    padding = config.pop("padding", "SAME")
    return lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=numbers, **config)


CASES = {
    "dense": (lambda w, x: x @ w, (5, 3), (4, 5)),
    "transposed": (lambda w, x: jnp.tensordot(x, w.T.reshape(3, 5), ((1,), (1,))), (5, 3), (4, 5)),
    "weight first": (lambda w, x: jnp.einsum("io,bti->obt", w, x), (5, 3), (2, 4, 5)),
    "two axes": (lambda w, x: jnp.einsum("hdo,bhd->bo", w, x), (2, 3, 6), (4, 2, 3)),
    "experts": (lambda w, x: jnp.einsum("eio,ebi->ebo", w, x), (3, 5, 2), (3, 4, 5)),
    "part": (lambda w, x: x @ w[::-1, 2:8:2], (5, 9), (4, 5)),
    "conv": (lambda w, x: conv(x, w, strides=(2, 1)), (3, 2, 4, 6), (2, 7, 6, 4)),
    "grouped": (lambda w, x: conv(x, w, feature_group_count=2), (3, 3, 2, 6), (2, 5, 6, 4)),
    "depthwise": (lambda w, x: conv(x, w, feature_group_count=4), (3, 3, 1, 8), (2, 5, 6, 4)),
    "dilated": (
        lambda w, x: conv(x, w, rhs_dilation=(2, 1), padding=((2, 1), (0, 3))),
        (3, 2, 4, 6),
        (2, 7, 6, 4),
    ),
    "upsampled": (
        lambda w, x: lax.conv_transpose(x, w, (2, 2), "SAME"),
        (3, 3, 4, 2),
        (2, 3, 4, 4),
    ),
    "NCHW": (
        lambda w, x: conv(x, w, dimension_numbers=("NCHW", "OIHW", "NCHW")),
        (6, 4, 3, 2),
        (2, 4, 5, 6),
    ),
    "1-D": (
        lambda w, x: lax.conv_general_dilated(
            x, w, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
        ),
        (3, 4, 5),
        (2, 8, 4),
    ),
}


def operand(fn, params, *inputs):
    """The activation operand of the only layer, and its result."""
    seen = {}

    def visit(tap, x, state):
        seen["x"] = x
        return x, state

    (layer,) = layers(fn, params, *inputs).layers
    out, _ = walk(fn, visit)({layer.tap.name: ()}, params, *inputs)
    return layer, seen["x"], out


@pytest.mark.parametrize("name", CASES)
def test_a_layer_is_a_product_of_matrices(name):
    fn, shape, inputs = CASES[name]
    w, x = draw(*shape), draw(*inputs, seed=1)
    layer, entering, out = operand(lambda p, x: fn(p["w"], x), {"w": w}, x)
    left, right = (np.asarray(a, np.float64) for a in (rows(layer.tap, entering), layer.take(w)[0]))
    product = np.einsum("grk,gkn->grn", left, right)
    if name == "weight first":  # a transpose follows the product
        want = np.asarray(fn(w, x)).reshape(3, -1).T[None]
        np.testing.assert_allclose(product, want, rtol=1e-4, atol=1e-5)
        return
    np.testing.assert_allclose(product, columns(layer.tap, out), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(layer.put(w, layer.take(w)), w)
    put = np.asarray(layer.put(jnp.zeros_like(w), jnp.ones(layer.index.shape)))
    assert put.sum() == layer.index.size and len(np.unique(layer.index)) == layer.index.size


def test_layers_of_scans_have_weights_for_each_trip_or_share_them():
    def fn(p, x):
        step = lambda x, w: (jnp.tanh(x @ w["own"].T) @ p["shared"], None)
        return lax.scan(step, x, p["stack"])[0]

    params = {"stack": {"own": draw(3, 4, 4)}, "shared": draw(4, 4, seed=1)}
    own, shared = layers(fn, params, draw(2, 4)).layers
    assert own.index.shape == (3, 1, 4, 4) and not own.shared
    assert shared.index.shape == (1, 1, 4, 4) and shared.shared
    second = own.take(params["stack"]["own"])[1, 0]
    np.testing.assert_array_equal(second, params["stack"]["own"][1].T)
    x = draw(2, 4, seed=2)
    found = capture(fn, params, [(x,)], layers=[own, shared])
    entering, inner = [], []
    for w in np.asarray(params["stack"]["own"], np.float64):
        entering.append(np.asarray(x, np.float64))
        inner.append(np.tanh(entering[-1] @ w.T))
        x = inner[-1] @ np.asarray(params["shared"], np.float64)
    grams = np.stack([v.T @ v for v in entering])[:, None]
    np.testing.assert_allclose(found[own.tap.name].gram, grams, rtol=1e-4, atol=1e-5)
    assert found[own.tap.name].count.tolist() == [[2], [2], [2]]
    gram = sum(v.T @ v for v in inner)
    np.testing.assert_allclose(found[shared.tap.name].gram[0, 0], gram, rtol=1e-4, atol=1e-5)
    assert found[shared.tap.name].count.tolist() == [[6]]


def test_what_is_no_view_of_a_leaf_is_refused_with_a_reason():
    def fn(p, x):
        return x @ (p["w"] * p["mask"]) @ p["plain"]

    params = {"w": draw(4, 4), "mask": jnp.ones((4, 1)), "plain": draw(4, 2)}
    found = layers(fn, params, draw(3, 4))
    assert [layer.path for layer in found.layers] == ["plain"]
    assert list(found.refused) == ["w"] and "computed from mask, w" in found.refused["w"]


def test_moments_are_those_of_all_rows():
    fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    params = {"a": draw(4, 5), "b": draw(5, 3, seed=1)}
    batches = [(draw(7, 4, seed=s),) for s in (2, 3)] + [(draw(3, 4, seed=4),)]
    chosen = layers(fn, params, *batches[0]).layers
    found = capture(fn, params, batches, layers=chosen)
    x = np.concatenate([np.asarray(b[0], np.float64) for b in batches])
    hidden = np.maximum(x @ np.asarray(params["a"], np.float64), 0)
    for name, seen in (("a", x), ("b", hidden)):
        got = found[name]
        assert got.count.tolist() == [[17]]
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
        close(got.mean[0, 0], seen.mean(0))
        close(got.mean_magnitude[0, 0], np.abs(seen).mean(0))
        close(got.largest[0, 0], np.abs(seen).max(0))
        close(got.hessian[0, 0], seen.T @ seen / 17)
    for layer, moments in stream(fn, params, batches, layers=chosen):
        np.testing.assert_array_equal(moments.gram, found[layer.tap.name].gram)
    assert capture(fn, params, batches, layers=chosen, gram=False)["a"].gram.size == 0


def test_variances_are_those_of_gram_matrices_and_do_not_cancel():
    def fn(p, x):
        h = lax.scan(lambda h, w: (jax.nn.relu(h @ w @ p["shared"]), None), x, p["stack"])[0]
        return jnp.einsum("bhi,hio->bho", h.reshape(-1, 2, 3), p["heads"])

    params = {"stack": draw(3, 6, 6), "shared": draw(6, 6, seed=2), "heads": draw(2, 3, 4, seed=1)}
    batches = [(draw(5, 6, seed=2),), (draw(3, 6, seed=3),)]
    chosen = layers(fn, params, *batches[0]).layers
    whole = capture(fn, params, batches, layers=chosen)
    cheap = capture(fn, params, batches, layers=chosen, gram=False)
    shapes = {name: moments.variance.shape for name, moments in cheap.items()}
    assert shapes == {"stack": (3, 1, 6), "shared": (1, 1, 6), "heads": (1, 2, 3)}
    for name, moments in whole.items():
        diagonal = jnp.diagonal(moments.hessian, axis1=-2, axis2=-1)
        np.testing.assert_allclose(
            cheap[name].variance + moments.mean**2, diagonal, rtol=1e-5, atol=1e-6
        )
    far = [(x + 1e4,) for (x,) in batches]
    seen = np.concatenate([np.asarray(x, np.float64) for (x,) in far])
    (layer, *_) = chosen
    variance = capture(fn, params, far, layers=[layer], gram=False)["stack"].variance
    np.testing.assert_allclose(variance[0, 0], seen.var(0), rtol=1e-3)


def test_capture_refuses_bad_data():
    fn, params = (lambda p, x: x @ p), draw(4, 2)
    chosen = layers(fn, params, draw(3, 4)).layers
    with pytest.raises(ValueError, match="data is empty"):
        capture(fn, params, [], layers=chosen)
    with pytest.raises(TypeError, match=r"tuples of inputs, \(x,\) for one"):
        capture(fn, params, [draw(3, 4)], layers=chosen)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="what enters .* holds NaN or Inf"):
        capture(fn, params, [(draw(3, 4).at[0, 0].set(jnp.nan),)], layers=chosen)


def test_biases_are_found_behind_broadcasts():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(6, (3, 3), feature_group_count=2, name="conv")(x))
            x = nn.Dense(5, use_bias=False, name="bare")(x.mean((1, 2)))
            return nn.Dense(3, name="head")(x)

    x = draw(2, 5, 5, 4)
    params = Net().init(jax.random.key(0), x)
    fn = Net().apply
    chosen = layers(fn, params, x).layers
    found = biases(fn, params, x, layers=chosen)
    assert sorted(bias.path for bias in found.values()) == ["params/conv/bias", "params/head/bias"]
    conv_bias = found["params/conv/kernel"]
    assert conv_bias.index.tolist() == [[[0, 1, 2], [3, 4, 5]]]
    shifted = jax.tree.map(lambda leaf: leaf, params)
    shifted["params"]["head"]["bias"] = shifted["params"]["head"]["bias"].at[1].add(1.0)
    delta = np.asarray(fn(shifted, x)) - np.asarray(fn(params, x))
    np.testing.assert_allclose(delta, np.tile([0.0, 1.0, 0.0], (2, 1)), atol=1e-6)


@pytest.mark.parametrize(
    "format",
    [integer(4), integer(3, symmetric=False), nf4(), mxfp4(), nvfp4(), power_of_two(4), ternary(),
     k_means(2)],
    ids=lambda f: f.name,
)  # fmt: skip
@pytest.mark.parametrize(
    "where", [{"axis": -1}, {"axis": 0, "group": 8}, {"block": (3, 5)}], ids=str
)
def test_formats_element_by_element(format, where):
    where = granularity_for(format, **where) if where.get("group") else granularity(**where)
    w = draw(12, 10)
    qparams = qparams_of(w, format, where)
    plain, opened = elementwise(format, qparams, where=where, shape=w.shape)
    want = format.fake_quant(w, qparams, where=where)
    pick = jax.random.permutation(jax.random.key(1), w.size)[:50]
    parts = jax.tree.map(lambda p: p.reshape(w.size, *p.shape[2:])[pick], opened)
    got = plain.fake_quant(w.reshape(-1)[pick], parts)
    np.testing.assert_array_equal(got, want.reshape(-1)[pick])


def test_leaves_of_a_linen_network_are_named():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.MultiHeadDotProductAttention(2, name="attention")(x, x)

    x = draw(2, 5, 8)
    params = Net().init(jax.random.key(0), x)
    found = layers(Net().apply, params, x)
    names = {layer.path.split("/")[2]: layer.index.shape for layer in found.layers}
    assert names == dict.fromkeys(("query", "key", "value", "out"), (1, 1, 8, 8))
    paths = {path for path, _ in leaves_with_paths(params)}
    assert all(layer.path in paths for layer in found.layers)
