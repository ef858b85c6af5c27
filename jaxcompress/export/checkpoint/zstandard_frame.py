"""A file as one Zstandard frame (RFC 8878), written and read strictly.

What `zstd -19 FILE` writes is read too: one frame that says the size of its content. The blocks of
a frame are walked before anything is decompressed, so a truncated frame, bytes behind it and a size
that its blocks cannot have are known by then; no more than the said size is ever decompressed.
"""

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

LEVEL = 19
MAGIC = b"\x28\xb5\x2f\xfd"
_BLOCK_BYTES = 2**17  # the most that a block can hold
_OWN_BYTES = 2**10  # of a part that is worth a table
_MAX_WINDOW = 2**27  # what decompressors support by default


def level_of(codec: str) -> int:
    """The level that a codec's name says: `zstd` is 19, `zstd:3` is 3.

    Raises:
      ValueError: no such codec, or a level outside 1 to 22.
    """
    levels = {"zstd": LEVEL, **{f"zstd:{level}": level for level in range(1, 23)}}
    if codec not in levels:
        raise ValueError(f"compress must be 'zstd', or 'zstd:1' to 'zstd:22', got {codec!r}")
    return levels[codec]


def compress(parts: Sequence[bytes], codec: str) -> bytes:
    """The frame of some bytes; it says their number.

    Long parts have blocks of their own, hence Huffman tables of their own: with one table for
    codes and bitmasks a frame was 4 to 17 % larger.

    Raises:
      ImportError: zstandard is missing.
      ValueError: as `level_of`.
    """
    level, zstandard = level_of(codec), _zstandard()
    coder = zstandard.ZstdCompressor(level=level).compressobj(size=sum(map(len, parts)))
    out = []
    for own, run in itertools.groupby(parts, key=lambda part: len(part) >= _OWN_BYTES):
        for piece in run if own else [b"".join(run)]:
            out += [coder.compress(piece), coder.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)]
    return b"".join([*out, coder.flush()])


def is_compressed(path: str | os.PathLike) -> bool:
    """Whether a file begins as a frame does; no plain safetensors file of a legal size does."""
    with Path(path).open("rb") as file:
        return file.read(4) == MAGIC


@contextlib.contextmanager
def decompressed(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """The content of a compressed file as a file, for reading in order, and its size in bytes.

    Raises:
      ImportError: zstandard is missing.
      ValueError: truncated, bytes behind the frame, no size in it, or a size that its blocks cannot
        have; while reading: damaged.
    """
    zstandard = _zstandard()
    with path.open("rb") as file:
        try:
            frame = zstandard.get_frame_parameters(file.read(18))
            file.seek(0)
            start = zstandard.frame_header_size(file.read(18))
        except (zstandard.ZstdError, ValueError) as error:
            raise ValueError(f"{path}: truncated or damaged: {error}") from error
        if frame.content_size == zstandard.CONTENTSIZE_UNKNOWN:
            raise ValueError(f"{path}: its Zstandard frame does not say its size")
        if frame.dict_id or frame.window_size > _MAX_WINDOW:
            raise ValueError(f"{path}: needs a dictionary, or a window above {_MAX_WINDOW:,} bytes")
        end, most = _walk(path, file, start)
        end += 4 * frame.has_checksum
        size = os.fstat(file.fileno()).st_size
        if end != size:
            what = "truncated" if end > size else "damaged"
            raise ValueError(f"{path}: {what}: its frame ends at byte {end} of {size}")
        if frame.content_size > most:
            raise ValueError(
                f"{path}: damaged: it says {frame.content_size} bytes, its blocks hold {most} "
                "at most"
            )
        file.seek(0)
        reader = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).stream_reader(file)
        try:
            yield reader, frame.content_size
        except zstandard.ZstdError as error:
            raise ValueError(f"{path}: damaged: {error}") from error


def _walk(path: Path, file: BinaryIO, start: int) -> tuple[int, int]:
    """Where the last block ends, and what all blocks hold at most.

    A block begins with 3 bytes: whether it is the last, its type (0 raw, 1 one byte repeated,
    2 compressed), and its size.
    """
    most, last = 0, 0
    while not last:
        file.seek(start)
        if len(head := file.read(3)) < 3:
            raise ValueError(f"{path}: truncated: a block begins at byte {start}")
        number = int.from_bytes(head, "little")
        last, kind, size = number & 1, number >> 1 & 3, number >> 3
        if kind == 3 or size > _BLOCK_BYTES:
            raise ValueError(f"{path}: damaged: no block begins at byte {start}")
        most += _BLOCK_BYTES if kind == 2 else size
        start += 3 + (1 if kind == 1 else size)
    return start, most


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise ImportError(
            'compressed checkpoints need zstandard: pip install "jaxcompress[export]"'
        ) from error
    return zstandard
