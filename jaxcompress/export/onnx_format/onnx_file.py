"""ONNX files: a network lowered from its trace, with the library's own grids and codes."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jaxcompress.core.files import replacing
from jaxcompress.core.notices import warn
from jaxcompress.core.packed import is_packed, packed_bytes, unpack
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.core.pytrees import stored_bits
from jaxcompress.core.sharding.meshes import on_one_device
from jaxcompress.export.litert_format.marked_program import marked_program
from jaxcompress.export.onnx_format import (  # noqa: F401  (they fill the table of rules)
    composed,
    indexing,
    matrix_products,
    onnx_convolutions,
    onnx_moves,
    reductions,
)
from jaxcompress.export.onnx_format.onnx_elementwise import lowering
from jaxcompress.export.onnx_format.onnx_graph import Graph, Port, require_onnx
from jaxcompress.export.onnx_format.onnx_lowering import Lowering, Settings, refusal
from jaxcompress.export.onnx_format.onnx_trace import LONGEST_SCAN, Trace, trace
from jaxcompress.export.onnx_format.symbolic_sizes import Dims, is_static
from jaxcompress.export.sessions import of_bytes
from jaxcompress.export.verify import (
    Verified,
    drawn_input,
    example_inputs,
    unverified,
    verified,
)
from jaxcompress.graph.equations import Equation
from jaxcompress.quantize.integer.integer_program import IntegerProgram


class Larger(NamedTuple):
    """A packed leaf that takes more bytes in the file than packed.

    Attributes:
      leaf: its path.
      why: it is float32 now, or "" if its codes are codes still, in a wider container.
      file_bytes, packed_bytes: of its numbers, and of what makes numbers of them.
    """

    leaf: str
    why: str
    file_bytes: int
    packed_bytes: int

    @property
    def lost_bytes(self) -> int:
        """How many more."""
        return self.file_bytes - self.packed_bytes


class OnnxReport(NamedTuple):
    """What was written.

    Attributes:
      path: the file.
      file_bytes: its size.
      opset: version of the standard operators that it needs.
      nodes: how often each operator is in it.
      inputs, outputs: name, dtype and shape of each; a str in a shape is a size of any value.
      larger: packed leaves that take more bytes in the file than packed, and why.
      domains: of operators that are not ONNX's own; a runtime has to know them.
      verified: what a run of the file showed.
    """

    path: Path
    file_bytes: int
    opset: int
    nodes: MappingProxyType[str, int]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    larger: tuple[Larger, ...] = ()
    domains: tuple[str, ...] = ()
    verified: Verified = unverified("verify=False")


@on_one_device
def onnx(
    apply_fn: Callable[..., Any] | IntegerProgram,
    params: Any = None,
    *inputs: Any,
    path: str | os.PathLike,
    shapes: Any = "batch, ...",
    constraints: Sequence[str] = (),
    products: Literal["float", "dynamic"] = "float",
    activations: Literal["uint8", "int8"] = "uint8",
    operators: Literal["onnxruntime", "standard"] = "onnxruntime",
    verify: bool = True,
    examples: Any = None,
) -> OnnxReport:
    """Writes a network as an ONNX file, quantized as it is here.

    Three ways to be small and fast:
      integers throughout: give an `IntegerProgram` of `jc.quantize.integer_only`; every tensor is
        on its grid by QuantizeLinear and DequantizeLinear, which a runtime turns into integer
        convolutions and products;
      packed weights: params of `pack`; integers of 2, 4 and 8 bits in dense layers become
        `MatMulNBits`, which multiplies them with float activations; all else stays packed too
        (kernels, tables that are looked up, codebooks, small floats), and operations of the file
        make numbers of it;
      packed weights and `products="dynamic"`: besides, the activations of dense layers are
        quantized to 8 bits while the network runs (DynamicQuantizeLinear, MatMulInteger).

    Grids of `jc.export.mark_activations` around `apply_fn` and of `jc.export.mark_weights` are
    lowered like those of an integer program. The report names every packed leaf that takes more
    bytes than packed, and one warning those that are stored as float32.

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
      operators: "standard" writes no operator of ONNX Runtime's own, for other runtimes: integers
        become float32 by DequantizeLinear before MatMul (then ONNX Runtime rounds activations to
        8 bits unless its option `session.qdq_matmulnbits_accuracy_level` is "1").
      verify: runs the file in ONNX Runtime (with the options of `jc.export.session`), at the sizes
        of the inputs, and compares it with the network; what differs by more than rounding is an
        error. Where the runtime is not installed, the report says so.
      examples: inputs for that run, if not those given; see `verify.example_inputs`.

    Raises:
      ImportError: the package onnx is missing.
      ValueError: a primitive that is not lowered, with its scope and shapes; a network that cannot
        be traced for free sizes; more than 2 GiB; a file that the runtime refuses, or that differs
        from the network. No file is written then.
      TypeError: no inputs, or params of another kind.

    Opset 19; 21 where blocks or 4-bit codes need DequantizeLinear. `MatMulNBits` and
    `GatherBlockQuantized` are ONNX Runtime's own operators (com.microsoft). ONNX Runtime rounds an
    accumulator once, in float32, where `IntegerProgram.run` rounds twice in integers: single codes
    differ by one step. On x86 without VNNI its products of uint8 and int8 saturate unless its
    option `session.x64quantprecision` is "1", as in `jc.export.session`; those of int8 do not.

    >>> import tempfile
    >>> params, x = {"w": jax.numpy.ones((4, 2))}, jax.numpy.ones((3, 4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     report = onnx(lambda p, x: jax.nn.relu(x @ p["w"]), params, x, path=f"{folder}/a.onnx")
    >>> report.opset, dict(report.nodes), report.inputs[0].shape
    (19, {'Identity': 1, 'MatMul': 1, 'Relu': 1}, ('batch', 4))
    """
    require_onnx()
    _check(products=products, activations=activations, operators=operators)
    if isinstance(apply_fn, IntegerProgram):
        if params is not None or inputs:
            raise TypeError(
                "export.onnx: an IntegerProgram has its weights and shapes; give a path"
            )
        shapes = shapes if apply_fn.batched else None
        apply_fn, inputs = _of_program(apply_fn, examples)
        params, examples = (), None
    if not jax.tree.leaves(inputs):
        raise TypeError("export.onnx: needs the inputs: arrays or jax.ShapeDtypeStructs")
    trial = example_inputs(inputs, examples, where="export.onnx") if verify else ()
    traced = trace(apply_fn, params, inputs, shapes, constraints)
    settings = Settings(products == "dynamic", activations, operators == "standard")
    graph, ports = _lowered(traced, settings)
    model = graph.model(*ports, name="jaxcompress")
    content, shown = model.SerializeToString(), unverified("verify=False")
    if verify:
        shown = _verified(content, apply_fn, params, trial, _OPERANDS[products])
    with replacing(Path(path)) as file:
        file.write(content)
    nodes = Counter(node.op_type for node in model.graph.node)
    counts = MappingProxyType(dict(sorted(nodes.items())))
    larger = _larger(params, graph, ports[1])
    domains = tuple(sorted({node.domain for node in model.graph.node} - {""}))
    inputs_, outputs = map(tuple, ports)
    return OnnxReport(
        Path(path), len(content), graph.opset, counts, inputs_, outputs, larger, domains, shown
    )


# Steps of a grid over a whole tensor by which its numbers move when the runtime quantizes them:
# half a step of MatMulNBits' symmetric grids is one of 256 codes where all have one sign.
_OPERANDS = {"float": 0.0, "dynamic": 1.0}


def _of_program(
    program: IntegerProgram, examples: Any
) -> tuple[Callable[..., Any], tuple[np.ndarray]]:
    # As a function of no params, and an input: that of the examples, or drawn.
    marked = marked_program(program)
    if examples is None:
        x = drawn_input(program, (2 if program.batched else program.shape[0], *program.shape[1:]))
    else:
        (x,) = examples if isinstance(examples, tuple | list) else (examples,)
        program._check("export.onnx(examples)", x)
    return (lambda _, x: marked(x)), (np.asarray(x, np.float32),)


def _verified(
    content: bytes, fn: Callable[..., Any], params: Any, inputs: tuple[Any, ...], operands: float
) -> Verified:
    try:
        runtime = of_bytes(content, ".onnx")
    except ImportError as error:
        return unverified(str(error))
    except ValueError as error:
        raise ValueError(
            f"export.onnx: nothing was written (verify=False keeps such a file): {error}"
        ) from error
    params = jax.tree.map(np.asarray, unpack(params))
    return verified(runtime.run, fn, params, inputs, where="export.onnx", operands=operands)


_CHOICES = {
    "products": ("float", "dynamic"),
    "activations": ("uint8", "int8"),
    "operators": ("onnxruntime", "standard"),
}


def _check(**given: str) -> None:
    for name, value in given.items():
        known = _CHOICES[name]
        if value not in known:
            raise ValueError(f"export.onnx({name}): must be one of {known}, got {value!r}")


def _larger(params: Any, graph: Graph, outputs: Sequence[Port]) -> tuple[Larger, ...]:
    # The packed leaves that take more than packed, up to small tables; warns of float32.
    leaves = dict(leaves_with_paths(params, is_leaf=is_packed))
    least_of = {path: packed_bytes(leaf) for path, leaf in leaves.items()}
    sizes = graph.leaf_bytes([port.name for port in outputs], least_of)
    rows = []
    for path, leaf in leaves.items():
        if path not in sizes or not (is_packed(leaf) or stored_bits(leaf.dtype) <= 8):
            continue
        (taken, why), least = sizes[path], least_of[path]
        if taken > 1.02 * least + 64:
            rows.append(Larger(path, why, taken, least))
    floats = [row for row in rows if row.why]
    if floats:
        warn(
            "export.onnx: stored as float32 though packed: "
            + "; ".join(f"{r.leaf!r} ({r.why}; {r.lost_bytes:,} bytes more)" for r in floats[:5])
            + (f"; and {len(floats) - 5} more leaves" if len(floats) > 5 else "")
        )
    return tuple(rows)


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
        lower = lowering(equation.primitive)
        assert lower is not None
        lower(low, equation)
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
        if lowering(e.primitive) is None:
            why = "this primitive has no lowering"
            if e.primitive == "scan":
                why = f"loops of more than {LONGEST_SCAN} trips are not unrolled"
            raise refusal(e, why)


def _port(name: str, aval: Any) -> Port:
    sizes = tuple(n if isinstance(n, int) else str(n) for n in aval.shape)
    return Port(name, np.dtype(aval.dtype), sizes)
