"""`controlplane doctor`: where rows and reality differ. It only looks; the server may be running.

What is under way shows too, as the two are read one after the other: look again before you act.
"""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import func, text
from sqlmodel import col, select

from controlplane.backups.model import COMPLETED, Backup
from controlplane.backups.provisioner import identity_of
from controlplane.backups.storage import BackupStorage, StorageUnavailable
from controlplane.databases.engines.engine import Engine, EngineError
from controlplane.databases.model import READY, STOPPED, Database
from controlplane.databases.sweep import find_orphans
from controlplane.reconcile import FAILED
from controlplane.sql import Store

# Each counter beside what it counts; a line for each that is wrong.
_COUNTERS = {
    "quota_uses": text(
        "SELECT u.account_id || ' ' || u.kind AS what, u.used AS counted, count(c.resource_id) AS there"
        " FROM quota_uses u LEFT JOIN quota_charges c ON c.account_id = u.account_id AND c.kind = u.kind"
        " GROUP BY u.account_id, u.kind, u.used HAVING u.used <> count(c.resource_id)"
    ),
    "cluster_uses": text(
        "SELECT u.cluster AS what, u.used AS counted, count(d.id) AS there"
        " FROM cluster_uses u LEFT JOIN databases d ON d.cluster_target = u.cluster AND d.deleted_at IS NULL"
        " GROUP BY u.cluster, u.used HAVING u.used <> count(d.id)"
    ),
}
_CHARGES_WITHOUT_ROWS = text(
    "SELECT resource_id FROM quota_charges WHERE kind IN ('databases', 'backups')"
    " AND resource_id NOT IN (SELECT id FROM databases WHERE deleted_at IS NULL)"
    " AND resource_id NOT IN (SELECT b.id FROM backups b JOIN databases d ON d.id = b.database_id"
    " WHERE d.deleted_at IS NULL)"
)
_ROWS_WITHOUT_CHARGES = text(
    "SELECT id FROM databases WHERE deleted_at IS NULL AND id NOT IN (SELECT resource_id FROM quota_charges)"
    " UNION ALL SELECT b.id FROM backups b JOIN databases d ON d.id = b.database_id"
    " WHERE d.deleted_at IS NULL AND b.id NOT IN (SELECT resource_id FROM quota_charges)"
)


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not as it should be: where, what, and what becomes of it."""

    where: str
    what: str
    outlook: str


async def differences(
    store: Store, engines: Mapping[str, Engine], storage: BackupStorage, *, now: datetime
) -> AsyncIterator[Difference]:
    """Return what is not as it should be, as it is found; nothing is changed."""
    found = await find_orphans(store, engines, storage)
    for place, reason in sorted(found.unseen.items()):
        yield Difference(place, f"cannot be looked at: {reason}", "look again once it can be reached")
    for place, name in sorted(found.orphans):
        yield Difference(place, f"{name} belongs to no row", "the sweep removes it after HTX_ORPHAN_GRACE")
    async for difference in _lost_databases(store, engines, skip=set(found.unseen)):
        yield difference
    async for difference in _lost_files(store, storage):
        yield difference
    async for difference in _wrong_counts(store):
        yield difference
    for model in (Database, Backup):
        late = select(model).where(col(model.deadline_at) < now)
        for row in await store.fetch(late):
            yield Difference(
                row.id, f"is still {row.state}: {row.last_error or row.waiting_on}", "it is tried again and again"
            )
        for row in await store.fetch(select(model).where(col(model.state) == FAILED)):
            yield Difference(row.id, f"has failed: {row.last_error}", "the customer can retry or delete it")


async def _lost_databases(store: Store, engines: Mapping[str, Engine], *, skip: set[str]) -> AsyncIterator[Difference]:
    rows = await store.fetch(select(Database).where(col(Database.state).in_((READY, STOPPED))))
    for row in rows:
        engine = engines.get(row.cluster_target)
        if engine is None:
            yield Difference(row.id, f"its cluster {row.cluster_target} is not in the catalogue", "put it back")
        elif row.cluster_target not in skip:
            try:
                observed = await engine.observe(row.object_name)
            except EngineError as error:
                yield Difference(row.id, f"cannot be looked at: {error}", "look again")
                continue
            if observed is None:
                yield Difference(
                    row.id, f"is not on {row.cluster_target}, or its user is not", "the next look mends what can be"
                )
            elif observed.login == row.stopped:
                state = "lets nobody in" if row.state == READY else "lets its user in"
                yield Difference(row.id, f"is {row.state}, but {state}", "the next look mends it")


async def _lost_files(store: Store, storage: BackupStorage) -> AsyncIterator[Difference]:
    backups = await store.fetch(select(Backup).where(col(Backup.state) == COMPLETED))
    databases = {row.id: row for row in await store.fetch(select(Database))} if backups else {}
    try:
        files = set(await storage.list()) if backups else set()
    except StorageUnavailable:
        return  # said already
    for backup in backups:
        identity = identity_of(backup, databases[backup.database_id])
        for name in (identity.file_name, identity.manifest_name):
            if name not in files:
                yield Difference(backup.id, f"its file {name} is gone", "delete the backup and make another")


async def _wrong_counts(store: Store) -> AsyncIterator[Difference]:
    for table, statement in _COUNTERS.items():
        for row in await store.fetch(statement):
            yield Difference(table, f"{row.what}: {row.counted} counted, {row.there} there", "correct the counter")
    for row in await store.fetch(_CHARGES_WITHOUT_ROWS):
        yield Difference("quota_charges", f"{row.resource_id} is charged and not there", "remove the charge")
    for row in await store.fetch(_ROWS_WITHOUT_CHARGES):
        yield Difference("quota_charges", f"{row.id} is there and not charged", "add the charge")


async def count_rows(store: Store) -> dict[str, int]:
    """Return how many databases and backups were looked at, by kind."""
    return {
        kind: (await store.fetch(select(func.count()).select_from(model)))[0][0]
        for kind, model in (("databases", Database), ("backups", Backup))
    }
