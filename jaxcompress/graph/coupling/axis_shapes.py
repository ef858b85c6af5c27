"""What becomes of axes where elements move.

A rule takes an equation and the terms of its operands, ties those that belong together, and gives
the terms of the results. Of primitives that only move elements each step has a rule.
"""

from collections.abc import Callable, Sequence
from typing import Any

from jaxcompress.graph.coupling.terms import (
    Term,
    freeze,
    fresh,
    frozen,
    product,
    size,
    total,
    unify,
)
from jaxcompress.graph.primitives import Pad, Permute, Regroup, Spread, Take, moved

Terms = list[Term]  # of one value, axis by axis
Rule = Callable[[Any, Sequence[Terms]], list[Terms]]


def shape(variable: Any) -> tuple[int, ...]:
    """The shape of a variable; () for what has none."""
    return tuple(getattr(variable.aval, "shape", ()))


def unknown(eqn: Any, terms: Sequence[Terms]) -> list[Terms]:
    """Freezes everything."""
    why = f"{eqn.primitive.name} has no rule"
    for term in (term for operand in terms for term in operand):
        freeze(term, why)
    return [[frozen(n, why) for n in shape(v)] for v in eqn.outvars]


def each(eqn: Any, terms: Sequence[Terms]) -> list[Terms]:
    del eqn
    return [list(operand) for operand in terms]


def window(eqn: Any, terms: Sequence[Terms]) -> list[Terms]:
    """Axes over which a window slides are frozen."""
    p = eqn.params
    if "window_dimensions" not in p or len(terms) != 1:
        return unknown(eqn, terms)
    result: Terms = []
    for axis, n in enumerate(shape(eqn.outvars[0])):
        plain = p["window_dimensions"][axis] == p["window_strides"][axis] == 1
        plain &= tuple(p["padding"][axis]) == (0, 0)
        plain &= p["base_dilation"][axis] == p["window_dilation"][axis] == 1
        if plain:
            result.append(terms[0][axis])
        else:
            freeze(terms[0][axis], "a window slides along the axis")
            result.append(frozen(n, "a window slides along the axis"))
    return [result]


def counted(eqn: Any, terms: Sequence[Terms]) -> list[Terms]:
    """Results without operands; the axis along which one counts is frozen."""
    del terms
    along = eqn.params.get("dimension")
    return [
        [frozen(n, "iota counts it") if a == along else fresh(n) for a, n in enumerate(shape(v))]
        for v in eqn.outvars
    ]


def moving(eqn: Any, terms: Sequence[Terms]) -> list[Terms]:
    """What only moves elements, step by step."""
    found = moved(eqn)
    if found is None:
        return unknown(eqn, terms)
    results = []
    for result in found:
        parts = []
        for k in result.operands:
            part = list(terms[k])
            for step in result.steps:
                part = _STEPS[type(step)](part, step)
            parts.append(part)
        results.append(parts[0] if result.axis is None else _joined(parts, result.axis))
    return results


def _regroup(terms: Terms, step: Regroup) -> Terms:
    left = [term for term in terms if size(term) != 1]
    if [size(term) for term in left] == [n for n in step.sizes if n != 1]:
        # Only axes of size 1 come and go.
        rest = iter(left)
        return [fresh(1) if n == 1 else next(rest) for n in step.sizes]
    result = [fresh(n) for n in step.sizes]
    unify(product(result), product(terms))
    return result


def _spread(terms: Terms, step: Spread) -> Terms:
    result = [fresh(n) for n in step.sizes]
    for term, at in zip(terms, step.axes, strict=True):
        if size(term) == step.sizes[at]:
            result[at] = term
    return result


def _joined(parts: Sequence[Terms], along: int) -> Terms:
    result = list(parts[0])
    for part in parts[1:]:
        result = [t if a == along else unify(t, part[a]) for a, t in enumerate(result)]
    result[along] = total(part[along] for part in parts)
    return result


def _taken(terms: Terms, step: Take) -> Terms:
    result = []
    for term, (start, stop, stride) in zip(terms, step.bounds, strict=True):
        n = size(term)
        if stride != 1:
            why = "rev along the axis" if stride < 0 else "a slice with strides"
            freeze(term, why)
            result.append(frozen(n if stride < 0 else len(range(start, stop, stride)), why))
        elif (start, stop) == (0, n):
            result.append(term)
        else:
            parts = [fresh(m) for m in (start, stop - start, n - stop)]
            unify(total(parts), term)
            result.append(parts[1])
    return result


def _padded(terms: Terms, step: Pad) -> Terms:
    result: Terms = []
    out = step.shape(tuple(map(size, terms)))
    for term, n, (low, high, interior) in zip(terms, out, step.config, strict=True):
        if interior or low < 0 or high < 0:
            freeze(term, "padding that cuts or spreads")
            result.append(frozen(n, "padding that cuts or spreads"))
        else:
            result.append(total([fresh(low), term, fresh(high)]) if low or high else term)
    return result


_STEPS: dict[type, Callable[[Terms, Any], Terms]] = {
    Permute: lambda terms, step: [terms[axis] for axis in step.order],
    Regroup: _regroup,
    Spread: _spread,
    Take: _taken,
    Pad: _padded,
}


def _gather(eqn: Any, terms: Sequence[Terms]) -> list[Terms]:
    p, (operand, indices), out = eqn.params, terms[:2], shape(eqn.outvars[0])
    numbers, sizes = p["dimension_numbers"], p["slice_sizes"]
    batching = numbers.operand_batching_dims
    hidden = {*numbers.collapsed_slice_dims, *batching}
    for a, b in zip(batching, numbers.start_indices_batching_dims, strict=True):
        unify(operand[a], indices[b])
    freeze(indices[-1], "indices")
    slices: list[Term] = []
    for axis, term in enumerate(operand):
        whole = sizes[axis] == size(term) and axis not in numbers.start_index_map
        if not whole and axis not in batching:
            freeze(term, "an index runs along the axis")
        if axis not in hidden:
            slices.append(term if whole else frozen(sizes[axis], "an index runs along the axis"))
    rest, at = iter(indices[:-1]), iter(slices)
    return [[next(at) if a in numbers.offset_dims else next(rest) for a in range(len(out))]]


def _dynamic_slice(eqn: Any, terms: Sequence[Terms]) -> list[Terms]:
    result: Terms = []
    for term, n in zip(terms[0], shape(eqn.outvars[0]), strict=True):
        if size(term) != n:
            freeze(term, "a slice that moves")
        result.append(term if size(term) == n else frozen(n, "a slice that moves"))
    return [result]


def _dynamic_update(eqn: Any, terms: Sequence[Terms]) -> list[Terms]:
    del eqn
    for term, new in zip(terms[0], terms[1], strict=True):
        if size(term) == size(new):
            unify(term, new)
        else:
            freeze(term, "a slice that moves")
            freeze(new, "a slice that moves")
    return [list(terms[0])]


INDEXED: dict[str, Rule] = {
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update,
    "gather": _gather,
}
"""Those whose operands say where elements go."""
