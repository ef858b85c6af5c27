"""Masks of parameters from channels of groups that stay, and the channels from masks.

Groups are those of `graph.axes`: dimensions that can only be removed together, channels or layers
of a scan; here both are called channels. Which of them stay is a dict, name of a group -> bool
[size]; a group that is not in it stays whole.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.compressor import is_float_array
from jaxcompress.core.paths import leaves_with_paths, near_misses
from jaxcompress.graph.coupling.dependency_graph import Axes, leaks
from jaxcompress.graph.coupling.smaller import keeper
from jaxcompress.graph.coupling.terms import Atom, Term, atoms, places, size

Kept = Mapping[str, Any]  # name of a group -> bool [size], True: the channel stays


def group_masks(axes: Axes, kept: Kept) -> Any:
    """The masks of all parameters that go with the channels that do not stay.

    A network masked so computes what `shrink` makes of it, so it may be trained first and cut
    later.

    Args:
      axes: what `graph.axes` found in the network.
      kept: name of a group -> bool [size].

    Returns:
      bool masks with the params' structure: a 0-d True where nothing goes, and for integers.

    Raises:
      ValueError: an unknown group, or a mask of another size.

    >>> from jaxcompress.graph.coupling.dependency_graph import axes
    >>> params = {"up": jnp.ones((4, 2)), "down": jnp.ones((2, 3))}
    >>> found = axes(lambda p, x: x @ p["up"] @ p["down"], params, jnp.ones((1, 4)))
    >>> group_masks(found, {"up[1]": np.array([True, False])})["down"].tolist()
    [[True, True, True], [False, False, False]]
    """
    keep = keeper(by_atom(axes, checked(axes, kept)))
    leaves = axes.program.leaves

    def mask(path: str, w: Any) -> jax.Array:
        sides = [keep(term) for term in leaves[path]]
        if not is_float_array(w) or all(side.all() for side in sides):
            return jnp.ones((), bool)
        # an entry stays if its index stays along every axis
        whole = np.ones(w.shape, bool)
        for axis, side in enumerate(sides):
            whole &= along(side, axis, w.ndim)
        return jnp.asarray(whole)

    params = axes.program.params
    new = [mask(path, w) for path, w in leaves_with_paths(params)]
    return jax.tree.structure(params).unflatten(new)


def masked_groups(axes: Axes, masks: Any) -> dict[str, np.ndarray]:
    """Which channels of each group stay in a network with these masks, bool [size] (eager).

    A channel goes if it is masked, in all the weights it has, in so many parameters that the
    network computes the same without it: in all that write it and nothing revives it, as a sigmoid
    does; or in all that read it. Vectors that are added to it or scale it (biases, norms) need no
    masks: they go with it.

    Args:
      axes: what `graph.axes` found in the network.
      masks: bool masks with the params' structure; a 0-d True for a dense leaf.

    Raises:
      ValueError: masks of another structure or shape, or that are not bool.
    """
    return read_masks(axes, masks).kept


class Reading(NamedTuple):
    """What masks say of groups.

    Attributes:
      kept: group -> bool [size].
      held: group -> why channels that are masked somewhere stay.
      followed: paths of vectors with entries that no mask covers and that go with their channel.
    """

    kept: dict[str, np.ndarray]
    held: dict[str, str]
    followed: tuple[str, ...]


def read_masks(axes: Axes, masks: Any) -> Reading:
    """As `masked_groups`, with what was decided otherwise than the masks may suggest."""
    dead = _dead(axes, masks)
    vectors = [path for path in axes.program.leaves if _is_vector(axes, path)]
    patterns = {name: _patterns(found) for name, found in dead.items()}
    kept = {name: np.ones(group.size, bool) for name, group in axes.every.items()}
    held: dict[str, str] = {}
    for turn in range(max(map(len, patterns.values()), default=0)):
        # Channels of different groups do not meet: a pattern of each is followed at once.
        tried = {name: found[turn] for name, found in patterns.items() if turn < len(found)}
        masked: dict[str, list[str]] = {}
        for name, (where, _) in tried.items():
            for path in where:
                masked.setdefault(path, []).append(name)
        reasons = leaks(axes, masked, vectors)
        for name, (where, channels) in tried.items():
            why = reasons.get(name) or axes.every[name].inexact
            if why:
                held.setdefault(name, f"masked in {', '.join(sorted(where))}: {why}")
            else:
                kept[name][channels] = False
    followed = dict.fromkeys(
        m.path
        for name, group in axes.every.items()
        for m in group.members
        if m.path in vectors
        and np.any(~kept[name] & ~dead[name].get(m.path, np.zeros(group.size, bool)))
    )
    return Reading(kept, held, tuple(followed))


def group_names(axes: Axes, of: Iterable[str] | None) -> list[str]:
    """The names of groups that are asked for; None: of all groups of channels.

    Raises:
      ValueError: an unknown group.
    """
    names = list(axes.groups if of is None else of)
    for name in names:
        if name not in axes.every:
            nearest = ", ".join(map(repr, near_misses(name, axes.every)))
            raise ValueError(
                f"there is no group {name!r}; nearest: {nearest or 'none'}; {axes.why_none}"
            )
    return names


def checked(axes: Axes, kept: Kept) -> dict[str, np.ndarray]:
    """The same as NumPy arrays.

    Raises:
      ValueError: an unknown group, a mask of another size or dtype.
    """
    found = {}
    for name in group_names(axes, kept):
        stays = kept[name]
        array, size = np.asarray(stays), axes.every[name].size
        if array.dtype != bool or array.shape != (size,):
            raise ValueError(
                f"group {name!r} needs bool [{size}], got {array.dtype} {list(array.shape)}"
            )
        found[name] = array
    return found


def by_atom(axes: Axes, kept: Mapping[str, np.ndarray]) -> dict[Atom, np.ndarray]:
    """Keys as `graph.coupling.smaller` wants them."""
    return {axes.program.atoms[name]: stays for name, stays in kept.items()}


def of_network(axes: Axes, params: Any) -> list[tuple[str, Any]]:
    """The leaves of the network's parameters with their paths.

    Raises:
      ValueError: leaves or shapes are not those that were traced.
    """
    flat = leaves_with_paths(params)
    traced = {path: tuple(map(size, terms)) for path, terms in axes.program.leaves.items()}
    given = {path: tuple(np.shape(w)) for path, w in flat}
    for path in traced | given:
        if traced.get(path) != given.get(path):
            raise ValueError(
                f"params: {path!r} has shape {given.get(path, 'none')}, the network was traced "
                f"with {traced.get(path, 'none')}"
            )
    return flat


def along(side: Any, axis: int, ndim: int) -> Any:
    """A vector as an array that broadcasts along one axis."""
    return side.reshape([-1 if a == axis else 1 for a in range(ndim)])


def _dead(axes: Axes, masks: Any) -> dict[str, dict[str, np.ndarray]]:
    # group -> path of a member -> bool [size]: the mask covers all weights of the channel
    flat = leaves_with_paths(masks)
    leaves, groups = axes.program.leaves, {atom: n for n, atom in axes.program.atoms.items()}
    if [path for path, _ in flat] != list(leaves):
        raise ValueError(
            f"masks: the leaves must be those of the params, {list(leaves)[:3]}..., got "
            f"{[path for path, _ in flat][:3]}..."
        )
    dead: dict[str, dict[str, np.ndarray]] = {name: {} for name in axes.every}
    for path, mask in flat:
        mask, shape = np.asarray(mask), tuple(map(size, leaves[path]))
        if mask.dtype != bool or mask.shape not in ((), shape):
            raise ValueError(
                f"masks: {path!r} needs bool {list(shape)} or a 0-d True, got {mask.dtype} "
                f"{list(mask.shape)}"
            )
        if mask.ndim == 0 and shape:
            continue
        for axis, term in enumerate(leaves[path]):
            alive = np.asarray(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
            for atom, at in places(term):
                if atom in groups:
                    lives = np.zeros(atom.size, bool)
                    np.logical_or.at(lives, at[at >= 0], alive[at >= 0])
                    found = dead[groups[atom]]
                    found[path] = found.get(path, np.ones(atom.size, bool)) & ~lives
    return dead


def _is_vector(axes: Axes, path: str) -> bool:
    # Of parameters stacked for a scan one layer counts.
    long = [t for t in axes.program.leaves[path] if size(t) > 1 and not _stacks(t)]
    return len(long) <= 1


def _stacks(term: Term) -> bool:
    return all(atom.stack for atom in atoms(term))


def _patterns(dead: Mapping[str, np.ndarray]) -> list[tuple[frozenset[str], list[int]]]:
    # (parameters in which the channel is masked, channels that share them)
    paths = sorted(dead)
    found: dict[frozenset[str], list[int]] = {}
    for channel, row in enumerate(zip(*(dead[path] for path in paths), strict=True)):
        where = frozenset(path for path, gone in zip(paths, row, strict=True) if gone)
        if where:
            found.setdefault(where, []).append(channel)
    return list(found.items())
