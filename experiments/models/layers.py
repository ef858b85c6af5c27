"""The unit of the convolutional networks: a convolution and BatchNorm in inference."""

import jax
from flax import linen as nn


class ConvBatchNorm(nn.Module):
    """Convolution `conv`, then BatchNorm `bn` with running statistics; no activation.

    Maps [B, H, W, C] to [B, ceil(H / stride), ceil(W / stride), features].

    Attributes:
      features: output channels.
      kernel: size of the kernel, [k, k] or [kh, kw].
      stride: of both spatial axes.
      groups: input channels are split into so many groups; as many as channels: depthwise.
      use_bias: whether the convolution has a bias besides that of BatchNorm.
      padding: "SYMMETRIC", k // 2 on each side, as PyTorch networks have it; or "SAME", as
        TensorFlow has it, where an even stride pads less before than after.
      epsilon: of BatchNorm.
    """

    features: int
    kernel: int | tuple[int, int] = 3
    stride: int = 1
    groups: int = 1
    use_bias: bool = False
    padding: str = "SYMMETRIC"
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = (self.kernel, self.kernel) if isinstance(self.kernel, int) else self.kernel
        symmetric = tuple((k // 2, k // 2) for k in kernel)
        x = nn.Conv(
            self.features,
            kernel_size=kernel,
            strides=self.stride,
            padding=symmetric if self.padding == "SYMMETRIC" else self.padding,
            feature_group_count=self.groups,
            use_bias=self.use_bias,
            name="conv",
        )(x)
        return nn.BatchNorm(use_running_average=True, epsilon=self.epsilon, name="bn")(x)


def global_average(x: jax.Array) -> jax.Array:
    """The mean over the image: [B, H, W, C] to [B, C]."""
    return x.mean(axis=(1, 2))
