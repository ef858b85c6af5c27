"""What each primitive makes of the axes of its operands; what is not listed freezes them.

A rule takes an equation and the terms of its operands, ties those that belong together, and gives
the terms of the results. It knows shapes as they were traced: sizes after a cut are the business of
`replay_rules`.
"""

from collections.abc import Sequence
from typing import Any

from jaxcompress.graph import compat
from jaxcompress.graph.axes_shapes import SHAPES, Rule, Terms, each, shape, unknown
from jaxcompress.graph.axes_terms import (
    Term,
    atoms,
    freeze,
    fresh,
    frozen,
    product,
    size,
    unify,
)
from jaxcompress.graph.products import numbers_of

UNARY = frozenset(
    """abs acos acosh asin asinh atan atanh cbrt ceil clz conj convert_element_type copy copy_p cos
    cosh digamma erf erf_inv erfc exp exp2 expm1 floor imag integer_pow is_finite lgamma log log1p
    logistic neg not optimization_barrier population_count real reduce_precision round rsqrt sign
    sin sinh sqrt square stop_gradient tan tanh name pvary device_put""".split()
)
NARY = frozenset(
    """add add_any and atan2 clamp complex div eq eq_to ge gt le le_to lt lt_to max min mul ne
    nextafter or pow rem select_n shift_left shift_right_arithmetic shift_right_logical sub
    xor""".split()
)
REDUCTIONS = frozenset(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor".split()
)


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


def _arg_reduce(eqn: Any, terms: Sequence[Terms]) -> list[Terms]:
    return _along(eqn, terms, eqn.params["axes"], drop=True)


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


RULES: dict[str, Rule] = {
    **dict.fromkeys(UNARY, each),
    **dict.fromkeys(NARY, _elementwise),
    **dict.fromkeys(REDUCTIONS, _reduce),
    **dict.fromkeys(("argmax", "argmin"), _arg_reduce),
    **dict.fromkeys(
        ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"),
        lambda eqn, terms: _along(eqn, terms, [eqn.params["axis"]]),
    ),
    **SHAPES,
    compat.CONV: _conv,
    compat.DOT: _dot,
    compat.RAGGED: _ragged,
    "rev": lambda eqn, terms: _along(eqn, terms, eqn.params["dimensions"]),
    "sort": lambda eqn, terms: _along(eqn, terms, [eqn.params["dimension"]]),
    "top_k": lambda eqn, terms: _along(eqn, terms, [eqn.params.get("axis", -1)]),
}
