"""Any choice of options for the sites of a network, measured by one compiled program."""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.core.compressor import Compressor
from jaxcompress.core.files import replacing
from jaxcompress.core.notices import warn
from jaxcompress.core.paths import leaves_with_paths, near_misses
from jaxcompress.formats import Format
from jaxcompress.graph import Graph, fingerprint
from jaxcompress.graph.layers.statistics import check_batches
from jaxcompress.graph.tracing import trace_program
from jaxcompress.graph.unentered import report, silent
from jaxcompress.quantize.ranges.min_max import Calibrator, min_max
from jaxcompress.search.sensitivities.measured import KINDS, Metric, Sensitivity, Values, kl
from jaxcompress.search.sensitivities.programs import Program
from jaxcompress.search.sensitivities.reuse import reuse


class Evaluator:
    """Metrics of a network with any choice of options per site; arguments as `sensitivity`.

    Two programs are compiled, one here and one at the first `measure`. The results of contractions
    as they were are kept, up to 1 GiB, and what a change does not reach is not computed again.

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
        program = trace_program(apply_fn, params, *listed[0])
        report(program.graph.unentered)
        names = _sites(program.graph, sites, chosen)
        recipes = {k: v for k, v in chosen[0].items() if isinstance(v, Compressor)}
        given = {k: v for k, v in chosen[0].items() if k not in recipes}
        for name, tree in given.items():
            _check_same(f"weights[{name!r}]", tree, params)
        order = tuple(chosen[0])
        self._reuse = reuse(program, len(listed))
        self._program = Program(
            apply_fn,
            recipes,
            order,
            chosen[1],
            calibrate or min_max(),
            metrics or {"kl": kl},
            names,
            self._reuse.kept,
        )
        self._inputs = params, given, listed, labels
        self.sites = tuple(names[0]), tuple(names[1])
        self.options = order, tuple(chosen[1])
        with silent():
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
        choice += (self._reuse.stale(weights or (), activations or ()),)
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
        nothing += (self._reuse.stale((), ()),)
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
    graph: Graph, pattern: str, options: Any
) -> tuple[list[str], dict[str, tuple[int, ...]]]:
    """Leaves that feed contractions, and taps, that match."""
    try:
        matches = re.compile(pattern).fullmatch
    except re.error as error:
        raise ValueError(f"sites={pattern!r} is not a regular expression: {error}") from error
    named = dict.fromkeys(weight_leaves(graph))
    leaves = [path for path in named if options[0] and matches(path)]
    found = [tap for tap in graph.taps if tap.is_float and options[1]]
    taps = {tap.name: tap.site.loops for tap in found if matches(tap.name)}
    if not leaves and not taps:
        near = near_misses(pattern, named) or list(named)[:3]
        raise ValueError(f"sites={pattern!r} matches no contraction; nearest: {', '.join(near)}")
    return leaves, taps


def weight_leaves(graph: Graph) -> Iterator[str]:
    """The leaves of floating-point numbers after which contractions are named, in order."""
    for site in graph.sites:
        if site.leaf and jnp.issubdtype(graph.params[site.leaf].dtype, jnp.floating):
            yield site.leaf


def _kept(cache: Any, identity: Callable[[], str]) -> dict[str, Any]:
    """What was measured before; what is added is in the file at once."""
    if cache is None:
        return {}
    try:
        path, mark = Path(cache), identity()
    except fingerprint.Unidentified as error:
        warn(f"cache {cache} is not used: the function or a metric cannot be identified: {error}")
        return {}
    done = _Kept(path, mark)
    if path.exists():
        found = _read(path)
        if found["fingerprint"] != mark:
            raise ValueError(
                f"cache {path}: it is of another function, other parameters, data or options; "
                "give another name or delete it"
            )
        done.update(found["values"])
    return done


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        if found["checksum"] == _checksum(found["fingerprint"], found["values"]):
            return found
        why = "its checksum is wrong"
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        why = f"{type(error).__name__}: {error}"
    raise ValueError(
        f"cache {path}: damaged, or no cache of a search: {why}; delete it to measure again"
    )


def _checksum(mark: str, values: Mapping[str, Any]) -> str:
    return fingerprint.of_parts({mark: json.dumps(values, sort_keys=True)})


class _Kept(dict):
    """A dict that is on disk after every assignment."""

    def __init__(self, path: Path, mark: str):
        super().__init__()
        self.path, self.mark = path, mark

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        with replacing(self.path) as file:
            values = dict(self)
            checksum = _checksum(self.mark, values)
            whole = {"fingerprint": self.mark, "checksum": checksum, "values": values}
            file.write(json.dumps(whole).encode())
