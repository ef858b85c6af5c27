"""A file that was just written, run in its runtime and compared with the function it is made of.

Converters and runtimes are other people's: what they make of a network is not known before it ran.
The bound is derived, not chosen: `rounded.with_rounding` computes the function `RUNS` times with
every rounding moved at random by no more than it may be off. Each output may differ by twice the
largest difference that these runs show over that output, one step of its grid, and 8 eps of its
largest number. A kernel that is shifted or left out, a zero point that is missing, a wrong shape
move results by a share of their size and are found; a single tie is not taken for a fault.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.export.perturbed import with_rounding
from jaxcompress.quantize.integer.integer_program import IntegerProgram

RUNS = 4
"""Computations with random roundings."""

_NOISE = 65_537  # random numbers of a run, which all its operations share
# It runs five times: compiling it takes longer.
_QUICK: Any = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class Verified(NamedTuple):
    """What the run of a file showed.

    Attributes:
      largest_difference: from the function, over all numbers of all outputs; None: it did not run.
      bound: what rounding explains at the output of the largest difference; None likewise.
      reason: why the file did not run, or where it ran instead; "" otherwise.
    """

    largest_difference: float | None
    bound: float | None
    reason: str = ""


def unverified(reason: str) -> Verified:
    """Of a file that did not run."""
    return Verified(None, None, reason)


def example_inputs(inputs: Any, examples: Any, *, where: str, seed: int = 0) -> tuple[Any, ...]:
    """Arrays on which to run a network.

    Args:
      inputs: tuple of pytrees: arrays, or `jax.ShapeDtypeStruct`s.
      examples: the same with arrays, or None: `inputs` where they are arrays that vary; numbers of
        a standard normal distribution for others, and 0, 1, 0, 1, ... for integers and booleans.
      where: the exporter, for errors.

    Raises:
      ValueError: examples of another structure, shape or dtype.
    """
    if examples is not None:
        examples = examples if isinstance(examples, tuple | list) else (examples,)
        given, asked = (jax.tree.leaves(tuple(tree)) for tree in (examples, inputs))
        kind = lambda x: (tuple(np.shape(x)), np.dtype(x.dtype))
        if list(map(kind, given)) != list(map(kind, asked)):
            raise ValueError(
                f"{where}(examples): must be {[kind(x) for x in asked]} like the inputs, got "
                f"{[kind(x) for x in given]}"
            )
        return jax.tree.map(np.asarray, tuple(examples))
    rng = np.random.default_rng(seed)

    def one(x: Any) -> np.ndarray:
        if not isinstance(x, jax.ShapeDtypeStruct) and np.size(x):
            array = np.asarray(x)
            if (array != array.flat[0]).any():
                return array
        if jnp.issubdtype(x.dtype, jnp.floating):
            return np.asarray(rng.standard_normal(x.shape), x.dtype)
        if isinstance(x, jax.ShapeDtypeStruct):
            return (np.arange(int(np.prod(x.shape))) % 2).reshape(x.shape).astype(x.dtype)
        return np.asarray(x)

    return jax.tree.map(one, tuple(inputs))


def drawn_input(program: IntegerProgram, shape: Sequence[int]) -> np.ndarray:
    """Numbers all over the grid of a program's input, float32 of this shape."""
    grid: Any = program.grids[0]
    zero = 0 if grid.format.symmetric else int(np.asarray(grid.qparams.zero_point).reshape(()))
    low, high = ((code - zero) * float(grid.qparams.scale) for code in grid.format.bounds)
    return np.random.default_rng(0).uniform(low, high, tuple(shape)).astype(np.float32)


def verified(
    run: Callable[..., Sequence[Any]],
    fn: Callable[..., Any],
    params: Any,
    inputs: Sequence[Any],
    *,
    where: str,
    operands: float = 0.0,
) -> Verified:
    """Compares what a file gives with what a function gives.

    Args:
      run: inputs -> the outputs of the file, in the order of the leaves of the function's result.
      fn: pure, (params, *inputs) -> pytree of arrays.
      params: pytree of arrays, as they are in the file.
      inputs: arrays, pytrees of them too; `run` gets their leaves.
      where: the exporter, for errors.
      operands: see `with_rounding`.

    Raises:
      ValueError: another number of outputs, another shape or dtype, or numbers that differ by more
        than rounding.
    """
    found = [np.asarray(y) for y in run(*jax.tree.leaves(inputs))]
    known, bounds = _bounds(fn, params, inputs, operands)
    if len(found) != len(known):
        raise _differs(where, f"has {len(found)} outputs, the function {len(known)}")
    largest = Verified(0.0, 0.0)
    for number, (y, want, bound) in enumerate(zip(found, known, bounds, strict=True)):
        if (y.shape, y.dtype) != (want.shape, want.dtype):
            raise _differs(
                where,
                f"gives {y.dtype}{list(y.shape)} as output {number}, the function "
                f"{want.dtype}{list(want.shape)}",
            )
        apart = _largest(y, want)
        if not apart <= bound:
            size = np.abs(np.asarray(want, np.float64)).max(initial=0.0)
            raise _differs(
                where,
                f"differs from the function by {apart:.3g} in output {number}, whose largest "
                f"number is {size:.3g}; rounding explains {bound:.3g}",
            )
        if largest.largest_difference is None or apart >= largest.largest_difference:
            largest = Verified(apart, bound)
    return largest


def _differs(where: str, what: str) -> ValueError:
    return ValueError(
        f"{where}: the file that was written {what}; it was removed. Compute the layer otherwise, "
        "give inputs like those it will meet (examples=), or keep such a file by verify=False"
    )


def _bounds(
    fn: Callable[..., Any], params: Any, inputs: Sequence[Any], operands: float
) -> tuple[list[np.ndarray], list[float]]:
    steps: list[float] = []

    def moved(noise: Any, *arguments: Any) -> Any:
        results, found = with_rounding(fn, operands=operands)(noise, *arguments)
        steps[:] = found
        return results

    rng = np.random.default_rng(0)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        compiled = jax.jit(moved, compiler_options=_QUICK)
        nothing = np.zeros(_NOISE, np.float32)
        known = [np.asarray(y) for y in compiled(nothing, params, *inputs)]
        spread = [0.0] * len(known)
        for _ in range(RUNS):
            noise = rng.uniform(-1, 1, _NOISE).astype(np.float32)
            run = compiled(noise, params, *inputs)
            spread = [max(s, _largest(y, w)) for s, y, w in zip(spread, run, known, strict=True)]
    return known, [
        2 * apart + step + _last_bits(want)
        for apart, step, want in zip(spread, steps, known, strict=True)
    ]


def _last_bits(y: np.ndarray) -> float:
    if not jnp.issubdtype(y.dtype, jnp.floating):
        return 0.0
    numbers = np.abs(np.asarray(y, np.float64))
    return 8 * float(jnp.finfo(y.dtype).eps) * float(numbers[np.isfinite(numbers)].max(initial=0.0))


def _largest(a: Any, b: Any) -> float:
    # The largest difference; the same infinities and NaN in the same places are none.
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        return float(np.where(same, 0.0, np.nan_to_num(np.abs(a - b), nan=np.inf)).max(initial=0.0))
