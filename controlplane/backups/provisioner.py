"""From what a backup's row wants to its files: the sealed dump, then the manifest that makes it one; or neither."""

from collections.abc import AsyncIterator, Mapping
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from controlplane.access import quota
from controlplane.backups.manifest import Manifest, read_manifest, write_manifest
from controlplane.backups.model import COMPLETED, DELETING, Backup
from controlplane.backups.sealed import Identity, Sealing
from controlplane.backups.storage import BackupStorage, StorageUnavailable
from controlplane.clock import Clock
from controlplane.databases.engines.engine import ClusterUnavailable, Engine, EngineError
from controlplane.databases.model import Database
from controlplane.keys import Keys
from controlplane.reconcile import Gone, NotYet, Outcome, Settled
from controlplane.sql import Store


class BackupProvisioner:
    """Writes and removes backups through the driver of the database's cluster."""

    kind = "backup"
    model = Backup

    def __init__(
        self, *, store: Store, clock: Clock, keys: Keys, engines: Mapping[str, Engine], storage: BackupStorage
    ) -> None:
        self._store = store
        self._clock = clock
        self._keys = keys
        self._engines = engines
        self._storage = storage

    async def step(self, row: Backup) -> Outcome:
        """Take the next step of a backup.

        Raises NotYet while the cluster or the storage does not let us.
        """
        found = await self._store.fetch(
            select(Database.engine, Database.cluster_target).where(col(Database.id) == row.database_id)
        )
        engine, cluster = found[0]
        identity = Identity(account_id=row.account_id, database_id=row.database_id, backup_id=row.id, engine=engine)
        try:
            if row.state == DELETING:
                # The manifest first: without it there is no backup, whatever is left.
                await self._storage.remove(identity.manifest_name)
                await self._storage.remove(identity.file_name)
                return Gone()
            if not await self._storage.exists(identity.manifest_name):  # else only its outcome could not be kept
                await self._write(identity, cluster)
            manifest = await self._read(identity)
        except StorageUnavailable as error:
            raise NotYet("the storage of backups", str(error)) from error
        return Settled(COMPLETED, _learned(manifest, completed_at=self._clock.now()))

    async def forget(self, session: AsyncSession, row: Backup) -> None:
        """Give back the quota."""
        await quota.release(session, resource_id=row.id)

    async def _write(self, identity: Identity, cluster: str) -> None:
        engine = self._engines.get(cluster)
        if engine is None:
            raise NotYet(f"cluster {cluster}", "The provider has taken this cluster out of service.")
        try:
            async with engine.dump(identity.database_id) as dump:
                sealing = Sealing(dump.chunks(), keys=self._keys, identity=identity)
                written = await self._storage.write(identity.file_name, sealing)
                contents = dump.contents()
        except ClusterUnavailable as error:
            raise NotYet(f"cluster {cluster}", str(error)) from error
        except EngineError as error:
            raise NotYet("the provider", str(error)) from error
        manifest = Manifest(
            backup=identity,
            created_at=self._clock.now(),
            sealed_bytes=written.size_bytes,
            sealed_sha256=written.sha256,
            plain_bytes=sealing.plain_bytes,
            key_id=sealing.key_id,
            contents=contents,
        )
        await self._storage.write(identity.manifest_name, _whole(write_manifest(manifest, keys=self._keys)))

    async def _read(self, identity: Identity) -> Manifest:
        raw = b"".join([chunk async for chunk in self._storage.read(identity.manifest_name)])
        return read_manifest(raw, keys=self._keys, identity=identity)


def _learned(manifest: Manifest, **more: Any) -> dict[str, Any]:
    return {"size_bytes": manifest.sealed_bytes, "sha256": manifest.sealed_sha256, **more}


async def _whole(content: bytes) -> AsyncIterator[bytes]:
    yield content
