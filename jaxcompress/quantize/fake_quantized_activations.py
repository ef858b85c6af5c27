"""Activations on a grid: statistics and fake quantization of every contraction's input."""

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress.core.packed import Grid
from jaxcompress.core.paths import near_misses
from jaxcompress.core.sharding.meshes import on_any_mesh
from jaxcompress.formats import Format, Granularity, check_format
from jaxcompress.graph import Graph, Tap, trace, walk
from jaxcompress.graph.layers.matrices import taken
from jaxcompress.graph.layers.statistics import each_batch
from jaxcompress.graph.unentered import report
from jaxcompress.quantize.ranges.min_max import (
    Calibrator,
    check_calibrator,
    min_max,
    refuse_non_finite,
)

_TENSOR = Granularity()


class ActivationQuantizer(NamedTuple):
    """Quantizes what enters the contractions of `apply_fn`, without touching the model.

    `stats` is {tap name: statistics}; inside a scan they have one row per layer. A quantizer that
    learns (`lsq_activations`) has a `CompressState` of two such dicts instead.

    Attributes:
      init: (params, *inputs) -> empty stats; one that learns starts from these inputs.
      observe: (stats, params, *inputs) -> stats; one jitted pass over a batch.
      grids: stats -> {tap name: Grid}: what ships beside the packed weights.
      apply: (grids, params, *inputs) -> outputs with fake-quantized activations.
      train: (stats, params, *inputs) -> (outputs, stats): observes and fake-quantizes in one pass.
      apply_fn: what it was built on.
    """

    init: Callable[..., Any]
    observe: Callable[..., Any]
    grids: Callable[[Any], dict[str, Grid]]
    apply: Callable[..., Any]
    train: Callable[..., tuple[Any, Any]]
    apply_fn: Callable[..., Any] | None = None


def with_activations(apply_fn: Callable[..., Any]) -> Callable[..., Any]:
    """(grids, params, *inputs) -> outputs: `apply_fn` with the activations of the taps in `grids`
    ({tap name: Grid}, as a quantizer or a packed file gives them) on their grids."""
    walked = walk(apply_fn, snapped)
    return lambda grids, params, *inputs: walked(grids, params, *inputs)[0]


def float_taps(graph: Graph) -> list[Tap]:
    """The taps that can be put on a grid: integers (positions, masks) and complex numbers stay, and
    so does what meets a weight of no elements.

    Warns of contractions that could not be looked into.
    """
    report(graph.unentered)
    return [tap for tap in graph.taps if tap.is_float and not _meets_nothing(tap)]


def _meets_nothing(tap: Tap) -> bool:
    # Of the weight, not of the tap: an empty batch is an error, which `observe` and `grids` say.
    weight = tap.site.weight
    return weight is not None and 0 in tap.site.operands[weight].shape


def chosen_taps(graph: Graph, sites: str) -> list[Tap]:
    """Of `float_taps`, those that match the regular expression `sites`; ValueError if none does."""
    taps = float_taps(graph)
    try:
        chosen = [tap for tap in taps if re.fullmatch(sites, tap.name)]
    except re.error as error:
        raise ValueError(f"sites={sites!r} is not a regular expression: {error}") from error
    if not chosen:
        names = [tap.name for tap in taps]
        exact = [f"{t.name} ({t.aval.dtype})" for t in graph.taps if not t.is_float]
        left = f"; these are no floating-point numbers: {', '.join(exact)}" if exact else ""
        raise ValueError(
            f"sites={sites!r} matches no contraction; nearest: "
            f"{', '.join(near_misses(sites, names) or names[:3]) or 'there are none'}{left}"
        )
    return chosen


def snapped(tap: Tap, x: Any, grid: Grid) -> tuple[Any, Grid]:
    """A visitor of `walk`: the activation on its grid.

    Raises:
      TypeError: the activation is no floating-point number, with the name of the tap.
    """
    if not tap.is_float:
        raise TypeError(
            f"grids: what enters {tap.name!r} is {tap.aval.dtype}, which has no grid; leave it out"
        )
    return grid.snap(x), grid


def fresh_state(tap: Tap, empty: Callable[[tuple[int, ...]], Any]) -> Any:
    """empty(shape of a tap's scales: one per tensor), one row for every trip of the scans around"""
    state = empty(_TENSOR.scale_shape(tap.aval.shape))
    for length in reversed(tap.site.loops):
        state = jax.tree.map(lambda s, n=length: jnp.broadcast_to(s, (n, *s.shape)), state)
    return state


def activations(
    apply_fn: Callable[..., Any],
    format: Format,
    *,
    calibrate: Calibrator | None = None,
    sites: str = ".*",
) -> ActivationQuantizer:
    """One scale per tensor for the activation operands of every dense layer and convolution.

    Integers (positions, masks) are left alone, and so is what cannot be looked into (kernels,
    `shard_map`), of which a `graph.Unentered` warns. Rows that no expert takes do not count.

    Args:
      apply_fn: pure, (params, *inputs) -> outputs; Linen, NNX, Equinox or plain.
      format: e.g. `formats.integer(8, symmetric=False)`.
      calibrate: how the range is found, default `min_max()`.
      sites: regex on the names of the contractions (the path of the weight they use).

    Raises:
      ValueError: (at init) `sites` matches nothing; (from `grids`) NaN or Inf was seen.
    """
    check_format(format)
    check_calibrator(calibrate)
    calibrate = calibrate or min_max()

    def init(params, *inputs):
        chosen = chosen_taps(trace(apply_fn, params, *inputs), sites)
        return {tap.name: fresh_state(tap, calibrate.init) for tap in chosen}

    def see(tap, x, state):
        return calibrate.update(state, x, axes=tuple(range(x.ndim)), where=taken(tap, x))

    def place(x, state):
        return Grid(format.qparams(*calibrate.range(state, format), dtype=x.dtype), format).snap(x)

    def visit_train(tap, x, state):
        # Ranges are statistics: no gradient flows into them.
        state = see(tap, jax.lax.stop_gradient(x), state)
        return place(x, state), state

    observing = walk(apply_fn, lambda tap, x, state: (x, see(tap, x, state)))
    training = walk(apply_fn, visit_train)

    def grids(stats):
        found = {}
        for name, state in stats.items():
            low, high = calibrate.range(state, format)
            refuse_non_finite(f"activations of {name!r} must have been observed, and", low, high)
            found[name] = Grid(format.qparams(low, high), format)
        return found

    return ActivationQuantizer(
        init=init,
        observe=jax.jit(lambda stats, params, *inputs: observing(stats, params, *inputs)[1]),
        grids=on_any_mesh(grids),
        apply=with_activations(apply_fn),
        train=training,
        apply_fn=apply_fn,
    )


def calibrate_activations(
    quantizer: ActivationQuantizer, params: Any, batches: Iterable[tuple[Any, ...]]
) -> dict[str, Grid]:
    """The grids of a quantizer from batches of inputs (each a tuple, as after `params`).

    Raises:
      ValueError: no batch; NaN or Inf in an activation, with the contraction's name.
    """
    stats = None
    for inputs in each_batch("batches", batches):
        stats = quantizer.init(params, *inputs) if stats is None else stats
        stats = quantizer.observe(stats, params, *inputs)
    assert stats is not None
    return quantizer.grids(stats)
