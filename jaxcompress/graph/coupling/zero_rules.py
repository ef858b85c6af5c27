"""What results of a primitive are where masks make its operands a number; else they are unknown."""

import collections
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxcompress.graph import compat
from jaxcompress.graph.coupling.axis_shapes import Terms, shape
from jaxcompress.graph.coupling.masked_constants import (
    Constant,
    Known,
    Place,
    combined,
    joined,
    times,
)
from jaxcompress.graph.coupling.scopes import Step
from jaxcompress.graph.coupling.terms import Atom, atoms, size
from jaxcompress.graph.primitives import Pad, Spread, moved, row
from jaxcompress.graph.primitives.contractions import numbers_of

ZERO = Constant(0)


class Value(NamedTuple):
    """What is known of a value.

    Attributes:
      at: atom -> what the value is wherever its index is masked.
      flags: marks that say something else of it.
    """

    at: Mapping[Atom, Constant] = MappingProxyType({})
    flags: frozenset[Atom] = frozenset()

    def zero(self, atom: Atom) -> bool:
        """Whether it is 0 where the index is masked."""
        return atom in self.at and self.at[atom].zero


def within(terms: Terms) -> frozenset[Atom]:
    """All atoms of a value."""
    return frozenset(atom for term in terms for atom in atoms(term))


@dataclass(frozen=True)
class Marks:
    """Atoms of interest, and those that stand for no axis.

    Attributes:
      every: all atoms of interest.
      everywhere: a value is the same number at all indices.
      follows: with this one a value is made of what goes with its channel.
      carried: with one of these it is that carry of a scan.
    """

    every: frozenset[Atom]
    everywhere: Atom
    follows: Atom
    carried: tuple[Atom, ...] = ()

    def value(self, at: Mapping[Atom, Known], every: Known = None) -> Value:
        """What is known by atom and everywhere; a number that holds everywhere stands alone."""
        known = {atom: c for atom, c in at.items() if c is not None}
        if every is not None and all(c.same(every) for c in known.values()):
            known = {self.everywhere: every}
        return Value(known)

    def of(self, value: Value, terms: Terms, atom: Atom) -> Known:
        """What a value with these axes is where the index is masked."""
        if atom in value.at and atom in within(terms):
            return value.at[atom]
        return value.at.get(self.everywhere)


class Given(NamedTuple):
    """An equation and what is known of its operands."""

    step: Step
    values: Sequence[Value]
    marks: Marks
    scope: str

    @property
    def place(self) -> Place:
        """For messages."""
        return Place(self.step.eqn.primitive.name, self.scope)

    def along(self, out: Terms, rule: Callable[[int, Atom], Known]) -> Value:
        """The result from a rule (axis, atom) -> what it is at that index of that axis.

        An atom on two axes, as in x[:, None] + x[None, :], must give the same along both.
        """
        found: dict[Atom, Known] = {}
        for atom in self.marks.every & within(out):
            axes = [axis for axis, term in enumerate(out) if atom in atoms(term)]
            found[atom] = joined([rule(axis, atom) for axis in axes])
        return Value({atom: c for atom, c in found.items() if c is not None})

    def every(self) -> list[Known]:
        """What the operands are everywhere."""
        return [value.at.get(self.marks.everywhere) for value in self.values]


def results_of(given: Given) -> list[Value]:
    """The results of an equation without contractions, reductions and calls."""
    eqn, outs = given.step.eqn, given.step.outs
    meaning = row(eqn.primitive.name)
    if meaning.kind == "identity":
        return [Value(value.at) for value in given.values]
    bits = len(eqn.invars) == 1 and shape(eqn.invars[0]) != shape(eqn.outvars[0])
    if meaning.elementwise and not bits:
        return [_elementwise(given)]
    if meaning.kind == "index":
        return [_indexed(given, out) for out in outs]
    if meaning.kind == "move":
        (steps, *_) = [result.steps for result in moved(eqn) or []]
        if any(isinstance(step, Pad) for step in steps):
            return [_pad(given)]
        if any(isinstance(step, Spread) for step in steps):
            return [_spread(given)]
    if meaning.stays == "undefined":
        return [_undefined(given, out) for out in outs]
    return [_moved(given, meaning.stays)] * len(outs)


def _adds(eqn: Any) -> bool:
    # add, sub and the like
    meaning = row(eqn.primitive.name)
    two = meaning.kind == "elementwise" and len(eqn.invars) == 2
    return two and meaning.linear and meaning.degree == 1


def _elementwise(given: Given) -> Value:
    step, values, marks, scope = given
    out, eqn = step.outs[0], step.eqn

    def at(axis: int, atom: Atom) -> Known:
        known, spare = [], []
        for i, (value, terms) in enumerate(zip(values, step.ins, strict=True)):
            here = len(terms) == len(out) and atom in atoms(terms[axis])
            c = value.at.get(atom) if here else None
            known.append(c or value.at.get(marks.everywhere))
            if known[-1] is None and here and marks.follows in value.flags:
                spare.append(i)
        if spare and _adds(eqn) and all(c is None or c.zero for c in known):
            # What goes with its channel counts as masked where it is added to a zero.
            known = [ZERO if i in spare else c for i, c in enumerate(known)]
        return combined(eqn, known, scope)

    return marks.value(given.along(out, at).at, combined(eqn, given.every(), scope))


def _joined(given: Given, operands: Iterable[int], *, silent: bool) -> Value:
    # An operand without the atom has nothing to say about it, if silent.
    pairs = [(given.values[i], given.step.ins[i]) for i in operands]
    found: dict[Atom, Known] = {}
    for atom in given.marks.every & frozenset().union(*(within(terms) for _, terms in pairs)):
        here = [pair for pair in pairs if not silent or atom in within(pair[1])]
        found[atom] = joined([given.marks.of(value, terms, atom) for value, terms in here])
    every = joined([value.at.get(given.marks.everywhere) for value, _ in pairs])
    return given.marks.value(found, every)


def _moved(given: Given, stays: str) -> Value:
    value = _joined(given, range(len(given.step.ins)), silent=True)
    if stays == "any":
        return value
    keep = _STAYS[stays]
    return Value({atom: c for atom, c in value.at.items() if c.undefined or keep(given, c)})


def _indexed(given: Given, out: Terms) -> Value:
    name = given.step.eqn.primitive.name
    if name == "dynamic_update_slice":
        return _joined(given, range(2), silent=False)
    if len(given.step.ins[0]) and row(name).stays == "any" and name != "scatter":
        return _joined(given, range(1), silent=True)
    return _undefined(given, out)


def _covered(given: Given, c: Constant) -> bool:
    # Whether no window of a maximum lies in the padding alone.
    del c
    p = given.step.eqn.params
    sizes = zip(p["window_dimensions"], p["window_dilation"], p["padding"], strict=True)
    plain = all(n == 1 for n in p["base_dilation"])
    return plain and all(max(pads) < (n - 1) * d + 1 for n, d, pads in sizes)


_STAYS: dict[str, Callable[[Given, Constant], bool]] = {
    "zero": lambda given, c: c.zero,
    "unit": lambda given, c: c.value in (0, 1),
    "covered": _covered,
}


def _spread(given: Given) -> Value:
    (value, *_), (terms, *_), out = given.values, given.step.ins, given.step.outs[0]
    if given.marks.everywhere in value.at:
        return Value(value.at)
    # An atom that is repeated along itself too says nothing of the copies.
    before, after = _times(terms), _times(out)
    return Value(
        {
            a: c
            for a, c in value.at.items()
            if a in before and (c.undefined or after.get(a, 0) <= before[a])
        }
    )


def _times(terms: Terms) -> collections.Counter[Atom]:
    return collections.Counter(atom for term in terms for atom in atoms(term))


def _pad(given: Given) -> Value:
    (value, border), (terms, *_), out = given.values, given.step.ins, given.step.outs[0]
    everywhere, inside = given.marks.everywhere, within(terms)
    around = border.at.get(everywhere)
    config = given.step.eqn.params["padding_config"]
    padded = [axis for axis, sizes in enumerate(config) if any(sizes)]
    found: dict[Atom, Known] = {}
    for atom in given.marks.every & within(out):
        c = given.marks.of(value, terms, atom)
        if atom not in inside:
            found[atom] = around
        elif all(atom in atoms(terms[axis]) for axis in padded):
            found[atom] = c
        else:
            found[atom] = joined([c, around])
    return given.marks.value(found, joined([value.at.get(everywhere), around]))


def _undefined(given: Given, out: Terms) -> Value:
    # Of any other primitive only this is known: what NaN enters comes out.
    found = {atom: c for value in given.values for atom, c in value.at.items() if c.undefined}
    return Value({atom: c for atom, c in found.items() if atom in within(out)})


def dot(given: Given) -> Value:
    """The result of a product of two arrays."""
    found = numbers_of(given.step.eqn)
    first, n = len(found.batch[0]), len(found.batch[0]) + len(found.free[0])
    (left, right), every = given.values[:2], given.every()[:2]

    def at(axis: int, atom: Atom) -> Known:
        a = left.at.get(atom) if axis < n else None
        b = right.at.get(atom) if axis < first or axis >= n else None
        return _summed(times(a or every[0], b or every[1], given.place))

    known = given.along(given.step.outs[0], at)
    return given.marks.value(known.at, _summed(times(every[0], every[1], given.place)))


def conv(given: Given) -> Value:
    """The result of a convolution."""
    spec = given.step.eqn.params["dimension_numbers"]
    (left, right), every = given.values, given.every()
    groups = within([given.step.ins[0][spec.lhs_spec[1]]])

    def at(axis: int, atom: Atom) -> Known:
        if axis != spec.out_spec[1]:
            return _summed(times(every[0], every[1], given.place))
        a = left.at.get(atom) if atom in groups else None
        return _summed(times(a or every[0], right.at.get(atom) or every[1], given.place))

    found = given.along(given.step.outs[0], at)
    return given.marks.value(found.at, _summed(times(every[0], every[1], given.place)))


def _summed(product: Known) -> Known:
    # A sum of many such products.
    return product if product is not None and (product.zero or product.undefined) else None


def flags_of(given: Given) -> list[frozenset[Atom]]:
    """What is known of the results besides numbers."""
    step, values, marks, _ = given
    name, carried = step.eqn.primitive.name, frozenset(marks.carried)
    named = [v for k, v in zip(step.eqn.invars, values, strict=True) if not compat.is_literal(k)]
    if row(name).kind != "contract" and named:
        if all(marks.follows in value.flags for value in named):
            return [frozenset({marks.follows})] * len(step.outs)
    if row(name).kind == "identity":
        return [value.flags & carried for value in values]
    kept: frozenset[Atom] = frozenset()
    if _adds(step.eqn):
        same = [tuple(map(size, terms)) == tuple(map(size, step.outs[0])) for terms in step.ins]
        if same[0] and values[1].zero(marks.everywhere):
            kept |= values[0].flags & carried
        if same[1] and values[0].zero(marks.everywhere) and name != "sub":
            kept |= values[1].flags & carried
    return [kept] * len(step.outs)


def constant_of(literal: Any) -> Known:
    """The number that a literal is; None if it is several."""
    value = getattr(literal.val, "item", lambda: literal.val)
    return Constant(value()) if getattr(literal.val, "size", 1) == 1 else None
