"""ONNX files: a network lowered from its trace, with the library's own grids and codes."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jaxcompress.export import (  # noqa: F401  (they fill the table of rules)
    onnx_composed,
    onnx_conv,
    onnx_indexing,
    onnx_matmul,
    onnx_reduce,
    onnx_views,
)
from jaxcompress.export.marked_program import marked_program
from jaxcompress.export.onnx_graph import Graph, Port, require_onnx, write
from jaxcompress.export.onnx_lower import Lowering, Settings, refusal
from jaxcompress.export.onnx_rules import RULES
from jaxcompress.export.onnx_shapes import Dims, is_static
from jaxcompress.export.onnx_trace import LONGEST_SCAN, Trace, trace
from jaxcompress.graph.equations import Equation
from jaxcompress.quantize.integer import IntegerProgram


class OnnxReport(NamedTuple):
    """What was written.

    Attributes:
      path: the file.
      file_bytes: its size.
      opset: version of the standard operators that it needs.
      nodes: how often each operator is in it.
      inputs, outputs: name, dtype and shape of each; a str in a shape is a size of any value.
    """

    path: Path
    file_bytes: int
    opset: int
    nodes: MappingProxyType[str, int]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


def onnx(
    apply_fn: Callable[..., Any] | IntegerProgram,
    params: Any = None,
    *inputs: Any,
    path: str | os.PathLike,
    shapes: Any = "batch, ...",
    constraints: Sequence[str] = (),
    products: Literal["float", "dynamic"] = "float",
    activations: Literal["uint8", "int8"] = "uint8",
) -> OnnxReport:
    """Writes a network as an ONNX file, quantized as it is here.

    Three ways to be small and fast:
      integers throughout: give an `IntegerProgram` of `jc.quantize.integer_only`; every tensor is
        on its grid by QuantizeLinear and DequantizeLinear, which a runtime turns into integer
        convolutions and products;
      packed weights: params of `pack`; int8 weights stay int8, blocks of 4 bits along the inputs of
        a dense layer become `MatMulNBits`, tables that are looked up stay packed too;
      packed weights and `products="dynamic"`: besides, the activations of dense layers are
        quantized to 8 bits while the network runs (DynamicQuantizeLinear, MatMulInteger).

    Grids of `jc.export.mark_activations` around `apply_fn` and of `jc.export.mark_weights` are
    lowered like those of an integer program. Scales per tensor, channel, or block along one axis
    are kept; weights in other formats (codebooks, floats of 8 bits, ...) are stored as float32.

    Args:
      apply_fn: pure, (params, *inputs) -> pytree of arrays, in inference mode; or the program.
      params: pytree of arrays and packed leaves.
      *inputs: example arrays or `jax.ShapeDtypeStruct`s, pytrees of them too.
      path: of the file, which comes into being whole or not at all.
      shapes: as for `jax.export.symbolic_args_specs`: one text for all inputs or one for each; the
        sizes that are names are free, e.g. ("batch, time", "batch, time"). None: all as given.
      constraints: on these names, e.g. ("time <= 512",).
      products: how dense layers with int8 weights and float activations are computed: "dynamic"
        quantizes the activations. It also lets `MatMulNBits` do so.
      activations: dtype of static grids; "int8" keeps ONNX Runtime from joining some operations.

    Raises:
      ImportError: the package onnx is missing.
      ValueError: a primitive that is not lowered, with its scope and shapes; a network that cannot
        be traced for free sizes; more than 2 GiB. No file is written then.
      TypeError: no inputs, or params of another kind.

    Opset 19; 21 where blocks or 4-bit codes need DequantizeLinear. `MatMulNBits` and
    `GatherBlockQuantized` are ONNX Runtime's own operators (com.microsoft). ONNX Runtime rounds an
    accumulator once, in float32, where `IntegerProgram.run` rounds twice in integers: single codes
    differ by one step. On x86 without VNNI its products of uint8 and int8 saturate. By itself it
    may compute "float" products of int8 weights in 8 bits too (its session option
    `session.qdq_matmulnbits_accuracy_level`).

    >>> import tempfile
    >>> params, x = {"w": jax.numpy.ones((4, 2))}, jax.numpy.ones((3, 4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     report = onnx(lambda p, x: jax.nn.relu(x @ p["w"]), params, x, path=f"{folder}/a.onnx")
    >>> report.opset, dict(report.nodes), report.inputs[0].shape
    (19, {'Identity': 1, 'MatMul': 1, 'Relu': 1}, ('batch', 4))
    """
    require_onnx()
    _check(products, activations)
    if isinstance(apply_fn, IntegerProgram):
        program = apply_fn
        if params is not None or inputs:
            raise TypeError(
                "export.onnx: an IntegerProgram has its weights and shapes; give a path"
            )
        inputs = (jax.ShapeDtypeStruct(program.shape, np.float32),)
        shapes = shapes if program.batched else None
        marked = marked_program(program)
        apply_fn, params = lambda _, x: marked(x), ()
    if not jax.tree.leaves(inputs):
        raise TypeError("export.onnx: needs the inputs: arrays or jax.ShapeDtypeStructs")
    traced = trace(apply_fn, params, inputs, shapes, constraints)
    settings = Settings(products == "dynamic", activations)
    graph, ports = _lowered(traced, settings)
    model = graph.model(*ports, name="jaxcompress")
    size = write(model, path)
    nodes = Counter(node.op_type for node in model.graph.node)
    counts = MappingProxyType(dict(sorted(nodes.items())))
    return OnnxReport(Path(path), size, graph.opset, counts, *map(tuple, ports))


def _check(products: str, activations: str) -> None:
    for name, given, known in (
        ("products", products, ("float", "dynamic")),
        ("activations", activations, ("uint8", "int8")),
    ):
        if given not in known:
            raise ValueError(f"export.onnx({name}): must be one of {known}, got {given!r}")


def _lowered(trace: Trace, settings: Settings):
    graph, avals = Graph(), trace.flattener.avals
    symbols: dict[str, tuple[str, int]] = {}
    for name, _, aval in trace.inputs:
        for axis, size in enumerate(aval.shape):
            if not is_static([size]) and str(size).isidentifier():
                symbols.setdefault(str(size), (name, axis))
    low = Lowering(graph, Dims(graph, symbols), avals, trace.flattener.known, trace.uses, settings)
    for name, number, _ in trace.inputs:
        low.put(number, name)
    _refuse_unknown(trace.equations)
    for equation in trace.equations:
        graph.scope = equation.scope
        RULES[equation.primitive](low, equation)
    graph.scope = ""
    taken = {name for name, _, _ in trace.inputs}
    outputs = []
    for name, number in trace.outputs:
        while name in taken:
            name += "_out"
        taken.add(name)
        graph.result(low.name(number), name)
        outputs.append(_port(name, avals[number]))
    return graph, ([_port(name, aval) for name, _, aval in trace.inputs], outputs)


def _refuse_unknown(equations: Sequence[Equation]) -> None:
    for e in equations:
        if e.primitive not in RULES:
            why = "this primitive has no lowering"
            if e.primitive == "scan":
                why = f"loops of more than {LONGEST_SCAN} trips are not unrolled"
            raise refusal(e, why)


def _port(name: str, aval: Any) -> Port:
    sizes = tuple(n if isinstance(n, int) else str(n) for n in aval.shape)
    return Port(name, np.dtype(aval.dtype), sizes)
