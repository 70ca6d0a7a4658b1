"""A file in a storage: its name, what goes into it, and what is in it."""

from collections.abc import AsyncIterator

from controlplane.backups.storage import BackupStorage

MEGABYTE = 1024 * 1024
NAME = "db_1/bk_1.htxb"


async def stream(*chunks: bytes) -> AsyncIterator[bytes]:
    """Return a stream of these chunks."""
    for chunk in chunks:
        yield chunk


async def content(storage: BackupStorage, name: str = NAME) -> bytes:
    """Return what is in a file."""
    return b"".join([piece async for piece in storage.read(name)])
