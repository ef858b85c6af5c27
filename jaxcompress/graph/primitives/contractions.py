"""Products of arrays: what they sum over, and which rows of a ragged one meet which matrix.

A `dot_general` has contracted, batch and free axes. A `ragged_dot_general` has a ragged axis of its
left operand besides, which group sizes [g] cut into g parts, one after the other. Mixtures of
experts multiply so: row r of x [m, k] meets w[g] of w [g, k, n], g the part that r lies in; rows
behind the last part meet nothing and give zeros. The ragged axis may also be one that is summed
over, which gives a result for each part (the derivative by the weights), or a batch axis, which
makes it a `dot_general`: the sizes say only what the sum does not depend on.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcompress.graph import compat
from jaxcompress.graph.sites import Site

Pair = tuple[tuple[int, ...], tuple[int, ...]]
Parts = Literal["", "rows", "summed"]


class Numbers(NamedTuple):
    """The axes of a product, of the left and of the right operand.

    Attributes:
      contracted, batch: as the equation pairs them.
      free: all others, without the group axis.
      parts: what group sizes cut: "rows", each with a matrix of its own, what is "summed", or "".
      ragged: the axis of the left operand that they cut; -1 if there is none.
      group: the axis of the right operand with a matrix for each part; -1 if there is none.
    """

    contracted: Pair
    batch: Pair
    free: Pair
    parts: Parts = ""
    ragged: int = -1
    group: int = -1

    @property
    def prefix(self) -> tuple[int, ...]:
        """Axes of the left operand in front of the ragged one, which have group sizes apart."""
        among = self.contracted[0] if self.parts == "summed" else self.free[0]
        return (*self.batch[0], *among[: among.index(self.ragged)])


def numbers(primitive: str, config: Mapping[str, Any], ranks: Sequence[int]) -> Numbers:
    """The axes of a `dot_general` or `ragged_dot_general` with these parameters."""
    given, ragged, group = config.get("dimension_numbers"), -1, -1
    if primitive == compat.RAGGED:
        spec = config["ragged_dot_dimension_numbers"]
        given, (ragged,) = spec.dot_dimension_numbers, map(int, spec.lhs_ragged_dimensions)
        group = int(next(iter(spec.rhs_group_dimensions), -1))
    contracted, batch = (
        (tuple(map(int, left)), tuple(map(int, right))) for left, right in given or ()
    )
    left, right = (
        tuple(a for a in range(rank) if a not in (*contracted[k], *batch[k]))
        for k, rank in enumerate(ranks)
    )
    right = tuple(axis for axis in right if axis != group)
    parts: Parts = "rows" if group >= 0 else "summed" if ragged in contracted[0] else ""
    return Numbers(contracted, batch, (left, right), parts, ragged if parts else -1, group)


def numbers_of(eqn: Any) -> Numbers:
    """The axes of an equation."""
    ranks = [len(v.aval.shape) for v in eqn.invars[:2]]
    return numbers(eqn.primitive.name, eqn.params, ranks)


def numbers_at(site: Site) -> Numbers:
    """The axes of a site that is a product."""
    return numbers(site.primitive, site.config, [len(x.shape) for x in site.operands])


def members(found: Numbers, shape: Sequence[int], sizes: Array) -> Array:
    """Which rows lie in which part: bool [g, *batch axes, *free axes] of the left operand.

    Args:
      found: the axes of a product that cuts rows.
      shape: of the left operand.
      sizes: int [g], or [*prefix axes, g].

    >>> found = Numbers(((1,), (1,)), ((), ()), ((0,), (2,)), "rows", 0, 0)
    >>> print(members(found, (4, 8), jnp.array([1, 2])).astype(int))
    [[1 0 0 0]
     [0 1 1 0]]
    """
    prefix = found.prefix
    lead = tuple(shape[axis] for axis in prefix)
    ends = jnp.cumsum(jnp.broadcast_to(sizes, (*lead, sizes.shape[-1])), axis=-1)
    starts = ends - sizes
    row = jnp.arange(shape[found.ragged], dtype=ends.dtype)
    row = row.reshape(*(1,) * ends.ndim, -1)
    inside = (starts[..., None] <= row) & (row < ends[..., None])  # [*prefix, g, rows]
    inside = jnp.moveaxis(inside, len(prefix), 0)
    behind = found.free[0][len(prefix) - len(found.batch[0]) + 1 :]
    sized = inside.reshape(*inside.shape, *(1,) * len(behind))
    return jnp.broadcast_to(sized, (*inside.shape, *(shape[axis] for axis in behind)))


def row_taken(found: Numbers, shape: Sequence[int], sizes: Array) -> Array:
    """Which elements of the left operand lie in any part, bool broadcastable to its shape."""
    lead = tuple(shape[axis] for axis in found.prefix)
    ends = jnp.sum(jnp.broadcast_to(sizes, (*lead, sizes.shape[-1])), axis=-1, keepdims=True)
    inside = jnp.arange(shape[found.ragged], dtype=ends.dtype).reshape(*(1,) * len(lead), -1) < ends
    where = (*found.prefix, found.ragged)
    inside = jnp.transpose(inside, np.argsort(where).tolist())
    return inside.reshape([n if axis in where else 1 for axis, n in enumerate(shape)])


def multiply_accumulates(eqn: Any) -> int:
    """MACs of a product: every row meets one matrix, however many there are."""
    found, out = numbers_of(eqn), eqn.outvars[0].aval.shape
    if found.parts == "summed":  # the parts are in front, each sums over its own
        out = out[1:]
    lhs = eqn.invars[0].aval.shape
    return math.prod(out) * math.prod(lhs[axis] for axis in found.contracted[0])
