"""Where the kept elements of a `Masked` lie, in a packed file: arrays, and the end of a scheme."""

import dataclasses
from collections.abc import MutableMapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.packed import Masked
from jaxcompress.core.sparse import Bitmask, Positions, Rows, positions_like


def scheme(leaf: Masked) -> str:
    """`nnz`, and `|form` where that is no bitmask."""
    plain = isinstance(leaf.positions, Bitmask)
    return f"{leaf.nnz}" if plain else f"{leaf.nnz}|{leaf.positions.name}"


def parts(name: str, leaf: Masked) -> dict[str, Any]:
    """The arrays of the positions of a leaf by their names in the file."""
    return {
        part: getattr(leaf.positions, field)
        for part, field in _fields(name, leaf.positions).items()
    }


def part_names(name: str, shape: tuple[int, ...], nnz: int, form: str) -> list[str]:
    """The names of these arrays, from what a scheme said."""
    return list(_fields(name, positions_like(form, shape, nnz)))


def _fields(name: str, form: Positions) -> dict[str, str]:
    if isinstance(form, Bitmask):
        return {f"{name}.mask": "bits"}
    fields = ("pointers", "indices") if isinstance(form, Rows) else ("offsets",)
    return {f"{name}.mask.{field}": field for field in fields}


def take(
    name: str, shape: tuple[int, ...], nnz: int, form: str, arrays: MutableMapping[str, np.ndarray]
) -> Positions:
    """The positions that a scheme said, with their arrays, which leave `arrays`.

    Raises:
      KeyError, ValueError: an array is missing, or not of the shape and dtype of the form; no axis
        of it could be counted in 32 bits; or the arrays are not those of `nnz` kept elements.
    """
    if max(shape, default=0) >= 2**31:
        raise ValueError(f"an axis of {max(shape)} elements")
    like, found = positions_like(form, shape, nnz), {}
    for part, field in _fields(name, like).items():
        array, wanted = arrays.pop(part), getattr(like, field)
        if (array.shape, array.dtype) != (wanted.shape, wanted.dtype):
            raise ValueError(
                f"{part!r} should be {wanted.dtype} {wanted.shape}, "
                f"it is {array.dtype} {array.shape}"
            )
        found[field] = array
    host = dataclasses.replace(like, **found)
    if not host.in_order(nnz):
        raise ValueError(f"the positions {form!r} are not in order, or not {nnz}")
    return jax.tree.map(jnp.asarray, host)
