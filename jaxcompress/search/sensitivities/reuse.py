"""What a change leaves alone: contractions whose results need not be computed again."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax

from jaxcompress.graph import Tap
from jaxcompress.graph.flat import Flat
from jaxcompress.graph.tracing import Program

LIMIT_BYTES = 2**30
"""Most that is kept, for all batches together."""


class Reuse(NamedTuple):
    """What may be kept, and what depends on what.

    Attributes:
      kept: {tap: shape and dtype of its contraction's result}, in order of execution.
      by_leaf: {path of a leaf: taps in `kept` whose contraction it reaches}.
      by_tap: {tap: taps in `kept` whose contraction its activations reach, its own among them}.
    """

    kept: Mapping[str, jax.ShapeDtypeStruct]
    by_leaf: Mapping[str, frozenset[str]]
    by_tap: Mapping[str, frozenset[str]]

    def stale(self, leaves: Iterable[str], taps: Iterable[str]) -> dict[str, bool]:
        """{tap in `kept`: whether its contraction must be computed again} after these changes."""
        reached: set[str] = set()
        for found, changed in ((self.by_leaf, leaves), (self.by_tap, taps)):
            reached.update(*(found.get(name, frozenset(self.kept)) for name in changed))
        return {name: name in reached for name in self.kept}


def reuse(program: Program, batches: int, *, limit_bytes: int = LIMIT_BYTES) -> Reuse:
    """The contractions outside of loops, those first that cost most for their bytes.

    Nothing is kept of a program with a conditional, whose other branch is not looked at.
    """
    flat = Flat(program)
    if flat.conditional:
        return Reuse({}, {}, {})
    plain = [
        tap for tap in _first_taps(program.graph.taps)
        if not tap.site.loops and tap.site.name not in program.graph.unknown_trips
    ]  # fmt: skip
    size = lambda tap: batches * math.prod(tap.site.out.shape) * tap.site.out.dtype.itemsize
    chosen, left = set(), limit_bytes
    for tap in sorted(plain, key=lambda tap: -tap.site.macs / max(size(tap), 1)):
        if size(tap) <= left:
            chosen.add(tap.name)
            left -= size(tap)
    kept = {tap.name: tap.site.out for tap in plain if tap.name in chosen}
    names = {tap.site.name: tap.name for tap in plain if tap.name in chosen}
    by_leaf = {path: _reached(flat, {number}, names) for number, path in enumerate(flat.paths)}
    by_tap = {}
    for op in flat.ops:
        site = flat.site_name(op)
        found = _reached(flat, set(op.outputs), names) if site else frozenset()
        own = frozenset({names[site]} if site in names else ())
        by_tap |= {t.name: found | own for t in program.graph.taps if t.site.name == site}
    return Reuse(kept, by_leaf, by_tap)


def _first_taps(taps: Iterable[Tap]) -> list[Tap]:
    first: dict[str, Tap] = {}
    for tap in taps:
        first.setdefault(tap.site.name, tap)
    return list(first.values())


def _reached(flat: Flat, numbers: set[int], names: Mapping[str, str]) -> frozenset[str]:
    """The taps of the contractions that take one of these values or what is made of them."""
    numbers, found = set(numbers), set()
    for op in flat.ops:
        if not numbers.intersection(op.inputs):
            continue
        numbers.update(op.outputs)
        site: Any = flat.site_name(op)
        if site in names:
            found.add(names[site])
    return frozenset(found)
