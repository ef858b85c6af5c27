"""Where the kept elements of a `Masked` lie, in a packed file: arrays, and the end of a scheme."""

import dataclasses
from collections.abc import MutableMapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.packed import Masked, kept
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


def part_names(name: str, shape: tuple[int, ...], said: Sequence[str]) -> list[str]:
    """The names of these arrays, from what the end of a scheme said."""
    return list(_fields(name, _form(shape, said)))


def _fields(name: str, form: Positions) -> dict[str, str]:
    if isinstance(form, Bitmask):
        return {f"{name}.mask": "bits"}
    fields = ("pointers", "indices") if isinstance(form, Rows) else ("offsets",)
    return {f"{name}.mask.{field}": field for field in fields}


def _form(shape: tuple[int, ...], said: Sequence[str]) -> Positions:
    nnz, name = said if len(said) == 2 else (*said, "bitmask")
    return positions_like(name, shape, int(nnz))


def take(
    name: str,
    shape: tuple[int, ...],
    said: Sequence[str],
    arrays: MutableMapping[str, np.ndarray],
) -> Positions:
    """The positions that the end of a scheme said, with their arrays, which leave `arrays`.

    Raises:
      KeyError, ValueError: an array is missing, or not of the shape and dtype of the form.
    """
    form, found = _form(shape, said), {}
    for part, field in _fields(name, form).items():
        array, wanted = arrays.pop(part), getattr(form, field)
        if (array.shape, array.dtype) != (wanted.shape, wanted.dtype):
            raise ValueError(
                f"{part!r} should be {wanted.dtype} {wanted.shape}, "
                f"it is {array.dtype} {array.shape}"
            )
        found[field] = jnp.asarray(array)
    return dataclasses.replace(form, **found)


def check(leaf: Masked) -> None:
    """Raises ValueError unless the positions are those that `pack` of their mask gives."""
    mask = np.asarray(kept(leaf))
    if int(mask.sum()) != leaf.nnz:
        raise ValueError(f"the mask does not keep {leaf.nnz} elements")
    again = jax.tree.leaves(leaf.positions.pack(mask))
    if not all(map(np.array_equal, again, jax.tree.leaves(leaf.positions))):
        raise ValueError(f"the positions {leaf.positions.name!r} are not in order")
