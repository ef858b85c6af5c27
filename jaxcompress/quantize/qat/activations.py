"""Learned step size quantization of what enters the contractions of a network."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcompress.core.compressor import CompressState
from jaxcompress.core.packed import Grid
from jaxcompress.core.paths import match_rules
from jaxcompress.formats import Format, Granularity, integer
from jaxcompress.formats.rounding import uniform_ste
from jaxcompress.formats.scales import QParams, finite
from jaxcompress.graph import Tap, trace, walk
from jaxcompress.quantize.activations import ActivationQuantizer, with_activations
from jaxcompress.quantize.calibrate import (
    Calibrator,
    check_calibrator,
    range_of,
    refuse_non_finite,
)
from jaxcompress.quantize.qat.steps import (
    first_step,
    gradient_factor,
    highest_code,
    positive,
    scale_gradient,
    trainable_grid,
)

_TENSOR = Granularity()


class Placed(NamedTuple):
    """What a tap knows: its step, which is trained, and whether it saw a negative number."""

    step: Array  # float32
    signed: Array  # bool


def _grids(bits: Any) -> tuple[Format, Format]:
    # for activations with negative numbers, and for those without (behind a relu)
    return trainable_grid(bits), integer(bits, symmetric=False)


def _ends(bits: Any, signed: Array) -> tuple[Array, Array]:
    highest = jnp.asarray(highest_code(bits, signed=signed), jnp.float32)
    return jnp.where(signed, -highest - 1.0, 0.0), highest


def _snapped(bits: Any, x: Array, state: Placed) -> Array:
    low, high = _ends(bits, state.signed)
    features = x.size // x.shape[0] if x.ndim > 1 and x.shape[0] else x.size
    step = scale_gradient(positive(state.step), gradient_factor(features, high))
    return finite(uniform_ste(x, step, low, high), x.dtype)


def _first(bits: Any, x: Array, calibrate: Calibrator | None) -> Placed:
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    axes, shape = tuple(range(x.ndim)), _TENSOR.scale_shape(x.shape)
    signed = (jnp.min(x, initial=0.0) < 0).reshape(shape)
    if calibrate is None:
        mean = (jnp.sum(jnp.abs(x)) / max(x.size, 1)).reshape(shape)
        return Placed(first_step(mean, highest_code(bits, signed=signed)), signed)
    steps = []
    for format in _grids(bits):
        low, high = range_of(calibrate, x, format, axes=axes)
        steps.append(format.qparams(low, high).scale.reshape(shape))
    return Placed(jnp.where(signed, *steps), signed)


def lsq_activations(
    apply_fn: Callable[..., Any],
    bits: int | Mapping[str, int],
    *,
    calibrate: Calibrator | None = None,
) -> ActivationQuantizer:
    """Integers with one trained step per tensor for what enters dense layers and convolutions.

    As `quantize.activations`, but the steps are learned: the state is a `CompressState`, whose
    `learned` {tap name: step} `train.make_step` hands to Optax beside the params. Activations that
    were never negative when the state was made get the unsigned grid. Gradients are those of `lsq`,
    with N the numbers per example.

    Args:
      apply_fn: pure, (params, *inputs) -> outputs.
      bits: 2 to 8; or {regex on the names of the contractions: bits}, the first that matches
        counts; contractions without a rule stay float.
      calibrate: where steps start: from the range that it finds, `mse()` say. Default: the rule of
        the paper, 2 mean|x| / sqrt(Q_P).

    The quantizer's `init(params, *inputs)` reads its inputs: give it a batch of data, and the view
    of the params that is trained. Layers see what the quantized layers before them give. `observe`
    leaves the state as it is.

    Raises:
      ValueError: bits outside 2 to 8; (at init) a rule that matches nothing; (from `grids`) NaN.

    Source: Esser et al. 2019, Learned Step Size Quantization, arXiv 1902.08153.
    """
    check_calibrator(calibrate)
    rules = dict(bits) if isinstance(bits, Mapping) else {".*": bits}
    for count in rules.values():
        trainable_grid(count)

    def bits_of(name: str) -> Any:
        return next(count for rule, count in rules.items() if re.fullmatch(rule, name))

    def fresh(tap: Tap) -> Placed:
        shape = (*tap.site.loops, *_TENSOR.scale_shape(tap.aval.shape))
        return Placed(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, bool))

    def begin(tap: Tap, x: Array, state: Placed) -> tuple[Array, Placed]:
        del state
        state = _first(bits_of(tap.name), x, calibrate)
        return _snapped(bits_of(tap.name), x, state), state

    starting = walk(apply_fn, begin)
    training = walk(apply_fn, lambda tap, x, state: (_snapped(bits_of(tap.name), x, state), state))

    def init(params, *inputs):
        taps = {tap.name: tap for tap in trace(apply_fn, params, *inputs).taps}
        found = match_rules(rules, taps)
        chosen = {name: fresh(tap) for name, tap in taps.items() if found[name] is not None}
        return _split(jax.jit(starting)(chosen, params, *inputs)[1])

    def train(state, params, *inputs):
        joined = {name: Placed(state.learned[name], state.buffers[name]) for name in state.learned}
        return training(joined, params, *inputs)[0], state

    def grids(state):
        found = {}
        for name, step in state.learned.items():
            signed = np.asarray(state.buffers[name])
            refuse_non_finite(f"the step of the activations of {name!r}", step, step)
            if signed.any() != signed.all():
                raise ValueError(
                    f"activations of {name!r}: some layers of the scan have negative numbers and "
                    "others have none; they need one format"
                )
            grid, unsigned = _grids(bits_of(name))
            scale = positive(step)
            if signed.all():
                found[name] = Grid(QParams(scale), grid)
            else:
                found[name] = Grid(QParams(scale, jnp.zeros(scale.shape, jnp.uint8)), unsigned)
        return found

    return ActivationQuantizer(
        init=init,
        observe=lambda state, params, *inputs: state,
        grids=grids,
        apply=with_activations(apply_fn),
        train=train,
    )


def _split(placed: Mapping[str, Placed]) -> CompressState:
    return CompressState(
        learned={name: p.step for name, p in placed.items()},
        buffers={name: p.signed for name, p in placed.items()},
    )
