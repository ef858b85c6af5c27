"""Rounding to nearest, with or without clipped ranges: what all else is compared with."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from jaxcompress.core.compressor import CompressState
from jaxcompress.core.sharding.meshes import on_any_mesh
from jaxcompress.quantize.ptq.leaf_specs import Rules, plan
from jaxcompress.quantize.ranges.clipping import mse


@on_any_mesh
def round_to_nearest(
    apply_fn: Callable[..., Any], params: Any, data: Iterable[tuple[Any, ...]], spec: Rules
) -> tuple[Any, CompressState]:
    """The weights as they are, on grids that their ranges place.

    Args:
      apply_fn, params, data, spec: as `gptq`; the data only name the layers.

    Returns:
      (params, state) for the `apply` and `pack` of `recipe(spec)`.

    Raises:
      ValueError: as `spec.plan`.
    """
    return params, plan(apply_fn, params, data, spec).recipe.init(params)


@on_any_mesh
def mse_clip(
    apply_fn: Callable[..., Any], params: Any, data: Iterable[tuple[Any, ...]], spec: Rules
) -> tuple[Any, CompressState]:
    """Rounding to nearest, with the ranges of least squared error (`quantize.mse`)."""
    clipped = {rule: dataclasses.replace(entry, calibrate=mse()) for rule, entry in spec.items()}
    return round_to_nearest(apply_fn, params, data, clipped)
