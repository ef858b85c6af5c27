"""What a program computes of parameters alone, computed once: its value takes a leaf's place.

A shift `bias - mean * scale` or a kernel `v * g / norm(v)` is the same at every call. The value
goes into one of the leaves that it is made of, one that reaches it through operations that keep
shape and dtype; these are then left out (`edit`), and leaves that nothing else needs are gone.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.graph.edit import reachable
from jaxcompress.graph.flat import Flat
from jaxcompress.graph.flat_list import END, LOOP, carried, inline, rows
from jaxcompress.graph.layers.views import Part, is_view, parts_of


class Expression(NamedTuple):
    """A value made of parameters that activations meet, itself or views of it.

    Attributes:
      number: of the value; of a leaf, if it is one.
      paths: of the leaves that it is made of.
    """

    number: int
    paths: frozenset[str]


class Carrier(NamedTuple):
    """Elements of a leaf in which the value of an expression can lie.

    Attributes:
      path: of the leaf.
      index: [trips, *shape of the value], positions in the flattened leaf.
      skips: operation -> its operand that is given on instead.
    """

    path: str
    index: np.ndarray
    skips: Mapping[int, int]


def evaluated(
    flat: Flat, params: Any, norms: Iterable[str]
) -> tuple[Any, dict[int, int], dict[str, str]]:
    """Computes what is made of several leaves with a root or a quotient, or with a norm's leaf.

    Args:
      flat: the program.
      params: of it.
      norms: paths of leaves that are a norm's, whatever is computed with them.

    Returns:
      (params, {operation: its operand that holds its value now}, {paths of the leaves of an
      expression that stays: why}).
    """
    norms, refused = frozenset(norms), {}
    every = set() if flat.conditional else _expressions(flat)
    todo = [
        one
        for one in sorted(every)
        if len(one.paths) > 1 and (one.paths & norms or flat.is_computed(one.number))
    ]
    carriers = _Carriers(flat, params, todo)
    while True:
        # A leaf that activations meet in another way too keeps its value.
        held = frozenset[str]().union(*(one.paths for one in every.difference(todo)))
        found, failed = carriers.of(todo, held)
        if not failed:
            break
        todo = [one for one in todo if one not in failed]
        refused |= {", ".join(sorted(one.paths)): why for one, why in failed.items()}
    skips: dict[int, int] = {}
    leaves, paths = list(carriers.leaves), list(flat.paths)
    for one, (path, index, chain) in found.items():
        at = paths.index(path)
        leaf, value = jnp.asarray(leaves[at]), flat.evaluate(one.number, carriers.leaves)
        new = leaf.reshape(-1).at[index].set(jnp.broadcast_to(value, index.shape))
        leaves[at] = new.reshape(leaf.shape)
        skips |= chain
    return jax.tree.structure(params).unflatten(leaves), skips, refused


def _expressions(flat: Flat) -> set[Expression]:
    moves = lambda number: flat.values[number].origin.moves
    found = set()
    for op in flat.ops:
        if op.primitive == LOOP:  # constants and rows are met inside, if at all
            entering, inside = carried(op)
            n_carry = len(entering) - len(rows(op)[0])
            pairs = zip(entering[:n_carry], inside, strict=False)
            operands = [number for number, inner in pairs if moves(inner)]
        elif op.primitive == END:
            operands = op.operands[len(op.eqn.invars) - len(op.outputs) :]
        else:
            operands = op.operands if any(map(moves, op.outputs)) else ()
        found.update(number for number in operands if number is not None)
    met = {_source(flat, number) for number in found | flat.outputs if not moves(number)}
    return {
        Expression(number, flat.values[number].origin.params)
        for number in met
        if flat.is_made_of_params(number)
    }


def _source(flat: Flat, number: int) -> int:
    """What a value is a view of: the rows of a loop, a cast, a slice."""
    while number in flat.definition:
        op = flat.ops[flat.definition[number]]
        if op.primitive == LOOP:
            outer = dict(zip(*rows(op)[::-1], strict=True)).get(number)
        else:
            outer = op.operands[0] if is_view(op.primitive) else None
        if outer is None:
            break
        number = outer
    return number


class _Carriers:
    """Which leaf each of some expressions is put in."""

    def __init__(self, flat: Flat, params: Any, todo: Iterable[Expression]):
        self.flat, self.leaves = flat, jax.tree.leaves(params)
        parts = parts_of(flat.program, inline(flat.program, weigh=len), written=True)
        numbers = {one.number for one in todo}
        self.each = {one: self._each(one, parts, numbers - {one.number}) for one in todo}

    def of(
        self, todo: Iterable[Expression], held: frozenset[str]
    ) -> tuple[dict[Expression, Carrier], dict[Expression, str]]:
        """A carrier for each that has one, and why the others have none."""
        found, failed = {}, {}
        taken = {path: np.zeros(np.size(leaf), bool) for path, leaf in self._named()}
        skips: dict[int, int] = {}
        for one in todo:
            free = [
                c
                for c in self.each[one]
                if c.path not in held
                and not taken[c.path][c.index].any()
                and all(skips.get(at, port) == port for at, port in c.skips.items())
            ]
            if not free:
                failed[one] = self._why_not(one, held)
                continue
            found[one] = free[0]
            taken[free[0].path][free[0].index] = True
            skips.update(free[0].skips)
        return found, failed

    def _named(self) -> Iterable[tuple[str, Any]]:
        return zip(self.flat.paths, self.leaves, strict=True)

    def _each(
        self, one: Expression, parts: dict[int, Part], others: set[int]
    ) -> tuple[Carrier, ...]:
        # The nearest first.
        flat, leaves = self.flat, dict(self._named())
        try:
            trips = len(flat.evaluate(one.number, self.leaves))
        except ValueError:
            return ()
        aval, found = flat.values[one.number].aval, []
        work: list[tuple[int, dict[int, int]]] = [(one.number, {})]
        for number, chain in work:
            if number in parts:
                path, index, depth = parts[number]
                index = index.reshape(-1, *index.shape[depth:])
                once = trips in (1, len(index)) and len(np.unique(index)) == index.size
                if once and leaves[path].dtype == aval.dtype:
                    found.append(Carrier(path, index, chain))
            elif number not in others and number in flat.definition:
                at = flat.definition[number]
                work += [(n, {**chain, at: port}) for n, port in _alike(flat, at, aval)]
        return tuple(found)

    def _why_not(self, one: Expression, held: frozenset[str]) -> str:
        places = [self.flat.ops[self.flat.definition[one.number]].place]
        if not all(reachable(self.flat.program.closed, place) for place in places):
            return "it is computed inside a function that cannot be changed"
        if any(c.path in held for c in self.each[one]):
            return f"{', '.join(sorted(one.paths & held))} has another use too"
        aval = self.flat.values[one.number].aval
        return f"no leaf among them has a place for its value, {aval.str_short()}"


def _alike(flat: Flat, at: int, aval: Any) -> list[tuple[int, int]]:
    # The operands, and which, that an operation can give on in the place of its result.
    op = flat.ops[at]
    if op.primitive in (LOOP, END) or not reachable(flat.program.closed, op.place):
        return []
    if len(op.eqn.outvars) > 1:  # its other results would be gone
        return []
    same = lambda other: (other.shape, other.dtype) == (aval.shape, aval.dtype)
    return [
        (number, port)
        for port, number in enumerate(op.operands)
        if number is not None and same(flat.values[number].aval)
    ]
