"""LiteRT files (.tflite) in integers: for phones, and for microcontrollers."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jaxcompress.core.files import replacing
from jaxcompress.core.packed import Grid, is_packed
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.export.litert_convert import convert, converter
from jaxcompress.export.litert_file import Operator, Tensor, contents, integer_interface
from jaxcompress.export.lowered import lowered, port_names
from jaxcompress.export.marked_program import marked_program
from jaxcompress.export.marked_weights import marked_weights
from jaxcompress.export.marks import mark_activations, why_unmarked
from jaxcompress.quantize.integer import IntegerProgram


class LiteRT(NamedTuple):
    """A file that `litert` wrote."""

    path: Path
    file_bytes: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    operators: tuple[Operator, ...]  # by name and types, in the order of their first appearance
    integer: bool  # nothing but QUANTIZE of inputs and DEQUANTIZE of outputs sees a float


def litert(
    model: IntegerProgram | Callable[..., Any],
    *arguments: Any,
    path: str | os.PathLike,
    activations: Mapping[str, Grid] | Literal["dynamic"] | None = None,
    interface: Literal["float32", "int8"] = "float32",
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> LiteRT:
    """Writes a network as one LiteRT file that computes in the integers it was quantized to.

    Either `litert(program, path=...)` with what `quantize.integer_only` gives: all of it in int8,
    with the program's own grids. Or `litert(apply_fn, packed, *inputs, path=...)`: weights that are
    packed as symmetric integers, with one scale per tensor or output channel, are stored in int8,
    or in int4 if they have 4 bits or fewer; activations are float32, or with
    `activations="dynamic"` int8 on grids that the runtime lays over every row (in convolutions,
    every image) that it meets. Grids from `quantize.calibrate_activations` are kept as well, but a
    layer is only computed in int8 if its result is on a grid too: `integer_only` puts everything on
    one. Weights alone save bytes, not time. Rows of tables that are looked up are stored in int8.

    Args:
      model: an `IntegerProgram`, or a pure function (params, *inputs) -> arrays.
      *arguments: of a function, its params (packed, or arrays: float32 then) and inputs. Of a
        program nothing, which is one row, or an input of the shape that is wanted. Inputs are
        arrays or `jax.ShapeDtypeStruct`s: their shapes, batch included, are those of the file.
      path: conventionally `*.tflite`.
      activations: of a function; None, "dynamic", or {tap name: Grid}.
      interface: what the file takes and gives; "int8" leaves the quantization of the input, and
        the way back from that of the output, to the caller (with the scales of the report), as
        microcontrollers want it.
      input_names, output_names: in the signature; default `x` or `x0`, `x1`, ..., and `y` likewise.

    Returns:
      `LiteRT`: what lies in the file, read back from it.

    Raises:
      ImportError: litert-converter is not installed.
      ValueError: a packed leaf that LiteRT cannot store, with what it could; an operation that its
        converter or its runtime cannot do; names that do not fit. Nothing is written then.
      TypeError: a model, inputs or activations of another type.

    What it does not do: loops (a `lax.scan` is unrolled), batches of any size, sparse storage.
    """
    converter()  # what is missing is said before anything is computed
    if interface not in ("float32", "int8"):
        raise ValueError(f"litert(interface): 'float32' or 'int8', got {interface!r}")
    if isinstance(model, IntegerProgram):
        if activations is not None:
            raise TypeError("litert(activations): an IntegerProgram has grids of its own")
        program = marked_program(model)
        fn = marked_weights(lambda _, x: program(x), (), dynamic=False)
        inputs = (_program_input(model, arguments),)
    else:
        fn, inputs = _marked(model, arguments, activations)
    exported = lowered("litert", _flat(fn), inputs, platforms=("cpu",))
    names = (
        port_names("litert(input_names)", input_names, "x", len(exported.in_avals)),
        port_names("litert(output_names)", output_names, "y", len(exported.out_avals)),
    )
    content = convert(exported.mlir_module_serialized, *names)
    if interface == "int8":
        content = integer_interface(content)
    found = contents(content)
    with replacing(path) as file:
        file.write(content)
    return LiteRT(Path(path), len(content), *found)


def _flat(fn: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *inputs: tuple(jax.tree.leaves(fn(*inputs)))


def _program_input(program: IntegerProgram, arguments: tuple[Any, ...]) -> jax.ShapeDtypeStruct:
    if len(arguments) > 1:
        raise TypeError(f"litert(program, x): takes one input, got {len(arguments)}")
    if not arguments:
        batch = 1 if program.batched else program.shape[0]
        return jax.ShapeDtypeStruct((batch, *program.shape[1:]), np.dtype("float32"))
    (x,) = arguments
    program._check("litert(program, x)", x)
    return jax.ShapeDtypeStruct(x.shape, np.dtype("float32"))


def _marked(
    apply_fn: Any, arguments: tuple[Any, ...], activations: Any
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    if not callable(apply_fn) or len(arguments) < 2:
        raise TypeError(
            "litert takes an IntegerProgram, or a function, its params and its inputs, got "
            f"{type(apply_fn).__name__} and {len(arguments)} arguments"
        )
    packed, *inputs = arguments
    leaves = leaves_with_paths(packed, is_leaf=is_packed)
    for name, leaf in leaves:
        if is_packed(leaf) and (why := why_unmarked(leaf)):
            raise ValueError(
                f"litert: {name or 'the array'}: {why}; LiteRT stores symmetric integers of at "
                "most 8 bits with one scale per tensor or output channel: quantize it so, or give "
                "jc.unpack of the leaf, which is stored in float32"
            )
    for x in jax.tree.leaves(inputs):
        if not hasattr(x, "shape") or not hasattr(x, "dtype"):
            raise TypeError(f"litert: inputs must be arrays, got {type(x).__name__}")
    if isinstance(activations, Mapping):
        apply_fn = mark_activations(apply_fn, dict(activations))
    elif activations not in (None, "dynamic"):
        raise TypeError(
            "litert(activations): None, 'dynamic' or grids {tap name: Grid}, "
            f"got {activations!r:.100}"
        )
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tuple(inputs))
    return marked_weights(apply_fn, packed, dynamic=activations == "dynamic"), shapes
