"""What files cost and what they give: bytes, latency and agreement, measured side by side."""

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcompress.cost.timing.clock import interleaved
from jaxcompress.export.sessions import Session, example, session


class Measured(NamedTuple):
    """A file in its runtime.

    Attributes:
      file_bytes: its size.
      latency_s: median seconds of one call.
      batch: rows of that call.
      argmax_agreement: share of rows whose largest output is that of the reference; None without.
      equal_rows: share of rows that equal the reference in every output; None without.
      largest_difference: from the reference, over all outputs; None without.
    """

    file_bytes: int
    latency_s: float
    batch: int
    argmax_agreement: float | None = None
    equal_rows: float | None = None
    largest_difference: float | None = None


def benchmark(
    files: "Mapping[str, str | os.PathLike] | str | os.PathLike",
    *inputs: Any,
    reference: Any = None,
    threads: int = 1,
    repeats: int = 50,
    batch: int = 1,
) -> dict[str, Measured]:
    """Runs files in their runtimes, interleaved, and compares what they give.

    A file that takes codes (LiteRT's `interface="int8"`) may be given numbers: they are put on the
    grid that it names before the clock starts, and its result is compared as numbers.

    Args:
      files: {name: path} of `.onnx`, `.tflite` and `.stablehlo` files of one network, or one path.
      *inputs: [N, ...], what the network takes; none: random numbers, and nothing is compared.
      reference: outputs [N, ...] to compare with, of the simulation in JAX say, or a function
        (*inputs) -> outputs that gives them; the first output counts.
      threads: of ONNX Runtime and LiteRT.
      repeats: rounds of timing; each round starts with another file.
      batch: rows of a timed call where a file leaves them free.

    Returns:
      {name: Measured}, in the order of the files.

    Raises:
      ValueError: no files; inputs that do not fit a file, with its name; a reference without
        inputs or of another number of rows.
      FileNotFoundError, ImportError: as `session`.
    """
    named = dict(files) if isinstance(files, Mapping) else {str(files): files}
    if not named:
        raise ValueError("benchmark: there are no files")
    found = {name: session(path, threads=threads) for name, path in named.items()}
    rows = {name: _batch(loaded, batch) for name, loaded in found.items()}
    given = [np.asarray(x) for x in jax.tree.leaves(inputs)]
    if given:
        for name, loaded in found.items():
            _check(name, loaded, given)
    known = _reference(reference, given)
    first = {
        name: [_padded(x[: rows[name]], rows[name]) for x in _taken(loaded, given)]
        if given
        else example(loaded, batch=batch)
        for name, loaded in found.items()
    }
    calls = {name: _call(loaded, first[name]) for name, loaded in found.items()}
    seconds = interleaved(calls, repeats=repeats)
    result = {}
    for name, loaded in found.items():
        size = os.path.getsize(loaded.path)
        compared: tuple[Any, ...] = ()
        if known is not None:
            compared = _compared(_outputs(loaded, given, rows[name]), known)
        result[name] = Measured(size, seconds[name], rows[name], *compared)
    return result


def outputs(loaded: Session, *inputs: Any, batch: int = 1) -> np.ndarray:
    """The first output [N, ...] of a session for inputs [N, ...], in pieces of its batch."""
    given = [np.asarray(x) for x in inputs]
    _check(str(loaded.path), loaded, given)
    return _outputs(loaded, given, _batch(loaded, batch))


def _call(loaded: Session, inputs: Any) -> Callable[[], Any]:
    return lambda: loaded.run(*inputs)


def _batch(loaded: Session, batch: int) -> int:
    sizes = {shape[0] for shape in loaded.shapes if shape}
    fixed = sorted(n for n in sizes if n is not None)
    return fixed[0] if fixed else batch


def _check(name: str, loaded: Session, given: list[np.ndarray]) -> None:
    if len(given) != len(loaded.shapes):
        raise ValueError(f"{name}: takes {len(loaded.shapes)} inputs, got {len(given)}")
    taken = _taken(loaded, given)
    for number, (x, shape, dtype) in enumerate(
        zip(taken, loaded.shapes, loaded.dtypes, strict=True)
    ):
        sizes = tuple(shape[1:])
        fits = x.ndim == len(shape) and all(
            a is None or a == b for a, b in zip(sizes, x.shape[1:], strict=True)
        )
        if not fits or x.dtype != dtype:
            raise ValueError(
                f"{name}: input {number} must be {dtype} [N, {', '.join(map(str, sizes))}], "
                f"got {given[number].dtype} {x.shape}"
            )


def _on_grid(loaded: Session, given: list[np.ndarray]) -> list[bool]:
    # Which inputs are numbers where the file takes codes.
    places = loaded.takes or [None] * len(given)
    return [
        place is not None
        and np.issubdtype(dtype, np.integer)
        and np.issubdtype(x.dtype, np.floating)
        for x, place, dtype in zip(given, places, loaded.dtypes, strict=True)
    ]


def _taken(loaded: Session, given: list[np.ndarray]) -> list[np.ndarray]:
    # q = clip(round(x / s) + z) of numbers where the file takes codes.
    taken = list(given)
    for k, on_grid in enumerate(_on_grid(loaded, given)):
        if on_grid:
            place, dtype = loaded.takes[k], loaded.dtypes[k]
            assert place is not None
            ends = np.iinfo(dtype)
            codes = np.rint(given[k].astype(np.float64) / place.scale) + place.zero
            taken[k] = np.clip(codes, ends.min, ends.max).astype(dtype)
    return taken


def _numbers(loaded: Session, y: np.ndarray) -> np.ndarray:
    place = loaded.gives[0]
    if place is None or not np.issubdtype(y.dtype, np.integer):
        return y
    return ((y.astype(np.float64) - place.zero) * place.scale).astype(np.float32)


def _padded(x: np.ndarray, rows: int) -> np.ndarray:
    missing = rows - len(x)
    return x if not missing else np.concatenate([x, np.repeat(x[-1:], missing, axis=0)])


def _outputs(loaded: Session, given: list[np.ndarray], rows: int) -> np.ndarray:
    count, parts = len(given[0]), []
    as_numbers = any(_on_grid(loaded, given))
    given = _taken(loaded, given)
    for start in range(0, count, rows):
        pieces = [_padded(x[start : start + rows], rows) for x in given]
        parts.append(np.array(loaded.run(*pieces)[0])[: count - start])
    found = np.concatenate(parts)
    return _numbers(loaded, found) if as_numbers else found


def _reference(reference: Any, given: list[np.ndarray]) -> np.ndarray | None:
    if reference is None:
        return None
    if not given:
        raise ValueError("reference: there are no inputs to compare on")
    known = reference(*given) if callable(reference) else reference
    known = np.asarray(jax.tree.leaves(known)[0])
    if len(known) != len(given[0]):
        raise ValueError(f"reference: {len(known)} rows for {len(given[0])} of the inputs")
    return known


def _compared(found: np.ndarray, known: np.ndarray) -> tuple[float, float, float]:
    if found.shape != known.shape:
        raise ValueError(f"reference: must have the shape {found.shape}, got {known.shape}")
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (found, known))
    return (
        float((a.argmax(1) == b.argmax(1)).mean()),
        float((a == b).all(1).mean()),
        float(np.abs(a - b).max(initial=0.0)),
    )
