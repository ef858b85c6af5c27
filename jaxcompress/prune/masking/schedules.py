"""Sparsity as a function of the step, and the steps at which masks change."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer


class SparsitySchedule(Protocol):
    """step (int32, traced) -> sparsity (float32), and whether masks are renewed at that step."""

    def __call__(self, step: Array) -> Array: ...
    def fires(self, step: Array) -> Array: ...


@dataclass(frozen=True)
class Ramp:
    """A schedule from one sparsity to another: that of `cubic`, `linear` and `exponential`.

    Masks are renewed at start, start + every, ... and always at end.
    """

    curve: Callable[[Array, Array, Array], Array]  # (initial, final, share of the way) -> sparsity
    initial: Any
    final: Any
    start: int
    end: int
    every: int

    def __call__(self, step: Array) -> Array:
        span = max(self.end - self.start, 1)
        done = jnp.clip((jnp.asarray(step) - self.start).astype(jnp.float32) / span, 0.0, 1.0)
        initial, final = (jnp.asarray(s, jnp.float32) for s in (self.initial, self.final))
        ramp = self.curve(initial, final, done)
        # The ends are exact, whatever the arithmetic of the curve rounds to.
        ramp = jnp.where(jnp.asarray(step) <= self.start, initial, ramp)
        return jnp.where(jnp.asarray(step) >= self.end, final, ramp)

    def fires(self, step: Array) -> Array:
        since = jnp.asarray(step) - self.start
        regular = (since % self.every == 0) & (since >= 0) & (step <= self.end)
        return regular | (step == self.end)


@dataclass(frozen=True)
class OneShot:
    """The schedule of `one_shot`."""

    final: Any
    at: int

    def __call__(self, step: Array) -> Array:
        zero = jnp.zeros((), jnp.float32)
        return jnp.where(jnp.asarray(step) >= self.at, jnp.asarray(self.final, jnp.float32), zero)

    def fires(self, step: Array) -> Array:
        return jnp.asarray(step) == self.at


@dataclass(frozen=True)
class Constant:
    """One sparsity from the first step on; masks are renewed at every `update`."""

    sparsity: Any

    def __call__(self, step: Array) -> Array:
        del step
        return jnp.asarray(self.sparsity, jnp.float32)

    def fires(self, step: Array) -> Array:
        del step
        return jnp.ones((), bool)


@dataclass(frozen=True)
class _Wrapped:
    # Any Optax schedule: it has no end that we could know, so it fires at every step.
    function: Any

    def __call__(self, step: Array) -> Array:
        return jnp.asarray(self.function(step), jnp.float32)

    fires = Constant.fires


def cubic(initial: float, final: float, *, start: int = 0, end: int, every: int = 1) -> Ramp:
    """Gradual pruning: fast at first, slower as less is left; exact at both ends.

    Masks change at start, start + every, ... and always at end.

    Args:
      initial, final: sparsity, the share of zeros, in [0, 1]; may be traced.
      start, end: steps.
      every: steps between two changes of the masks.

    Raises:
      ValueError: a sparsity outside [0, 1], end before start, every below 1.

    Source: Zhu and Gupta 2017, To prune, or not to prune, arXiv 1710.01878, eq. 1.

    >>> schedule = cubic(0.0, 0.8, start=100, end=200)
    >>> [round(float(schedule(t)), 3) for t in (0, 100, 150, 200, 900)]
    [0.0, 0.0, 0.7, 0.8, 0.8]
    """
    return _ramp("cubic", _cubic, initial, final, start, end, every)


def _cubic(initial: Array, final: Array, done: Array) -> Array:
    # s_t = s_f + (s_i - s_f) * (1 - clip((t - t_0) / T, 0, 1))^3
    return final + (initial - final) * (1.0 - done) ** 3


def linear(initial: float, final: float, *, start: int = 0, end: int, every: int = 1) -> Ramp:
    """The same number of weights at every change: s_t = s_i + (s_f - s_i) (t - t_0) / T.

    Arguments, firing and errors as of `cubic`.

    >>> schedule = linear(0.0, 0.8, end=100)
    >>> [round(float(schedule(t)), 3) for t in (0, 25, 50, 100)]
    [0.0, 0.2, 0.4, 0.8]
    """
    return _ramp("linear", _linear, initial, final, start, end, every)


def _linear(initial: Array, final: Array, done: Array) -> Array:
    return initial + (final - initial) * done


def exponential(initial: float, final: float, *, start: int = 0, end: int, every: int = 1) -> Ramp:
    """The same share of what is left at every change: densities 1 - s fall geometrically.

    From 0, s_t = 1 - d^(t / T) with d = 1 - s_f: what iterative pruning in rounds does. Arguments,
    firing and errors as of `cubic`, and neither sparsity may be 1, which no share of what is left
    ever reaches.

    >>> schedule = exponential(0.0, 0.75, end=100)
    >>> [round(float(schedule(t)), 3) for t in (0, 50, 100)]
    [0.0, 0.5, 0.75]
    """
    for name, value in (("initial", initial), ("final", final)):
        if isinstance(value, int | float | np.number) and value == 1:
            raise ValueError(f"exponential needs a density above 0 at both ends, got {name}=1")
    return _ramp("exponential", _exponential, initial, final, start, end, every)


def _exponential(initial: Array, final: Array, done: Array) -> Array:
    # 1 - s_t = d_i * (d_f / d_i)^((t - t_0) / T)
    return 1.0 - (1.0 - initial) * ((1.0 - final) / (1.0 - initial)) ** done


def one_shot(sparsity: float, *, at: int = 0) -> OneShot:
    """Nothing is pruned before step `at`, the share `sparsity` from then on.

    Masks are renewed at that step only, so that they stay as they are afterwards; for 0 this is
    `init`. What a criterion gathers over the steps before counts.

    Args:
      sparsity: in [0, 1]; may be traced.
      at: step, not negative.

    Raises:
      ValueError: a sparsity outside [0, 1], a negative step.

    >>> schedule = one_shot(0.5, at=3)
    >>> [(float(schedule(t)), bool(schedule.fires(t))) for t in (2, 3, 4)]
    [(0.0, False), (0.5, True), (0.5, False)]
    """
    check_sparsity("sparsity", sparsity)
    if at < 0:
        raise ValueError(f"one_shot needs a step at >= 0, got {at=}")
    return OneShot(sparsity, at)


def constant(sparsity: float) -> Constant:
    """One sparsity from the first step on; masks are renewed at every `update`.

    So the masks follow the weights; for masks that stay see `one_shot`.

    Args:
      sparsity: in [0, 1]; may be traced.

    Raises:
      ValueError: a sparsity outside [0, 1].

    >>> float(constant(0.5)(7)), bool(constant(0.5).fires(7))
    (0.5, True)
    """
    check_sparsity("sparsity", sparsity)
    return Constant(sparsity)


def _ramp(name: str, curve: Any, initial: Any, final: Any, start: int, end: int, every: int):
    check_sparsity("initial", initial)
    check_sparsity("final", final)
    if end < start or every < 1:
        raise ValueError(
            f"{name} needs start <= end and every >= 1, got {start=}, {end=}, {every=}"
        )
    return Ramp(curve, initial, final, start, end, every)


def check_sparsity(name: str, value: Any) -> None:
    """Raises ValueError for a number outside [0, 1], unless it is traced."""
    if hasattr(value, "dtype") and (isinstance(value, Tracer) or value.ndim):
        return
    if not 0.0 <= float(value) <= 1.0:
        raise ValueError(f"{name} must be a share of zeros in [0, 1], got {value}")


def as_schedule(sparsity: Any) -> SparsitySchedule:
    """A schedule from a number, an Optax schedule or a schedule."""
    if hasattr(sparsity, "fires"):
        return sparsity
    if callable(sparsity):
        return _Wrapped(sparsity)
    if isinstance(sparsity, np.number):
        sparsity = float(sparsity)
    if not (isinstance(sparsity, int | float) or hasattr(sparsity, "dtype")):
        raise TypeError(
            f"sparsity must be a number, a schedule or step -> number, got {sparsity!r}"
        )
    check_sparsity("sparsity", sparsity)
    return Constant(sparsity)
