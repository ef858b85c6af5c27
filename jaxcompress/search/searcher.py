"""Candidates, sensitivities and costs of one network on a device, and plans for any budgets."""

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from jaxcompress.core.packed import Grid, is_packed, unpack
from jaxcompress.core.paths import leaves_with_paths, match_rules
from jaxcompress.core.sharding.meshes import automatic
from jaxcompress.core.storage import file_bytes
from jaxcompress.cost.device_model import Device
from jaxcompress.cost.estimation import estimate
from jaxcompress.cost.result import Cost
from jaxcompress.formats import Format, parse
from jaxcompress.graph import trace
from jaxcompress.graph.layers.layer_by_layer import Progress
from jaxcompress.graph.layers.statistics import check_batches
from jaxcompress.graph.unentered import report, silent
from jaxcompress.quantize.fake_quantized_activations import activations as quantize_activations
from jaxcompress.quantize.fake_quantized_activations import calibrate_activations, with_activations
from jaxcompress.quantize.ptq import Spec
from jaxcompress.search.file_bytes import FileBytes, file_sums
from jaxcompress.search.options import Option, as_options, stored
from jaxcompress.search.plan import Plan
from jaxcompress.search.problem import PEAK, Budget, Choice, Problem
from jaxcompress.search.sensitivities.evaluator import Evaluator, weight_leaves
from jaxcompress.search.sensitivities.measured import Metric, Sensitivity
from jaxcompress.search.solvers.knapsack import Infeasible, Solution, allocate, rerank

COSTS = ("weight_bytes", "latency_s", "energy_j", "macs")
FILE = "file_bytes"


@dataclass(frozen=True)
class Compressed:
    """A network that meets its limits, by the cost model.

    Attributes:
      plan: the options of the sites.
      packed: what ships; `unpack` gives the weights.
      grids: {tap: Grid} of the activations; empty if they are not quantized.
      cost: of `packed` on the device.
      apply_fn: (params, *inputs) -> outputs, the function given.
    """

    plan: Plan
    packed: Any = field(repr=False)
    grids: Mapping[str, Grid] = field(repr=False)
    cost: Cost = field(repr=False)
    apply_fn: Callable[..., Any] = field(repr=False)

    def __call__(self, *inputs: Any) -> Any:
        """The outputs as the device computes them, up to the order of sums."""
        view = unpack(self.packed)
        if not self.grids:
            return self.apply_fn(view, *inputs)
        return with_activations(self.apply_fn)(self.grids, view, *inputs)


class Search:
    """Candidates, sensitivities and costs of a network on a device; plans for any budgets.

    Every option is made of every weight by GPTQ on the data, where there are options with zeros by
    SparseGPT, from the inputs of the float network, so that a layer's weights do not depend on the
    options of others; sensitivities and the plans that are compared are measured on these weights,
    and they are what ships.

    Args:
      apply_fn: pure, (params, *inputs) -> outputs.
      params: trained float parameters.
      batches: tuples of inputs of the same shapes; no labels are needed.
      device: as `cost.estimate`.
      options: {name: Option or Spec}, default `integer_options()`.
      activations: name of the format of all activations, as `formats.parse`; None: as they are.
      example: inputs as the device will see them; default: the first example of the first batch.
      targets, metrics: as `sensitivity`.
      metric: which of the metrics is made small.
      sites: a regular expression on the leaves that are searched; others stay as they are.
      fitted: whether weights are fitted to the outputs on the batches; False: rounded to nearest,
        for batches that are not of the data.
      budget: limits that are known already: if no plan meets them, nothing is measured.
      cache: as `sensitivity`.
      progress: wraps the layers of GPTQ and the evaluations.

    Raises:
      ValueError: as `gptq`, `sensitivity` and `cost.estimate`.
      Infeasible: no plan meets `budget`.
    """

    def __init__(
        self,
        apply_fn: Callable[..., Any],
        params: Any,
        batches: Iterable[tuple[Any, ...]],
        *,
        device: "str | Device",
        options: Mapping[str, Option | Spec] | None = None,
        activations: str | None = "uint8",
        example: tuple[Any, ...] | None = None,
        targets: Iterable[Any] | None = None,
        metrics: Mapping[str, Metric] | None = None,
        metric: str = "kl",
        sites: str = ".*",
        fitted: bool = True,
        budget: Budget | None = None,
        cache: str | os.PathLike[str] | None = None,
        progress: Progress = iter,
    ):
        targets = None if targets is None else list(targets)
        apply_fn, params, checked, example, targets = automatic(
            (apply_fn, params, check_batches(batches), example, targets)
        )
        self.apply_fn, self.params, self.metric = apply_fn, params, metric
        self.batches = checked
        self.options = as_options(options)
        self.activations = activations
        self.form: Format | None = None if activations is None else parse(activations)
        self.device = device
        first = self.batches[0]
        self.example = jax.tree.map(lambda x: x[:1], first) if example is None else example
        graph = trace(apply_fn, params, *first)
        report(graph.unentered)
        leaves = list(dict.fromkeys(weight_leaves(graph)))
        self._leaf = {site.name: site.leaf for site in graph.sites if site.leaf in leaves}
        matched = match_rules({sites: None}, leaves, what="weight")
        self.sites = [path for path, rule in matched.items() if rule is not None]
        with silent():
            self._measure(fitted, targets, metrics, budget, cache, progress)

    def _measure(self, fitted, targets, metrics, budget, cache, progress) -> None:
        """All options of all weights, what they cost, and what each does to the network."""
        apply_fn, params = self.apply_fn, self.params
        self._packed: dict[str, Any] = {}
        views = {}
        sparse = any(option.sparsity for option in self.options.values())
        for name, option in self.options.items():
            chosen = dict.fromkeys(self.sites, option)
            made, weights, state = stored(
                apply_fn, params, self.batches, chosen,
                fitted=fitted, sparse=sparse, progress=progress,
            )  # fmt: skip
            views[name] = made.apply(weights, state)
            self._packed[name] = made.pack(weights, state)
        self.problem = self._costs()
        if budget is not None:
            self._allocated(budget, 1)
        self._evaluator = Evaluator(
            apply_fn,
            params,
            self.batches,
            weights=views,
            targets=targets,
            metrics=metrics,
            sites="|".join(re.escape(site) for site in self.sites),
        )
        self.sensitivity: Sensitivity = self._evaluator.sweep(cache=cache, progress=progress)
        self.problem = self._with_losses(self.sensitivity.increase(self.metric))

    @property
    def device_name(self) -> str:
        """The name of the device."""
        return self.device if isinstance(self.device, str) else self.device.name

    def plans(self, budget: Budget, *, candidates: int = 32) -> list[Plan]:
        """The plans of the least sums of sensitivities, ordered by what they measure.

        Raises:
          ValueError: no plan meets the budget; with the least possible of every cost.
        """
        found = self._allocated(budget, candidates)
        return [
            Plan(
                dict(solution.chosen),
                self.activations,
                self.device_name,
                dict(solution.costs),
                solution.loss,
                {self.metric: float(solution.true_loss or 0.0)},
            )
            for solution in rerank(found, self.measure)
        ]

    def _allocated(self, budget: Budget, count: int) -> list[Solution]:
        """The best choices; the sizes of their files are exact."""
        try:
            return [self._exact(solution) for solution in allocate(self.problem, budget, k=count)]
        except Infeasible as error:
            if budget.file_bytes is None:
                raise
            # The sum is a bound, some bytes above the file: what may fit is tried.
            fixed = {**self.problem.fixed, FILE: self._files.least}
            below = dataclasses.replace(self.problem, fixed=fixed)
            tried = [self._exact(s) for s in allocate(below, budget, k=max(count, 32))]
            found = [s for s in tried if s.costs[FILE] <= budget.file_bytes]
            if not found:
                least = min(s.costs[FILE] for s in tried)
                raise Infeasible(
                    f"no choice meets the budget: {FILE}: the limit is {budget.file_bytes:g}, the "
                    f"smallest file found has {least:g}"
                ) from error
            return found[:count]

    def _exact(self, solution: Solution) -> Solution:
        size = file_bytes(self._assembled(solution.chosen), activations=self._shapes)
        return dataclasses.replace(solution, costs={**solution.costs, FILE: size})

    def measure(self, chosen: Mapping[str, str]) -> float:
        """The metric of {site: option}, activations as they were; other sites stay."""
        return self._evaluator.measure(chosen)[self.metric]

    def uniform(self, option: str) -> Plan:
        """The plan of one option for all sites, measured."""
        chosen = dict.fromkeys(self.sites, option)
        loss = sum(self.problem.sites[site][option].loss for site in self.sites)
        whole = self._exact(Solution(chosen, loss, self.problem.costs(chosen)))
        return Plan(
            chosen, self.activations, self.device_name, whole.costs, loss,
            {self.metric: self.measure(chosen)},
        )  # fmt: skip

    def apply(self, plan: Plan) -> Compressed:
        """Quantizes, calibrates and packs as a plan says, one of another hand too.

        Raises:
          ValueError: a site that the network does not have, or an unknown option.
        """
        for site, option in plan.weights.items():
            if site not in self.sites:
                raise ValueError(f"plan: the network has no site {site!r}, but {self.sites}")
            if option not in self.options:
                raise ValueError(f"plan: {site!r}: unknown {option!r}; {sorted(self.options)}")
        return self.shipped(plan, self._assembled(plan.weights))

    def shipped(self, plan: Plan, packed: Any) -> Compressed:
        """Packed weights of a plan, trained ones too, with activations calibrated, and costs."""
        form = None if plan.activations is None else parse(plan.activations)
        grids = self._grids(unpack(packed), form)
        cost = self._cost(packed, form)
        predicted = {name: getattr(cost, name) for name in (*COSTS, PEAK)}
        predicted[FILE] = file_bytes(packed, activations=grids)
        return Compressed(
            dataclasses.replace(plan, predicted=predicted), packed, grids, cost, self.apply_fn
        )

    def _assembled(self, chosen: Mapping[str, str]) -> Any:
        """The packed leaves of a choice; what is no site is as it was."""
        trees = {name: dict(leaves_with_paths(t, is_leaf=is_packed)) for name, t in
                 self._packed.items()}  # fmt: skip
        leaves = [
            trees[chosen[path]][path] if path in chosen else leaf
            for path, leaf in leaves_with_paths(self.params)
        ]
        return jax.tree.unflatten(jax.tree.structure(self.params), leaves)

    def _grids(self, view: Any, form: Format | None) -> dict[str, Grid]:
        if form is None:
            return {}
        quantizer = quantize_activations(self.apply_fn, form)
        with silent():
            return calibrate_activations(quantizer, view, self.batches)

    def _grid_shapes(self) -> dict[str, Grid]:
        """Shapes of the grids of the activations."""
        if self.form is None:
            return {}
        quantizer = quantize_activations(self.apply_fn, self.form)
        made = lambda params, *inputs: quantizer.grids(quantizer.init(params, *inputs))
        with silent():
            return jax.eval_shape(made, self.params, *self.batches[0])

    def _cost(self, packed: Any, form: Format | None) -> Cost:
        with silent():
            return estimate(
                self.apply_fn, packed, *self.example, device=self.device, activations=form
            )

    def _with_losses(self, increase: Mapping[str, Mapping[str, float]]) -> Problem:
        sites = {
            site: {name: Choice(increase[site][name], c.costs) for name, c in choices.items()}
            for site, choices in self.problem.sites.items()
        }
        return dataclasses.replace(self.problem, sites=sites)

    def _costs(self) -> Problem:
        """Without losses; costs of a site are those of its layers where all have the option."""
        choices: dict[str, dict[str, Choice]] = {site: {} for site in self.sites}
        self._shapes = self._grid_shapes()
        self._files: FileBytes = file_sums(self._packed, self.sites, self._shapes)
        fixed = dict.fromkeys((*COSTS, PEAK), 0.0)
        for option, tree in self._packed.items():
            cost = self._cost(tree, self.form)
            own: dict[str, dict[str, float]] = {
                site: dict.fromkeys((*COSTS, PEAK), 0.0) for site in self.sites
            }
            rest = dict.fromkeys(COSTS, 0.0)
            for layer in cost.layers:
                costs = own.get(self._leaf.get(layer.name, ""))
                for name in COSTS:
                    (rest if costs is None else costs)[name] += getattr(layer, name)
                if costs is not None:
                    costs[PEAK] = max(costs[PEAK], layer.live_bytes)
            for site in self.sites:
                own[site][FILE] = self._files.sites[site][option]
                choices[site][option] = Choice(0.0, own[site])
            # Of what is no site, the most under any option: sums may not fall short.
            fixed = {n: max(v, rest.get(n, cost.peak_bytes)) for n, v in fixed.items()}
        return Problem(choices, fixed=dict(fixed) | {FILE: float(self._files.most)})
