"""Which student? Members of a family that fit a device, ordered by a cheap proxy."""

import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jaxcompress.core.compressor import Compressor
from jaxcompress.cost.count import stored
from jaxcompress.cost.device_model import Device
from jaxcompress.cost.estimation import estimate
from jaxcompress.cost.result import Cost
from jaxcompress.search.problem import Budget, within

_PRECISION = 2.6745  # bits; gamma_w of Kumar et al.


@dataclass(frozen=True)
class Student:
    """A member of a family, compressed but not trained.

    Attributes:
      options: what it was built from, one value for each name.
      apply_fn, params: the function and its parameters, not compressed.
      recipe: its Compressor; None if there is none.
      packed: what ships, from the untrained parameters: its bytes are those of the trained ones.
      cost: of `packed` on the device.
      proxy: the larger, the better it should become.
      score: what `train_students` measured; None before.
    """

    options: Mapping[str, Any]
    apply_fn: Callable[..., Any] = field(repr=False)
    params: Any = field(repr=False)
    recipe: Compressor | None = field(repr=False)
    packed: Any = field(repr=False)
    cost: Cost = field(repr=False)
    proxy: float = 0.0
    score: float | None = None


def effective_parameters(student: Student) -> float:
    """sum_i n_i density_i (1 - exp(-bits_i / 2.6745)): weights that count, of all leaves.

    Densities are those of the storage: a leaf that ships dense counts as dense.
    The default proxy: needs no data and no gradient, like parameter counts, which rank networks of
    one family about as well as scores that do. Its constant is that of language models.

    Source: Kumar et al. 2024, Scaling laws for precision, arXiv 2411.04330, section 3 (weights in
    training at low precision; constant recalled); densities by us.
    """
    return sum(
        leaf.size * leaf.density * -math.expm1(-leaf.bits / _PRECISION)
        for leaf in stored(student.packed).values()
    )


def students(
    build: Callable[..., tuple[Callable[..., Any], Any]],
    options: Mapping[str, Sequence[Any]],
    *inputs: Any,
    device: "str | Device",
    budget: Budget | None = None,
    recipe: Callable[..., Compressor] | None = None,
    activations: Any = None,
    proxy: Callable[[Student], float] = effective_parameters,
    most: int | None = None,
) -> tuple[Student, ...]:
    """All students of a family that a device can hold, the most promising first.

    Every combination of the options is built, compressed and costed; those that do not fit the
    memories of the device or exceed the budget are left out. Nothing is trained: see
    `train_students`.

    Args:
      build: (**options) -> (apply_fn, params); takes those of the options that it names as
        arguments, and is called once for each combination of these.
      options: {name: values}, "width" and "bits" say.
      *inputs: as the device will see them, one image say; arrays or `jax.ShapeDtypeStruct`s.
      device: as `cost.estimate`.
      budget: limits beyond the device's memories: `weight_bytes`, `peak_bytes`, `latency_s`,
        `energy_j`, `macs` of one call, or any other number of `cost.Cost` in `others`.
      recipe: (**options) -> Compressor, with its final bits and zeros (`prune.one_shot`, not a
        schedule that starts dense); None: as built.
      activations: as `cost.estimate`; or a function (**options) of those.
      proxy: Student -> float, the larger the better.
      most: return no more than so many.

    Raises:
      ValueError: an option without values or that neither `build` nor `recipe` nor `activations`
        takes; a budget that names no cost; nothing fits: the message names the nearest miss.

    >>> import jax, jax.numpy as jnp
    >>> from jaxcompress.formats import integer
    >>> from jaxcompress.quantize import weights
    >>> def build(width):
    ...     params = {"in": jnp.ones((64, width)), "out": jnp.ones((width, 10))}
    ...     return lambda p, x: jax.nn.relu(x @ p["in"]) @ p["out"], params
    >>> found = students(
    ...     build, {"width": (16, 32, 64), "bits": (2, 4, 8)}, jnp.ones((1, 64)),
    ...     device="stm32l4r5", budget=Budget(weight_bytes=1400), activations=8,
    ...     recipe=lambda bits: weights(integer(bits), axis=-1),
    ... )
    >>> [(s.options["width"], s.options["bits"], s.cost.weight_bytes) for s in found]
    [(32, 4, 1352), (32, 2, 760), (16, 8, 1288), (16, 4, 696), (16, 2, 400)]
    """
    budget = budget or Budget()
    _check(options, build=build, recipe=recipe, activations=activations)
    built: dict[tuple[Any, ...], tuple[Any, Any]] = {}
    fitting: list[Student] = []
    misses: list[tuple[float, str]] = []
    for values in itertools.product(*options.values()):
        chosen = dict(zip(options, values, strict=True))
        own = _taken(build, chosen)
        key = tuple(own.values())
        if key not in built:
            built[key] = build(**own)
        student = _student(chosen, built[key], inputs, device, recipe, activations)
        excess = _excess(student.cost, budget)
        if excess:
            misses.append(max(excess))
        else:
            fitting.append(replace(student, proxy=float(proxy(student))))
    if not fitting:
        raise ValueError(f"none of {len(misses)} students fits; the nearest: {min(misses)[1]}")
    # Smaller ones first among equals.
    fitting.sort(key=lambda student: (-student.proxy, student.cost.weight_bytes))
    return tuple(fitting[:most])


def train_students(
    candidates: Iterable[Student],
    train: Callable[[Student], float],
    *,
    progress: Callable[[Iterable[Student]], Iterable[Student]] = iter,
) -> tuple[Student, ...]:
    """The students with their scores, the best first.

    Args:
      candidates: what `students` gives, the first few.
      train: Student -> a score, the larger the better: accuracy after some steps of `train.fit`.
      progress: wraps the students, `rich.progress.track` say.

    Raises:
      ValueError: no students, or a score that is NaN.
    """
    done = [replace(student, score=float(train(student))) for student in progress(candidates)]
    if not done:
        raise ValueError("candidates: there are no students")
    for student in done:
        if math.isnan(_score(student)):
            raise ValueError(f"train: the score of student {dict(student.options)} is NaN")
    return tuple(sorted(done, key=_score, reverse=True))


def _score(student: Student) -> float:
    assert student.score is not None
    return student.score


def _student(
    chosen: dict[str, Any],
    built: tuple[Any, Any],
    inputs: tuple[Any, ...],
    device: "str | Device",
    recipe: Callable[..., Compressor] | None,
    activations: Any,
) -> Student:
    apply_fn, params = built
    compressor, packed = None, params
    if recipe is not None:
        compressor = recipe(**_taken(recipe, chosen))
        packed = compressor.pack(params, compressor.update(params, compressor.init(params)))
    if callable(activations):
        activations = activations(**_taken(activations, chosen))
    cost = estimate(apply_fn, packed, *inputs, device=device, activations=activations)
    return Student(chosen, apply_fn, params, compressor, packed, cost)


def _excess(cost: Cost, budget: Budget) -> list[tuple[float, str]]:
    """What is exceeded: (ratio to its limit, in words)."""
    fit = cost.fits()
    used: dict[str, tuple[float, float]] = {
        name: (fit.used[name], fit.capacity[name]) for name in fit.used
    }
    for name, limit in budget.limits.items():
        value = getattr(cost, name, None)
        if not isinstance(value, int | float):
            raise ValueError(f"budget: {name!r} is no number of a cost.Cost")
        used[name] = value, limit
    return [
        (value / limit if limit else math.inf, f"{name} {value:,.6g}, at most {limit:,.6g}")
        for name, (value, limit) in used.items()
        if not within(value, limit)
    ]


def _names(function: Callable[..., Any], options: Iterable[str]) -> list[str]:
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return list(options)
    return [name for name in options if name in parameters]


def _taken(function: Callable[..., Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    return {name: chosen[name] for name in _names(function, chosen)}


def _check(options: Mapping[str, Sequence[Any]], **functions: Any) -> None:
    for name, values in options.items():
        if not len(values):
            raise ValueError(f"options: {name!r} has no values")
    taken = {n for f in functions.values() if callable(f) for n in _names(f, options)}
    for name in options:
        if name not in taken:
            raise ValueError(f"options: none of {', '.join(functions)} takes {name!r}")
