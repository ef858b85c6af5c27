"""The trace of a network with packed weights, and what is known of it before it runs."""

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.packed import is_packed, unpack
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.core.sharding.meshes import traced_anywhere
from jaxcompress.export.marks import FAKE_QUANT
from jaxcompress.export.onnx_format.constants.codes import Codes, joined, of_leaf, of_mark
from jaxcompress.export.onnx_format.constants.stored import Opened, Stored, opened
from jaxcompress.export.onnx_format.onnx_elementwise import lowering
from jaxcompress.export.onnx_format.onnx_lowering import Lowering
from jaxcompress.export.onnx_format.symbolic_sizes import is_static
from jaxcompress.graph import compat
from jaxcompress.graph.equations import Equation, Flattener, needed, unrolled
from jaxcompress.graph.primitives.movement import moved
from jaxcompress.graph.primitives.table import row

LONGEST_SCAN = 64
"""Trips of the longest loop that is unrolled."""
_CONVERT = "convert_element_type"


class Trace(NamedTuple):
    """A network as equations, with its ports."""

    flattener: Flattener
    equations: tuple[Equation, ...]
    inputs: list[tuple[str, int, Any]]  # name, value, aval
    outputs: list[tuple[str, int]]
    uses: Mapping[int, int]


def trace(
    apply_fn: Callable[..., Any],
    params: Any,
    inputs: tuple[Any, ...],
    shapes: Any,
    constraints: Sequence[str],
) -> Trace:
    """Traces `apply_fn(params, *inputs)`; what depends on no input is computed.

    Codes of packed leaves stay codes through views.
    """
    leaves = leaves_with_paths(params, is_leaf=is_packed)
    plain = jax.eval_shape(unpack, params)
    specs = _specs(inputs, shapes, constraints)
    closed, out = _traced(apply_fn, plain, specs, shapes)
    closed = compat.without_dead_code(closed)
    flattener = Flattener(_expand)
    arguments = [flattener.value(v.aval) for v in closed.jaxpr.invars]
    flattener.known.update(zip(arguments, (of_leaf(x, n) for n, x in leaves), strict=False))
    results = flattener.run(compat.body(closed), arguments, "")
    live = flattener.split(_evaluate)
    equations, uses = needed(live, results)
    uses = Counter(uses)
    rest = arguments[len(leaves) :]
    names = _input_names(apply_fn, inputs)
    ins = [(n, k, flattener.avals[k]) for n, k in zip(names, rest, strict=True)]
    outs = [path.replace("/", ".") or "output" for path, _ in leaves_with_paths(out)]
    return Trace(flattener, equations, ins, list(zip(outs, results, strict=True)), uses)


def _specs(inputs: tuple[Any, ...], shapes: Any, constraints: Sequence[str]) -> tuple[Any, ...]:
    arrays = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), inputs)
    if shapes is None:
        return arrays
    if isinstance(shapes, str):
        shapes = jax.tree.map(lambda x: shapes if x.shape else "...", arrays)
    return jax.export.symbolic_args_specs(arrays, shapes, constraints=constraints)


def _traced(apply_fn, plain, specs, shapes):
    try:
        return traced_anywhere(apply_fn, plain, *specs)
    except Exception as error:
        if shapes is None or is_static([n for s in jax.tree.leaves(specs) for n in s.shape]):
            raise
        raise ValueError(
            f"export.onnx: the network cannot be traced for the free sizes {shapes!r}: {error}\n"
            "Give shapes=None for a file of the inputs' own shapes, or constraints on the sizes."
        ) from error


def _expand(eqn: Any) -> Any:
    name = eqn.primitive.name
    if name == "composite" and compat.composite(eqn)[0] != FAKE_QUANT:
        return eqn.params["jaxpr"]
    if name == "scan" and eqn.params["length"] <= LONGEST_SCAN:
        return unrolled(eqn)
    return None


def _evaluate(e: Equation, values: list[Any]) -> list[Any] | None:
    sizes = [n for v in e.eqn.outvars for n in getattr(v.aval, "shape", ())]
    if e.primitive == "dim_as_value" or not is_static(sizes):
        return None
    if e.primitive == "composite" and np.size(compat.composite(e.eqn)[1]["scale"]):
        # The last operand: what the mark closes over comes first.
        x = np.asarray(_numbers(values[-1]))
        return [of_mark(x, compat.composite(e.eqn)[1])]
    if isinstance(values[0] if values else None, Codes):
        followed = _followed(e, values)
        if followed is not None:
            return followed
    arrays = [_numbers(v) for v in values]
    results = compat.evaluate(e.eqn, [jnp.asarray(a) for a in arrays])
    open_ones = [v for v in values if isinstance(v, Opened) and v.leaves]
    packed = [v for v in values if isinstance(v, Codes | Stored)]
    if not packed and open_ones:
        leaves = frozenset().union(*(v.leaves for v in open_ones))
        return [opened(y, leaves, open_ones[0].why) for y in results]
    if not packed:
        return results
    leaves = frozenset().union(*(v.leaves for v in packed))
    kept = sum(v.codes.size * v.bits // 8 if isinstance(v, Codes) else v.kept_bytes for v in packed)
    return [_kept(e, k, np.asarray(y), leaves, kept) for k, y in enumerate(results)]


def _numbers(value: Any) -> Any:
    if isinstance(value, Codes):
        return value.array()
    return value.numbers if isinstance(value, Stored) else value


def _kept(e: Equation, k: int, y: np.ndarray, leaves: frozenset[str], kept: int) -> Any:
    # A result of packed constants: an operation of the file, or its numbers where they are few.
    lower, moves = lowering(e.primitive), row(e.primitive).moves or e.primitive == _CONVERT
    if y.nbytes <= max(kept // 8, 64) and not (lower and moves):
        return y
    if lower is None:
        return opened(y, leaves, f"{e.primitive} of it has no lowering")

    def make(low: Lowering) -> None:
        lower(low, e)

    return Stored(y, make, leaves, kept)


def _followed(e: Equation, values: list[Any]) -> list[Codes] | None:
    # The results as codes, if all are.
    new = e.eqn.params.get("new_dtype")
    if e.primitive == _CONVERT:
        return [values[0]._replace(dtype=np.dtype(new))] if new == np.float32 else None
    results: list[Any] = []
    for result in moved(e.eqn) or ():
        parts: list[Any] = [values[k] for k in result.operands]
        for step in result.steps:
            parts = [x.stepped(step) if isinstance(x, Codes) else None for x in parts]
        if not all(isinstance(x, Codes) for x in parts):
            return None
        results.append(parts[0] if result.axis is None else joined(parts, result.axis))
    return None if any(x is None for x in results) else results or None


def _input_names(apply_fn: Any, inputs: tuple[Any, ...]) -> list[str]:
    given = [f"input_{k}" for k in range(len(inputs))]
    try:
        taken = list(inspect.signature(apply_fn).parameters.values())[1:]
        plain = [p.name for p in taken if p.kind == p.POSITIONAL_OR_KEYWORD]
        given[: len(plain)] = plain[: len(inputs)]
    except (TypeError, ValueError):
        pass
    names = [
        ".".join(filter(None, (name, path.replace("/", "."))))
        for name, tree in zip(given, inputs, strict=True)
        for path, _ in leaves_with_paths(tree)
    ]
    return [f"{n}_{k}" if names.count(n) > 1 else n for k, n in enumerate(names)]
