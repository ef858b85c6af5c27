"""LiteRT files (.tflite) in integers: for phones, and for microcontrollers."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jaxcompress.core.files import replacing
from jaxcompress.core.notices import warn
from jaxcompress.core.packed import Grid, is_packed, unpack
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.core.pytrees import is_nibbles, packed_bytes
from jaxcompress.core.sharding.meshes import on_one_device
from jaxcompress.export.litert_format.converter import convert, converter
from jaxcompress.export.litert_format.flatbuffer import (
    Contents,
    Operator,
    Tensor,
    contents,
    integer_interface,
)
from jaxcompress.export.litert_format.marked_program import marked_program
from jaxcompress.export.litert_format.marked_weights import marked_weights
from jaxcompress.export.litert_format.runtimes import RUNTIMES, Runtime, check_micro, in_micro
from jaxcompress.export.lowered import lowered, port_names
from jaxcompress.export.marks import mark_activations, why_unmarked
from jaxcompress.export.sessions import of_bytes
from jaxcompress.export.verify import (
    Verified,
    drawn_input,
    example_inputs,
    unverified,
    verified,
)
from jaxcompress.quantize.integer.integer_program import IntegerProgram


class LiteRT(NamedTuple):
    """A file that `litert` wrote."""

    path: Path
    file_bytes: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    operators: tuple[Operator, ...]  # by name and types, in the order of their first appearance
    integer: bool  # nothing but QUANTIZE of inputs and DEQUANTIZE of outputs sees a float
    verified: Verified  # what a run of the file showed
    widened: Mapping[str, str]  # layers whose weights take more bits than they have, and why


@on_one_device
def litert(
    model: IntegerProgram | Callable[..., Any],
    *arguments: Any,
    path: str | os.PathLike,
    activations: Mapping[str, Grid] | Literal["dynamic"] | None = None,
    interface: Literal["float32", "int8"] = "float32",
    runtime: Runtime = "litert",
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    verify: bool = True,
    examples: Any = None,
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
      *arguments: of a function, its params (packed, or arrays: float32, or integers that the file
        holds as they are, in int4 or int8) and inputs. Of a
        program nothing, which is one row, or an input of the shape that is wanted. Inputs are
        arrays or `jax.ShapeDtypeStruct`s: their shapes, batch included, are those of the file.
      path: conventionally `*.tflite`.
      activations: of a function; None, "dynamic", or {tap name: Grid}.
      interface: what the file takes and gives; "int8" leaves the quantization of the input, and
        the way back from that of the output, to the caller (with the scales of the report), as
        microcontrollers want it.
      runtime: what will run the file: "litert", or "micro", which is TFLite-Micro. Layers that it
        computes wrong or not at all in the bits of their weights are stored in more (`widened`):
        in `micro`, dense layers in int4 with several scales. It has no floats times integers:
        `micro` takes integer programs, float32 functions, and what is on grids throughout.
      input_names, output_names: in the signature; default `x` or `x0`, `x1`, ..., and `y` likewise.
      verify: runs the file in its runtime and compares it with the model; what differs by more than
        rounding is an error. Where the runtime is not installed, the report says so, and where
        TFLite-Micro is not, LiteRT runs the file instead.
      examples: inputs for that run, if not those given; see `verify.example_inputs`.

    Returns:
      `LiteRT`: what lies in the file, read back from it.

    Raises:
      ImportError: litert-converter is not installed.
      ValueError: a file that differs from the model; a packed leaf that LiteRT cannot store, with
        what it could; weights that TFLite-Micro would compute wrong (`runtime="micro"`); an
        operation that its converter or its runtime cannot do; names that do not fit. Nothing is
        written then.
      TypeError: a model, inputs or activations of another type.

    What it does not do: loops (a `lax.scan` is unrolled), batches of any size, sparse storage.
    """
    converter()  # what is missing is said before anything is computed
    if interface not in ("float32", "int8"):
        raise ValueError(f"litert(interface): 'float32' or 'int8', got {interface!r}")
    if runtime not in RUNTIMES:
        raise ValueError(f"litert(runtime): must be one of {RUNTIMES}, got {runtime!r}")
    if isinstance(model, IntegerProgram):
        source = _of_program(model, arguments, activations, runtime)
    else:
        source = _of_function(model, arguments, activations, runtime)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), source.inputs)
    trial = example_inputs(source.inputs, examples, where="litert") if verify else ()
    exported = lowered("litert", _flat(source.fn), shapes, platforms=("cpu",))
    names = (
        port_names("litert(input_names)", input_names, "x", len(exported.in_avals)),
        port_names("litert(output_names)", output_names, "y", len(exported.out_avals)),
    )
    content = convert(exported.mlir_module_serialized, *names)
    if interface == "int8":
        content = integer_interface(content)
    if runtime == "micro":
        check_micro(content)
    found = contents(content)
    shown = unverified("verify=False")
    if verify:
        shown = _verified(content, source, trial, found, runtime)
    with replacing(path) as file:
        file.write(content)
    if not isinstance(model, IntegerProgram):
        _warn_of_nibbles(arguments[0], source.widened)
    return LiteRT(Path(path), len(content), *found, shown, source.widened)


def _warn_of_nibbles(params: Any, widened: Mapping[str, str]) -> None:
    # Of arrays of int4 and the like that take a byte or more; what is packed is in the report.
    said = []
    for path, leaf in leaves_with_paths(params, is_leaf=is_packed):
        if not is_packed(leaf) and is_nibbles(leaf.dtype) and path in widened:
            bits = 8 if widened[path].startswith("int8") else 32
            lost = leaf.size * bits // 8 - packed_bytes(leaf)
            said.append(f"{path!r} ({widened[path]}; up to {lost:,} bytes more)")
    if said:
        warn(f"litert: stored wider than they are: {'; '.join(said)}")


class _Source(NamedTuple):
    """What a file is made of."""

    fn: Callable[..., Any]  # of the inputs, with its grids marked
    inputs: tuple[Any, ...]  # as they were given
    reference: Callable[..., Any]  # (params, *inputs), not rewritten for the converter
    params: Any
    widened: dict[str, str]


def _verified(
    content: bytes, source: _Source, inputs: tuple[Any, ...], found: Contents, runtime: Runtime
) -> Verified:
    try:
        compute, reason = _computes(content, runtime)
    except ImportError as error:
        return unverified(str(error))
    taken = list(map(_on_grid, found.inputs, jax.tree.leaves(inputs)))

    def run(*leaves: Any) -> list[Any]:
        codes = map(_codes, found.inputs, leaves)
        return list(map(_numbers, found.outputs, compute(*codes)))

    inputs = jax.tree.unflatten(jax.tree.structure(inputs), taken)
    shown = verified(run, source.reference, source.params, inputs, where="litert")
    return shown._replace(reason=reason)


def _computes(content: bytes, runtime: Runtime) -> tuple[Callable[..., Any], str]:
    # The file in a runtime, and why it is another one.
    reason = ""
    if runtime == "micro":
        try:
            return in_micro(content), ""
        except ImportError as error:
            reason = f"in LiteRT, because {error}"
    return of_bytes(content, ".tflite").run, reason


def _codes(port: Tensor, x: Any) -> Any:
    if port.scale is None or port.zero_point is None:
        return x
    codes = np.rint(np.asarray(x, np.float64) / port.scale) + port.zero_point
    return np.clip(codes, -128, 127).astype(port.dtype)


def _numbers(port: Tensor, codes: Any) -> Any:
    if port.scale is None or port.zero_point is None:
        return codes
    return ((np.asarray(codes, np.float64) - port.zero_point) * port.scale).astype(np.float32)


def _on_grid(port: Tensor, x: Any) -> Any:
    return _numbers(port, _codes(port, x))


def _flat(fn: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *inputs: tuple(jax.tree.leaves(fn(*inputs)))


def _of_program(
    program: IntegerProgram, arguments: tuple[Any, ...], activations: Any, runtime: Runtime
) -> _Source:
    if activations is not None:
        raise TypeError("litert(activations): an IntegerProgram has grids of its own")
    if len(arguments) > 1:
        raise TypeError(f"litert(program, x): takes one input, got {len(arguments)}")
    if arguments:
        program._check("litert(program, x)", arguments[0])
    batch = 1 if program.batched else program.shape[0]
    shape = arguments[0].shape if arguments else (batch, *program.shape[1:])
    widened: dict[str, str] = {}
    marked = marked_program(program, runtime=runtime, widened=widened)
    reference = lambda _, x: marked(x)
    fn = marked_weights(reference, (), dynamic=False)
    return _Source(fn, (drawn_input(program, shape),), reference, (), widened)


def _of_function(
    apply_fn: Any, arguments: tuple[Any, ...], activations: Any, runtime: Runtime
) -> _Source:
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
    dynamic = activations == "dynamic"
    if dynamic and runtime == "micro":
        raise ValueError(
            "litert(activations='dynamic', runtime='micro'): TFLite-Micro has no dynamic grids: "
            "give the IntegerProgram of jc.quantize.integer_only, or grids {tap name: Grid}"
        )
    widened: dict[str, str] = {}
    fn = marked_weights(apply_fn, packed, dynamic=dynamic, runtime=runtime, widened=widened)
    if dynamic:  # the grids of activations are a part of what is computed
        return _Source(fn, tuple(inputs), lambda _, *x: fn(*x), (), widened)
    params = jax.tree.map(np.asarray, unpack(packed))
    return _Source(fn, tuple(inputs), apply_fn, params, widened)
