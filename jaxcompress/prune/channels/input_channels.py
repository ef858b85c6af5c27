"""Input channels of contractions: which there are, and one pass over data that scores them.

Which tensor is "the output of layer i after its activation function"? The one that enters the next
contraction. So the scores of activations (`activity`, `entropy`) are those of the *input* channels
of every contraction with a weight, by the name of its tap (`graph.trace(...).taps`):

- the channels of a convolution are its input channels, all groups together;
- those of a product are what it sums over, in the order of `graph.layers.matrices.rows`: one
  number per row of a dense kernel (batch axes of the product, such as experts, in front: [G * K];
  the experts of a ragged one have their inputs in common: [K]);
- inside scans there is a row of channels per trip, [*loops, channels]: the layers of a stack, or
  the steps of a recurrence.

Channel k of a site is slice k of its weight along the input axis (the axis -2 of a Flax kernel),
and what is pruned with it is the group of coupled channels that holds this slice: the outputs of
the layers before it, their biases and norms, and the slices k of all other consumers. Two consumers
of one tensor score it alike; behind a flatten a channel has h * w scores, to be summed over the
positions. What enters the first layer is the data; what leaves the last one enters nothing and has
no score.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxcompress.core.compressor import at_path, holds
from jaxcompress.core.paths import match_rules
from jaxcompress.graph import Tap, compat, trace, walk
from jaxcompress.graph.layers.matrices import rows_of_operand
from jaxcompress.graph.layers.statistics import each_batch
from jaxcompress.graph.unentered import report

Batch = tuple[Any, ...]


class Tally(NamedTuple):
    """Integer sums over samples: tallies of shards add up, by `tree.map` or by `lax.psum`."""

    hits: Array  # int32 [*loops, channels]
    count: Array  # int32 [*loops] samples per channel
    skipped: Array  # int32 [*loops, channels] samples that were NaN or Inf

    @property
    def mean(self) -> Array:
        """float32 [*loops, channels], hits per sample; NaN where none was seen or one skipped."""
        count = self.count[..., None]
        share = self.hits.astype(jnp.float32) / jnp.maximum(count, 1).astype(jnp.float32)
        return jnp.where((count > 0) & (self.skipped == 0), share, jnp.nan)


def maps(tap: Tap, x: Array) -> Array:
    """The activation operand of a site as [N, *space, C], its channels last.

    Products have no space: each of their rows is a sample.
    """
    if tap.site.primitive != compat.CONV:
        x = rows_of_operand(tap, x)
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)
    batch, channel, *space = tap.site.config["dimension_numbers"].lhs_spec
    return jnp.transpose(x, (batch, *space, channel))


def pooled(x: Array) -> Array:
    """float32 [n, c]: the averages of [n, *space, c] over space."""
    x = x.astype(jnp.float32)
    return jnp.mean(x, axis=tuple(range(1, x.ndim - 1))) if x.ndim > 2 else x


def empty_tally(tap: Tap) -> Tally:
    """A tally of nothing."""
    loops = tap.site.loops
    zeros = jnp.zeros((*loops, channels(tap)), jnp.int32)
    return Tally(zeros, jnp.zeros(loops, jnp.int32), zeros)


def channels(tap: Tap) -> int:
    """How many input channels a site has."""
    return jax.eval_shape(functools.partial(maps, tap), tap.aval).shape[-1]


def tallied(tally: Tally, hits: Array, finite: Array) -> Tally:
    """The tally with the samples [..., C] added: what they score (int or bool), and if finite."""
    axes = tuple(range(hits.ndim - 1))
    total = lambda x: jnp.sum(x, axis=axes, dtype=jnp.int32)
    size = jnp.int32(hits.size // max(hits.shape[-1], 1))
    return Tally(tally.hits + total(hits), tally.count + size, tally.skipped + total(~finite))


def peek(data: Iterable[Batch]) -> tuple[Batch, Iterator[Batch]]:
    """The first batch, and all of them."""
    batches = each_batch("data", data)
    first = next(batches)
    return first, itertools.chain([first], batches)


def chosen_taps(
    fn: Callable[..., Any], params: Any, inputs: Batch, sites: str | None, *, planes: bool = False
) -> list[Tap]:
    """The activation operands of the contractions with a weight whose names match `sites`.

    Args:
      fn, params, inputs: the function and what it is called with.
      sites: regex on whole names; None: all.
      planes: whether only convolutions over two axes are meant.

    Raises:
      ValueError: there is none.
    """

    def fits(tap: Tap) -> bool:
        conv = tap.site.primitive == compat.CONV
        if tap.site.weight is None or (conv and tap.operand != 0):
            return False
        return not planes or (conv and len(tap.aval.shape) == 4)

    graph = trace(fn, params, *inputs)
    report(graph.unentered)
    found = [tap for tap in graph.taps if fits(tap)]
    if not found:
        kind = "convolution over two axes" if planes else "contraction of an activation"
        raise ValueError(f"apply_fn has no {kind} with a weight")
    if sites is None:
        return found
    with at_path("sites"):
        matched = match_rules({sites: sites}, [tap.name for tap in found])
    return [tap for tap in found if matched[tap.name]]


def gather(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Batch],
    states: dict[str, Any],
    *,
    add: Callable[[Tap, Array, Any], Any],
) -> dict[str, Any]:
    """The states {tap name: state} after all batches; one compiled pass per batch.

    `add(tap, x, state) -> state` is called while tracing; hashable, and the same object for the
    same computation, or each call compiles anew.
    """
    names = list(states)
    for inputs in batches:
        states = _observe(states, params, inputs, fn=fn, add=add)
    return {name: states[name] for name in names}


@functools.partial(jax.jit, static_argnames=("fn", "add"))
def _observe(states, params, inputs, *, fn, add):
    return walk(fn, lambda tap, x, state: (x, add(tap, x, state)))(states, params, *inputs)[1]


def refuse(name: str, finite: Array) -> None:
    """Raises ValueError unless all activations of a site were finite."""
    if not holds(lambda fine: fine, finite):
        raise ValueError(f"data: what enters {name!r} holds NaN or Inf")
