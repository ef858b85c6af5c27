"""Dataclasses as pytrees, and what a tree weighs."""

import functools
import math
from typing import Any

import jax


def pytree(*, data: tuple[str, ...], static: tuple[str, ...]):
    """Makes a dataclass a pytree of the fields `data`."""
    return functools.partial(jax.tree_util.register_dataclass, data_fields=data, meta_fields=static)


def packed_bytes(tree: Any) -> int:
    """Exact bytes of all arrays of a tree, packed or not; shapes and dtypes suffice.

    Leaves that are no arrays (functions, Python numbers) count nothing.

    >>> packed_bytes({"w": jax.ShapeDtypeStruct((3, 5), "float32")})
    60
    """
    arrays = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")]
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in arrays)
