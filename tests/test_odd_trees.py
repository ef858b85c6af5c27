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
    "python number": {"a": 1.0, "b": ones},
    "equinox with functions": mlp,
    "float16 at its end": {"a": jnp.full((3, 3), 6e4, jnp.float16)},
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


@pytest.mark.parametrize(
    "call, error, message",
    [
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
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
