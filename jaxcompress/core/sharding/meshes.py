"""Arrays on meshes of explicit axes: methods are written as if the compiler laid everything out.

On a mesh of `AxisType.Explicit` (what `jax.make_mesh` gives by default) the sharding of an array is
part of its type, and JAX refuses a reshape, pad or repeat whose result it cannot place by itself.
What a method does between its arguments and its results is left to the compiler here, as on a mesh
of `AxisType.Auto`; only results get types again.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import (
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    get_abstract_mesh,
    reshard,
    use_abstract_mesh,
)

from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.core.sharding.unsharded import NOWHERE, traced, unsharded


def _is_iterator(x: Any) -> bool:
    """Whether a leaf gives batches one by one: no pytree, which JAX wants to be told."""
    return isinstance(x, Iterator)


_NETWORKS = frozenset(("apply_fn", "loss_fn", "fn", "model"))  # where they are given by name


class _Axes(NamedTuple):
    mesh: Any  # Mesh, or AbstractMesh where all arrays are traced
    free: Any  # the same with automatic axes where they are explicit

    def loose(self, x: Any) -> Any:
        """An array of the mesh as one that the compiler lays out; others are left alone."""
        spec = _spec(x)
        if spec is None:
            return x
        if isinstance(x, Tracer):
            return reshard(x, PartitionSpec(*[None] * x.ndim))  # the mesh is that of the context
        return jax.device_put(x, NamedSharding(self.free, spec))

    def loose_within(self, x: Any) -> Any:
        """The same, for an iterator of batches too."""
        if not _is_iterator(x):
            return self.loose(x)
        return (jax.tree.map(self.loose, batch) for batch in x)

    def network(self, x: Any) -> Any:
        """A function that may say how arrays of the mesh are sharded as one that need not."""
        return unsharded(x, self.mesh.explicit_axes) if _is_function(x) else x

    def call(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The results of a function whose arguments `apply_fn` and the like are networks."""
        named = {k: self.network(x) if k in _NETWORKS else x for k, x in kwargs.items()}
        return function(*map(self.network, args), **named)

    def placed(self, x: Any, spec: PartitionSpec) -> Any:
        """An array laid out by the compiler as one of the mesh."""
        if not isinstance(x, jax.Array):
            return x
        put = reshard if isinstance(x, Tracer) else jax.device_put
        return put(x, NamedSharding(self.mesh, spec))


def _is_function(x: Any) -> bool:
    """Whether an argument is a network or a loss; objects of this package can be called too."""
    return callable(x) and not type(x).__module__.startswith("jaxcompress.")


def _spec(x: Any) -> PartitionSpec | None:
    """How an array of an explicit mesh is sharded; None for everything else."""
    if not isinstance(x, jax.Array):
        return None
    sharding = jax.typeof(x).sharding
    return sharding.spec if sharding.mesh.explicit_axes else None


def traced_anywhere(fn: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
    """The closed jaxpr of a network, as on one device, and its results as `ShapeDtypeStruct`s.

    Args:
      fn: a pure function; if arrays are on a mesh of explicit axes, or such a mesh is set, it may
        say how arrays are sharded. That is no part of the jaxpr.
      args: pytrees of arrays or `ShapeDtypeStruct`s.
    """
    axes = _axes(args)
    mesh = get_abstract_mesh() if axes is None else axes.mesh
    return traced(fn, *args, axes=mesh.explicit_axes)


def _axes(tree: Any) -> _Axes | None:
    """The mesh with explicit axes on which arrays of a tree lie; None if none does."""
    mesh = None
    for x in jax.tree.leaves(tree, is_leaf=_is_iterator):
        if _spec(x) is None:
            continue
        if not isinstance(x, Tracer):  # its mesh has devices
            return _Axes(x.sharding.mesh, _free(x.sharding.mesh))
        mesh = jax.typeof(x).sharding.mesh
    return None if mesh is None else _Axes(mesh, _free(mesh))


@functools.cache
def _free(mesh: Any) -> Any:
    automatic = {name: AxisType.Auto for name in mesh.explicit_axes}
    if not isinstance(mesh, Mesh):
        return mesh.update_axis_types(automatic)
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return Mesh(
        mesh.devices, mesh.axis_names, axis_types=tuple(automatic.get(n, t) for n, t in types)
    )


def on_any_mesh(
    function: Callable[..., Any], like: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """The function, made to run on arguments of explicit meshes too; on others it stays as it is.

    Inside, axes are automatic, in eager calls and under `jit`, `grad` and `vmap` alike, and what a
    network among the arguments says of shardings is left out. Under `jit` arrays of one mesh are
    expected.

    Args:
      function: any function of pytrees; what it computes must not depend on how arrays lie.
      like: (*arguments) -> a tree of the structure of the results, whose arrays say how these are
        sharded. None: a result is sharded like the array of the arguments that has its shape and
        whose path is part of its own (the mask at `masks/dense/kernel`, say, like the weight
        `dense/kernel`); any other lies as the compiler chose, whole on every device under `jit`.

    >>> double = on_any_mesh(lambda tree: {"twice": jax.tree.map(lambda x: 2 * x, tree)})
    >>> double({"w": 1.0})
    {'twice': {'w': 2.0}}
    """

    @functools.wraps(function)
    def run(*args, **kwargs):
        axes = _axes((args, kwargs))
        if axes is None:
            return function(*args, **kwargs)
        abstract = axes.free.abstract_mesh if isinstance(axes.free, Mesh) else axes.free
        with use_abstract_mesh(abstract):
            positional, named = jax.tree.map(
                axes.loose_within, (args, kwargs), is_leaf=_is_iterator
            )
            out = axes.call(function, positional, named)
        leaves, treedef = jax.tree.flatten(out)
        if like is not None:
            specs = [_spec(x) or PartitionSpec() for x in treedef.flatten_up_to(like(*args))]
        else:
            specs = _specs(out, (args, kwargs))
        return treedef.unflatten(map(axes.placed, leaves, specs))

    return run


def _specs(results: Any, arguments: tuple[Any, Any]) -> list[PartitionSpec]:
    positional, named = arguments
    known = [
        (f"/{path}/", x.shape, spec)
        for tree in (*positional, *named.values())
        for path, x in leaves_with_paths(tree, _is_iterator)
        if (spec := _spec(x)) is not None
    ]

    def spec_of(path, x):
        within = [
            (len(p), s)
            for p, shape, s in known
            if shape == getattr(x, "shape", None) and (p == "//" or p in f"/{path}/")
        ]
        if within:
            return max(within, key=lambda pair: pair[0])[1]
        found = None if isinstance(x, Tracer) else getattr(x, "sharding", None)
        return found.spec if isinstance(found, NamedSharding) else PartitionSpec()

    return [spec_of(path, x) for path, x in leaves_with_paths(results)]


def on_one_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, run on copies of the arrays of explicit meshes that no mesh holds.

    A network among the positional arguments may say how arrays are sharded.
    """

    def whole(x):
        return x if _spec(x) is None else jnp.asarray(np.asarray(x))

    @functools.wraps(function)
    def run(*args, **kwargs):
        axes = _axes((args, kwargs))
        mesh = get_abstract_mesh() if axes is None else axes.mesh
        if not mesh.explicit_axes:
            return function(*args, **kwargs)
        args, kwargs = jax.tree.map(whole, (args, kwargs), is_leaf=_is_iterator)
        with use_abstract_mesh(NOWHERE):
            return _Axes(mesh, mesh).call(function, args, kwargs)

    return run


def automatic(tree: Any) -> Any:
    """The tree with arrays of explicit meshes on the same meshes with automatic axes, as they lie.

    What functions among its leaves say of shardings is left out.

    >>> automatic({"w": 1.0})
    {'w': 1.0}
    """
    axes = _axes(tree)
    return tree if axes is None else jax.tree.map(lambda x: axes.network(axes.loose(x)), tree)


def shardings_at_rest(tree: Any) -> tuple[NamedSharding, ...] | None:
    """How each array of a tree on a mesh is sharded, each sharding written in one way.

    Two that mean the same compile a program twice if one ends in `None`. Arrays on no mesh yet
    are whole on every device of that of the others. None if no array is on a mesh, or one is
    traced or on another mesh.
    """
    leaves = jax.tree.leaves(tree)
    found = [getattr(x, "sharding", None) for x in leaves if not isinstance(x, Tracer)]
    meshes = {s.mesh for s in found if isinstance(s, NamedSharding)}
    if len(meshes) != 1 or len(found) < len(leaves):
        return None
    (mesh,) = meshes

    def written(x: Any, sharding: Any) -> NamedSharding:
        spec = [*sharding.spec] if isinstance(sharding, NamedSharding) else []
        if mesh.explicit_axes:
            spec += [None] * (x.ndim - len(spec))
        else:
            while spec and spec[-1] is None:
                spec.pop()
        return NamedSharding(mesh, PartitionSpec(*spec))

    return tuple(map(written, leaves, found))
