"""One layer after the other: what enters it is captured, its weight is replaced, on to the next.

Methods that look at one layer at a time (GPTQ, AdaRound, Wanda, SparseGPT) differ in how they solve
a layer; which layers there are, what enters them and in which order is the same. A weight that
several contractions use is solved once, for the inputs of all of them (`graph.layers.uses`).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from jaxcompress.core.paths import leaves_with_paths, match_rules
from jaxcompress.formats import Format, Granularity
from jaxcompress.formats.elementwise import elementwise
from jaxcompress.graph.layers.matrices import Layer, Layers
from jaxcompress.graph.layers.statistics import (
    Batches,
    Moments,
    blind_matrices,
    capture,
    stream,
    warn_of_unseen,
)
from jaxcompress.graph.layers.uses import Pool, pools
from jaxcompress.graph.unentered import report

Progress = Callable[[Iterable], Iterable]


class Matched(NamedTuple):
    """The layers of a network that rules take.

    Attributes:
      layers: those whose leaf a rule takes, in order of execution.
      rules: path of a leaf -> its rule, of layers and of other leaves.
      left: "paths (reasons)" of the leaves that a rule takes and no layer uses as they are; or "".
      pools: the weights of the layers, each with all that uses them.
      apart: "path (reason)" of the leaves whose uses have no inputs in common; or "".
    """

    layers: tuple[Layer, ...]
    rules: dict[str, str]
    left: str
    pools: tuple[Pool, ...]
    apart: str


def match_layers(
    found: Layers, params: Any, rules: Mapping[str, Any], *, name: str = "spec"
) -> Matched:
    """Matches rules, regular expressions on whole paths, with the layers of a network.

    Args:
      found: what `graph.layers.matrices.layers` found in the network.
      params: its parameters.
      rules: regex -> anything; the first match wins.
      name: what the rules are called in a message.

    Warns of contractions that could not be looked into.

    Raises:
      ValueError: a rule that matches nothing; no layer that a rule takes.
    """
    matched = match_rules(rules, [path for path, _ in leaves_with_paths(params)])
    taken = {path: rule for path, rule in matched.items() if rule is not None}
    chosen = tuple(layer for layer in found.layers if layer.path in taken)
    if not chosen:
        names = [layer.path for layer in found.layers] or sorted(found.refused)
        beyond = f"; not looked into: {'; '.join(found.unentered)}" if found.unentered else ""
        raise ValueError(f"{name}: its rules take the weight of no layer; layers: {names}{beyond}")
    report(found.unentered)
    left = ", ".join(sorted(set(taken) - {layer.path for layer in chosen}))
    refused = "; ".join(f"{site}: {why}" for site, why in found.refused.items())
    # A weight of no elements has nothing to solve.
    found_pools = pools([layer for layer in chosen if layer.index.size], found.readers)
    apart = ", ".join(f"{path} ({why})" for path, why in found_pools.apart.items())
    left += f" ({refused})" if left and refused else ""
    return Matched(chosen, taken, left, found_pools.pools, apart)


class Solve(Protocol):
    """(layer, leaf, moments) -> the new leaf."""

    def __call__(self, layer: Layer, leaf: Array, moments: Moments, /) -> Any: ...


def solve_layers(
    solve: Solve,
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Batches,
    *,
    pools: Sequence[Pool],
    prefix: bool,
    gram: bool = True,
    grids: Mapping[str, Any] | None = None,
    layer_at_a_time: bool = False,
    progress: Progress = iter,
) -> Any:
    """The params with the weights of every pool replaced, in order.

    Args:
      solve: what is done with a layer, the moments being those of all its uses.
      apply_fn, params, batches: the network and the data.
      pools: weights with their uses, of `graph.layers.uses.pools`.
      prefix: whether what enters a layer comes from the network with the layers before it replaced
        already; else from the network as it is.
      gram, grids: as in `capture`.
      layer_at_a_time: hold one X^T X at a time, at the price of a pass for each layer.
      progress: wraps the layers, for a progress bar.
    """
    current, unseen = params, []
    what: dict[str, Any] = {"gram": gram, "grids": grids}

    def of_prefix() -> Iterator[Moments]:
        for pool in pools:
            yield pool.moments(capture(apply_fn, current, batches, layers=_layers([pool]), **what))

    given = lambda: _given(apply_fn, params, batches, pools, what, layer_at_a_time)
    seen = of_prefix() if prefix else given()
    for pool in progress(_Sized(pools)):
        moments, layer = next(seen), pool.layer
        unseen += [layer.path + where for where in blind_matrices(moments)]
        new = solve(layer, leaf(current, layer.path), moments.seen_as_white())
        current = replaced(current, {layer.path: new})
    warn_of_unseen(unseen)
    return current


def _given(
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Batches,
    pools: Sequence[Pool],
    what: Mapping[str, Any],
    layer_at_a_time: bool,
) -> Iterator[Moments]:
    # Of every pool in turn, from the network as it is; sums are let go after their last pool.
    if layer_at_a_time:
        for pool in pools:
            seen = stream(apply_fn, params, batches, layers=_layers([pool]), **what)
            yield pool.moments({layer.tap.name: moments for layer, moments in seen})
        return
    found = capture(apply_fn, params, batches, layers=_layers(pools), **what)
    last = {use.layer.tap.name: k for k, pool in enumerate(pools) for use in pool.uses}
    for k, pool in enumerate(pools):
        yield pool.moments(found)
        for name in [name for name, at in last.items() if at == k]:
            del found[name]


def _layers(pools: Sequence[Pool]) -> list[Layer]:
    # All that use the weights of these pools, each once.
    return list({use.layer.tap.name: use.layer for pool in pools for use in pool.uses}.values())


class _Sized:
    """The pools, one by one, with their number, for progress bars."""

    def __init__(self, pools: Sequence[Pool]):
        self._pools = pools

    def __iter__(self) -> Iterator:
        return iter(self._pools)

    def __len__(self) -> int:
        return len(self._pools)


def matrices(layer: Layer, leaf: Array) -> Array:
    """The weights of a layer, float32 [S, G, K, N]."""
    return layer.take(leaf).astype(jnp.float32)


def grid_of(
    layer: Layer, format: Format, qparams: Any, *, where: Granularity, shape: tuple[int, ...]
) -> tuple[Any, Any]:
    """A format and its arrays for the matrices of a layer, element by element [S, G, K, N].

    Args:
      layer: the layer.
      format, qparams: those of its leaf.
      where: which elements of the leaf share a scale.
      shape: of the leaf.
    """
    format, opened = elementwise(format, qparams, where=where, shape=shape)
    size = math.prod(shape)
    pick = lambda p: p.reshape(size, *p.shape[len(shape) :])[layer.index]
    return format, jax.tree.map(pick, opened)


def leaf(params: Any, path: str) -> Array:
    """The leaf at a path."""
    return next(leaf for name, leaf in leaves_with_paths(params) if name == path)


def replaced(params: Any, leaves: Mapping[str, Any]) -> Any:
    """The tree with other leaves at some paths."""
    flat = [leaves.get(path, old) for path, old in leaves_with_paths(params)]
    return jax.tree.structure(params).unflatten(flat)
