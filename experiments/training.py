"""The training of the experiments: `jaxcompress.train.fit` on images shifted at random."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import jaxcompress as jc
from jaxcompress.train.augment import random_crop, random_flip

# Each image [H, W, C] by -1, 0 or 1 pixel in both axes, zeros moving in.
shift_augment = functools.partial(random_crop, padding=1)


def mirror_augment(key: jax.Array, images: jax.Array) -> jax.Array:
    """`shift_augment`, and half of the images mirrored."""
    shift_key, mirror_key = jax.random.split(key)
    return random_flip(mirror_key, shift_augment(shift_key, images))


def fit(
    step: Callable[..., tuple[Any, dict[str, jax.Array]]],
    state: Any,
    data: tuple[np.ndarray, np.ndarray],
    *,
    size: int,
    steps: int,
    seed: int = 0,
    augment: Callable[[jax.Array, jax.Array], jax.Array] = shift_augment,
    **options: Any,
) -> Any:
    """Trains on shuffled batches of `size` images and labels; `options` are those of the library.

    The keys of the augmentation are fold_in(key(seed), step), as in all results of this folder.
    """
    batches = jc.train.batches(data, size=size, seed=seed)
    root = jax.random.key(seed)
    changed = jax.jit(lambda index, images: augment(jax.random.fold_in(root, index), images))

    def batch_at(index: int) -> tuple[jax.Array, jax.Array]:
        images, labels = batches(index)
        return changed(index, images), labels

    return jc.train.fit(step, state, batch_at, steps=steps, **options)
