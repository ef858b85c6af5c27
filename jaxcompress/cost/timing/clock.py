"""Fair timing of several functions on a machine whose speed drifts."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def interleaved(
    functions: Mapping[str, Callable[[], Any]], *, repeats: int = 5
) -> dict[str, float]:
    """Median seconds of one call of each function.

    All run once in each round, and each round starts with another one, so that a slow minute
    falls on all alike. One call of each before the clock starts pays for compilation. A call ends
    when its result is there (`jax.block_until_ready`).

    Raises:
      ValueError: no functions, or `repeats` below 1.

    >>> medians = interleaved({"sleep": lambda: time.sleep(0.01), "none": lambda: None}, repeats=3)
    >>> medians["sleep"] > medians["none"] > 0
    True
    """
    if not functions or repeats < 1:
        raise ValueError(f"need functions and repeats >= 1, got {list(functions)}, {repeats=}")
    for call in functions.values():
        jax.block_until_ready(call())
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for first in range(repeats):
        for offset in range(len(names)):
            name = names[(first + offset) % len(names)]
            start = time.perf_counter()
            jax.block_until_ready(functions[name]())
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in seconds.items()}
