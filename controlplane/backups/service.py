"""The servicer of backups: rules and queries. The reconciler writes and removes the files."""

from collections.abc import Callable
from typing import Any

import grpc
from sqlalchemy import bindparam
from sqlmodel import col, select

from controlplane.access import quota
from controlplane.api.v1 import backups_pb2, backups_pb2_grpc
from controlplane.backups.model import DEADLINE, ON_DEMAND, RUNNING, Backup, order_deletion, to_proto
from controlplane.catalog.model import Catalog
from controlplane.clock import Clock
from controlplane.databases.model import READY, Database
from controlplane.databases.service import lock_database
from controlplane.errors import Conflict, NotFound
from controlplane.ids import new_id
from controlplane.rpc import etag, paging
from controlplane.rpc.call import current
from controlplane.rpc.remembered import remembered
from controlplane.sql import Store

Context = grpc.aio.ServicerContext[Any, Any]

_DATABASE = select(Database.id).where(
    col(Database.account_id) == bindparam("account_id"), col(Database.name) == bindparam("name")
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

    def __init__(self, *, store: Store, catalog: Catalog, clock: Clock, wake: Callable[[], None]) -> None:
        self._store = store
        self._catalog = catalog
        self._clock = clock
        self._wake = wake

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
        if database.state != READY:
            raise Conflict(
                f"The database '{database.name}' is {database.state}: it can be backed up once it is {READY}."
            )
        limit = self._catalog.plan(call.caller.plan).quotas.backups
        backup_id = new_id("bk")
        await quota.charge(
            call.session, account_id=call.caller.account_id, kind="backups", resource_id=backup_id, limit=limit
        )
        backup = Backup(
            id=backup_id,
            account_id=call.caller.account_id,
            database_id=database.id,
            trigger=ON_DEMAND,
            state=RUNNING,
            generation=0,
            created_at=now,
        )
        backup.order(RUNNING, now=now, within=DEADLINE, waiting_on=f"cluster {database.cluster_target}")
        call.session.add(backup)
        await call.session.flush()
        call.after_commit.append(self._wake)
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
        database = await lock_database(call.session, account_id=call.caller.account_id, name=request.name)
        found = await call.session.execute(_BY_ID.with_for_update(), {"database_id": database.id, "id": request.id})
        backup: Backup | None = found.scalar_one_or_none()
        if backup is None:
            raise NotFound("backup", request.id)
        etag.check_match(call, backup)
        order_deletion(backup, now=self._clock.now())
        call.after_commit.append(self._wake)
        etag.show(call, backup)
        return to_proto(backup, database=database.name)

    async def _database_id(self, account_id: str, name: str) -> str:
        rows = await self._store.fetch(_DATABASE, {"account_id": account_id, "name": name})
        if not rows:
            raise NotFound("database", name)
        database_id: str = rows[0].id
        return database_id
