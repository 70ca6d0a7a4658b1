"""Finds what no row owns, on the clusters and in the storage of backups, and removes it once it has been there long.

Every step is made so that nothing is left over; but a process that was paused for longer than its lease may go on with
one that another has undone meanwhile. Only what bears our installation's name is looked at, and it is looked at before
the rows: whatever is there then had its row before it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import structlog
from sqlalchemy import delete
from sqlmodel import Field, SQLModel, col, select

from controlplane.backups.model import COMPLETED, Backup
from controlplane.backups.storage import BackupStorage, StorageUnavailable
from controlplane.clock import Clock
from controlplane.databases.engines.engine import Engine, EngineError
from controlplane.databases.model import Database
from controlplane.databases.names import name_aside, prefix_of_ours
from controlplane.observe.metrics import Metrics
from controlplane.sql import Store, UtcDateTime

STORAGE = "backups"  # the place that is no cluster

_log = structlog.get_logger("sweep")


class Orphan(SQLModel, table=True):
    """Something without a row: its place is a cluster or the storage, its name what it is called there."""

    __tablename__ = "orphans"

    place: str = Field(primary_key=True)
    name: str = Field(primary_key=True)
    first_seen_at: datetime = Field(sa_type=UtcDateTime)


@dataclass(frozen=True, slots=True)
class Found:
    """What was found: orphans as place and name, and which places could not be looked at, each with the reason."""

    orphans: set[tuple[str, str]] = field(default_factory=set)
    unseen: dict[str, str] = field(default_factory=dict)


async def find_orphans(store: Store, engines: Mapping[str, Engine], storage: BackupStorage) -> Found:
    """Look everywhere for what no row owns; nothing is changed."""
    found = Found()
    prefix = await prefix_of_ours(store)
    there: dict[str, set[str]] = {}
    for cluster, engine in engines.items():
        try:
            there[cluster] = await engine.names(prefix)
        except EngineError as error:
            found.unseen[cluster] = str(error)
    try:
        files = [name for name in await storage.list() if name.startswith(prefix)]
    except StorageUnavailable as error:
        files = []
        found.unseen[STORAGE] = str(error)
    owned = await _owned_names(store)
    for cluster, names in there.items():
        found.orphans.update((cluster, name) for name in names if (cluster, name) not in owned)
    backups = {row.id for row in await store.fetch(select(Backup.id))} if files else set()
    found.orphans.update((STORAGE, name) for name in files if _backup_of(name) not in backups)
    return found


class Sweep:
    """Removes orphans that are older than `grace`; it is long, for whoever has restored our own rows of yesterday."""

    def __init__(
        self,
        *,
        store: Store,
        clock: Clock,
        engines: Mapping[str, Engine],
        storage: BackupStorage,
        metrics: Metrics,
        grace: timedelta,
    ) -> None:
        self._store = store
        self._clock = clock
        self._engines = engines
        self._storage = storage
        self._metrics = metrics
        self._grace = grace

    async def run(self) -> None:
        """Look once; several servers may do so at a time."""
        found = await find_orphans(self._store, self._engines, self._storage)
        now = self._clock.now()
        known = await self._remember(found, now)
        for place, name in sorted(found.orphans):
            if known[place, name] <= now - self._grace:
                await self._remove(place, name)
        try:
            await self._storage.sweep(before=now - self._grace)
        except StorageUnavailable as error:
            _log.warning("what is left of unfinished backups cannot be removed", error=str(error))

    async def _remember(self, found: Found, now: datetime) -> dict[tuple[str, str], datetime]:
        """Write down what is new and forget what is gone; return since when each has been known."""
        rows = await self._store.fetch(select(Orphan))
        known = {(row.place, row.name): row.first_seen_at for row in rows}
        new = found.orphans - known.keys()
        gone = {key for key in known if key not in found.orphans and key[0] not in found.unseen}
        for place in (*self._engines, STORAGE):
            self._metrics.orphans.labels(place).set(sum(each[0] == place for each in found.orphans))
        if new or gone:
            async with self._store.session() as session:
                for place, name in sorted(new):
                    _log.warning("nobody owns this", place=place, name=name, removed_after=str(now + self._grace))
                    await session.merge(Orphan(place=place, name=name, first_seen_at=now))
                for place, name in sorted(gone):
                    await session.execute(delete(Orphan).where(col(Orphan.place) == place, col(Orphan.name) == name))
                await session.commit()
        return {**dict.fromkeys(new, now), **known}

    async def _remove(self, place: str, name: str) -> None:
        try:
            if place == STORAGE:
                await self._storage.remove(name)
            else:
                await self._engines[place].drop(name)
        except (EngineError, StorageUnavailable) as error:
            _log.warning("what nobody owns cannot be removed", place=place, name=name, error=str(error))
        else:
            self._metrics.orphans_removed.labels(place).inc()
            _log.warning("removed what nobody owns", place=place, name=name)


async def _owned_names(store: Store) -> set[tuple[str, str]]:
    """Return the places and names of what rows own on clusters: databases, and backups that are being verified."""
    databases = await store.fetch(
        select(Database.object_name, Database.cluster_target).where(col(Database.deleted_at).is_(None))
    )
    verified = await store.fetch(
        select(Database.object_name, Database.cluster_target, Backup.id)
        .join(Backup, col(Backup.database_id) == Database.id)
        .where(col(Backup.state) == COMPLETED, col(Backup.lease_token).is_not(None))
    )
    return {(row.cluster_target, row.object_name) for row in databases} | {
        (row.cluster_target, name_aside(row.object_name, row.id)) for row in verified
    }


def _backup_of(file: str) -> str:
    return file.partition("/")[2].partition(".")[0]
