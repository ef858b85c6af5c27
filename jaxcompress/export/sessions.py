"""Files in the runtime they are for: one call for ONNX Runtime, LiteRT and StableHLO."""

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcompress.export.stablehlo_file import load_stablehlo


class Place(NamedTuple):
    """Where the grid of an integer input or output lies: x = scale * (code - zero)."""

    scale: float
    zero: int


class Session(NamedTuple):
    """A file that is loaded and ready.

    Attributes:
      path: of the file.
      runtime: "onnxruntime", "litert" or "jax".
      shapes: of the inputs; a size that is free is None.
      dtypes: of the inputs.
      run: (*inputs) -> tuple of NumPy arrays, inputs of these shapes and dtypes.
      takes, gives: grids of the inputs and outputs, as the file says; None where it has none.
    """

    path: Path
    runtime: str
    shapes: tuple[tuple[int | None, ...], ...]
    dtypes: tuple[np.dtype, ...]
    run: Callable[..., tuple[np.ndarray, ...]]
    takes: tuple[Place | None, ...] = ()
    gives: tuple[Place | None, ...] = ()


def session(path: str | os.PathLike, *, threads: int = 1) -> Session:
    """Loads a file by its suffix: `.onnx`, `.tflite`, `.stablehlo`.

    ONNX Runtime computes what a file says here, which by default it does not: it would round the
    float activations of integer weights to 8 bits where it joins them to `MatMulNBits`, in files of
    any exporter (`session.qdq_matmulnbits_accuracy_level` is 1), and on x86 without VNNI its
    products of uint8 and int8 would saturate (`session.x64quantprecision` is 1, and slower there;
    a file that it refuses with that is loaded without).

    Args:
      path: of the file.
      threads: of ONNX Runtime and LiteRT; a StableHLO program runs as JAX does.

    Raises:
      FileNotFoundError: no such file.
      ValueError: another suffix; fewer than one thread; a file that the runtime refuses.
      ImportError: the runtime is not installed; with the line that installs it.
    """
    path = Path(path)
    loaders = {".onnx": _onnx, ".tflite": _litert, ".stablehlo": _stablehlo}
    if path.suffix not in loaders:
        raise ValueError(f"{path}: a suffix of {', '.join(loaders)} says the runtime")
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return loaders[path.suffix](path, threads)


def of_bytes(content: bytes, suffix: str) -> Session:
    """As `session`, of a file that is not written yet."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"content{suffix}"
        path.write_bytes(content)
        return session(path)


def _missing(package: str) -> ImportError:
    return ImportError(f'{package} is not installed: pip install "jaxcompress[export]"')


def _onnx(path: Path, threads: int) -> Session:
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise _missing("onnxruntime") from error
    try:
        found = _onnx_session(ort, path, threads, precise=True)
    except Exception:  # its exceptions have no common public base
        try:
            found = _onnx_session(ort, path, threads, precise=False)
        except Exception as error:
            raise ValueError(f"{path}: ONNX Runtime refuses it: {error}") from error
    ports = found.get_inputs()
    names = [port.name for port in ports]
    return Session(
        path,
        "onnxruntime",
        tuple(tuple(n if isinstance(n, int) else None for n in port.shape) for port in ports),
        tuple(_onnx_dtype(port.type) for port in ports),
        lambda *inputs: tuple(
            np.asarray(y) for y in found.run(None, dict(zip(names, inputs, strict=True)))
        ),
    )


def _onnx_session(ort: Any, path: Path, threads: int, *, precise: bool) -> Any:
    # On x86 without VNNI the precise products are refused where weights share a zero point.
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4 if precise else 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.add_session_config_entry("session.x64quantprecision", str(int(precise)))
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _onnx_dtype(name: str) -> np.dtype:
    inner = name.removeprefix("tensor(").removesuffix(")")
    return np.dtype({"float": "float32", "double": "float64"}.get(inner, inner))


def _litert(path: Path, threads: int) -> Session:
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError as error:
        raise _missing("ai-edge-litert") from error
    try:
        found = Interpreter(str(path), num_threads=threads)
        found.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: LiteRT refuses it: {error}") from error
    # The order of the graph is that of the function; names in the signature are sorted.
    takes, gives = found.get_input_details(), found.get_output_details()

    def run(*inputs: Any) -> tuple[np.ndarray, ...]:
        for port, x in zip(takes, inputs, strict=True):
            found.set_tensor(port["index"], np.asarray(x))
        found.invoke()
        return tuple(np.asarray(found.get_tensor(port["index"])) for port in gives)

    shapes = tuple(tuple(int(n) for n in port["shape"]) for port in takes)
    dtypes = tuple(np.dtype(port["dtype"]) for port in takes)
    places = (tuple(map(_place, ports)) for ports in (takes, gives))
    return Session(path, "litert", shapes, dtypes, run, *places)


def _place(port: Any) -> Place | None:
    scale, zero = port["quantization"]  # of several channels: (0.0, 0), as of none
    return Place(float(scale), int(zero)) if scale else None


def _stablehlo(path: Path, threads: int) -> Session:
    del threads
    found = load_stablehlo(path)
    compiled = jax.jit(lambda *inputs: found(*inputs))
    return Session(
        path,
        "jax",
        tuple(
            tuple(n if isinstance(n, int) else None for n in port.shape) for port in found.inputs
        ),
        tuple(np.dtype(port.dtype) for port in found.inputs),
        lambda *inputs: tuple(map(np.asarray, jax.tree.leaves(compiled(*inputs)))),
    )


def example(found: Session, *, batch: int = 1, seed: int = 0) -> Sequence[np.ndarray]:
    """Inputs for a session: standard normal numbers, or zeros for integers; free sizes `batch`."""
    rng = np.random.default_rng(seed)
    made = []
    for shape, dtype in zip(found.shapes, found.dtypes, strict=True):
        sizes = [batch if n is None else n for n in shape]
        if np.issubdtype(dtype, np.floating):
            made.append(rng.standard_normal(sizes).astype(dtype))
        else:
            made.append(np.zeros(sizes, dtype))
    return made
