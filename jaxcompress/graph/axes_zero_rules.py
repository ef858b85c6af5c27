"""Which results of a primitive are zero where its operands are; what is not listed is nowhere."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxcompress.graph import compat
from jaxcompress.graph.axes_rules import UNARY
from jaxcompress.graph.axes_scopes import Step
from jaxcompress.graph.axes_shapes import Terms
from jaxcompress.graph.axes_terms import Atom, atoms, size

Zeros = frozenset[Atom]  # a value is zero wherever the index of one of these is masked

KEEP = frozenset(
    """abs asin asinh atan atanh cbrt ceil convert_element_type copy copy_p erf erf_inv expm1 floor
    imag log1p name neg real reduce_precision round sign sin sinh sqrt square stop_gradient tan tanh
    optimization_barrier pvary device_put conj""".split()
)
SHAPES = frozenset(
    """reshape squeeze transpose slice split gather dynamic_slice rev cumsum cumprod
    reduce_window_sum concatenate""".split()
)
ADD = frozenset({"add", "add_any", "sub"})
PASS = frozenset("copy copy_p name optimization_barrier pvary stop_gradient".split())


def within(terms: Terms) -> Zeros:
    """All atoms of a value."""
    return frozenset(atom for term in terms for atom in atoms(term))


@dataclass(frozen=True)
class Marks:
    """Members of `Zeros` that stand for no axis.

    Attributes:
      every: all atoms of interest, and `everywhere`.
      everywhere: with this one a value is zero at all indices.
      follows: with this one a value is made of what goes with its channel.
      carried: with one of these it is that carry of a scan.
    """

    every: Zeros
    everywhere: Atom
    follows: Atom
    carried: tuple[Atom, ...] = ()

    @property
    def flags(self) -> Zeros:
        """Those that say nothing of zeros."""
        return frozenset({self.follows, *self.carried})


def zeros_of(step: Step, zeros: Sequence[Zeros], marks: Marks) -> list[Zeros]:
    """The zeros of the results of an equation without contractions, reductions and calls."""
    name = step.eqn.primitive.name
    if name == "broadcast_in_dim":
        return _broadcast(step, zeros, marks)
    if name == "pad":
        return _pad(step, zeros, marks)
    if name in SHAPES or (name in KEEP and name in UNARY):
        return _joined(step, zeros, marks)
    found: Zeros = frozenset()
    if name in ADD:
        found = _met(step, zeros, _added(step, zeros, marks))
    elif name in ("max", "min"):
        zeros = _bounds(step, zeros, marks)
        found = _met(step, zeros, frozenset.intersection(*zeros))
    elif name in ("mul", "and"):
        found = _met(step, zeros, zeros[0] | zeros[1])
    elif name == "select_n":
        found = _met(step, zeros, frozenset.intersection(*zeros[1:]))
    elif name in ("div", "rem") or (name == "integer_pow" and step.eqn.params["y"] > 0):
        found = _met(step, zeros, zeros[0])
    elif name == "dynamic_update_slice":
        found = zeros[0] & zeros[1]
    return [found for _ in step.outs]


def marked(step: Step, zeros: Sequence[Zeros], marks: Marks) -> list[Zeros]:
    """What is known of the results besides zeros."""
    name, carried = step.eqn.primitive.name, frozenset(marks.carried)
    given = [z for v, z in zip(step.eqn.invars, zeros, strict=True) if not compat.is_literal(v)]
    if name not in compat.CONTRACTIONS and given:
        if all(marks.follows in z for z in given):
            return [frozenset({marks.follows})] * len(step.outs)
    if name in PASS:
        return [z & carried for z in zeros]
    kept: Zeros = frozenset()
    if name in ADD:
        same = [tuple(map(size, terms)) == tuple(map(size, step.outs[0])) for terms in step.ins]
        if same[0] and marks.everywhere in zeros[1]:
            kept |= zeros[0] & carried
        if same[1] and marks.everywhere in zeros[0] and name != "sub":
            kept |= zeros[1] & carried
    return [kept] * len(step.outs)


def _met(step: Step, zeros: Sequence[Zeros], found: Zeros) -> Zeros:
    # An atom on two axes, as in x[:, None] + x[None, :]: an operand that has it on one of them is
    # zero at that index only. Of a product one zero is enough, otherwise all must be.
    enough = any if step.eqn.primitive.name in ("mul", "and") else all
    lost = set()
    for atom in found:
        axes = [axis for axis, term in enumerate(step.outs[0]) if atom in atoms(term)]
        if len(axes) > 1:
            there = [(t, z) for t, z in zip(step.ins, zeros, strict=True) if atom in within(t)]
            for axis in axes:
                if not enough(atom in z and atom in atoms(t[axis]) for t, z in there):
                    lost.add(atom)
    return found - lost


def _added(step: Step, zeros: Sequence[Zeros], marks: Marks) -> Zeros:
    spare = [
        z | within(terms) if marks.follows in z else z
        for z, terms in zip(zeros, step.ins, strict=True)
    ]
    return frozenset.intersection(*spare) & frozenset().union(*zeros)


def _bounds(step: Step, zeros: Sequence[Zeros], marks: Marks) -> list[Zeros]:
    # max(0, b) = 0 for a number b <= 0, min(0, b) = 0 for b >= 0
    sign = 1 if step.eqn.primitive.name == "min" else -1
    return [
        marks.every if compat.is_literal(v) and np.all(sign * np.asarray(v.val) >= 0) else z
        for v, z in zip(step.eqn.invars, zeros, strict=True)
    ]


def _joined(step: Step, zeros: Sequence[Zeros], marks: Marks) -> list[Zeros]:
    # An operand without the atom has nothing to say about it; all must be zero everywhere.
    operands = list(zip(step.ins, zeros, strict=True))
    if step.eqn.primitive.name == "optimization_barrier":
        return list(zeros)
    if step.eqn.primitive.name in ("gather", "dynamic_slice"):
        operands = operands[:1]
    found = set()
    for atom in frozenset().union(*(z for _, z in operands)):
        here = [z for terms, z in operands if atom is marks.everywhere or atom in within(terms)]
        if all(atom in z for z in here):
            found.add(atom)
    return [frozenset(found) for _ in step.outs]


def _broadcast(step: Step, zeros: Sequence[Zeros], marks: Marks) -> list[Zeros]:
    if marks.everywhere in zeros[0]:
        return [zeros[0]]
    kept = step.eqn.params["broadcast_dimensions"]
    new = [t for axis, t in enumerate(step.outs[0]) if axis not in kept]
    return [(zeros[0] & within(step.ins[0])) - within(new)]


def _pad(step: Step, zeros: Sequence[Zeros], marks: Marks) -> list[Zeros]:
    if marks.everywhere in zeros[0] & zeros[1]:
        return [marks.every]
    inside = within(step.ins[0])
    border = within(step.outs[0]) - inside
    return [(zeros[0] & inside) | (zeros[1] & border)]
