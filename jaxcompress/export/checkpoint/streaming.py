"""Quantizes checkpoints that are larger than memory: tensor by tensor, and on after a kill.

The sizes of all packed arrays follow from shapes and format, so the header and the place of every
array are known before the first number is read. A tensor is read, quantized (in slices of rows
where it is large) and written to its place; at most one is in memory. The result is the file that
`export.save` writes of the same packed tree, byte for byte, however often the run was interrupted.
"""

import functools
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import jaxcompress
from jaxcompress.core.compressor import at_path
from jaxcompress.core.packed import QTensor, packed_bytes
from jaxcompress.core.paths import match_rules
from jaxcompress.core.storage import container
from jaxcompress.core.storage.file_contents import TAKEN, laid_out, refuse_names
from jaxcompress.core.storage.leaves import disassemble
from jaxcompress.core.storage.scheme import FLOATS
from jaxcompress.export.checkpoint.stream_pack import (
    Settings,
    calibrator,
    packed_shape,
    packed_slices,
)
from jaxcompress.export.checkpoint.stream_read import Source, Tensor, chunks, open_source, read_rows
from jaxcompress.export.checkpoint.stream_write import Part, part_file
from jaxcompress.formats import Format, check_format, granularity_for, parse
from jaxcompress.quantize import Calibrator


class Progress(NamedTuple):
    """How far a run is."""

    done_bytes: int  # of the source
    source_bytes: int
    done_tensors: int
    tensors: int
    name: str  # of the tensor at hand; "" before the first
    note: str  # what an earlier run left, in the first report only


class StreamReport(NamedTuple):
    """What was written."""

    tensors: int
    quantized: int  # tensors
    resumed: int  # tensors that an earlier run had written
    source_bytes: int  # of all tensors
    payload_bytes: int  # of all arrays of the new file
    file_bytes: int
    bits_per_weight: float  # of the quantized tensors, scales included


class _Job(NamedTuple):
    tensor: Tensor
    packed: QTensor | None  # shapes and dtypes; None: copied


def quantize_file(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    format: str | Format,
    axis: int | tuple[int, ...] | None = 0,
    group: int | None = None,
    include: str = ".*",
    exclude: str | None = None,
    min_dims: int = 2,
    calibrate: str | Calibrator | None = None,
    resume: bool = True,
    force: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> StreamReport:
    """Writes a packed file of a safetensors checkpoint, for `export.load`.

    Quantized are tensors of float32, bfloat16 and float16 (float64 with `jax_enable_x64`) with
    enough axes and a name that the rules choose. All others, float8 included, are copied as they
    are. Beside the target, `.NAME.part` and `.NAME.journal` hold what is done; the next call with
    the same source (names, sizes, times of change) and settings goes on there, any other starts
    over; tensors that are done are read again, and those whose bytes have changed (in the source or
    in the part file) are written again. Memory: one slice of a tensor, of 2**24 elements. Slices
    need scales that rows do not share, or ranges by min-max: clipped or learned scales that reach
    across rows (one per tensor, or per column) take the tensor in one piece.

    Args:
      source: `*.safetensors`, a folder of shards, or `*.safetensors.index.json`.
      target: a file; missing folders are made.
      format: a name for `formats.parse`, or a format.
      axis: channel axes, each index with its own scale. Checkpoints of PyTorch hold [out, in]: 0;
        Flax kernels are [in, out]: -1. None: one scale per tensor.
      group: elements per scale along what remains, flattened; None: the format's own, else all.
      include: a regular expression that matches whole names: what is quantized.
      exclude: the same for what is copied; it goes first.
      min_dims: tensors with fewer axes are copied.
      calibrate: how ranges are found: `min_max`, `mse`, `octav`, `kl`, `percentile`,
        `percentile:99.9`; None: the format's own rule, or min-max. A `Calibrator` has no name to
        compare by: a run with one always starts over.
      resume: False starts over.
      force: replace an existing target, when all is done.
      progress: is called before, after each slice of a tensor, and after each tensor.

    Raises:
      FileNotFoundError: no such source, or a shard is missing.
      FileExistsError: the target exists, without `force`.
      ValueError: a damaged source; an unknown format; a rule that matches nothing; no tensor to
        quantize; an axis out of range; NaN or Inf. With the name of the tensor or file. Nothing
        appears under the target's name then, and nothing stays beside it.
      OSError: the disk is full, or a limit of file sizes: tensors that are done stay for the next
        call, a run without any leaves nothing.
    """
    target = Path(target)
    grid = parse(format) if isinstance(format, str) else format
    check_format(grid)
    clip = calibrator(calibrate) if isinstance(calibrate, str) else calibrate
    rule = os.urandom(8).hex() if isinstance(calibrate, Calibrator) else calibrate
    settings = Settings(grid, granularity_for(grid, axis, group), clip)
    found = open_source(source, leave_out=target.resolve())
    _check_target(target, found, force)
    jobs = _jobs(found, settings, include=include, exclude=exclude, min_dims=min_dims)
    header, entries = _layout(jobs, found.metadata)
    size = len(container.seal(header, 0)) + sum(e.last - e.first for e in entries.values())
    settings_text = repr((grid, settings.where, rule))
    fingerprint = _fingerprint(found, header, settings_text)
    how = {"file_bytes": size, "fingerprint": fingerprint, "resume": resume}
    with part_file(target, header, **how) as part:
        _forget_changed(part, jobs, entries)
        earlier = len(part.done)
        _run(part, jobs, settings, entries, progress or (lambda _: None))
        if _fingerprint(found, header, settings_text) != fingerprint:
            raise ValueError(f"{source}: has changed while it was read")
    return _report(jobs, entries, size, resumed=earlier)


def _check_target(target: Path, source: Source, force: bool) -> None:
    if any(target.resolve() == file.resolve() for file in source.files):
        raise ValueError(f"{target}: is a file of the source; choose another name")
    if target.is_dir():
        raise ValueError(f"{target}: is a folder; give the name of a file")
    if target.exists() and not force:
        raise FileExistsError(f"{target}: exists; --force (force=True) replaces it")


def _jobs(
    source: Source, settings: Settings, *, include: str, exclude: str | None, min_dims: int
) -> dict[str, _Job]:
    """What becomes of every tensor, in the order of the tree that `export.load` gives."""
    if not source.tensors:
        raise ValueError(f"{source.files[0]}: holds no tensor")
    refuse_names(list(source.tensors))
    if include == exclude:
        raise ValueError(f"exclude {exclude!r} takes all that include matches")
    rules = {exclude: False, include: True} if exclude is not None else {include: True}
    matched = match_rules(rules, source.tensors)
    jobs = {}
    for name in sorted(source.tensors, key=lambda name: name.split("/")):
        tensor, packed = source.tensors[name], None
        floating = tensor.dtype.name in FLOATS and len(tensor.shape) >= max(min_dims, 1)
        if floating and matched[name] == include:
            with at_path(name):
                packed = packed_shape(tensor.shape, tensor.dtype, settings)
        jobs[name] = _Job(tensor, packed)
    if not any(job.packed is not None for job in jobs.values()):
        raise ValueError(
            f"no tensor to quantize: of those that {include!r} matches none is of "
            f"{', '.join(FLOATS)} with at least {max(min_dims, 1)} axes"
        )
    return jobs


def _layout(
    jobs: dict[str, _Job], metadata: dict[str, str]
) -> tuple[dict[str, Any], dict[str, container.Entry]]:
    if taken := [key for key in metadata if key in TAKEN or key.startswith("leaf:")]:
        raise ValueError(f"metadata key {taken[0]!r} of the source is taken by the file format")
    arrays: dict[str, Any] = {}
    schemes = {}
    for name, (tensor, packed) in jobs.items():
        plain = jax.ShapeDtypeStruct(tensor.shape, tensor.dtype)
        parts, scheme = disassemble(name, plain if packed is None else packed)
        if clash := set(parts) & set(arrays):
            raise ValueError(f"two leaves are named {sorted(clash)[0]!r}")
        arrays |= parts
        schemes[name] = scheme
    found = laid_out(arrays, schemes, metadata, own=metadata)
    return found.header, found.entries


def _fingerprint(source: Source, header: dict[str, Any], settings: str) -> str:
    # What decides the bytes of the result: of the source names, places, sizes and times.
    files = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in source.files]
    places = [(name, t.file.name, t.start) for name, t in source.tensors.items()]
    journal = 2  # its lines hold checksums
    program = (journal, jax.__version__, jax.default_backend(), jaxcompress.__version__)
    text = json.dumps([files, places, header, settings, program])
    return hashlib.sha256(text.encode()).hexdigest()


def _checksums(part: Part, job: _Job, name: str, entries) -> list[int]:
    """crc32 of a tensor in the source, and of its arrays in the part file."""
    source = 0
    for _, piece in chunks(job.tensor):
        source = zlib.crc32(piece.data, source)
    places = [entries[key] for key in _array_names(name, job)]
    return [source, *(part.checksum(place.first, place.last - place.first) for place in places)]


def _array_names(name: str, job: _Job) -> list[str]:
    return sorted(disassemble(name, job.packed)[0]) if job.packed is not None else [name]


def _forget_changed(part: Part, jobs: dict[str, _Job], entries) -> None:
    """Takes back what an earlier run did where its source or its result is not what it was."""
    changed = [
        name
        for name, sums in part.done.items()
        if name not in jobs or sums != _checksums(part, jobs[name], name, entries)
    ]
    for name in changed:
        del part.done[name]
    if changed:
        part.note += f"; {len(changed)} of them have changed and are written again"


def _run(part: Part, jobs, settings: Settings, entries, tell: Callable[[Progress], None]) -> None:
    size = lambda names: sum(jobs[name].tensor.nbytes for name in names)
    at = Progress(size(part.done), size(jobs), len(part.done), len(jobs), "", part.note)
    tell(at)
    for name, (tensor, packed) in jobs.items():
        if name in part.done:
            continue
        cursor = {}  # of each array, bytes written
        with at_path(name):
            for share, pieces in _pieces(name, tensor, packed, settings):
                for key, piece in pieces.items():
                    data = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
                    part.write(entries[key].first + cursor.get(key, 0), data)
                    cursor[key] = cursor.get(key, 0) + len(data)
                here = at.done_bytes + int(share * tensor.nbytes)
                tell(at._replace(done_bytes=here, name=name, note=""))
        part.finish(name, _checksums(part, jobs[name], name, entries))
        done_bytes = at.done_bytes + tensor.nbytes
        at = at._replace(done_bytes=done_bytes, done_tensors=at.done_tensors + 1, note="")
        tell(at._replace(name=name))


def _pieces(
    name: str, tensor: Tensor, packed: QTensor | None, settings: Settings
) -> Iterator[tuple[float, dict[str, np.ndarray]]]:
    """(share of the tensor done, the next piece of each array) until all is written."""
    if packed is None:
        for end, piece in chunks(tensor):
            yield end / tensor.nbytes, {name: piece}
        return
    read = functools.partial(read_rows, tensor)
    for last, pieces in packed_slices(name, read, tensor.shape, tensor.dtype, settings):
        yield last / max(tensor.shape[0], 1), pieces


def _report(jobs: dict[str, _Job], entries, file_bytes: int, *, resumed: int) -> StreamReport:
    packed = [job.packed for job in jobs.values() if job.packed is not None]
    return StreamReport(
        tensors=len(jobs),
        quantized=len(packed),
        resumed=resumed,
        source_bytes=sum(job.tensor.nbytes for job in jobs.values()),
        payload_bytes=sum(entry.last - entry.first for entry in entries.values()),
        file_bytes=file_bytes,
        bits_per_weight=8 * packed_bytes(packed) / max(sum(leaf.size for leaf in packed), 1),
    )
