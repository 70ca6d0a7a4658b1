"""The servicer of databases: rules and queries. One RPC is one transaction; nothing here touches a cluster."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import grpc
from sqlalchemy import bindparam
from sqlmodel import col, select

from controlplane.api.v1 import databases_pb2, databases_pb2_grpc
from controlplane.backups.model import Backup
from controlplane.backups.model import order_deletion as order_backup_deletion
from controlplane.catalog.model import Catalog
from controlplane.clock import Clock
from controlplane.databases.engines.engine import Connection, Engine
from controlplane.databases.model import (
    DEADLINES,
    STARTING,
    STOPPING,
    UPDATING,
    Database,
    password_binding,
    to_proto,
)
from controlplane.databases.orders import BY_NAME, DatabaseOrders, lock_database, newest_backup
from controlplane.errors import Conflict, NotFound
from controlplane.keys import Keys
from controlplane.reconcile.loop import Reconciler
from controlplane.reconcile.model import DELETING, FAILED
from controlplane.rpc import etag, paging
from controlplane.rpc.call import Call, current
from controlplane.rpc.merge import merged
from controlplane.rpc.remembered import remembered
from controlplane.sql import Store

Context = grpc.aio.ServicerContext[Any, Any]

_LIST_ALL = (
    select(Database)
    .where(col(Database.account_id) == bindparam("account_id"), col(Database.id) > bindparam("after"))
    .order_by(col(Database.id))
    .limit(bindparam("limit"))
)
_LIST = _LIST_ALL.where(col(Database.deleted_at).is_(None))


class DatabaseService(databases_pb2_grpc.DatabaseServiceServicer):
    """Managed databases."""

    def __init__(
        self,
        *,
        store: Store,
        catalog: Catalog,
        keys: Keys,
        clock: Clock,
        engines: Mapping[str, Engine],
        orders: DatabaseOrders,
        reconciler: Reconciler,
    ) -> None:
        self._store = store
        self._catalog = catalog
        self._keys = keys
        self._clock = clock
        self._engines = engines
        self._orders = orders
        self._reconciler = reconciler

    @remembered
    async def ListDatabases(
        self, request: databases_pb2.ListDatabasesRequest, context: Context
    ) -> databases_pb2.ListDatabasesResponse:
        """List the account's databases."""
        call = current()
        statement = _LIST_ALL if request.show_deleted else _LIST
        rows = await self._store.fetch(statement, {"account_id": call.caller.account_id, **paging.bounds(request)})
        page, next_page = paging.cut(rows, request, call)
        return databases_pb2.ListDatabasesResponse(databases=map(to_proto, page), next_page_token=next_page)

    async def CreateDatabase(
        self, request: databases_pb2.CreateDatabaseRequest, context: Context
    ) -> databases_pb2.Database:
        """Record a new database; the reconciler makes it.

        Raises InvalidField, AlreadyExists, QuotaExceeded, or Conflict where no cluster takes it.
        """
        call, wanted = current(), request.database
        database = await self._orders.add(
            call,
            name=wanted.name,
            engine=wanted.engine,
            sku=wanted.sku,
            region=wanted.region or self._catalog.default_region,
            tags=dict(wanted.tags),
            deletion_protection=wanted.deletion_protection,
        )
        self._orders.schedule(database, wanted)
        return self._ordered(call, database)

    @remembered
    async def GetDatabase(self, request: databases_pb2.GetDatabaseRequest, context: Context) -> databases_pb2.Database:
        """Show one database.

        Raises NotFound.
        """
        call = current()
        database = await self._read(call, request.name)
        etag.show(call, database)
        return to_proto(database)

    async def UpdateDatabase(
        self, request: databases_pb2.UpdateDatabaseRequest, context: Context
    ) -> databases_pb2.Database:
        """Change what the request names; a new size is applied by the reconciler.

        Raises NotFound, Stale, InvalidField, or Conflict while it is being deleted.
        """
        call, change, now = current(), request.database, self._clock.now()
        database = await self._lock(call, request.name)
        _check_not_deleting(database)
        if change.HasField("deletion_protection"):
            database.deletion_protection = change.deletion_protection
        if change.HasField("tags"):
            database.tags = merged(database.tags, change.tags)
        self._orders.schedule(database, change)
        if change.HasField("sku") and change.sku != database.sku:
            self._orders.check_sku(change.sku, engine=database.engine)
            database.sku = change.sku
            database.order_real(UPDATING, now=now)
        else:
            # Nothing for the cluster to do, but a change all the same: whoever read it before has an old ETag.
            settled = database.observed_generation == database.generation
            database.generation += 1
            database.observed_generation += settled
            if database.next_attempt_at is not None and database.next_backup_at is not None:
                database.next_attempt_at = min(database.next_attempt_at, database.next_backup_at)
            database.updated_at = now
        return self._ordered(call, database)

    async def DeleteDatabase(
        self, request: databases_pb2.DeleteDatabaseRequest, context: Context
    ) -> databases_pb2.Database:
        """Order the database away, and all its backups but the last; once more changes nothing.

        Raises NotFound, Stale, or Conflict while it is protected.
        """
        call, now = current(), self._clock.now()
        database = await self._lock(call, request.name)
        if database.deletion_protection:
            raise Conflict(
                f"The database '{database.name}' is protected: set deletion_protection to false, then delete it."
            )
        if database.state != DELETING:
            await self._let_backups_go(call, database)
            database.order(
                DELETING, now=now, within=DEADLINES[DELETING], waiting_on=f"cluster {database.cluster_target}"
            )
            database.updated_at = now
        return self._ordered(call, database)

    async def GetDatabaseConnection(
        self, request: databases_pb2.GetDatabaseConnectionRequest, context: Context
    ) -> databases_pb2.DatabaseConnection:
        """Show how to connect, with the password.

        Raises NotFound, or Conflict until there is something to connect to.
        """
        call = current()
        database = await self._read(call, request.name)
        etag.show(call, database)
        password = self._keys.decrypt(database.password_sealed, bound_to=password_binding(database)).decode()
        return _connection(self._connect(database, password))

    async def RotateDatabasePassword(
        self, request: databases_pb2.RotateDatabasePasswordRequest, context: Context
    ) -> databases_pb2.DatabaseConnection:
        """Decide on a new password; the reconciler tells the cluster, which ends the sessions of the old one.

        Raises NotFound, Stale, or Conflict until there is something to connect to.
        """
        call = current()
        database = await self._lock(call, request.name)
        password = self._orders.give_password(database)
        # A password that was only tried would open nothing.
        connection = self._connect(database, "" if request.validate_only else password)
        call.target = database.id
        database.order_real(UPDATING, now=self._clock.now())
        self._ordered(call, database)
        return _connection(connection)

    async def StopDatabase(
        self, request: databases_pb2.StopDatabaseRequest, context: Context
    ) -> databases_pb2.Database:
        """Let nobody in any more; once more changes nothing.

        Raises NotFound, Stale, or Conflict while the database is not there yet, has failed or is being deleted.
        """
        return await self._let_in(request.name, stopped=True, state=STOPPING)

    async def StartDatabase(
        self, request: databases_pb2.StartDatabaseRequest, context: Context
    ) -> databases_pb2.Database:
        """Let the user in again; once more changes nothing.

        Raises NotFound, Stale, or Conflict while the database is not there yet, has failed or is being deleted.
        """
        return await self._let_in(request.name, stopped=False, state=STARTING)

    async def RetryDatabase(
        self, request: databases_pb2.RetryDatabaseRequest, context: Context
    ) -> databases_pb2.Database:
        """Order once more what has failed.

        Raises NotFound, Stale, or Conflict if it has not.
        """
        call = current()
        database = await self._lock(call, request.name)
        if database.state != FAILED:
            raise Conflict(f"The database '{database.name}' is {database.state}: there is nothing to try again.")
        database.order_real(UPDATING, now=self._clock.now())
        return self._ordered(call, database)

    async def UndeleteDatabase(
        self, request: databases_pb2.UndeleteDatabaseRequest, context: Context
    ) -> databases_pb2.Database:
        """Order a deleted database back, of its last backup.

        Raises NotFound, AlreadyExists, QuotaExceeded, or Conflict while it is being deleted or where no cluster takes
        it.
        """
        call = current()
        return self._ordered(call, await self._orders.bring_back(call, request.name))

    async def _let_in(self, name: str, *, stopped: bool, state: str) -> databases_pb2.Database:
        call = current()
        database = await self._lock(call, name)
        self._check_there(database)
        if database.stopped != stopped:
            database.stopped = stopped
            database.order_real(state, now=self._clock.now())
        return self._ordered(call, database)

    async def _let_backups_go(self, call: Call, database: Database) -> None:
        """Order all backups away but the newest completed one: that stays for as long as the plan says."""
        now = self._clock.now()
        days = self._catalog.plan(call.caller.plan).undelete_days
        kept = await newest_backup(call.session, database.id) if days else None
        database.undelete_until = None
        if kept is not None:
            kept.expires_at = database.undelete_until = now + timedelta(days=days)
            kept.next_attempt_at = kept.expires_at
            # A verification that is under way would decide on another time.
            kept.generation += 1
            kept.observed_generation += 1
        backups = select(Backup).where(col(Backup.database_id) == database.id).with_for_update()
        for backup in await call.session.scalars(backups):
            if backup is not kept:
                order_backup_deletion(backup, now=now)

    def _connect(self, database: Database, password: str) -> Connection:
        """Return how the database is reached.

        Raises Conflict until there is something to reach.
        """
        self._check_there(database)
        engine = self._engines.get(database.cluster_target)
        if engine is None:
            raise Conflict(f"The provider has taken the cluster of the database '{database.name}' out of service.")
        return engine.connection(database.object_name, password)

    def _check_there(self, database: Database) -> None:
        """Raise Conflict unless there is a database on the cluster that is to stay."""
        if database.observed_generation == 0 or database.state in {DELETING, FAILED}:
            more = " Try again with POST …/retry, or delete it." if database.state == FAILED else ""
            raise Conflict(f"The database '{database.name}' is {database.state}: it takes no connections.{more}")

    async def _read(self, call: Call, name: str) -> Database:
        rows = await self._store.fetch(BY_NAME, {"account_id": call.caller.account_id, "name": name})
        if not rows:
            raise NotFound("database", name)
        database: Database = rows[0]
        return database

    async def _lock(self, call: Call, name: str) -> Database:
        database = await lock_database(call.session, account_id=call.caller.account_id, name=name)
        etag.check_match(call, database)
        return database

    def _ordered(self, call: Call, database: Database) -> databases_pb2.Database:
        etag.show(call, database)
        self._reconciler.take(database, call.committed)
        return to_proto(database)


def _check_not_deleting(database: Database) -> None:
    if database.state == DELETING:
        raise Conflict(f"The database '{database.name}' is being deleted and cannot be changed any more.")


def _connection(connection: Connection) -> databases_pb2.DatabaseConnection:
    return databases_pb2.DatabaseConnection(
        host=connection.host,
        port=connection.port,
        database=connection.database,
        username=connection.username,
        password=connection.password,
        uri=connection.uri,
    )
