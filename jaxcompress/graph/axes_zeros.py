"""Where a masked network is exactly zero, and which groups are therefore cut without a trace.

Removing a channel changes nothing if wherever the channel is summed over, it is zero in the masked
network. Zeros are followed forward: a masked parameter is zero at its masked indices, functions
with f(0) = 0 keep that, sigmoid and exp do not. Values are taken to be finite: 0 / 0 is no zero.

A parameter may instead be one that goes with its channel whatever it is: the bias and the scale of
a norm. Adding it to a zero leaves a zero, multiplying by it makes none.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jaxcompress.graph import compat
from jaxcompress.graph.axes_rules import REDUCTIONS
from jaxcompress.graph.axes_scopes import CALLS, Scope, Step
from jaxcompress.graph.axes_shapes import Terms
from jaxcompress.graph.axes_terms import Atom, atoms
from jaxcompress.graph.axes_zero_rules import Marks, Zeros, marked, within, zeros_of
from jaxcompress.graph.products import numbers_of


class Zeroes:
    """Follows zeros; collects why a group is not cut without a trace, and where sizes stay."""

    def __init__(self, every: Iterable[Atom], carried: Iterable[Atom] = ()):
        everywhere = Atom(0)
        self.marks = Marks(frozenset([*every, everywhere]), everywhere, Atom(0), tuple(carried))
        self.reasons: dict[Atom, str] = {}
        self.sums: dict[Atom, str] = {}

    def scope(self, scope: Scope, ins: Sequence[Zeros]) -> list[Zeros]:
        """The zeros of a jaxpr's results from those of its arguments."""
        known: dict[Any, Zeros] = {v: frozenset() for v in scope.body.jaxpr.constvars}
        known.update(zip(scope.body.jaxpr.invars, ins, strict=True))

        def read(v):
            if compat.is_literal(v):
                # A literal is zero everywhere or nowhere.
                return self.marks.every if not np.any(np.asarray(v.val) != 0) else frozenset()
            return known[v]

        for step in scope.steps:
            zeros = [read(v) for v in step.eqn.invars]
            outs = self._step(step, zeros)
            flags = self.marks.flags
            inside = [z & flags for z in outs]
            new = inside if step.scopes else marked(step, zeros, self.marks)
            for v, z, mark, terms in zip(step.eqn.outvars, outs, new, step.outs, strict=True):
                # What an axis that is gone was masked for says nothing about the result.
                left = z if self.marks.everywhere in z else z & within(terms)
                known[v] = (left - flags) | mark
        return [read(v) for v in scope.body.jaxpr.outvars]

    def _step(self, step: Step, zeros: list[Zeros]) -> list[Zeros]:
        name = step.eqn.primitive.name
        if name in CALLS:
            return self.scope(step.scopes[0], zeros)
        special = {
            "scan": self._scan,
            "while": self._while,
            "cond": self._cond,
            **dict.fromkeys(compat.PRODUCTS, self._dot),
            compat.CONV: self._conv,
        }.get(name)
        if special is None and name in REDUCTIONS:
            special = self._reduce
        return special(step, zeros) if special else zeros_of(step, zeros, self.marks)

    def _reduce(self, step: Step, zeros: list[Zeros]) -> list[Zeros]:
        axes, name = step.eqn.params["axes"], step.eqn.primitive.name
        for axis in axes:
            for atom in self.marks.every.intersection(atoms(step.ins[0][axis])):
                if name != "reduce_sum":
                    self.reasons.setdefault(atom, f"{name} sees the masked zeros")
                elif atom not in zeros[0]:
                    self.reasons.setdefault(atom, "reduce_sum over values that a mask leaves")
                else:
                    self.sums.setdefault(atom, "a sum over the axis: a mean divides as before")
        return [zeros[0]]

    def _contracted(self, terms: Terms, both: Zeros, what: str) -> None:
        for atom in self.marks.every.intersection(within(terms)) - both:
            self.reasons.setdefault(atom, f"{what} over values that a mask leaves")

    def _dot(self, step: Step, zeros: list[Zeros]) -> list[Zeros]:
        if self.marks.everywhere in zeros[0] | zeros[1]:
            return [self.marks.every]
        found = numbers_of(step.eqn)
        lhs, (left, right) = step.ins[0], zeros[:2]
        name = step.eqn.primitive.name
        self._contracted([lhs[a] for a in found.contracted[0]], left | right, name)
        n = len(found.batch[0])
        cut = n + len(found.free[0])
        out = step.outs[0]
        free_left, free_right = within(out[n:cut]), within(out[cut:])
        return [
            frozenset(
                atom
                for atom in within(out)
                if (atom in left or atom not in free_left)
                and (atom in right or atom not in free_right)
                and (atom in left or atom in right)
            )
        ]

    def _conv(self, step: Step, zeros: list[Zeros]) -> list[Zeros]:
        if self.marks.everywhere in zeros[0] | zeros[1]:
            return [self.marks.every]
        spec, (lhs, rhs), (left, right) = step.eqn.params["dimension_numbers"], step.ins, zeros
        # The channels of a group are summed over, the groups themselves are not.
        self._contracted([rhs[spec.rhs_spec[1]]], left | right, compat.CONV)
        outputs = within([rhs[spec.rhs_spec[0]]])
        groups = within([lhs[spec.lhs_spec[1]]]) & outputs
        return [(right & outputs) | (left & groups)]

    def _scan(self, step: Step, zeros: list[Zeros]) -> list[Zeros]:
        n_consts, n_carry = compat.scan_sizes(step.eqn.params)
        start = n_consts + n_carry
        layers = within([terms[0] for terms in step.ins[start : start + 1]])
        for atom in self.marks.every & layers:
            masked = [atom in z for z in zeros[start:]]
            if not _passes(step.scopes[0], n_consts, n_carry, masked):
                self.reasons.setdefault(atom, "a layer of zeros changes what it passes on")
        return self._loop(step.scopes[0], zeros, slice(n_consts, start))

    def _while(self, step: Step, zeros: list[Zeros]) -> list[Zeros]:
        n_test, n_step = step.eqn.params["cond_nconsts"], step.eqn.params["body_nconsts"]
        given = zeros[n_test:]
        results = self._loop(step.scopes[1], given, slice(n_step, len(given)))
        self.scope(step.scopes[0], [*zeros[:n_test], *results])
        return results

    def _loop(self, scope: Scope, zeros: list[Zeros], carry: slice) -> list[Zeros]:
        # Zeros of the carry in all trips: they only get fewer, so it ends.
        zeros = list(zeros)
        while True:
            results = self.scope(scope, zeros)
            n = carry.stop - carry.start
            again = [a & b for a, b in zip(zeros[carry], results[:n], strict=True)]
            if again == zeros[carry]:
                return [*again, *results[n:]]
            zeros[carry] = again

    def _cond(self, step: Step, zeros: list[Zeros]) -> list[Zeros]:
        results = [self.scope(branch, zeros[1:]) for branch in step.scopes]
        return [frozenset.intersection(*of_branches) for of_branches in zip(*results, strict=True)]


def _passes(scope: Scope, n_consts: int, n_carry: int, masked: Sequence[bool]) -> bool:
    """Whether the body of a scan gives its carry on as it is where these rows are zero."""
    carried = [Atom(0) for _ in range(n_carry)]
    probe = Zeroes((), carried)
    ins: list[Zeros] = [frozenset()] * n_consts
    ins += [frozenset({mark}) for mark in carried]
    ins += [probe.marks.every if zero else frozenset() for zero in masked]
    results = probe.scope(scope, ins)[:n_carry]
    return all(mark in z for mark, z in zip(carried, results, strict=True))
