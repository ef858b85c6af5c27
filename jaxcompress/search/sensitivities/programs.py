"""The two programs of a sweep: all options of all sites, and the network with any of them."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxcompress.core.compressor import Compressor
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.formats import Format
from jaxcompress.graph import walk
from jaxcompress.quantize.fake_quantized_activations import activations as quantize_activations
from jaxcompress.quantize.ranges.min_max import Calibrator
from jaxcompress.search.sensitivities.measured import Metric


class Prepared(NamedTuple):
    views: dict[str, Array]  # [1 + options, *shape] for every site, the weights themselves first
    grids: list[dict[str, Any]]  # one for every option: {tap: Grid}
    # (inputs, outputs as they were, targets, {tap: result of its contraction}), [batches, ...]
    batches: Any


@dataclass(frozen=True)
class Program:
    apply_fn: Callable[..., Any]
    recipes: dict[str, Compressor]
    order: tuple[str, ...]  # of all options of weights
    activations: dict[str, Format]
    calibrate: Calibrator
    metrics: Mapping[str, Metric]
    names: tuple[list[str], dict[str, tuple[int, ...]]]  # leaves; taps with their scans
    kept: Mapping[str, jax.ShapeDtypeStruct]  # {tap: result of its contraction} that is reused

    def prepare(self, params: Any, given: dict[str, Any], batches: Any, targets: Any) -> Prepared:
        """All options of all weights, all grids, and the outputs as they were."""
        trees = given | {
            name: recipe.apply(params, recipe.update(params, recipe.init(params)))
            for name, recipe in self.recipes.items()
        }
        views: dict[str, list[Array]] = {name: [] for name in self.names[0]}
        for tree in (params, *(trees[name] for name in self.order)):
            for path, leaf in leaves_with_paths(tree):
                if path in views:
                    views[path].append(leaf)
        stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
        inputs = stack(batches)
        reference = lax.map(lambda x: self.apply_fn(params, *x), inputs)
        return Prepared(
            {path: jnp.stack(leaves) for path, leaves in views.items()},
            self._grids(params, inputs),
            (
                inputs,
                reference,
                stack(targets),
                lax.map(lambda x: self._results(params, x), inputs),
            ),
        )

    def _results(self, params: Any, inputs: Any) -> dict[str, Array]:
        """The results of the contractions that are kept."""
        empty = {tap: jnp.zeros(out.shape, out.dtype) for tap, out in self.kept.items()}
        walked = walk(self.apply_fn, lambda tap, x, state: (x, state), around=_kept)
        return walked(empty, params, *inputs)[1]

    def _grids(self, params: Any, batches: Any) -> list[dict[str, Any]]:
        if not self.activations:
            return []
        pattern = "|".join(re.escape(name) for name in self.names[1])
        made = [
            quantize_activations(self.apply_fn, form, calibrate=self.calibrate, sites=pattern)
            for form in self.activations.values()
        ]
        empty = made[0].init(params, *jax.tree.map(lambda x: x[0], batches))
        see = lambda stats, inputs: (made[0].observe(stats, params, *inputs), None)
        stats = lax.scan(see, empty, batches)[0]
        return [quantizer.grids(stats) for quantizer in made]

    def evaluate(self, params: Any, prepared: Prepared, choice: Any) -> dict[str, Array]:
        """Means of the metrics over the batches, with the options that `choice` names."""
        chosen = {path: prepared.views[path][index] for path, index in choice[0].items()}
        paths = (path for path, _ in leaves_with_paths(params))
        leaves, treedef = jax.tree.flatten(params)
        view = treedef.unflatten(
            [chosen.get(path, leaf) for path, leaf in zip(paths, leaves, strict=True)]
        )
        snapped = {
            tap: (
                jnp.broadcast_to(choice[1][tap], loops),
                [grids[tap] for grids in prepared.grids],
            )
            for tap, loops in self.names[1].items()
        }
        walked = walk(self.apply_fn, _snapped, around=_reused)

        def one(batch: Any) -> dict[str, Array]:
            inputs, reference, labels, kept = batch
            states = {
                tap: (snapped.get(tap, ()), (choice[2][tap], kept[tap]) if tap in kept else ())
                for tap in {**snapped, **kept}
            }
            outputs = walked(states, view, *inputs)[0]
            return {name: fn(outputs, reference, labels) for name, fn in self.metrics.items()}

        values = lax.map(one, prepared.batches)
        return jax.tree.map(lambda x: jnp.mean(x.astype(jnp.float32)), values)


State = tuple[Any, Any]  # how a tap's input is snapped; what is known of its contraction


def _snapped(tap: Any, x: Array, state: State) -> tuple[Array, State]:
    del tap
    if state[0] == ():
        return x, state
    index, grids = state[0]
    return lax.switch(index, [lambda x: x, *(grid.snap for grid in grids)], x), state


def _kept(tap: Any, compute: Any, operands: Any, state: Array) -> tuple[list[Array], Array]:
    del tap, state
    results = compute(operands)
    return results, results[0]


def _reused(tap: Any, compute: Any, operands: Any, state: State) -> tuple[list[Array], State]:
    del tap
    if state[1] == ():
        return compute(operands), state
    stale, known = state[1]
    return lax.cond(stale, compute, lambda _: [known], operands), state
