"""Evaluates a function whose values grow beyond their dtype: every array has its own exponent.

An array is value * 2^exponent, its largest value near 1. Products add exponents, sums align them,
and what is homogeneous of degree 1 (views, relu, pooling) leaves them alone: the numbers are those
of floats without an upper end, and so are their gradients. Any other operation, and the body of a
loop or a branch, is evaluated on plain numbers.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jec
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxcompress.graph import compat
from jaxcompress.graph.evaluate import Evaluator
from jaxcompress.graph.interpret import CALLS
from jaxcompress.graph.primitives import degree_of, row

_ZERO = -(1 << 20)  # the exponent of zeros: lower than that of anything they are added to


class Scaled(NamedTuple):
    """value * 2^exponent."""

    value: Array  # [...] floats
    exponent: Array  # int32 []


def evaluate(closed: Any, values: Sequence[Any]) -> list[Any]:
    """The results of a closed jaxpr; those that are floats as `Scaled`.

    >>> closed = jax.make_jaxpr(lambda x: x * x * x)(jnp.float32(2.0))
    >>> (cube,) = evaluate(closed, [jnp.float32(2.0**50)])
    >>> print(cube.value, cube.exponent)
    1.0 150
    """
    return _Exponents().run(compat.body(closed), [_scaled(x) for x in values])


def total(parts: Sequence[Any]) -> Scaled:
    """The sum of all elements of the `Scaled` parts, float32."""
    sums = [Scaled(jnp.sum(x.value.astype(jnp.float32)), x.exponent) for x in parts]
    values, exponent = _aligned(sums)
    return _normal(jnp.sum(jnp.stack(values)), exponent)


class _Exponents(Evaluator):
    def enters(self, eqn: Any, at: Any) -> bool:
        name = eqn.primitive.name
        if name in compat.CUSTOM:
            return _has_rules(compat.call_body(eqn))
        return name in CALLS

    def literal(self, v: Any) -> Any:
        with jax.ensure_compile_time_eval():
            return _scaled(np.asarray(v.val, v.aval.dtype))

    def constant(self, v: Any, x: Any) -> Any:
        return _scaled(x)

    def equation(self, eqn: Any, values: list[Any], at: Any) -> Sequence[Any]:
        meaning, degree = row(eqn.primitive.name), degree_of(eqn)
        floats = [x for x in values if isinstance(x, Scaled)]
        several = len(meaning.factors) > 1
        if not floats or not _has_rule(eqn) or (several and len(floats) < 2):
            return [_scaled(y) for y in compat.evaluate(eqn, [_plain(x) for x in values])]
        if several:  # a product: [a, b] or [a, b, sizes of groups]
            pairs = zip(floats, meaning.factors, strict=True)
            terms = (x.exponent if factor > 0 else -x.exponent for x, factor in pairs)
            return _results(eqn, values, functools.reduce(jnp.add, terms))
        assert degree is not None
        if degree not in (0, 1):
            return _power(eqn, floats[0], degree)
        if meaning.elementwise and degree == 1 and len(values) == 1:
            (value,) = _values(eqn, values)  # as large as before
            return [Scaled(value, floats[0].exponent)]
        scaled, exponent = _aligned(floats)
        again = iter(scaled)
        aligned = [next(again) if isinstance(x, Scaled) else x for x in values]
        return _results(eqn, aligned, jnp.int32(0) if degree == 0 else exponent)


def _has_rule(eqn: Any) -> bool:
    # What makes integers of numbers, a cast say, needs the numbers.
    meaning, degree = row(eqn.primitive.name), degree_of(eqn)
    if degree is None or meaning.kind in ("opaque", "sort"):
        return False
    if degree != int(degree) and abs(degree) != 0.5:
        return False
    return degree == 0 or all(_wide(v.aval) for v in eqn.outvars)


def _has_rules(body: compat.Body) -> bool:
    # Whether all inside is known here: then the derivative of the body is that of its rule, as of
    # relu. Any other function with a rule of its own keeps it.
    return all(
        _has_rules(compat.call_body(eqn)) if eqn.primitive.name in CALLS else _has_rule(eqn)
        for eqn in body.jaxpr.eqns
    )


def _power(eqn: Any, x: Scaled, degree: float) -> list[Any]:
    if degree == int(degree):
        return _results(eqn, [x], int(degree) * x.exponent)
    odd = x.exponent % 2  # (value 2^odd)^(1/2) 2^((exponent - odd) / 2)
    half = (x.exponent - odd) // 2
    value = x.value * _two_to(odd, x.value.dtype)
    return _results(eqn, [value], half if degree > 0 else -half)


def _results(eqn: Any, operands: list[Any], exponent: Array) -> list[Any]:
    return [_normal(y, exponent) if _wide(y) else y for y in _values(eqn, operands)]


def _values(eqn: Any, operands: list[Any]) -> list[Any]:
    values = [x.value if isinstance(x, Scaled) else x for x in operands]
    # Numbers in the program itself are scaled like others, so they become operands.
    return compat.evaluate(eqn.replace(invars=[jec.Var(v.aval) for v in eqn.invars]), values)


def _scaled(x: Any) -> Any:
    x = jnp.asarray(x) if _wide(x) else x
    return _normal(x, jnp.int32(0)) if _wide(x) else x


def _wide(x: Any) -> bool:
    # float8 has no room for sums of numbers near 1.
    return jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize > 1


def _normal(value: Array, exponent: Array) -> Scaled:
    largest = lax.stop_gradient(jnp.max(jnp.abs(value), initial=0.0)).astype(jnp.float32)
    bits = lax.bitcast_convert_type(largest, jnp.int32)
    # the exponent of float32, 0 where there is none to take
    shift = jnp.where((largest > 0) & jnp.isfinite(largest), (bits >> 23) - 127, 0)
    exponent = jnp.where(largest == 0, _ZERO, exponent + shift)
    return Scaled(value * _two_to(-shift, value.dtype), exponent)


def _aligned(parts: Sequence[Scaled]) -> tuple[list[Array], Array]:
    top = functools.reduce(jnp.maximum, [x.exponent for x in parts])
    if len(parts) == 1:
        return [parts[0].value], top
    return [x.value * _two_to(x.exponent - top, x.value.dtype) for x in parts], top


def _plain(x: Any) -> Any:
    if not isinstance(x, Scaled):
        return x
    # in two steps: the exponent of a number near 1 may be twice what a float can say
    first = jnp.clip(x.exponent, -126, 127)
    return x.value * _two_to(first, x.value.dtype) * _two_to(x.exponent - first, x.value.dtype)


def _two_to(k: Array, dtype: Any) -> Array:
    # 2^k, exactly; 0 below the normal numbers
    bits = (jnp.clip(k, -127, 127) + 127) << 23
    return lax.bitcast_convert_type(bits, jnp.float32).astype(dtype)
