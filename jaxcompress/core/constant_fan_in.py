"""Matrix products with a constant fan-in: a gather of inputs instead of products with zeros."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from jaxcompress.core.packed import Masked, kept, unpack
from jaxcompress.core.sparse import Groups


class Condensed(NamedTuple):
    """A matrix [n_in, outputs] of which each output keeps the same number of inputs."""

    values: Array  # [outputs, fan_in]
    inputs: Array  # int32 [outputs, fan_in], ascending


def condense(leaf: Masked) -> Condensed:
    """The kept values of a leaf with a constant fan-in, and the inputs that they meet.

    The last axis numbers the outputs, the others, taken as one, the inputs (a convolution's taps
    and channels meet patches). Codes become values of the leaf's dtype. Works under `jit` if the
    positions are stored as groups of inputs, for then the fan-in is known.

    Raises:
      TypeError: the leaf is not a `Masked`, or under `jit` its positions are stored otherwise.
      ValueError: the outputs do not all keep the same number of inputs.
    """
    if not isinstance(leaf, Masked):
        raise TypeError(f"a constant fan-in needs a Masked leaf, got {type(leaf).__name__}")
    inputs = _by_output(leaf).columns()
    matrix = unpack(leaf).reshape(math.prod(leaf.shape[:-1]), leaf.shape[-1])
    return Condensed(jnp.take_along_axis(matrix.T, inputs, axis=1), inputs)


def _by_output(leaf: Masked) -> Groups:
    along, name = tuple(range(len(leaf.shape) - 1)), leaf.positions.name
    if isinstance(leaf.positions, Groups) and leaf.positions.along == along:
        return leaf.positions
    if any(isinstance(array, Tracer) for array in jax.tree.leaves(leaf.positions)):
        raise TypeError(f"positions stored as {name!r} say no fan-in: call condense outside jit")
    outputs, n_in = leaf.shape[-1], math.prod(leaf.shape[:-1])
    mask = np.asarray(kept(leaf))
    form = Groups.like(leaf.shape, leaf.nnz // max(outputs, 1), n_in, along=along)
    if not form.fits(mask):
        each = mask.reshape(n_in, outputs).sum(axis=0)
        raise ValueError(
            f"no constant fan-in: the outputs keep {each.min()} to {each.max()} inputs"
        )
    return form.pack(mask)


def condensed_matmul(x: Array, leaf: Masked | Condensed) -> Array:
    """x @ w for a w with a constant fan-in: fan_in products per output, not n_in.

    Equal to the product with `unpack(leaf)` up to the order of the sum. It gathers
    batch * outputs * fan_in elements; a dense product is often faster for all that.

    Args:
      x: [..., n_in], of the leaf's dtype.
      leaf: a `Masked`, or what `condense` gave for it.

    Returns:
      [..., outputs].

    Raises:
      TypeError, ValueError: as `condense`, or x has not n_in columns.

    Source: the condensed representation of "Dynamic Sparse Training with Structured Sparsity",
    https://arxiv.org/abs/2305.02299

    >>> w = Condensed(jnp.array([[2.0], [3.0]]), jnp.array([[2], [0]]))
    >>> print(condensed_matmul(jnp.array([1.0, 10.0, 100.0]), w))
    [200.   3.]
    """
    if isinstance(leaf, Masked) and x.shape[-1:] != (n_in := math.prod(leaf.shape[:-1]),):
        raise ValueError(f"x must be [..., {n_in}] for a leaf of shape {leaf.shape}, got {x.shape}")
    values, inputs = condense(leaf) if isinstance(leaf, Masked) else leaf
    # y_o = sum_k v_ok x_(i_ok)
    return jnp.einsum("...ok,ok->...o", x[..., inputs], values)
