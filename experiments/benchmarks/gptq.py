"""How fast is GPTQ, and how fast could it be?

Command   python -m experiments.benchmarks.gptq --json
Result    experiments/results/gptq_benchmark.json

One dense layer with int4 weights in groups of 32: 512 x 512 (first call, compilation included, and
later calls), and 4096 x 4096. The physical limit is the arithmetic: X^T X, a Cholesky factor
(K^3 / 3 multiply-accumulates), its inverse (K^3 / 2), the updates (K^2 N / 2) and two errors that
are compared (2 K^2 N), at the speed of a matrix product in the same run.
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp

import jaxcompress as jc
from experiments._report import Options, Report, run
from jaxcompress.cost.timing.clock import interleaved
from jaxcompress.quantize import Spec


@dataclasses.dataclass(frozen=True)
class Args(Options):
    """Options."""

    size: int = 512
    """Inputs and outputs of the small layer."""
    large: int = 4096
    """Those of the large one; 0: none."""
    repeats: int = 7
    """Rounds of timing of the small layer; the median counts."""


def problem(size: int, seed: int) -> tuple[dict[str, jax.Array], jax.Array]:
    """A layer, and twice as many rows of correlated inputs as it has inputs."""
    w, x, mix = (
        jax.random.normal(key, shape)
        for key, shape in zip(
            jax.random.split(jax.random.key(seed), 3),
            ((size, size), (2 * size, size), (size, size)),
            strict=True,
        )
    )
    return {"w": w / size**0.5}, x + 0.5 * (x @ mix) / size**0.5


def layer(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """y = x w."""
    return x @ params["w"]


SPEC = {"w": Spec(jc.formats.integer(4), group=32)}


def quantized(params: dict[str, jax.Array], x: jax.Array) -> Any:
    """The rounded weights."""
    return jc.quantize.gptq(layer, params, [(x,)], SPEC)[0]


def error(params: Any, found: Any, x: jax.Array) -> float:
    """Squared error of the outputs over their power."""
    delta = layer(found, x) - layer(params, x)
    return float(jnp.sum(delta**2) / jnp.sum(layer(params, x) ** 2))


def macs(size: int) -> float:
    """Multiply-accumulates that the method needs, K = N = size and 2 K rows."""
    return size**3 * (2 + 1 / 3 + 1 / 2 + 1 / 2 + 2)


def main(args: Args, report: Report) -> dict[str, Any]:
    """Times both layers."""
    size, large = (64, 0) if args.short else (args.size, args.large)
    params, x = problem(size, args.seed)
    start = time.perf_counter()
    found = jax.block_until_ready(quantized(params, x))
    first_s = time.perf_counter() - start
    square = jnp.ones((1024, 1024))
    product = jax.jit(lambda a: a @ a)
    calls = {"gptq": lambda: quantized(params, x), "product": lambda: product(square)}
    steady = interleaved(calls, repeats=1 if args.short else args.repeats)
    per_s = 1024**3 / steady["product"]
    nearest = jc.quantize.recipe(SPEC)
    rounded = nearest.apply(params, nearest.init(params))
    figures = {
        "first_call_s": first_s,
        "steady_s": steady["gptq"],
        "steady_limit_s": macs(size) / per_s,
        "matmul_gmac_per_s": per_s / 1e9,
        "error_over_nearest": error(params, found, x) / error(params, rounded, x),
    }
    if large:
        params, x = problem(large, args.seed)
        start = time.perf_counter()
        jax.block_until_ready(quantized(params, x))
        figures["large_s"] = time.perf_counter() - start
        figures["large_limit_s"] = macs(large) / per_s
    rows = [(name, value) for name, value in figures.items()]
    report.table(f"GPTQ, int4 in groups of 32, {size} and {large}", ("figure", "value"), rows)
    return figures


if __name__ == "__main__":
    run(main, "gptq_benchmark")
