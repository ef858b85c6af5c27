"""The quartet: init, apply, update, pack; and the lift from one array to a tree."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.core.sharding.meshes import on_any_mesh

Params = Any
Packed = Any


@jax.tree_util.register_static
@dataclass(frozen=True)
class Maker:
    """What made a state, where its arrays do not say it: the format of its scales.

    A part of the tree's structure, no leaf: it costs nothing and is never traced.
    """

    name: str


class CompressState(NamedTuple):
    """State of a Compressor; what is absent is `()`."""

    learned: Any = ()  # float leaves that Optax trains beside the params
    buffers: Any = ()  # masks, scales, counters, statistics; only `update` changes them
    maker: Any = ()  # a `Maker`, or a container of them, as `learned` is; another one is refused


class Compressor(NamedTuple):
    """A compression method as four pure functions; params are any pytree, one array included.

    Attributes:
      init: params -> state.
      apply: (params, state) -> the view that the forward pass sees: same structure, shapes and
        dtypes, differentiable (straight-through where it rounds).
      update: (params, state, *, grads=None, **extra) -> state with the same avals; refreshes
        masks, scales and statistics, and never touches `learned`.
      pack: (params, state) -> the same tree with `QTensor` and `Masked` leaves: what ships.

    The laws that every Compressor obeys are those of tests/test_laws.py; the second one is
    `unpack(pack(params, state)) == apply(params, state)`, bit for bit.
    """

    init: Callable[[Params], CompressState]
    apply: Callable[[Params, CompressState], Params]
    update: Callable[..., CompressState]
    pack: Callable[[Params, CompressState], Packed]

    def __copy__(self) -> "Compressor":
        return self

    def __deepcopy__(self, memo: Any) -> "Compressor":
        return self  # as functions are

    def __reduce_ex__(self, protocol: Any) -> Any:
        closures = [name for name, f in self._asdict().items() if "<" in _qualified(f)]
        if closures and not _stores_closures(sys._getframe(1)):
            raise TypeError(
                f"a Compressor cannot be pickled: {', '.join(closures)} are functions inside "
                "functions, which pickle does not store. Give the worker a function of a module "
                "that builds it from its settings; params, states and packed trees can be pickled"
            )
        return object.__reduce_ex__(self, protocol)


def _qualified(function: Any) -> str:
    return getattr(function, "__qualname__", "<>")


def _stores_closures(frame: Any) -> bool:
    # cloudpickle and dill call the same method as pickle, but store functions by their code.
    while frame is not None:
        if frame.f_globals.get("__name__", "").split(".")[0] in ("cloudpickle", "dill"):
            return True
        frame = frame.f_back
    return False


def quartet(
    init: Callable[[Params], CompressState],
    apply: Callable[[Params, CompressState], Params],
    update: Callable[..., CompressState],
    pack: Callable[[Params, CompressState], Packed],
) -> Compressor:
    """A `Compressor` of functions that need not care for meshes.

    Where arrays lie on a mesh with explicit axes the compiler places what is between arguments and
    results (`meshes.on_any_mesh`). Views are sharded like the params, new states like the old.
    """
    return Compressor(
        on_any_mesh(init),
        on_any_mesh(apply, like=lambda params, state: params),
        on_any_mesh(update, like=lambda params, state: state),
        on_any_mesh(pack),
    )


def is_float_array(x: Any) -> bool:
    """Whether x is an array (or its shape) of floating point numbers: what methods act on."""
    return hasattr(x, "dtype") and hasattr(x, "shape") and jnp.issubdtype(x.dtype, jnp.floating)


def holds(check: Callable[[Any], Any], x: Any) -> bool:
    """Whether check(x) is true of every element; true of what is traced or has no values.

    Works for a constant inside somebody's `jit` or `scan` too, where operations are traced.
    """
    if isinstance(x, Tracer | jax.ShapeDtypeStruct):
        return True
    with jax.ensure_compile_time_eval():
        return bool(jnp.all(check(x)))


def is_absent(state: Any) -> bool:
    """Whether a part of a state is the absent state `()`."""
    return type(state) is tuple and not state


def absent_if_empty(parts: Any) -> Any:
    """`()` for a container that holds no array and no `Maker` at all, else the container."""
    return parts if jax.tree.leaves(parts, is_leaf=lambda x: isinstance(x, Maker)) else ()


@contextmanager
def at_path(path: str) -> Iterator[None]:
    """Puts the path of the leaf in front of the message of a ValueError or TypeError."""
    try:
        yield
    except (ValueError, TypeError) as error:
        if not path or type(error) not in (ValueError, TypeError):
            raise
        raise type(error)(f"{path}: {error}") from error


def identity() -> Compressor:
    """Leaves everything as it is.

    >>> identity().apply({"w": 1.0}, CompressState())
    {'w': 1.0}
    """

    def update(params, state, *, grads=None, **extra):
        del params, grads, extra
        return state

    return Compressor(
        lambda params: CompressState(),
        lambda params, state: params,
        update,
        lambda params, state: params,
    )


def per_leaf(
    init: Callable[[Any], CompressState],
    apply: Callable[[Any, CompressState], Any],
    *,
    update: Callable[..., CompressState] | None = None,
    pack: Callable[[Any, CompressState], Any] | None = None,
    maker: str | None = None,
) -> Compressor:
    """Lifts functions of one array to every floating point leaf of a tree; others pass unchanged.

    Args:
      init: w -> CompressState of the leaf.
      apply: (w, state) -> view of w.
      update: (w, state, *, grads=None, **extra) -> state; default: the state stays.
      pack: (w, state) -> packed leaf; default: the view as an array.
      maker: what a state is made for, where its arrays do not say it (a format): states carry it,
        and one that was made for something else is refused.

    The tree's `learned` and `buffers` have the params' structure with each leaf replaced by its
    own state. Errors of the four functions are raised again with the leaf's path in front.

    >>> halve = per_leaf(lambda w: CompressState(), lambda w, s: w / 2)
    >>> params = {"w": jnp.ones(2), "steps": jnp.array(3)}
    >>> print(halve.apply(params, halve.init(params)))
    {'steps': Array(3, dtype=int32, weak_type=True), 'w': Array([0.5, 0.5], dtype=float32)}
    """

    def leaf_init(w, state, grad):
        del state, grad
        return init(w)

    own = () if maker is None else Maker(maker)

    def run(function, params, state=None, grads=None):
        treedef = jax.tree.structure(params)
        if state is not None:
            _refuse_other(own, state.maker)
        states = split_state(treedef, state) if state is not None else [None] * treedef.num_leaves
        gradients = [None] * treedef.num_leaves if grads is None else treedef.flatten_up_to(grads)
        results = []
        for (path, w), s, g in zip(leaves_with_paths(params), states, gradients, strict=True):
            with at_path(path):
                results.append(function(w, s, g) if is_float_array(w) else None)
        return treedef, results

    def tree_init(params):
        for path, w in leaves_with_paths(params):
            with at_path(path):
                _refuse(w)
        treedef, states = run(leaf_init, params)
        return join_state(treedef, states)._replace(maker=own)

    def tree_apply(params, state):
        treedef, views = run(lambda w, s, g: apply(w, s), params, state)
        return _replace(treedef, params, views)

    def tree_update(params, state, *, grads=None, **extra):
        renew = update
        if renew is None:
            _refuse_other(own, state.maker)
            return state
        treedef, states = run(lambda w, s, g: renew(w, s, grads=g, **extra), params, state, grads)
        return join_state(treedef, states)._replace(maker=state.maker)

    def tree_pack(params, state):
        treedef, packed = run(lambda w, s, g: (pack or apply)(w, s), params, state)
        return _replace(treedef, params, packed)

    return quartet(tree_init, tree_apply, tree_update, tree_pack)


def _refuse_other(own: Any, found: Any) -> None:
    # A state that was put together by hand has no maker, and is taken as it is.
    if isinstance(own, Maker) and not is_absent(found) and found != own:
        there = found.name if isinstance(found, Maker) else found
        raise ValueError(
            f"the state was made for {there}, this compressor stores {own.name}: "
            "take the compressor that made it, or a new state of `init`"
        )


def _refuse(w: Any) -> None:
    # What jit would turn into something else than the eager functions see.
    if isinstance(w, float):
        raise TypeError(f"a Python number is no parameter; give an array, jnp.asarray({w})")
    if isinstance(w, np.ndarray) and jax.dtypes.canonicalize_dtype(w.dtype) != w.dtype:
        raise TypeError(f"{w.dtype} needs jax_enable_x64; or give the array as float32")


def _replace(treedef, params, results):
    leaves = jax.tree.leaves(params)
    return treedef.unflatten([w if r is None else r for w, r in zip(leaves, results, strict=True)])


def state_leaves(treedef, part: Any) -> list[Any]:
    """What a part of a state holds for each leaf of the params.

    Raises:
      ValueError: it does not have the params' structure.
    """
    try:
        return treedef.flatten_up_to(part)
    except ValueError as error:
        raise ValueError(
            f"the state belongs to other params, init makes one for these: {error}"
        ) from error


def split_state(treedef, state: CompressState) -> list[CompressState]:
    """The states of the leaves, in flatten order."""

    def rows(part):
        return [()] * treedef.num_leaves if is_absent(part) else state_leaves(treedef, part)

    return [
        CompressState(*parts)
        for parts in zip(rows(state.learned), rows(state.buffers), strict=True)
    ]


def join_state(treedef, states: list[CompressState | None]) -> CompressState:
    """The state of a tree from those of its leaves (None: a leaf without state)."""
    full = [s or CompressState() for s in states]
    return CompressState(
        absent_if_empty(treedef.unflatten([s.learned for s in full])),
        absent_if_empty(treedef.unflatten([s.buffers for s in full])),
    )
