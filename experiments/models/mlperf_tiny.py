"""The four reference networks of MLPerf Tiny, in inference.

Banbury et al., MLPerf Tiny Benchmark (2021), https://arxiv.org/abs/2106.07597; the networks are
those of https://github.com/mlcommons/tiny, directory benchmark/training.

    network              task                   input          output      MACs    parameters
    `ResNet8`            image classification   [32, 32, 3]    [10]  12,501,632        78,186
    `DsCnn`              keyword spotting       [49, 10, 1]    [12]   2,656,768        23,756
    `VisualWakeWords`    person or not          [96, 96, 3]    [2]    7,489,664       216,322
    `Autoencoder`        anomaly detection      [640]          [640]    264,192       267,928

As in the reference, convolutions have a bias besides that of BatchNorm; BatchNorm's running
statistics are not among the parameters. All give probabilities but the autoencoder, whose squared
error is the anomaly score.
"""

import functools

import jax
from flax import linen as nn

from experiments.models.layers import ConvBatchNorm, global_average
from experiments.models.mobilenet import MobileNetV1

EPSILON = 1e-3  # of BatchNorm, the default of Keras

_unit = functools.partial(ConvBatchNorm, use_bias=True, padding="SAME", epsilon=EPSILON)


class ResNet8(nn.Module):
    """Images, float32 [B, 32, 32, 3], 0 to 255, to probabilities [B, 10]: CIFAR-10.

    Attributes:
      filters: channels of the first stage, which each further stage doubles; 16 in the network
        of the benchmark, pretrainedResnet_quant.tflite.
    """

    filters: int = 16

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(_unit(self.filters, name="stem")(x))
        for stage in range(3):
            features, stride = self.filters * 2**stage, 2 if stage > 0 else 1
            y = nn.relu(_unit(features, stride=stride, name=f"layer{stage + 1}_unit1")(x))
            y = _unit(features, name=f"layer{stage + 1}_unit2")(y)
            if stage > 0:  # without BatchNorm
                x = nn.Conv(features, (1, 1), strides=2, name=f"layer{stage + 1}_shortcut")(x)
            x = nn.relu(x + y)
        return nn.softmax(nn.Dense(10, name="linear")(global_average(x)))


class DsCnn(nn.Module):
    """Cepstral coefficients, float32 [B, 49, 10, 1], to probabilities [B, 12]: Speech Commands.

    Zhang et al., Hello Edge: Keyword Spotting on Microcontrollers (2017),
    https://arxiv.org/abs/1711.07128.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(_unit(64, kernel=(10, 4), stride=2, name="stem")(x))
        for index in range(4):
            x = nn.relu(_unit(64, groups=64, name=f"depthwise{index}")(x))
            x = nn.relu(_unit(64, kernel=1, name=f"pointwise{index}")(x))
        return nn.softmax(nn.Dense(12, name="linear")(global_average(x)))


class VisualWakeWords(nn.Module):
    """Images, float32 [B, 96, 96, 3], 0 to 1, to probabilities [B, 2]: is there a person?"""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        network = MobileNetV1(width=0.25, num_classes=2, use_bias=True, name="mobilenet")
        return nn.softmax(network(x))


class Autoencoder(nn.Module):
    """Five frames of 128 mel bands, float32 [B, 640], to their reconstruction: ToyADMOS, cars."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inputs = x.shape[-1]
        for index, features in enumerate((128, 128, 128, 128, 8, 128, 128, 128, 128)):
            x = nn.Dense(features, name=f"dense{index}")(x)
            norm = nn.BatchNorm(use_running_average=True, epsilon=EPSILON, name=f"bn{index}")
            x = nn.relu(norm(x))
        return nn.Dense(inputs, name="linear")(x)
