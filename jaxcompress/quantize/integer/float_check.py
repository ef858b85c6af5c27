"""Whether a program holds operations on floats."""

from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp

from jaxcompress.core.sharding.meshes import traced_anywhere
from jaxcompress.graph import compat


def float_operations(jaxpr: Any) -> list[str]:
    """The operations of a jaxpr, at any depth, that take or give floating point or complex numbers.

    >>> import jax
    >>> float_operations(jax.make_jaxpr(lambda q: (q * 2).astype(jnp.float32))(jnp.int32(1)))
    ['convert_element_type: int32[] -> float32[]']
    """
    found = []
    for eqn in compat.body(jaxpr).jaxpr.eqns:
        inner = list(compat.bodies(eqn.params))
        within = [line for body in inner for line in float_operations(body.jaxpr)]
        found.extend(within)
        types = [_types(side) for side in (eqn.invars, eqn.outvars)]
        if not within and any(_is_float(v) for v in (*eqn.invars, *eqn.outvars)):
            scope = compat.scope(eqn)
            name = f"{eqn.primitive.name} at {scope!r}" if scope else eqn.primitive.name
            found.append(f"{name}: {types[0]} -> {types[1]}")
    return found


def _is_float(v: Any) -> bool:
    return hasattr(v.aval, "dtype") and jnp.issubdtype(v.aval.dtype, jnp.inexact)


def _types(variables: Iterable[Any]) -> str:
    return ", ".join(
        f"{v.aval.dtype}{list(v.aval.shape)}" for v in variables if hasattr(v.aval, "dtype")
    )


def assert_integer_only(fn: Callable[..., Any], *args: Any) -> None:
    """Checks that no operation of `fn(*args)` takes or gives a float.

    Raises:
      ValueError: some do; the message lists the first of them.

    >>> assert_integer_only(lambda q: q + 1, jnp.int32(1))
    """
    found = float_operations(traced_anywhere(fn, *args)[0])
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError(
            f"{len(found)} operations are not of integers: {'; '.join(found[:3])}{more}"
        )
