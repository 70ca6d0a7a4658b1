"""A backup as one thing: its sealed file and the manifest that makes it a backup; written, restored and removed."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from datetime import datetime

from controlplane.backups.manifest import Manifest, read_manifest, write_manifest
from controlplane.backups.model import Backup
from controlplane.backups.sealed import BrokenBackup, Identity, Sealing, open_sealed
from controlplane.backups.storage import BackupStorage
from controlplane.databases.engines.engine import Check, ClusterUnavailable, Contents, Engine, Target
from controlplane.databases.model import Database
from controlplane.keys import Keys

# A dump that waits for a customer's lock may say nothing for long; but a cluster that has frozen is not to keep others'
# backups waiting for as long as this one may take.
_LONGEST_SILENCE = 600.0

Progress = Callable[[int], Awaitable[None]]  # told how many bytes are written


class Vault:
    """All backups. Its methods raise StorageUnavailable, and what the engine raises."""

    def __init__(self, *, keys: Keys, storage: BackupStorage) -> None:
        self._keys = keys
        self._storage = storage

    async def write(self, engine: Engine, identity: Identity, *, now: datetime, progress: Progress) -> Manifest:
        """Back a database up, unless that has been done; return what the backup holds."""
        if not await self._storage.exists(identity.manifest_name):
            async with engine.dump(identity.object_name) as dump:
                sealing = Sealing(_unless_silent(dump.chunks()), keys=self._keys, identity=identity)
                written = await self._storage.write(identity.file_name, _told(sealing, progress))
                contents = dump.contents()
            manifest = Manifest(
                backup=identity,
                created_at=now,
                sealed_bytes=written.size_bytes,
                sealed_sha256=written.sha256,
                plain_bytes=sealing.plain_bytes,
                key_id=sealing.key_id,
                contents=contents,
            )
            await self._storage.write(identity.manifest_name, _whole(write_manifest(manifest, keys=self._keys)))
        return await self._read_manifest(identity)

    async def restore(self, engine: Engine, identity: Identity, target: Target, *, check: Check) -> None:
        """Make a database of a backup, in place of what has the target's name, and compare the two.

        `check` is what the engine asks before it changes anything (see `Engine`). Raises BrokenBackup if the backup is
        not what was written or not this one, and if the database holds anything else afterwards; what is there then
        must not be used.
        """
        try:
            manifest = await self._read_manifest(identity)
            await engine.drop(target.name, check=check)
            await engine.apply(target, check=check)
            async with (
                aclosing(self._storage.read(identity.file_name)) as sealed,
                aclosing(open_sealed(sealed, keys=self._keys, identity=identity)) as chunks,
            ):
                await engine.restore(target.name, target.password, chunks)
        except FileNotFoundError:
            raise BrokenBackup("The backup's file is not there any more.") from None
        if (difference := _difference(manifest.contents, await engine.contents(target.name))) is not None:
            raise BrokenBackup(f"What was restored is not what was backed up: {difference}.")

    async def remove(self, identity: Identity) -> None:
        """Remove a backup; nothing happens if it is gone."""
        # The manifest first: without it there is no backup, whatever is left.
        await self._storage.remove(identity.manifest_name)
        await self._storage.remove(identity.file_name)

    async def _read_manifest(self, identity: Identity) -> Manifest:
        raw = b"".join([chunk async for chunk in self._storage.read(identity.manifest_name)])
        return read_manifest(raw, keys=self._keys, identity=identity)


def identity_of(backup: Backup, database: Database) -> Identity:
    """Return which backup it is, as its files have it."""
    return Identity(
        account_id=backup.account_id,
        database_id=backup.database_id,
        object_name=database.object_name,
        backup_id=backup.id,
        engine=database.engine,
    )


def _difference(wanted: Contents, found: Contents) -> str | None:
    """Return the first table that is not as it was, in words, or None."""
    for name in sorted(wanted.tables.keys() | found.tables.keys()):
        before, after = wanted.tables.get(name), found.tables.get(name)
        if before is None or after is None:
            return f"the table {name} is {'new' if before is None else 'missing'}"
        if before.rows != after.rows:
            return f"the table {name} had {before.rows} rows and has {after.rows}"
        if before.checksum != after.checksum:
            return f"the rows of the table {name} differ"
    return None


async def _unless_silent(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Raise ClusterUnavailable once nothing has come for too long."""
    while True:
        try:
            async with asyncio.timeout(_LONGEST_SILENCE):
                chunk = await anext(chunks)
        except StopAsyncIteration:
            return
        except TimeoutError as error:
            raise ClusterUnavailable("The database cluster has stopped in the middle of the backup.") from error
        yield chunk


async def _told(chunks: AsyncIterator[bytes], progress: Progress) -> AsyncIterator[bytes]:
    written = 0
    async for chunk in chunks:
        written += len(chunk)
        yield chunk
        await progress(written)


async def _whole(content: bytes) -> AsyncIterator[bytes]:
    yield content
