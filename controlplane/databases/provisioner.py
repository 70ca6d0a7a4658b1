"""From what a database's row wants to what is on its cluster: one step at a time, each safe to repeat."""

from collections.abc import Mapping

from sqlalchemy import func
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from controlplane.access import quota
from controlplane.backups.model import Backup
from controlplane.catalog.model import Catalog
from controlplane.databases import placement
from controlplane.databases.engines.engine import Busy, ClusterUnavailable, Engine, EngineError, Target
from controlplane.databases.model import DELETING, READY, Database, password_binding
from controlplane.keys import Keys
from controlplane.reconcile import Gone, NotYet, Outcome, Settled
from controlplane.sql import Store


class DatabaseProvisioner:
    """Makes, changes and removes databases through the driver of their cluster."""

    kind = "database"
    model = Database

    def __init__(self, *, store: Store, catalog: Catalog, keys: Keys, engines: Mapping[str, Engine]) -> None:
        self._store = store
        self._catalog = catalog
        self._keys = keys
        self._engines = engines

    async def step(self, row: Database) -> Outcome:
        """Take the next step of a database.

        Raises NotYet while its cluster, or a backup that has to go first, is in the way.
        """
        engine = self._engines.get(row.cluster_target)
        if engine is None:
            raise NotYet(f"cluster {row.cluster_target}", "The provider has taken this cluster out of service.")
        try:
            if row.state == DELETING:
                await self._check_no_backups(row)
                await engine.drop(row.id)
                return Gone()
            await engine.apply(self._target(row))
        except Busy as error:
            raise NotYet(f"another change of {row.name}", str(error)) from error
        except ClusterUnavailable as error:
            raise NotYet(f"cluster {row.cluster_target}", str(error)) from error
        except EngineError as error:
            raise NotYet("the provider", str(error)) from error
        return Settled(READY)

    async def forget(self, session: AsyncSession, row: Database) -> None:
        """Give back the quota and the place on the cluster; in the order of the create, or the two deadlock."""
        await quota.release(session, resource_id=row.id)
        await placement.leave(session, row.cluster_target)

    def _target(self, row: Database) -> Target:
        sku = self._catalog.find_sku(row.sku)
        if sku is None:
            raise NotYet("the provider", f"The provider no longer has the size {row.sku}: choose another.")
        password = self._keys.decrypt(row.password_sealed, bound_to=password_binding(row)).decode()
        return Target(
            name=row.id,
            password=password,
            connections=sku.connections,
            memory_mb=sku.memory_mb,
            storage_gb=sku.storage_gb,
        )

    async def _check_no_backups(self, row: Database) -> None:
        """Raise NotYet while there are backups: their files go first, each with its own row."""
        counted = await self._store.fetch(
            select(func.count()).select_from(Backup).where(col(Backup.database_id) == row.id)
        )
        if left := counted[0][0]:
            raise NotYet(f"{left} backups that are removed first", "Its backups are being removed.")
