"""Sensitivities without an evaluation per option: curvature of the loss times squared errors."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxcompress.core.compressor import Compressor, is_float_array
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.graph.layers.statistics import each_batch
from jaxcompress.prune.saliency.score_trees import float_leaves
from jaxcompress.prune.saliency.second_order import fisher_diagonal
from jaxcompress.search.sensitivities.measured import Sensitivity, Values

Loss = Callable[..., Array]


def hessian_trace(
    loss_fn: Loss,
    params: Any,
    batches: Iterable[tuple[Any, ...]],
    *,
    key: Array,
    samples: int = 8,
) -> dict[str, float]:
    """Trace of the Hessian of the mean loss for every floating leaf, by its path.

    tr(H_l) = E[v_l . (H v)_l], v Rademacher over all leaves: one Hessian-vector product per sample
    and batch serves all of them.

    Args:
      loss_fn: (params, *batch) -> scalar, twice differentiable.
      params: any tree.
      batches: what loss_fn takes after the params; batches of equal size weigh alike.
      key: random key.
      samples: vectors per batch.

    Raises:
      ValueError: no batch, or samples below 1.

    Source: Hutchinson 1990; Dong et al. 2020, HAWQ-V2, arXiv 1911.03852, section 3.2.

    >>> w = {"w": jnp.array([1.0, 2.0])}
    >>> quadratic = lambda w, a: jnp.sum(a * w["w"] ** 2)
    >>> hessian_trace(quadratic, w, [(jnp.array([3.0, 4.0]),)], key=jax.random.key(0), samples=1)
    {'w': 14.0}
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    total: dict[str, float] = {}
    count = 0
    for batch in each_batch("batches", batches):
        keys = jax.random.split(jax.random.fold_in(key, count), samples)
        for path, value in jax.device_get(_traces(params, batch, keys, loss_fn=loss_fn)).items():
            total[path] = total.get(path, 0.0) + float(value)
        count += 1
    return {path: value / count for path, value in total.items()}


@functools.partial(jax.jit, static_argnames="loss_fn")
def _traces(params: Any, batch: Any, keys: Array, *, loss_fn: Loss) -> dict[str, Array]:
    floats, join = float_leaves(params)
    paths = [path for path, leaf in leaves_with_paths(params) if is_float_array(leaf)]
    gradient = jax.grad(lambda floats: loss_fn(join(floats), *batch))

    def one(key: Array) -> list[Array]:
        draws = jax.random.split(key, len(floats))
        v = [jax.random.rademacher(k, w.shape, w.dtype) for k, w in zip(draws, floats, strict=True)]
        _, product = jax.jvp(gradient, (floats,), (v,))
        dot = lambda a, b: jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32))
        return [dot(a, b) for a, b in zip(v, product, strict=True)]

    means = [jnp.mean(values) for values in lax.map(one, keys)]
    return dict(zip(paths, means, strict=True))


def curvature(
    loss_fn: Loss,
    params: Any,
    batches: Iterable[tuple[Any, ...]],
    *,
    weights: Mapping[str, Compressor],
    key: Array,
    samples: int = 8,
    min_ndim: int = 2,
) -> Sensitivity:
    """Estimates of the increase of the loss by every leaf and option, from one pass over the data.

    Metrics, all 0 for the network as it was (dW what the option changes):
      fisher         1/2 sum_i F_i dW_i^2, F the diagonal of the empirical Fisher information
      hessian_trace  1/2 tr(H_l) / n_l ||dW||^2, HAWQ-V2
      squared_error  ||dW||^2, without data

    Args:
      loss_fn, params, batches, key, samples: as `hessian_trace`; the loss is a mean over examples.
      weights: {name of the option: Compressor}.
      min_ndim: leaves with fewer axes are left out.

    Raises:
      ValueError: as `hessian_trace` and `prune.fisher_diagonal`; no options.

    Source: Dong et al. 2020, HAWQ-V2, arXiv 1911.03852, equation 9; Theis et al. 2018, arXiv
    1801.05787, for the Fisher information.
    """
    if not weights:
        raise ValueError("weights: give at least one option")
    listed = list(each_batch("batches", batches))
    fisher = dict(leaves_with_paths(fisher_diagonal(loss_fn, params, listed)))
    trace = hessian_trace(loss_fn, params, listed, key=key, samples=samples)
    found: Values = {}
    for name, recipe in weights.items():
        view = recipe.apply(params, recipe.update(params, recipe.init(params)))
        pairs = zip(leaves_with_paths(params), leaves_with_paths(view), strict=True)
        for (path, before), (_, after) in pairs:
            if not is_float_array(before) or before.ndim < min_ndim or not before.size:
                continue
            square = jnp.square(after.astype(jnp.float32) - before.astype(jnp.float32))
            total = float(jnp.sum(square))
            found.setdefault(path, {})[name] = {
                "fisher": 0.5 * float(jnp.sum(fisher[path] * square)),
                "hessian_trace": 0.5 * trace[path] / math.prod(before.shape) * total,
                "squared_error": total,
            }
    return Sensitivity(dict.fromkeys(("fisher", "hessian_trace", "squared_error"), 0.0), found, {})
