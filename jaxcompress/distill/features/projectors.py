"""Maps from the student's features to the teacher's: trained with it, dropped after training."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxcompress.distill.features.feature_arrays import matmul


class Projector(NamedTuple):
    """A pure pair: init(key, features) -> params, apply(params, features) -> projected.

    `init` looks at the shape of the features only: `jax.ShapeDtypeStruct` will do. The params are
    a float32 pytree that Optax trains beside the student's; keep them in `TrainState.distill`.
    """

    init: Callable[[Array, Any], Any]
    apply: Callable[[Any, Array], Array]


def linear_projector(width: int) -> Projector:
    """x W + b on the last axis: a dense layer on tokens, a 1x1 convolution on maps.

    Args:
      width: channels of the teacher.

    Features are [..., channels], any float dtype; the result is [..., width], float32.

    Raises:
      ValueError: `width` is below 1; (at apply) features of other channels than at init.

    Source: the embeddings of Jiao et al. 2020, TinyBERT, arXiv 1909.10351, section 3.

    >>> projector = linear_projector(4)
    >>> params = projector.init(jax.random.key(0), jnp.ones((2, 3)))
    >>> projector.apply(params, jnp.ones((2, 3))).shape
    (2, 4)
    """
    _check_width(width)

    def init(key: Array, features: Any) -> dict[str, Array]:
        kernel = jax.nn.initializers.lecun_normal()(key, (features.shape[-1], width), jnp.float32)
        return {"kernel": kernel, "bias": jnp.zeros(width, jnp.float32)}

    def apply(params: dict[str, Array], x: Array) -> Array:
        _check_channels(x, params["kernel"])
        y = matmul(x.astype(jnp.float32), params["kernel"])
        return y + jnp.expand_dims(params["bias"], range(y.ndim - 1))

    return Projector(init, apply)


def mlp_projector(width: int, *, hidden: int | None = None) -> Projector:
    """Three linear maps without bias, ReLU between them, on the last axis: VID's regressor.

    Args:
      width: channels of the teacher.
      hidden: channels between the maps; default `width`.

    Raises:
      ValueError: a width is below 1; (at apply) features of other channels than at init.

    Source: Ahn et al. 2019, Variational information distillation, arXiv 1904.05835.
    """
    hidden = width if hidden is None else hidden
    _check_width(min(width, hidden))

    def init(key: Array, features: Any) -> list[Array]:
        widths = (features.shape[-1], hidden, hidden, width)
        shapes = zip(widths, widths[1:], strict=False)
        he = jax.nn.initializers.he_normal()
        keys = jax.random.split(key, 3)
        return [he(k, shape, jnp.float32) for k, shape in zip(keys, shapes, strict=True)]

    def apply(params: list[Array], x: Array) -> Array:
        _check_channels(x, params[0])
        first, second, last = params
        x = jax.nn.relu(matmul(x.astype(jnp.float32), first))
        return matmul(jax.nn.relu(matmul(x, second)), last)

    return Projector(init, apply)


def conv_projector(
    channels: int,
    *,
    kernel_size: int = 1,
    strides: int = 1,
    activation: Callable[[Array], Array] | None = None,
) -> Projector:
    """Convolution, batch normalization, activation: the regressors of FitNets and of OFD.

    The normalization uses the mean and the variance of the batch, over all devices of a sharded
    one: a projector runs in training only, so that it keeps no moving averages.

    Args:
      channels: channels of the teacher.
      kernel_size: odd or even, "SAME" padding.
      strides: 2 halves the student's maps.
      activation: FitNets' regressor has `jax.nn.relu`, OFD's none.

    Features are [N, H, W, channels], any float dtype; the result is float32.

    Raises:
      ValueError: a number is below 1; (at apply) features not [N, H, W, C] or of other channels.

    Source: Romero et al. 2015, FitNets, arXiv 1412.6550, section 2.2; Heo et al. 2019, arXiv
    1904.01866, section 3.
    """
    _check_width(min(channels, kernel_size, strides))

    def init(key: Array, features: Any) -> dict[str, Array]:
        shape = (kernel_size, kernel_size, features.shape[-1], channels)
        he = jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        return {
            "kernel": he(key, shape, jnp.float32),
            "scale": jnp.ones(channels, jnp.float32),
            "bias": jnp.zeros(channels, jnp.float32),
        }

    def apply(params: dict[str, Array], x: Array) -> Array:
        if x.ndim != 4:
            raise ValueError(f"features must be [N, H, W, C], got {x.shape}")
        _check_channels(x, params["kernel"])
        y = jax.lax.conv_general_dilated(
            x.astype(jnp.float32),
            params["kernel"],
            (strides, strides),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=jax.lax.Precision.HIGHEST,
        )
        mean = jnp.mean(y, axis=(0, 1, 2), keepdims=True)
        variance = jnp.mean((y - mean) ** 2, axis=(0, 1, 2), keepdims=True)
        scale, bias = (params[name][None, None, None] for name in ("scale", "bias"))
        y = (y - mean) * jax.lax.rsqrt(variance + 1e-5) * scale + bias
        return y if activation is None else activation(y)

    return Projector(init, apply)


def _check_width(width: int) -> None:
    if width < 1:
        raise ValueError(f"widths, kernel sizes and strides must be at least 1, got {width}")


def _check_channels(x: Array, kernel: Array) -> None:
    if not x.ndim or x.shape[-1] != kernel.shape[-2]:
        raise ValueError(
            f"the projector was initialized for {kernel.shape[-2]} channels, got features {x.shape}"
        )
