"""Random changes of a batch, as functions of a key: what the loop does before both networks look.

A change is made once and its result goes to teacher and student alike. Keys come from the step
(`jaxcompress.train.batches`), so that a run that starts again sees the same images.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Number = Any  # a Python number or a traced scalar


def random_crop(
    key: jax.Array, images: jax.Array, *, padding: int, mode: str = "constant"
) -> jax.Array:
    """Pads every image by `padding` pixels on each side and cuts a window of the old size.

    Each image draws its own offset, uniform over the (2 padding + 1)^2 possible ones.

    Args:
      key: of the offsets.
      images: [B, H, W, C], any dtype, which stays.
      padding: pixels; 4 for CIFAR.
      mode: as in `jnp.pad`: "constant" is zeros, "reflect" and "edge" repeat the image.

    Raises:
      ValueError: images are not [B, H, W, C], padding is negative.

    >>> random_crop(jax.random.key(0), jnp.ones((2, 8, 8, 3)), padding=1).shape
    (2, 8, 8, 3)
    """
    _check("random_crop", images)
    if padding < 0:
        raise ValueError(f"padding must be at least 0 pixels, got {padding}")
    n, height, width, channels = images.shape
    around = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    padded = jnp.pad(images, around, mode=mode)
    offsets = jax.random.randint(key, (n, 2), 0, 2 * padding + 1)

    def crop(image, offset):
        start = (offset[0], offset[1], jnp.zeros((), offset.dtype))
        return jax.lax.dynamic_slice(image, start, (height, width, channels))

    return jax.vmap(crop)(padded, offsets)


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors left and right each image of [B, H, W, C] with probability 1/2.

    Raises:
      ValueError: images are not [B, H, W, C].
    """
    _check("random_flip", images)
    mirrored = jax.random.bernoulli(key, shape=(len(images), 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)


def mixup(
    key: jax.Array, inputs: jax.Array, labels: jax.Array, *, alpha: Number, num_classes: int
) -> tuple[jax.Array, jax.Array]:
    """Convex combinations of pairs of examples and of their one-hot labels.

    x = t x_i + (1 - t) x_j,  y = t y_i + (1 - t) y_j,  t ~ Beta(alpha, alpha), one for each pair.
    The partner j is the neighbour in the batch: batches are shuffled. `cross_entropy` takes
    the labels.

    Args:
      key: of the weights t.
      inputs: [B, ...], floating point; the result has this dtype.
      labels: [B] integers or [B, num_classes] probabilities.
      alpha: of the Beta distribution, 0.1 to 0.4 for images; 0 changes nothing. May be traced.
      num_classes: of the labels.

    Returns:
      inputs and float32 [B, num_classes] labels.

    Raises:
      TypeError: inputs are integers.

    Source: Zhang et al. 2018, mixup, arXiv 1710.09412, eq. in section 2.
    """
    if not jnp.issubdtype(inputs.dtype, jnp.floating):
        raise TypeError(f"mixup: inputs must be floating point, got {inputs.dtype}; scale first")
    if labels.ndim == 1:
        labels = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    alpha = jnp.asarray(alpha, jnp.float32)
    shape = jnp.where(alpha > 0, alpha, 1.0)
    drawn = jax.random.beta(key, shape, shape, (len(inputs),))
    t = jnp.where(alpha > 0, drawn, 1.0)

    def mix(x, dtype):
        weight = jnp.reshape(t, (-1,) + (1,) * (x.ndim - 1))
        x = x.astype(jnp.float32)
        return (weight * x + (1.0 - weight) * jnp.roll(x, 1, axis=0)).astype(dtype)

    return mix(inputs, inputs.dtype), mix(labels, jnp.float32)


def on_inputs(
    *changes: Callable[[jax.Array, jax.Array], jax.Array],
) -> Callable[[jax.Array, tuple[Any, Any]], tuple[Any, Any]]:
    """(key, (inputs, labels)) -> (inputs, labels) from changes (key, inputs) -> inputs, in order.

    >>> augment = on_inputs(lambda k, x: random_crop(k, x, padding=4), random_flip)
    >>> x, y = augment(jax.random.key(0), (jnp.ones((2, 8, 8, 3)), jnp.arange(2)))
    >>> x.shape, y.tolist()
    ((2, 8, 8, 3), [0, 1])
    """

    def augment(key, batch):
        inputs, labels = batch
        for change, part in zip(changes, jax.random.split(key, len(changes)), strict=True):
            inputs = change(part, inputs)
        return inputs, labels

    return augment


def _check(name: str, images: jax.Array) -> None:
    if images.ndim != 4:
        raise ValueError(f"{name}: images must be [B, H, W, C], got shape {images.shape}")
