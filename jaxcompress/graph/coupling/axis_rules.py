"""What each primitive makes of the axes of its operands; what is not listed freezes them.

A rule takes an equation and the terms of its operands, ties those that belong together, and gives
the terms of the results. It knows shapes as they were traced: sizes after a cut are the business of
`smaller_sizes`.
"""

from collections.abc import Sequence
from typing import Any

from jaxcompress.graph import compat
from jaxcompress.graph.coupling.axis_shapes import (
    INDEXED,
    Rule,
    Terms,
    counted,
    each,
    moving,
    shape,
    unknown,
    window,
)
from jaxcompress.graph.coupling.terms import (
    Term,
    atoms,
    freeze,
    fresh,
    frozen,
    product,
    size,
    unify,
)
from jaxcompress.graph.primitives import row
from jaxcompress.graph.primitives.contractions import numbers_of


def joined(eqn: Any, terms: Sequence[Terms], out: Sequence[int]) -> Terms:
    """The axes of an elementwise result; operands of size 1 are broadcast, scalars too."""
    del eqn
    result: Terms = []
    for axis, n in enumerate(out):
        same = [t[axis] for t in terms if len(t) == len(out) and size(t[axis]) == n]
        term = same[0] if same else fresh(n)
        for other in same[1:]:
            term = unify(term, other)
        result.append(term)
    return result


def _elementwise(eqn: Any, terms: Sequence[Terms]) -> list[Terms]:
    return [joined(eqn, terms, shape(eqn.outvars[0]))]


def _reduce(eqn: Any, terms: Sequence[Terms]) -> list[Terms]:
    for axis in eqn.params["axes"]:
        _settle(terms[0][axis])
    kept = [t for axis, t in enumerate(terms[0]) if axis not in eqn.params["axes"]]
    return [kept]


def _settle(term: Term) -> None:
    # Programs that sum over the batch divide by its size, a number: it cannot be another one.
    for atom in atoms(term):
        atom.rigid = True


def _along(
    eqn: Any, terms: Sequence[Terms], axes: Sequence[int], *, drop: bool = False
) -> list[Terms]:
    # The order along some axes matters; all operands and results have one shape.
    rank = len(terms[0])
    axes = [axis % rank for axis in axes]
    for operand in terms:
        for axis in axes:
            freeze(operand[axis], f"{eqn.primitive.name} along the axis")
    whole = joined(eqn, terms, [size(t) for t in terms[0]])
    left = [t for axis, t in enumerate(whole) if not (drop and axis in axes)]
    results = []
    for v in eqn.outvars:
        kept = zip(left, shape(v), strict=True)
        results.append([t if size(t) == n else frozen(n, eqn.primitive.name) for t, n in kept])
    return results


def _dot(eqn: Any, terms: Sequence[Terms]) -> list[Terms]:
    (contract, batch) = eqn.params["dimension_numbers"]
    lhs, rhs = terms
    for a, b in zip(*contract, strict=True):
        _settle(unify(lhs[a], rhs[b]))
    shared = [unify(lhs[a], rhs[b]) for a, b in zip(*batch, strict=True)]
    free = [t for a, t in enumerate(lhs) if a not in (*contract[0], *batch[0])]
    free += [t for a, t in enumerate(rhs) if a not in (*contract[1], *batch[1])]
    return [[*shared, *free]]


def _ragged(eqn: Any, terms: Sequence[Terms]) -> list[Terms]:
    # As a product without the axis of the experts; neither their number nor the rows' can change.
    found = numbers_of(eqn)
    if found.parts == "summed":
        return unknown(eqn, terms)
    lhs, rhs, sizes = terms
    if found.parts:
        for term in (lhs[found.ragged], rhs[found.group], sizes[-1]):
            freeze(term, "rows are shared out among experts along the axis")
    for a, b in zip(*found.contracted, strict=True):
        _settle(unify(lhs[a], rhs[b]))
    shared = [unify(lhs[a], rhs[b]) for a, b in zip(*found.batch, strict=True)]
    return [[*shared, *(lhs[a] for a in found.free[0]), *(rhs[a] for a in found.free[1])]]


def _conv(eqn: Any, terms: Sequence[Terms]) -> list[Terms]:
    lhs, rhs = terms
    spec, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    if eqn.params["batch_group_count"] != 1:
        return unknown(eqn, terms)
    # lhs channels = groups x c, kernel inputs = c, kernel outputs = groups x o
    c, o = fresh(size(rhs[spec.rhs_spec[1]])), fresh(size(rhs[spec.rhs_spec[0]]) // groups)
    group = fresh(groups)
    unify(lhs[spec.lhs_spec[1]], product([group, c]))
    unify(rhs[spec.rhs_spec[1]], c)
    unify(rhs[spec.rhs_spec[0]], product([group, o]))
    result = [frozen(n, "a window slides along the axis") for n in shape(eqn.outvars[0])]
    for operand, axes in ((lhs, spec.lhs_spec[2:]), (rhs, spec.rhs_spec[2:])):
        for axis in axes:
            freeze(operand[axis], "a window slides along the axis")
    result[spec.out_spec[0]] = lhs[spec.lhs_spec[0]]
    result[spec.out_spec[1]] = rhs[spec.rhs_spec[0]]
    return [result]


def _elementwise_or_bits(eqn: Any, terms: Sequence[Terms]) -> list[Terms]:
    if len(terms) > 1:
        return _elementwise(eqn, terms)
    # Bits of numbers of another width have another shape.
    same = shape(eqn.invars[0]) == shape(eqn.outvars[0])
    return each(eqn, terms) if same else unknown(eqn, terms)


def _reduction(eqn: Any, terms: Sequence[Terms]) -> list[Terms]:
    arg = row(eqn.primitive.name).neutral is None
    return _along(eqn, terms, eqn.params["axes"], drop=True) if arg else _reduce(eqn, terms)


def _in_order(eqn: Any, terms: Sequence[Terms]) -> list[Terms]:
    along = eqn.params.get("axis", eqn.params.get("dimension", -1))
    return _along(eqn, terms, [along])


_KINDS: dict[str, Rule] = {
    "identity": each,
    "move": moving,
    "constant": counted,
    "elementwise": _elementwise_or_bits,
    "compare": _elementwise,
    "reduce": _reduction,
    "cumulative": _in_order,
    "sort": _in_order,
    "window": window,
}
_CONTRACTIONS: dict[str, Rule] = {compat.CONV: _conv, compat.DOT: _dot, compat.RAGGED: _ragged}


def rule_of(name: str) -> Rule | None:
    """The rule of a primitive; None: whatever it touches is frozen."""
    return _KINDS.get(row(name).kind) or (INDEXED | _CONTRACTIONS).get(name)
