"""AdaRound: learns for every weight whether it is rounded down or up, by the error of the outputs.

Nagel et al. 2020, Up or Down? Adaptive Rounding for Post-Training Quantization, arXiv 2004.10568.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from jaxcompress.core.compressor import CompressState
from jaxcompress.core.sharding.meshes import on_any_mesh
from jaxcompress.formats.integers import Integer
from jaxcompress.graph.layers.matrices import Layer
from jaxcompress.graph.layers.statistics import Moments
from jaxcompress.quantize.ptq.driver import Found, Inputs, Progress, drive, matrices
from jaxcompress.quantize.ptq.gptq_rounding import Problem
from jaxcompress.quantize.ptq.gptq_sweep import loss_of
from jaxcompress.quantize.ptq.leaf_specs import Rules, Spec, check_rules

_ZETA, _GAMMA = 1.1, -0.1  # the rectified sigmoid is stretched to (gamma, zeta), section 3.2
_matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


@on_any_mesh
def adaround(
    apply_fn: Callable[..., Any],
    params: Any,
    data: Iterable[tuple[Any, ...]],
    spec: Rules,
    *,
    steps: int = 2000,
    learning_rate: float = 0.02,
    regularization: float = 10.0,
    beta: tuple[float, float] = (20.0, 2.0),
    warmup: float = 0.2,
    inputs: Inputs = "float",
    grids: Mapping[str, Any] | None = None,
    layer_at_a_time: bool = False,
    progress: Progress = iter,
) -> tuple[Any, CompressState]:
    """Weights rounded down or up so that the outputs of every layer change least on the data.

    Minimizes tr(D^T H D) / L + regularization sum(1 - |2 h - 1|^beta) over h = h(V) in [0, 1], with
    D = s clip(floor(w / s) + h) - w, H the mean of x x^T and L the loss of rounding to nearest per
    weight, so that the settings do not depend on scales. Adam on V; beta falls linearly after a
    share `warmup` of the steps without regularization. A column that ends up worse than rounded to
    nearest is rounded to nearest.

    Args:
      apply_fn, params, data, spec, inputs, grids, layer_at_a_time, progress: as `gptq`.
      steps: of Adam, for each layer.
      learning_rate, regularization, beta, warmup: see above.

    Returns:
      (params, state) for the `apply` and `pack` of `recipe(spec)`.

    Raises:
      TypeError: a format of `spec` that is no `formats.integer`.
      ValueError: as `gptq`.
    """
    check_rules(spec)
    for rule, entry in spec.items():
        if not isinstance(entry.format, Integer):
            raise TypeError(
                f"spec: {rule!r}: AdaRound needs uniform steps, formats.integer(bits), "
                f"got {entry.format.name!r}"
            )
    settings = {"rate": learning_rate, "weight": regularization, "warmup": warmup}
    settings = {**settings, "start": beta[0], "end": beta[1]}
    settings = {name: jnp.float32(value) for name, value in settings.items()}

    def solve(layer: Layer, leaf: Array, qparams: Any, moments: Moments, spec: Spec) -> Found:
        format, grid = Problem(layer, leaf, qparams, spec).grid()
        w = matrices(layer, leaf)
        rounded = _solve(w, moments.hessian, grid, settings, format=format, steps=steps)
        return Found(layer.put(leaf, rounded), qparams)

    return drive(
        solve,
        apply_fn,
        params,
        data,
        spec=spec,
        inputs=inputs,
        grids=grids,
        layer_at_a_time=layer_at_a_time,
        progress=progress,
    )


def rectified(v: Array) -> Array:
    """h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1), eq. 23."""
    return jnp.clip(jax.nn.sigmoid(v) * (_ZETA - _GAMMA) + _GAMMA, 0.0, 1.0)


def start(fraction: Array) -> Array:
    """V with h(V) = fraction."""
    return -jnp.log((_ZETA - _GAMMA) / (fraction - _GAMMA) - 1.0)


@functools.partial(jax.jit, static_argnames=("format", "steps"))
def _solve(w, hessian, grid, settings, *, format: Integer, steps: int) -> Array:
    low, high = (jnp.asarray(bound, jnp.float32) for bound in format.bounds)
    zero = jnp.float32(0)
    if not format.symmetric:
        zero = grid.zero_point.astype(jnp.float32)
        low, high = low - zero, high - zero
    floor = jnp.floor(w / grid.scale)
    hard = lambda up: jnp.clip(floor + up, low, high) * grid.scale
    nearest = format.fake_quant(w, grid)
    plain = _losses(nearest - w, hessian)
    level = jnp.maximum(jnp.sum(plain), jnp.finfo(jnp.float32).tiny) / w.size
    v = start(w / grid.scale - floor)
    optimizer = optax.adam(settings["rate"])

    def step(carry, i):
        v, state = carry
        done = (i / steps - settings["warmup"]) / jnp.maximum(1 - settings["warmup"], 1e-6)
        power = settings["end"] + (settings["start"] - settings["end"]) * (1 - jnp.maximum(done, 0))
        weight = jnp.where(done < 0, 0.0, settings["weight"])

        def loss(v):
            h = rectified(v)
            error = jnp.sum(_losses(hard(h) - w, hessian)) / level
            certain = jnp.abs(2 * h - 1)
            return error + weight * w.size * jnp.mean(1 - certain**power)

        gradient = jax.grad(loss)(v)
        with jax.numpy_dtype_promotion("standard"):  # Optax mixes its counter with floats
            updates, state = optimizer.update(gradient, state)
        return (v + jnp.asarray(updates), state), None

    (v, _), _ = lax.scan(step, (v, optimizer.init(v)), jnp.arange(steps, dtype=jnp.float32))
    learned = hard((rectified(v) >= 0.5).astype(jnp.float32))
    better = _losses(learned - w, hessian) <= plain
    return jnp.where(better[:, :, None], learned, nearest)


def _losses(delta: Array, hessian: Array) -> Array:
    # [S, G, N]
    return jax.vmap(jax.vmap(loss_of))(delta, hessian)
