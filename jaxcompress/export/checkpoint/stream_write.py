"""A large file that comes into being under another name, and goes on after a kill.

Beside the target `OUT` lie `.OUT.part`, which has the final size from the start, and
`.OUT.journal`: one line with the fingerprint of the run, then one line for each batch of leaves
that are safe on disk: their names, with checksums of what was read and of what was written. What
the journal does not name, or what has changed since, is written again; the target's name is taken
last.
"""

import contextlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # not on Windows: there two runs of one target are not told apart
    fcntl = None

from jaxcompress.core.storage import container

COMMIT_S = 1.0  # seconds between two commits, at least
_CHUNK_BYTES = 2**24


class Part:
    """The file in the making; build it with `part_file`."""

    def __init__(self, file: BinaryIO, journal: Path, header: dict[str, Any]):
        self.done: dict[str, Any] = {}  # {leaf: checksums, of what was read and of each array}
        self.note = ""
        self._file, self._journal, self._header = file, journal, header
        self._start = len(container.seal(header, 0))
        self._pending: dict[str, Any] = {}
        self._committed_s = time.monotonic()

    def write(self, position: int, data: Any) -> None:
        """Puts bytes at a position of the data."""
        self._file.seek(self._start + position)
        self._file.write(data)

    def checksum(self, position: int, count: int) -> int:
        """crc32 of bytes of the data, as they lie in the file."""
        self._file.flush()
        self._file.seek(self._start + position)
        found = 0
        for first in range(0, count, _CHUNK_BYTES):
            found = zlib.crc32(self._file.read(min(_CHUNK_BYTES, count - first)), found)
        return found

    def finish(self, name: str, checksums: Any) -> None:
        """Says that all of a leaf is written; now and then makes that last.

        Args:
          name: of the leaf.
          checksums: JSON that tells whether the leaf is still as it was.
        """
        self._pending[name] = checksums
        if time.monotonic() - self._committed_s >= COMMIT_S:
            self.commit()

    def commit(self) -> None:
        """Makes what is written last, then says so in the journal."""
        self._sync()
        _append(self._journal, self._pending)
        self.done |= self._pending
        self._pending, self._committed_s = {}, time.monotonic()

    def seal(self) -> None:
        """Writes the header, with the checksum of all that lies in the file."""
        self._file.seek(self._start)
        checksum = container.open_checksum(self._header)
        while data := self._file.read(_CHUNK_BYTES):
            checksum = zlib.crc32(data, checksum)
        self._file.seek(0)
        self._file.write(container.seal(self._header, checksum))
        self._sync()

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())


@contextlib.contextmanager
def part_file(
    target: Path, header: dict[str, Any], *, file_bytes: int, fingerprint: str, resume: bool
) -> Iterator[Part]:
    """The part file of `target`, which takes that name if the block ends well.

    After a ValueError or TypeError nothing stays, since the same run would fail again; after
    anything else (a kill, a full disk) what is done stays for the next run, if any leaf is.

    Args:
      target: in a folder that exists or can be made.
      header: of `container.layout`.
      file_bytes: of the whole file.
      fingerprint: of source and settings; only a part file of the same one is continued.
      resume: False starts over in any case.

    Raises:
      ValueError: another run writes this target.
      OSError: the disk has no room for the file; nothing is written then.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    path, journal = (target.with_name(f".{target.name}.{end}") for end in ("part", "journal"))
    with _locked(path) as file:
        part = Part(file, journal, header)
        part.done, part.note = _done(path, journal, file_bytes, fingerprint, resume)
        try:
            if not part.done:
                _begin(file, path, journal, file_bytes, fingerprint)
            yield part
            part.commit()
            part.seal()
            os.replace(path, target)
        except BaseException as error:
            if isinstance(error, ValueError | TypeError) or not part.done:
                path.unlink(missing_ok=True)
                journal.unlink(missing_ok=True)
            raise
        journal.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
        except (BlockingIOError, FileNotFoundError):
            same = False
        if not same:
            raise ValueError(f"{path}: another run is writing this target")
        yield file


def _begin(file: BinaryIO, path: Path, journal: Path, file_bytes: int, fingerprint: str) -> None:
    file.truncate(0)
    free = shutil.disk_usage(path.parent).free
    if file_bytes > free:
        raise OSError(f"{path.parent}: needs {file_bytes:,} bytes, {free:,} are free")
    file.truncate(file_bytes)
    journal.unlink(missing_ok=True)
    _append(journal, fingerprint)


def _append(journal: Path, value: Any) -> None:
    """Adds one JSON value to a journal, safe on disk."""
    with journal.open("a") as file:
        file.write("\n" + json.dumps(value))  # after what may be a torn line
        file.flush()
        os.fsync(file.fileno())


def _done(
    path: Path, journal: Path, file_bytes: int, fingerprint: str, resume: bool
) -> tuple[dict[str, Any], str]:
    """What an earlier run finished, and a remark for the user."""
    if not journal.exists():
        return {}, ""
    if not resume:
        return {}, "starts over, as asked"
    found = list(_lines(journal.read_text(errors="replace")))
    if found[:1] != [fingerprint] or path.stat().st_size != file_bytes:
        return {}, "starts over: source, settings, program or part file have changed"
    done = {name: sums for batch in found[1:] for name, sums in batch.items()}
    return done, f"goes on after {len(done)} tensors" if done else ""


def _lines(text: str) -> Iterator[Any]:
    # A line that was torn by a kill is no JSON.
    for line in filter(None, text.splitlines()):
        with contextlib.suppress(ValueError):
            yield json.loads(line)
