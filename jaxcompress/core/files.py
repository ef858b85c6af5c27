"""The one way files come into being: whole, or not at all."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_NAME_BYTES = 200  # of the target's name in that of the temporary file: names end at 255


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Opens a temporary file beside `path`, which takes its name only if the block ends well.

    Readers see the old file or the whole new one; a failed block (a full disk too) leaves nothing
    behind. Every call has a temporary file of its own, so that threads and processes may write one
    path at once: the last one to end decides. Missing folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part, file = _created(path)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            part.unlink()
        raise


def _created(path: Path) -> tuple[Path, BinaryIO]:
    name = os.fsdecode(os.fsencode(path.name)[:_NAME_BYTES])
    while True:
        part = path.with_name(f".{name}.{secrets.token_hex(8)}.part")
        with contextlib.suppress(FileExistsError):
            return part, part.open("xb")  # never the file of another writer
