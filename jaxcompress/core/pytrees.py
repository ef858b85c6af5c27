"""Dataclasses as pytrees, and what a tree weighs."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def pytree(*, data: tuple[str, ...], static: tuple[str, ...]):
    """Makes a dataclass a pytree of the fields `data`."""
    return functools.partial(jax.tree_util.register_dataclass, data_fields=data, meta_fields=static)


def stored_bits(dtype: Any) -> int:
    """Bits of a number where arrays are stored: 4 of an `int4`, which takes a byte in NumPy.

    >>> stored_bits("int4"), stored_bits("uint2"), stored_bits("float32")
    (4, 2, 32)
    """
    dtype = jnp.dtype(dtype)
    if dtype.itemsize > 1 or dtype == jnp.bool_:
        return 8 * dtype.itemsize
    is_integer = jnp.issubdtype(dtype, jnp.integer)
    return (jnp.iinfo(dtype) if is_integer else jnp.finfo(dtype)).bits


def is_nibbles(dtype: Any) -> bool:
    """Whether a dtype is of integers of less than a byte, several of which share one in files.

    >>> is_nibbles("uint4"), is_nibbles("int8")
    (True, False)
    """
    return jnp.issubdtype(dtype, jnp.integer) and stored_bits(dtype) < 8


def packed_bytes(tree: Any) -> int:
    """Exact bytes of all arrays of a tree, packed or not; shapes and dtypes suffice.

    Numbers of less than a byte are packed, leaf by leaf. Leaves that are no arrays (functions,
    Python numbers) count nothing.

    >>> packed_bytes({"w": jax.ShapeDtypeStruct((3, 5), "float32")})
    60
    >>> packed_bytes({"w": jax.ShapeDtypeStruct((3, 5), "int4")})
    8
    """
    arrays = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")]
    return sum(_stored_bytes(leaf) for leaf in arrays)


def _stored_bytes(leaf: Any) -> int:
    size = math.prod(leaf.shape)
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
        return size * leaf.dtype.itemsize
    return -(-size * stored_bits(leaf.dtype) // 8)


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
