"""Which elements of a parameter leaf a contraction multiplies with, whatever views lie between."""

import math
from collections.abc import Container, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.graph.flat_list import END, LOOP, Inlined, Op, carried, inline, rows
from jaxcompress.graph.origin_domain import Place
from jaxcompress.graph.primitives import move, row
from jaxcompress.graph.tracing import Program


class View(NamedTuple):
    """The weight operand of a contraction as elements of one leaf.

    Attributes:
      path: of the leaf.
      index: int [*trips, *operand shape], positions in the flattened leaf; one axis in front for
        each enclosing loop, outermost first, of size 1 where all trips use the same elements.
    """

    path: str
    index: np.ndarray


class Part(NamedTuple):
    """Elements of a leaf: a view, within the first `depth` of the loops around it."""

    path: str
    index: np.ndarray  # [*trips of the first `depth` loops, *shape]
    depth: int

    def inside(self, depth: int) -> "Part":
        """The same within `depth` loops: the further ones share it."""
        lead, rest = self.index.shape[: self.depth], self.index.shape[self.depth :]
        index = self.index.reshape(*lead, *(1,) * (depth - self.depth), *rest)
        return Part(self.path, index, depth)


class Reader(NamedTuple):
    """What reads elements of a leaf, and is no contraction with them.

    Attributes:
      path: of the leaf.
      what: name of the operation, and where it is.
      index: int, positions in the flattened leaf.
    """

    path: str
    what: str
    index: np.ndarray


def views(program: Program) -> dict[Place, View]:
    """The view behind the weight operand of every contraction where there is one.

    What moves elements of one leaf and takes none twice, identities, casts and the rows of a scan
    are views; arithmetic on a leaf (normalized or masked weights), joined leaves and leaves that a
    loop carries are none.
    """
    return views_and_readers(program)[0]


def views_and_readers(program: Program) -> tuple[dict[Place, View], list[Reader]]:
    """As `views`, and all else that reads leaves, in every branch of a `cond`."""
    flat = inline(program, weigh=None)
    parts, found = parts_of(program, flat), {}
    taken = set()
    for k, op in enumerate(flat.ops):
        site = program.contractions.get(op.place)
        number = None if site is None or site.weight is None else op.operands[site.weight]
        if site is not None and number in parts:
            part = parts[number]
            found[op.place] = View(part.path, part.inside(len(op.region)).index)
            taken.add((k, site.weight))
    return found, readers(flat, parts, taken)


def readers(
    flat: Inlined, parts: dict[int, Part], taken: Container[tuple[int, int | None]]
) -> list[Reader]:
    """What reads views of leaves, whose result counts, and is no view itself.

    Args:
      flat: the operations.
      parts: of `parts_of`.
      taken: (operation, operand) that are left out.
    """
    alive, found = {*flat.outputs, *flat.tests}, []
    for k in range(len(flat.ops) - 1, -1, -1):
        op = flat.ops[k]
        if op.primitive not in (LOOP, END) and alive.isdisjoint(op.outputs):
            continue
        alive.update(op.inputs)
        if op.primitive == LOOP:  # constants and rows are read inside, if at all
            carry = len(carried(op)[0]) - len(rows(op)[0])
            operands = carried(op)[0][:carry]
        elif op.primitive == END:
            operands = op.operands[len(op.eqn.invars) - len(op.outputs) :]
        elif op.outputs and op.outputs[0] in parts:
            continue
        else:
            operands = [n for port, n in enumerate(op.operands) if (k, port) not in taken]
        name = "a loop that carries it" if op.primitive in (LOOP, END) else op.primitive
        what = f"{name} at {op.scope!r}" if op.scope else name
        found += [Reader(parts[n].path, what, parts[n].index) for n in operands if n in parts]
    results = (parts[n] for n in flat.outputs if n in parts)
    return found[::-1] + [Reader(part.path, "the result", part.index) for part in results]


def parts_of(program: Program, flat: Inlined, *, written: bool = False) -> dict[int, Part]:
    """All values of an inlined program that are views of one leaf, by number.

    Args:
      program: what was traced.
      flat: its operations.
      written: whether what is written into the leaf must be what is read from it: no view through
        integers or a narrower type. Such a view may repeat elements.
    """
    parts: dict[int, Part] = {}
    for number, (path, leaf) in enumerate(program.graph.params.items()):
        index = np.arange(math.prod(leaf.shape)).reshape(leaf.shape)
        parts[number] = Part(path, index, 0)
    narrowed: set[int] = set()
    for op in flat.ops:
        if op.primitive == LOOP:
            inside = _rows(op, parts)
            parts.update(inside)
            pairs = zip(*rows(op), strict=True)
            narrowed |= {inner for outer, inner in pairs if outer in narrowed}
            continue
        found = _viewed(op, parts, written) if op.primitive != END else []
        if any(found) and not (written and not _holds(op, narrowed)):
            pairs = zip(op.outputs, found, strict=True)
            parts.update((number, part) for number, part in pairs if part)
    return parts


def _holds(op: Op, narrowed: set[int]) -> bool:
    # Whether a view gives what is written before it; notes views of a narrower type than the leaf.
    old, new = (v.aval.dtype for v in (op.eqn.invars[0], op.eqn.outvars[0]))
    if old == new:
        wider, good = False, op.primitive != "reduce_precision"
    else:
        with jax.numpy_dtype_promotion("standard"):
            wider = jnp.promote_types(old, new) == new
        good = all(jnp.issubdtype(dtype, jnp.inexact) for dtype in (old, new))
    number = op.operands[0]
    if (old != new and not wider) or number in narrowed:
        narrowed.add(op.outputs[0])
    return good and not (wider and number in narrowed)


def _rows(op: Op, parts: dict[int, Part]) -> dict[int, Part]:
    # What a scan takes row by row has the trips in front inside its body.
    depth, found = len(op.region), {}
    for outer, inner in zip(*rows(op), strict=True):
        if outer in parts:
            part = parts[outer].inside(depth)
            found[inner] = part._replace(depth=depth + 1)
    return found


def _viewed(op: Op, parts: dict[int, Part], broadcast: bool) -> Sequence[Part | None]:
    # The results as elements of one leaf; None for those that are anything else.
    kind, nothing = row(op.primitive).kind, [None] * len(op.outputs)
    given = [None if n is None else parts.get(n) for n in op.operands]
    if kind == "identity":
        return given
    if not is_view(op.primitive) or None in given:
        return nothing
    found = [part for part in given if part]
    shapes = [v.aval.shape for v in op.eqn.invars]
    if [part.index.shape[part.depth :] for part in found] != shapes:  # those of one device
        return nothing
    first, lead = found[0], found[0].index.shape[: found[0].depth]
    same = (first.path, first.depth, lead)
    if any((part.path, part.depth, part.index.shape[: part.depth]) != same for part in found):
        return nothing
    rows = [x.index.reshape((math.prod(lead), *x.index.shape[first.depth :])) for x in found]
    moved = move(op.eqn, rows, lead=1) if kind == "move" else rows
    assert moved is not None
    repeated = any(x[0].size > rows[0][0].size for x in moved if len(x))
    if len(rows) > 1:
        repeated = any(len(np.unique(x)) < x.size for x in moved)
    if repeated and not broadcast:
        return nothing
    return [first._replace(index=x.reshape((*lead, *x.shape[1:]))) for x in moved]


def is_view(primitive: str) -> bool:
    """Whether a primitive's results may be views of its operands: moves, identities, casts."""
    meaning = row(primitive)
    cast = meaning.elementwise and meaning.work == "" and meaning.linear
    return cast or meaning.kind in ("identity", "move")
