"""Bits that change while training goes on."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

from jaxcompress.core.compressor import Compressor, CompressState, quartet
from jaxcompress.quantize.fake_quantized_activations import ActivationQuantizer


class Annealed(NamedTuple):
    """The buffers of `annealed_bits` and `annealed_activations`."""

    step: Array  # int32, updates done
    bits: Array  # int32
    inner: Any  # what is quantized at these bits keeps


def _schedule(bits: Callable[[Array], Any]) -> Callable[[Array], Array]:
    def at(step):
        return jnp.clip(jnp.round(jnp.asarray(bits(step), jnp.float32)), 1, 8).astype(jnp.int32)

    return at


def _number(what: str, state: Any) -> int:
    number = state.buffers.bits
    if isinstance(number, Tracer | jax.ShapeDtypeStruct):
        raise TypeError(
            f"{what} of annealed bits needs their number, which decides the size; "
            "call it outside jit and eval_shape"
        )
    return int(number)


def annealed_bits(make: Callable[[Any], Compressor], bits: Callable[[Array], Any]) -> Compressor:
    """A compressor whose bits follow a schedule of the step; they are traced: one compile.

    Args:
      make: bits -> Compressor, with state of the same shapes for all bits, which takes a traced
        number: `lambda b: quantize.weights(formats.integer(b), axis=-1)`, or
        `lambda b: quantize.lsq(b, from_bits=8)`.
      bits: step -> bits, a float too (an Optax schedule), rounded and clipped to 1 to 8. Step 0 is
        `init`, every `update` is one more.

    `pack` needs the state's numbers, since bits decide the size: call it outside `jit`.

    >>> import optax
    >>> from jaxcompress import formats, quantize
    >>> comp = annealed_bits(
    ...     lambda b: quantize.weights(formats.integer(b)), optax.linear_schedule(8, 4, 2)
    ... )
    >>> w = jnp.linspace(-1.0, 1.0, 99)
    >>> state = comp.init(w)
    >>> for _ in range(3):
    ...     print(state.buffers.bits, len(jnp.unique(comp.apply(w, state))))
    ...     state = comp.update(w, state)
    8 99
    6 63
    4 15
    """
    at = _schedule(bits)

    def inner(state):
        return CompressState(state.learned, state.buffers.inner)

    def outer(step, number, state):
        return CompressState(state.learned, Annealed(step, number, state.buffers))

    def init(params):
        step = jnp.zeros((), jnp.int32)
        return outer(step, at(step), make(at(step)).init(params))

    def apply(params, state):
        return make(state.buffers.bits).apply(params, inner(state))

    def update(params, state, *, grads=None, **extra):
        step = state.buffers.step + 1
        number = at(step)
        new = make(number).update(params, inner(state), grads=grads, **extra)
        return outer(step, number, new)

    def pack(params, state):
        return make(_number("pack", state)).pack(params, inner(state))

    return quartet(init, apply, update, pack)


def annealed_activations(
    make: Callable[[Any], ActivationQuantizer], bits: Callable[[Array], Any]
) -> ActivationQuantizer:
    """An activation quantizer whose bits follow a schedule of the step, as `annealed_bits`.

    Args:
      make: bits -> ActivationQuantizer, with state of the same shapes for all bits, such as
        `lambda b: quantize.pact_activations(apply_fn, b)`, whose clips do not depend on them, or
        `lambda b: quantize.activations(apply_fn, formats.integer(b, symmetric=False))`.
      bits: step -> bits, rounded and clipped to 1 to 8; every `train` is a step.
    """
    at, widest = _schedule(bits), make(8)

    def inner(state):
        # a quantizer without learned parameters has its statistics alone
        kept = state.buffers.inner
        return kept if state.learned == () else CompressState(state.learned, kept)

    def outer(step, number, new):
        whole = new if isinstance(new, CompressState) else CompressState(buffers=new)
        learned, kept = whole.learned, whole.buffers
        return CompressState(learned, Annealed(step, number, kept))

    def init(params, *inputs):
        step = jnp.zeros((), jnp.int32)
        return outer(step, at(step), make(at(step)).init(params, *inputs))

    def observe(state, params, *inputs):
        number = state.buffers.bits
        new = make(number).observe(inner(state), params, *inputs)
        return outer(state.buffers.step, number, new)

    def grids(state):
        return make(_number("grids", state)).grids(inner(state))

    def train(state, params, *inputs):
        outputs, new = make(state.buffers.bits).train(inner(state), params, *inputs)
        step = state.buffers.step + 1
        return outputs, outer(step, at(step), new)

    return ActivationQuantizer(init, observe, grids, widest.apply, train, widest.apply_fn)
