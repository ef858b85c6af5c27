"""Public files on disk: checked, never half written, and unpacked only where we say.

`fetch` downloads one file, `extract` takes named members out of a tar archive. The standard library
does the work; a progress bar appears on standard error where `rich` is installed.
"""

import hashlib
import http.client
import tarfile
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from jaxcompress.cli import byte_bar
from jaxcompress.core.files import replacing

_CHUNK_BYTES = 1 << 18
_TIMEOUT_S = 30.0
_TRANSFER_ERRORS = (OSError, http.client.HTTPException)  # URLError and time-outs are OSError
_ARCHIVE_ERRORS = (tarfile.TarError, EOFError, zlib.error, OSError)


@dataclass(frozen=True)
class Remote:
    """A public file: its address, and the hexadecimal digest that its bytes must have."""

    url: str
    algorithm: str  # a name that hashlib.new knows: "md5", "sha256"
    digest: str


def verify(path: Path, remote: Remote) -> Path:
    """Returns `path` if the file has the digest of `remote`.

    Raises:
      ValueError: it has another one: the file is truncated, corrupt, or not the one we know.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, remote.algorithm).hexdigest()
    if found != remote.digest:
        raise ValueError(_mismatch(str(path), remote, found))
    return path


def fetch(remote: Remote, path: Path, *, remedy: str) -> Path:
    """Downloads `remote` to `path`, verified before the file takes its name.

    Args:
      remote: the address and the digest.
      path: where the file goes; parents are made.
      remedy: the end of the error message: what the user can do without a network.

    Returns:
      `path`.

    Raises:
      FileNotFoundError: the address cannot be reached, or `path` cannot be written.
      ValueError: the bytes do not have the digest; nothing is kept.
    """
    try:
        with replacing(path) as target:
            found = _transfer(remote, target, name=path.name)
            if found != remote.digest:  # raised inside: the temporary file goes away
                raise ValueError(_mismatch(remote.url, remote, found))
    except _TRANSFER_ERRORS as error:
        raise FileNotFoundError(
            f"{path} does not exist and could not be downloaded from {remote.url} ({error}); "
            f"{remedy}"
        ) from error
    return path


def extract(archive: Path, folder: Path, *, members: Sequence[str]) -> None:
    """Writes the regular files `members` of a tar archive to `folder/<last part of the name>`.

    Nothing in the archive decides where a file goes: names are compared with `members`, links,
    devices and other files are skipped.

    Raises:
      ValueError: the archive is corrupt, truncated, or lacks a member.
    """
    missing = set(members)
    try:
        with tarfile.open(archive, "r:*") as tar:
            for member in tar:
                source = tar.extractfile(member) if member.isreg() else None
                if source is None or member.name not in missing:
                    continue
                with replacing(folder / Path(member.name).name) as target:
                    while chunk := source.read(_CHUNK_BYTES):
                        target.write(chunk)
                missing.remove(member.name)
    except _ARCHIVE_ERRORS as error:
        raise ValueError(f"{archive} could not be unpacked to {folder} ({error})") from error
    if missing:
        raise ValueError(f"{archive} lacks {sorted(missing)}: it is not the archive we know")


def _transfer(remote: Remote, target: BinaryIO, *, name: str) -> str:
    """Copies the bytes of `remote` into `target` and returns their digest."""
    digest = hashlib.new(remote.algorithm)
    with urllib.request.urlopen(remote.url, timeout=_TIMEOUT_S) as response:
        total = response.headers.get("Content-Length")
        with _progress(name, total=int(total) if total else None) as advance:
            while chunk := response.read(_CHUNK_BYTES):
                digest.update(chunk)
                target.write(chunk)
                advance(len(chunk))
    return digest.hexdigest()


def _mismatch(where: str, remote: Remote, found: str) -> str:
    return (
        f"{where} is truncated or corrupt: its {remote.algorithm} is {found}, "
        f"expected {remote.digest}; remove it and try again"
    )


@contextmanager
def _progress(name: str, *, total: int | None) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with each number of bytes received."""
    found = byte_bar()
    if found is None:
        yield lambda received: None
        return
    with found as bar:
        task = bar.add_task(name, total=total)
        yield lambda received: bar.advance(task, received)
