"""LiteRT's converter: a traced function in, the bytes of a .tflite file out."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

INSTALL = (
    "pip install 'jaxcompress[export]', then pip install --no-deps litert-converter==0.5.0 "
    "xdsl==0.28.0, because xdsl asks for an old typing-extensions"
)
_SIGNATURE = "serving_default"
_FAILED = re.compile(r"failed to legalize operation '([^']+)'|'([a-z_]+\.[a-z_0-9.]+)' op ")
_PLAIN = re.compile(r"(tfl|func|builtin)\.|arith.constant|vhlo.(return|func|constant)")


def converter() -> tuple[Any, Any, Any, Any]:
    """The converter's modules: its API, MLIR, the pass manager, the StableHLO dialect.

    Raises:
      ImportError: it is not installed.
    """
    try:
        from litert_converter import converter_api_ext  # type: ignore[attr-defined]
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
        found = [n for n in names if not _PLAIN.match(n) or n == "tfl.while"]
    # Where the export failed, the module is in its versioned form: vhlo.fft_v1.
    found = [re.sub(r"^vhlo\.(\w+)_v\d+$", r"stablehlo.\1", name) for name in found]
    names = ", ".join(dict.fromkeys(found)) or "an operation that it does not name"
    loops = any(name.endswith(".while") for name in found)
    first = message.strip().splitlines()[0][:300] if message.strip() else ""
    return f"litert: the converter cannot do {names}; " + (
        "it has no loops: write them as Python loops, or as lax.scan, which is unrolled"
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
            for port in interpreter.get_input_details():
                interpreter.set_tensor(port["index"], np.zeros(port["shape"], port["dtype"]))
            interpreter.invoke()
        except (ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0][:300]
            raise ValueError(
                f"litert: the runtime cannot run what the converter wrote: {reason} Compute it "
                "otherwise, or outside the exported function"
            ) from error
