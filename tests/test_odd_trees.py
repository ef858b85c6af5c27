"""Trees and arguments that users do pass: defined behaviour, or one clear error."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze

import jaxcompress as jc
from jaxcompress.formats import integer

mlp = eqx.nn.MLP(4, 3, 8, 2, key=jax.random.key(0))  # holds activation functions as leaves
ones = jnp.ones((3, 3))
TREES = {
    "empty": {},
    "integers": {"a": jnp.arange(3)},
    "none": {"a": None, "b": ones},
    "random key": {"key": jax.random.key(0), "b": ones},
    "frozen dict": freeze({"a": {"kernel": ones}}),
    "tuples": (ones, [jnp.ones(2)]),
    "numpy": {"a": np.ones((3, 3), np.float32)},
    "python integer": {"a": 1, "b": ones},
    "equinox with functions": mlp,
    "float16 at its end": {"a": jnp.full((3, 3), 65504, jnp.float16)},
    "float32 at its end": {"a": jnp.array([[3.4028235e38, -3.4e38]])},
    "subnormals": {"a": jnp.array([[1e-45, -3e-40]])},
    "zero size": {"a": jnp.zeros((0, 3)), "b": jnp.zeros((2, 0))},
    "all zero channel": {"a": jnp.array([[0.0, 1.0], [0.0, -2.0]])},
    "negative zero": {"a": jnp.array([[-0.0, -1e-9], [1.0, -1.0]])},
}


@pytest.mark.parametrize("name", TREES)
def test_odd_trees_go_through_a_recipe(name):
    params = TREES[name]
    recipe = jc.chain(
        jc.prune.magnitude(0.5, scope="global"), jc.quantize.weights(integer(4), axis=-1)
    )
    state = recipe.update(params, recipe.init(params))
    view, packed = recipe.apply(params, state), recipe.pack(params, state)
    assert jax.tree.structure(view) == jax.tree.structure(params)
    pairs = zip(jax.tree.leaves(jc.unpack(packed)), jax.tree.leaves(view), strict=True)
    for back, w in pairs:
        if hasattr(w, "dtype") and jnp.issubdtype(w.dtype, jnp.floating):
            assert np.asarray(back).tobytes() == np.asarray(w).tobytes()
            assert bool(jnp.all(jnp.isfinite(w)))
        else:
            assert back is w
    assert jc.packed_bytes(packed) <= jc.packed_bytes(params) + 4 * 16


def test_ranges_wider_than_the_largest_number():
    for dtype, most in ((jnp.float32, 3e38), (jnp.float16, 65504.0)):
        x = jnp.array([[most, -most, 0.0]], dtype)
        for format in (integer(8, symmetric=False), integer(5, symmetric=False), integer(6)):
            got = jc.quantize.fake_quant(x, format)
            assert bool(jnp.all(jnp.isfinite(got))) and float(got[0, 2]) == 0.0
            np.testing.assert_allclose(got[0, :2], x[0, :2], rtol=0.1)


def twins():
    """Two leaves whose paths read the same."""
    return {"a/b": ones, "a": {"b": ones}}


prune = jc.prune.magnitude(0.5)
quant = jc.quantize.weights(integer(4))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: quant.init({"s": 0.5}), TypeError, "s: a Python number is no parameter"),
        (lambda: quant.init({"s": np.ones(3)}), TypeError, "s: float64 needs jax_enable_x64"),
        (
            lambda: jc.by_path({".*": quant}).init(twins()),
            ValueError,
            "two leaves have the path 'a/b'",
        ),
        (lambda: prune.apply(ones, jc.CompressState()), ValueError, "the state holds no masks"),
        (lambda: quant.apply(ones, jc.CompressState()), ValueError, "the state holds no scales"),
        (lambda: jc.chain(prune, integer(4)), TypeError, "chain: argument 2 must be a Compressor"),  # type: ignore
        (lambda: jc.by_path({".*": integer(4)}), TypeError, "must be a Compressor.*got Integer"),  # type: ignore
        (
            lambda: jc.partition({"x": "l"}, {"l": quant}).init({"a": ones}),
            ValueError,
            "labels do not have the params' structure",
        ),
        (lambda: jc.prune.magnitude(np.float32(1.5)), ValueError, "share of zeros"),
        (lambda: jc.prune.magnitude(jnp.float32(1.5)), ValueError, "share of zeros"),
        (lambda: jc.quantize.weights(integer(4), axis="out"), TypeError, "axis must be None, an"),  # type: ignore
        (lambda: jc.formats.fixed_point(2.0, 5.0), TypeError, "integer_bits must be an integer"),  # type: ignore
        (
            lambda: jc.quantize.fake_quant(jnp.arange(3), integer(4)),
            TypeError,
            "x must be a floating point array, got int32",
        ),
        (
            lambda: quant.pack(ones.at[0, 0].set(jnp.nan), quant.init(ones)),
            ValueError,
            "an array to pack must be finite",
        ),
        (
            lambda: jax.eval_shape(
                jc.chain(quant, prune).pack, ones, jc.chain(quant, prune).init(ones)
            ),
            TypeError,
            "call it outside jit",
        ),
        (lambda: jc.quantize.weights("int8"), TypeError, "format must be a format.*parse"),  # type: ignore
        (lambda: integer(4.0), TypeError, "bits must be an integer from 1 to 8, got 4.0"),  # type: ignore
        (lambda: jc.prune.magnitude("0.5"), TypeError, "sparsity must be a number, a schedule"),
        (
            lambda: jc.distill.kd(ones, ones, temperature=0),
            ValueError,
            "temperature must be above 0",
        ),
        (
            lambda: jc.quantize.weights(integer(4), group=2.5),  # type: ignore
            ValueError,
            "group must be an integer",
        ),
        (
            lambda: jc.quantize.weights(integer(4)).apply(
                {"a": ones}, jc.quantize.weights(integer(4)).init({"b": ones})
            ),
            ValueError,
            "the state belongs to other params",
        ),
        (
            lambda: jc.export.file_size({"k": jax.random.key(0)}),
            TypeError,
            "k: only arrays of numbers can be saved",
        ),
        (
            lambda: jc.export.file_size({"a": {"b": ones}, "a/b": ones}),
            ValueError,
            "two leaves are named 'a/b'",
        ),
        (
            lambda: jc.export.file_size({"a": ones, "a/b": ones}),
            ValueError,
            "leaf 'a/b' lies below leaf 'a'",
        ),
        (
            lambda: jc.export.file_size({"__metadata__": ones}),
            ValueError,
            "the name '__metadata__' is taken",
        ),
        (
            lambda: jc.export.file_size({"a": ones}, metadata={"epoch": 3}),  # type: ignore
            TypeError,
            "metadata must be strings, got 'epoch': 3",
        ),
        (
            lambda: jc.export.file_size({"a": ones}, activations={"a": integer(8)}),  # type: ignore
            TypeError,
            "activations: 'a' must be a core.Grid",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
