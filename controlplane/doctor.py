"""`controlplane doctor`: where rows and reality differ. It only looks; the server may be running.

Rows and reality are read one after the other, so whatever seems to differ is looked at once more: what is under way is
no difference.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import func, text
from sqlmodel import col, select

from controlplane.backups.model import COMPLETED, Backup
from controlplane.backups.storage import BackupStorage, StorageUnavailable
from controlplane.backups.vault import identity_of
from controlplane.databases.engines.engine import ClusterUnavailable, Engine, EngineError
from controlplane.databases.model import READY, STOPPED, Database
from controlplane.databases.sweep import STORAGE, Found, find_orphans
from controlplane.functions.model import Function
from controlplane.hosts.model import LIVE_FOR, Host
from controlplane.proxies.model import Proxy
from controlplane.reconcile.model import FAILED, Reconciled
from controlplane.sql import Store

_ALIVE = col(Database.deleted_at).is_(None)
_PAGE = 200
_ORDERED: tuple[type[Reconciled], ...] = (Database, Backup, Function, Proxy)
_AT_ONCE = 4  # databases that are looked at; each takes a connection to its cluster

# Each counter beside what it counts; a line for each that is wrong.
_COUNTERS = {
    "quota_uses": text(
        "SELECT account_id || ' ' || kind AS what, sum(counted) AS counted, sum(there) AS there FROM ("
        " SELECT account_id, kind, used AS counted, 0 AS there FROM quota_uses"
        " UNION ALL SELECT account_id, kind, 0, 1 FROM quota_charges) AS uses"
        " GROUP BY account_id, kind HAVING sum(counted) <> sum(there)"
    ),
    "cluster_uses": text(
        "SELECT cluster AS what, sum(counted) AS counted, sum(there) AS there FROM ("
        " SELECT cluster, used AS counted, 0 AS there FROM cluster_uses"
        " UNION ALL SELECT cluster_target, 0, 1 FROM databases WHERE deleted_at IS NULL) AS uses"
        " GROUP BY cluster HAVING sum(counted) <> sum(there)"
    ),
    "hosts": text(
        "SELECT name AS what, used AS counted, (SELECT count(*) FROM proxies WHERE host_id = hosts.id) AS there"
        " FROM hosts WHERE used <> (SELECT count(*) FROM proxies WHERE host_id = hosts.id)"
    ),
}
_CHARGES = text("""
WITH charged AS (
    SELECT id FROM databases WHERE deleted_at IS NULL
    UNION ALL SELECT b.id FROM backups b JOIN databases d ON d.id = b.database_id WHERE d.deleted_at IS NULL
    UNION ALL SELECT id FROM functions
    UNION ALL SELECT id FROM proxies
)
SELECT resource_id AS id, 'charged and not there' AS what FROM quota_charges
WHERE kind IN ('databases', 'backups', 'functions', 'proxies') AND resource_id NOT IN (SELECT id FROM charged)
UNION ALL
SELECT id, 'there and not charged' FROM charged WHERE id NOT IN (SELECT resource_id FROM quota_charges)
""")


class Kind(StrEnum):
    """What can be wrong, and what becomes of it; in the order in which it is looked for."""

    UNSEEN = "Cannot be looked at: run this again once it can be reached"
    ORPHAN = "No row owns this: the sweep removes it after HTX_ORPHAN_GRACE"
    STRAY = "Its row is of another cluster: drop it here by hand, unless they are one server"
    LOST = "A database is not as ordered: the next look mends what can be mended"
    NO_FILE = "A backup's file is gone: delete the backup, and make another"
    NO_RESTORE = "A backup could not be restored when that was tried: make another"
    AWAY = "A host does not ask what it is to hold: start it again, or take it out of service"
    COUNT = "A counter is wrong: correct it by hand"
    LATE = "An order is past its deadline: it is tried again and again"
    FAILED = "An order has failed: the customer can retry or delete it"


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not as it should be: the place, the id or the table, and what is wrong with it."""

    kind: Kind
    where: str
    what: str


class Doctor:
    """Looks for differences; `progress` is told how many databases and backups it has looked at."""

    def __init__(
        self, *, store: Store, engines: Mapping[str, Engine], storage: BackupStorage, progress: Callable[[int], None]
    ) -> None:
        self._store = store
        self._engines = engines
        self._storage = storage
        self._progress = progress
        self._done = 0
        self._room = asyncio.Semaphore(_AT_ONCE)

    async def count(self) -> dict[str, int]:
        """Return how many databases and completed backups there are to look at."""
        counts = {
            "databases": select(func.count()).select_from(Database).where(_ALIVE),
            "backups": select(func.count()).select_from(Backup).where(col(Backup.state) == COMPLETED),
        }
        return {kind: (await self._store.fetch(statement))[0][0] for kind, statement in counts.items()}

    async def differences(self, *, now: datetime) -> AsyncIterator[Difference]:
        """Return what is not as it should be, as it is found; nothing is changed."""
        found = await find_orphans(self._store, self._engines, self._storage)
        for place, reason in sorted(found.unseen.items()):
            yield Difference(Kind.UNSEEN, place, reason)
        for place, name in sorted(found.orphans):
            yield Difference(Kind.ORPHAN, place, name)
        for look in (
            self._clusters(),
            self._databases(found),
            self._backups(found),
            self._hosts(now),
            self._counts(),
            self._rows(now),
        ):
            async for difference in look:
                yield difference

    async def _clusters(self) -> AsyncIterator[Difference]:
        """Find the clusters that databases are on, and that nobody can reach."""
        cluster = col(Database.cluster_target)
        lacking = select(cluster, func.count()).where(_ALIVE, cluster.not_in(self._engines)).group_by(cluster)
        for name, count in await self._store.fetch(lacking):
            what = f"it is not in the catalogue, or cannot run here; databases on it: {count}"
            yield Difference(Kind.UNSEEN, name, what)

    async def _databases(self, found: Found) -> AsyncIterator[Difference]:
        silent = set(found.unseen)
        clusters = {place: names for place, names in found.names.items() if place != STORAGE}
        # Where the same is there, two entries of the catalogue are one server.
        same = {place: [each for each in clusters if clusters[each] == names] for place, names in clusters.items()}
        async for rows in self._pages(select(Database).where(_ALIVE), Database):
            for row in rows:
                for place, names in clusters.items():
                    if row.object_name in names and row.cluster_target not in same[place]:
                        yield Difference(Kind.STRAY, place, f"{row.object_name} is to be on {row.cluster_target}")
            settled = [row for row in rows if row.state in {READY, STOPPED} and row.cluster_target in self._engines]
            for difference in await asyncio.gather(*(self._database(row, silent) for row in settled)):
                if difference is not None:
                    yield difference

    async def _database(self, row: Any, silent: set[str]) -> Difference | None:
        """Look at one database; a cluster that does not answer is added to the silent ones."""
        async with self._room:
            if row.cluster_target in silent:
                return None
            try:
                observed = await self._engines[row.cluster_target].observe(row.object_name)
            except EngineError as error:
                if not isinstance(error, ClusterUnavailable):
                    return Difference(Kind.UNSEEN, row.id, str(error))
                if row.cluster_target in silent:
                    return None  # another of those that are looked at together has said so
                silent.add(row.cluster_target)
                return Difference(Kind.UNSEEN, row.cluster_target, str(error))
        if observed is None:
            what = f"it is not on {row.cluster_target}, or its user is not"
        elif observed.login == (row.state == STOPPED):
            what = f"it is {row.state}, but its user can{'' if observed.login else 'not'} log in"
        else:
            return None
        as_it_was = select(Database.id).where(
            col(Database.id) == row.id,
            col(Database.state) == row.state,
            col(Database.generation) == row.generation,
        )
        return Difference(Kind.LOST, row.id, what) if await self._store.fetch(as_it_was) else None

    async def _backups(self, found: Found) -> AsyncIterator[Difference]:
        is_storage_seen = STORAGE not in found.unseen
        async for rows in self._pages(select(Backup).where(col(Backup.state) == COMPLETED), Backup):
            sources = select(Database).where(col(Database.id).in_({row.database_id for row in rows}))
            databases = {row.id: row for row in await self._store.fetch(sources)}
            for row in (row for row in rows if row.database_id in databases):
                identity = identity_of(row, databases[row.database_id])
                for name in (identity.file_name, identity.manifest_name):
                    if is_storage_seen and name not in found.names[STORAGE] and await self._is_lost(row.id, name):
                        yield Difference(Kind.NO_FILE, row.id, name)
                if row.verification_error:
                    yield Difference(Kind.NO_RESTORE, row.id, row.verification_error)

    async def _is_lost(self, backup_id: str, file: str) -> bool:
        try:
            if await self._storage.exists(file):
                return False  # it is new
        except StorageUnavailable:
            return False
        as_it_was = select(Backup.id).where(col(Backup.id) == backup_id, col(Backup.state) == COMPLETED)
        return bool(await self._store.fetch(as_it_was))

    async def _hosts(self, now: datetime) -> AsyncIterator[Difference]:
        for host in await self._store.fetch(select(Host).order_by(col(Host.name))):
            if host.last_seen_at is None:
                yield Difference(Kind.AWAY, host.name, "it has never asked")
            elif host.last_seen_at < now - LIVE_FOR:
                yield Difference(Kind.AWAY, host.name, f"it asked last at {host.last_seen_at:%Y-%m-%d %H:%M:%S} UTC")

    async def _counts(self) -> AsyncIterator[Difference]:
        for table, statement in _COUNTERS.items():
            for row in await self._store.fetch(statement):
                yield Difference(Kind.COUNT, table, f"{row.what}: {row.counted} counted, {row.there} there")
        for row in await self._store.fetch(_CHARGES):
            yield Difference(Kind.COUNT, row.id, row.what)

    async def _rows(self, now: datetime) -> AsyncIterator[Difference]:
        for model in _ORDERED:
            for row in await self._store.fetch(select(model).where(col(model.deadline_at) < now)):
                why = row.last_error or (f"it waits for {row.waiting_on}" if row.waiting_on else "nobody has tried it")
                yield Difference(Kind.LATE, row.id, f"{row.state}: {why}")
        for model in _ORDERED:
            for row in await self._store.fetch(select(model).where(col(model.state) == FAILED)):
                yield Difference(Kind.FAILED, row.id, row.last_error or "")

    async def _pages(self, statement: Any, model: type[Database | Backup]) -> AsyncIterator[Sequence[Any]]:
        """Return the rows of a query, some at a time, and tell the progress."""
        key = col(model.id)
        last = ""
        while rows := await self._store.fetch(statement.where(key > last).order_by(key).limit(_PAGE)):
            yield rows
            last = rows[-1].id
            self._done += len(rows)
            self._progress(self._done)
