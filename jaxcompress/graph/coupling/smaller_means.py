"""Means over channels of which some were removed: the number they divide by."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxcompress.graph import compat
from jaxcompress.graph.coupling.scopes import Scope
from jaxcompress.graph.coupling.terms import Term, count, size
from jaxcompress.graph.primitives import row


def renormalised(scope: Scope, keep: Callable[[Term], Any]) -> Mapping[int, Any]:
    """Equations that divide a sum over cut axes by how many there were, by their place in a jaxpr.

    They divide by how many there are. Divisions by 1 / n are found as products with it.
    """
    counts: dict[Any, tuple[int, int]] = {}
    found: dict[int, Any] = {}
    for place, step in enumerate(scope.steps):
        eqn, name = step.eqn, step.eqn.primitive.name
        if name == "reduce_sum":
            summed = [step.ins[0][axis] for axis in eqn.params["axes"]]
            old = int(np.prod([size(term) for term in summed]))
            new = math.prod(count(keep(term)) for term in summed)
            if old != new:
                counts[eqn.outvars[0]] = old, new
            continue
        known = [None if compat.is_literal(v) else counts.get(v) for v in eqn.invars]
        if known[0] and _between(name):
            counts[eqn.outvars[0]] = known[0]
        elif name in ("div", "mul"):
            for i, pair in enumerate(known):
                other = eqn.invars[1 - i]
                if pair and compat.is_literal(other) and (name == "mul" or i == 0):
                    old, new = (1 / n if name == "mul" else n for n in pair)
                    if np.isclose(float(other.val), old, rtol=1e-6):
                        found[place] = compat.with_literal(eqn, 1 - i, new)
    return found


def _between(name: str) -> bool:
    # What may lie between the sum and the division: moves of the whole, casts.
    meaning = row(name)
    return meaning.kind in ("identity", "move") or (meaning.elementwise and meaning.work == "")
