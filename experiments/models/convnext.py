"""ConvNeXt, in inference.

Liu et al., A ConvNet for the 2020s (2022), https://arxiv.org/abs/2201.03545. ConvNeXt-T has
stages of (3, 3, 9, 3) blocks and (96, 192, 384, 768) channels.
"""

import jax
from flax import linen as nn

from experiments.models.layers import global_average

EPSILON = 1e-6


class Block(nn.Module):
    """Depthwise 7x7 convolution, LayerNorm, two dense layers, a scale per channel, shortcut."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        y = nn.Conv(channels, (7, 7), feature_group_count=channels, name="depthwise")(x)
        y = nn.LayerNorm(epsilon=EPSILON, name="norm")(y)
        y = nn.gelu(nn.Dense(4 * channels, name="expand")(y), approximate=False)
        y = nn.Dense(channels, name="project")(y)
        scale = self.param("scale", nn.initializers.constant(1e-6), (1, 1, 1, channels))
        return x + scale * y


class ConvNeXt(nn.Module):
    """ConvNeXt for images [B, H, W, 3] (already normalised), giving logits [B, num_classes]."""

    stages: tuple[int, ...] = (3, 3, 9, 3)
    widths: tuple[int, ...] = (96, 192, 384, 768)
    num_classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(self.widths[0], (4, 4), strides=4, padding="VALID", name="stem")(x)
        x = nn.LayerNorm(epsilon=EPSILON, name="stem_norm")(x)
        for stage, (blocks, features) in enumerate(zip(self.stages, self.widths, strict=True)):
            if stage > 0:
                x = nn.LayerNorm(epsilon=EPSILON, name=f"norm{stage + 1}")(x)
                name = f"downsample{stage + 1}"
                x = nn.Conv(features, (2, 2), strides=2, padding="VALID", name=name)(x)
            for index in range(blocks):
                x = Block(name=f"layer{stage + 1}_{index}")(x)
        x = nn.LayerNorm(epsilon=EPSILON, name="norm")(global_average(x))
        return nn.Dense(self.num_classes, name="linear")(x)
