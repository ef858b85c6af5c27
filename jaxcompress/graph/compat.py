"""All that depends on JAX internals or differs between JAX versions, in one place.

Seen to work from JAX 0.8 to 0.12. What changed in between: an open and a closed jaxpr became one
class, and `scan` describes its operands by `ft_in` instead of `num_consts` and `num_carry`.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jec
import numpy as np
from jax.api_util import debug_info
from jax.custom_derivatives import SymbolicZero as SymbolicZero
from jax.interpreters import partial_eval

DOT, CONV, RAGGED = "dot_general", "conv_general_dilated", "ragged_dot_general"
JIT = frozenset({"jit", "pjit"})
CALL = frozenset({"closed_call", "core_call", "core_closed_call"})
REMAT = frozenset({"remat2", "checkpoint", "remat"})
CUSTOM = frozenset({"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"})

_WRAPPED = re.compile(r"\b(?:jvp|transpose|vmap|pmap|remat|checkpoint|rematted_computation)\(")


class Body(NamedTuple):
    """A sub-jaxpr and the values of its constants."""

    jaxpr: Any  # with .constvars, .invars, .outvars, .eqns
    consts: tuple[Any, ...]


def body(jaxpr: Any) -> Body:
    """The body of an open or closed jaxpr."""
    return Body(getattr(jaxpr, "jaxpr", jaxpr), tuple(getattr(jaxpr, "consts", ())))


def bodies(params: Mapping[str, Any]) -> Iterator[Body]:
    """All jaxprs among the parameters of an equation, at any depth of tuples, lists and dicts."""
    for value in params.values():
        if isinstance(value, jec.Jaxpr | jec.ClosedJaxpr):
            yield body(value)
        elif isinstance(value, tuple | list):
            yield from bodies({str(i): item for i, item in enumerate(value)})
        elif isinstance(value, dict):
            yield from bodies(value)


def without_dead_code(closed: Any) -> Any:
    """A closed jaxpr without the equations that no result needs, at any depth; same arguments."""
    jaxpr, _ = partial_eval.dce_jaxpr(
        closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True
    )
    return jec.ClosedJaxpr(jaxpr, closed.consts)


def needed_inputs(closed: Any) -> list[bool]:
    """Which arguments of a closed jaxpr some result needs."""
    outs = [True] * len(closed.jaxpr.outvars)
    return list(partial_eval.dce_jaxpr(closed.jaxpr, outs, instantiate=False)[1])


def on_needed(closed: Any, values: Sequence[Any]) -> list[Any]:
    """The results of a closed jaxpr; arguments that no result needs may be anything."""
    outs = [True] * len(closed.jaxpr.outvars)
    jaxpr, used = partial_eval.dce_jaxpr(closed.jaxpr, outs, instantiate=False)
    given = [x for x, needed in zip(values, used, strict=True) if needed]
    return jec.jaxpr_as_fun(jec.ClosedJaxpr(jaxpr, closed.consts))(*given)


def skipping(closed: Any, skips: Mapping[tuple[int, ...], tuple[str, int]]) -> Any:
    """A closed jaxpr in which some equations give an operand on instead: place -> (_, operand)."""
    return jec.ClosedJaxpr(_skipping(closed.jaxpr, skips, ()), closed.consts)


def _skipping(jaxpr: Any, skips: Mapping[tuple[int, ...], Any], place: tuple[int, ...]) -> Any:
    same: dict[Any, Any] = {}
    read = lambda v: v if isinstance(v, jec.Literal) else same.get(v, v)
    eqns = []
    for number, eqn in enumerate(jaxpr.eqns):
        here = (*place, number)
        if here in skips:
            same[eqn.outvars[0]] = read(eqn.invars[skips[here][1]])
            continue
        eqn = eqn.replace(invars=[read(v) for v in eqn.invars])
        if any(key[: len(here)] == here for key in skips):
            key = next(k for k, v in eqn.params.items() if hasattr(v, "eqns"))
            inner = eqn.params[key]
            new = _skipping(body(inner).jaxpr, skips, (*here, 0))
            closed = isinstance(inner, jec.ClosedJaxpr) and hasattr(inner, "consts")
            new = jec.ClosedJaxpr(new, inner.consts) if closed else new
            eqn = eqn.replace(params={**eqn.params, key: new})
        eqns.append(eqn)
    return jaxpr.replace(eqns=eqns, outvars=[read(v) for v in jaxpr.outvars])


def is_literal(v: Any) -> bool:
    """Whether an operand is a number in the jaxpr itself, not a variable."""
    return isinstance(v, jec.Literal)


def call_body(eqn: Any) -> Body:
    """The one jaxpr of an equation that is a call: jit, remat, custom_jvp, custom_vjp."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if key in eqn.params:
            return body(eqn.params[key])
    raise ValueError(
        f"{eqn.primitive.name} in JAX {jax.__version__} has no known jaxpr among its parameters "
        f"{sorted(eqn.params)}"
    )


def linear_solve(eqn: Any) -> tuple[int, Body, slice]:
    """Of a `custom_linear_solve`: the number and the jaxpr of its solver, its constants' operands.

    The number counts the jaxprs that `bodies` gives; the right-hand sides are the other arguments.
    """
    lengths, jaxprs = eqn.params["const_lengths"], eqn.params["jaxprs"]
    before = jaxprs._fields[: jaxprs._fields.index("solve")]
    number = sum(getattr(jaxprs, name) is not None for name in before)
    start = sum(getattr(lengths, name) for name in before)
    return number, body(jaxprs.solve), slice(start, start + lengths.solve)


def scan_sizes(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many the carry."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = (len(group) for group in params["ft_in"].unpack())
    return consts, carry


def jit_options(params: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `jax.jit` that matter for an equation inside a program: its shardings.

    One more operand (the states) comes first, and one more result last.
    """
    options: dict[str, Any] = {}
    ins = _shardings(params.get("in_shardings", ()))
    outs = _shardings(params.get("out_shardings", ()))
    if any(s is not None for s in ins):
        options["in_shardings"] = (None, *ins)
    if any(s is not None for s in outs):
        options["out_shardings"] = (list(outs), None)
    return options


def _shardings(given: Any) -> tuple[Any, ...]:
    return tuple(s if isinstance(s, jax.sharding.Sharding) else None for s in given)


def remat_options(params: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `jax.checkpoint` that an equation was made with; states come first."""
    prevent_cse = params["prevent_cse"]
    if isinstance(prevent_cse, tuple):
        prevent_cse = (True, *prevent_cse)
    return {"prevent_cse": prevent_cse, "policy": params["policy"]}


def scope(eqn: Any) -> str:
    """The name stack of an equation within its own jaxpr, without transform names.

    >>> strip("transpose(jvp(Net))/vmap(Dense_0)")
    'Net/Dense_0'
    """
    return strip(str(eqn.source_info.name_stack))


def strip(stack: str) -> str:
    """Drops `jvp(...)`, `transpose(...)`, `vmap(...)` and the like around names."""
    while match := _WRAPPED.search(stack):
        depth, end = 1, match.end()
        while end < len(stack) and depth:
            depth += {"(": 1, ")": -1}.get(stack[end], 0)
            end += 1
        inner = stack[match.end() : end - (depth == 0)]
        stack = stack[: match.start()] + inner + stack[end:]
    return "/".join(part for part in stack.split("/") if part)


@contextlib.contextmanager
def surroundings(eqn: Any) -> Iterator[None]:
    """Names and settings (compute type, metadata) under which an equation was traced."""
    with contextlib.ExitStack() as stack:
        for part in scope(eqn).split("/"):
            if part:
                stack.enter_context(jax.named_scope(part))
        stack.enter_context(eqn.ctx.manager)
        yield


def evaluate(eqn: Any, values: list[Any]) -> list[Any]:
    """One equation on values, by the public evaluator: its own derivative rules stay in force."""
    # One variable per operand: an array that is used twice may have been changed in one place.
    operands = [v if isinstance(v, jec.Literal) else jec.Var(v.aval) for v in eqn.invars]
    variables = [v for v in operands if not isinstance(v, jec.Literal)]
    given = [x for v, x in zip(operands, values, strict=True) if not isinstance(v, jec.Literal)]
    one = eqn.replace(invars=operands)
    info = debug_info(
        "walk", lambda *xs: xs, given, {}, result_paths_thunk=lambda: ("",) * len(eqn.outvars)
    )
    jaxpr = jec.Jaxpr([], variables, list(eqn.outvars), [one], eqn.effects, info)
    return jec.jaxpr_as_fun(jec.ClosedJaxpr(jaxpr, []))(*given)


def with_literal(eqn: Any, operand: int, value: Any) -> Any:
    """An equation with another number in the place of a number."""
    operands = list(eqn.invars)
    old = operands[operand]
    operands[operand] = jec.Literal(np.asarray(value, old.aval.dtype), old.aval)
    return eqn.replace(invars=operands)


def with_shapes(
    eqn: Any,
    in_shapes: Sequence[tuple[int, ...]],
    out_shapes: Sequence[tuple[int, ...]],
    *,
    params: Mapping[str, Any],
) -> Any:
    """An equation on arrays of other shapes; `params` are its parameters, which may name them."""

    def reshaped(v, shape):
        if isinstance(v, jec.Literal) or getattr(v.aval, "shape", shape) == shape:
            return v
        return jec.Var(v.aval.update(shape=shape))

    return eqn.replace(
        invars=[reshaped(v, n) for v, n in zip(eqn.invars, in_shapes, strict=True)],
        outvars=[reshaped(v, n) for v, n in zip(eqn.outvars, out_shapes, strict=True)],
        params=dict(params),
    )


def composite(eqn: Any) -> tuple[str, dict[str, Any]]:
    """Name and attributes of a `composite` operation; arrays are NumPy arrays."""
    attributes = {}
    for name, leaves, treedef in eqn.params["attributes"]:
        # An array is wrapped, so that it can be hashed.
        attributes[name] = jax.tree.unflatten(treedef, [getattr(x, "val", x) for x in leaves])
    return eqn.params["name"], attributes


def as_function(closed: Any) -> Any:
    """A closed jaxpr as a function of its arguments that returns a list."""
    return jec.jaxpr_as_fun(closed)


def dimension(size: Any, symbols: Mapping[str, Any]) -> Any:
    """A symbolic size of `jax.export`, an expression of named dimensions, with their values.

    Values may be anything with `+ - * // %`, also from the right.
    """
    return size._evaluate(dict(symbols))


def at_most(a: Any, b: Any) -> bool:
    """Whether a <= b; of symbolic sizes, whether it holds for all values of their names.

    >>> (batch,) = jax.export.symbolic_shape("batch")
    >>> at_most(8, 8 * batch), at_most(8 * batch, 8), at_most(batch, 3)
    (True, False, False)
    """
    try:
        return bool(a <= b)
    except jax.errors.InconclusiveDimensionOperation:
        return False
