"""Small convolutional networks for the 8x8 digits, without BatchNorm.

    network      features   hidden   parameters
    `teacher()`  (32, 64)      256       87,178
    `student()`  (8, 16)       128       10,858

(10 classes, biases included.)
"""

import math
from collections.abc import Callable
from typing import Any, cast

import jax
from flax import linen as nn


class DigitsCNN(nn.Module):
    """Convolutions 3x3, each with relu and 2x2 max pooling, then a hidden layer and the logits.

    Maps images, float32 [B, 8, 8, 1], to logits, float32 [B, num_classes].

    Attributes:
      features: channels of each convolution, one to three of them (each halves the image).
      hidden: width of the hidden layer.
      num_classes: number of logits.

    >>> model = DigitsCNN(features=(4,), hidden=16)
    >>> images = jax.numpy.zeros((2, 8, 8, 1))
    >>> model.apply(model.init(jax.random.key(0), images), images).shape
    (2, 10)
    """

    features: tuple[int, ...] = (32, 64)
    hidden: int = 256
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if not 1 <= len(self.features) <= 3:
            raise ValueError(f"features must have one to three entries, got {self.features}")
        if x.ndim != 4 or x.shape[1:] != (8, 8, 1):
            raise ValueError(f"images must be [B, 8, 8, 1], got {x.shape}")
        for i, channels in enumerate(self.features):
            x = nn.relu(nn.Conv(channels, kernel_size=(3, 3), name=f"conv{i + 1}")(x))
            x = nn.max_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], math.prod(x.shape[1:]))
        x = nn.relu(nn.Dense(self.hidden, name="hidden_layer")(x))
        return nn.Dense(self.num_classes, name="linear")(x)


def teacher() -> DigitsCNN:
    """The large network: 87,178 parameters."""
    return DigitsCNN(features=(32, 64), hidden=256)


def student() -> DigitsCNN:
    """The small network: 10,858 parameters, an eighth of the teacher."""
    return DigitsCNN(features=(8, 16), hidden=128)


def apply_fn(model: DigitsCNN) -> Callable[[Any, jax.Array], jax.Array]:
    """The pure function `(params, images) -> logits` of a network."""
    return lambda params, images: cast(jax.Array, model.apply({"params": params}, images))
