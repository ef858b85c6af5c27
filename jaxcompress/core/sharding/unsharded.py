"""Networks that say how their arrays are sharded, as if they did not.

On a mesh of explicit axes a network may say `out_sharding=` and `reshard`. What it computes does
not depend on that, but JAX refuses both where axes are automatic or there is no mesh, and a type
that is sharded means work to everyone who reads the program. So it is traced on a mesh of the same
axes, each of size 1, on which no type is sharded; what is left of the shardings is taken out.
"""

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend.core as jec
import jax.numpy as jnp
import numpy as np
from jax.extend.linear_util import wrap_init
from jax.sharding import (
    AbstractMesh,
    AxisType,
    NamedSharding,
    Sharding,
    get_abstract_mesh,
    use_abstract_mesh,
)

from jaxcompress.core.kernels import with_declared

_RULES = frozenset(("jvp_jaxpr_fun", "fwd_jaxpr_thunk"))
_IDENTITIES = frozenset(("reshard", "sharding_constraint", "mesh_cast"))
_ARRAYS = jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct
NOWHERE = AbstractMesh((), ())
"""The mesh without axes."""


def unsharded(fn: Callable[..., Any], axes: tuple[str, ...]) -> Callable[..., Any]:
    """`fn` for arrays anywhere: its `reshard`s and `out_sharding`s are identities.

    Args:
      fn: a pure function of pytrees; what is no array in its arguments is handed on as it is.
      axes: names of the axes of the meshes that it may name, in a `PartitionSpec`. The function
        must hold no array of such a mesh, nor name one (`NamedSharding`).

    >>> from jax.sharding import PartitionSpec, reshard
    >>> fn = unsharded(lambda x: 2 * reshard(x, PartitionSpec("d")), ("d",))
    >>> jax.make_jaxpr(fn)(jnp.ones(3))
    { lambda ; a:f32[3]. let b:f32[3] = mul 2.0:f32[] a in (b,) }
    """

    @functools.wraps(fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        leaves, treedef = jax.tree.flatten((args, kwargs))
        at = [i for i, x in enumerate(leaves) if isinstance(x, _ARRAYS)]

        def of_arrays(*arrays: Any) -> Any:
            filled = dict(enumerate(leaves)) | dict(zip(at, arrays, strict=True))
            positional, named = treedef.unflatten([filled[i] for i in range(len(leaves))])
            return fn(*positional, **named)

        arrays = [leaves[i] for i in at]
        closed, out = traced(of_arrays, *arrays, axes=axes)
        return jax.tree.unflatten(jax.tree.structure(out), jec.jaxpr_as_fun(closed)(*arrays))

    return run


def traced(fn: Callable[..., Any], *args: Any, axes: tuple[str, ...] = ()) -> tuple[Any, Any]:
    """The closed jaxpr of a network without shardings, and its results as `ShapeDtypeStruct`s.

    Kernels that were declared have their names in it.

    Args:
      fn: a pure function.
      args: pytrees of arrays or `ShapeDtypeStruct`s.
      axes: names of explicit axes that the network may name. Empty: it is traced where it is
        called, and only constraints of the layout are taken out.
    """
    if not axes:
        closed, out = jax.make_jaxpr(fn, return_shape=True)(*args)
        return with_declared(without_shardings(closed)), out
    plain = jax.tree.map(_plain, args)
    with _of_size_one(axes):
        closed, out = jax.make_jaxpr(fn, return_shape=True)(*plain)
    return with_declared(without_shardings(closed, axes=axes)), jax.tree.map(_plain, out)


@contextlib.contextmanager
def _of_size_one(axes: tuple[str, ...]) -> Iterator[None]:
    ones = AbstractMesh((1,) * len(axes), axes, axis_types=(AxisType.Explicit,) * len(axes))
    # JAX goes from one mesh to another of other size by way of none alone.
    with use_abstract_mesh(NOWHERE), use_abstract_mesh(ones):
        with jax.remove_size_one_mesh_axis_from_type(True):
            yield


def _plain(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(
        jnp.shape(x), jax.dtypes.result_type(x), weak_type=getattr(x, "weak_type", False)
    )


def without_shardings(closed: Any, axes: tuple[str, ...] = ()) -> Any:
    """A closed jaxpr without what says where arrays lie, at any depth; `axes` as in `traced`."""
    here = get_abstract_mesh()
    jaxpr = _Rewriting(NOWHERE if here.explicit_axes else here, axes).jaxpr(closed.jaxpr)
    return closed if jaxpr is closed.jaxpr else jec.ClosedJaxpr(jaxpr, closed.consts)


class _Rewriting:
    """Jaxprs are shared and large: each is looked at once, and stays where nothing is found."""

    def __init__(self, mesh: AbstractMesh, axes: tuple[str, ...]):
        self.mesh = mesh  # under which the equations are evaluated
        self.axes = axes  # of the mesh on which they were traced
        self.seen: dict[int, tuple[Any, Any]] = {}  # id -> what it is of, kept alive, and the new

    def once(self, x: Any, rewrite: Callable[[Any], Any]) -> Any:
        if id(x) not in self.seen:
            self.seen[id(x)] = x, rewrite(x)
        return self.seen[id(x)][1]

    def jaxpr(self, jaxpr: Any) -> Any:
        """The jaxpr, rewritten; the same object if there is nothing to rewrite."""
        return self.once(jaxpr, self._jaxpr)

    def _jaxpr(self, jaxpr: Any) -> Any:
        known: dict[Any, Any] = {}

        def new(variables):
            return [v if isinstance(v, jec.Literal) else known.setdefault(v, v) for v in variables]

        for v in (*jaxpr.constvars, *jaxpr.invars):
            known[v] = _unplaced(v)
        eqns = []
        for eqn in jaxpr.eqns:
            if eqn.primitive.name in _IDENTITIES:
                (known[eqn.outvars[0]],) = new(eqn.invars)
                continue
            known.update((v, _unplaced(v)) for v in eqn.outvars)
            eqns.append(self._equation(eqn, new(eqn.invars), new(eqn.outvars)))
        if all(v is w for v, w in known.items()) and all(map(operator.is_, eqns, jaxpr.eqns)):
            return jaxpr
        constants, inputs, results = map(new, (jaxpr.constvars, jaxpr.invars, jaxpr.outvars))
        return jaxpr.replace(constvars=constants, invars=inputs, eqns=eqns, outvars=results)

    def _equation(self, eqn: Any, inputs: list[Any], outputs: list[Any]) -> Any:
        params = {key: self._value(key, x) for key, x in eqn.params.items()}
        context = self.once(eqn.ctx, self._context)
        same = all(params[key] is x for key, x in eqn.params.items()) and context is eqn.ctx
        if same and all(map(operator.is_, (*inputs, *outputs), (*eqn.invars, *eqn.outvars))):
            return eqn
        return eqn.replace(invars=inputs, outvars=outputs, params=params, ctx=context)

    def _value(self, key: str, x: Any) -> Any:
        """A parameter of an equation; the same object if nothing in it says where arrays lie."""
        if isinstance(x, jec.ClosedJaxpr) and hasattr(x, "consts"):
            inner = self.jaxpr(x.jaxpr)
            return x if inner is x.jaxpr else jec.ClosedJaxpr(inner, x.consts)
        if isinstance(x, jec.Jaxpr):
            return self.jaxpr(x)
        if key in _RULES and self.axes:
            return self._rule(x)
        if key == "bwd" and self.axes:
            return wrap_init(self._backward(x), debug_info=x.debug_info)
        whole: Any = x
        if key in ("in_shardings", "out_shardings"):
            named = any(isinstance(s, Sharding) for s in whole)
            return _of_jit()[key] * len(whole) if named else x
        if isinstance(x, NamedSharding) or (key == "ctx_mesh" and whole.explicit_axes):
            return None if isinstance(x, NamedSharding) else _of_jit()[key]
        if type(whole) in (tuple, list):
            kind: Any = type(whole)
            items = [self._value("", item) for item in whole]
            return x if all(map(operator.is_, items, whole)) else kind(items)
        return x

    def _rule(self, rule: Any) -> Any:
        """What traces a derivative rule when it is needed: in the surroundings of the function."""

        def run(*zeros: Any) -> tuple[Any, ...]:
            with _of_size_one(self.axes):
                jaxpr, *rest = rule.call_wrapped(*zeros)
            return self.jaxpr(jaxpr), *rest

        return wrap_init(functools.cache(run), debug_info=rule.debug_info)

    def _backward(self, rule: Any) -> Callable[..., Any]:
        """The backward half of a `custom_vjp`, whose results are arrays or symbolic zeros."""

        def run(*args: Any) -> Any:
            kept: list[Any] = []

            def arrays(*args: Any) -> list[Any]:
                results, treedef = jax.tree.flatten(rule.call_wrapped(*args))
                zeros = [None if isinstance(x, jax.Array) else x for x in results]
                kept[:] = treedef, zeros
                return [x for x in results if isinstance(x, jax.Array)]

            found = iter(unsharded(arrays, self.axes)(*args))
            treedef, zeros = kept
            place = lambda z: type(z)(z.aval.update(sharding=None))
            return treedef.unflatten([next(found) if z is None else place(z) for z in zeros])

        return run

    def _context(self, context: Any) -> Any:
        mesh = getattr(context, "cur_abstract_mesh", None)
        if mesh is None or not mesh.explicit_axes:
            return context
        with context.manager, use_abstract_mesh(NOWHERE), use_abstract_mesh(self.mesh):
            with jax.remove_size_one_mesh_axis_from_type(False):
                return jax.make_jaxpr(operator.neg)(1.0).eqns[0].ctx


def _unplaced(v: Any) -> Any:
    """A variable whose type names no axis of a mesh; the same where it names none."""
    sharding = getattr(v.aval, "sharding", None)
    if sharding is None or not sharding.mesh.explicit_axes or hasattr(v.aval, "inner_aval"):
        return v
    return jec.Var(v.aval.update(sharding=None))


@functools.cache
def _of_jit() -> dict[str, Any]:
    """Parameters of a call of `jit` that says nothing of where arrays lie."""
    with use_abstract_mesh(NOWHERE):
        return jax.make_jaxpr(jax.jit(operator.neg))(1.0).eqns[0].params
