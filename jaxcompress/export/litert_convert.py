"""LiteRT's converter and what it makes: a traced function in, the bytes of a .tflite file out.

A file is a flatbuffer (schema: github.com/google-ai-edge/LiteRT): a graph of operators over tensors
that have a type and, where they are integers, scales and zero points.
"""

import contextlib
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

INSTALL = "pip install 'jaxcompress[export]'"
_SIGNATURE = "serving_default"
_FAILED = re.compile(r"failed to legalize operation '([^']+)'|'([a-z_]+\.[a-z_0-9.]+)' op ")
_PLAIN = ("tfl.", "arith.constant", "func.", "builtin.")


class Tensor(NamedTuple):
    """An input or output: what a caller must know of it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    scale: float | None  # None: not quantized
    zero_point: int | None


class Operator(NamedTuple):
    """Operators of one kind with the same types: `CONV_2D` of int8, int8 and int32 gives int8."""

    name: str
    inputs: tuple[str, ...]  # types, constants included
    outputs: tuple[str, ...]
    count: int


class Contents(NamedTuple):
    """What a file holds."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    operators: tuple[Operator, ...]  # in the order of their first appearance
    integer: (
        bool  # no operator sees a float, QUANTIZE of an input and DEQUANTIZE of an output aside
    )


def converter() -> tuple[Any, Any, Any, Any]:
    """The converter's modules: its API, MLIR, the pass manager, the StableHLO dialect.

    Raises:
      ImportError: it is not installed.
    """
    try:
        from litert_converter import converter_api_ext
        from litert_converter.mlir import ir, passmanager
        from litert_converter.mlir.dialects import stablehlo
    except ImportError as error:
        raise ImportError(
            f"LiteRT files need the package litert-converter ({error}): {INSTALL}",
            name="litert_converter",
        ) from error
    return converter_api_ext, ir, passmanager, stablehlo


def convert(module: bytes, inputs: Sequence[str], outputs: Sequence[str]) -> bytes:
    """The bytes of a file from a serialized StableHLO module whose marks become integers.

    Args:
      module: as `jax.export.Exported.mlir_module_serialized`.
      inputs, outputs: names of its arguments and results in the signature.

    Raises:
      ImportError: the converter is not installed.
      ValueError: the converter or the runtime cannot do an operation; it is named.
    """
    api, ir, passmanager, stablehlo = converter()
    context = ir.Context()
    api.prepare_mlir_context(context)
    with context:
        mlir = None
        try:
            mlir = stablehlo.deserialize_portable_artifact(context, module)
            api.set_signature(mlir.operation, _SIGNATURE, list(inputs), list(outputs))
            config = api.ConvertToTFLConfig()
            # Without it, marks are left in the file as composites that compute in floats.
            config.strict_qdq_mode = True
            config.model_origin_framework = "JAX"
            api.run_convert_to_tfl_passes(mlir, passmanager.PassManager(), config)
            content = api.export_flatbuffer_to_bytes(mlir.operation)
        except ValueError as error:
            raise ValueError(_reason(str(error), mlir)) from error
    _check_runs(content)
    return content


def _reason(message: str, mlir: Any) -> str:
    if "deserialize" in message:
        return "litert: the converter cannot read the program that JAX exported"
    found = [a or b for a, b in _FAILED.findall(message)]
    if not found and mlir is not None:
        names = (op.operation.name for op in _operations(mlir.operation))
        found = [n for n in names if not n.startswith(_PLAIN) or n == "tfl.while"]
    names = ", ".join(dict.fromkeys(found)) or "an operation that it does not name"
    loops = any(name.endswith(".while") for name in found)
    first = message.strip().splitlines()[0][:300] if message.strip() else ""
    return f"litert: the converter cannot do {names}; " + (
        "it has no loops: write lax.scan, fori_loop and while_loop as Python loops"
        if loops
        else f"compute it otherwise, or outside the exported function ({first})"
    )


def _operations(operation: Any) -> Iterator[Any]:
    for region in operation.regions:
        for block in region.blocks:
            for inner in block.operations:
                yield inner
                yield from _operations(inner.operation)


def _check_runs(content: bytes) -> None:
    # The converter writes operators that its own runtime does not have, e.g. sorting.
    with contextlib.suppress(ImportError):
        from ai_edge_litert.interpreter import Interpreter

        try:
            interpreter = Interpreter(model_content=content, num_threads=1)
            interpreter.allocate_tensors()
            interpreter.invoke()
        except (ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0][:300]
            raise ValueError(
                f"litert: the runtime cannot run what the converter wrote: {reason} Compute it "
                "otherwise, or outside the exported function"
            ) from error


def integer_interface(content: bytes) -> bytes:
    """The same network that takes and gives int8, as the tensors inside are.

    Raises:
      ImportError: the runtime, which has the tool for it, is not installed.
      ValueError: an input or output is not quantized.
    """
    try:
        from ai_edge_litert._pywrap_modify_model_interface import modify_model_interface
        from ai_edge_litert.schema_py_generated import TensorType
    except ImportError as error:
        raise ImportError(
            f"interface='int8' needs the package ai-edge-litert ({error}): {INSTALL}",
            name="ai_edge_litert",
        ) from error
    found = contents(content)
    ends = {f"{o.name} {o.inputs[0]}" for o in found.operators if o.name.endswith("QUANTIZE")}
    if not found.integer or ends != {"QUANTIZE float32", "DEQUANTIZE int8"}:
        raise ValueError(
            "litert(interface='int8'): the network must be in int8 from every input to every "
            "output, but floats remain: export it with the float32 interface and see `operators`"
        )
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder, "float32.tflite"), Path(folder, "int8.tflite")
        before.write_bytes(content)
        failed = modify_model_interface(str(before), str(after), TensorType.INT8, TensorType.INT8)
        if failed:
            raise ValueError(f"litert(interface='int8'): the runtime's tool failed with {failed}")
        return after.read_bytes()


def contents(content: bytes) -> Contents:
    """What the bytes of a file hold, without its weights."""
    from litert_converter import schema_py_generated as schema

    model = schema.Model.GetRootAs(content, 0)
    names = {v: k for k, v in vars(schema.BuiltinOperator).items() if not k.startswith("_")}
    types = {v: k.lower() for k, v in vars(schema.TensorType).items() if not k.startswith("_")}
    counts: Counter[tuple[str, tuple[str, ...], tuple[str, ...]]] = Counter()
    integer = True
    for number in range(model.SubgraphsLength()):
        graph = model.Subgraphs(number)
        assert graph is not None
        dtype = lambda i, graph=graph: types[graph.Tensors(i).Type()]
        ends = {*graph.InputsAsNumpy().tolist(), *graph.OutputsAsNumpy().tolist()}
        for position in range(graph.OperatorsLength()):
            operator = graph.Operators(position)
            code = model.OperatorCodes(operator.OpcodeIndex())
            name = names[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())]
            sides = [
                [int(i) for i in side if i >= 0]
                for side in (operator.InputsAsNumpy(), operator.OutputsAsNumpy())
            ]
            counts[name, tuple(map(dtype, sides[0])), tuple(map(dtype, sides[1]))] += 1
            inner = [i for i in sum(sides, []) if name[-8:] != "QUANTIZE" or i not in ends]
            integer &= not any("float" in dtype(i) for i in inner)
    ports = [_ports(model, side, types) for side in ("Inputs", "Outputs")]
    operators = tuple(Operator(*key, count) for key, count in counts.items())
    return Contents(ports[0], ports[1], operators, integer)


def _ports(model: Any, side: str, types: dict[int, str]) -> tuple[Tensor, ...]:
    # The signature has the names, sorted; the graph has the order of the arguments.
    signature, graph = model.SignatureDefs(0), model.Subgraphs(0)
    entries = [getattr(signature, side)(i) for i in range(getattr(signature, f"{side}Length")())]
    order = getattr(graph, f"{side}AsNumpy")().tolist()
    entries.sort(key=lambda entry: order.index(entry.TensorIndex()))
    return tuple(
        _tensor(graph.Tensors(entry.TensorIndex()), entry.Name().decode(), types)
        for entry in entries
    )


def _tensor(tensor: Any, name: str, types: dict[int, str]) -> Tensor:
    quantization, scale, zero = tensor.Quantization(), None, None
    if quantization is not None and quantization.ScaleLength() == 1:
        scale, zero = float(quantization.Scale(0)), int(quantization.ZeroPoint(0))
    shape = tensor.ShapeAsNumpy()
    sizes = () if isinstance(shape, int) else tuple(np.asarray(shape).tolist())
    return Tensor(name, types[tensor.Type()], sizes, scale, zero)
