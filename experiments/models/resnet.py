"""The ImageNet ResNets, in inference.

He, Zhang, Ren, Sun, Deep Residual Learning for Image Recognition (2016), table 1,
https://arxiv.org/abs/1512.03385. Where a bottleneck halves the image, its 3x3 convolution has the
stride ("v1.5", as in torchvision), not the first 1x1 convolution as in the paper.

    depth   stages          block
       18   (2, 2, 2, 2)    Basic
       34   (3, 4, 6, 3)    Basic
       50   (3, 4, 6, 3)    Bottleneck
      101   (3, 4, 23, 3)   Bottleneck
      152   (3, 8, 36, 3)   Bottleneck
"""

from typing import Any

import jax
from flax import linen as nn

from experiments.models.layers import ConvBatchNorm, global_average


class Basic(nn.Module):
    """Two 3x3 convolutions and a shortcut; gives `features` channels."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.relu(ConvBatchNorm(self.features, stride=self.stride, name="unit1")(x))
        y = ConvBatchNorm(self.features, name="unit2")(y)
        return nn.relu(y + shortcut(x, y, stride=self.stride))


class Bottleneck(nn.Module):
    """Convolutions 1x1, 3x3 and 1x1 and a shortcut; gives 4 `features` channels."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.relu(ConvBatchNorm(self.features, kernel=1, name="unit1")(x))
        y = nn.relu(ConvBatchNorm(self.features, stride=self.stride, name="unit2")(y))
        y = ConvBatchNorm(4 * self.features, kernel=1, name="unit3")(y)
        return nn.relu(y + shortcut(x, y, stride=self.stride))


def shortcut(x: jax.Array, y: jax.Array, *, stride: int) -> jax.Array:
    """Option B: `x` itself, or a 1x1 convolution `shortcut` of it where `y` has another shape."""
    if x.shape == y.shape:
        return x
    return ConvBatchNorm(y.shape[-1], kernel=1, stride=stride, name="shortcut")(x)


class ResNet(nn.Module):
    """A ResNet for images [B, H, W, 3] (already normalised), giving logits [B, num_classes].

    Attributes:
      stages: number of blocks in each of the four stages, of 64, 128, 256 and 512 features.
      block: `Basic` or `Bottleneck`.
      num_classes: number of logits.

    >>> images = jax.ShapeDtypeStruct((2, 224, 224, 3), "float32")
    >>> model = ResNet((2, 2, 2, 2), Basic)
    >>> jax.eval_shape(model.init_with_output, jax.random.key(0), images)[0].shape
    (2, 1000)
    """

    stages: tuple[int, ...]
    block: type[Basic] | type[Bottleneck]
    num_classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(ConvBatchNorm(64, kernel=7, stride=2, name="stem")(x))
        padding: Any = ((1, 1), (1, 1))  # Flax annotates names only
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=padding)
        for stage, blocks in enumerate(self.stages):
            for index in range(blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                name = f"layer{stage + 1}_{index}"
                x = self.block(64 * 2**stage, stride, name=name)(x)
        return nn.Dense(self.num_classes, name="linear")(global_average(x))
