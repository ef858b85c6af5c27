"""Steps in floating point: what the integers must give, written down another way.

Values are numbers of steps from the zero point (codes less it), so zeros are zeros and padding is
padding. Contractions are float32 convolutions and products of the weights' codes, which are exact
while no sum of magnitudes exceeds 2**24; where it might, the weights are split into digits and the
parts added in float64. All else is float64 on the host: biases added, products with multipliers
rounded by their definition.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress.quantize.integer.constants import ADD_HEADROOM, MOVES, Node
from jaxcompress.quantize.integer.integer_steps import convolved, moved, over_windows
from jaxcompress.quantize.integer.requantize import rounded_product

_EXACT = 2**24  # integers up to here are float32


Product = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def rounded_once(acc: np.ndarray, multiplier: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """acc * multiplier * 2**(shift - 31), float64, rounded once to the nearest, ties to even."""
    return np.rint(acc * (multiplier * 2.0 ** (shift.astype(np.float64) - 31)))


def simulate_node(
    node: Node, c: dict[str, np.ndarray], *inputs: np.ndarray, product: Product = rounded_product
) -> np.ndarray:
    """The codes of a step's tensor, in the dtype of its inputs' codes."""
    steps = [
        q.astype(np.float32) - z.astype(np.float32) for q, z in zip(inputs, c["zeros"], strict=True)
    ]
    zero = float(c["zero"])
    if node.kind in MOVES:
        with on_host():
            fill = float(c["fill"]) - zero if "fill" in c else None
            result = np.asarray(_moved(node.bare, steps, fill), np.float64)
    else:
        acc = _accumulator(node, c, steps) + c["bias"].astype(np.float64)
        result = product(acc, c["multiplier"], c["shift"])
    codes = np.clip(result + zero, float(c["low"]), float(c["high"]))
    return codes.astype(inputs[0].dtype)


_moved = jax.jit(moved, static_argnums=0)


def on_host():
    """JAX on the CPU, whose float32 convolutions are plain sums of products."""
    return jax.default_device(jax.local_devices(backend="cpu")[0])


def _accumulator(node: Node, c: dict[str, np.ndarray], steps: list[np.ndarray]) -> np.ndarray:
    if node.kind in ("conv", "dot"):
        return _contracted(node, c["weight"], steps[0])
    wide = [x.astype(np.float64) for x in steps]
    if node.kind == "add":
        pairs = zip(wide, c["multipliers"], c["shifts"], strict=True)
        left, right = (rounded_product(x * 2.0**ADD_HEADROOM, m, s) for x, m, s in pairs)
        return left + right
    if node.kind == "mul":
        acc = wide[0] * wide[1]
    elif node.kind == "sum":
        acc = wide[0].sum(node.get("axes"))
    elif node.kind == "window_sum":
        if node.get("count") * np.abs(steps[0]).max(initial=0) > _EXACT:
            raise ValueError(f"simulate: the windows at {node.scope!r} are too large for float32")
        with on_host():
            acc = np.asarray(over_windows(node, jnp.asarray(steps[0]), 0.0, lax.add), np.float64)
    else:
        acc = wide[0]
    return acc * 2.0 ** node.get("headroom")


def _contracted(node: Node, weight: np.ndarray, x: np.ndarray) -> np.ndarray:
    total = np.zeros((), np.float64)
    with on_host():
        for part, unit in _exact_parts(node, weight, float(np.abs(x).max(initial=0))):
            total = total + unit * np.asarray(_contract(part, x, node=node.bare), np.float64)
    return total


def _exact_parts(node: Node, weight: np.ndarray, peak: float) -> list[tuple[np.ndarray, float]]:
    # weight = sum of unit * part, each part small enough for float32 where |x| <= peak.
    if node.kind == "conv":
        terms = tuple(range(weight.ndim - 1))
    else:
        terms = node.get("dimension_numbers")[0][node.get("side")]
    for bits in (8, 4, 2, 1):
        parts = _digits(weight.astype(np.int32), bits)
        sums = [np.abs(part).sum(terms).max(initial=0) for part, _ in parts]
        if max(sums) * peak <= _EXACT:
            return [(part.astype(np.float32), unit) for part, unit in parts]
    raise ValueError(f"simulate: {node.kind} at {node.scope!r} has too many terms for float32")


def _digits(weight: np.ndarray, bits: int) -> list[tuple[np.ndarray, float]]:
    # Of 8-bit two's complement: digits of so many bits, the last one signed.
    starts = range(0, 8, bits)
    digits = [(weight >> start) & (2**bits - 1) for start in starts[:-1]]
    digits.append(weight >> starts[-1])
    return [(digit, 2.0**start) for digit, start in zip(digits, starts, strict=True)]


@functools.partial(jax.jit, static_argnames="node")
def _contract(weight: Any, x: Any, *, node: Node) -> jax.Array:
    if node.kind == "dot":
        operands = (x, weight) if node.get("side") == 1 else (weight, x)
        numbers = node.get("dimension_numbers")
        return lax.dot_general(*operands, numbers, precision=lax.Precision.HIGHEST)
    return convolved(node, x, weight, precision=lax.Precision.HIGHEST)
