"""What an axis is made of: atoms, products of them (reshapes) and sums (concatenations).

Two axes that must be cut alike are unified, like terms of first-order logic with associative
products and sums: atoms are split where a finer structure meets them, and frozen where two
structures clash. So an axis is cut too little rather than wrongly.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


class Atom:
    """An axis, or a part of one, that is cut as a whole; compared by identity.

    Attributes:
      size: number of indices, at least 2.
      frozen: why nothing may be removed; "" if something may.
      rigid: whether the size is fixed; that of a frozen batch axis is not.
      stack: whether a scan runs along it.
      bound: the term that stands for this atom since a unification.
    """

    __slots__ = ("bound", "frozen", "rigid", "size", "stack")

    def __init__(self, size: int):
        self.size, self.frozen, self.rigid, self.stack = int(size), "", False, False
        self.bound: Term | None = None


@dataclass(frozen=True)
class Prod:
    """Row-major product of terms; of none: an axis of size 1."""

    factors: tuple["Term", ...]


@dataclass(frozen=True)
class Sum:
    """Terms one after the other; none: an axis of size 0."""

    parts: tuple["Term", ...]


Term = Atom | Prod | Sum
ONE, EMPTY = Prod(()), Sum(())


def fresh(size: int) -> Term:
    """A new axis of which nothing is known but its size."""
    return {0: EMPTY, 1: ONE}.get(size) or Atom(size)


def frozen(size: int, why: str) -> Term:
    """A new axis that is never cut."""
    return freeze(fresh(size), why)


def size(term: Term) -> int:
    """Number of indices of the axis, before anything is removed."""
    if isinstance(term, Atom):
        return term.size
    if isinstance(term, Prod):
        return math.prod(map(size, term.factors))
    return sum(map(size, term.parts))


def product(factors: Iterable[Term]) -> Term:
    """The axis that a row-major reshape makes of several."""
    flat: list[Term] = []
    for term in map(resolve, factors):
        flat += term.factors if isinstance(term, Prod) else [term]
    if EMPTY in flat:
        return EMPTY
    return flat[0] if len(flat) == 1 else Prod(tuple(flat))


def total(parts: Iterable[Term]) -> Term:
    """The axis that a concatenation makes of several."""
    flat: list[Term] = []
    for term in map(resolve, parts):
        flat += term.parts if isinstance(term, Sum) else [term]
    return flat[0] if len(flat) == 1 else Sum(tuple(flat))


def resolve(term: Term) -> Term:
    """The term with what its atoms are bound to."""
    if isinstance(term, Prod):
        return product(term.factors) if term.factors else term
    if isinstance(term, Sum):
        return total(term.parts) if term.parts else term
    if term.bound is None:
        return term
    term.bound = resolve(term.bound)
    return term.bound


def atoms(term: Term) -> Iterator[Atom]:
    """The atoms of a term, in order."""
    term = resolve(term)
    if isinstance(term, Atom):
        yield term
    else:
        for part in term.factors if isinstance(term, Prod) else term.parts:
            yield from atoms(part)


@dataclass(frozen=True)
class Whole:
    """An axis that stays whole and whose length is a symbol, as in exports of free batch sizes.

    It stands where otherwise there is a mask, bool [size].

    Attributes:
      size: the new length, `jax.export`'s symbolic dimension.
    """

    size: Any


def keep_of(term: Term, keep: Callable[[Atom], Any]) -> Any:
    """Which indices of an axis stay, bool [size], from which indices of its atoms do.

    A `Whole` where one of the atoms is: of such an axis only the new length is known.
    """
    term = resolve(term)
    if isinstance(term, Atom):
        return keep(term)
    parts = term.parts if isinstance(term, Sum) else term.factors
    found = [keep_of(part, keep) for part in parts]
    if any(isinstance(mask, Whole) for mask in found):
        lengths = map(count, found)
        return Whole(sum(lengths) if isinstance(term, Sum) else math.prod(lengths))
    if isinstance(term, Sum):
        return np.concatenate(found) if found else np.zeros(0, bool)
    result = np.ones(1, bool)
    for mask in found:
        result = (result[:, None] & mask[None]).reshape(-1)
    return result


def count(mask: Any) -> Any:
    """How many indices stay: an integer, or the symbol of a `Whole`."""
    return mask.size if isinstance(mask, Whole) else int(mask.sum())


def places(term: Term) -> Iterator[tuple[Atom, np.ndarray]]:
    """Each atom of an axis, and which index of it every position of the axis has.

    The numbers are int [size], -1 where the atom is not; an atom that occurs twice is given twice.
    """
    term = resolve(term)
    if isinstance(term, Atom):
        yield term, np.arange(term.size)
    elif isinstance(term, Prod):
        for number, factor in enumerate(term.factors):
            before = math.prod(map(size, term.factors[:number]))
            after = math.prod(map(size, term.factors[number + 1 :]))
            for atom, at in places(factor):
                yield atom, np.tile(np.repeat(at, after), before)
    else:
        start, whole = 0, size(term)
        for part in term.parts:
            stop = start + size(part)
            for atom, at in places(part):
                yield atom, np.pad(at, (start, whole - stop), constant_values=-1)
            start = stop


def freeze(term: Term, why: str, *, rigid: bool = True) -> Term:
    """The term, of which nothing may be removed; the first reason counts."""
    for atom in atoms(term):
        atom.frozen = atom.frozen or why
        atom.rigid = atom.rigid or rigid
    return term


def unify(a: Term, b: Term) -> Term:
    """Two axes that must be cut alike; either of them."""
    a, b = resolve(a), resolve(b)
    if a == b:
        return a
    if size(a) != size(b):
        _clash([a, b])
    elif isinstance(a, Atom):
        _bind(a, b)
    elif isinstance(b, Atom):
        _bind(b, a)
    elif isinstance(a, Prod) and isinstance(b, Prod):
        _match(a.factors, b.factors, products=True)
    elif isinstance(a, Sum) and isinstance(b, Sum):
        _match(a.parts, b.parts, products=False)
    else:
        _clash([a, b])
    return a


def _bind(atom: Atom, term: Term) -> None:
    whole = isinstance(term, Atom)
    if atom.frozen:
        freeze(term, atom.frozen, rigid=atom.rigid or not whole)
    for part in atoms(term):
        part.rigid = part.rigid or atom.rigid
        part.stack = part.stack or atom.stack
    atom.bound = term


def _match(left: Sequence[Term], right: Sequence[Term], *, products: bool) -> None:
    # Both lists from the left: equal sizes are one, a larger atom is split by the smaller term.
    xs, ys = list(reversed(left)), list(reversed(right))
    while _flatten(xs, products) and _flatten(ys, products):
        x, y = xs.pop(), ys.pop()
        small, large = sorted((x, y), key=size)
        n, rest = size(large), size(small)
        if n == rest:
            unify(x, y)
            continue
        if not isinstance(large, Atom) or (products and n % rest):
            _clash([x, y, *xs, *ys])
            return
        remaining = fresh(n // rest if products else n - rest)
        _bind(large, product([small, remaining]) if products else total([small, remaining]))
        (xs if large is x else ys).append(remaining)


def _flatten(terms: list[Term], products: bool) -> bool:
    # Puts the parts of the first term, which an earlier step may have split, in its place.
    while terms:
        first = resolve(terms[-1])
        if not isinstance(first, Prod if products else Sum):
            terms[-1] = first
            return True
        terms.pop()
        terms += reversed(first.factors if isinstance(first, Prod) else first.parts)
    return False


def _clash(terms: Iterable[Term]) -> None:
    for term in terms:
        freeze(term, "two shapes that do not divide each other meet")
