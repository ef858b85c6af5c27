"""A format's grids element by element: for algorithms that quantize a row or a column at a time."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxcompress.formats.granularities import Granularity
from jaxcompress.formats.scaled import Scaled


@dataclass(frozen=True)
class OpenScale:
    """Scales that are open already: what `scale.open` gave, element by element."""

    scale: Any

    def open(self, qparams: Array) -> Array:
        """The scales themselves."""
        return qparams

    def divide(self, x: Array, scale: Array) -> Array:
        """x / scale, float32."""
        return self.scale.divide(x, scale)

    def multiply(self, levels: Array, scale: Array) -> Array:
        """levels * scale, float32."""
        return self.scale.multiply(levels, scale)


def elementwise(
    format: Any, qparams: Any, *, where: Granularity, shape: tuple[int, ...]
) -> tuple[Any, Any]:
    """A format, and its arrays of `shape` (tables: [*shape, levels]), with the same grids.

    Any elements x of the array, with the same elements of these arrays as qparams, have the
    numbers `format.fake_quant(x, qparams)` that they have in the array itself.

    Args:
      format: a number format.
      qparams: its arrays for an array of `shape` with the blocks of `where`.

    Raises:
      TypeError: an array of the format has neither one entry nor one row per block.

    >>> from jaxcompress.formats import granularity, integer
    >>> rows = integer(4).qparams(jnp.float32([[-7], [-14]]), jnp.float32([[7], [14]]))
    >>> _, opened = elementwise(integer(4), rows, where=granularity(0), shape=(2, 3))
    >>> print(opened.scale)
    [[1. 1. 1.]
     [2. 2. 2.]]
    """
    scale_shape = where.scale_shape(shape)

    def spread(p: Array) -> Array:
        return jnp.broadcast_to(where.expand(p, shape), shape)

    if isinstance(format, Scaled):
        opened = format.scale.open(qparams)
        return dataclasses.replace(format, scale=OpenScale(format.scale)), spread(opened)

    def each(p: Array) -> Array:
        if p.shape == scale_shape:
            return spread(p)
        if p.shape[:-1] == scale_shape:
            return jax.vmap(spread, in_axes=-1, out_axes=-1)(p)
        raise TypeError(
            f"{format.name}: an array of shape {p.shape} is not one entry for each of the blocks "
            f"{scale_shape}; the format cannot be taken element by element"
        )

    return format, jax.tree.map(each, qparams)
