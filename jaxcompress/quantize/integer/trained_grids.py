"""Grids that training has found, as they are: of packed weights, and of activations.

A packed weight has a step for each of its elements; where only views lie between the leaf and its
contraction, the steps take the same views. The grid of an activation belongs to what a contraction
reads. Maxima, clamps and views keep the order of numbers, so a tensor that reaches the contraction
only through these may have that grid from its accumulator on: it is then rounded once.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxcompress.core.packed import Grid, Masked, QTensor, is_packed
from jaxcompress.core.paths import leaves_with_paths, near_misses
from jaxcompress.formats.integers import Integer
from jaxcompress.graph import walk
from jaxcompress.graph.equations import Equation
from jaxcompress.graph.primitives import move, row

_MARK = "grid of "


def named(fn: Callable[..., Any], grids: Mapping[str, Grid]) -> Callable[..., Any]:
    """`fn` with a name on what enters the contractions of `grids`; the numbers stay."""
    if not grids:
        return fn
    mark = lambda tap, x, state: (checkpoint_name(x, _MARK + tap.name), state)
    walked = walk(fn, mark)
    return lambda params, x: walked({name: jnp.int32(0) for name in grids}, params, x)[0]


def check_grids(grids: Mapping[str, Grid], names: list[str], *, symmetric: bool) -> dict[str, Grid]:
    """The grids as scalars on integers, by the names of contractions.

    Raises:
      TypeError: no `Grid` of `formats.integer`.
      ValueError: a name of no contraction; several scales; signed and unsigned codes mixed.
    """
    found = {}
    for name, grid in grids.items():
        if name not in names:
            raise ValueError(
                f"grids: {name!r} is no contraction of the network; nearest: "
                f"{', '.join(near_misses(name, names) or names[:3]) or 'there are none'}"
            )
        if not isinstance(grid, Grid) or not isinstance(grid.format, Integer):
            raise TypeError(
                f"grids: {name!r} must be a Grid of formats.integer, as quantizer.grids gives, got "
                f"{grid.format.name if isinstance(grid, Grid) else type(grid).__name__}"
            )
        if grid.format.symmetric != symmetric:
            raise ValueError(
                f"grids: {name!r} is on {grid.format.name}, but activations= is "
                f"{'symmetric' if symmetric else 'asymmetric'}: all codes are of one kind; "
                f"give activations=formats.integer(8, symmetric={grid.format.symmetric})"
            )
        if any(np.size(p) != 1 for p in jax.tree.leaves(grid.qparams)):
            raise ValueError(f"grids: {name!r} has several scales; a tensor needs one")
        found[name] = Grid(jax.tree.map(lambda p: jnp.reshape(p, ()), grid.qparams), grid.format)
    return found


def grid_name(equation: Equation) -> str | None:
    """The contraction whose grid an equation stands for, if it does."""
    name = equation.eqn.params.get("name") if equation.primitive == "name" else None
    return name[len(_MARK) :] if isinstance(name, str) and name.startswith(_MARK) else None


def fixed_grids(
    equations: tuple[Equation, ...], uses: Mapping[int, int], grids: Mapping[str, Grid]
) -> dict[int, Grid]:
    """{number of a value: its grid}: of named values, and of what reaches them alone, in order."""
    fixed: dict[int, Grid] = {}
    for equation in reversed(equations):
        name = grid_name(equation)
        if name is not None:
            fixed[equation.outputs[0]] = grids[name]
        grid = fixed.get(equation.outputs[0])
        if grid is None or not row(equation.primitive).order:
            continue
        for number in equation.operands:
            if uses.get(number, 0) == 1:
                fixed[number] = grid
    return fixed


def steps_of(leaf: Any) -> np.ndarray | None:
    """The step of every element of a packed leaf on symmetric integers; None of any other."""
    values = leaf.values if isinstance(leaf, Masked) else leaf
    if not isinstance(values, QTensor) or not isinstance(values.format, Integer):
        return None
    if not values.format.symmetric:
        return None
    scale = values.granularity.expand(values.qparams.scale, leaf.shape)
    return np.asarray(jnp.broadcast_to(scale, leaf.shape), np.float32)


class Steps:
    """Steps of values that are views of packed leaves, and the packed leaves behind every value."""

    def __init__(self, numbers: list[int], params: Any):
        leaves = leaves_with_paths(params, is_leaf=is_packed)
        self.steps: dict[int, np.ndarray] = {}
        self.behind: dict[int, frozenset[str]] = {}
        for number, (path, leaf) in zip(numbers, leaves, strict=False):
            if is_packed(leaf):
                self.behind[number] = frozenset([path])
                steps = steps_of(leaf)
                if steps is not None:
                    self.steps[number] = steps

    def follow(self, equations: list[Equation]) -> None:
        """Carries both through equations."""
        for e in equations:
            behind = frozenset().union(*(self.behind.get(n, frozenset()) for n in e.operands))
            if not behind:
                continue
            self.behind.update(dict.fromkeys(e.outputs, behind))
            source, meaning = self.steps.get(e.operands[0]), row(e.primitive)
            if source is None or len(e.operands) > 1:
                continue
            if meaning.kind == "identity" or (meaning.elementwise and meaning.order):  # casts
                self.steps[e.outputs[0]] = source
            elif (found := move(e.eqn, [source])) is not None:
                self.steps.update(zip(e.outputs, found, strict=True))
