"""Every contraction with a weight as products of matrices: rows of the input times the weight."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxcompress.graph import compat
from jaxcompress.graph.layers.views import Reader, views_and_readers
from jaxcompress.graph.primitives.contractions import members, numbers_at, row_taken
from jaxcompress.graph.sites import Site, Tap
from jaxcompress.graph.tracing import Program, trace_program


class Layer(NamedTuple):
    """A contraction of activations with one leaf: y[s, g, r, n] = x[s, g, r, k] w[s, g, k, n].

    Attributes:
      tap: its activation operand.
      path: of the leaf.
      index: int [S, G, K, N], positions in the flattened leaf. S: trips of the enclosing scans with
        weights of their own, 1 if they share them; G: groups of a convolution, batch axes of a
        product, in front of them the experts of a ragged one; K: what is summed over, for
        convolutions taps times input channels (of a group), channels last; N: outputs (of a group).
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

    @property
    def channels(self) -> int:
        """How many inputs in a row lie along one axis: the input channels of a convolution (of a
        group), the last axis that a product sums over."""
        site, weight = self.site, self.site.weight or 0
        shape = site.operands[weight].shape
        if site.primitive == compat.CONV:
            return shape[site.config["dimension_numbers"].rhs_spec[1]]
        contracted = _dot_axes(site, weight)[1]
        return shape[contracted[-1]] if contracted else 1

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
      readers: what else reads leaves: lookups, arithmetic, results.
      unentered: contractions that could not be looked into, as `Graph.unentered`.
    """

    layers: tuple[Layer, ...]
    refused: dict[str, str]
    readers: tuple[Reader, ...] = ()
    unentered: tuple[str, ...] = ()


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
    seen, readers = views_and_readers(program)
    found, refused, entered = [], {}, set()
    names = {tap.name for tap in program.graph.taps}
    for place, taps in program.places.items():
        site = taps[0].site if taps else None
        if site is None or site.weight is None or not site.params:
            continue
        (tap,) = taps
        if place not in seen:
            refused[site.name] = f"its weight is computed from {', '.join(site.params)}"
        elif reason := _refusal(site):
            refused[site.name] = reason
        elif tap.name in names:
            view = seen[place]
            found.append(Layer(tap, view.path, _arranged(site, view.index)))
            entered.add(place)
    for place in seen.keys() - entered:
        view, site = seen[place], program.contractions[place]
        readers.append(Reader(view.path, f"{site.primitive} of {site.name!r}", view.index))
    return Layers(tuple(found), refused, tuple(readers), program.graph.unentered)


def _refusal(site: Site) -> str:
    if site.config.get("batch_group_count", 1) > 1:
        return "it is a convolution with batch groups"
    if site.primitive != compat.RAGGED or not (parts := numbers_at(site).parts):
        return ""
    if parts == "summed":
        return "it is a ragged product that sums over the parts"
    return "" if site.weight == 1 else "it is a ragged product whose rows are weights"


def _arranged(site: Site, index: np.ndarray) -> np.ndarray:
    depth = index.ndim - len(site.operands[site.weight or 0].shape)
    lead = index.shape[:depth]
    index = index.reshape(math.prod(lead), *index.shape[depth:])
    if site.primitive != compat.CONV:
        assert site.weight is not None
        return _dot_matrices(index, site, site.weight)
    out, into, *space = site.config["dimension_numbers"].rhs_spec
    groups = site.config["feature_group_count"]
    index = index.transpose(0, *(axis + 1 for axis in (*space, into, out)))
    trips, size = len(index), index.shape[-1] // groups
    index = index.reshape(trips, -1, groups, size)
    return index.transpose(0, 2, 1, 3)


def _dot_axes(site: Site, operand: int) -> tuple[tuple[int, ...], ...]:
    # What is summed over in the order of the weight's axes: its last one varies fastest.
    found, weight = numbers_at(site), site.weight or 0
    pairs = sorted(zip(*found.contracted, strict=True), key=lambda pair: pair[weight])
    contracted = tuple(pair[operand] for pair in pairs)
    return found.batch[operand], contracted, found.free[operand]


def _dot_matrices(index: np.ndarray, site: Site, operand: int) -> np.ndarray:
    batch, contracted, free = _dot_axes(site, operand)
    shape, group = site.operands[operand].shape, numbers_at(site).group
    batch = (group, *batch) if operand == 1 and group >= 0 else batch
    sizes = (math.prod(shape[axis] for axis in axes) for axes in (batch, contracted, free))
    order = (axis + 1 for axis in (*batch, *contracted, *free))
    return index.transpose(0, *order).reshape(len(index), *sizes)


def rows(tap: Tap, x: Array) -> Array:
    """The activation operand of a layer as rows [G, R, K], the K of `Layer.index`.

    Rows of a convolution are its patches, zeros where they lie on padding. A ragged product has all
    rows in each of its parts, zeros where they are not among those that reach it (`reached`).
    """
    site = tap.site
    if site.primitive != compat.CONV:
        each = rows_of_operand(tap, x)
        inside = reached(tap, x)
        if inside is None:
            return each
        parts = len(inside) // max(len(each), 1)
        return jnp.where(inside[..., None], jnp.tile(each, (parts, 1, 1)), 0)
    patches = _patches(x, site)
    groups = site.config["feature_group_count"]
    *positions, taps, channels = patches.shape
    patches = patches.reshape(math.prod(positions), taps, groups, channels // groups)
    return jnp.transpose(patches, (2, 0, 1, 3)).reshape(groups, len(patches), -1)


def rows_of_operand(tap: Tap, x: Array) -> Array:
    """The activation operand of a product as rows [batch axes, R, K], each of them once."""
    batch, contracted, free = _dot_axes(tap.site, tap.operand)
    sizes = (math.prod(x.shape[axis] for axis in axes) for axes in (batch, free, contracted))
    return jnp.transpose(x, (*batch, *free, *contracted)).reshape(*sizes)


def reached(tap: Tap, x: Array) -> Array | None:
    """Which of the `rows` count in which group: bool [G, R]; None if all do in all.

    Raises:
      ValueError: the tap is of a ragged product, and not one that `walk` gives its visitor.
    """
    site = tap.site
    if site.primitive != compat.RAGGED or (found := numbers_at(site)).parts != "rows":
        return None
    if tap.sizes is None:
        raise ValueError(f"{tap.name!r}: the rows of each part are known while walk visits it only")
    inside = members(found, x.shape, tap.sizes)
    batch = len(found.batch[0])
    return inside.reshape(math.prod(inside.shape[: 1 + batch]), -1)


def taken(tap: Tap, x: Array) -> Array | None:
    """Which elements of an activation operand count, bool of its shape; None: all.

    The rows of a ragged product that lie behind its last part meet nothing.
    """
    site = tap.site
    if site.primitive != compat.RAGGED or not (found := numbers_at(site)).parts or tap.operand:
        return None
    return jnp.broadcast_to(row_taken(found, x.shape, tap.sizes), x.shape)


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
    """The result of a layer (or anything of its shape) as [G, R, N]; G, R as in `rows`.

    The parts of a ragged product all have the rows of all.

    >>> fn = lambda p, x: x @ p
    >>> (layer,) = layers(fn, jnp.ones((4, 8)), jnp.ones((2, 3, 4))).layers
    >>> columns(layer.tap, jnp.ones((2, 3, 8))).shape
    (1, 6, 8)
    """
    site = tap.site
    if site.primitive != compat.CONV:
        batch, _, free = _dot_axes(site, tap.operand)
        count, first = len(batch), tap.operand == 0
        other = y.ndim - count - len(free)
        mine = [count + i + (0 if first else other) for i in range(len(free))]
        theirs = [count + i + (len(free) if first else 0) for i in range(other)]
        order = (*range(count), *mine, *theirs)
        sizes = (math.prod(y.shape[a] for a in part) for part in (range(count), mine, theirs))
        y = y.transpose(order).reshape(*sizes)
        group = numbers_at(site).group
        return y if group < 0 else jnp.tile(y, (site.operands[1].shape[group], 1, 1))
    batch, channel, *space = site.config["dimension_numbers"].out_spec
    groups = site.config["feature_group_count"]
    y = y.transpose(channel, batch, *space)
    return y.reshape(groups, len(y) // groups, -1).swapaxes(1, 2)
