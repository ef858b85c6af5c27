"""One row times a matrix in JAX on CPU: int8 and packed int4 weights beside float32.

Command   python -m experiments.benchmarks.matmul --json
Device    CPU, 2 cores, 2 GB of memory, two minutes
Result    experiments/results/matmul.json (beside other jobs on the same cores: ratios count)

`float32_s` is the plain x @ w with w [in, out] as Flax stores it, `float32_out_in_s` the same with
w [out, in], the best layout of float32 found; both take w as an argument. W8A8 and W4A8 are
`jaxcompress.quantize.fast_matmul`, which rounds x as well. All calls take turns, so that each
finds the caches full of others' matrices. `stack_` is one pass over several matrices.

The limit of each is the time to read its bytes, at the speed of a sum over 256 MiB in the same
rounds or, where that is faster, of the fastest product here.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from experiments._report import Options, Report, run
from jaxcompress.core.pytrees import packed_bytes
from jaxcompress.cost.timing.clock import interleaved
from jaxcompress.quantize import fast_matmul, fast_matrix


@dataclasses.dataclass(frozen=True)
class Args(Options):
    size: int = 4096
    """Rows and columns of the matrix."""
    rows: int = 1
    """Rows of the input."""
    stack: int = 6
    """Matrices of a pass over several."""
    repeats: int = 51
    """Rounds of timing; the median counts."""


def out_in(x: Array, w: Array) -> Array:
    """x [rows, in] times w [out, in]."""
    return lax.dot_general(x, w, (((1,), (1,)), ((), ())))


KINDS: dict[str, tuple[Callable, Callable]] = {
    "float32": (lambda w: w, jnp.matmul),
    "float32_out_in": (lambda w: w.T.copy(), out_in),
    "w8a8": (lambda w: fast_matrix(w, bits=8), fast_matmul),
    "w4a8": (lambda w: fast_matrix(w, bits=4), fast_matmul),
    "w4a8_g512": (lambda w: fast_matrix(w, bits=4, group=512), fast_matmul),
    "w4a8_g128": (lambda w: fast_matrix(w, bits=4, group=128), fast_matmul),
}


def time_all(args: Args, x: Array, stored: dict[str, list[Any]]) -> tuple[dict[str, float], float]:
    """Seconds of one product of each kind, and bytes per second of a sum."""
    large = jnp.ones((4 if args.short else 256) << 18, jnp.float32)
    total = jax.jit(jnp.sum)

    def call(name: str) -> Callable[[], Any]:
        product = jax.jit(KINDS[name][1])
        return lambda: [product(x, matrix) for matrix in stored[name]]

    calls = {name: call(name) for name in stored}
    repeats = 2 if args.short else args.repeats
    taken = interleaved({**calls, "": lambda: total(large)}, repeats=repeats)
    speed = large.nbytes / taken.pop("")
    return {name: t / len(stored[name]) for name, t in taken.items()}, speed


def figures_of(
    args: Args, report: Report, x: Array, stored: dict[str, list[Any]]
) -> dict[str, float]:
    taken, speed = time_all(args, x, stored)
    sizes = {name: packed_bytes(matrices[0]) for name, matrices in stored.items()}
    speed = max(speed, *(sizes[name] / t for name, t in taken.items()))
    figures, table = {"memory_gb_per_s": speed / 1e9}, []
    for name, t in taken.items():
        limit, ratio = sizes[name] / speed, taken["float32"] / t
        figures[f"{name}_s"], figures[f"limit_{name}_s"] = t, limit
        if not name.startswith("float32"):
            figures[f"jax_{name}_speedup"] = ratio
            figures[f"jax_{name}_over_best_float32"] = (
                min(taken["float32"], taken["float32_out_in"]) / t
            )
        table.append((name, 1e3 * t, 1e3 * limit, ratio))
    title = f"{args.rows} x {args.size} times {args.size} x {args.size}, "
    title += f"{len(stored['float32'])} matrices"
    report.table(title, ("weights", "ms", "limit, ms", "times float32's speed"), table)
    return figures


def main(args: Args, report: Report) -> dict[str, float]:
    if args.short:
        args = dataclasses.replace(args, size=512, stack=2)
    if min(args.rows, args.stack, args.repeats) < 1 or args.size < 512 or args.size % 512:
        raise ValueError("--size must be a multiple of 512; --rows, --stack, --repeats positive")
    keys = jax.random.split(jax.random.key(args.seed), args.stack + 1)
    x = jax.random.normal(keys[0], (args.rows, args.size))
    stored: dict[str, list[Any]] = {name: [] for name in KINDS}
    for key in report.progress(keys[1:], "packing"):
        w = jax.random.normal(key, (args.size, args.size))
        for name, (store, _) in KINDS.items():
            stored[name].append(jax.block_until_ready(store(w)))
    figures = figures_of(args, report, x, {name: made[:1] for name, made in stored.items()})
    stack = figures_of(args, report, x, stored)
    exact = jnp.matmul(x, stored["float32"][0], precision="highest")
    for name in ("w8a8", "w4a8", "w4a8_g128"):
        error = fast_matmul(x, stored[name][0]) - exact
        figures[f"{name}_relative_error"] = float(jnp.linalg.norm(error) / jnp.linalg.norm(exact))
    return figures | {f"stack_{key}": value for key, value in stack.items()}


if __name__ == "__main__":
    run(main, "matmul")
