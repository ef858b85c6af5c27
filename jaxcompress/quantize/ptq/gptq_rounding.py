"""GPTQ: rounds a weight input by input and lets the inputs to come make up for each error.

Frantar et al. 2023, GPTQ, arXiv 2210.17323; the arithmetic is in `sweep`.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcompress.core.compressor import CompressState
from jaxcompress.core.sharding.meshes import on_any_mesh
from jaxcompress.graph.layers.layer_by_layer import grid_of
from jaxcompress.graph.layers.matrices import Layer
from jaxcompress.graph.layers.statistics import Moments
from jaxcompress.quantize.ptq.driver import Found, Inputs, Progress, drive, matrices
from jaxcompress.quantize.ptq.gptq_sweep import Finder, Rounded, solve, with_damping
from jaxcompress.quantize.ptq.leaf_specs import Rules, Spec

_BLOCK = 32


@on_any_mesh
def gptq(
    apply_fn: Callable[..., Any],
    params: Any,
    data: Iterable[tuple[Any, ...]],
    spec: Rules,
    *,
    act_order: bool = False,
    groups: str = "static",
    damping: float = 0.01,
    sweeps: int = 0,
    masks: Mapping[str, Array] | None = None,
    inputs: Inputs = "float",
    grids: Mapping[str, Any] | None = None,
    layer_at_a_time: bool = False,
    progress: Progress = iter,
) -> tuple[Any, CompressState]:
    """Weights on the grids of `spec` that keep the outputs of every layer on the data.

    Every output column has at most the error of rounding to nearest, which is kept where GPTQ is
    worse. Inputs that were always zero are rounded to nearest.

    Args:
      apply_fn: pure, (params, *inputs) -> outputs.
      params: float parameters.
      data: batches of inputs, tuples.
      spec: {regex on the path: `Spec`}; any format that can be taken element by element.
      act_order: inputs in the order of their power, the largest first.
      groups: "static": all scales from the weights as they are. "current": those of a group when
        it is reached, where groups are consecutive inputs of one output; not with act_order.
      damping: share of the mean of diag(H) that is added to it; ten times as much, with a warning,
        where the factorization fails.
      sweeps: passes of coordinate descent afterwards (Behdin et al. 2023, QuantEase, arXiv
        2309.01885), none of which makes the error larger; with static groups.
      masks: {path: bool array}; where False the weight becomes 0, and the rest makes up for it.
      inputs: "float": of the float network. "quantized": layer by layer, with the layers before
        quantized already.
      grids: {tap: Grid} of the activations, which are put on them on the way.
      layer_at_a_time: hold one X^T X at a time, at the price of a pass for each layer.
      progress: wraps the layers, for a progress bar.

    Returns:
      (params, state) for the `apply` and `pack` of `recipe(spec)`.

    Raises:
      ValueError: as `spec.plan`; `groups` or `inputs` unknown; activations that are not finite;
        X^T X that is not positive definite at any damping.

    >>> from jaxcompress.formats import integer
    >>> w, x = jax.random.normal(jax.random.key(0), (2, 8, 8))
    >>> fn, spec = lambda p, x: x @ p["w"], {"w": Spec(integer(3))}
    >>> rounded, _ = gptq(fn, {"w": w}, [(x,)], spec, damping=1e-4)
    >>> nearest = Spec(integer(3)).weights()
    >>> view = nearest.apply(w, nearest.init(w))
    >>> bool(jnp.sum((x @ (rounded["w"] - w)) ** 2) < jnp.sum((x @ (view - w)) ** 2))
    True
    """
    if groups not in ("static", "current"):
        raise ValueError(f"groups must be 'static' or 'current', got {groups!r}")
    if groups == "current" and (act_order or sweeps):
        raise ValueError("groups='current' takes inputs in their own order, once: no act_order")

    def solve_layer(layer: Layer, leaf: Array, qparams: Any, moments: Moments, spec: Spec) -> Found:
        mask = None if masks is None else masks.get(layer.path)
        problem = Problem(layer, leaf, qparams, spec)
        blocks = problem.blocks() if groups == "current" else None
        how = {"act_order": act_order, "sweeps": sweeps}
        run = lambda damp: problem.solved(moments, damp, mask=mask, blocks=blocks, **how)
        result = with_damping(run, damping, name=layer.tap.name)
        return Found(layer.put(leaf, result.weights), problem.placed(result, blocks))

    return drive(
        solve_layer,
        apply_fn,
        params,
        data,
        spec=spec,
        inputs=inputs,
        grids=grids,
        layer_at_a_time=layer_at_a_time,
        progress=progress,
    )


class Blocks(NamedTuple):
    """Blocks of consecutive inputs of one output each.

    Attributes:
      size: inputs of a block; the last one may be shorter.
      ids: int [S, G, blocks, N], numbers in the flattened scales of the leaf.
    """

    size: int
    ids: np.ndarray


class Problem(NamedTuple):
    """A layer to be rounded: its leaf, the format's arrays for it, and how it is stored."""

    layer: Layer
    leaf: Array
    qparams: Any
    spec: Spec

    @property
    def order(self) -> np.ndarray:
        """[K], inputs as they lie in the leaf: groups are consecutive."""
        return np.argsort(self.layer.index[0, 0, :, 0], kind="stable")

    def blocks(self) -> Blocks | None:
        """The blocks that share a scale, if they are of this kind and have scales of their own."""
        where, shape = self.spec.where, self.leaf.shape
        scale_shape = where.scale_shape(shape)
        if any(p.shape != scale_shape for p in jax.tree.leaves(self.qparams)):
            return None
        numbers = jnp.arange(math.prod(scale_shape)).reshape(scale_shape)
        ids = jnp.broadcast_to(where.expand(numbers, shape), shape)
        everywhere = np.bincount(np.asarray(ids).reshape(-1), minlength=numbers.size)
        ids = np.asarray(self.layer.take(ids))[:, :, self.order]
        size = min(where.group or ids.shape[2], ids.shape[2])
        starts = ids[:, :, ::size]
        regular = np.array_equal(np.repeat(starts, size, axis=2)[:, :, : ids.shape[2]], ids)
        # A scale that weights of other contractions have too stays.
        mine = np.bincount(ids.reshape(-1), minlength=everywhere.size)
        own = np.all((mine == 0) | (mine == everywhere))
        return Blocks(size, starts) if own and regular and _unique(starts) else None

    def grid(self) -> tuple[Any, Any]:
        """A format and its arrays for the matrices, element by element [S, G, K, N]."""
        how = {"where": self.spec.where, "shape": self.leaf.shape}
        return grid_of(self.layer, self.spec.format, self.qparams, **how)

    def solved(
        self, moments: Moments, damp: Array, *, mask: Array | None, blocks: Blocks | None, **how
    ) -> Rounded:
        """The rounded matrices, with the scales of `blocks` found on the way."""
        w = matrices(self.layer, self.leaf)
        format, grid = self.grid()
        keep = jnp.ones((), bool) if mask is None else self.layer.take(mask)
        keep = jnp.broadcast_to(keep.reshape(keep.shape or (1,) * 4), w.shape)
        find, size = None, min(_BLOCK, w.shape[2])
        if blocks is not None:
            find = Finder(self.spec.format, self.spec.calibrate, self.leaf.dtype.name)
            size = blocks.size
        args = (w, moments.hessian, keep, grid, damp, jnp.asarray(self.order))
        return solve(*args, format=format, block=size, find=find, **how)

    def placed(self, result: Rounded, blocks: Blocks | None) -> Any:
        """The format's arrays with the scales that were found on the way."""
        if blocks is None:
            return self.qparams

        def put(old: Array, new: Array) -> Array:
            flat = old.reshape(-1)
            chosen = jnp.where(result.improved[:, :, None], new, flat[blocks.ids])
            return flat.at[blocks.ids].set(chosen).reshape(old.shape)

        return jax.tree.map(put, self.qparams, result.qparams)


def _unique(numbers: np.ndarray) -> bool:
    return len(np.unique(numbers)) == numbers.size
