"""Networks whose channels are tied in all the ways that shrinking must see, at small widths.

Weights are random, running statistics too, so that nothing is zero by accident. A test and a
benchmark share them; `NETWORKS` names them all.
"""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from experiments.models.resnet_cifar import ResNetCifar, conv_batch_norm
from experiments.models.transformer import PreNormBlock


class Network(NamedTuple):
    """A pure function, its parameters and example inputs."""

    apply: Callable[..., jax.Array]
    params: Any
    inputs: tuple[jax.Array, ...]


class Mlp(nn.Module):
    """Three dense layers with GELU between them."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.gelu(nn.Dense(24)(x))
        return nn.Dense(5)(nn.gelu(nn.Dense(16)(x)))


class Vgg(nn.Module):
    """Convolutions and max-pooling, flattened into a dense layer: a channel is 16 of its rows."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for features in (8, 12):
            x = nn.relu(nn.Conv(features, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.sigmoid(nn.Dense(20)(x.reshape(x.shape[0], -1)))
        return nn.Dense(5)(x)


class ResNetB(nn.Module):
    """A CIFAR ResNet with convolutions on the shortcuts (option B)."""

    depth: int = 20
    width: int = 8

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        unit = functools.partial(conv_batch_norm, train=False)
        x = nn.relu(unit(x, index=0, features=self.width, stride=1))
        index = 0
        for stage in range(3):
            features = self.width * 2**stage
            for block in range((self.depth - 2) // 6):
                stride = 2 if stage and not block else 1
                y = nn.relu(unit(x, index=index + 1, features=features, stride=stride))
                y = unit(y, index=index + 2, features=features, stride=1)
                if stride == 2:
                    x = nn.Conv(features, (1, 1), strides=2, use_bias=False)(x)
                    x = nn.BatchNorm(use_running_average=True)(x)
                x, index = nn.relu(x + y), index + 2
        return nn.Dense(10)(x.mean((1, 2)))


class Separable(nn.Module):
    """A depthwise, a grouped and a depthwise convolution of two channels each."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=8)(x))
        x = nn.silu(nn.Conv(16, (1, 1))(x))
        x = nn.relu(nn.Conv(24, (3, 3), feature_group_count=4)(x))
        x = nn.relu(nn.Conv(12, (1, 1))(x))
        x = nn.relu(nn.Conv(24, (3, 3), feature_group_count=12)(x))
        return nn.Dense(5)(x.mean((1, 2)))


class DenseNet(nn.Module):
    """Every layer sees the outputs of all before it, one after the other."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(8, (3, 3))(x)
        for _ in range(3):
            y = nn.relu(nn.BatchNorm(use_running_average=True)(x))
            x = jnp.concatenate([x, nn.Conv(6, (3, 3))(y)], axis=-1)
        return nn.Dense(5)(nn.relu(x).mean((1, 2)))


class Attention(nn.Module):
    """Linen's attention between two dense layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(16)(x)
        x = x + nn.MultiHeadDotProductAttention(4)(x)
        return nn.Dense(5)(nn.tanh(x))


class Transformer(nn.Module):
    """Embedded tokens, blocks with LayerNorm first, the embedding again as the last layer."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        words = nn.Embed(11, 16, name="words")
        positions = jnp.arange(tokens.shape[1])[None]
        x = words(tokens) + nn.Embed(8, 16, name="positions")(positions)
        for index in range(2):
            x = PreNormBlock(4, epsilon=1e-6, name=f"block{index}")(x)
        return words.attend(nn.LayerNorm(name="norm")(x))


class FusedQkv(nn.Module):
    """Attention whose queries, keys and values leave one dense layer, split and reshaped."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(16)(x)
        qkv = nn.Dense(48)(nn.LayerNorm()(x))
        heads = lambda y: y.reshape(*y.shape[:2], 4, 4)
        q, k, v = map(heads, jnp.split(qkv, 3, axis=-1))
        mixed = nn.dot_product_attention(q, k, v)
        x = x + nn.Dense(16)(mixed.reshape(*x.shape[:2], -1))
        return nn.Dense(5)(nn.gelu(x))


class GroupedQuery(nn.Module):
    """Attention with six heads of queries, three on each of two heads of keys and values."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(12)(x)
        q = nn.Dense(24)(x).reshape(*x.shape[:2], 2, 3, 4)
        k, v = (nn.Dense(8)(x).reshape(*x.shape[:2], 2, 4) for _ in range(2))
        weights = nn.softmax(jnp.einsum("btgrd,bsgd->bgrts", q, k) / 2)
        mixed = jnp.einsum("bgrts,bsgd->btgrd", weights, v)
        return nn.Dense(5)(nn.silu(x + nn.Dense(12)(mixed.reshape(*x.shape[:2], -1))))


class SqueezeExcite(nn.Module):
    """A convolution scaled channel by channel by what a small network makes of its mean."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.silu(nn.Conv(12, (3, 3), strides=2)(x))
        gate = nn.sigmoid(nn.Dense(12)(nn.relu(nn.Dense(6)(x.mean((1, 2))))))
        return nn.Dense(5)(nn.Conv(8, (1, 1))(x * gate[:, None, None]).mean((1, 2)))


class Scanned(nn.Module):
    """Blocks with LayerNorm, their parameters stacked: one scan over the layers."""

    layers: int = 3

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scan = nn.scan(
            lambda block, x, _: (block(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.layers,
        )
        x, _ = scan(PreNormBlock(2, epsilon=1e-6, name="blocks"), nn.Dense(8)(x), None)
        return nn.Dense(5)(x)


class NnxCnn(nnx.Module):
    """NNX: convolution, BatchNorm, depthwise convolution, dense layer."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.depthwise = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)
        self.hidden = nnx.Linear(8, 12, rngs=rngs)
        self.head = nnx.Linear(12, 5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.depthwise(nnx.gelu(self.norm(self.conv(x)))))
        return self.head(nnx.relu(self.hidden(x.mean((1, 2)))))


def filled(shapes: Any, seed: int = 0) -> Any:
    """Numbers for parameters: kernels of about unit gain, vectors in (0.5, 1.5)."""
    rng = np.random.default_rng(seed)

    def fill(s):
        x = rng.normal(size=s.shape) * (s.size / s.shape[-1]) ** -0.5
        x = x if s.ndim > 1 else rng.uniform(0.5, 1.5, s.shape)
        return jnp.asarray(x, s.dtype)

    return jax.tree.map(fill, shapes)


def images(size: int = 8, batch: int = 2) -> jax.Array:
    """Random images [B, size, size, 3]."""
    return jnp.asarray(np.random.default_rng(1).normal(size=(batch, size, size, 3)), jnp.float32)


def sequences(width: int = 6) -> jax.Array:
    """Random sequences [2, 5, width]."""
    return jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, width)), jnp.float32)


def linen(module: nn.Module, *inputs: jax.Array) -> Network:
    """A Linen module as a `Network`; params are all its variables."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    apply = lambda variables, *inputs: cast(jax.Array, module.apply(variables, *inputs))
    return Network(apply, filled(shapes), inputs)


def nnx_cnn() -> Network:
    """`NnxCnn`, split into its graph and its state."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: NnxCnn(nnx.Rngs(0))))
    return Network(lambda state, x: nnx.merge(graphdef, state)(x), filled(state), (images(),))


def equinox_mlp() -> Network:
    """Equinox: an MLP with two hidden layers, vmapped over the batch."""
    mlp = eqx.filter_eval_shape(eqx.nn.MLP, 6, 4, 16, 2, key=jax.random.key(0))
    params, static = eqx.partition(mlp, lambda x: isinstance(x, jax.ShapeDtypeStruct))
    apply = lambda params, x: jax.vmap(eqx.combine(params, static))(x)
    return Network(apply, filled(params), (sequences()[0],))


def tokens() -> jax.Array:
    """Token numbers [2, 5]."""
    return jnp.asarray(np.random.default_rng(1).integers(0, 11, (2, 5)), jnp.int32)


NETWORKS: Mapping[str, Callable[[], Network]] = MappingProxyType(
    {
        "mlp": lambda: linen(Mlp(), sequences()[0]),
        "vgg": lambda: linen(Vgg(), images(16)),
        "resnet20_a": lambda: linen(ResNetCifar(20, width=8), images(16)),
        "resnet20_b": lambda: linen(ResNetB(20), images(16)),
        "resnet56_a": lambda: linen(ResNetCifar(56, width=8), images(16)),
        "separable": lambda: linen(Separable(), images()),
        "densenet": lambda: linen(DenseNet(), images()),
        "attention": lambda: linen(Attention(), sequences()),
        "transformer": lambda: linen(Transformer(), tokens()),
        "fused_qkv": lambda: linen(FusedQkv(), sequences()),
        "grouped_query": lambda: linen(GroupedQuery(), sequences()),
        "squeeze_excite": lambda: linen(SqueezeExcite(), images()),
        "scanned": lambda: linen(Scanned(), sequences()),
        "nnx_cnn": nnx_cnn,
        "equinox_mlp": equinox_mlp,
    }
)
