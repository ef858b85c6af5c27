"""A teacher's outputs on disk: computed once, found again by what they were computed from."""

import contextlib
import io
import json
import os
import secrets
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.files import replacing
from jaxcompress.core.notices import warn
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.distill.teachers.output_storage import Dense, Storage
from jaxcompress.graph.fingerprint import Unidentified, of_arrays, of_function, of_parts

Augment = Callable[[jax.Array, Any], Any]
_CHECKSUM_BYTES = 4  # crc32, at the end of a file
_CHUNK_BYTES = 2**24


@dataclass(frozen=True)
class CachedOutputs:
    """A teacher's outputs in memory-mapped files; call it with example numbers.

    Attributes:
      files: one for each epoch of augmentation; none of a teacher that cannot be identified.
      parts: the fingerprints of what they depend on.
      computed: the epochs that were not there and had to be computed.
    """

    files: tuple[Path, ...]
    parts: dict[str, str]
    computed: tuple[int, ...]
    _shape: tuple[int, ...]
    _storage: Storage
    _rows: tuple[np.ndarray, ...]

    def __call__(self, indices: Any, *, epoch: int = 0) -> np.ndarray:
        """Outputs [n, ...] of the examples with these numbers, in that order.

        Raises:
          IndexError: an example or an epoch that is not there.
        """
        if not 0 <= epoch < len(self._rows):
            raise IndexError(f"epoch must be 0 to {len(self._rows) - 1}, got {epoch}")
        rows = self._rows[epoch]
        indices = np.asarray(indices)
        if indices.ndim != 1 or not np.issubdtype(indices.dtype, np.integer):
            raise IndexError(f"indices must be integers [n], got {indices.dtype} {indices.shape}")
        if indices.size and (indices.min() < 0 or indices.max() >= len(rows)):
            raise IndexError(
                f"indices must be 0 to {len(rows) - 1}, got {indices.min()} to {indices.max()}"
            )
        return self._storage.decode(np.asarray(rows[indices]), self._shape)


def augment_examples(augment: Augment, key: jax.Array, epoch: Any, indices: Any, inputs: Any):
    """Each example changed by a key of its own: fold_in(fold_in(key, epoch), its number).

    What an example looks like in an epoch does not depend on its batch, so that the outputs of a
    cache belong to it. Give the student these inputs too.

    Args:
      augment: (key, inputs [1, ...]) -> inputs [1, ...]: `train.augment.random_crop` and its like.
        Changes that mix examples (mixup) find no partner here.
      key: of the augmentation, jax.random.key(seed).
      epoch: integer, may be traced.
      indices: integers [n], the numbers of the examples in the data set.
      inputs: pytree of arrays [n, ...].
    """
    of_epoch = jax.random.fold_in(key, epoch)

    def one(index, example):
        alone = jax.tree.map(lambda x: x[None], example)
        changed = augment(jax.random.fold_in(of_epoch, index), alone)
        return jax.tree.map(lambda x: x[0], changed)

    return jax.vmap(one)(jnp.asarray(indices), inputs)


def cached_outputs(
    directory: str | os.PathLike,
    teacher: Callable[[Any, Any], jax.Array],
    teacher_params: Any,
    inputs: Any,
    *,
    view: Callable[[Any], Any] | None = None,
    augment: Augment | None = None,
    seed: int = 0,
    epochs: int = 1,
    storage: Storage | None = None,
    batch_size: int = 256,
) -> CachedOutputs:
    """The teacher's outputs for all examples, read from `directory` or computed and kept there.

    A file is named by a fingerprint of the teacher (bytes of its params, jaxpr of its function,
    names and numbers of what that calls on the host), the data, the view, the augmentation (jaxpr,
    seed, epoch) and the storage: if anything differs, it is another file. Files are written under a
    temporary name: a killed run leaves no half one. Each ends with a checksum, which is tested
    whenever it is opened. A teacher or augmentation that cannot be identified (it reads an open
    file on the host) is computed in every run, with a warning; its files have no name then.

    Args:
      directory: made if it is missing; caches may share it.
      teacher: (params, inputs) -> floating point outputs [n, ...] of n examples, each of them a
        function of its own example.
      teacher_params: pytree of arrays.
      inputs: pytree of arrays with the examples along axis 0.
      view: params -> the params that the teacher computes with; for a compressed teacher
        `lambda p: recipe.apply(p, state)`.
      augment: (key, inputs) -> inputs, applied by `augment_examples` with jax.random.key(seed).
      seed: of the augmentation.
      epochs: how many augmented versions of the data to keep; a longer training goes round:
        `outputs(indices, epoch=epoch % epochs)`.
      storage: `Dense()` (the default, float32, exact), `Dense("float16")` or `TopK(k)`.
      batch_size: examples at a time; the last bits of a network's outputs may depend on it.

    In training, put the rows of a batch beside its inputs, and take them as the teacher:
    `make_step(..., teacher=lambda params, inputs: inputs["teacher"])`.

    Raises:
      ValueError: no examples, arrays of different lengths, epochs without augmentation, outputs
        that do not fit the storage or hold NaN, a file that is damaged.
      TypeError: outputs that are not one floating point array.
    """
    storage = Dense() if storage is None else storage
    count = _check(inputs, epochs, augment, batch_size)
    batch_size = min(batch_size, count)
    params = teacher_params if view is None else jax.jit(view)(teacher_params)
    key = jax.random.key(seed)

    def run(params, epoch, indices, batch):
        if augment is not None:
            batch = augment_examples(augment, key, epoch, indices, batch)
        return teacher(params, batch)

    numbers = np.arange(batch_size, dtype=np.int32)
    example = jax.tree.map(lambda a: a[:batch_size], inputs)
    shape = _output_shape(run, params, numbers, example, batch_size)
    row = storage.row(shape)
    parts = {
        "version": "2",  # since each file ends with a checksum
        "teacher_params": of_arrays(teacher_params),
        "data": of_arrays(inputs),
        "view": "" if view is None else of_arrays(params),
        "storage": f"{storage}",
    }
    try:
        parts["teacher_function"] = of_function(teacher, params, example)
        parts["augmentation"] = ""
        if augment is not None:
            seen = lambda e, i, b: augment_examples(augment, key, e, i, b)
            code = of_function(seen, np.int32(0), numbers, example)
            parts["augmentation"] = f"{code} seed {seed}"
        name, known = of_parts(parts)[:32], True
    except Unidentified as error:
        warn(
            f"the teacher or its augmentation cannot be identified: {error}; its outputs are "
            "computed again in every run"
        )
        name, known = f".{secrets.token_hex(16)}", False
    files = tuple(Path(directory) / f"{name}-{epoch}.npy" for epoch in range(epochs))
    missing = tuple(epoch for epoch, file in enumerate(files) if not file.exists())
    jitted = jax.jit(run)
    for epoch in missing:
        compute = lambda rows, e=epoch: _batch(jitted, params, e, rows, inputs, batch_size)
        _write(files[epoch], compute, storage, row, count, batch_size)
    if missing and known:
        with replacing(Path(directory) / f"{name}.json") as file:
            file.write(json.dumps(parts, indent=1).encode())
    rows = tuple(_read(file, row, count) for file in files)
    if not known:  # what is mapped stays until it is let go, without a name where that is possible
        for file in files:
            with contextlib.suppress(OSError):
                file.unlink()
        files = ()
    return CachedOutputs(files, parts, missing, shape, storage, rows)


def _check(inputs: Any, epochs: int, augment: Augment | None, batch_size: int) -> int:
    found = leaves_with_paths(inputs)
    lengths = {path: leaf.shape[0] if leaf.ndim else 0 for path, leaf in found}
    if not lengths or len(set(lengths.values())) > 1 or not min(lengths.values()):
        raise ValueError(
            f"inputs must be arrays with the same number of examples along axis 0, got {lengths}"
        )
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs and batch_size must be at least 1, got {epochs}, {batch_size}")
    if augment is None and epochs > 1:
        raise ValueError(f"epochs={epochs} without augment: every epoch would be the same")
    return next(iter(lengths.values()))


def _output_shape(run, params, numbers, example, batch_size) -> tuple[int, ...]:
    out = jax.eval_shape(run, params, np.int32(0), numbers, example)
    if not hasattr(out, "dtype") or not jnp.issubdtype(out.dtype, jnp.floating):
        raise TypeError(f"teacher must return one floating point array, got {out}")
    if out.dtype.itemsize > 4:
        raise TypeError(f"teacher must return float32 or shorter, got {out.dtype}")
    if not out.ndim or out.shape[0] != batch_size:
        raise ValueError(
            f"teacher must return [examples, ...], got {list(out.shape)} for {batch_size} examples"
        )
    return out.shape[1:]


def _batch(jitted, params, epoch, rows, inputs, batch_size) -> np.ndarray:
    # The last batch is filled with its own first example: one program for all.
    filled = np.concatenate([rows, np.full(batch_size - len(rows), rows[0], np.int32)])
    batch = jax.tree.map(lambda a: a[filled], inputs)
    return np.asarray(jitted(params, np.int32(epoch), filled, batch)[: len(rows)]).astype(
        np.float32
    )


def _write(
    path: Path,
    compute: Callable[[np.ndarray], np.ndarray],
    storage: Storage,
    row: np.dtype,
    count: int,
    batch_size: int,
) -> None:
    head = io.BytesIO()
    np.lib.format.write_array_header_2_0(
        head,
        {
            "descr": np.lib.format.dtype_to_descr(row.base),
            "fortran_order": False,
            "shape": (count, *row.shape),
        },
    )
    with replacing(path) as file:
        file.write(head.getvalue())
        checksum = zlib.crc32(head.getvalue())
        for start in range(0, count, batch_size):
            numbers = np.arange(start, min(start + batch_size, count), dtype=np.int32)
            outputs = compute(numbers)
            nan = np.isnan(outputs).reshape(len(outputs), -1).any(axis=1)
            if nan.any():
                raise ValueError(f"the teacher's output of example {numbers[nan][0]} is NaN")
            data = np.ascontiguousarray(storage.encode(outputs)).tobytes()
            file.write(data)
            checksum = zlib.crc32(data, checksum)
        file.write(checksum.to_bytes(_CHECKSUM_BYTES, "little"))


def _read(path: Path, row: np.dtype, count: int) -> np.ndarray:
    wrong = f"{path} is not what the cache wrote; delete it to compute it again"
    try:
        _check_sum(path)
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{wrong}: {error}") from error
    if rows.shape != (count, *row.shape) or rows.dtype != row.base:
        raise ValueError(f"{wrong}: {rows.dtype}{list(rows.shape)}")
    return rows


def _check_sum(path: Path) -> None:
    left, checksum = path.stat().st_size - _CHECKSUM_BYTES, 0
    with path.open("rb") as file:
        while left > 0 and (data := file.read(min(left, _CHUNK_BYTES))):
            checksum, left = zlib.crc32(data, checksum), left - len(data)
        if file.read() != checksum.to_bytes(_CHECKSUM_BYTES, "little"):
            raise ValueError("its checksum is wrong")
