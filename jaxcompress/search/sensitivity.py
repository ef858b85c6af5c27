"""What does one compressed site cost in accuracy? All sites and options by one program."""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxcompress.core.compressor import Compressor
from jaxcompress.core.files import replacing
from jaxcompress.core.paths import leaves_with_paths, near_misses
from jaxcompress.distill import fingerprint
from jaxcompress.distill.logits import kd
from jaxcompress.formats import Format
from jaxcompress.graph import trace, walk
from jaxcompress.graph.capture import check_batches
from jaxcompress.quantize.activations import activations as quantize_activations
from jaxcompress.quantize.calibrate import Calibrator, min_max

Metric = Callable[[Any, Any, Any], Array]
Values = dict[str, dict[str, dict[str, float]]]
KINDS = ("weights", "activations")


@dataclass(frozen=True)
class Sensitivity:
    """Metrics of the network with one site compressed, all others as they were.

    Attributes:
      base: {metric: value} of the network as it was.
      weights: {path of the leaf: {option: {metric: value}}}.
      activations: {name of the tap: {option: {metric: value}}}.
    """

    base: Mapping[str, float] = field(hash=False)
    weights: Mapping[str, Mapping[str, Mapping[str, float]]] = field(hash=False)
    activations: Mapping[str, Mapping[str, Mapping[str, float]]] = field(hash=False)

    def increase(self, metric: str, kind: str = "weights") -> dict[str, dict[str, float]]:
        """{site: {option: value - base}}; kind: "weights" or "activations".

        Raises:
          ValueError: no such metric or kind.
        """
        if metric not in self.base:
            raise ValueError(f"metric {metric!r} was not measured; there are {sorted(self.base)}")
        if kind not in ("weights", "activations"):
            raise ValueError(f'kind must be "weights" or "activations", got {kind!r}')
        return {
            site: {name: found[metric] - self.base[metric] for name, found in options.items()}
            for site, options in getattr(self, kind).items()
        }


def kl(outputs: Array, reference: Array, targets: Any) -> Array:
    """Mean over the examples of KL(softmax(reference) || softmax(outputs)), nats; a metric."""
    del targets
    return kd(outputs, reference, temperature=1.0)


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


class Evaluator:
    """Metrics of a network with any choice of options per site; arguments as `sensitivity`.

    Two programs are compiled, one here and one at the first `measure`.

    Attributes:
      sites: names of the leaves; names of the taps.
      options: names of the options of weights; of activations.
    """

    def __init__(
        self,
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
    ):
        chosen = dict(weights or {}), dict(activations or {})
        if not chosen[0] and not chosen[1]:
            raise ValueError("give options for weights or for activations")
        listed, labels = _checked(batches, targets)
        names = _sites(apply_fn, params, listed[0], sites, chosen)
        recipes = {k: v for k, v in chosen[0].items() if isinstance(v, Compressor)}
        given = {k: v for k, v in chosen[0].items() if k not in recipes}
        for name, tree in given.items():
            _check_same(f"weights[{name!r}]", tree, params)
        order = tuple(chosen[0])
        self._program = _Program(
            apply_fn,
            recipes,
            order,
            chosen[1],
            calibrate or min_max(),
            metrics or {"kl": kl},
            names,
        )
        self._inputs = params, given, listed, labels
        self.sites = tuple(names[0]), tuple(names[1])
        self.options = order, tuple(chosen[1])
        self._prepared = jax.jit(self._program.prepare)(*self._inputs)
        self._evaluate = jax.jit(self._program.evaluate)

    def measure(
        self, weights: Mapping[str, str] | None = None, activations: Mapping[str, str] | None = None
    ) -> dict[str, float]:
        """{metric: value} with {site: option}; sites that are not named stay as they were.

        Raises:
          ValueError: an unknown site or option.
        """
        choice = tuple(
            _numbers(kind, sites, options, chosen or {})
            for kind, sites, options, chosen in zip(
                KINDS, self.sites, self.options, (weights, activations), strict=True
            )
        )
        values = self._evaluate(self._inputs[0], self._prepared, choice)
        return {name: float(value) for name, value in jax.device_get(values).items()}

    def sweep(
        self,
        *,
        cache: str | os.PathLike[str] | None = None,
        progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    ) -> Sensitivity:
        """All sites and options one at a time; see `sensitivity`."""
        jobs = [
            (kind, site, option)
            for kind, sites, options in zip(KINDS, self.sites, self.options, strict=True)
            for site in sites
            for option in options
        ]
        done = _kept(cache, self.fingerprint)
        if "base" not in done:
            done["base"] = self.measure()
        for job in progress([job for job in jobs if json.dumps(job) not in done]):
            kind, site, option = job
            done[json.dumps(job)] = self.measure(**{kind: {site: option}})
        result: dict[str, Values] = {kind: {} for kind in KINDS}
        for kind, site, option in jobs:
            result[kind].setdefault(site, {})[option] = done[json.dumps((kind, site, option))]
        return Sensitivity(done["base"], **result)

    def fingerprint(self) -> str:
        """SHA-256 of function, parameters, data and options."""
        nothing = tuple(dict.fromkeys(names, 0) for names in self.sites)
        return fingerprint.of_parts(
            {
                "arrays": fingerprint.of_arrays(self._inputs),
                "prepare": fingerprint.of_function(self._program.prepare, *self._inputs),
                "evaluate": fingerprint.of_function(
                    self._program.evaluate,
                    self._inputs[0],
                    jax.eval_shape(lambda: self._prepared),
                    nothing,
                ),
                "options": repr(self.options),
            }
        )


def _numbers(
    kind: str, sites: tuple[str, ...], options: tuple[str, ...], chosen: Mapping[str, str]
) -> dict[str, int]:
    """0 for what stays, else 1 + the number of the option, for every site."""
    for site, option in chosen.items():
        if site not in sites:
            near = near_misses(site, sites) or list(sites[:3])
            raise ValueError(f"{kind}: there is no site {site!r}; nearest: {', '.join(near)}")
        if option not in options:
            raise ValueError(f"{kind}: site {site!r} has no option {option!r}, but {list(options)}")
    return {site: 1 + options.index(chosen[site]) if site in chosen else 0 for site in sites}


def _check_same(what: str, tree: Any, params: Any) -> None:
    shapes = [{p: jnp.shape(w) for p, w in leaves_with_paths(t)} for t in (tree, params)]
    for path in shapes[0].keys() ^ shapes[1].keys():
        raise ValueError(f"{what}: leaf {path!r} is not in both, the option and the params")
    for path, shape in shapes[1].items():
        if shapes[0][path] != shape:
            raise ValueError(f"{what}: leaf {path!r} must be {shape}, got {shapes[0][path]}")


class _Prepared(NamedTuple):
    views: dict[str, Array]  # [1 + options, *shape] for every site, the weights themselves first
    grids: list[dict[str, Any]]  # one for every option: {tap: Grid}
    batches: Any  # (inputs, outputs as they were, targets), each [batches, ...]


@dataclass(frozen=True)
class _Program:
    apply_fn: Callable[..., Any]
    recipes: dict[str, Compressor]
    order: tuple[str, ...]  # of all options of weights
    activations: dict[str, Format]
    calibrate: Calibrator
    metrics: Mapping[str, Metric]
    names: tuple[list[str], dict[str, tuple[int, ...]]]  # leaves; taps with their scans

    def prepare(self, params: Any, given: dict[str, Any], batches: Any, targets: Any) -> _Prepared:
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
        return _Prepared(
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

    def evaluate(self, params: Any, prepared: _Prepared, choice: Any) -> dict[str, Array]:
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


def _checked(
    batches: Iterable[tuple[Any, ...]], targets: Iterable[Any] | None
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Batches of the same shapes, and the targets of each."""
    listed = tuple(check_batches(batches))
    labels = (None,) * len(listed) if targets is None else tuple(targets)
    if len(labels) != len(listed):
        raise ValueError(f"targets: {len(labels)} for {len(listed)} batches; one for each, please")
    shapes = [jax.tree.map(jnp.shape, both) for both in zip(listed, labels, strict=True)]
    for number, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise ValueError(
                f"batches: number {number} has the shapes {shape}, number 0 {shapes[0]}; all must "
                "be equal, so that one program serves them"
            )
    return listed, labels


def _sites(
    apply_fn: Callable[..., Any], params: Any, first: Any, pattern: str, options: Any
) -> tuple[list[str], dict[str, tuple[int, ...]]]:
    """Leaves that feed contractions, and taps, that match."""
    graph = trace(apply_fn, params, *first)
    try:
        matches = re.compile(pattern).fullmatch
    except re.error as error:
        raise ValueError(f"sites={pattern!r} is not a regular expression: {error}") from error
    named = dict.fromkeys(site.leaf for site in graph.sites if site.leaf is not None)
    leaves = [path for path in named if options[0] and matches(path)]
    taps = {tap.name: tap.site.loops for tap in graph.taps if options[1] and matches(tap.name)}
    if not leaves and not taps:
        near = near_misses(pattern, named) or list(named)[:3]
        raise ValueError(f"sites={pattern!r} matches no contraction; nearest: {', '.join(near)}")
    return leaves, taps


def _kept(cache: Any, identity: Callable[[], str]) -> dict[str, Any]:
    """What was measured before; what is added is in the file at once."""
    if cache is None:
        return {}
    path, mark = Path(cache), identity()
    done = _Kept(path, mark)
    if path.exists():
        found = json.loads(path.read_text())
        if found.get("fingerprint") != mark:
            raise ValueError(
                f"cache {path}: it is of another function, other parameters, data or options; "
                "give another name or delete it"
            )
        done.update(found["values"])
    return done


class _Kept(dict):
    """A dict that is on disk after every assignment."""

    def __init__(self, path: Path, mark: str):
        super().__init__()
        self.path, self.mark = path, mark

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        with replacing(self.path) as file:
            file.write(json.dumps({"fingerprint": self.mark, "values": dict(self)}).encode())
