"""Derivatives that learned quantizers share."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


@jax.custom_jvp
def scale_gradient(x: Array, factor: Any) -> Array:
    """x itself; its derivative is `factor`, a number that may be traced and gets none.

    >>> print(jax.grad(lambda x: 3.0 * scale_gradient(x, 0.5))(1.0))
    1.5
    """
    del factor
    return x


@scale_gradient.defjvp
def _scale_gradient_jvp(primals, tangents):
    x, factor = primals
    return x, jnp.asarray(factor, x.dtype) * tangents[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def positive(x: Array, smallest: float) -> Array:
    """max(|x|, smallest): what an optimizer sends below zero comes back on the other side.

    The derivative is the sign of x, +1 at zero, also below `smallest`: so x is never stuck there.

    >>> print(positive(jnp.array([0.5, -0.5, 0.0]), 1e-30))
    [5.e-01 5.e-01 1.e-30]
    """
    return jnp.maximum(jnp.abs(x), smallest)


@positive.defjvp
def _positive_jvp(smallest, primals, tangents):
    (x,), (dx,) = primals, tangents
    return positive(x, smallest), jnp.where(x < 0, -dx, dx)


def step_gradient_factor(count: int, largest_code: Any) -> Any:
    """1 / sqrt(N Q_P), float32: brings a step's gradient to the size of the weights'.

    Args:
      count: N, numbers that share the step.
      largest_code: Q_P; a number that may be traced.

    Source: Esser et al. 2019, Learned Step Size Quantization, arXiv 1902.08153, section 2.2.
    """
    return jax.lax.rsqrt(max(count, 1) * jnp.maximum(jnp.asarray(largest_code, jnp.float32), 1.0))
