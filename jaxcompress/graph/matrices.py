"""Every contraction with a weight as products of matrices: rows of the input times the weight."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxcompress.graph import compat
from jaxcompress.graph.sites import Site, Tap
from jaxcompress.graph.trace import Program, trace_program
from jaxcompress.graph.views import views


class Layer(NamedTuple):
    """A contraction of activations with one leaf: y[s, g, r, n] = x[s, g, r, k] w[s, g, k, n].

    Attributes:
      tap: its activation operand.
      path: of the leaf.
      index: int [S, G, K, N], positions in the flattened leaf. S: trips of the enclosing scans with
        weights of their own, 1 if they share them; G: groups of a convolution, batch axes of a
        product; K: what is summed over, for convolutions taps times input channels (of a group),
        channels last; N: outputs (of a group).
    """

    tap: Tap
    path: str
    index: np.ndarray

    @property
    def site(self) -> Site:
        """The contraction."""
        return self.tap.site

    @property
    def shared(self) -> bool:
        """Whether the trips of an enclosing scan share the weights."""
        return self.index.shape[0] < math.prod(self.site.loops)

    def take(self, leaf: Any) -> Array:
        """The weights [S, G, K, N] of the leaf, or of anything of its shape."""
        return jnp.asarray(leaf).reshape(-1)[self.index]

    def put(self, leaf: Any, matrices: Array) -> Array:
        """The leaf with these weights [S, G, K, N]; its other elements stay."""
        leaf = jnp.asarray(leaf)
        flat = leaf.reshape(-1).at[self.index].set(matrices.astype(leaf.dtype), unique_indices=True)
        return flat.reshape(leaf.shape)


class Layers(NamedTuple):
    """The layers of a function, and the contractions that are none.

    Attributes:
      layers: in order of execution.
      refused: name of a site with a weight -> why its weight is no view of one leaf.
    """

    layers: tuple[Layer, ...]
    refused: dict[str, str]


def layers(fn: Callable[..., Any], params: Any, *inputs: Any) -> Layers:
    """All contractions of `fn(params, *inputs)` whose weight is a view of one parameter leaf.

    >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"].T
    >>> params = {"up": jnp.ones((4, 8)), "down": jnp.ones((2, 8))}
    >>> found = layers(fn, params, jnp.ones((3, 4))).layers
    >>> [(layer.path, layer.index.shape) for layer in found]
    [('up', (1, 1, 4, 8)), ('down', (1, 1, 8, 2))]
    """
    return layers_of(trace_program(fn, params, *inputs))


def layers_of(program: Program) -> Layers:
    """As `layers`, of a traced program."""
    seen, found, refused = views(program), [], {}
    names = {tap.name for tap in program.graph.taps}
    for place, taps in program.places.items():
        site = taps[0].site if taps else None
        if site is None or site.weight is None or not site.params:
            continue
        (tap,) = taps
        if place not in seen:
            refused[site.name] = f"its weight is computed from {', '.join(site.params)}"
        elif site.config.get("batch_group_count", 1) > 1:
            refused[site.name] = "it is a convolution with batch groups"
        elif tap.name in names:
            view = seen[place]
            found.append(Layer(tap, view.path, _arranged(site, view.index)))
    return Layers(tuple(found), refused)


def _arranged(site: Site, index: np.ndarray) -> np.ndarray:
    depth = index.ndim - len(site.operands[site.weight or 0].shape)
    lead = index.shape[:depth]
    index = index.reshape(math.prod(lead), *index.shape[depth:])
    if site.primitive == compat.DOT:
        assert site.weight is not None
        return _dot_matrices(index, site, site.weight)
    out, into, *space = site.config["dimension_numbers"].rhs_spec
    groups = site.config["feature_group_count"]
    index = index.transpose(0, *(axis + 1 for axis in (*space, into, out)))
    trips, size = len(index), index.shape[-1] // groups
    index = index.reshape(trips, -1, groups, size)
    return index.transpose(0, 2, 1, 3)


def _dot_axes(site: Site, operand: int) -> tuple[tuple[int, ...], tuple[int, ...], list[int]]:
    contracted, batch = (axes[operand] for axes in site.config["dimension_numbers"])
    rank = len(site.operands[operand].shape)
    free = [axis for axis in range(rank) if axis not in (*contracted, *batch)]
    return tuple(batch), tuple(contracted), free


def _dot_matrices(index: np.ndarray, site: Site, operand: int) -> np.ndarray:
    batch, contracted, free = _dot_axes(site, operand)
    shape = site.operands[operand].shape
    sizes = (math.prod(shape[axis] for axis in axes) for axes in (batch, contracted, free))
    order = (axis + 1 for axis in (*batch, *contracted, *free))
    return index.transpose(0, *order).reshape(len(index), *sizes)


def rows(tap: Tap, x: Array) -> Array:
    """The activation operand of a layer as rows [G, R, K], the K of `Layer.index`.

    Rows of a convolution are its patches, zeros where they lie on padding.
    """
    site = tap.site
    if site.primitive == compat.DOT:
        batch, contracted, free = _dot_axes(site, tap.operand)
        sizes = (math.prod(x.shape[axis] for axis in axes) for axes in (batch, free, contracted))
        return jnp.transpose(x, (*batch, *free, *contracted)).reshape(*sizes)
    patches = _patches(x, site)
    groups = site.config["feature_group_count"]
    *positions, taps, channels = patches.shape
    patches = patches.reshape(math.prod(positions), taps, groups, channels // groups)
    return jnp.transpose(patches, (2, 0, 1, 3)).reshape(groups, len(patches), -1)


def _patches(x: Array, site: Site) -> Array:
    # [B, *space, taps, C]
    config, numbers = site.config, site.config["dimension_numbers"]
    batch, channel, *space = numbers.lhs_spec
    found = taps(
        jnp.transpose(x, (batch, *space, channel)),
        jnp.zeros((), x.dtype),
        kernel=[site.operands[1].shape[axis] for axis in numbers.rhs_spec[2:]],
        strides=config["window_strides"],
        padding=config["padding"],
        lhs_dilation=config["lhs_dilation"],
        rhs_dilation=config["rhs_dilation"],
    )
    return jnp.stack([window for _, window in found], axis=-2)


def taps(
    x: Array,
    fill: Array,
    *,
    kernel: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int],
    rhs_dilation: Sequence[int],
) -> Iterator[tuple[tuple[int, ...], Array]]:
    """What every position of a convolution's kernel meets: (position, [B, *space out, C]).

    Args:
      x: input [B, *space, C].
      fill: scalar that pads it, and stands between dilated inputs.
      kernel: sizes of the kernel.
      strides, padding, lhs_dilation, rhs_dilation: as of `lax.conv_general_dilated`.
    """
    holes = zip(padding, lhs_dilation, strict=True)
    edges = [(low, high, dilation - 1) for (low, high), dilation in holes]
    x = lax.pad(x, fill, [(0, 0, 0), *edges, (0, 0, 0)])
    sizes = [
        max(0, (n - (k - 1) * d - 1) // s + 1)
        for n, k, d, s in zip(x.shape[1:-1], kernel, rhs_dilation, strides, strict=True)
    ]
    for tap in itertools.product(*map(range, kernel)):
        starts = [t * d for t, d in zip(tap, rhs_dilation, strict=True)]
        window = tuple(
            slice(start, start + (n - 1) * s + 1, s) if n else slice(0, 0)
            for start, n, s in zip(starts, sizes, strides, strict=True)
        )
        yield tap, x[(slice(None), *window)]


def columns(tap: Tap, y: Any) -> Any:
    """The result of a layer (or anything of its shape) as [G, R, N]; R as in `rows`.

    >>> fn = lambda p, x: x @ p
    >>> (layer,) = layers(fn, jnp.ones((4, 8)), jnp.ones((2, 3, 4))).layers
    >>> columns(layer.tap, jnp.ones((2, 3, 8))).shape
    (1, 6, 8)
    """
    site = tap.site
    if site.primitive == compat.DOT:
        batch, _, free = _dot_axes(site, tap.operand)
        count, first = len(batch), tap.operand == 0
        other = y.ndim - count - len(free)
        mine = [count + i + (0 if first else other) for i in range(len(free))]
        theirs = [count + i + (len(free) if first else 0) for i in range(other)]
        order = (*range(count), *mine, *theirs)
        sizes = (math.prod(y.shape[a] for a in part) for part in (range(count), mine, theirs))
        return y.transpose(order).reshape(*sizes)
    batch, channel, *space = site.config["dimension_numbers"].out_spec
    groups = site.config["feature_group_count"]
    y = y.transpose(channel, batch, *space)
    return y.reshape(groups, len(y) // groups, -1).swapaxes(1, 2)
