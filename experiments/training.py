"""A small training loop for in-memory data sets: epochs of shuffled batches through one step."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np


def batches(
    images: np.ndarray, labels: np.ndarray, *, size: int, epochs: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Shuffled batches of one size, epoch after epoch; an epoch's rest is left out.

    >>> x, y = np.arange(5.0), np.arange(5)
    >>> [len(a) for a, _ in batches(x, y, size=2, epochs=2, seed=0)]
    [2, 2, 2, 2]
    """
    for epoch in range(epochs):
        order = np.random.default_rng((seed, epoch)).permutation(len(images))
        for start in range(0, len(images) - size + 1, size):
            rows = order[start : start + size]
            yield images[rows], labels[rows]


def shift_augment(key: jax.Array, images: jax.Array) -> jax.Array:
    """Shifts each image [H, W, C] of a batch by -1, 0 or 1 pixel in both axes, zeros moving in."""
    height, width = images.shape[1:3]
    padded = jax.numpy.pad(images, [(0, 0), (1, 1), (1, 1), (0, 0)])
    offsets = jax.random.randint(key, (len(images), 2), 0, 3)

    def crop(image, offset):
        start = (offset[0], offset[1], jax.numpy.zeros((), offset.dtype))
        return jax.lax.dynamic_slice(image, start, (height, width, image.shape[-1]))

    return jax.vmap(crop)(padded, offsets)


def mirror_augment(key: jax.Array, images: jax.Array) -> jax.Array:
    """`shift_augment`, and half of the images mirrored."""
    shift_key, mirror_key = jax.random.split(key)
    mirrored = jax.random.bernoulli(mirror_key, shape=(len(images), 1, 1, 1))
    shifted = shift_augment(shift_key, images)
    return jax.numpy.where(mirrored, shifted[:, :, ::-1], shifted)


def fit(
    step: Callable[..., tuple[Any, dict[str, jax.Array]]],
    state: Any,
    data: Iterable[tuple[np.ndarray, np.ndarray]],
    *,
    teacher_params: Any = (),
    seed: int = 0,
    on_step: Callable[[int, Any], None] | None = None,
    augment: Callable[[jax.Array, jax.Array], jax.Array] = shift_augment,
) -> Any:
    """Runs the step over all batches, images shifted at random; `on_step` sees (index, state)."""
    augment = jax.jit(augment)
    root = jax.random.key(seed)
    for index, (images, labels) in enumerate(data):
        images = augment(jax.random.fold_in(root, index), images)
        state, _ = step(state, teacher_params, (images, labels))
        if on_step is not None:
            on_step(index, state)
    return state
