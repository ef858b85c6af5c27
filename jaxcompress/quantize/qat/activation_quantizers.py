"""Activations whose grids are learned: what LSQ, LSQ+ and PACT have in common."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxcompress.core.compressor import CompressState, holds
from jaxcompress.core.packed import Grid
from jaxcompress.core.paths import match_rules
from jaxcompress.core.sharding.meshes import on_any_mesh
from jaxcompress.formats.exact import unit_for
from jaxcompress.graph import trace, walk
from jaxcompress.quantize.fake_quantized_activations import (
    ActivationQuantizer,
    chosen_taps,
    float_taps,
    fresh_state,
    with_activations,
)
from jaxcompress.quantize.ranges.min_max import Calibrator, known, min_max, refuse_non_finite


class Moments(NamedTuple):
    """Statistics of the batches that the learned parameters start from."""

    ranges: Any  # of the rule's calibrator
    mean_size: Array  # float32, mean |x|
    batches: Array  # int32


class LearnedRange(NamedTuple):
    """The buffers of one activation."""

    signed: Array  # bool: whether it was below zero in calibration
    moments: Moments


class Rule(NamedTuple):
    """How one activation is quantized; arrays have the shape of its scales, [1, ..., 1].

    Attributes:
      start: (Moments, signed) -> learned parameters; inside scans with leading axes.
      snap: (x, learned, signed) -> x on its grid, differentiable.
      grid: (learned, signed) -> Grid, with the numbers of `snap`.
      calibrate: statistics that `start` needs; what was below zero is signed.
    """

    start: Callable[[Moments, Array], Any]
    snap: Callable[[Array, Any, Array], Array]
    grid: Callable[[Any, Array], Grid]
    calibrate: Calibrator = min_max()


def _nothing(calibrate: Calibrator, shape: tuple[int, ...]) -> Moments:
    zeros = jnp.zeros(shape, jnp.float32)
    return Moments(calibrate.init(shape), zeros, jnp.zeros(shape, jnp.int32))


def _see(calibrate: Calibrator, x: Array, old: Moments) -> Moments:
    axes = tuple(range(x.ndim))
    ranges = calibrate.update(old.ranges, x, axes=axes, where=None)
    x = jnp.abs(x.astype(jnp.float32))
    # In units of a power of two: a sum of the largest numbers overflows.
    up, down = unit_for(jnp.max(x, axis=axes, keepdims=True, initial=0.0))
    size = jnp.sum(x * up, axis=axes, keepdims=True) / max(x.size, 1) * down
    batches = old.batches + (1 if x.size else 0)
    # every batch with elements counts the same: mean <- mean + (new - mean) / batches
    mean = old.mean_size + (size - old.mean_size) / jnp.maximum(batches, 1).astype(jnp.float32)
    mean = mean if x.size else old.mean_size
    return Moments(ranges, mean, batches)


def mean_size(moments: Moments) -> Array:
    """mean |x|; NaN where a number was not finite."""
    return known(moments.mean_size, moments.ranges)


def learned_activations(
    apply_fn: Callable[..., Any], bits: Any, rule_of: Callable[[Any], Rule], *, sites: str = ".*"
) -> ActivationQuantizer:
    """A quantizer with learned parameters, one set per tensor; the state is a `CompressState`.

    `init(params, *inputs)` starts them from these inputs. `observe` takes in more batches of
    calibration and sets them anew from all it saw (not from `init`'s inputs), so call it before
    training only. `train` changes nothing; `train.make_step` gives the learned part to Optax.

    Args:
      apply_fn: pure, (params, *inputs) -> outputs, or (params, model_state, inputs) -> (outputs,
        model_state), the `forward` of `train.make_step`.
      bits: of all activations, or {regex on names of contractions: bits}; the first that matches
        counts, and what none matches stays as it is.
      rule_of: bits -> what is done with such an activation.
      sites: regex on the names of the contractions (the path of the weight they use).

    Raises:
      ValueError: (at init) a regex matches nothing; NaN or Inf in an activation, with its name;
        `sites` beside several bits.
    """
    several = isinstance(bits, Mapping)
    if several and sites != ".*":
        raise ValueError(f"sites={sites!r}: the keys of bits={dict(bits)} choose the sites already")
    rules = {site: rule_of(b) for site, b in (bits if several else {sites: bits}).items()}

    def rule_at(name):
        return next(rule for site, rule in rules.items() if re.fullmatch(site, name))

    def see(tap, x, moments):
        return x, _see(rule_at(tap.name).calibrate, x, moments)

    def visit(tap, x, state):
        return rule_at(tap.name).snap(x, state.learned, state.buffers.signed), state

    def blank(tap):
        return fresh_state(tap, lambda shape: _nothing(rule_at(tap.name).calibrate, shape))

    seeing = jax.jit(walk(apply_fn, see))

    walked = walk(apply_fn, visit)

    def started(moments, kept):
        learned, buffers = {}, {}
        for name, seen in moments.items():
            signed = seen.ranges.low < 0
            if not holds(lambda seen: seen, seen.ranges.seen):
                raise ValueError(
                    f"activations of {name!r} must have been observed: inputs are empty"
                )
            refuse_non_finite(f"activations of {name!r}", mean_size(seen))
            learned[name] = rule_at(name).start(seen, signed)
            buffers[name] = LearnedRange(signed, kept[name])
        return CompressState(learned, buffers)

    def init(params, *inputs):
        graph = trace(apply_fn, params, *inputs)
        if several:
            taps = float_taps(graph)
            matched = match_rules(rules, [tap.name for tap in taps])
            chosen = [tap for tap in taps if matched[tap.name] is not None]
        else:
            chosen = chosen_taps(graph, sites)
        empty = {tap.name: blank(tap) for tap in chosen}
        return started(seeing(empty, params, *inputs)[1], kept=empty)

    def observe(state, params, *inputs):
        moments = {name: buffers.moments for name, buffers in state.buffers.items()}
        moments = seeing(moments, params, *inputs)[1]
        return started(moments, kept=moments)

    def grids(state):
        found = {}
        for name, buffers in state.buffers.items():
            refuse_non_finite(f"what {name!r} learned", *jax.tree.leaves(state.learned[name]))
            found[name] = rule_at(name).grid(state.learned[name], buffers.signed)
        return found

    def train(state, params, *inputs):
        states = {
            name: CompressState(state.learned[name], buffers)
            for name, buffers in state.buffers.items()
        }
        return walked(states, params, *inputs)[0], state

    return ActivationQuantizer(
        init, observe, on_any_mesh(grids), with_activations(apply_fn), train, apply_fn=apply_fn
    )


def features(x: Array) -> int:
    """Numbers of one example: elements over the first axis, the batch."""
    return x.size // max(x.shape[0], 1) if x.ndim > 1 else x.size
