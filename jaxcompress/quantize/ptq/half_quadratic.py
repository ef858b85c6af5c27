"""HQQ: grids by half-quadratic splitting, from the weights alone.

Badri and Shaji 2023, Half-Quadratic Quantization of Large Machine Learning Models.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxcompress.core.compressor import CompressState
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.core.sharding.meshes import on_any_mesh
from jaxcompress.formats import Granularity
from jaxcompress.formats.exact import unit_for
from jaxcompress.formats.integers import Integer
from jaxcompress.quantize.ptq.leaf_specs import Rules, plan


@on_any_mesh
def hqq(
    apply_fn: Callable[..., Any],
    params: Any,
    data: Iterable[tuple[Any, ...]],
    spec: Rules,
    *,
    steps: int = 20,
    norm: float = 0.7,
    beta: float = 10.0,
    growth: float = 1.01,
) -> tuple[Any, CompressState]:
    """Scales and zero points of least sum |w - Q(w)|^norm: most errors become small.

    Alternates w_e = shrink(w - Q(w)) with fits of the grid to w - w_e: s by least squares and
    z = mean(q - (w - w_e) / s). shrink(x) = sign(x) max(|x| - |x|^(norm - 1) / beta, 0) is taken in
    steps, so that the settings do not depend on the size of the weights. The published method keeps
    s and stores fractions of z; here zero is a number of the grid and z an integer, which leaves
    little to gain by z alone. The best grid is kept, at worst the first.

    Args:
      apply_fn, params, data, spec: as `gptq`; the data only name the layers.
      steps, norm, beta, growth: iterations, p, and beta with its factor for each of them.

    Returns:
      (params, state): the parameters as they were, on new grids.

    Raises:
      TypeError: a format of `spec` that is no `formats.integer`.
      ValueError: as `spec.plan`.
    """
    planned = plan(apply_fn, params, data, spec)
    for path, entry in planned.spec.items():
        if not isinstance(entry.format, Integer):
            raise TypeError(
                f"{path}: HQQ fits scales and zero points of formats.integer(bits), "
                f"got {entry.format.name!r}"
            )
    state = planned.recipe.init(params)
    found = {}
    for path, leaf in leaves_with_paths(params):
        if path in planned.spec:
            entry, qparams = planned.spec[path], planned.qparams(state, path)
            how = {"format": entry.format, "where": entry.where, "steps": steps}
            found[path] = _half_quadratic(leaf, qparams, norm, beta, growth, **how)
    return params, planned.with_qparams(state, found)


@functools.partial(jax.jit, static_argnames=("format", "where", "steps"))
def _half_quadratic(
    w: Array, qparams: Any, norm, beta, growth, *, format: Integer, where: Granularity, steps: int
) -> Any:
    """Scales and zero points of the shapes of the format's arrays."""
    low, high = (jnp.float32(bound) for bound in format.bounds)
    axes, valid = where.reduce_axes(w.shape), where.valid(w.shape)
    x = where.split(w).astype(jnp.float32)
    # In units of a power of two: sums of the largest numbers overflow.
    up, down = unit_for(jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0.0))
    x = x * up
    valid = jnp.ones((1,) * x.ndim, bool) if valid is None else valid
    total = lambda v: jnp.sum(jnp.where(valid, v, 0.0), axis=axes, keepdims=True)
    count = total(jnp.ones_like(x))
    tiny = jnp.finfo(jnp.float32).tiny

    def levels(scale, zero):  # q - z
        return jnp.clip(jnp.round(x / scale) + jnp.round(zero), low, high) - jnp.round(zero)

    def loss(scale, zero):
        return total(jnp.abs(x - scale * levels(scale, zero)) ** norm)

    def step(i, carry):
        scale, zero, best, least = carry
        # In steps. What is below its threshold becomes zero, so 0 ** (norm - 1) is no matter.
        off = x / scale - levels(scale, zero)
        threshold = jnp.maximum(jnp.abs(off), tiny) ** (norm - 1) / (beta * growth**i)
        target = x - scale * jnp.sign(off) * jnp.maximum(jnp.abs(off) - threshold, 0.0)
        codes = levels(scale, zero)
        fitted = total(target * codes) / jnp.maximum(total(codes**2), tiny)
        scale = jnp.where(fitted > tiny, fitted, scale)
        if not format.symmetric:
            zero = jnp.clip(jnp.round(zero) + total(codes - target / scale) / count, low, high)
        now = loss(scale, zero)
        better = now < least
        best = tuple(jnp.where(better, a, b) for a, b in zip((scale, zero), best, strict=True))
        return scale, zero, best, jnp.where(better, now, least)

    symmetric = isinstance(qparams.zero_point, tuple)
    scale = qparams.scale * up
    zero = jnp.zeros_like(scale) if symmetric else qparams.zero_point.astype(jnp.float32)
    start = (scale, zero, (scale, zero), loss(scale, zero))
    _, _, (scale, zero), _ = lax.fori_loop(0, steps, step, start)
    return qparams._replace(
        scale=scale * down, zero_point=() if symmetric else jnp.round(zero).astype(jnp.uint8)
    )
