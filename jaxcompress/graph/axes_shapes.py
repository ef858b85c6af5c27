"""What primitives that move, cut or join axes make of them.

A rule takes an equation and the terms of its operands, ties those that belong together, and gives
the terms of the results.
"""

from collections.abc import Callable, Sequence
from typing import Any

from jaxcompress.graph.axes_terms import Term, freeze, fresh, frozen, product, size, total, unify

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


def _window(eqn: Any, terms: Sequence[Terms]) -> list[Terms]:
    p = eqn.params
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


def _broadcast(eqn: Any, terms: Sequence[Terms]) -> list[Terms]:
    out = shape(eqn.outvars[0])
    result = [fresh(n) for n in out]
    for axis, at in enumerate(eqn.params["broadcast_dimensions"]):
        if size(terms[0][axis]) == out[at]:
            result[at] = terms[0][axis]
    return [result]


def _iota(eqn: Any, terms: Sequence[Terms]) -> list[Terms]:
    del terms
    along, out = eqn.params["dimension"], shape(eqn.outvars[0])
    return [[frozen(n, "iota counts it") if a == along else fresh(n) for a, n in enumerate(out)]]


def _squeeze(eqn: Any, terms: Sequence[Terms]) -> list[Terms]:
    gone = eqn.params["dimensions"]
    return [[t for axis, t in enumerate(terms[0]) if axis not in gone]]


def _transpose(eqn: Any, terms: Sequence[Terms]) -> list[Terms]:
    return [[terms[0][axis] for axis in eqn.params["permutation"]]]


def _reshape(eqn: Any, terms: Sequence[Terms]) -> list[Terms]:
    if eqn.params.get("dimensions") is not None:
        return unknown(eqn, terms)
    result = [fresh(n) for n in shape(eqn.outvars[0])]
    unify(product(result), product(terms[0]))
    return [result]


def _concatenate(eqn: Any, terms: Sequence[Terms]) -> list[Terms]:
    along = eqn.params["dimension"]
    result = list(terms[0])
    for operand in terms[1:]:
        result = [t if a == along else unify(t, operand[a]) for a, t in enumerate(result)]
    result[along] = total(operand[along] for operand in terms)
    return [result]


def _pieces(term: Term, sizes: Sequence[int]) -> Terms:
    # The axis cut into pieces of the given sizes.
    parts = [fresh(n) for n in sizes]
    unify(total(parts), term)
    return parts


def _split(eqn: Any, terms: Sequence[Terms]) -> list[Terms]:
    along, result = eqn.params["axis"], []
    for piece in _pieces(terms[0][along], eqn.params["sizes"]):
        result.append([piece if a == along else t for a, t in enumerate(terms[0])])
    return result


def _slice(eqn: Any, terms: Sequence[Terms]) -> list[Terms]:
    p, result = eqn.params, []
    strides = p["strides"] or (1,) * len(terms[0])
    for term, start, limit, stride in zip(
        terms[0], p["start_indices"], p["limit_indices"], strides, strict=True
    ):
        n = size(term)
        if stride != 1:
            freeze(term, "a slice with strides")
            result.append(frozen(len(range(start, limit, stride)), "a slice with strides"))
        elif (start, limit) == (0, n):
            result.append(term)
        else:
            result.append(_pieces(term, (start, limit - start, n - limit))[1])
    return [result]


def _pad(eqn: Any, terms: Sequence[Terms]) -> list[Terms]:
    result: Terms = []
    out = shape(eqn.outvars[0])
    for axis, (low, high, interior) in enumerate(eqn.params["padding_config"]):
        term = terms[0][axis]
        if interior or low < 0 or high < 0:
            freeze(term, "padding that cuts or spreads")
            result.append(frozen(out[axis], "padding that cuts or spreads"))
        else:
            result.append(total([fresh(low), term, fresh(high)]) if low or high else term)
    return [result]


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


def _bitcast(eqn: Any, terms: Sequence[Terms]) -> list[Terms]:
    same = shape(eqn.invars[0]) == shape(eqn.outvars[0])
    return each(eqn, terms) if same else unknown(eqn, terms)


SHAPES: dict[str, Rule] = {
    **dict.fromkeys(("reduce_window_sum", "reduce_window_max", "reduce_window_min"), _window),
    "bitcast_convert_type": _bitcast,
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update,
    "gather": _gather,
    "iota": _iota,
    "pad": _pad,
    "reshape": _reshape,
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "transpose": _transpose,
}
