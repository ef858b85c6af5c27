"""BatchNorm moved into the weights in front of it, by the parameters alone."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

from jaxcompress.graph.absorb import rescale
from jaxcompress.graph.capture import check_batches
from jaxcompress.graph.normalizations import normalizations
from jaxcompress.quantize.ptq.spec import Rules, plan


def fold_batch_norm(
    apply_fn: Callable[..., Any],
    params: Any,
    data: Iterable[tuple[Any, ...]],
    spec: Rules | None = None,
) -> tuple[Any, Any]:
    """Multiplies every normalization's factor into the contraction in front of it.

    Of y = (w^T x + b - mean) A + bias with A = scale / sqrt(var + eps) the parameters become
    w A, b A, mean A and scale / A: the same function of the same tree, but what multiplies the
    activations is 1, and rounding w rounds the weights that count. Any function of parameters that
    multiplies a contraction's channels is folded so: BatchNorm in inference in all its forms, a
    layer's scale. A channel whose factor is 0 stays as it is.

    Args:
      apply_fn: pure, (params, *inputs) -> outputs, in inference.
      params: all that it takes, running statistics included.
      data: batches, tuples of inputs; the first one's shapes are used.
      spec: how the folded weights are stored; None: nothing is quantized, the state is ().

    Returns:
      (params, state).

    Warns of normalizations that have no scale to take the factor up, or whose factor cannot move.

    Raises:
      ValueError: no data; as `spec.plan`.

    Source: Jacob et al. 2018, arXiv 1712.05877, section 3.2.

    >>> import jax.numpy as jnp
    >>> def fn(p, x):
    ...     return (x @ p["w"] - p["mean"][None]) * (p["scale"] / 2)[None]
    >>> params = {"w": jnp.ones((1, 2)), "mean": jnp.ones(2), "scale": jnp.array([6.0, 8.0])}
    >>> folded, _ = fold_batch_norm(fn, params, [(jnp.ones((1, 1)),)])
    >>> print(folded["w"][0], folded["mean"], folded["scale"])
    [3. 4.] [3. 4.] [2. 2.]
    """
    batches = check_batches(data)
    found, refused = normalizations(apply_fn, params, *batches[0])
    for absorption, factor in found:
        params = rescale(params, absorption, factor(params))
    if refused:
        reasons = "; ".join(f"{name}: {why}" for name, why in refused.items())
        warnings.warn(f"not folded: {reasons}", stacklevel=2)
    if spec is None:
        return params, ()
    return params, plan(apply_fn, params, batches, spec).recipe.init(params)
