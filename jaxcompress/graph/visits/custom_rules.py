"""Walks the body of a function with a derivative rule of its own; the rule stays in force."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.graph import compat


def keep_rule(
    eqn: Any,
    values: list[Any],
    states: dict[str, Any],
    run: Callable[..., tuple[list[Any], dict[str, Any]]],
) -> tuple[list[Any], dict[str, Any]]:
    """Values from `run(states, *values)`, the walked body; derivatives from the equation itself.

    The equation is evaluated as well, for its derivative rule alone: compiled without a gradient,
    that evaluation is dead code. States get no gradient; asking for one is an error.

    Raises:
      ValueError: (when differentiated) a state has a tangent.
    """
    name = f"{_rule_name(eqn)} at {compat.scope(eqn)!r}"
    ruled = compat.evaluate(eqn, values)
    states = {
        tap: jax.tree.map(partial(_constant, f"{tap!r} in {name}"), state)
        for tap, state in states.items()
    }
    seen, states = run(states, *(lax.stop_gradient(v) for v in values))
    results = [_value_of(a, b) if _is_float(a) else b for a, b in zip(ruled, seen, strict=True)]
    return results, jax.tree.map(lax.stop_gradient, states)


def _rule_name(eqn: Any) -> str:
    return f"{eqn.primitive.name} {compat.call_body(eqn).jaxpr.debug_info.func_name!r}"


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


@jax.custom_jvp
def _value_of(ruled: jax.Array, seen: jax.Array) -> jax.Array:
    del ruled
    return seen


@_value_of.defjvp
def _value_of_jvp(primals, tangents):
    return primals[1], tangents[0]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _constant(name: str, x: jax.Array) -> jax.Array:
    del name
    return x


def _constant_jvp(name, primals, tangents):
    (x,), (dx,) = primals, tangents
    if not isinstance(dx, compat.SymbolicZero):
        raise ValueError(
            f"the state of {name} cannot be differentiated: the function brings a derivative rule "
            "that knows no states; leave the tap out, or wrap the state in lax.stop_gradient"
        )
    return x, dx


_constant.defjvp(_constant_jvp, symbolic_zeros=True)
