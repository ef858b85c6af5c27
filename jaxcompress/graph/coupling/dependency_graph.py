"""Which dimensions of which parameters belong together, read off the program."""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import jax

from jaxcompress.graph import compat
from jaxcompress.graph.coupling.axis_shapes import shape
from jaxcompress.graph.coupling.found import Axes, Cuttable, Group, frozen_of, members_of, names_of
from jaxcompress.graph.coupling.masked_constants import Constant
from jaxcompress.graph.coupling.scopes import Follower, fixed, is_float
from jaxcompress.graph.coupling.terms import Atom, freeze, fresh
from jaxcompress.graph.coupling.zero_rules import Value, within
from jaxcompress.graph.coupling.zeros import Zeroes
from jaxcompress.graph.sites import shape_dtype
from jaxcompress.graph.tracing import trace_program


def axes(fn: Callable[..., Any], params: Any, *inputs: Any) -> Axes:
    """Finds the dimensions of `params` that can only be removed together.

    Every axis of every value is followed through the program; axes that an operation ties become
    one group. Axes of inputs and results are frozen, and so is what a primitive without a rule
    touches: there may be fewer groups than possible, never a wrong one. Layers of a scan over
    stacked parameters are groups too, of another kind: a layer whose parameters are all zero must
    pass on what it is given, as residual blocks do. Nothing is computed.

    Args:
      fn: a pure function, as it runs in inference.
      params: pytree of arrays or `jax.ShapeDtypeStruct`s; running statistics belong to it.
      *inputs: pytrees of the same.

    Raises:
      ValueError: a leaf of `params` is no array, or two leaves have one path.

    Source: Fang et al., DepGraph: Towards Any Structural Pruning (2023),
    https://arxiv.org/abs/2301.12900, whose groups these are, found without rules for layers.

    >>> import jax.numpy as jnp
    >>> params = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 2))}
    >>> found = axes(lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"], params, jnp.ones((3, 4)))
    >>> [(group.name, group.size, len(group.members)) for group in found.groups.values()]
    [('up[1]', 8, 2)]
    """
    traced = trace_program(fn, params, *inputs, dead_code=False)
    paths = list(traced.graph.params)
    variables = traced.closed.jaxpr.invars
    ins = [fixed(shape(v)) for v in variables[: len(paths)]]
    ins += [[fresh(n) for n in shape(v)] for v in variables[len(paths) :]]
    for terms in ins[len(paths) :]:
        for axis, term in enumerate(terms):
            freeze(term, "an input", rigid=axis > 0)
    follower = Follower()
    scope = follower.scope(compat.body(traced.closed), ins)
    for terms in scope.outs:
        for term in terms:
            freeze(term, "a result", rigid=False)
    leaves = dict(zip(paths, ins, strict=False))
    members = members_of(leaves)
    program = Cuttable(
        traced=traced,
        scope=scope,
        params=jax.tree.unflatten(jax.tree.structure(params), list(traced.graph.params.values())),
        inputs=jax.tree.map(shape_dtype, inputs),
        leaves=MappingProxyType(leaves),
        atoms=MappingProxyType(names_of(members, leaves)),
    )
    zeroes = follow_zeros(program, {path: within(terms) for path, terms in leaves.items()})
    every = {
        name: Group(
            name,
            atom.size,
            tuple(members[atom]),
            zeroes.reasons.get(atom, ""),
            zeroes.sums.get(atom, ""),
        )
        for name, atom in program.atoms.items()
    }
    stacks = {name for name, atom in program.atoms.items() if atom.stack}
    return Axes(
        groups=MappingProxyType({n: group for n, group in every.items() if n not in stacks}),
        layers=MappingProxyType({n: group for n, group in every.items() if n in stacks}),
        frozen=frozen_of(leaves),
        unknown=tuple(follower.unknown),
        program=program,
    )


def leaks(
    axes: Axes, masked: Mapping[str, Iterable[str]], follows: Iterable[str] = ()
) -> dict[str, str]:
    """Why removing a channel is not the same as masking it in some parameters only.

    Args:
      axes: what `axes` found.
      masked: path of a parameter -> names of the groups of which a channel is masked in it.
      follows: paths of parameters that go with their channel whatever they are, such as biases.

    Returns:
      Name of a group -> the reason; a group that is not there leaves no trace.
    """
    named = axes.program.atoms
    zeros = {path: frozenset(named[name] for name in names) for path, names in masked.items()}
    reasons = follow_zeros(axes.program, zeros, follows).reasons
    return {name: reasons[atom] for name, atom in named.items() if atom in reasons}


def follow_zeros(
    program: Cuttable, masked: Mapping[str, Iterable[Atom]], follows: Iterable[str] = ()
) -> Zeroes:
    """Follows zeros from parameters that are zero wherever the index of an atom is masked."""
    zeroes = Zeroes(program.atoms.values())
    follows, marks = frozenset(follows), zeroes.marks
    start = []
    for (path, terms), v in zip(
        program.leaves.items(), program.traced.closed.jaxpr.invars, strict=False
    ):
        # A mask says nothing of integers.
        gone = marks.every & within(terms) & frozenset(masked.get(path, ())) if is_float(v) else ()
        flags = frozenset({marks.follows} if path in follows else ())
        start.append(Value(dict.fromkeys(gone, Constant(0, path)), flags))
    zeroes.scope(program.scope, [*start, *[Value()] * (len(program.scope.ins) - len(start))])
    return zeroes
