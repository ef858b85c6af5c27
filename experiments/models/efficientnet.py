"""EfficientNet-B0, in inference.

Tan, Le, EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks (2019), table 1,
https://arxiv.org/abs/1905.11946. The blocks are those of MobileNetV2 with squeeze-and-excitation
(one unit per four input channels) and swish.
"""

import jax
from flax import linen as nn

from experiments.models.layers import ConvBatchNorm, global_average
from experiments.models.mobilenet import InvertedResidual

# (expansion, features, blocks, stride of the first block, kernel)
B0_STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)


class EfficientNetB0(nn.Module):
    """EfficientNet-B0 for images [B, H, W, 3] (normalised), giving logits [B, num_classes]."""

    num_classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.swish(ConvBatchNorm(32, stride=2, name="stem")(x))
        for stage, (expansion, features, blocks, first_stride, kernel) in enumerate(B0_STAGES):
            for index in range(blocks):
                x = InvertedResidual(
                    features,
                    stride=first_stride if index == 0 else 1,
                    expansion=expansion,
                    kernel=kernel,
                    activation=nn.swish,
                    squeeze=4,
                    name=f"layer{stage + 1}_{index}",
                )(x)
        x = nn.swish(ConvBatchNorm(1280, kernel=1, name="head")(x))
        return nn.Dense(self.num_classes, name="linear")(global_average(x))
