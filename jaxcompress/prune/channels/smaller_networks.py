"""Smaller networks from pruned ones: channels that are masked are cut out of every array."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.core.sharding.meshes import on_any_mesh
from jaxcompress.graph.coupling.dependency_graph import Axes
from jaxcompress.graph.coupling.dependency_graph import axes as find_axes
from jaxcompress.graph.coupling.smaller import keeper, replay, take
from jaxcompress.graph.coupling.terms import size
from jaxcompress.prune.channels.coupled import by_atom, checked, of_network, read_masks
from jaxcompress.prune.masking.mask_state import apply_masks


@dataclass(frozen=True)
class ShrinkReport:
    """What was removed and what could not be.

    Attributes:
      shapes: path -> new shape, of all parameters; enough to build the module with new widths.
      before: path -> old shape.
      kept: group -> bool [size], which channels stay.
      inexact: group -> why the small network is not the masked one; only what was allowed.
      summed: group -> where the program sums over it: a mean divides by the old number, as in the
        masked network.
      held: group -> why channels that were masked in some parameters stay.
      followed: paths of biases and norms with entries that no mask covers and that went with their
        channel.
      frozen: (path, axis, why) of axes from which nothing can be removed.
      unknown: primitives without a rule; the axes they touch are frozen.
    """

    shapes: Mapping[str, tuple[int, ...]]
    before: Mapping[str, tuple[int, ...]] = field(repr=False)
    kept: Mapping[str, np.ndarray] = field(repr=False, compare=False)
    inexact: Mapping[str, str]
    summed: Mapping[str, str] = field(repr=False)
    held: Mapping[str, str]
    followed: tuple[str, ...] = field(repr=False)
    frozen: tuple[tuple[str, int, str], ...] = field(repr=False)
    unknown: tuple[str, ...]

    @property
    def changed(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """Path -> (old shape, new shape), of parameters that became smaller."""
        pairs = {path: (old, self.shapes[path]) for path, old in self.before.items()}
        return {path: pair for path, pair in pairs.items() if pair[0] != pair[1]}

    @property
    def params(self) -> int:
        """Number of parameters now."""
        return sum(int(np.prod(shape)) for shape in self.shapes.values())

    @property
    def params_before(self) -> int:
        """Number of parameters before."""
        return sum(int(np.prod(shape)) for shape in self.before.values())

    def __str__(self) -> str:
        lines = [f"{self.params_before:,} parameters -> {self.params:,}"]
        for name, stays in self.kept.items():
            if not stays.all():
                lines.append(f"  {name}: {stays.size} -> {stays.sum()}")
        lines += [f"  {name}: not what masks compute, {why}" for name, why in self.inexact.items()]
        lines += [f"  {name}: some stay, {why}" for name, why in self.held.items()]
        if self.unknown:
            lines.append(f"  without a rule, all axes frozen: {', '.join(self.unknown)}")
        return "\n".join(lines)


class Shrunk(NamedTuple):
    """A smaller network: `fn(params, *inputs)`, and what was removed."""

    fn: Callable[..., Any]
    params: Any
    report: ShrinkReport


@on_any_mesh
def shrink(
    apply_fn: Callable[..., Any],
    params: Any,
    masks: Any,
    inputs: Any,
    *,
    axes: Axes | None = None,
    round_to: int = 1,
    min_keep: int = 1,
    allow_inexact: bool = False,
    renormalise: bool = False,
) -> Shrunk:
    """Cuts masked channels out of all parameters, and the program down to what is left.

    f_small(small, x) = f(where(group_masks, params, 0), x) up to rounding, with the masks of
    `group_masks(axes, report.kept)`; not so with the last two options below. The small function
    evaluates the traced program with the new sizes: it is pure, for jit, grad, vmap and export, and
    the first axis of its inputs may have another length than in the examples, unless that is 1 or
    the program sums over it.

    Args:
      apply_fn: a pure function (params, *inputs), as it runs in inference.
      params: pytree of arrays; running statistics belong to it.
      masks: bool masks with the structure of `params`, as `prune.masks` gives them; what goes is
        said at `masked_groups`, what does not stays as it is masked. Or name of a group, of
        channels or of layers, -> bool [size], as `choose_groups` gives; others stay whole.
      inputs: a tuple of example inputs, or one array; `jax.ShapeDtypeStruct`s will do.
      axes: what `graph.axes` found in the same function; None to look.
      round_to: the channels left of each group are a multiple of this, or all: those with the
        lowest indices among the removed stay too.
      min_keep: at least so many channels of a group stay, chosen likewise; at least 1.
      allow_inexact: whether channels may go of groups of which removing is not masking: softmax
        over the channels, or a variance around a mean that counts them. Only for channels by group.
      renormalise: whether means over cut channels (LayerNorm) divide by what is left, as a network
        built with the new widths does, and not by the old number as the masked network does.

    Returns:
      (fn, params, report); the params have the same structure.

    Raises:
      ValueError: masks that fit neither the params nor the groups; an inexact group that is not
        allowed; params of another network than `axes`; round_to or min_keep below 1.

    Source: the groups are those of DepGraph, https://arxiv.org/abs/2301.12900.

    >>> params = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 2))}
    >>> f = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
    >>> fn, small, report = shrink(f, params, {"up[1]": np.arange(8) < 5}, jnp.ones((2, 4)))
    >>> report.shapes["down"], fn(small, jnp.ones((3, 4))).shape
    ((5, 2), (3, 2))
    >>> print(report)
    48 parameters -> 30
      up[1]: 8 -> 5
    """
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    axes = axes or find_axes(apply_fn, params, *inputs)
    flat = of_network(axes, params)
    held, followed = {}, ()
    if _is_tree(masks, params):
        kept, held, followed = read_masks(axes, masks)
        flat = leaves_with_paths(apply_masks(params, masks))
    elif isinstance(masks, Mapping) and all(isinstance(name, str) for name in masks):
        kept = checked(axes, masks)
    else:
        raise ValueError(
            "masks must have the params' structure, or be a dict: name of a group -> bool; got "
            f"{jax.tree.structure(masks)}"
        )
    rounded = {name: readmit(stays, round_to, min_keep) for name, stays in kept.items()}
    every = {name: rounded.get(name, np.ones(g.size, bool)) for name, g in axes.every.items()}
    inexact = _inexact(axes, every, allow_inexact)
    chosen = by_atom(axes, {name: stays for name, stays in every.items() if not stays.all()})
    keep = keeper(chosen)
    leaves = axes.program.leaves
    small = [take(w, leaves[path], keep) for path, w in flat]
    report = ShrinkReport(
        shapes={path: tuple(jnp.shape(w)) for (path, _), w in zip(flat, small, strict=True)},
        before={path: tuple(map(size, terms)) for path, terms in leaves.items()},
        kept=every,
        inexact=inexact,
        summed={n: g.summed for n, g in axes.every.items() if g.summed and not every[n].all()},
        held=held,
        followed=followed,
        frozen=axes.frozen,
        unknown=axes.unknown,
    )
    fn = replay(axes, chosen, renormalise=renormalise)
    return Shrunk(on_any_mesh(fn), jax.tree.structure(params).unflatten(small), report)


def readmit(stays: np.ndarray, round_to: int = 1, min_keep: int = 1) -> np.ndarray:
    """Keeps more, lowest index first, until their number is at least `min_keep` and rounded up.

    Raises:
      ValueError: `round_to` or `min_keep` is below 1.

    >>> readmit(np.array([False, False, True, True, True, False]), 4).astype(int).tolist()
    [1, 0, 1, 1, 1, 0]
    """
    count = rounded_up(int(stays.sum()), stays.size, round_to, min_keep)
    result = stays.copy()
    result[np.flatnonzero(~stays)[: count - int(stays.sum())]] = True
    return result


def rounded_up(count: int, size: int, round_to: int, min_keep: int) -> int:
    """The number of channels that stay: a multiple of `round_to` if the size allows.

    Raises:
      ValueError: `round_to` or `min_keep` is below 1.

    >>> rounded_up(5, 16, 4, 1), rounded_up(0, 16, 1, 2), rounded_up(5, 6, 4, 1)
    (8, 2, 6)
    """
    for name, value in (("round_to", round_to), ("min_keep", min_keep)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    return min(size, -(-max(count, min_keep) // round_to) * round_to)


def _is_tree(masks: Any, params: Any) -> bool:
    return jax.tree.structure(masks) == jax.tree.structure(params)


def _inexact(axes: Axes, kept: Mapping[str, np.ndarray], allowed: bool) -> dict[str, str]:
    found = {}
    for name, group in axes.every.items():
        if group.inexact and not kept[name].all():
            found[name] = group.inexact
    if found and not allowed:
        name, why = next(iter(found.items()))
        raise ValueError(
            f"group {name!r} cannot be cut without a trace: {why}; leave it whole, or pass "
            "allow_inexact=True"
        )
    return found
