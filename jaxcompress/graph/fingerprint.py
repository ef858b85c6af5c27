"""Fingerprints of arrays and functions: equal where a result would be equal."""

import hashlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax.extend.core as jec
import numpy as np

from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.core.pytrees import host
from jaxcompress.core.sharding.meshes import traced_anywhere
from jaxcompress.graph.compat import CUSTOM, bodies, body, is_literal
from jaxcompress.graph.identity import describe

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
# Parameters of these are rules of derivatives or have no say in results: bodies say it all.
_NO_CODE = CUSTOM | {"debug_callback", "debug_print"}
_PLAIN = (bool, int, float, str, type(None), np.dtype, jec.Jaxpr, jec.ClosedJaxpr)


class Unidentified(ValueError):
    """A function runs code that has no contents to compare; its results must not be reused."""


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

    Code that runs on the host (`pure_callback`) counts with its names, numbers and arrays.

    Raises:
      Unidentified: a part of it has none to look at: an open file, a generator.
    """
    digest = hashlib.sha256()
    closed, _ = traced_anywhere(fn, *args)
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
            for place, value in _code(eqn):
                found = describe(value)
                if found.unidentified:
                    raise Unidentified(f"{place} runs {found.unidentified[0]}")
                digest.update(repr(sorted(found.rows.items())).encode())
    return digest.hexdigest()


def _code(eqn: Any) -> Iterator[tuple[str, Any]]:
    """The parameters of an equation that its text does not tell from others."""
    if eqn.primitive.name in _NO_CODE:
        return
    for name, value in eqn.params.items():
        if isinstance(value, _PLAIN):
            continue
        if callable(value) or _ADDRESS.search(str(value)):
            yield f"{eqn.primitive.name}({name})", value


def of_parts(parts: dict[str, str]) -> str:
    """SHA-256, hexadecimal, of named fingerprints."""
    return hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest()


def _add(digest: Any, name: str, leaf: Any) -> None:
    array = np.ascontiguousarray(host(leaf))
    digest.update(f"{name}:{array.dtype}{array.shape};".encode())
    digest.update(array.reshape(-1).view(np.uint8).data)
