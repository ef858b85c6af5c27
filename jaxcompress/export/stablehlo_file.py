"""StableHLO: a network as one file that runs wherever JAX does, without the model's code.

The program is what `jax.export` serializes, which later JAX versions read (for at least six months,
see its documentation). It lies in a safetensors file as its only array, `program`, uint8: the bytes
after the header are those that `jax.export.deserialize` takes. The metadata have the version of
this scheme (`stablehlo`), a checksum, and names, dtypes and shapes of inputs and outputs.
"""

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.files import replacing
from jaxcompress.core.packed import unpack
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.core.pytrees import is_nibbles
from jaxcompress.core.sharding.meshes import on_one_device
from jaxcompress.core.storage import container
from jaxcompress.core.storage.leaves import opened_nibbles, plain_in_file
from jaxcompress.export.checkpoint import container_reader
from jaxcompress.export.lowered import lowered, port_names
from jaxcompress.export.verify import (
    Verified,
    drawn_input,
    example_inputs,
    unverified,
    verified,
)
from jaxcompress.quantize.integer.integer_program import IntegerProgram

VERSION = "1"
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


class Port(NamedTuple):
    """An input or output of a program."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]  # sizes; names or formulas where they are free: (b, 32, 32, 3)


@dataclasses.dataclass(frozen=True)
class StableHLO:
    """A program of one file; call it with arrays as the function that was exported.

    Attributes:
      path: of the file.
      file_bytes: its size.
      inputs: the arrays it takes, in order.
      outputs: the arrays it gives.
      platforms: where it runs.
      jax_version: of the JAX that wrote it.
      exported: the `jax.export.Exported`.
      verified: what its run showed, when it was written.
    """

    path: Path
    file_bytes: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    platforms: tuple[str, ...]
    jax_version: str
    exported: Any = dataclasses.field(repr=False)
    verified: Verified = unverified("it was read from its file")

    def __call__(self, *inputs: Any) -> Any:
        """The outputs for arrays of these dtypes and shapes; under `jit`, or compiled by itself."""
        return self.exported.call(*inputs)


@on_one_device
def stablehlo(
    model: IntegerProgram | Callable[..., Any],
    *arguments: Any,
    path: str | os.PathLike,
    platforms: Sequence[str] = PLATFORMS,
    batch: str | None = None,
    interface: Literal["float32", "codes"] = "float32",
    input_names: Sequence[str] | None = None,
    verify: bool = True,
    examples: Any = None,
) -> StableHLO:
    """Writes a network with its weights as one StableHLO file.

    Packed leaves stay packed: their codes, scales and positions are the constants of the program,
    which decodes them. The file is as small as they are; in memory XLA may decode once for all.

    Args:
      model: a pure function (params, *inputs) -> arrays, or what `quantize.integer_only` gives.
      *arguments: of a function, its params (packed or not) and its inputs, arrays or
        `jax.ShapeDtypeStruct`s. Of a program nothing, or an input of the shape that is wanted.
      path: conventionally `*.stablehlo`.
      platforms: for which the program is lowered, of "cpu", "cuda", "rocm" and "tpu".
      batch: a name, "b" say, that makes the first axis of all inputs free; None keeps their sizes.
      interface: of an `IntegerProgram`: float32 to float32, or "codes", its `run` from the codes
        that `quantize_input` gives to those that `dequantize` takes.
      input_names: kept in the file; default `x`, or `x0`, `x1`, ...
      verify: runs the file and compares it with the model; what differs by more than rounding is an
        error. Where the program has no CPU among its platforms, the report says that it did not.
      examples: inputs for that run, if not those given; see `verify.example_inputs`.

    Returns:
      `StableHLO`, as `load_stablehlo` gives it.

    Raises:
      ValueError: a file that differs from the model; a platform that JAX does not know; inputs
        without a first axis, or of several sizes, with `batch`; an operation that needs the sizes;
        what cannot be serialized (callbacks, results in containers of your own). Nothing is written
        then.
      TypeError: a model or inputs of another type.
      ImportError: flatbuffers is not installed, which `jax.export` needs.
    """
    if unknown := sorted(set(platforms) - set(PLATFORMS)) or not platforms:
        raise ValueError(f"stablehlo(platforms): known are {PLATFORMS}, got {unknown or ()}")
    if isinstance(model, IntegerProgram):
        fn, inputs, given = _of_program(model, arguments, interface)
    else:
        fn, inputs, given = _of_function(model, arguments)
    trial = example_inputs(given, examples, where="stablehlo") if verify else ()
    leaves = jax.tree.leaves(inputs)
    names = port_names("stablehlo(input_names)", input_names, "x", len(leaves))
    serialized, exported = _exported(fn, _symbolic(inputs, batch), tuple(platforms))
    ports = _ports(names, exported.in_avals), _ports(None, exported.out_avals)
    metadata = {
        "stablehlo": VERSION,
        "jax": jax.__version__,
        "inputs": json.dumps(ports[0]),
        "outputs": json.dumps(ports[1]),
        "platforms": json.dumps(exported.platforms),
    }
    content, size = container.encode({"program": serialized}, metadata)
    shown = unverified("verify=False")
    if verify:
        shown = _verified(content, fn, trial, exported.platforms)
    with replacing(path) as file:
        file.write(content)
    return StableHLO(
        Path(path), size.file_bytes, *ports, exported.platforms, jax.__version__, exported, shown
    )


def _verified(
    content: bytes, fn: Callable[..., Any], inputs: tuple[Any, ...], platforms: tuple[str, ...]
) -> Verified:
    if "cpu" not in platforms:
        return unverified(f"it runs on {', '.join(platforms)}, files are verified on CPU")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "verified.stablehlo"
        path.write_bytes(content)
        found = load_stablehlo(path)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        tree = jax.tree.structure(inputs)
        run = jax.jit(lambda *leaves: jax.tree.leaves(found(*jax.tree.unflatten(tree, leaves))))
        return verified(run, lambda _, *inputs: fn(*inputs), (), inputs, where="stablehlo")


def load_stablehlo(path: str | os.PathLike) -> StableHLO:
    """Reads a program that `stablehlo` wrote; calling it needs no other code.

    Raises:
      FileNotFoundError: no such file.
      ValueError: truncated, damaged, of another program, or of a newer version.
      ImportError: flatbuffers is not installed, which `jax.export` needs.
    """
    arrays, metadata = container_reader.read(path)
    if metadata.get("stablehlo") != VERSION or set(arrays) != {"program"}:
        found = metadata.get("stablehlo")
        what = f"of version {found!r}" if found else "of another kind"
        raise ValueError(f"{path}: a file {what}; this program reads StableHLO files {VERSION}")
    _need_flatbuffers()
    try:
        inputs, outputs = (
            tuple(Port(name, dtype, tuple(shape)) for name, dtype, shape in json.loads(text))
            for text in (metadata["inputs"], metadata["outputs"])
        )
        exported = jax.export.deserialize(bytearray(arrays["program"].tobytes()))
        version = metadata["jax"]
    except Exception as error:
        raise ValueError(
            f"{path}: written by JAX {metadata.get('jax', '?')}, this is JAX {jax.__version__}, "
            f"which cannot read the program: {error}"
        ) from error
    size = Path(path).stat().st_size
    return StableHLO(Path(path), size, inputs, outputs, exported.platforms, version, exported)


def _need_flatbuffers() -> None:
    try:
        import flatbuffers
    except ImportError as error:
        raise ImportError(
            "jax.export needs the package flatbuffers: pip install 'jaxcompress[export]'",
            name="flatbuffers",
        ) from error
    del flatbuffers


def _of_program(
    program: IntegerProgram, arguments: tuple[Any, ...], interface: str
) -> tuple[Callable[..., Any], tuple[Any, ...], tuple[Any, ...]]:
    if interface not in ("float32", "codes"):
        raise ValueError(f"stablehlo(interface): 'float32' or 'codes', got {interface!r}")
    if len(arguments) > 1:
        raise TypeError(f"stablehlo(program, x): takes one input, got {len(arguments)}")
    shape = tuple(arguments[0].shape) if arguments else program.shape
    if interface == "codes":
        codes = (jax.ShapeDtypeStruct(shape, program.code_dtype),)
        drawn = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
        return program.run, codes, (drawn.view(program.code_dtype),)

    def run(x):
        return program.dequantize(program.run(program.quantize_input(x)))

    return run, (jax.ShapeDtypeStruct(shape, np.dtype("float32")),), (drawn_input(program, shape),)


def _of_function(
    apply_fn: Any, arguments: tuple[Any, ...]
) -> tuple[Callable[..., Any], tuple[Any, ...], tuple[Any, ...]]:
    if not callable(apply_fn) or len(arguments) < 2:
        raise TypeError(
            "stablehlo takes an IntegerProgram, or a function, its params and its inputs, got "
            f"{type(apply_fn).__name__} and {len(arguments)} arguments"
        )
    packed, *inputs = arguments
    for name, x in leaves_with_paths(inputs):
        if not hasattr(x, "shape") or not hasattr(x, "dtype"):
            raise TypeError(f"stablehlo: input {name}: must be an array, got {type(x).__name__}")
    # NumPy arrays: they belong to no device, and are constants of whatever is traced.
    stored = [_stored(leaf) for leaf in jax.tree.leaves(packed)]
    whole = jax.tree.structure(packed)

    def run(*inputs: Any) -> Any:
        leaves = [make(array) for array, make in stored]
        return apply_fn(unpack(whole.unflatten(leaves)), *inputs)

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tuple(inputs))
    return run, shapes, tuple(inputs)


def _stored(leaf: Any) -> tuple[np.ndarray, Callable[[np.ndarray], Any]]:
    # An array of a file, and what makes the leaf of it; integers below a byte share bytes.
    # NumPy would compute with arrays of its own at once, in floats: the file would hold these. And
    # it knows no `.at`, nor indices that are traced, as those into a codebook are.
    array = np.asarray(leaf)
    if is_nibbles(array.dtype) and array.size:
        row = plain_in_file(array)
        return row, lambda row: opened_nibbles(row, array.shape, array.dtype)
    return array, jnp.asarray


def _symbolic(inputs: tuple[Any, ...], batch: str | None) -> tuple[Any, ...]:
    if batch is None:
        return inputs
    if not batch.isidentifier():
        raise ValueError(f"stablehlo(batch): must be a name, 'b' say, got {batch!r}")
    sizes = {x.shape[:1] for x in jax.tree.leaves(inputs)}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            "stablehlo(batch): all inputs must have one first axis, got the shapes "
            f"{[x.shape for x in jax.tree.leaves(inputs)]}"
        )
    (free,) = jax.export.symbolic_shape(batch)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((free, *x.shape[1:]), x.dtype), inputs)


def _exported(
    fn: Callable[..., Any], inputs: tuple[Any, ...], platforms: tuple[str, ...]
) -> tuple[np.ndarray, Any]:
    _need_flatbuffers()
    exported = lowered("stablehlo", fn, inputs, platforms=platforms)
    try:
        serialized = exported.serialize()
    except (NotImplementedError, ValueError) as error:
        raise ValueError(f"stablehlo: JAX cannot serialize the program: {error}") from error
    return np.frombuffer(serialized, np.uint8), exported


def _ports(names: Sequence[str] | None, avals: Sequence[Any]) -> tuple[Port, ...]:
    names = port_names("", None, "y", len(avals)) if names is None else names
    size = lambda n: n if isinstance(n, int) else str(n)
    return tuple(
        Port(name, aval.dtype.name, tuple(map(size, aval.shape)))
        for name, aval in zip(names, avals, strict=True)
    )
