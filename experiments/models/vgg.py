"""The convolutional networks with large dense layers: AlexNet and VGG-16, in inference.

Krizhevsky, One weird trick for parallelizing convolutional neural networks (2014),
https://arxiv.org/abs/1404.5997: AlexNet on one device, without groups and local normalisation.
Simonyan, Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition (2015),
table 1, column D, https://arxiv.org/abs/1409.1556.
"""

import jax
from flax import linen as nn


class AlexNet(nn.Module):
    """AlexNet for images [B, 224, 224, 3] (already normalised), giving logits [B, num_classes]."""

    num_classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(64, (11, 11), strides=4, padding=2, name="conv1")(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2))
        x = nn.relu(nn.Conv(192, (5, 5), padding=2, name="conv2")(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2))
        for index, features in enumerate((384, 256, 256), start=3):
            x = nn.relu(nn.Conv(features, (3, 3), padding=1, name=f"conv{index}")(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2))  # [B, 6, 6, 256]
        return dense_layers(x, num_classes=self.num_classes)


class VGG(nn.Module):
    """VGG for images [B, 224, 224, 3] (already normalised), giving logits [B, num_classes].

    Attributes:
      stages: number of 3x3 convolutions in each of the five stages; (2, 2, 3, 3, 3) is VGG-16.
      num_classes: number of logits.
    """

    stages: tuple[int, ...] = (2, 2, 3, 3, 3)
    num_classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        widths = (64, 128, 256, 512, 512)
        for stage, (convolutions, features) in enumerate(zip(self.stages, widths, strict=True)):
            for index in range(convolutions):
                name = f"conv{stage + 1}_{index + 1}"
                x = nn.relu(nn.Conv(features, (3, 3), padding=1, name=name)(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))  # the last one: [B, 7, 7, 512]
        return dense_layers(x, num_classes=self.num_classes)


def dense_layers(x: jax.Array, *, num_classes: int) -> jax.Array:
    """The end of both networks: x [B, H, W, C] flattened, two hidden layers and the logits."""
    x = x.reshape(x.shape[0], -1)
    x = nn.relu(nn.Dense(4096, name="hidden1")(x))
    x = nn.relu(nn.Dense(4096, name="hidden2")(x))
    return nn.Dense(num_classes, name="linear")(x)
