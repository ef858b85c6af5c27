"""Sparsity as a function of the step, and the steps at which masks change."""

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
class Cubic:
    """The schedule of `cubic`."""

    initial: Any
    final: Any
    start: int
    end: int
    every: int

    def __call__(self, step: Array) -> Array:
        # s_t = s_f + (s_i - s_f) * (1 - clip((t - t_0) / T, 0, 1))^3
        span = max(self.end - self.start, 1)
        done = jnp.clip((jnp.asarray(step) - self.start).astype(jnp.float32) / span, 0.0, 1.0)
        initial, final = (jnp.asarray(s, jnp.float32) for s in (self.initial, self.final))
        ramp = final + (initial - final) * (1.0 - done) ** 3
        # The end point is exact, whatever the arithmetic of the ramp rounds to.
        return jnp.where(jnp.asarray(step) >= self.end, final, ramp)

    def fires(self, step: Array) -> Array:
        since = jnp.asarray(step) - self.start
        regular = (since % self.every == 0) & (since >= 0) & (step <= self.end)
        return regular | (step == self.end)


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


def cubic(initial: float, final: float, *, start: int = 0, end: int, every: int = 1) -> Cubic:
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
    for name, value in (("initial", initial), ("final", final)):
        check_sparsity(name, value)
    if end < start or every < 1:
        raise ValueError(f"cubic needs start <= end and every >= 1, got {start=}, {end=}, {every=}")
    return Cubic(initial, final, start, end, every)


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
