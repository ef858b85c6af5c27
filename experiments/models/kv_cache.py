"""Keys and values of the tokens so far, as arrays or as codes with a scale per token and head.

One scale per token and head: a new token is encoded once and never changes how older ones are
stored. Scales per channel of the keys, over groups of tokens, are better at 2 bits, but need the
newest tokens in float: Liu et al., KIVI (2024), https://arxiv.org/abs/2402.02750.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress.core.packed import QTensor, quantize
from jaxcompress.formats import Format, Granularity, lanes
from jaxcompress.quantize.fake_quantized_weights import fake_quant, qparams_of

_PER_TOKEN_AND_HEAD = Granularity(axis=(0, 1, 2))  # of [B, T, kv_heads, head_dim]


class LayerCache(NamedTuple):
    """Keys and values of one layer for all positions so far.

    Each is an array [B, T_max, kv_heads, head_dim], or a `QTensor` of that shape: packed codes
    (int8: one byte each) and one scale per token and head [B, T_max, kv_heads, 1].
    """

    k: Any
    v: Any


Cache = tuple[LayerCache, ...]  # one per layer


def empty(
    layers: int,
    shape: tuple[int, int, int, int],
    *,
    kv_format: Format | None = None,
    dtype: Any = jnp.float32,
) -> Cache:
    """A cache of zeros.

    Args:
      layers: number of layers.
      shape: [B, T_max, kv_heads, head_dim] of the keys, and of the values, of one layer.
      kv_format: None: arrays of `dtype`; else e.g. `formats.integer(8)`: every leaf is a `QTensor`,
        whose bytes `jaxcompress.packed_bytes(cache)` counts.
      dtype: of the keys and values that attention sees.

    Raises:
      ValueError: the codes of a head do not fill whole bytes, or the format has blocks of its own.

    >>> import jaxcompress as jc
    >>> int8 = empty(5, (1, 100, 4, 8), kv_format=jc.formats.integer(8))
    >>> jc.packed_bytes(int8) == 2 * 5 * 100 * 4 * (8 * 1 + 4)  # codes and a scale
    True
    """
    zeros = jnp.zeros(shape, dtype)
    if kv_format is not None:
        _check(kv_format, shape[-1])
    stored = zeros if kv_format is None else _stored(zeros, kv_format)
    return tuple(LayerCache(stored, stored) for _ in range(layers))


def seen_through(x: jax.Array, format: Format | None) -> jax.Array:
    """What `unpack` of `_stored` gives, bit for bit."""
    return x if format is None else fake_quant(x, format, axis=_PER_TOKEN_AND_HEAD.axis)


def write(stored: Any, x: jax.Array, position: jax.Array | int) -> Any:
    """The cache entry with x [B, T, KV, D] at position ... position + T - 1."""
    new = _stored(x, stored.format) if isinstance(stored, QTensor) else x
    leaves, treedef = jax.tree.flatten(stored)
    place = lambda old, part: jax.lax.dynamic_update_slice_in_dim(old, part, position, axis=1)
    placed = map(place, leaves, jax.tree.leaves(new))
    return jax.tree.unflatten(treedef, placed)


def _stored(x: jax.Array, format: Format) -> QTensor:
    qparams = qparams_of(x, format, _PER_TOKEN_AND_HEAD)
    return quantize(x, qparams, format=format, granularity=_PER_TOKEN_AND_HEAD)


def _check(format: Format, head_dim: int) -> None:
    if format.group is not None or head_dim % lanes(format.bits):
        raise ValueError(
            f"kv_format must have one scale per head of {head_dim} features, whose codes fill "
            f"whole bytes, such as formats.integer(8); got {format.name}"
        )
