"""What lies in a .tflite file: a flatbuffer with a graph of operators over typed tensors.

Schema: https://github.com/google-ai-edge/LiteRT, as the converter's package brings it along.
"""

from collections import Counter
from typing import Any, NamedTuple

import numpy as np


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


def integer_interface(content: bytes) -> bytes:
    """The same network that takes and gives int8, as its tensors inside are.

    Raises:
      ValueError: floats remain between the inputs and the outputs.
    """
    import flatbuffers
    from litert_converter import schema_py_generated as schema

    found = contents(content)
    ends = {f"{o.name} {o.inputs[0]}" for o in found.operators if o.name.endswith("QUANTIZE")}
    if not found.integer or ends != {"QUANTIZE float32", "DEQUANTIZE int8"}:
        raise ValueError(
            "litert(interface='int8'): the network must be in int8 from every input to every "
            "output, but floats remain: export it with the float32 interface and see `operators`"
        )
    model: Any = schema.ModelT.InitFromPackedBuf(content)
    (graph,) = model.subgraphs
    builtin = schema.BuiltinOperator
    codes = [max(code.builtinCode, code.deprecatedBuiltinCode) for code in model.operatorCodes]
    inner, operators = {}, []
    for operator in graph.operators:
        before, after = int(operator.inputs[0]), int(operator.outputs[0])
        if codes[operator.opcodeIndex] == builtin.QUANTIZE and before in graph.inputs:
            inner[before] = after
        elif codes[operator.opcodeIndex] == builtin.DEQUANTIZE and after in graph.outputs:
            inner[after] = before
        else:
            operators.append(operator)
    graph.operators = operators
    for entry in (*model.signatureDefs[0].inputs, *model.signatureDefs[0].outputs):
        outer = entry.tensorIndex
        graph.tensors[inner[outer]].name = graph.tensors[outer].name
        entry.tensorIndex = inner[outer]
    graph.inputs = [inner[int(i)] for i in graph.inputs]
    graph.outputs = [inner[int(i)] for i in graph.outputs]
    _drop(model, graph, set(inner))
    builder = flatbuffers.Builder(len(content))
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _drop(model: Any, graph: Any, numbers: set[int]) -> None:
    # Tensors that nothing uses any more; the others are numbered anew.
    stay = [i for i in range(len(graph.tensors)) if i not in numbers]
    place = {-1: -1} | {old: new for new, old in enumerate(stay)}
    graph.tensors = [graph.tensors[i] for i in stay]
    graph.inputs = [place[i] for i in graph.inputs]
    graph.outputs = [place[i] for i in graph.outputs]
    for operator in graph.operators:
        operator.inputs = [place[int(i)] for i in operator.inputs]
        operator.outputs = [place[int(i)] for i in operator.outputs]
    for entry in (*model.signatureDefs[0].inputs, *model.signatureDefs[0].outputs):
        entry.tensorIndex = place[entry.tensorIndex]


def contents(content: bytes) -> Contents:
    """What the bytes of a file hold, without its weights."""
    from litert_converter import schema_py_generated as schema

    model: Any = schema.Model.GetRootAs(content, 0)
    names, types = _words(schema.BuiltinOperator), _words(schema.TensorType)
    counts: Counter[tuple[str, tuple[str, ...], tuple[str, ...]]] = Counter()
    integer = True
    for graph in map(model.Subgraphs, range(model.SubgraphsLength())):
        ends = {*graph.InputsAsNumpy().tolist(), *graph.OutputsAsNumpy().tolist()}
        dtypes = [types[graph.Tensors(i).Type()].lower() for i in range(graph.TensorsLength())]
        for operator in map(graph.Operators, range(graph.OperatorsLength())):
            code = model.OperatorCodes(operator.OpcodeIndex())
            name = names[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())]
            inputs, outputs = (
                [int(i) for i in side if i >= 0] if count else []
                for side, count in (
                    (operator.InputsAsNumpy(), operator.InputsLength()),
                    (operator.OutputsAsNumpy(), operator.OutputsLength()),
                )
            )
            counts[name, tuple(dtypes[i] for i in inputs), tuple(dtypes[i] for i in outputs)] += 1
            at_end = ends if name.endswith("QUANTIZE") else set()
            integer &= not any("float" in dtypes[i] for i in {*inputs, *outputs} - at_end)
    ports = [_ports(model, side, types) for side in ("Inputs", "Outputs")]
    operators = tuple(Operator(*key, count) for key, count in counts.items())
    return Contents(ports[0], ports[1], operators, integer)


def _words(enumeration: Any) -> dict[int, str]:
    return {value: key for key, value in vars(enumeration).items() if not key.startswith("_")}


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
    return Tensor(name, types[tensor.Type()].lower(), sizes, scale, zero)
