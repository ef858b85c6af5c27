"""How many channels each group keeps, by what the network loses."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.graph.coupling.dependency_graph import Axes
from jaxcompress.graph.layers.layer_by_layer import Progress, replaced
from jaxcompress.graph.layers.statistics import Batches
from jaxcompress.prune.channels.choose import channel_macs, group_macs
from jaxcompress.prune.channels.coupled import group_masks
from jaxcompress.prune.channels.least_squares import Removal, group_removals
from jaxcompress.prune.channels.smaller_networks import rounded_up
from jaxcompress.prune.masking.mask_state import apply_masks
from jaxcompress.search.problem import Budget, Choice, Problem
from jaxcompress.search.sensitivities.measured import Metric, kl
from jaxcompress.search.solvers.knapsack import Infeasible, allocate, rerank

Chosen = Mapping[str, str]  # name of a group -> how many channels stay


class WidthChoice:
    """The loss of a network by the widths of its groups, and the widths of least loss.

    Every group is narrowed alone to each width, its readers fitted (`prune.group_obs`), and the
    network measured on the batches. These losses are added; the best sums that meet a limit are
    measured together, and the best of them is taken.

    Attributes:
      losses: name of a group -> {channels that stay: loss above that of the whole network}.

    Args:
      axes: what `graph.axes` found in the network.
      apply_fn, params: pure and trained, in inference mode.
      batches: tuples of inputs.
      of: names of the groups that may lose channels.
      round_to: the channels of a group are a multiple of this, or all.
      levels: widths are shares of 1 / levels, 2 / levels, ..., rounded up.
      metric: (outputs, outputs of the whole network, None) -> scalar.
      progress: wraps the measurements, one pass over the batches each.

    Raises:
      ValueError: as `prune.group_obs`.
    """

    def __init__(
        self,
        axes: Axes,
        apply_fn: Callable[..., Any],
        params: Any,
        batches: Batches,
        *,
        of: Iterable[str],
        round_to: int = 1,
        levels: int = 16,
        metric: Metric = kl,
        progress: Progress = iter,
    ):
        def counts(size: int) -> list[int]:
            parts = (-(-size * level // levels) for level in range(1, levels))
            widths = {rounded_up(part, size, round_to, 1) for part in parts}
            return sorted(widths - {size})

        self._axes, self._params, self._batches = axes, params, batches
        self._removals = group_removals(axes, apply_fn, params, batches, counts, of=of)
        self._flat = dict(leaves_with_paths(params))
        self._costs = channel_macs(axes, of=self._removals)
        outputs = jax.jit(apply_fn)
        self._reference = [outputs(params, *inputs) for inputs in batches]
        self._loss = jax.jit(lambda p, x, known: metric(apply_fn(p, *x), known, None))
        base = self._measure(params)
        jobs = [(name, count) for name, found in self._removals.items() for count in found]
        self.losses: dict[str, dict[int, float]] = {
            name: {axes.every[name].size: 0.0} for name in self._removals
        }
        for name, count in progress(jobs):
            self.losses[name][count] = self._true({name: str(count)}) - base

    def best(self, macs: float, *, candidates: int = 8) -> dict[str, np.ndarray]:
        """Name of a group -> bool [size]: the channels that stay.

        Args:
          macs: the share of the multiply-accumulates that may stay, in (0, 1].
          candidates: how many choices are measured.

        Raises:
          ValueError: a share out of range, or that cannot be reached.
        """
        if not 0 < macs <= 1:
            raise ValueError(f"macs must be in (0, 1], got {macs}")
        limit = macs * group_macs(self._axes, {})
        fitting = list(itertools.islice(self._fitting(limit), candidates))
        return self._kept(rerank(fitting, self._true)[0].chosen)

    def _fitting(self, limit: float) -> Iterator[Any]:
        # Costs are linear in each width, with all others whole; together less goes than their sum
        # where one layer loses inputs and outputs. The sum may then be as low as it must.
        sites = {
            name: {
                str(count): Choice(loss, {"macs": self._costs[name] * count})
                for count, loss in found.items()
            }
            for name, found in self.losses.items()
        }
        problem = Problem(sites)
        whole = sum(self._costs[name] * max(found) for name, found in self.losses.items())
        least = sum(self._costs[name] * min(found) for name, found in self.losses.items())
        dense = group_macs(self._axes, {})
        true = lambda chosen: group_macs(self._axes, self._kept(chosen))
        within = lambda total: true(allocate(problem, Budget(macs=total))[0].chosen)
        fits = lambda total: within(total) <= limit
        smallest = within(least)
        if smallest > limit:
            raise Infeasible(f"macs: {smallest / dense:.3f} of them are left at least")
        high = max(least, limit - (dense - whole))  # where costs do add up
        low = high if fits(high) else least
        for _ in range(12 if low < high else 0):
            middle = (low + high) / 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        for solution in allocate(problem, Budget(macs=low), k=32):
            if true(solution.chosen) <= limit:
                yield solution

    def _kept(self, chosen: Chosen) -> dict[str, np.ndarray]:
        return {
            name: found[int(chosen[name])].kept
            if int(chosen[name]) in found
            else np.ones(self._axes.every[name].size, bool)
            for name, found in self._removals.items()
            if name in chosen
        }

    def _true(self, chosen: Chosen) -> float:
        changes = [
            self._removals[name][int(count)]
            for name, count in chosen.items()
            if int(count) in self._removals[name]
        ]
        params = replaced(self._params, self._sums(changes))
        return self._measure(apply_masks(params, group_masks(self._axes, self._kept(chosen))))

    def _sums(self, changes: list[Removal]) -> dict[str, jax.Array]:
        # A leaf that reads several groups takes what each of them changes.
        leaves: dict[str, jax.Array] = {}
        for change in changes:
            for path, leaf in change.leaves.items():
                before = self._flat[path]
                leaves[path] = leaves[path] + (leaf - before) if path in leaves else leaf
        return leaves

    def _measure(self, params: Any) -> float:
        pairs = zip(self._batches, self._reference, strict=True)
        return float(np.mean([float(self._loss(params, x, known)) for x, known in pairs]))
