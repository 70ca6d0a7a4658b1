"""What becomes a database, in the transaction of the order: an order from scratch, of a backup, or one that comes back.

The same for each: the name is free, the plan has room for it, and a cluster takes it.
"""

import secrets
from typing import Any

from sqlalchemy import bindparam
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from controlplane.access import quota
from controlplane.api.v1 import databases_pb2
from controlplane.backups.model import NEWEST, Backup, expiry
from controlplane.catalog.model import Catalog, Sku
from controlplane.clock import Clock
from controlplane.databases import placement
from controlplane.databases.model import DELETED, PROVISIONING, Database, password_binding
from controlplane.databases.names import name_of_new
from controlplane.databases.schedule import NONE, check_schedule, next_run
from controlplane.errors import AlreadyExists, BrokenRule, Conflict, InvalidField, NotFound
from controlplane.ids import new_id
from controlplane.keys import Keys
from controlplane.reconcile.model import DELETING
from controlplane.rpc.call import Call
from controlplane.sql import Store

_BACKUPS_KEPT = 7  # unless the order says otherwise

BY_NAME = select(Database).where(
    col(Database.account_id) == bindparam("account_id"),
    col(Database.name) == bindparam("name"),
    col(Database.deleted_at).is_(None),
)
_DELETED_BY_NAME = (
    select(Database)
    .where(col(Database.account_id) == bindparam("account_id"), col(Database.former_name) == bindparam("name"))
    .order_by(col(Database.deleted_at).desc())
    .limit(1)
    .with_for_update()
)


class DatabaseOrders:
    """Takes orders of databases."""

    def __init__(self, *, store: Store, catalog: Catalog, keys: Keys, clock: Clock) -> None:
        self._store = store
        self._catalog = catalog
        self._keys = keys
        self._clock = clock

    async def add(self, call: Call, *, engine: str, sku: str, region: str, name: str, **more: Any) -> Database:
        """Record a new database; `more` are further columns.

        Raises InvalidField, AlreadyExists, QuotaExceeded, or Conflict where no cluster takes it.
        """
        self.check_sku(sku, engine=engine)
        if not self._catalog.has_region(region):
            raise InvalidField(BrokenRule("region", f"there is no region '{region}': /api/portal/regions lists them"))
        await self._check_free(call, name)
        database_id = new_id("db")
        await self._charge(call, "databases", database_id)
        cluster = await placement.place(call.session, self._catalog, engine=engine, region=region)
        now = self._clock.now()
        database = Database(
            id=database_id,
            account_id=call.caller.account_id,
            name=name,
            object_name=await name_of_new(self._store, database_id),
            engine=engine,
            sku=sku,
            region=region,
            cluster_target=cluster.name,
            state=PROVISIONING,
            generation=0,
            observed_generation=0,
            password_sealed="",
            created_at=now,
            updated_at=now,
            **more,
        )
        self.give_password(database)
        database.order_real(PROVISIONING, now=now)
        call.session.add(database)
        try:
            await call.session.flush()
        except IntegrityError:
            raise AlreadyExists("database", name) from None
        return database

    async def bring_back(self, call: Call, name: str) -> Database:
        """Want the database of this name back that was deleted last.

        Raises NotFound if it had no backup, or its time is over; Conflict while it is being deleted; AlreadyExists,
        QuotaExceeded or Conflict as `add`.
        """
        there = (await call.session.scalars(BY_NAME, {"account_id": call.caller.account_id, "name": name})).first()
        if there is not None and there.state == DELETING and there.undelete_until is not None:
            raise Conflict(f"The database '{name}' is being deleted: it can be brought back once it is {DELETED}.")
        found = await call.session.execute(_DELETED_BY_NAME, {"account_id": call.caller.account_id, "name": name})
        database: Database | None = found.scalar_one_or_none()
        now = self._clock.now()
        if database is None or database.undelete_until is None or database.undelete_until <= now:
            raise NotFound("deleted database", name)
        backup = await newest_backup(call.session, database.id)
        if backup is None:
            raise NotFound("deleted database", name)
        if there is not None:
            raise AlreadyExists("database", name)
        await self._charge(call, "databases", database.id)
        await self._charge(call, "backups", backup.id)
        cluster = await placement.place(call.session, self._catalog, engine=database.engine, region=database.region)
        backup.expires_at = expiry(database, trigger=backup.trigger, created_at=backup.created_at)
        backup.generation += 1  # or a look that is under way could still end it
        backup.observed_generation += 1
        database.name, database.former_name, database.deleted_at, database.undelete_until = name, None, None, None
        database.cluster_target = cluster.name
        database.restored_from = backup.id
        database.stopped = False
        database.observed_generation = 0
        database.size_bytes = database.connections = database.observed_at = None
        database.order_real(PROVISIONING, now=now)
        try:
            await call.session.flush()
        except IntegrityError:
            raise AlreadyExists("database", name) from None
        return database

    def give_password(self, database: Database) -> str:
        """Let the row have a new password, and return it."""
        password = secrets.token_urlsafe(24)
        database.password_sealed = self._keys.encrypt(password.encode(), bound_to=password_binding(database))
        return password

    def schedule(self, database: Database, wanted: databases_pb2.CreateDatabase | databases_pb2.UpdateDatabase) -> None:
        """Take over when the database is backed up, and how many backups are kept, as far as the request says.

        Raises InvalidField.
        """
        if wanted.HasField("backup_schedule"):
            schedule = wanted.backup_schedule
            try:
                database.backup_schedule = None if schedule == NONE else check_schedule(schedule)
            except ValueError as error:
                raise InvalidField(BrokenRule("backup_schedule", str(error))) from None
            database.next_backup_at = None
        if database.backup_schedule is None:
            if wanted.HasField("backup_retention"):
                raise InvalidField(BrokenRule("backup_retention", "needs a backup_schedule to go with it"))
            database.backups_kept = database.backup_days_kept = None
            return
        if wanted.HasField("backup_retention"):
            retention = wanted.backup_retention
            database.backups_kept = retention.count if retention.HasField("count") else None
            database.backup_days_kept = retention.days if retention.HasField("days") else None
        if database.backups_kept is None and database.backup_days_kept is None:
            database.backups_kept = _BACKUPS_KEPT
        if database.next_backup_at is None:
            database.next_backup_at = next_run(
                database.backup_schedule, after=self._clock.now(), database_id=database.id
            )

    def check_sku(self, name: str, *, engine: str) -> Sku:
        """Return the size of this name.

        Raises InvalidField if there is none, or none for this engine.
        """
        sku = self._catalog.find_sku(name)
        if sku is None:
            raise InvalidField(BrokenRule("sku", f"there is no size '{name}': /api/portal/skus lists them"))
        if engine not in sku.engines:
            raise InvalidField(BrokenRule("sku", f"'{name}' is a size for {', '.join(sku.engines)}, not for {engine}"))
        return sku

    async def _check_free(self, call: Call, name: str) -> None:
        """Raise AlreadyExists if the name is taken; the unique index decides where two come at once."""
        taken = await call.session.execute(BY_NAME, {"account_id": call.caller.account_id, "name": name})
        if taken.first() is not None:
            raise AlreadyExists("database", name)

    async def _charge(self, call: Call, kind: str, resource_id: str) -> None:
        quotas = self._catalog.plan(call.caller.plan).quotas
        limit: int = getattr(quotas, kind)
        await quota.charge(
            call.session, account_id=call.caller.account_id, kind=kind, resource_id=resource_id, limit=limit
        )


async def lock_database(session: AsyncSession, *, account_id: str, name: str) -> Database:
    """Return the database of this name for a change; no other transaction changes it meanwhile.

    Raises NotFound.
    """
    locked = await session.execute(BY_NAME.with_for_update(), {"account_id": account_id, "name": name})
    database: Database | None = locked.scalar_one_or_none()
    if database is None:
        raise NotFound("database", name)
    return database


async def newest_backup(session: AsyncSession, database_id: str) -> Backup | None:
    """Return the newest completed backup of a database for a change, if there is one."""
    found = await session.execute(NEWEST.with_for_update(), {"database_id": database_id})
    backup: Backup | None = found.scalar_one_or_none()
    return backup
