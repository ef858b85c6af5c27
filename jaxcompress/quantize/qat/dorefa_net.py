"""DoReFa-Net: k-bit weights through tanh, activations in [0, 1], and gradients."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxcompress.core.compressor import Compressor, CompressState, is_float_array, per_leaf
from jaxcompress.core.packed import Grid, quantize
from jaxcompress.formats import (
    Granularity,
    QParams,
    binary,
    clip_ste,
    codebook,
    identity_ste,
    integer,
    round_ste,
)
from jaxcompress.formats.scales import finite
from jaxcompress.quantize.fake_quantized_activations import ActivationQuantizer
from jaxcompress.quantize.fake_quantized_weights import weights
from jaxcompress.quantize.qat.activation_quantizers import Rule, learned_activations
from jaxcompress.quantize.ranges.min_max import refuse_non_finite

_WHOLE = Granularity()
_ONE = 1.0 + 2.0**-20  # the largest weight may be a rounding above 1, and must get a gradient


def dorefa(bits: int) -> Compressor:
    """Weights 2 quantize_k(tanh(w) / (2 max|tanh w|) + 1/2) - 1: 2**bits levels in [-1, 1].

    quantize_k(r) = round((2**k - 1) r) / (2**k - 1); the levels are evenly spaced and zero is none
    of them, so prune after it, not before. The derivative is straight through the rounding and
    that of tanh otherwise; the maximum, of the whole array, is a buffer that `update` renews. One
    bit is sign(w) mean|w| with derivative 1.

    A network needs BatchNorm, or a scale of its own, behind weights of this size.

    Args:
      bits: 1 to 8; a traced number of at least 2 where nothing is packed.

    Source: Zhou et al. 2016, DoReFa-Net, arXiv 1606.06160, section 2.3, eq. 7 to 9.
    """
    integer(bits)  # refuses other numbers
    if isinstance(bits, int) and bits == 1:
        return weights(binary(), ste=identity_ste)
    steps = jnp.asarray(2**bits - 1, jnp.float32)

    def largest(w):
        refuse_non_finite("an array to quantize", w)
        size = jnp.max(jnp.abs(w), initial=0.0).astype(jnp.float32)
        known = jnp.all(jnp.isfinite(w))
        return jnp.where(known, jnp.tanh(jnp.where(size == 0, 1.0, size)), jnp.nan)

    def apply(w, state):
        # n = 2**k - 1; 2 round(n (t / 2 + 1/2)) / n - 1 = (2 round(...) - n) / n
        t = jnp.tanh(w.astype(jnp.float32)) * (1.0 / _spread(state.buffers, w.ndim))
        t = clip_ste(t, -_ONE, _ONE)
        code = round_ste(steps * (0.5 * t + 0.5))
        return finite((2.0 * code - steps) * (1.0 / steps), w.dtype)

    def update(w, state, *, grads=None, **extra):
        del grads, extra
        return state._replace(buffers=largest(w))

    def pack(w, state):
        refuse_non_finite("an array to pack", w)
        # The view's numbers are levels, so the nearest is the number itself; its scale is 1.
        one = QParams(jnp.ones(_WHOLE.scale_shape(w.shape), jnp.float32))
        view = apply(w.astype(jnp.float32), state)
        return quantize(view, one, format=dorefa_format(bits), granularity=_WHOLE, dtype=w.dtype)

    maker = f"{bits} bits of DoReFa" if isinstance(bits, int) else None
    init = lambda w: CompressState(buffers=largest(w))
    return per_leaf(init, apply, update=update, pack=pack, maker=maker)


def _spread(x: Array, rank: int) -> Array:
    return x.reshape((1,) * rank)


def dorefa_format(bits: int) -> Any:
    """The 2**bits levels as a format: what `pack` of `dorefa` stores."""
    if not isinstance(bits, int):
        raise TypeError(f"pack needs the number of bits itself, got {bits!r}")
    count = np.float32(2**bits - 1)
    codes = 2 * np.arange(2**bits, dtype=np.float32) - count
    levels = codes * (np.float32(1) / count)
    return codebook(f"dorefa{bits}", [float(level) for level in levels])


def dorefa_activations(
    apply_fn: Callable[..., Any], bits: int | Mapping[str, int], *, sites: str = ".*"
) -> ActivationQuantizer:
    """Every contraction's input as quantize_k(clip(x, 0, 1)): a grid that is fixed, not learned.

    For networks whose activations are bounded so; leave their first layer out with `sites`.
    Source: Zhou et al. 2016, DoReFa-Net, arXiv 1606.06160, section 2.4, eq. 11.
    """
    return learned_activations(apply_fn, bits, _unit_rule, sites=sites)


def _unit_rule(bits: Any) -> Rule:
    format = integer(bits, symmetric=False)

    def grid(learned, signed):
        del learned
        scale = jnp.full(signed.shape, 1.0, jnp.float32) / jnp.asarray(2**bits - 1, jnp.float32)
        return Grid(QParams(scale, jnp.zeros(signed.shape, jnp.uint8)), format)

    def snap(x, learned, signed):
        return grid(learned, signed).snap(x)

    return Rule(lambda moments, signed: (), snap, grid)


def quantized_gradient(g: Array, key: Array, *, bits: Any, per_example: bool = True) -> Array:
    """2 max|g| (quantize_k(g / (2 max|g|) + 1/2 + N) - 1/2), N uniform in +-1/2 / (2**k - 1).

    Unbiased but for the two ends of the range, where the noise is clipped away.

    Args:
      g: floating point, any shape; zeros where all are zero.
      key: of the noise, typed or uint32 [2].
      bits: k, may be traced.
      per_example: the maximum of each index of the first axis, as in the paper; else of all.

    Source: Zhou et al. 2016, DoReFa-Net, arXiv 1606.06160, section 2.5, eq. 12.
    """
    x = g.astype(jnp.float32)
    axes = tuple(range(1, g.ndim)) if per_example and g.ndim else tuple(range(g.ndim))
    top = 2.0 * jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0.0)
    steps = jnp.asarray(bits, jnp.float32)
    steps = jnp.exp2(steps) - 1.0
    share = x / jnp.where(top == 0, 1.0, top) + 0.5
    noise = jax.random.uniform(key, g.shape, minval=-0.5, maxval=0.5)
    code = jnp.clip(jnp.round(steps * share + noise), 0.0, steps)
    known = jnp.all(jnp.isfinite(x), axis=axes, keepdims=True)
    value = jnp.where(top == 0, 0.0, top * (code / steps - 0.5))
    return finite(jnp.where(known, value, jnp.nan), g.dtype)


def dorefa_gradients(x: Array, key: Array, *, bits: Any) -> Array:
    """x itself, whose gradient is quantized on its way back: `quantized_gradient` per example.

    Args:
      x: [B, ...], the output of a layer.
      key: a new one for every step and layer; traced.
      bits: k, may be traced.

    >>> grad = jax.grad(lambda x: jnp.sum(dorefa_gradients(x, jax.random.key(0), bits=1) ** 2))
    >>> print(jnp.abs(grad(jnp.array([[1.0, 2.0]]))))  # max|g| = 4, either sign
    [[4. 4.]]
    """
    return _quantize_back(x, key, jnp.asarray(bits, jnp.float32))


@jax.custom_vjp
def _quantize_back(x, key, bits):
    del key, bits
    return x


def _forward(x, key, bits):
    return x, (key, bits)


def _backward(kept, g):
    key, bits = kept
    return quantized_gradient(g, key, bits=bits), None, None


_quantize_back.defvjp(_forward, _backward)


class NoiseState(NamedTuple):
    """Optimizer steps done: the noise of each is its own."""

    count: Array  # int32


def quantized_gradients(bits: Any, *, seed: int = 0) -> optax.GradientTransformation:
    """An Optax transform: each gradient leaf as `quantized_gradient`, the maximum of the leaf.

    For gradients that are sent between devices, or first in the chain of an optimizer.

    Args:
      bits: k of 2**k levels; may be traced.
      seed: of the noise, which depends on it, the step and the leaf's place alone.
    """

    def init(params):
        del params
        return NoiseState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        del params
        root = jax.random.fold_in(jax.random.key(seed), state.count)
        leaves, treedef = jax.tree.flatten(updates)
        rounded = [
            quantized_gradient(g, jax.random.fold_in(root, place), bits=bits, per_example=False)
            if is_float_array(g)
            else g
            for place, g in enumerate(leaves)
        ]
        return treedef.unflatten(rounded), NoiseState(state.count + 1)

    return optax.GradientTransformation(init, update)
