"""What the two runtimes of LiteRT files compute right: LiteRT, and TFLite-Micro.

A file that one of them loads is not always a file that it computes right. Each rule here was
measured (LiteRT 2.3, TFLite-Micro of October 2026):

- LiteRT's own kernel of dense layers with int4 weights on dynamic grids, which runs where XNNPACK
  does not, reads the code -8 as +8 if there are 32 inputs or more.
- TFLite-Micro has int4 weights in convolutions, with any scales, and in dense layers, with one
  scale. It has int8 weights with a scale per output in both.
- TFLite-Micro's DEQUANTIZE multiplies a constant of several scales by the first of them, and takes
  no int4; it has no operators of float activations and integer weights.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

Runtime = Literal["litert", "micro"]
"""What runs a file: LiteRT (phones, desktops), or TFLite-Micro (microcontrollers)."""

RUNTIMES: tuple[str, ...] = get_args(Runtime)

_CONVOLUTIONS = ("CONV_2D", "DEPTHWISE_CONV_2D")
_PRODUCTS = (*_CONVOLUTIONS, "FULLY_CONNECTED", "TRANSPOSE_CONV", "BATCH_MATMUL", "CONV_3D")


def why_not_four_bits(
    runtime: Runtime, *, scales: int, lowest: float, dynamic: bool = False
) -> str:
    """Why the int4 weights of a dense layer must be stored in int8; "" if they need not.

    Args:
      runtime: of the file.
      scales: how many different scales the weights have.
      lowest: the lowest code.
      dynamic: whether the activations are on dynamic grids.

    >>> why_not_four_bits("micro", scales=16, lowest=-7)
    'int8: TFLite-Micro has int4 dense layers with one scale only'
    >>> why_not_four_bits("litert", scales=16, lowest=-7)
    ''
    """
    if dynamic and lowest < -7:
        return "int8: not all of its kernels read the int4 code -8"
    if runtime == "micro" and scales > 1:
        return "int8: TFLite-Micro has int4 dense layers with one scale only"
    return ""


class _Constant(NamedTuple):
    # Weights in a file, and what uses them.
    operator: str
    activations: str  # type of what they meet; "" where they meet nothing
    dtype: str
    shape: tuple[int, ...]
    scales: int

    def __str__(self) -> str:
        sizes = ", ".join(map(str, self.shape))
        return f"{self.operator} of {self.dtype} [{sizes}] with {self.scales} scales"


def check_micro(content: bytes) -> None:
    """Refuses the bytes of a file that TFLite-Micro does not load, or computes wrong.

    Raises:
      ValueError: with the operators, and what would be right.
    """
    wrong = [f"{c} ({why})" for c in _constants(content) if (why := _why_not_in_micro(c))]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"litert(runtime='micro'): TFLite-Micro does not compute {'; '.join(wrong[:3])}{more}. "
            "Give the IntegerProgram of jc.quantize.integer_only, whose activations are in int8 on "
            "grids of their own; or weights that are not packed, which are stored in float32"
        )


def _why_not_in_micro(c: _Constant) -> str:
    if c.operator == "DEQUANTIZE":
        if c.dtype == "int4":
            return "it takes no int4"
        return "it uses the first scale for all" if c.scales > 1 else ""
    if c.operator in _PRODUCTS and "float" in c.activations:
        return "its activations are floats"
    if c.dtype == "int4" and c.operator not in _CONVOLUTIONS:
        if c.operator != "FULLY_CONNECTED":
            return "it takes no int4"
        return "int4 needs one scale" if c.scales > 1 else ""
    return ""


def _constants(content: bytes) -> Iterator[_Constant]:
    # Quantized constants of up to 8 bits, once for every operator that takes them.
    from litert_converter import schema_py_generated as schema

    model: Any = schema.ModelT.InitFromPackedBuf(content)
    operators, types = (
        {value: name for name, value in vars(words).items() if not name.startswith("_")}
        for words in (schema.BuiltinOperator, schema.TensorType)
    )
    for graph in model.subgraphs:
        for operator in graph.operators:
            code = model.operatorCodes[operator.opcodeIndex]
            name = operators[max(code.builtinCode, code.deprecatedBuiltinCode)]
            taken = [graph.tensors[int(i)] for i in operator.inputs if i >= 0]
            dtypes = [types[t.type].lower() for t in taken]
            for place, (tensor, dtype) in enumerate(zip(taken, dtypes, strict=True)):
                if dtype not in ("int8", "int4") or not _stored(model.buffers[tensor.buffer]):
                    continue
                scales = tensor.quantization.scale if tensor.quantization else None
                shape = tuple(int(n) for n in tensor.shape) if tensor.shape is not None else ()
                meets = dtypes[0] if place else ""
                yield _Constant(name, meets, dtype, shape, 0 if scales is None else len(scales))


def _stored(buffer: Any) -> bool:
    # Large constants lie behind the tables, at an offset.
    return bool(buffer.size) or (buffer.data is not None and len(buffer.data) > 0)


def in_micro(content: bytes) -> Callable[..., tuple[np.ndarray, ...]]:
    """The file in TFLite-Micro: inputs -> outputs.

    Raises:
      ImportError: it is not installed.
      ValueError: it refuses the file; it prints the reason.
    """
    try:
        from tflite_micro.python.tflite_micro import (  # pyright: ignore[reportMissingImports]
            runtime,
        )
    except ImportError as error:
        raise ImportError("tflite-micro is not installed: pip install tflite-micro") from error
    try:
        # It holds activations: ten times the file, the default, is too little for small ones.
        found = runtime.Interpreter.from_bytes(content, arena_size=_arena_bytes(content))
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"litert: TFLite-Micro refuses the file: {error}") from error
    results = range(_outputs(content))

    def run(*inputs: Any) -> tuple[np.ndarray, ...]:
        for place, x in enumerate(inputs):
            found.set_input(np.asarray(x), place)
        found.invoke()
        return tuple(np.array(found.get_output(i)) for i in results)

    return run


def _outputs(content: bytes) -> int:
    from litert_converter import schema_py_generated as schema

    model: Any = schema.Model.GetRootAs(content, 0)
    return model.Subgraphs(0).OutputsLength()


def _arena_bytes(content: bytes) -> int:
    from litert_converter import schema_py_generated as schema

    graph: Any = schema.Model.GetRootAs(content, 0).Subgraphs(0)
    shapes = (graph.Tensors(i).ShapeAsNumpy() for i in range(graph.TensorsLength()))
    numbers = sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes)
    return 2**20 + 10 * len(content) + 4 * numbers
