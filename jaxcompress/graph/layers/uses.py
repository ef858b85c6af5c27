"""All uses of a leaf together: contractions whose inputs meet the same weights count as one.

A weight may feed several contractions: towers of a siamese network, heads on several scales, trips
of an unrolled loop, a slice here and the whole there. What is good for the inputs of one of them
may be bad for the others, so layer-wise methods look at the inputs of all. Their sums can be added
where the weights of one output in one place are weights of one output in the other too; the inputs
that the other one does not have count as zeros there. Where they lie across each other (`x @ w` and
`y @ w.T`), or where something reads the leaf that is no contraction (a lookup in a tied table),
there is no common matrix of inputs: such leaves are named, with the reason, and left alone.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcompress.graph.layers.matrices import Layer
from jaxcompress.graph.layers.statistics import Moments
from jaxcompress.graph.layers.views import Reader


class Part(NamedTuple):
    """One of the matrices of a layer, among the inputs of a pool.

    Attributes:
      trip, group: which matrix.
      inputs: int [K], the places of its inputs among those of the pool.
    """

    trip: int
    group: int
    inputs: np.ndarray


class Use(NamedTuple):
    """A contraction with the weights of a pool; `part`: one of its matrices, None: all, as is."""

    layer: Layer
    part: Part | None = None


class Pool(NamedTuple):
    """Weights of a leaf with all contractions that use them.

    Attributes:
      layer: one of them, with the weights [S, G, K, N] of the pool.
      uses: all of them.
    """

    layer: Layer
    uses: tuple[Use, ...]

    def moments(self, seen: Mapping[str, Moments]) -> Moments:
        """The moments of all uses together, from those of each tap."""
        size = self.layer.index.shape[2]
        return merged([_of_use(seen[use.layer.tap.name], use, size) for use in self.uses])


class Pools(NamedTuple):
    """The weights of a network.

    Attributes:
      pools: in order of execution of their first uses.
      apart: path of a leaf -> why (some of) its uses have no pool.
    """

    pools: tuple[Pool, ...]
    apart: dict[str, str]


def pools(layers: Sequence[Layer], readers: Sequence[Reader] = ()) -> Pools:
    """The layers by the weights that they use.

    Args:
      layers: in order of execution, of `matrices.layers`.
      readers: what else reads leaves, of `matrices.layers`.

    >>> from jaxcompress.graph.layers.matrices import layers as find
    >>> fn = lambda p, a, b: (a @ p["w"], b @ p["w"][:2], a @ p["tied"], p["tied"][:1] @ b[:1].T)
    >>> params = {"w": jnp.ones((4, 8)), "tied": jnp.ones((4, 2))}
    >>> found = pools(find(fn, params, jnp.ones((3, 4)), jnp.ones((3, 2))).layers)
    >>> [[use.layer.tap.name for use in pool.uses] for pool in found.pools], list(found.apart)
    ([['w', 'w#1']], ['tied'])
    """
    paths = dict.fromkeys(layer.path for layer in layers)
    found, apart = [], {}
    for path in paths:
        alike = _alike([layer for layer in layers if layer.path == path])
        others = [reader for reader in readers if reader.path == path]
        for cluster in _clusters(alike):
            reasons = [r.what for r in others if any(_meet(r.index, c[0].index) for c in cluster)]
            together = [] if reasons else _together(cluster)
            found += together
            if not together:
                names = ", ".join(repr(layer.tap.name) for uses in cluster for layer in uses)
                why = f"also read by {', '.join(dict.fromkeys(reasons))}"
                apart[path] = why if reasons else f"{names} sum over different axes"
    order = {layer.tap.name: place for place, layer in enumerate(layers)}
    first = lambda pool: min(order[use.layer.tap.name] for use in pool.uses)
    return Pools(tuple(sorted(found, key=first)), apart)


def merged(parts: Sequence[Moments]) -> Moments:
    """The moments of all rows together."""
    if len(parts) == 1:
        return parts[0]
    sums = jax.tree.map(lambda first, *rest: sum(rest, start=first), *parts)
    # around the mean of all: n (mean_part - mean)^2 more
    apart = [_beside(part.count, part.mean) * (part.mean - sums.mean) ** 2 for part in parts]
    largest = jnp.max(jnp.stack([part.largest for part in parts]), axis=0)
    return sums._replace(largest=largest, scatter=sum(apart, start=sums.scatter))


def _beside(count: Array, per_input: Array) -> Array:
    return count.reshape(*count.shape, *(1,) * (per_input.ndim - count.ndim))


def _of_use(moments: Moments, use: Use, size: int) -> Moments:
    # The moments [1, 1, size] of one matrix, zeros for the inputs that it does not have.
    if use.part is None:
        return moments
    trip, group, at = use.part
    count = moments.count[trip : trip + 1]
    count = count if count.ndim == 1 else count[:, group : group + 1]
    vector = lambda x: jnp.zeros((1, 1, size), x.dtype).at[0, 0, at].set(x[trip, group])
    gram = moments.gram[trip, group]
    if gram.size:
        square = jnp.zeros((size, size), gram.dtype)
        gram = square.at[at[:, None], at[None]].set(gram)
    names = ("total", "magnitude", "largest", "scatter")
    vectors = {name: vector(getattr(moments, name)) for name in names}
    return Moments(count=count, gram=gram[None, None], **vectors)


def _alike(layers: Sequence[Layer]) -> list[list[Layer]]:
    # Layers of the same matrices.
    found: list[list[Layer]] = []
    for layer in layers:
        same = (uses for uses in found if np.array_equal(uses[0].index, layer.index))
        uses = next(same, None)
        if uses is None:
            found.append([layer])
        else:
            uses.append(layer)
    return found


def _clusters(alike: list[list[Layer]]) -> list[list[list[Layer]]]:
    # Those that have weights in common, over others too.
    size = 1 + max((int(uses[0].index.max(initial=0)) for uses in alike), default=0)
    owner, cluster_of = np.full(size, -1), list(range(len(alike)))
    for number, uses in enumerate(alike):
        index = uses[0].index
        met = {cluster_of[k] for k in np.unique(owner[index]) if k >= 0}
        cluster_of = [number if k in met else k for k in cluster_of]
        owner[index] = number
    return [
        [uses for uses, k in zip(alike, cluster_of, strict=True) if k == number]
        for number in dict.fromkeys(cluster_of)
    ]


def _meet(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(np.isin(one, other).any())


def _together(cluster: list[list[Layer]]) -> list[Pool]:
    # The pools of layers that share weights; [] where there are none.
    if len(cluster) == 1:
        (uses,) = cluster
        return [Pool(uses[0], tuple(map(Use, uses)))]
    for host in sorted(cluster, key=lambda uses: (-uses[0].index.shape[2], -uses[0].index.size)):
        index = host[0].index
        found = [(uses, _placed(uses[0].index, index)) for uses in cluster]
        placed = [(uses, at) for uses, at in found if at is not None]
        if len(placed) == len(found):
            return _split(host[0], placed)
    return []


def _placed(index: np.ndarray, host: np.ndarray) -> np.ndarray | None:
    # Where weights [s, g, K, N] lie in the host's, int [4, s, g, K, N]; None unless each matrix is
    # part of one matrix of the host, inputs among its inputs.
    inverse = np.full(1 + max(index.max(initial=0), host.max(initial=0)), -1)
    inverse[host.reshape(-1)] = np.arange(host.size)
    flat = inverse[index]
    if (flat < 0).any():
        return None
    at = np.stack(np.unravel_index(flat, host.shape))
    first = at[..., :1, :1]
    fits = (at[:2] == first[:2]).all(), (at[2] == at[2][..., :1]).all()
    return at if all(fits) and (at[3] == at[3][..., :1, :]).all() else None


def _split(host: Layer, placed: list[tuple[list[Layer], np.ndarray]]) -> list[Pool]:
    # A pool for all outputs of a matrix of the host that the same matrices meet.
    _, _, _, outputs = host.index.shape
    found = []
    for trip, group in np.ndindex(host.index.shape[:2]):
        parts: list[tuple[list[Layer], Part, np.ndarray]] = []
        for uses, at in placed:
            for s, g in np.ndindex(at.shape[1:3]):
                if at.shape[-1] and tuple(at[:2, s, g, 0, 0]) == (trip, group):
                    meets = np.isin(np.arange(outputs), at[3, s, g, 0])
                    parts.append((uses, Part(s, g, at[2, s, g, :, 0]), meets))
        patterns = np.stack([meets for _, _, meets in parts], axis=-1)
        for pattern in np.unique(patterns, axis=0)[::-1]:
            columns = np.flatnonzero((patterns == pattern).all(-1))
            index = host.index[trip, group][None, None][..., columns]
            chosen = [part for part, here in zip(parts, pattern, strict=True) if here]
            met = [Use(layer, part) for uses, part, _ in chosen for layer in uses]
            found.append(Pool(host._replace(index=index), tuple(met)))
    return found
