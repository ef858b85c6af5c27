"""What losses on features share: float32 pairs, pooling, lengths with bounded gradients."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcompress.distill.masks import reduced

# At the full precision of float32 also where the hardware would rather multiply in fewer bits.
matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def float32_pair(student: Array, teacher: Array) -> tuple[Array, Array]:
    """Both in float32, the teacher without gradient."""
    return student.astype(jnp.float32), jax.lax.stop_gradient(teacher).astype(jnp.float32)


def check_same_shape(student: Array, teacher: Array, axes: str, *, ndim: int | None = None) -> None:
    """Raises ValueError unless both have one shape, not empty, of at least (or exactly) `ndim`."""
    wrong_ndim = ndim is not None and student.ndim != ndim or student.ndim < 2
    if student.shape != teacher.shape or wrong_ndim or 0 in student.shape:
        raise ValueError(
            f"student and teacher must have one shape {axes}, got {student.shape} and "
            f"{teacher.shape}; a projector (linear_projector, conv_projector) gives the student "
            "the teacher's channels"
        )


def check_same_examples(student: Array, teacher: Array, *, at_least: int = 1) -> None:
    """Raises ValueError unless both are [N, ...] with the same N of at least `at_least`."""
    pair = (student.shape, teacher.shape)
    if min(map(len, pair)) < 2 or pair[0][0] != pair[1][0] or any(0 in shape for shape in pair):
        raise ValueError(
            f"student and teacher must be [N, ...] with the same N, got {pair[0]} and {pair[1]}"
        )
    if pair[0][0] < at_least:
        raise ValueError(f"relations need at least {at_least} examples, got {pair[0][0]}")


def over_examples(values: Array, per_example: bool, keep: Array | None = None) -> Array:
    """The mean over all axes but the first; the mean of these unless `per_example`.

    Where the mask `keep` [N] is False an example has 0 and does not count.
    """
    return reduced(jnp.mean(values.reshape(values.shape[0], -1), axis=1), per_example, keep)


def masked_mean(values: Array, mask: Array, per_example: bool) -> Array:
    """The mean where `mask`, of each example or of all; 0 where nothing is left."""
    axes = tuple(range(1, values.ndim)) if per_example else None
    counts = jnp.sum(jnp.broadcast_to(mask, values.shape), axis=axes, dtype=jnp.float32)
    return jnp.sum(jnp.where(mask, values, 0.0), axis=axes) / jnp.maximum(counts, 1.0)


def norm(x: Array) -> Array:
    """The length of the rows of [..., D], [...]; its gradient at 0 is 0."""
    squares = jnp.sum(x * x, axis=-1)
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1.0)), 0.0)


def unit(x: Array, floor: float | Array) -> Array:
    """x / max(|x|, floor) of the rows of [..., D]: no gradient is larger than 1 / floor."""
    return x / jnp.maximum(norm(x), floor)[..., None]


@functools.cache
def _windows(size: int, bins: int) -> np.ndarray:
    # Row i averages floor(i size / bins) to ceil((i + 1) size / bins), its end excluded.
    weights = np.zeros((bins, size), np.float32)
    for i in range(bins):
        start, end = i * size // bins, math.ceil((i + 1) * size / bins)
        weights[i, start:end] = 1 / (end - start)
    return weights


def pool_to(x: Array, spatial: tuple[int, ...]) -> Array:
    """[N, ..., C] averaged to another spatial size, over windows that differ where they must."""
    for axis, bins in enumerate(spatial, 1):
        if x.shape[axis] != bins:
            weights = jnp.asarray(_windows(x.shape[axis], bins), x.dtype)
            x = jnp.moveaxis(matmul(jnp.moveaxis(x, axis, -1), weights.T), -1, axis)
    return x


def pool_to_smaller(student: Array, teacher: Array) -> tuple[Array, Array]:
    """Both [N, ..., C], each spatial axis averaged to the smaller of the two.

    Raises:
      ValueError: other numbers of axes or of examples.
    """
    s, t = student.shape, teacher.shape
    if len(s) != len(t) or len(s) < 2 or s[0] != t[0] or 0 in s + t:
        raise ValueError(
            f"student and teacher must be [N, ..., C] with the same N and axes, got {s} and {t}"
        )
    spatial = tuple(map(min, s[1:-1], t[1:-1]))
    return pool_to(student, spatial), pool_to(teacher, spatial)
