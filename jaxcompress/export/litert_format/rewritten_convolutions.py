"""Convolutions as LiteRT's converter writes them right: no holes in the input, no cropping.

A convolution with a dilated input (the transposed convolutions of Flax, Haiku and PyTorch) is the
same convolution of an input with zeros between its numbers. The converter guesses a TRANSPOSE_CONV
or a RESIZE_BILINEAR from strides and padding, and guesses wrong for many. So the zeros are written
here, by operations that all its runtimes have in integers too: per axis the numbers become rows of
one, every row is padded to the stride, and the rows are joined; one PAD (and SLICE, where padding
is negative) does the ends. The kernel then runs over an input that is larger by the strides.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

Remark = Callable[[Array], Array]
"""Puts a result of moved numbers on the grid that its operand lies on; or the identity."""


def padded(x: Array, config: Sequence[tuple[int, int, int]], remark: Remark) -> Array:
    """`lax.pad(x, 0, config)` in RESHAPE, PAD and SLICE without holes.

    Args:
      x: floating point, [...].
      config: (low, high, interior) of every axis, low and high negative where x is cropped.
      remark: of x.

    >>> print(padded(jnp.arange(1.0, 4.0), [(1, 0, 2)], lambda x: x))
    [0. 1. 0. 0. 2. 0. 0. 3.]
    """
    ends = []
    for axis, (low, high, interior) in enumerate(config):
        holes = interior if x.shape[axis] else 0
        if holes:
            x = _spread(x, axis, holes, remark)
        # Every number brought its holes along, the last one too.
        ends.append((low, high - holes, 0))
    if any(low or high for low, high, _ in ends):
        x = remark(lax.pad(x, jnp.zeros((), x.dtype), ends))
    return x


def _spread(x: Array, axis: int, holes: int, remark: Remark) -> Array:
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    rows = remark(x.reshape(-1, 1, math.prod(after)))
    rows = lax.pad(rows, jnp.zeros((), x.dtype), [(0, 0, 0), (0, holes, 0), (0, 0, 0)])
    return remark(remark(rows).reshape(*before, x.shape[axis] * (holes + 1), *after))


def simpler(params: dict[str, Any], x: Array, remark: Remark) -> tuple[dict[str, Any], Array]:
    """The parameters and the input of an equal convolution that the converter writes right.

    Args:
      params: of a `conv_general_dilated` equation.
      x: its input.
      remark: of x.
    """
    numbers, ends = params["dimension_numbers"].lhs_spec, params["padding"]
    if params["batch_group_count"] > 1:
        return simpler(*_groups_of_features(params, x, remark), remark)
    if set(params["lhs_dilation"]) == {1} and not any(n < 0 for pair in ends for n in pair):
        return params, x
    config = [(0, 0, 0)] * x.ndim
    for axis, pair, step in zip(numbers[2:], ends, params["lhs_dilation"], strict=True):
        config[axis] = (*pair, step - 1)
    none = {"padding": ((0, 0),) * len(ends), "lhs_dilation": (1,) * len(ends)}
    return params | none, padded(x, config, remark)


def _groups_of_features(
    params: dict[str, Any], x: Array, remark: Remark
) -> tuple[dict[str, Any], Array]:
    # Group i of the batch meets group i of the kernels: as groups of features, side by side.
    count, numbers = params["batch_group_count"], params["dimension_numbers"].lhs_spec
    batch, feature = numbers[:2]
    size = x.shape[batch] // count
    x = x.reshape(*x.shape[:batch], count, size, *x.shape[batch + 1 :])
    x = jnp.moveaxis(x, batch, feature)
    shape = [*x.shape[:feature], -1, *x.shape[feature + 2 :]]
    return params | {"batch_group_count": 1, "feature_group_count": count}, remark(x.reshape(shape))


def in_two_dimensions(params: dict[str, Any]) -> tuple[dict[str, Any], tuple[int, int, int]]:
    """Of a convolution along one axis: the same along two, the second of size 1.

    Kernels for dynamic ranges have no other.

    Returns:
      The parameters; where input, kernel and result have the second axis: behind the first.
    """
    specs = list(params["dimension_numbers"])
    places = tuple(spec[2] + 1 for spec in specs)
    moved = lambda axis, place: axis + (axis >= place)
    wide = [(*(moved(axis, p) for axis in s), p) for s, p in zip(specs, places, strict=True)]
    more = {
        "dimension_numbers": lax.ConvDimensionNumbers(*wide),
        "padding": (*params["padding"], (0, 0)),
    }
    once = ("window_strides", "lhs_dilation", "rhs_dilation")
    return params | more | {key: (*params[key], 1) for key in once}, places


def convolved(params: dict[str, Any], x: Array, w: Array) -> Array:
    """The convolution of these parameters."""
    return lax.conv_general_dilated(
        x, w, params["window_strides"], params["padding"], params["lhs_dilation"],
        params["rhs_dilation"], params["dimension_numbers"],
        feature_group_count=params["feature_group_count"],
        batch_group_count=params["batch_group_count"], precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )  # fmt: skip
