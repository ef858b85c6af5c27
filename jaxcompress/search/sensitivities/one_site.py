"""What does one compressed site cost in accuracy? All sites and options by one program."""

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxcompress.core.sharding.meshes import on_any_mesh
from jaxcompress.formats import Format
from jaxcompress.quantize.ranges.min_max import Calibrator
from jaxcompress.search.sensitivities.evaluator import Evaluator
from jaxcompress.search.sensitivities.measured import Metric, Sensitivity


@on_any_mesh
def sensitivity(
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[tuple[Any, ...]],
    *,
    weights: Mapping[str, Any] | None = None,
    activations: Mapping[str, Format] | None = None,
    calibrate: Calibrator | None = None,
    targets: Iterable[Any] | None = None,
    metrics: Mapping[str, Metric] | None = None,
    sites: str = ".*",
    cache: str | os.PathLike[str] | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Sensitivity:
    """Metrics with one site at a time compressed, for all sites and options.

    Two programs are compiled, however many sites and options there are: one applies every option to
    all weights and finds the grids of all activations, the other evaluates the network with a
    choice for every site that is traced. The first keeps a copy of the weights per option.

    Args:
      apply_fn: pure, (params, *inputs) -> outputs.
      params: any tree; every leaf that feeds a contraction and matches `sites` is a site.
      batches: tuples of inputs, all of the same shapes; the metrics are means over them.
      weights: {name of the option: Compressor, or a tree like `params` of compressed weights}; what
        one makes of a leaf must not depend on the others.
      activations: {name of the option: Format}, one grid per tensor.
      calibrate: range of the activations, default `quantize.min_max()`.
      targets: one pytree per batch, labels say; given to the metrics.
      metrics: {name: (outputs, outputs of the network as it was, targets) -> scalar}; default
        {"kl": kl}.
      sites: a regular expression on whole names of leaves and taps.
      cache: a JSON file that grows with the sweep; a sweep that was stopped goes on from it. It is
        of one fingerprint of function, parameters, data and options.
      progress: wraps the list of what is left to evaluate, `rich.progress.track` say.

    Raises:
      ValueError: no batches, or of different shapes; no options; `sites` matches nothing; a cache
        of another sweep.

    Source: one-at-a-time sensitivities as in Dong et al., HAWQ-V2, NeurIPS 2020, arXiv 1911.03852,
    section 3, with the measured loss or divergence in the place of the trace.

    >>> import jax.numpy as jnp
    >>> from jaxcompress.formats import integer
    >>> from jaxcompress.quantize import weights
    >>> params = {"a": jnp.array([[1.0, 0.3]]), "b": jnp.array([[1.0], [-2.0]])}
    >>> found = sensitivity(
    ...     lambda p, x: x @ p["a"] @ p["b"], params, [(jnp.ones((4, 1)),)],
    ...     weights={"int2": weights(integer(2)), "int8": weights(integer(8))},
    ...     metrics={"mse": lambda out, reference, _: jnp.mean((out - reference) ** 2)},
    ... )
    >>> print(round(found.weights["a"]["int2"]["mse"], 3))
    0.36
    """
    evaluator = Evaluator(
        apply_fn,
        params,
        batches,
        weights=weights,
        activations=activations,
        calibrate=calibrate,
        targets=targets,
        metrics=metrics,
        sites=sites,
    )
    return evaluator.sweep(cache=cache, progress=progress)
