"""Kernels of others under names of their own: equations whose meaning somebody declared.

A Pallas kernel is a `pallas_call`, whatever it computes, and its body works on references. Where
its name was declared (`graph.declare`), its equation gets a primitive of that name, which is
evaluated, differentiated and mapped as the kernel is, so that passes find its row in the table of
primitives. A kernel that contracts becomes a `dot_general`, computed by the kernel at the shapes it
was traced at, and by JAX at others: of a network that was cut, say.
"""

import operator
from typing import Any

import jax.extend.core as jec
import jax.numpy as jnp
from jax import lax

DECLARED: dict[str, "dict[str, Any] | str"] = {}
"""Name of a kernel -> its kind, or parameters of the `dot_general` that it is."""


class _Kernel(jec.Primitive):
    """Stands for a kernel in a traced program; bound, it is the kernel again."""

    def __init__(self, name: str, eqn: Any):
        super().__init__(name)
        self.multiple_results = eqn.primitive.multiple_results
        self.original, self.params = eqn.primitive, eqn.params
        self.shapes = [tuple(v.aval.shape) for v in eqn.invars]

    def bind(self, *args: Any, **params: Any) -> Any:
        """The kernel, whose parameters are its own."""
        del params
        return self.original.bind(*args, **self.params)


class _Elementwise(_Kernel):
    """A kernel that works index by index: on smaller arrays too, which are padded."""

    def bind(self, *args: Any, **params: Any) -> Any:
        """The kernel; of operands that are smaller than it was traced for, the part asked for."""
        del params
        given = [jnp.shape(x) for x in args]
        if given == self.shapes:
            return super().bind(*args)
        fits = [
            not small or (len(small) == len(large) and all(map(operator.le, small, large)))
            for small, large in zip(given, self.shapes, strict=True)
        ]
        if not all(fits):
            raise ValueError(
                f"kernel {self.name!r} was traced for the shapes {self.shapes}, it cannot work on "
                f"{given}: trace the network at the larger shapes"
            )
        whole = [_filled(x, shape) for x, shape in zip(args, self.shapes, strict=True)]
        results = super().bind(*whole)
        largest = max(given, key=len)
        cut = lambda y: y[tuple(slice(n) for n in largest)] if largest else y.reshape(-1)[0]
        return [cut(y) for y in results] if self.multiple_results else cut(results)


def _filled(x: Any, shape: tuple[int, ...]) -> Any:
    if not jnp.shape(x):
        return jnp.broadcast_to(x, shape)
    return jnp.pad(x, [(0, n - m) for n, m in zip(shape, x.shape, strict=True)])


class _Product(_Kernel):
    """A kernel that is a `dot_general`."""

    def bind(self, *args: Any, **params: Any) -> Any:
        """The kernel; of operands of other shapes a `dot_general` with these parameters."""
        if [tuple(x.shape) for x in args] == self.shapes:
            return super().bind(*args)
        found = lax.dot_general_p.bind(*args, **params)
        return [found] if self.multiple_results else found


def name_of(eqn: Any) -> str:
    """The name of an equation's kernel, as given to `pallas_call`, else that of its function."""
    if eqn.primitive.name != "pallas_call":
        return eqn.primitive.name
    body = eqn.params["jaxpr"]
    return eqn.params.get("name") or body.debug_info.func_name.split()[0].rsplit(".", 1)[-1]


def with_declared(closed: Any) -> Any:
    """A closed jaxpr with declared kernels under their names, at any depth."""
    if not DECLARED:
        return closed
    jaxpr = _rewritten(closed.jaxpr, {})
    return closed if jaxpr is closed.jaxpr else jec.ClosedJaxpr(jaxpr, closed.consts)


def _rewritten(jaxpr: Any, seen: dict[int, Any]) -> Any:
    # The same object where nothing is declared; JAX shares jaxprs, so each is looked at once.
    if id(jaxpr) not in seen:
        eqns = [_equation(eqn, seen) for eqn in jaxpr.eqns]
        changed = any(a is not b for a, b in zip(eqns, jaxpr.eqns, strict=True))
        seen[id(jaxpr)] = jaxpr.replace(eqns=eqns) if changed else jaxpr
    return seen[id(jaxpr)]


def _equation(eqn: Any, seen: dict[int, Any]) -> Any:
    name = name_of(eqn)
    if name in DECLARED and not isinstance(eqn.primitive, _Kernel):
        product = DECLARED[name]
        if not isinstance(product, str):
            dtype = eqn.outvars[0].aval.dtype
            params = {**product, "preferred_element_type": dtype}
            return eqn.replace(primitive=_Product("dot_general", eqn), params=params)
        if name != eqn.primitive.name:
            maps = product in ("elementwise", "compare")
            return eqn.replace(primitive=(_Elementwise if maps else _Kernel)(name, eqn))
    if eqn.primitive.name == "pallas_call":
        return eqn
    params = {key: _value(x, seen) for key, x in eqn.params.items()}
    same = all(params[key] is x for key, x in eqn.params.items())
    return eqn if same else eqn.replace(params=params)


def _value(x: Any, seen: dict[int, Any]) -> Any:
    if isinstance(x, jec.ClosedJaxpr) and hasattr(x, "consts"):
        inner = _rewritten(x.jaxpr, seen)
        return x if inner is x.jaxpr else jec.ClosedJaxpr(inner, x.consts)
    if isinstance(x, jec.Jaxpr):
        return _rewritten(x, seen)
    whole: Any = x
    if type(whole) in (tuple, list):
        items = [_value(item, seen) for item in whole]
        return x if all(map(operator.is_, items, whole)) else type(whole)(items)
    return x
