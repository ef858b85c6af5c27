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
from jaxcompress.quantize.activations import activations as quantize_activations
from jaxcompress.quantize.calibrate import Calibrator
from jaxcompress.search.measured import Metric


class Prepared(NamedTuple):
    views: dict[str, Array]  # [1 + options, *shape] for every site, the weights themselves first
    grids: list[dict[str, Any]]  # one for every option: {tap: Grid}
    batches: Any  # (inputs, outputs as they were, targets), each [batches, ...]


@dataclass(frozen=True)
class Program:
    apply_fn: Callable[..., Any]
    recipes: dict[str, Compressor]
    order: tuple[str, ...]  # of all options of weights
    activations: dict[str, Format]
    calibrate: Calibrator
    metrics: Mapping[str, Metric]
    names: tuple[list[str], dict[str, tuple[int, ...]]]  # leaves; taps with their scans

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
            (inputs, reference, stack(targets)),
        )

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
        states = {
            tap: (
                jnp.broadcast_to(choice[1][tap], loops),
                [grids[tap] for grids in prepared.grids],
            )
            for tap, loops in self.names[1].items()
        }
        walked = walk(self.apply_fn, _snapped) if states else None

        def one(batch: Any) -> dict[str, Array]:
            inputs, reference, labels = batch
            if walked is None:
                outputs = self.apply_fn(view, *inputs)
            else:
                outputs = walked(states, view, *inputs)[0]
            return {name: fn(outputs, reference, labels) for name, fn in self.metrics.items()}

        values = lax.map(one, prepared.batches)
        return jax.tree.map(lambda x: jnp.mean(x.astype(jnp.float32)), values)


def _snapped(tap: Any, x: Array, state: tuple[Array, list[Any]]) -> tuple[Array, Any]:
    index, grids = state
    return lax.switch(index, [lambda x: x, *(grid.snap for grid in grids)], x), state
