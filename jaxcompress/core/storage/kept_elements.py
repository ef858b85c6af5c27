"""Where the kept elements of a `Masked` lie, in a packed file: arrays, and the end of a scheme."""

import dataclasses
from collections.abc import MutableMapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.packed import Masked
from jaxcompress.core.sparse import Bitmask, Positions, Rows, positions_like


def parts(name: str, leaf: Masked) -> dict[str, Any]:
    """The arrays of the positions of a leaf by their names in the file."""
    return {
        part: getattr(leaf.positions, field)
        for part, field in _fields(name, leaf.positions).items()
    }


def avals(name: str, shape: tuple[int, ...], nnz: int, form: str) -> dict[str, Any]:
    """Shapes and dtypes of these arrays by name, from what a scheme said.

    Raises:
      ValueError: no such form, or it does not go with the shape.
    """
    if max(shape, default=0) >= 2**31:
        raise ValueError(f"an axis of {max(shape)} elements")
    like = positions_like(form, shape, nnz)
    return {part: getattr(like, field) for part, field in _fields(name, like).items()}


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
