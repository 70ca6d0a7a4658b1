"""Where the files of backups are kept: in a folder, or in a bucket (`s3.py`).

Names are `DATABASE/FILE`, of lower-case letters, digits, `_`, `-` and `.`; all that a database has is the folder
`DATABASE/`. A file under its name is whole, and safe from a crash.
"""

import asyncio
import hashlib
import os
import re
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import ParamSpec, Protocol, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

P = ParamSpec("P")
T = TypeVar("T")

_NAME = re.compile(r"[a-z0-9_-]+/[a-z0-9_-]+(\.[a-z0-9]+)?")
_FOLDER = re.compile(r"[a-z0-9_-]+/")
_ENDPOINT = re.compile(r"https?://[^/]")
_PERMISSIONS = 0o700
_CHUNK = 1024 * 1024
_URLS = "HTX_BACKUP_URL must be file:///FOLDER or s3://BUCKET/PREFIX?endpoint=URL&region=NAME"


class StorageUnavailable(Exception):
    """The storage cannot be reached, is full or refuses us: try again later. The sentence is fit for a customer."""


@dataclass(frozen=True, slots=True)
class Written:
    """A file that is safely kept: its size in bytes, and its SHA-256 in hexadecimal."""

    size_bytes: int
    sha256: str


class BackupStorage(Protocol):
    """What is asked of a storage. All methods raise StorageUnavailable."""

    async def write(self, name: str, chunks: AsyncIterator[bytes]) -> Written:
        """Keep a stream under a name, in place of what was there; it shows whole or not at all.

        What reading the stream raises is raised here, and nothing is kept.
        """

    def read(self, name: str) -> AsyncGenerator[bytes, None]:
        """Return a file, in pieces; close the generator if it is not read to its end.

        Raises FileNotFoundError.
        """

    async def exists(self, name: str) -> bool:
        """Return whether there is a file of this name."""

    async def list(self, folder: str = "") -> list[str]:
        """Return the names of a folder's files, of all files for "", in their order."""

    async def remove(self, name: str) -> None:
        """Remove a file, or all of a folder if the name ends in a slash; nothing happens if it is gone."""

    async def sweep(self, *, before: datetime) -> None:
        """Remove what is left of writes that a crash has ended before this moment; it never shows otherwise."""


def storage_at(url: str, *, access_key: str = "", secret_key: str = "") -> BackupStorage:
    """Return the storage that a URL names.

    Raises ValueError; the sentence is for the operator, and does not show the URL.
    """
    parts = urlsplit(url)
    if parts.scheme == "file" and re.match("/+[^/]", parts.path) and not (parts.netloc or parts.query):
        return FolderStorage(Path(unquote(parts.path)))
    query = parse_qs(parts.query)
    region = query.pop("region", ["us-east-1"])[-1]  # what servers of one's own go by, if they ask for one
    endpoint = query.pop("endpoint", [f"https://s3.{region}.amazonaws.com"])[-1]
    bucket = parts.hostname
    if parts.scheme != "s3" or not bucket or bucket != parts.netloc or query or not _ENDPOINT.match(endpoint):
        raise ValueError(_URLS)
    if not (access_key and secret_key):
        raise ValueError("HTX_BACKUP_URL names a bucket: set HTX_BACKUP_ACCESS_KEY and HTX_BACKUP_SECRET_KEY too")
    from controlplane.backups.s3 import S3Storage  # noqa: PLC0415 - 5 MB, for those alone who have a bucket

    return S3Storage(
        bucket=bucket,
        prefix=unquote(parts.path).strip("/"),
        endpoint=endpoint,
        region=region,
        access_key=access_key,
        secret_key=secret_key,
    )


def checked(name: str, *, folder: bool = False) -> str:
    """Return the name; raise ValueError if it is none, such as one that has lost its id and means all that there is."""
    if not (_NAME.fullmatch(name) or (folder and _FOLDER.fullmatch(name))):
        raise ValueError(f"{name!r} is no name of a backup's file")
    return name


class FolderStorage:
    """A folder, made at the first write, for its owner alone.

    A file is written as `NAME.….part` and renamed: two that write one file do not meet, and a `.part` is never listed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def write(self, name: str, chunks: AsyncIterator[bytes]) -> Written:
        """Keep a stream under a name."""
        part = await _on_disk(_Part, self._folder / checked(name))
        try:
            async for chunk in chunks:
                await _on_disk(part.write, chunk)
            return await _on_disk(part.keep)
        finally:
            await _on_disk(part.close)

    async def read(self, name: str) -> AsyncGenerator[bytes, None]:
        """Return a file, in pieces."""
        path = self._folder / checked(name)
        if not await self.exists(name):
            raise FileNotFoundError(name)
        file = await _on_disk(path.open, "rb")  # buffered: it has a lock, and a read may go on when we close it
        try:
            while chunk := await _on_disk(file.read, _CHUNK):
                yield chunk
        finally:
            file.close()

    async def exists(self, name: str) -> bool:
        """Return whether there is a file of this name."""
        return await _on_disk((self._folder / checked(name)).is_file)

    async def list(self, folder: str = "") -> list[str]:
        """Return the names of a folder's files, of all files for ""."""
        if folder:
            checked(folder, folder=True)
        return await _on_disk(_list, self._folder, f"{folder.rstrip('/') or '*'}/*")

    async def remove(self, name: str) -> None:
        """Remove a file or a folder, and with a file what unfinished writes of it have left."""
        await _on_disk(_remove, self._folder / checked(name, folder=True), folder=name.endswith("/"))

    async def sweep(self, *, before: datetime) -> None:
        """Remove what is left of writes that have not gone on since this moment."""
        await _on_disk(_sweep, self._folder, before.timestamp())


async def _on_disk(step: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    try:
        return await asyncio.to_thread(step, *args, **kwargs)
    except OSError as error:
        raise StorageUnavailable(f"The storage of backups cannot be used: {error.strerror}.") from error


class _Part:
    """A file that is being written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        for folder in (path.parent.parent, path.parent):
            folder.mkdir(mode=_PERMISSIONS, parents=True, exist_ok=True)
        descriptor, aside = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".part", dir=path.parent)
        self._aside = Path(aside)
        self._file = os.fdopen(descriptor, "wb")
        self._size = 0
        self._digest = hashlib.sha256()

    def write(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self._size += len(chunk)
        self._digest.update(chunk)

    def keep(self) -> Written:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._aside.rename(self._path)
        for folder in (self._path.parent, self._path.parent.parent):  # the new name, and the new folder's own
            _sync(folder)
        return Written(size_bytes=self._size, sha256=self._digest.hexdigest())

    def close(self) -> None:
        self._aside.unlink(missing_ok=True)  # it is not there if it was kept
        self._file.close()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _list(root: Path, pattern: str) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.glob(pattern) if path.suffix != ".part")


def _remove(path: Path, *, folder: bool) -> None:
    parent = path if folder else path.parent
    for found in parent.glob("*" if folder else f"{path.name}.*.part"):
        found.unlink(missing_ok=True)
    if not folder:
        path.unlink(missing_ok=True)
    _remove_if_empty(parent)


def _sweep(root: Path, before: float) -> None:
    for part in root.glob("*/*.part"):
        with suppress(FileNotFoundError):  # it was finished meanwhile
            if part.stat().st_mtime < before:
                part.unlink()
                _remove_if_empty(part.parent)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # it is gone, or it is not empty: as a write may begin right now, asking first is no use
        folder.rmdir()
        _sync(folder.parent)
