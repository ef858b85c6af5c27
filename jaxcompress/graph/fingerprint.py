"""Fingerprints of arrays and functions: equal where a result would be equal."""

import hashlib
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.graph.compat import bodies, body, is_literal

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def of_arrays(tree: Any) -> str:
    """SHA-256, hexadecimal, of the paths, dtypes, shapes and bytes of all leaves.

    >>> of_arrays({"w": np.zeros(2)}) == of_arrays({"w": np.zeros(2)})
    True
    >>> of_arrays({"w": np.zeros(2)}) == of_arrays({"w": -np.zeros(2)})
    False
    """
    digest = hashlib.sha256()
    for path, leaf in leaves_with_paths(tree):
        _add(digest, path, leaf)
    return digest.hexdigest()


def of_function(fn: Callable[..., Any], *args: Any) -> str:
    """SHA-256, hexadecimal, of the jaxpr of fn(*args), and of the values of its constants.

    Args:
      fn: a function of arrays. Names and comments of its code do not count, what it computes does.
      args: arrays or their shapes.
    """
    digest = hashlib.sha256()
    closed = jax.make_jaxpr(fn)(*args)
    # Functions within (derivative rules) print their address, which changes with the process.
    digest.update(_ADDRESS.sub("", str(closed)).encode())
    pending = [body(closed)]
    while pending:
        jaxpr, consts = pending.pop()
        for value in consts:
            _add(digest, "constant", value)
        for eqn in jaxpr.eqns:
            for operand in eqn.invars:
                if is_literal(operand):
                    _add(digest, "literal", operand.val)
            pending.extend(bodies(eqn.params))
    return digest.hexdigest()


def of_parts(parts: dict[str, str]) -> str:
    """SHA-256, hexadecimal, of named fingerprints."""
    return hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest()


def _add(digest: Any, name: str, leaf: Any) -> None:
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = np.ascontiguousarray(leaf)
    digest.update(f"{name}:{array.dtype}{array.shape};".encode())
    digest.update(array.reshape(-1).view(np.uint8).data)
