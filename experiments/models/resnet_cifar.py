"""The CIFAR ResNets of He et al., with BatchNorm and with BatchNorm folded into the convolutions.

He, Zhang, Ren, Sun, Deep Residual Learning for Image Recognition (2016), section 4.2,
https://arxiv.org/abs/1512.03385. Shortcuts are option A: where a block halves the image and doubles
the channels, the identity is subsampled and padded with zero channels, half of them on each side,
as in https://github.com/akamaster/pytorch_resnet_cifar10, whose trained weights `load_pretrained`
reads.

Trainable parameters, width 16 and 10 classes (BatchNorm's running statistics not counted):

    depth   standard   folded
       20    269,722   269,034
       32    464,154   463,018
       44    658,586   657,002
       56    853,018   850,986

Folding keeps every convolution kernel and turns scale and bias into one bias per channel. Both
variants name their parameters alike (`layer2_0/conv1/kernel`), so one rule serves both.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from experiments.models import pretrained

DEPTHS = (20, 32, 44, 56)
BATCH_NORM_EPSILON = 1e-5

_conv_init = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


class Unit(Protocol):
    """A 3x3 convolution and what follows it, up to the activation; called inside a module."""

    def __call__(
        self, x: jax.Array, *, index: int, features: int, stride: int, train: bool
    ) -> jax.Array: ...


def conv_batch_norm(
    x: jax.Array, *, index: int, features: int, stride: int, train: bool
) -> jax.Array:
    """The standard unit: convolution `conv<index>` without bias, then BatchNorm `bn<index>`."""
    x = _conv(features, stride=stride, use_bias=False, name=f"conv{index}")(x)
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=BATCH_NORM_EPSILON,
        name=f"bn{index}",
    )(x)


def conv_bias(x: jax.Array, *, index: int, features: int, stride: int, train: bool) -> jax.Array:
    """The folded unit: convolution `conv<index>` with bias, the same in training and inference."""
    del train
    return _conv(features, stride=stride, use_bias=True, name=f"conv{index}")(x)


def shortcut_a(x: jax.Array, *, features: int, stride: int) -> jax.Array:
    """Option A: x [B, H, W, C] subsampled by `stride`, zero channels added on both sides."""
    pad = (features - x.shape[-1]) // 2
    return jnp.pad(x[:, ::stride, ::stride, :], ((0, 0), (0, 0), (0, 0), (pad, pad)))


class Block(nn.Module):
    """Two units and a shortcut; `inner` channels between the units, default `features`."""

    features: int
    stride: int
    unit: Unit
    inner: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        inner = self.features if self.inner is None else self.inner
        y = self.unit(x, index=1, features=inner, stride=self.stride, train=train)
        y = self.unit(nn.relu(y), index=2, features=self.features, stride=1, train=train)
        if x.shape != y.shape:
            x = shortcut_a(x, features=self.features, stride=self.stride)
        return nn.relu(x + y)


class ResNetCifar(nn.Module):
    """A ResNet for images [B, 32, 32, 3] (already normalised), giving logits [B, num_classes].

    Attributes:
      depth: 20, 32, 44 or 56: 6 n + 2 layers, in three stages of n blocks.
      num_classes: number of logits.
      width: channels of the first stage, even; the stages have width, 2 width and 4 width.
      unit: `conv_batch_norm` (standard) or `conv_bias` (folded).
      inner: channels inside each block, from the first to the last; default as outside.
    """

    depth: int = 20
    num_classes: int = 10
    width: int = 16
    unit: Unit = conv_batch_norm
    inner: tuple[int, ...] | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        self._check(x)
        x = nn.relu(self.unit(x, index=1, features=self.width, stride=1, train=train))
        blocks = (self.depth - 2) // 6
        for stage in (1, 2, 3):
            features = self.width * 2 ** (stage - 1)
            for block in range(blocks):
                stride = 2 if stage > 1 and block == 0 else 1
                name = f"layer{stage}_{block}"
                place = (stage - 1) * blocks + block
                inner = None if self.inner is None else self.inner[place]
                x = Block(features, stride, self.unit, inner, name=name)(x, train=train)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.num_classes, kernel_init=_conv_init, name="linear")(x)

    def _check(self, x: jax.Array) -> None:
        if self.depth not in DEPTHS:
            raise ValueError(f"depth must be one of {DEPTHS}, got {self.depth}")
        if self.width < 2 or self.width % 2:
            raise ValueError(f"width must be even and positive, got {self.width}")
        if self.inner is not None and len(self.inner) != (self.depth - 2) // 2:
            raise ValueError(f"inner must have {(self.depth - 2) // 2} widths, got {self.inner}")
        if x.ndim != 4 or x.shape[-1] != 3:
            raise ValueError(f"images must be [B, H, W, 3], got {x.shape}")


@functools.cache
def standard_apply_fn(
    depth: int = 20, *, num_classes: int = 10, width: int = 16
) -> Callable[[Any, jax.Array], jax.Array]:
    """The pure inference function `(variables, images) -> logits` of the standard variant.

    Equal arguments return the same function, so that `jax.jit` compiles it once.

    >>> images = jnp.zeros((2, 32, 32, 3))
    >>> variables = jax.eval_shape(ResNetCifar(20).init, jax.random.key(0), images)
    >>> jax.eval_shape(standard_apply_fn(20), variables, images)
    ShapeDtypeStruct(shape=(2, 10), dtype=float32)
    """
    model = ResNetCifar(depth, num_classes, width)
    return lambda variables, images: cast(jax.Array, model.apply(variables, images))


@functools.cache
def folded_apply_fn(
    depth: int = 20, *, num_classes: int = 10, width: int = 16
) -> Callable[[Any, jax.Array], jax.Array]:
    """The pure function `(params, images) -> logits` of the variant without BatchNorm."""
    model = ResNetCifar(depth, num_classes, width, unit=conv_bias)
    return lambda params, images: cast(jax.Array, model.apply({"params": params}, images))


def fold_batch_norm(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Folds BatchNorm into the convolutions: the parameters of `folded_apply_fn`.

    With gamma, beta the scale and bias, mu, sigma^2 the running statistics, per output channel:
    kernel' = kernel gamma / sqrt(sigma^2 + eps) and bias' = beta - mu gamma / sqrt(sigma^2 + eps).
    Computed in NumPy float64, cast to float32.

    Args:
      variables: "params" and "batch_stats" of a `ResNetCifar` with `conv_batch_norm`.

    Raises:
      ValueError: a collection is missing, which is so for parameters that are folded already.
    """
    missing = {"params", "batch_stats"} - set(variables)
    if missing:
        raise ValueError(
            f"variables lack {sorted(missing)}: fold_batch_norm takes the collections 'params' and "
            f"'batch_stats' of the standard variant, got {sorted(variables)}"
        )
    return _fold(variables["params"], variables["batch_stats"])


def load_pretrained(depth: int = 20) -> dict[str, Any]:
    """Loads the trained CIFAR-10 weights of the standard variant.

    Top-1 on the 10,000 test images with `data.cifar10_normalise`, folded or not: 91.73 % (20),
    92.63 % (32), 93.10 % (44), 93.39 % (56).

    Args:
      depth: one of `DEPTHS`; `resnet<depth>_cifar10.npz` under `data.data_dir()`, else the public
        checkpoint (see `pretrained.weights_file`).

    Returns:
      {"params": ..., "batch_stats": ...}, float32.

    Raises:
      FileNotFoundError: the file is neither there nor obtainable.
      ValueError: an unknown depth, or a file that is corrupt or of another network.
    """
    if depth not in DEPTHS:
        raise ValueError(f"depth must be one of {DEPTHS}, got {depth}")
    path = pretrained.weights_file(depth)
    found = pretrained.read_variables(path)
    model, images = ResNetCifar(depth), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(
        jax.eval_shape(model.init, jax.random.key(0), images)
    )
    expected = {tuple(key.key for key in keys): leaf.shape for keys, leaf in leaves}
    for name in sorted(expected.keys() | found.keys()):
        have = found[name].shape if name in found else "nothing"
        want = expected.get(name, "nothing")
        if have != want:
            raise ValueError(
                f"{path} is not a ResNet-{depth}: {'/'.join(name)}: {have}, not {want}"
            )
    return jax.tree.unflatten(treedef, [jnp.asarray(found[n], jnp.float32) for n in expected])


def _fold(params: Mapping[str, Any], stats: Mapping[str, Any]) -> dict[str, Any]:
    folded = {}
    for name, leaf in params.items():
        if name.startswith("conv"):
            norm = name.replace("conv", "bn")
            folded[name] = _fold_conv(leaf["kernel"], params[norm], stats[norm])
        elif not name.startswith("bn"):
            folded[name] = _fold(leaf, stats[name]) if name in stats else dict(leaf)
    return folded


def _fold_conv(kernel: Any, norm: Mapping[str, Any], stats: Mapping[str, Any]) -> dict[str, Any]:
    double = functools.partial(np.asarray, dtype=np.float64)
    # factor = gamma / sqrt(sigma^2 + eps)
    factor = double(norm["scale"]) / np.sqrt(double(stats["var"]) + BATCH_NORM_EPSILON)  # [out]
    bias = double(norm["bias"]) - double(stats["mean"]) * factor
    return {
        "kernel": jnp.asarray(double(kernel) * factor, jnp.float32),
        "bias": jnp.asarray(bias, jnp.float32),
    }


def _conv(features: int, *, stride: int, use_bias: bool, name: str) -> nn.Conv:
    return nn.Conv(
        features,
        kernel_size=(3, 3),
        strides=stride,
        padding=((1, 1), (1, 1)),
        use_bias=use_bias,
        kernel_init=_conv_init,
        name=name,
    )
