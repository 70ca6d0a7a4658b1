"""From what a backup's row wants to its file: dumped aside, synced, renamed, measured; or removed."""

from collections.abc import Mapping
from pathlib import Path

from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from controlplane.access import quota
from controlplane.backups.files import BackupFiles
from controlplane.backups.model import COMPLETED, DELETING, Backup
from controlplane.clock import Clock
from controlplane.databases.engines.engine import ClusterUnavailable, Engine, EngineError
from controlplane.databases.model import Database
from controlplane.reconcile import Gone, NotYet, Outcome, Settled
from controlplane.sql import Store


class BackupProvisioner:
    """Writes and removes backups through the driver of the database's cluster."""

    kind = "backup"
    model = Backup

    def __init__(self, *, store: Store, clock: Clock, engines: Mapping[str, Engine], files: BackupFiles) -> None:
        self._store = store
        self._clock = clock
        self._engines = engines
        self._files = files

    async def step(self, row: Backup) -> Outcome:
        """Take the next step of a backup.

        Raises NotYet while the cluster does not let us.
        """
        path = self._files.path_of(database_id=row.database_id, backup_id=row.id)
        if row.state == DELETING:
            await self._files.remove(path)
            return Gone()
        if not path.exists():  # else a dump was finished just before its outcome could be kept
            aside = self._files.aside(path)
            await self._dump(row, aside)
            await self._files.keep(aside, path)
        written = await self._files.measure(path)
        return Settled(
            COMPLETED,
            {"size_bytes": written.size_bytes, "sha256": written.sha256, "completed_at": self._clock.now()},
        )

    async def forget(self, session: AsyncSession, row: Backup) -> None:
        """Give back the quota."""
        await quota.release(session, resource_id=row.id)

    async def _dump(self, row: Backup, aside: Path) -> None:
        found = await self._store.fetch(select(Database.cluster_target).where(col(Database.id) == row.database_id))
        cluster = found[0].cluster_target
        engine = self._engines.get(cluster)
        if engine is None:
            raise NotYet(f"cluster {cluster}", "The provider has taken this cluster out of service.")
        try:
            await engine.dump(row.database_id, aside)
        except ClusterUnavailable as error:
            raise NotYet(f"cluster {cluster}", str(error)) from error
        except EngineError as error:
            raise NotYet("the provider", str(error)) from error
