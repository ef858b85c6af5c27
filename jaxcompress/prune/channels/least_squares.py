"""Scores of coupled channels by what their removal costs when the rest makes up for it."""

from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcompress.core.notices import warn
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.core.sharding.meshes import on_any_mesh
from jaxcompress.graph.coupling.dependency_graph import Axes
from jaxcompress.graph.coupling.terms import places, size
from jaxcompress.graph.layers.matrices import Layer, layers
from jaxcompress.graph.layers.statistics import Moments, capture, check_batches
from jaxcompress.graph.layers.uses import Pool, pools
from jaxcompress.prune.channels.coupled import along, group_names, of_network
from jaxcompress.prune.saliency.score_trees import check_weights


@on_any_mesh
def group_obs(
    axes: Axes,
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[tuple[Any, ...]],
    *,
    of: Iterable[str] | None = None,
    damping: float = 0.01,
) -> dict[str, Array]:
    """The squared error of what reads a channel, when it goes after all that have lower scores.

    The channels of a group are removed one by one. At each step that one goes whose removal changes
    the outputs of the layers behind least, the weights of the channels that stay moving to where
    the change is smallest (least squares, as in `sparse_gpt(..., masks=...)`). Two channels that
    say the same are thus one: the second is as dear as both. Scores are the errors summed up to
    there, a share of the outputs' mean squares, averaged over the layers; they rise in the order of
    removal, so that `choose_groups` and `groups_for_macs` take the channels in this order. Eager;
    float64 on the host.

    Args:
      axes: what `graph.axes` found in the network.
      apply_fn: pure, (params, *inputs) -> outputs.
      params: the network's parameters.
      batches: tuples of inputs.
      of: names of groups of channels; None: all that a contraction with a weight reads.
      damping: share of the mean of the diagonal of X^T X that is added to it.

    Returns:
      Name of a group -> float32 [size], higher stays.

    Raises:
      ValueError: no batch, params of another network, NaN in a weight, NaN or Inf in what enters a
        layer; a group that there is not or that no contraction reads; `damping` not positive.

    Source: Kurtic, Frantar, Alistarh 2023, ZipLM, arXiv 2302.04089, section 3.1; Hassibi and Stork
    1993 for one weight.

    >>> from jaxcompress.graph.coupling.dependency_graph import axes
    >>> params = {"up": jnp.array([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), "down": jnp.ones((3, 1))}
    >>> x = jnp.array([[1.0, 0.0], [0.0, 0.5]])
    >>> fn = lambda p, x: x @ p["up"] @ p["down"]
    >>> score = group_obs(axes(fn, params, x), fn, params, [(x,)], damping=1e-6)["up[1]"]
    >>> np.argsort(score).tolist()  # the first two are one: the last costs less than both
    [0, 2, 1]
    """
    started = _start(axes, apply_fn, params, batches, of, damping)
    return {
        name: jnp.asarray(_remove_all(axes.every[name].size, matrices)[0], jnp.float32)
        for name, matrices in started.items()
    }


class Removal(NamedTuple):
    """Some channels of a group gone, and the weights that make up for them.

    Attributes:
      kept: bool [size], the channels that stay.
      leaves: path of a leaf that reads them -> its new value, zeros where it read what is gone.
    """

    kept: np.ndarray
    leaves: dict[str, Array]


@on_any_mesh
def group_removals(
    axes: Axes,
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[tuple[Any, ...]],
    counts: Callable[[int], Iterable[int]],
    *,
    of: Iterable[str] | None = None,
    damping: float = 0.01,
) -> dict[str, dict[int, Removal]]:
    """What is left when a group keeps so many channels, all others staying whole.

    Args:
      axes, apply_fn, params, batches, of, damping: as in `group_obs`, in whose order channels go.
      counts: size of a group -> how many channels to keep, each below it.

    Returns:
      Name of a group -> {channels that stay: Removal}.

    Raises:
      ValueError: as in `group_obs`.
    """
    started = _start(axes, apply_fn, params, batches, of, damping)
    flat = dict(leaves_with_paths(params))
    result: dict[str, dict[int, Removal]] = {}
    for name, matrices in started.items():
        size = axes.every[name].size
        _, seen = _remove_all(size, matrices, set(counts(size)))
        result[name] = {
            count: Removal(kept, _put(flat, matrices, weights))
            for count, (kept, weights) in seen.items()
        }
    return result


def _start(axes, apply_fn, params, batches, of, damping) -> dict[str, list["_Matrix"]]:
    # What reads the channels of each group, with the Gram matrices of its inputs.
    if not damping > 0:
        raise ValueError(f"damping must be positive, got {damping}")
    check_weights(params)
    of_network(axes, params)
    batches = check_batches(batches)
    found = layers(apply_fn, params, *batches[0])
    solved, apart = pools(found.layers, found.readers)
    readers = {name: _readers(axes, name, solved) for name in group_names(axes, of)}
    if of is None:
        readers = {name: parts for name, parts in readers.items() if parts}
    for name, parts in readers.items():
        if not parts:
            reason = "".join(f"; {path}: {why}" for path, why in apart.items())
            raise ValueError(f"no contraction with a weight reads the channels of {name!r}{reason}")
    _warn_of(apart, axes, readers)
    used = {part.pool: None for parts in readers.values() for part in parts}
    uses = {use.layer.tap.name: use.layer for at in used for use in solved[at].uses}
    seen = capture(apply_fn, params, batches, layers=list(uses.values())) if uses else {}
    moments = {at: solved[at].moments(seen) for at in used}
    flat = dict(leaves_with_paths(params))
    return {
        name: [part.start(flat[part.layer.path], moments[part.pool], damping) for part in parts]
        for name, parts in readers.items()
    }


def _warn_of(apart: Mapping[str, str], axes: Axes, names: Iterable[str]) -> None:
    # Of leaves with these channels that have no inputs in common.
    left = []
    for path, why in apart.items():
        atoms = {known for term in axes.program.leaves[path] for known, _ in places(term)}
        if any(axes.program.atoms[name] in atoms for name in names):
            left.append(f"{path} ({why})")
    if left:
        warn(
            f"not fitted and not counted, since their uses have no inputs in common: "
            f"{', '.join(left)}"
        )


class _Part(NamedTuple):
    # One matrix of a pool, and where the channels are among its inputs.
    pool: int
    layer: Layer
    at: tuple[int, int]  # trip of a scan, group of a convolution
    channels: np.ndarray  # [C] that are among the inputs
    rows: np.ndarray  # [C, R] the inputs of each

    def start(self, leaf: Array, moments: Moments, damping: float) -> "_Matrix":
        hessian = np.asarray(moments.hessian[self.at], np.float64)
        weight = np.asarray(self.layer.take(leaf)[self.at], np.float64)
        power = float(np.sum(weight * (hessian @ weight)))
        mean = np.trace(hessian) / len(hessian)
        hessian[np.diag_indices(len(hessian))] += damping * mean if mean > 0 else 1.0
        return _Matrix(self, weight, np.linalg.inv(hessian), power)


def _readers(axes: Axes, name: str, found: Iterable[Pool]) -> list[_Part]:
    atom = axes.program.atoms[name]
    parts = []
    for number, (layer, _) in enumerate(found):
        terms = axes.program.leaves[layer.path]
        shape = tuple(map(size, terms))
        for axis, term in enumerate(terms):
            for known, at in places(term):
                if known == atom:
                    channel_of = np.broadcast_to(along(at, axis, len(terms)), shape)
                    parts += _inputs(number, layer, channel_of)
    return parts


def _inputs(pool: int, layer: Layer, channel_of: np.ndarray) -> list[_Part]:
    # The matrices of which some inputs, not all, are of a channel; -1 is none.
    parts = []
    index = channel_of.reshape(-1)[layer.index]  # [S, G, K, N]
    for at in np.ndindex(index.shape[:2]):
        rows = index[at]
        if (rows != rows[:, :1]).any() or (rows == rows[:1]).all():
            continue  # an axis of the outputs
        channels, counts = np.unique(rows[:, 0][rows[:, 0] >= 0], return_counts=True)
        if len(set(counts.tolist())) == 1:
            order = np.argsort(rows[:, 0], kind="stable")[(rows[:, 0] < 0).sum() :]
            parts.append(_Part(pool, layer, at, channels, order.reshape(len(channels), -1)))
    return parts


class _Matrix:
    # The inputs and weights of a layer while channels go.
    def __init__(self, part: _Part, weight: np.ndarray, inverse: np.ndarray, power: float):
        self.part, self.channels, self.rows = part, part.channels, part.rows
        self.weight, self.inverse, self.power = weight, inverse, power

    def errors(self) -> np.ndarray:
        """[C] share of the outputs' squares: tr W_c^T ((H^-1)_cc)^-1 W_c."""
        inner = self.inverse[self.rows[:, :, None], self.rows[:, None, :]]
        weights = self.weight[self.rows]
        pull = np.linalg.solve(inner, weights)
        error = np.einsum("crn,crn->c", weights, pull)
        return error / self.power if self.power > 0 else np.zeros_like(error)

    def remove(self, channel: int) -> None:
        """Takes a channel out; the others make up for it."""
        at = np.flatnonzero(self.channels == channel)
        if len(at):
            rows = self.rows[at[0]]
            columns = self.inverse[:, rows]
            factor = np.linalg.solve(self.inverse[np.ix_(rows, rows)], columns.T)
            self.weight -= factor.T @ self.weight[rows]
            self.inverse -= columns @ factor
            self.weight[rows] = 0
            self.inverse[rows] = self.inverse[:, rows] = 0
            self.inverse[rows, rows] = 1


def _remove_all(
    size: int, matrices: list[_Matrix], counts: Container[int] = ()
) -> tuple[np.ndarray, dict[int, tuple[np.ndarray, list[np.ndarray]]]]:
    # The scores; and for counts of channels that stay, which they are and the weights by then.
    score, total, seen = np.full(size, np.inf), 0.0, {}
    for left in range(size - 1, -1, -1):
        errors = np.zeros(size)
        for matrix in matrices:
            np.add.at(errors, matrix.channels, matrix.errors() / len(matrices))
        errors[np.isfinite(score)] = np.inf
        channel = int(np.argmin(errors))
        total += max(errors[channel], 0.0)
        score[channel] = total
        for matrix in matrices:
            matrix.remove(channel)
        if left in counts:
            seen[left] = np.isinf(score), [matrix.weight.copy() for matrix in matrices]
    return score, seen


def _put(
    flat: Mapping[str, Any], matrices: list[_Matrix], weights: list[np.ndarray]
) -> dict[str, Array]:
    leaves: dict[str, Array] = {}
    for matrix, weight in zip(matrices, weights, strict=True):
        layer = matrix.part.layer
        leaf = leaves[layer.path] if layer.path in leaves else jnp.asarray(flat[layer.path])
        new = layer.take(leaf).at[matrix.part.at].set(jnp.asarray(weight, leaf.dtype))
        leaves[layer.path] = layer.put(leaf, new)
    return leaves
