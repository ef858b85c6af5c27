"""What is found of coupled dimensions: groups, their members, and what they are called."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxcompress.core.paths import unique
from jaxcompress.graph.coupling.axis_shapes import Terms
from jaxcompress.graph.coupling.scopes import Scope
from jaxcompress.graph.coupling.terms import Atom, Prod, Term, atoms, resolve, size
from jaxcompress.graph.tracing import Program


@dataclass(frozen=True)
class Member:
    """A place where a group appears: an axis of a parameter.

    Attributes:
      path: of the parameter.
      axis: of the parameter.
      part: where in the axis: "" if the group is the whole of it, "[8:24]" for a stretch of it,
        ".0" for the first factor of a reshaped axis, or several of these.
    """

    path: str
    axis: int
    part: str = ""


@dataclass(frozen=True)
class Group:
    """Dimensions that can only be removed together.

    Attributes:
      name: that of the first member that is the last axis of a matrix, "Dense_0/kernel[1]".
      size: number of indices (channels).
      members: all axes that go with it.
      inexact: why the network without some channels is not the one with these masked; "" if both
        compute the same.
      summed: where the program sums over the group itself; a mean over it still divides by the
        number it was traced with, as in the masked network. "" if nowhere.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    inexact: str = ""
    summed: str = ""


@dataclass(frozen=True)
class Axes:
    """What `axes` finds.

    Attributes:
      groups: of channels, by name, in the order of the parameters.
      layers: groups of layers of a scan, by name: parameters stacked along their first axis.
      frozen: (path, axis, why) of every axis, or part of one, from which nothing can be removed.
      unknown: primitives without a rule: all axes they touch are frozen.
      program: what was traced, and its shapes.
    """

    groups: Mapping[str, Group] = field(hash=False)
    layers: Mapping[str, Group] = field(hash=False)
    frozen: tuple[tuple[str, int, str], ...]
    unknown: tuple[str, ...]
    program: "Cuttable" = field(hash=False, repr=False)

    @property
    def why_none(self) -> str:
        """What froze axes, for messages where no group is found."""
        unknown = f"without a rule: {', '.join(self.unknown)}; " if self.unknown else ""
        frozen = [f"{path}[{axis}]: {why}" for path, axis, why in self.frozen]
        more = f" and {len(frozen) - 4} more" if len(frozen) > 4 else ""
        return f"{unknown}frozen: {', '.join(frozen[:4]) or 'nothing'}{more}"

    @property
    def every(self) -> dict[str, Group]:
        """All groups, of channels and of layers."""
        return {**self.groups, **self.layers}


@dataclass(frozen=True, eq=False)
class Cuttable:
    """A traced program with the terms of all its values.

    Attributes:
      traced: the program.
      scope: terms of all values.
      params: structure, shapes and dtypes of the parameters.
      inputs: those of the inputs, a tuple.
      leaves: path of a parameter -> the terms of its axes.
      atoms: name of a group -> the atom it is.
    """

    traced: Program
    scope: Scope
    params: Any
    inputs: tuple[Any, ...]
    leaves: Mapping[str, Terms]
    atoms: Mapping[str, Atom]


def members_of(leaves: Mapping[str, Terms]) -> dict[Atom, list[Member]]:
    """Where each atom appears from which something may be removed."""
    found: dict[Atom, list[Member]] = {}
    for path, terms in leaves.items():
        for axis, term in enumerate(terms):
            for atom, part in _parts(resolve(term)):
                if not atom.frozen:
                    found.setdefault(atom, []).append(Member(path, axis, part))
    return found


def _parts(term: Term, at: str = "") -> Iterator[tuple[Atom, str]]:
    if isinstance(term, Atom):
        yield term, at
    elif isinstance(term, Prod):
        for number, factor in enumerate(term.factors):
            yield from _parts(factor, f"{at}.{number}")
    else:
        start = 0
        for part in term.parts:
            stop = start + size(part)
            yield from _parts(part, f"{at}[{start}:{stop}]")
            start = stop


def names_of(members: Mapping[Atom, list[Member]], leaves: Mapping[str, Terms]) -> dict[str, Atom]:
    """The atoms by the name of their group."""
    named: dict[str, Atom] = {}
    for atom, where in members.items():
        matrices = [m for m in where if len(leaves[m.path]) > 1]
        outputs = [m for m in matrices if m.axis == len(leaves[m.path]) - 1]
        first = (outputs or matrices or where)[0]
        named[unique(f"{first.path}[{first.axis}]{first.part}", named)] = atom
    return named


def frozen_of(leaves: Mapping[str, Terms]) -> tuple[tuple[str, int, str], ...]:
    """(path, axis, why) of what nothing may be removed from."""
    found: dict[tuple[str, int, str], None] = {}
    for path, terms in leaves.items():
        for axis, term in enumerate(terms):
            for atom in atoms(term):
                if atom.frozen:
                    found[path, axis, atom.frozen] = None
    return tuple(found)
