"""From a trained network, what data there is, and limits, to a packed network that meets them."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.core.combine import chain
from jaxcompress.core.compressor import Compressor
from jaxcompress.core.sharding.meshes import on_any_mesh
from jaxcompress.cost.device_model import Device
from jaxcompress.formats import parse
from jaxcompress.graph import trace
from jaxcompress.graph.layers.layer_by_layer import Progress
from jaxcompress.graph.layers.statistics import check_batches
from jaxcompress.graph.unentered import report, silent
from jaxcompress.prune.masking.given_masks import fixed
from jaxcompress.prune.masking.mask_state import apply_masks, masks_of_packed
from jaxcompress.quantize.ptq import recipe
from jaxcompress.search.fine_tuning import Training, finetune
from jaxcompress.search.problem import Budget
from jaxcompress.search.searcher import Compressed, Search
from jaxcompress.search.sensitivities.measured import Metric, cross_entropy, kl
from jaxcompress.search.solvers.knapsack import Infeasible
from jaxcompress.search.widths import narrow

_SYNTHETIC = 2  # batches
_EXAMPLES = 64  # in each


@on_any_mesh
def compress(
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[tuple[Any, ...]] | None = None,
    *,
    device: "str | Device",
    budget: Budget,
    candidates: int = 32,
    targets: Iterable[Any] | None = None,
    widths: Sequence[float] = (1.0,),
    channels: str = ".*",
    training: Training | None = None,
    progress: Progress = iter,
    **how: Any,
) -> Compressed:
    """The network that keeps most, of those within the budget on the device.

    What is done depends on what there is:
      nothing but the shapes of the inputs (`batches=None`, `example` given): sensitivities and
        ranges come from standard normal inputs, weights are rounded to nearest;
      inputs without labels: weights are fitted to the outputs by GPTQ or SparseGPT, and plans are
        compared by KL divergence from the network as it was;
      labels too (`targets`): plans are compared by cross-entropy;
      a budget of training: narrower networks learn from the network as it was before they are
        searched, and the plan that wins is trained with its grids and zeros.
    Networks of several `widths` compete; each has a search of its own.

    Args:
      apply_fn: pure, (params, *inputs) -> logits, in inference mode.
      params: trained float parameters.
      batches: tuples of inputs of the same shapes; None: there are no data.
      device: as `cost.estimate`.
      budget: limits of the device.
      candidates: plans that are measured for each width.
      targets: labels [B] of every batch.
      widths: shares of the multiply-accumulates that stay when channels are cut, as `narrow`; 1 is
        the network itself.
      channels: which groups of channels may be cut, as `narrow(groups=)`.
      training: data and effort, shared among the narrower networks (half) and the winner.
      progress: wraps layers, evaluations and steps.
      **how: further arguments of `Search`.

    Raises:
      ValueError: as `Search` and `Search.plans`; nothing meets the budget at any width.

    >>> from jaxcompress.search import integer_options
    >>> keys = jax.random.split(jax.random.key(0), 3)
    >>> params = {"up": jax.random.normal(keys[0], (8, 16))}
    >>> params["down"] = jax.random.normal(keys[1], (16, 4))
    >>> x = jax.random.normal(keys[2], (64, 8))
    >>> found = compress(
    ...     lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"], params, [(x,)],
    ...     device="stm32l4r5", budget=Budget(weight_bytes=180), options=integer_options((2, 4, 8)),
    ... )
    >>> dict(found.plan.weights), found.cost.weight_bytes
    ({'up': 'int4', 'down': 'int4'}, 176)
    """
    listed, fitted = _data(batches, how.get("example"))
    if not widths or not all(0 < share <= 1 for share in widths):
        raise ValueError(f"widths must be shares in (0, 1], got {widths}")
    labels = None if targets is None else list(targets)
    metrics: dict[str, Metric] = {"kl": kl}
    if labels is not None:
        metrics["cross_entropy"] = cross_entropy
    metric = how.pop("metric", "kl" if labels is None else "cross_entropy")
    how = {"metrics": metrics, "metric": metric, "targets": labels, "fitted": fitted} | how
    report(trace(apply_fn, params, *listed[0]).unentered)
    with silent():
        teacher = apply_fn, params
        reference = [apply_fn(params, *inputs) for inputs in listed]
        narrower = sum(share < 1 for share in widths)
        best: tuple[float, Search, Compressed] | None = None
        misses = []
        for share in widths:
            fn, tree = teacher
            if share < 1:
                fn, tree, _ = narrow(
                    apply_fn, params, listed, share, groups=channels, progress=progress
                )
                if training is not None:
                    part = training.part(0.5 / narrower)
                    tree = finetune(fn, tree, part, teacher=teacher, progress=progress).params
            try:
                search = Search(
                    fn, tree, listed, device=device, budget=budget, progress=progress, **how
                )
                found = search.apply(search.plans(budget, candidates=candidates)[0])
            except Infeasible as error:
                misses.append(f"{100 * share:g} % of the MACs: {error}")
                continue
            loss = _loss(found, listed, reference, labels, how["metrics"][metric])
            if best is None or loss < best[0]:
                best = loss, search, found
        if best is None:
            one = len(misses) == 1
            raise Infeasible(misses[0].partition(": ")[2] if one else "; ".join(misses))
        _, search, found = best
        if training is None:
            return found
        part = training.part(0.5 if narrower else 1.0)
        return _trained(search, found, part, teacher, progress)


def _data(batches: Any, example: Any) -> tuple[tuple[tuple[Any, ...], ...], bool]:
    """Batches, and whether they are of the data."""
    if batches is not None:
        return tuple(check_batches(batches)), True
    if example is None:
        raise ValueError("without batches, give example: the shapes and dtypes of the inputs")

    def normal(key: Any, x: Any) -> Any:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"without batches, inputs must be floating point, got {x.dtype}")
        return jax.random.normal(key, (_EXAMPLES, *x.shape[1:]), x.dtype)

    leaves, treedef = jax.tree.flatten(tuple(example))
    keys = jax.random.split(jax.random.key(0), (_SYNTHETIC, len(leaves)))
    made = [[normal(k, x) for k, x in zip(row, leaves, strict=True)] for row in keys]
    return tuple(treedef.unflatten(row) for row in made), False


def _loss(found: Compressed, batches: Any, reference: Any, labels: Any, metric: Metric) -> float:
    """The metric of what ships, against the network as it was."""
    targets = labels or [None] * len(batches)
    rows = zip(batches, reference, targets, strict=True)
    return sum(float(metric(found(*x), y, t)) for x, y, t in rows) / len(batches)


def _trained(
    search: Search, found: Compressed, training: Training, teacher: Any, progress: Progress
) -> Compressed:
    """The same plan with weights that were trained on its grids, zeros where they were."""
    rules = {re.escape(s): search.options[o].spec for s, o in found.plan.weights.items()}
    masks = masks_of_packed(found.packed)
    made: Compressor = chain(recipe(rules), fixed(masks))
    start = apply_masks(search.params, masks)
    form = None if found.plan.activations is None else parse(found.plan.activations)
    state = finetune(
        search.apply_fn, start, training, teacher=teacher, recipe=made, activations=form,
        progress=progress,
    )  # fmt: skip
    compress = made.update(state.params, state.compress)
    plan = replace(found.plan, measured={})
    return search.shipped(plan, made.pack(state.params, compress))
