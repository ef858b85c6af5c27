"""A Llama-type language model: all tokens at once, or some at a time with a cache.

Touvron et al., LLaMA: Open and Efficient Foundation Language Models (2023),
https://arxiv.org/abs/2302.13971: RMSNorm before each half of a layer, SwiGLU, rotary positions, no
biases. Keys and values are shared by groups of heads: Ainslie et al., GQA (2023),
https://arxiv.org/abs/2305.13245. The head is the embedding, transposed.

Every projection is a dense layer of its own with a kernel [in, out]: `layer_0/attention/q/kernel`
and k, v, o; `layer_0/mlp/gate/kernel` and up, down; `embedding/embedding` [vocabulary, dim].
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from experiments.models import kv_cache
from experiments.models.kv_cache import Cache, LayerCache
from jaxcompress.core.packed import unpack
from jaxcompress.formats import Format


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama; the defaults are those of stories260K.

    Attributes:
      dim: features per token, a multiple of 2 * heads.
      hidden: features inside the SwiGLU.
      layers: number of layers.
      heads: number of heads of the queries, a multiple of `kv_heads`.
      kv_heads: number of heads of keys and values.
      vocabulary: number of tokens that exist.
      epsilon: of RMSNorm.
      rope_base: of the wavelengths of the rotary positions.
    """

    dim: int = 64
    hidden: int = 172
    layers: int = 5
    heads: int = 8
    kv_heads: int = 4
    vocabulary: int = 512
    epsilon: float = 1e-5
    rope_base: float = 10_000.0

    def __post_init__(self):
        if self.dim % (2 * self.heads):
            raise ValueError(f"dim must be a multiple of 2 * heads, got {self.dim}, {self.heads}")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads must be a multiple of kv_heads, got {self.heads}, {self.kv_heads}"
            )

    @property
    def head_dim(self) -> int:
        """Features per head."""
        return self.dim // self.heads


STORIES_260K = LlamaConfig()


def rotate(x: jax.Array, position: jax.Array | int, *, base: float) -> jax.Array:
    """Turns neighbouring features 2i, 2i + 1 of x [B, T, H, D] by the angle t * base^(-2i / D).

    t = position + 0 ... position + T - 1. Su et al., RoFormer (2021),
    https://arxiv.org/abs/2104.09864, equation 34.
    """
    *_, length, _, width = x.shape
    times = jnp.asarray(position, jnp.float32) + jnp.arange(length, dtype=jnp.float32)
    frequencies = np.float32(base) ** (-np.arange(0, width, 2, dtype=np.float32) / width)
    angles = (times[:, None] * frequencies[None])[None, :, None, :]  # [1, T, 1, D / 2]
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    even, odd = x[..., ::2], x[..., 1::2]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, position: jax.Array | int) -> jax.Array:
    """Causal attention of q [B, T, H, D] over k, v [B, S, KV, D]: softmax(q k^T / sqrt(D)) v.

    Query t stands at position + t and sees the keys up to there. H / KV neighbouring heads share
    one head of keys and values. Returns [B, T, H * D].
    """
    batch, length, heads, width = q.shape
    q = q.reshape(batch, length, k.shape[2], -1, width)  # [B, T, KV, G, D]
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k) * np.asarray(width**-0.5, q.dtype)
    seen = jnp.arange(k.shape[1])[None, :] <= position + jnp.arange(length)[:, None]  # [T, S]
    scores = jnp.where(seen[None, None, None], scores, -jnp.inf)
    mixed = jnp.einsum("bkgts,bskd->btkgd", jax.nn.softmax(scores, axis=-1), v)
    return mixed.reshape(batch, length, heads * width)


class Attention(nn.Module):
    """Self-attention; maps [B, T, dim] and a cache (or None) to [B, T, dim] and the cache."""

    config: LlamaConfig
    kv_format: Format | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, cache: LayerCache | None, position: jax.Array | int
    ) -> tuple[jax.Array, LayerCache | None]:
        config, (batch, length, _) = self.config, x.shape

        def heads(name: str, count: int) -> jax.Array:
            y = _dense(count * config.head_dim, name)(x)
            return y.reshape(batch, length, count, config.head_dim)

        q = rotate(heads("q", config.heads), position, base=config.rope_base)
        k = rotate(heads("k", config.kv_heads), position, base=config.rope_base)
        v = heads("v", config.kv_heads)
        if cache is None:
            k, v = (kv_cache.seen_through(y, self.kv_format) for y in (k, v))
        else:
            cache = LayerCache(
                *(kv_cache.write(*pair, position) for pair in zip(cache, (k, v), strict=True))
            )
            k, v = (unpack(stored) for stored in cache)
        return _dense(config.dim, "o")(attend(q, k, v, position)), cache


class SwiGlu(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases. Shazeer (2020), arXiv 2002.05202."""

    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = _dense(self.hidden, "gate")(x), _dense(self.hidden, "up")(x)
        return _dense(x.shape[-1], "down")(nn.silu(gate) * up)


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    config: LlamaConfig
    kv_format: Format | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, cache: LayerCache | None, position: jax.Array | int
    ) -> tuple[jax.Array, LayerCache | None]:
        config = self.config
        y = _norm(config, "attention_norm")(x)
        y, cache = Attention(config, self.kv_format, name="attention")(y, cache, position)
        x = x + y
        y = _norm(config, "mlp_norm")(x)
        return x + SwiGlu(config.hidden, name="mlp")(y), cache


class Llama(nn.Module):
    """Tokens, int32 [B, T], to logits of the next one, [B, T, vocabulary].

    With a cache the tokens stand at position, position + 1, ...; logits and the new cache are
    returned. Without one they begin at 0 and only the logits are returned.

    Attributes:
      config: the sizes.
      kv_format: without a cache, keys and values are seen through this format with one scale per
        token and head, exactly as from a cache that holds them so. A cache has its own format.
    """

    config: LlamaConfig = STORIES_260K
    kv_format: Format | None = None

    @nn.compact
    def __call__(
        self, tokens: jax.Array, cache: Cache | None = None, position: jax.Array | int = 0
    ) -> Any:
        self._check(tokens, cache, position)
        words = nn.Embed(self.config.vocabulary, self.config.dim, name="embedding")
        x, caches = words(tokens), []
        for index in range(self.config.layers):
            layer = Layer(self.config, self.kv_format, name=f"layer_{index}")
            x, new = layer(x, None if cache is None else cache[index], position)
            caches.append(new)
        logits = words.attend(_norm(self.config, "norm")(x))
        return logits if cache is None else (logits, tuple(caches))

    def _check(self, tokens: jax.Array, cache: Cache | None, position: jax.Array | int) -> None:
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"tokens must be integers [B, T], got {tokens.dtype} {tuple(tokens.shape)}"
            )
        if cache is None:
            return
        if len(cache) != self.config.layers:
            raise ValueError(f"cache must have {self.config.layers} layers, got {len(cache)}")
        batch, room = cache[0].k.shape[:2]
        first = position if isinstance(position, int) else 0
        if batch != tokens.shape[0] or first + tokens.shape[1] > room:
            raise ValueError(
                f"cache must have room for tokens {tuple(tokens.shape)} at position {first}, "
                f"got [B, T_max] = {(batch, room)}"
            )


@functools.cache
def apply_fn(
    config: LlamaConfig = STORIES_260K, *, kv_format: Format | None = None
) -> Callable[[Any, jax.Array], jax.Array]:
    """The pure function `(params, tokens [B, T]) -> logits [B, T, vocabulary]`, all at once.

    Equal arguments return the same function, so that `jax.jit` compiles it once.

    Args:
      config: the sizes.
      kv_format: None, or the format of a cache, e.g. `formats.integer(8)`: the logits are those
        that `apply_cached` gives with such a cache.
    """
    model = Llama(config, kv_format)
    return lambda params, tokens: cast(jax.Array, model.apply({"params": params}, tokens))


def empty_cache(
    config: LlamaConfig = STORIES_260K,
    *,
    batch: int,
    length: int,
    kv_format: Format | None = None,
) -> Cache:
    """A cache of `config`'s sizes for `batch` sequences of `length` positions.

    `kv_format` is None, or how keys and values are stored: see `kv_cache.empty`.
    """
    return kv_cache.empty(
        config.layers,
        (batch, length, config.kv_heads, config.head_dim),
        kv_format=kv_format,
    )


@functools.cache
def apply_cached(
    config: LlamaConfig = STORIES_260K,
) -> Callable[[Any, jax.Array, Cache, jax.Array | int], tuple[jax.Array, Cache]]:
    """`(params, tokens [B, T], cache, position) -> (logits [B, T, vocabulary], cache)`.

    The tokens are those at position ... position + T - 1, any number at a time. The caller keeps
    position + T within the cache: where `position` is traced it cannot be checked.

    >>> cache = empty_cache(batch=2, length=16)
    >>> params = jax.eval_shape(Llama().init, jax.random.key(0), jnp.ones((2, 1), jnp.int32))
    >>> tokens = jnp.ones((2, 3), jnp.int32)
    >>> jax.eval_shape(apply_cached(), params["params"], tokens, cache, 5)[0]
    ShapeDtypeStruct(shape=(2, 3, 512), dtype=float32)
    """
    model = Llama(config)
    return lambda params, tokens, cache, position: cast(
        Any, model.apply({"params": params}, tokens, cache, position)
    )


def _dense(features: int, name: str) -> nn.Dense:
    return nn.Dense(features, use_bias=False, name=name)


def _norm(config: LlamaConfig, name: str) -> nn.RMSNorm:
    return nn.RMSNorm(epsilon=config.epsilon, name=name)
