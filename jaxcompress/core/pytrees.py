"""Dataclasses as pytrees, and what a tree weighs."""

import functools
import math
from typing import Any

import jax
import numpy as np


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


def host(array: Any) -> np.ndarray:
    """The values of an array, wherever its parts lie; keys of random numbers as their data.

    Parts on devices of other processes are gathered: every process must call this alike then, for
    the same arrays in the same order, and each of them gets all values.
    """
    if not isinstance(array, jax.Array):
        return np.asarray(array)
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    with jax.transfer_guard("allow"):
        if array.is_fully_addressable:
            return np.asarray(array)
        if array.is_fully_replicated:
            return np.asarray(array.addressable_data(0))
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
