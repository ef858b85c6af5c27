"""MobileNetV1 and V2, in inference.

Howard et al., MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications
(2017), table 1, https://arxiv.org/abs/1704.04861.
Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks (2018), table 2,
https://arxiv.org/abs/1801.04381.
"""

import functools
from collections.abc import Callable

import jax
from flax import linen as nn

from experiments.models.layers import ConvBatchNorm, global_average

# (features, stride) of each pair of a depthwise and a 1x1 convolution
V1_PAIRS = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *((512, 1),) * 5,
    *((1024, 2), (1024, 1)),
)
# (expansion, features, blocks, stride of the first block)
V2_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class MobileNetV1(nn.Module):
    """MobileNetV1 for images [B, H, W, 3] (already normalised), giving logits [B, num_classes].

    Attributes:
      width: multiplies the number of channels of every layer.
      num_classes: number of logits.
      use_bias: whether the convolutions have biases besides those of BatchNorm.
    """

    width: float = 1.0
    num_classes: int = 1000
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        unit = functools.partial(
            ConvBatchNorm, use_bias=self.use_bias, padding="SAME", epsilon=1e-3
        )
        x = nn.relu(unit(int(32 * self.width), stride=2, name="stem")(x))
        for index, (features, stride) in enumerate(V1_PAIRS):
            channels = x.shape[-1]
            name = f"depthwise{index}"
            x = nn.relu(unit(channels, stride=stride, groups=channels, name=name)(x))
            x = nn.relu(unit(int(features * self.width), kernel=1, name=f"pointwise{index}")(x))
        return nn.Dense(self.num_classes, name="linear")(global_average(x))


class InvertedResidual(nn.Module):
    """1x1 convolution up, depthwise convolution, 1x1 convolution down, shortcut if shapes agree.

    Attributes:
      features: output channels.
      stride: of the depthwise convolution.
      expansion: channels in between per input channel; with 1 the first convolution is left out.
      kernel: size of the depthwise kernel.
      activation: after the first two convolutions; there is none after the last.
      squeeze: input channels per unit of the squeeze-and-excitation after the depthwise
        convolution; 0 for none.
    """

    features: int
    stride: int
    expansion: int
    kernel: int = 3
    activation: Callable[[jax.Array], jax.Array] = nn.relu6
    squeeze: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        wide, y = self.expansion * x.shape[-1], x
        if self.expansion > 1:
            y = self.activation(ConvBatchNorm(wide, kernel=1, name="expand")(y))
        depthwise = ConvBatchNorm(
            wide, kernel=self.kernel, stride=self.stride, groups=wide, name="depthwise"
        )
        y = self.activation(depthwise(y))
        if self.squeeze:
            y = self._excite(y, units=x.shape[-1] // self.squeeze)
        y = ConvBatchNorm(self.features, kernel=1, name="project")(y)
        return x + y if x.shape == y.shape else y

    def _excite(self, x: jax.Array, *, units: int) -> jax.Array:
        """Hu et al., Squeeze-and-Excitation Networks (2018), https://arxiv.org/abs/1709.01507."""
        scale = x.mean(axis=(1, 2), keepdims=True)  # [B, 1, 1, C]
        scale = self.activation(nn.Dense(units, name="squeeze_down")(scale))
        return x * nn.sigmoid(nn.Dense(x.shape[-1], name="squeeze_up")(scale))


class MobileNetV2(nn.Module):
    """MobileNetV2 for images [B, H, W, 3] (already normalised), giving logits [B, num_classes]."""

    num_classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu6(ConvBatchNorm(32, stride=2, name="stem")(x))
        for stage, (expansion, features, blocks, first_stride) in enumerate(V2_STAGES):
            for index in range(blocks):
                stride = first_stride if index == 0 else 1
                name = f"layer{stage + 1}_{index}"
                x = InvertedResidual(features, stride, expansion, name=name)(x)
        x = nn.relu6(ConvBatchNorm(1280, kernel=1, name="head")(x))
        return nn.Dense(self.num_classes, name="linear")(global_average(x))
