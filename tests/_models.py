"""Small models in every framework that tests share: pure functions of (params, x)."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from jax import lax


class Model(NamedTuple):
    """A pure function, its parameters and an input."""

    apply: Callable[[Any, Any], Any]
    params: Any
    x: jax.Array


def _normal(seed: int, shape: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def _filled(shapes: Any) -> Any:
    # Numbers without running initialisers: kernels of about unit gain, vectors in (0.5, 1.5) (they
    # may be variances).
    rng = np.random.default_rng(0)

    def fill(s):
        x = rng.normal(size=s.shape) * (s.size / s.shape[-1]) ** -0.5
        x = x if s.ndim > 1 else rng.uniform(0.5, 1.5, s.shape)
        return jnp.asarray(x, s.dtype)

    return jax.tree.map(fill, shapes)


class ResNet20(nn.Module):
    """ResNet-20 for CIFAR (He et al. 2016), shortcuts of option A, BatchNorm in inference mode."""

    width: int = 16

    @nn.compact
    def __call__(self, x):
        x = nn.relu(_conv_norm(x, self.width, 1))
        for stage in range(3):
            for block in range(3):
                stride = 2 if stage and not block else 1
                y = nn.relu(_conv_norm(x, self.width * 2**stage, stride))
                y = _conv_norm(y, self.width * 2**stage, 1)
                extra = (y.shape[-1] - x.shape[-1]) // 2
                pads = ((0, 0), (0, 0), (0, 0), (extra, extra))
                x = nn.relu(jnp.pad(x[:, ::stride, ::stride], pads) + y)
        return nn.Dense(10)(x.mean((1, 2)))


def _conv_norm(x, features, stride):
    # Called inside a compact method, so the submodules belong to the caller.
    x = nn.Conv(features, (3, 3), strides=stride, padding=1, use_bias=False)(x)
    return nn.BatchNorm(use_running_average=True)(x)


@functools.cache
def resnet20(*, size: int = 32, width: int = 16, batch: int = 2) -> Model:
    """Linen ResNet-20 on `size` x `size` x 3 images; params holds "params" and "batch_stats"."""
    module = ResNet20(width)
    x = _normal(1, (batch, size, size, 3))
    params = _filled(jax.eval_shape(module.init, jax.random.key(0), x))
    return Model(lambda p, x: module.apply(p, x), params, x)


class _NnxCnn(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.depthwise = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.gelu(self.norm(self.conv(x)))
        x = nnx.relu(self.depthwise(x))
        return self.head(x.mean((1, 2)))


@functools.cache
def nnx_cnn() -> Model:
    """NNX: convolution, BatchNorm, depthwise convolution, linear."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: _NnxCnn(nnx.Rngs(0))))
    x = _normal(1, (2, 8, 8, 3))
    return Model(lambda state, x: nnx.merge(graphdef, state)(x), _filled(state), x)


@functools.cache
def equinox_mlp() -> Model:
    """Equinox: an MLP with two hidden layers, vmapped over the batch."""
    mlp = eqx.filter_eval_shape(eqx.nn.MLP, 6, 4, 16, 2, key=jax.random.key(0))
    params, static = eqx.partition(mlp, lambda x: isinstance(x, jax.ShapeDtypeStruct))
    apply = lambda p, x: jax.vmap(eqx.combine(p, static))(x)
    return Model(apply, _filled(params), _normal(1, (5, 6)))


def _layer_norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    variance = jnp.square(x).mean(-1, keepdims=True)
    return x * lax.rsqrt(variance + 1e-6) * p["scale"][None, None] + p["bias"][None, None]


def _block(p, x, heads: int):
    # x: [B, T, D]
    b, t, d = x.shape
    y = _layer_norm(p["norm1"], x)
    q, k, v = ((y @ p[n]).reshape(b, t, heads, d // heads) for n in ("query", "key", "value"))
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / jnp.float32(d // heads) ** 0.5
    mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)
    x = x + mixed.reshape(b, t, d) @ p["out"]
    y = _layer_norm(p["norm2"], x)
    return x + jax.nn.gelu(y @ p["up"]) @ p["down"]


@functools.cache
def transformer(*, layers: int = 3, d: int = 8, remat: bool = True) -> Model:
    """Transformer blocks (attention, MLP, LayerNorm), stacked: one scan, `remat` inside."""
    shapes: dict[str, Any] = {"query": (d, d), "key": (d, d), "value": (d, d), "out": (d, d)}
    shapes |= {"up": (d, 4 * d), "down": (4 * d, d)}
    norm = {"scale": (d,), "bias": (d,)}
    stacked = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct((layers, *shape), jnp.float32),
        shapes | {"norm1": norm, "norm2": norm},
        is_leaf=lambda x: isinstance(x, tuple),
    )

    def apply(params, x):
        block = functools.partial(_block, heads=2)
        if remat:
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            block = jax.checkpoint(block, policy=policy)
        x, _ = lax.scan(lambda x, p: (block(p, x), None), x, params["layers"])
        return x

    return Model(apply, {"layers": _filled(stacked)}, _normal(1, (2, 5, d)))
