"""The files of backups: `DATABASE_ID/BACKUP_ID.dump` below one folder."""

import asyncio
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

_PERMISSIONS = 0o700


@dataclass(frozen=True, slots=True)
class Written:
    """A file that is safely on disk: its size in bytes, and its SHA-256 in hexadecimal."""

    size_bytes: int
    sha256: str


class BackupFiles:
    """A folder of backup files. A file under its own name is always whole; `.part` is one that is being written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path_of(self, *, database_id: str, backup_id: str) -> Path:
        """Return where the backup's file is, or will be."""
        return self._folder / database_id / f"{backup_id}.dump"

    def aside(self, path: Path) -> Path:
        """Return where the file is written before it gets its own name; make the folder."""
        path.parent.mkdir(mode=_PERMISSIONS, parents=True, exist_ok=True)
        return path.with_suffix(".part")

    async def keep(self, aside: Path, path: Path) -> None:
        """Give a file that is written and synced its own name, for good."""
        await asyncio.to_thread(_rename, aside, path)

    async def measure(self, path: Path) -> Written:
        """Read the size and the digest of a file."""
        return await asyncio.to_thread(_measure, path)

    async def remove(self, path: Path) -> None:
        """Remove a file and what was left of an unfinished one, and their folder with the last of them."""
        await asyncio.to_thread(_remove, path)


def _rename(aside: Path, path: Path) -> None:
    aside.rename(path)
    for folder in (path.parent, path.parent.parent):  # the new name, and the new folder's own
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _measure(path: Path) -> Written:
    with path.open("rb") as file:
        return Written(size_bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.with_suffix(".part").unlink(missing_ok=True)
    if path.parent.is_dir() and not any(path.parent.iterdir()):
        path.parent.rmdir()
