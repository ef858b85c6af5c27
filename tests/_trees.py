"""Trees of parameters that tests share."""

import jax
import jax.numpy as jnp
import numpy as np


def small_tree(dtype=jnp.float32, seed=0):
    """A dense kernel, a convolution with channels that are all zero, a bias, a scalar, counters."""
    rng = np.random.default_rng(seed)
    conv = rng.normal(size=(3, 3, 4, 8))
    conv[..., 2] = 0.0
    return {
        "dense": {
            "kernel": jnp.asarray(rng.normal(size=(24, 16)), dtype),
            "bias": jnp.asarray(rng.normal(size=(16,)), dtype),
        },
        "conv": {"kernel": jnp.asarray(conv, dtype)},
        "empty": jnp.zeros((0, 4), dtype),
        "scalar": jnp.asarray(0.7, dtype),
        "steps": jnp.arange(3, dtype=jnp.int32),
    }


def bits_equal(a, b) -> bool:
    """Whether two trees have the same structure, dtypes and bits (so -0.0 is not 0.0)."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(
        x.dtype == y.dtype
        and x.shape == y.shape
        and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in pairs
    )


def avals(tree):
    """Shapes and dtypes of a tree."""
    return jax.tree.map(lambda x: (tuple(x.shape), jnp.dtype(x.dtype)), tree)
