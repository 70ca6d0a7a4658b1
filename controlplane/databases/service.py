"""The servicer of databases: rules and queries. One RPC is one transaction; nothing here touches a cluster."""

import secrets
from collections.abc import Callable, Mapping
from typing import Any

import grpc
from sqlalchemy import bindparam
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from controlplane.access import quota
from controlplane.api.v1 import databases_pb2, databases_pb2_grpc
from controlplane.backups.model import Backup
from controlplane.backups.model import order_deletion as order_backup_deletion
from controlplane.catalog.model import Catalog, Sku
from controlplane.clock import Clock
from controlplane.databases import placement
from controlplane.databases.engines.engine import Engine
from controlplane.databases.model import (
    DEADLINES,
    DELETING,
    FAILED,
    PROVISIONING,
    UPDATING,
    Database,
    password_binding,
    to_proto,
)
from controlplane.errors import AlreadyExists, BrokenRule, Conflict, InvalidField, NotFound
from controlplane.ids import new_id
from controlplane.keys import Keys
from controlplane.rpc import etag, paging
from controlplane.rpc.call import Call, current
from controlplane.rpc.remembered import remembered
from controlplane.sql import Store

Context = grpc.aio.ServicerContext[Any, Any]

_LIST = (
    select(Database)
    .where(col(Database.account_id) == bindparam("account_id"), col(Database.id) > bindparam("after"))
    .order_by(col(Database.id))
    .limit(bindparam("limit"))
)
_BY_NAME = select(Database).where(
    col(Database.account_id) == bindparam("account_id"), col(Database.name) == bindparam("name")
)


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
        wake: Callable[[], None],
    ) -> None:
        self._store = store
        self._catalog = catalog
        self._keys = keys
        self._clock = clock
        self._engines = engines
        self._wake = wake

    @remembered
    async def ListDatabases(
        self, request: databases_pb2.ListDatabasesRequest, context: Context
    ) -> databases_pb2.ListDatabasesResponse:
        """List the account's databases."""
        call = current()
        rows = await self._store.fetch(_LIST, {"account_id": call.caller.account_id, **paging.bounds(request)})
        page, next_page = paging.cut(rows, request, call)
        return databases_pb2.ListDatabasesResponse(databases=map(to_proto, page), next_page_token=next_page)

    async def CreateDatabase(
        self, request: databases_pb2.CreateDatabaseRequest, context: Context
    ) -> databases_pb2.Database:
        """Record a new database; the reconciler makes it.

        Raises InvalidField, AlreadyExists, QuotaExceeded, or Conflict where no cluster takes it.
        """
        call, wanted, now = current(), request.database, self._clock.now()
        region = wanted.region or self._catalog.default_region
        self._check_sku(wanted.sku, engine=wanted.engine)
        if not self._catalog.has_region(region):
            raise InvalidField(BrokenRule("region", f"there is no region '{region}': /api/portal/regions lists them"))
        await self._check_free(call, wanted.name)
        limit = self._catalog.plan(call.caller.plan).quotas.databases
        database_id = new_id("db")
        await quota.charge(
            call.session, account_id=call.caller.account_id, kind="databases", resource_id=database_id, limit=limit
        )
        cluster = await placement.place(call.session, self._catalog, engine=wanted.engine, region=region)
        database = Database(
            id=database_id,
            account_id=call.caller.account_id,
            name=wanted.name,
            engine=wanted.engine,
            sku=wanted.sku,
            region=region,
            cluster_target=cluster.name,
            tags=dict(wanted.tags),
            deletion_protection=wanted.deletion_protection,
            state=PROVISIONING,
            generation=0,
            password_sealed="",
            created_at=now,
            updated_at=now,
        )
        database.order(PROVISIONING, now=now, within=DEADLINES[PROVISIONING], waiting_on=f"cluster {cluster.name}")
        database.password_sealed = self._keys.encrypt(
            secrets.token_urlsafe(24).encode(), bound_to=password_binding(database)
        )
        call.session.add(database)
        try:
            await call.session.flush()
        except IntegrityError:
            raise AlreadyExists("database", wanted.name) from None
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
        if database.state == DELETING:
            raise Conflict(f"The database '{database.name}' is being deleted and cannot be changed any more.")
        if change.HasField("deletion_protection"):
            database.deletion_protection = change.deletion_protection
        if change.HasField("tags"):
            database.tags = _merged(database.tags, change)
        if change.HasField("sku") and change.sku != database.sku:
            self._check_sku(change.sku, engine=database.engine)
            database.sku = change.sku
            state = PROVISIONING if database.observed_generation == 0 else UPDATING
            database.order(state, now=now, within=DEADLINES[state], waiting_on=f"cluster {database.cluster_target}")
        else:
            # Nothing for the cluster to do, but a change all the same: whoever read it before has an old ETag.
            settled = database.observed_generation == database.generation
            database.generation += 1
            database.observed_generation += settled
        database.updated_at = now
        return self._ordered(call, database)

    async def DeleteDatabase(
        self, request: databases_pb2.DeleteDatabaseRequest, context: Context
    ) -> databases_pb2.Database:
        """Order the database and its backups away; once more changes nothing.

        Raises NotFound, Stale, or Conflict while it is protected.
        """
        call, now = current(), self._clock.now()
        database = await self._lock(call, request.name)
        if database.deletion_protection:
            raise Conflict(
                f"The database '{database.name}' is protected: set deletion_protection to false, then delete it."
            )
        if database.state != DELETING:
            database.order(
                DELETING, now=now, within=DEADLINES[DELETING], waiting_on=f"cluster {database.cluster_target}"
            )
            database.updated_at = now
            backups = select(Backup).where(col(Backup.database_id) == database.id).with_for_update()
            for backup in await call.session.scalars(backups):
                order_backup_deletion(backup, now=now)
        return self._ordered(call, database)

    async def GetDatabaseConnection(
        self, request: databases_pb2.GetDatabaseConnectionRequest, context: Context
    ) -> databases_pb2.DatabaseConnection:
        """Show how to connect, with the password.

        Raises NotFound, or Conflict until there is something to connect to.
        """
        call = current()
        database = await self._read(call, request.name)
        if database.observed_generation == 0 or database.state in {DELETING, FAILED}:
            raise Conflict(f"The database '{database.name}' is {database.state}: it takes no connections.")
        engine = self._engines.get(database.cluster_target)
        if engine is None:
            raise Conflict(f"The provider has taken the cluster of the database '{database.name}' out of service.")
        password = self._keys.decrypt(database.password_sealed, bound_to=password_binding(database)).decode()
        connection = engine.connection(database.id, password)
        return databases_pb2.DatabaseConnection(
            host=connection.host,
            port=connection.port,
            database=connection.database,
            username=connection.username,
            password=connection.password,
            uri=connection.uri,
        )

    def _check_sku(self, name: str, *, engine: str) -> Sku:
        sku = self._catalog.find_sku(name)
        if sku is None:
            raise InvalidField(BrokenRule("sku", f"there is no size '{name}': /api/portal/skus lists them"))
        if engine not in sku.engines:
            raise InvalidField(BrokenRule("sku", f"'{name}' is a size for {', '.join(sku.engines)}, not for {engine}"))
        return sku

    async def _check_free(self, call: Call, name: str) -> None:
        """Raise AlreadyExists if the name is taken; the unique index decides where two come at once."""
        taken = await call.session.execute(_BY_NAME, {"account_id": call.caller.account_id, "name": name})
        if taken.first() is not None:
            raise AlreadyExists("database", name)

    async def _read(self, call: Call, name: str) -> Database:
        rows = await self._store.fetch(_BY_NAME, {"account_id": call.caller.account_id, "name": name})
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
        call.after_commit.append(self._wake)
        return to_proto(database)


async def lock_database(session: AsyncSession, *, account_id: str, name: str) -> Database:
    """Return the database of this name for a change; no other transaction changes it meanwhile.

    Raises NotFound.
    """
    locked = await session.execute(_BY_NAME.with_for_update(), {"account_id": account_id, "name": name})
    database: Database | None = locked.scalar_one_or_none()
    if database is None:
        raise NotFound("database", name)
    return database


def _merged(tags: dict[str, str], change: databases_pb2.UpdateDatabase) -> dict[str, str]:
    """Return the labels with the change merged in (RFC 7396): null removes one."""
    merged = dict(tags)
    for name, value in change.tags.fields.items():
        if value.HasField("null_value"):
            merged.pop(name, None)
        else:
            merged[name] = value.string_value
    return merged
