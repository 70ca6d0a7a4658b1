"""The servicer of backups: rules and queries. The reconciler writes and removes the files."""

from typing import Any

import grpc
from sqlalchemy import bindparam
from sqlmodel import col, select

from controlplane.access import quota
from controlplane.api.v1 import backups_pb2, backups_pb2_grpc, databases_pb2
from controlplane.backups.model import COMPLETED, ON_DEMAND, Backup, new_backup, order_deletion, to_proto
from controlplane.catalog.model import Catalog
from controlplane.clock import Clock
from controlplane.databases.model import READY, STOPPED, Database
from controlplane.databases.model import to_proto as database_to_proto
from controlplane.databases.orders import DatabaseOrders, lock_database
from controlplane.errors import Conflict, NotFound
from controlplane.reconcile.loop import Reconciler
from controlplane.reconcile.model import DELETING
from controlplane.rpc import etag, paging
from controlplane.rpc.call import Call, current
from controlplane.rpc.remembered import remembered
from controlplane.sql import Store

Context = grpc.aio.ServicerContext[Any, Any]

_DATABASE = select(Database.id).where(
    col(Database.account_id) == bindparam("account_id"),
    col(Database.name) == bindparam("name"),
    col(Database.deleted_at).is_(None),
)
_LIST = (
    select(Backup)
    .where(col(Backup.database_id) == bindparam("database_id"), col(Backup.id) > bindparam("after"))
    .order_by(col(Backup.id))
    .limit(bindparam("limit"))
)
_BY_ID = select(Backup).where(col(Backup.database_id) == bindparam("database_id"), col(Backup.id) == bindparam("id"))


class BackupService(backups_pb2_grpc.BackupServiceServicer):
    """Backups of managed databases."""

    def __init__(
        self, *, store: Store, catalog: Catalog, clock: Clock, orders: DatabaseOrders, reconciler: Reconciler
    ) -> None:
        self._store = store
        self._catalog = catalog
        self._clock = clock
        self._orders = orders
        self._reconciler = reconciler

    @remembered
    async def ListBackups(
        self, request: backups_pb2.ListBackupsRequest, context: Context
    ) -> backups_pb2.ListBackupsResponse:
        """List a database's backups.

        Raises NotFound.
        """
        call = current()
        database_id = await self._database_id(call.caller.account_id, request.name)
        rows = await self._store.fetch(_LIST, {"database_id": database_id, **paging.bounds(request)})
        page, next_page = paging.cut(rows, request, call)
        return backups_pb2.ListBackupsResponse(
            backups=[to_proto(row, database=request.name) for row in page], next_page_token=next_page
        )

    async def CreateBackup(self, request: backups_pb2.CreateBackupRequest, context: Context) -> backups_pb2.Backup:
        """Record a new backup; the reconciler writes it.

        Raises NotFound, QuotaExceeded, or Conflict while the database is not ready.
        """
        call, now = current(), self._clock.now()
        database = await lock_database(call.session, account_id=call.caller.account_id, name=request.name)
        if database.state not in {READY, STOPPED}:
            raise Conflict(
                f"The database '{database.name}' is {database.state}: it can be backed up once it is {READY}."
            )
        limit = self._catalog.plan(call.caller.plan).quotas.backups
        backup = new_backup(database, trigger=ON_DEMAND, now=now)
        await quota.charge(
            call.session, account_id=backup.account_id, kind="backups", resource_id=backup.id, limit=limit
        )
        call.session.add(backup)
        await call.session.flush()
        self._reconciler.take(backup, call.committed)
        etag.show(call, backup)
        return to_proto(backup, database=database.name)

    @remembered
    async def GetBackup(self, request: backups_pb2.GetBackupRequest, context: Context) -> backups_pb2.Backup:
        """Show one backup.

        Raises NotFound.
        """
        call = current()
        database_id = await self._database_id(call.caller.account_id, request.name)
        rows = await self._store.fetch(_BY_ID, {"database_id": database_id, "id": request.id})
        if not rows:
            raise NotFound("backup", request.id)
        etag.show(call, rows[0])
        return to_proto(rows[0], database=request.name)

    async def DeleteBackup(self, request: backups_pb2.DeleteBackupRequest, context: Context) -> backups_pb2.Backup:
        """Order a backup away; once more changes nothing.

        Raises NotFound or Stale.
        """
        call = current()
        database, backup = await self._lock(call, request.name, request.id)
        etag.check_match(call, backup)
        if database.state == DELETING and backup.state == COMPLETED:  # it was the one to undelete from
            database.undelete_until = None
            database.generation += 1  # or a step that has seen it would keep the row for it
        order_deletion(backup, now=self._clock.now())
        self._reconciler.take(backup, call.committed)
        etag.show(call, backup)
        return to_proto(backup, database=database.name)

    async def RestoreBackup(
        self, request: backups_pb2.RestoreBackupRequest, context: Context
    ) -> databases_pb2.Database:
        """Record a new database that is to hold what the backup does; the reconciler makes it.

        Raises NotFound, InvalidField, AlreadyExists, QuotaExceeded, or Conflict while the backup is not completed or
        where no cluster takes the database.
        """
        call, wanted = current(), request.database
        source, backup = await self._lock(call, request.name, request.id)
        if backup.state != COMPLETED:
            raise Conflict(f"The backup '{backup.id}' is {backup.state}: it can be restored once it is {COMPLETED}.")
        database = await self._orders.add(
            call,
            name=wanted.name,
            engine=source.engine,
            sku=wanted.sku or source.sku,
            region=source.region,
            restored_from=backup.id,
        )
        self._reconciler.take(database, call.committed)
        etag.show(call, database)
        return database_to_proto(database)

    async def _lock(self, call: Call, name: str, backup_id: str) -> tuple[Database, Backup]:
        database = await lock_database(call.session, account_id=call.caller.account_id, name=name)
        found = await call.session.execute(_BY_ID.with_for_update(), {"database_id": database.id, "id": backup_id})
        backup: Backup | None = found.scalar_one_or_none()
        if backup is None:
            raise NotFound("backup", backup_id)
        return database, backup

    async def _database_id(self, account_id: str, name: str) -> str:
        rows = await self._store.fetch(_DATABASE, {"account_id": account_id, "name": name})
        if not rows:
            raise NotFound("database", name)
        database_id: str = rows[0].id
        return database_id
