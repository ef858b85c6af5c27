"""A narrower network from a trained one."""

import re
from collections.abc import Callable, Iterable
from typing import Any

from jaxcompress.core.paths import leaves_with_paths, near_misses
from jaxcompress.core.sharding.meshes import on_any_mesh
from jaxcompress.graph import axes
from jaxcompress.graph.layers.layer_by_layer import Progress
from jaxcompress.graph.layers.statistics import check_batches
from jaxcompress.prune.channels.choose import groups_for_macs
from jaxcompress.prune.channels.coupled import group_masks
from jaxcompress.prune.channels.gate_scores import group_norms
from jaxcompress.prune.channels.smaller_networks import Shrunk, shrink
from jaxcompress.prune.from_calibration.sparsegpt import sparse_gpt
from jaxcompress.search.width_choice import WidthChoice


@on_any_mesh
def narrow(
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[tuple[Any, ...]],
    macs: float,
    *,
    groups: str = ".*",
    round_to: int = 1,
    allocation: str = "uniform",
    progress: Progress = iter,
) -> Shrunk:
    """Cuts channels until a share of the multiply-accumulates is left.

    What reads them is fitted by least squares to the outputs it had, on the batches. No training.

    Args:
      apply_fn, params: pure and trained, in inference mode.
      batches: tuples of inputs.
      macs: the share that may stay, in (0, 1].
      groups: a regular expression on the names of the groups (`graph.axes`) that may lose channels.
      round_to: the channels of a group are a multiple of this, or all.
      allocation: "uniform": of every group the same share goes, those of the smallest norm. "loss":
        those whose readers can best do without them go (`prune.group_obs`), so many of each group
        that the outputs, logits [B, classes], change least (`WidthChoice`).
      progress: wraps the layers, and the measurements of "loss".

    Returns:
      (fn, params, report), as `prune.shrink`.

    Raises:
      ValueError: a share out of range or that cannot be reached; `groups` that match nothing; an
        unknown allocation.

    >>> import jax, jax.numpy as jnp
    >>> keys = jax.random.split(jax.random.key(0), 3)
    >>> params = {"up": jax.random.normal(keys[0], (8, 16))}
    >>> params["down"] = jax.random.normal(keys[1], (16, 4))
    >>> x = jax.random.normal(keys[2], (64, 8))
    >>> found = narrow(lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"], params, [(x,)], 0.5)
    >>> found.params["up"].shape, found.params["down"].shape
    ((8, 8), (8, 4))
    """
    if allocation not in ("uniform", "loss"):
        raise ValueError(f'allocation must be "uniform" or "loss", got {allocation!r}')
    batches = check_batches(batches)
    found = axes(apply_fn, params, *batches[0])
    norms = group_norms(found, params)
    scores = {name: norm for name, norm in norms.items() if re.fullmatch(groups, name)}
    if not scores:
        near = ", ".join(near_misses(groups, norms) or list(norms)[:3])
        near = near or f"there are none ({found.why_none})"
        raise ValueError(f"groups={groups!r} matches no group of channels; nearest: {near}")
    if allocation == "uniform":
        kept = groups_for_macs(found, scores, macs, round_to=round_to)
    else:
        choice = WidthChoice(
            found, apply_fn, params, batches, of=scores, round_to=round_to, progress=progress
        )
        kept = choice.best(macs)
    masks = group_masks(found, kept)
    # Only what loses inputs is fitted: the sums that a layer had over the channels that go.
    readers = {
        path: 0.0
        for path, mask in leaves_with_paths(masks)
        if mask.ndim > 1 and not mask.all() and _reads(mask)
    }
    if readers:
        params = sparse_gpt(
            apply_fn, params, batches, readers, masks=masks, sweeps=2, progress=progress
        )[0]
    return shrink(apply_fn, params, kept, batches[0], axes=found)


def _reads(mask: Any) -> bool:
    # Whether some output keeps only a part of its inputs: not all rows go or stay as a whole.
    flat = mask.reshape(-1, mask.shape[-1])
    per_output = flat.sum(axis=0)
    return bool(((per_output > 0) & (per_output < flat.shape[0])).any())
