"""Step sizes that Optax trains: their start, their gradient's scale, and why they stay positive."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcompress.formats import Integer


@jax.custom_jvp
def scale_gradient(x: Array, factor: Array | float) -> Array:
    """x itself, its gradient times `factor`, which gets none.

    >>> jax.grad(lambda x: scale_gradient(x, 0.5) * 3.0)(2.0).item()
    1.5
    """
    del factor
    return x


@scale_gradient.defjvp
def _scale_gradient_jvp(primals, tangents):
    return primals[0], tangents[0] * jnp.asarray(primals[1], tangents[0].dtype)


def positive(step: Array) -> Array:
    """|step|, and no less than the smallest normal number: whatever an optimizer made of it."""
    return jnp.maximum(jnp.abs(step), np.float32(np.finfo(np.float32).tiny))


def highest_code(bits: Any, *, signed: Any = True) -> Any:
    """Q_P: 2**(bits - 1) - 1 with a sign, 2**bits - 1 without; either may be traced."""
    if isinstance(bits, int) and isinstance(signed, bool):
        return 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    return jnp.asarray(2 ** (bits - jnp.asarray(signed, jnp.int32)) - 1, jnp.float32)


def gradient_factor(size: int, highest: Any) -> Array:
    """g = 1 / sqrt(N Q_P): keeps updates of a step in proportion to those of the weights.

    Source: Esser et al. 2019, arXiv 1902.08153, section 2.2.
    """
    return 1.0 / jnp.sqrt(jnp.asarray(max(size, 1), jnp.float32) * highest)


def first_step(mean_magnitude: Array, highest: Any) -> Array:
    """s_0 = 2 mean|v| / sqrt(Q_P), float32; 1 for a block of zeros. Source: section 2.1 there."""
    step = 2.0 * mean_magnitude.astype(jnp.float32) / jnp.sqrt(jnp.asarray(highest, jnp.float32))
    return jnp.where(mean_magnitude == 0, jnp.ones_like(step), step)


def trainable_grid(bits: Any, *, least: int = 2) -> Integer:
    """The two's complement grid of `bits` bits, which may be traced.

    Raises:
      ValueError: bits is a number outside `least` to 8.
      TypeError: bits is no integer.
    """
    if isinstance(bits, bool) or not (isinstance(bits, int) or hasattr(bits, "dtype")):
        raise TypeError(f"bits must be an integer from {least} to 8, got {bits!r}")
    if isinstance(bits, int) and not least <= bits <= 8:
        raise ValueError(f"bits must be {least} to 8, got {bits}")
    return Integer(bits, True, False)


def elements_per_scale(shape: tuple[int, ...], scale_shape: tuple[int, ...]) -> int:
    """N of `gradient_factor`."""
    return math.prod(shape) // max(math.prod(scale_shape), 1)
