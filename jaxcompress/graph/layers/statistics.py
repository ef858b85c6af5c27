"""Statistics of what enters every layer: sums, largest values and X^T X, in one pass per batch."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxcompress.core.notices import warn
from jaxcompress.graph.layers.matrices import Layer, reached, rows
from jaxcompress.graph.sites import Tap
from jaxcompress.graph.visits.walking import walk

Batches = Sequence[tuple[Any, ...]]


class Moments(NamedTuple):
    """Sums over all rows that entered a layer, float32; S, G, K as in `matrices.Layer.index`."""

    count: Array  # [S, G] rows
    total: Array  # [S, G, K] sum of x
    magnitude: Array  # [S, G, K] sum of |x|
    largest: Array  # [S, G, K] max of |x|
    scatter: Array  # [S, G, K] sum of (x - mean)^2
    gram: Array  # [S, G, K, K] sum of x x^T; [S, G, 0, 0] where it was not asked for

    @property
    def mean(self) -> Array:
        """[S, G, K] mean of x."""
        return self.total / self._rows(1)

    @property
    def mean_magnitude(self) -> Array:
        """[S, G, K] mean of |x|."""
        return self.magnitude / self._rows(1)

    @property
    def variance(self) -> Array:
        """[S, G, K] mean of (x - mean)^2, exact where it is far smaller than the mean too."""
        return self.scatter / self._rows(1)

    @property
    def hessian(self) -> Array:
        """[S, G, K, K] mean of x x^T: half the Hessian of the layer's squared error."""
        return self.gram / self._rows(2)

    def _rows(self, extra: int) -> Array:
        return jnp.maximum(self.count, 1).reshape(*self.count.shape, *(1,) * extra)

    @property
    def blind(self) -> Array:
        """bool [S, G]: which matrices no row reached, experts to which no data was sent."""
        return self.count == 0

    def seen_as_white(self) -> "Moments":
        """The same, with uncorrelated inputs of size 1 for the matrices that no row reached.

        By these every input matters as much as the others: a method rounds to nearest, and prunes
        by magnitude.
        """
        blind = self.blind[..., None]
        eye = jnp.eye(self.gram.shape[-1])
        return self._replace(
            scatter=jnp.where(blind, 1.0, self.scatter),
            gram=jnp.where(blind[..., None], eye, self.gram),
        )


def blind_matrices(moments: Moments) -> list[str]:
    """[expert] of each matrix that no row reached; [trip, expert] where scans have their own."""
    trips = len(moments.count) > 1
    return [
        f"[{trip}, {group}]" if trips else f"[{group}]"
        for trip, group in np.argwhere(np.asarray(moments.blind)).tolist()
    ]


def warn_of_unseen(unseen: Sequence[str]) -> None:
    """Warns of the matrices that no row reached, if there are any."""
    if unseen:
        warn(
            "no row of the data reaches these experts, which are rounded to nearest and pruned by "
            f"magnitude: {', '.join(unseen)}"
        )


def check_batches(batches: Iterable[tuple[Any, ...]]) -> Batches:
    """The batches as a list; see `each_batch`."""
    return list(each_batch("data", batches))


def each_batch(what: str, batches: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
    """The batches one by one: at least one, each a tuple of inputs; `what` is their name.

    Raises:
      ValueError: there is none; one has no rows.
      TypeError: one is no tuple.
    """
    empty = True
    for number, inputs in enumerate(batches):
        if not isinstance(inputs, tuple | list):
            raise TypeError(
                f"{what} must hold tuples of inputs, (x,) for one, got {type(inputs).__name__}"
            )
        _refuse_no_rows(f"{what}: batch {number}", inputs)
        yield tuple(inputs)
        empty = False
    if empty:
        raise ValueError(f"{what} is empty: calibration needs at least one batch of inputs")


def _refuse_no_rows(name: str, inputs: Sequence[Any]) -> None:
    # An input of which all arrays have no rows; one without arrays is a setting.
    for k, value in enumerate(inputs):
        shapes = [jnp.shape(x) for x in jax.tree.leaves(value) if hasattr(x, "shape")]
        if shapes and all(shape[:1] == (0,) for shape in shapes):
            raise ValueError(
                f"{name} has no rows: input {k} has shape {shapes[0]}; calibration needs at least "
                "one row in every batch"
            )


def capture(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[tuple[Any, ...]],
    *,
    layers: Sequence[Layer],
    gram: bool = True,
    grids: Mapping[str, Any] | None = None,
) -> dict[str, Moments]:
    """The moments of the inputs of `layers` by the names of their taps, over all batches.

    One compiled pass per batch; what the chosen layers do not need is not computed.

    Args:
      fn: pure, (params, *inputs) -> outputs.
      params: the parameters that `layers` were found with, or others of the same shapes.
      batches: tuples of inputs; batches of one shape compile once.
      layers: from `matrices.layers`; all their Gram matrices are in memory together, see `stream`.
      gram: whether X^T X is wanted.
      grids: {tap name: something with `snap`}: activations that are put on a grid on the way.

    Raises:
      ValueError: no batch; an activation that is not finite, with the layer's name.
    """
    batches = check_batches(batches)
    grids = {} if grids is None else dict(grids)
    fresh = {layer.tap.name: _empty(layer, gram) for layer in layers}
    states: dict[str, Any] = {
        name: (fresh.get(name, ()), grids.get(name, ())) for name in {**grids, **fresh}
    }
    for inputs in batches:
        states = _observe(states, params, inputs, fn=fn)
    found = {}
    for layer in layers:
        name = layer.tap.name
        moments = _of_trips(states[name][0], layer)
        if not bool(jnp.all(jnp.isfinite(moments.total))):
            raise ValueError(f"data: what enters {name!r} holds NaN or Inf")
        found[name] = moments
    return found


def stream(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[tuple[Any, ...]],
    *,
    layers: Sequence[Layer],
    gram: bool = True,
    grids: Mapping[str, Any] | None = None,
) -> Iterator[tuple[Layer, Moments]]:
    """Every layer with its moments, one after the other: one Gram matrix in memory at a time.

    Each layer takes a pass of its own over the batches, up to the layer.
    """
    batches = check_batches(batches)
    for layer in layers:
        found = capture(fn, params, batches, layers=[layer], gram=gram, grids=grids)
        yield layer, found[layer.tap.name]


def _empty(layer: Layer, gram: bool) -> Moments:
    _, groups, k, _ = layer.index.shape
    lead = layer.site.loops
    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
    square = (*lead, groups, k, k) if gram else (*lead, groups, 0, 0)
    vector = zeros((*lead, groups, k))
    return Moments(zeros((*lead, groups)), vector, vector, vector, vector, zeros(square))


@functools.partial(jax.jit, static_argnames=("fn",))
def _observe(states: Any, params: Any, inputs: tuple[Any, ...], *, fn: Callable[..., Any]) -> Any:
    return walk(fn, _visit)(states, params, *inputs)[1]


def _visit(tap: Tap, x: Array, state: Any) -> tuple[Array, Any]:
    moments, grid = state
    if hasattr(grid, "snap"):
        x = grid.snap(x)
    if isinstance(moments, Moments):
        moments = _added(moments, rows(tap, x).astype(jnp.float32), reached(tap, x))
    return x, (moments, grid)


def _added(moments: Moments, x: Array, inside: Array | None) -> Moments:
    # x [G, R, K], zeros in rows that are not `inside` [G, R]
    gram = moments.gram
    if gram.shape[-1] == x.shape[-1]:
        gram = gram + jnp.einsum("grk,grl->gkl", x, x, precision=lax.Precision.HIGHEST)
    new = jnp.float32(x.shape[1])
    new = jnp.full(len(x), new) if inside is None else jnp.sum(inside, axis=1, dtype=jnp.float32)
    added = jnp.sum(x, axis=1)
    part = moments._replace(count=new, total=added)
    whole = moments._replace(count=moments.count + new, total=moments.total + added)
    count, total = whole.count, whole.total
    # of both parts around the mean of all: n1 (mean1 - mean)^2 + n2 (mean2 - mean)^2 more
    apart = (
        moments.count[:, None] * (moments.mean - whole.mean) ** 2
        + new[:, None] * (part.mean - whole.mean) ** 2
    )
    off = x - part.mean[:, None]
    off = off if inside is None else jnp.where(inside[..., None], off, 0.0)
    return Moments(
        count,
        total,
        moments.magnitude + jnp.sum(jnp.abs(x), axis=1),
        jnp.maximum(moments.largest, jnp.max(jnp.abs(x), axis=1, initial=0.0)),
        moments.scatter + jnp.sum(off**2, axis=1) + apart,
        gram,
    )


def _of_trips(moments: Moments, layer: Layer) -> Moments:
    # Trips in one axis; where they share the weights, all together.
    depth = len(layer.site.loops)
    trips = math.prod(layer.site.loops)
    flat = Moments(*(field.reshape(trips, *field.shape[depth:]) for field in moments))
    if not layer.shared:
        return flat
    total = Moments(*(jnp.sum(field, axis=0, keepdims=True) for field in flat))
    apart = flat.count[..., None] * (flat.mean - total.mean) ** 2
    return total._replace(
        largest=jnp.max(flat.largest, axis=0, keepdims=True),
        scatter=jnp.sum(flat.scatter + apart, axis=0, keepdims=True),
    )
