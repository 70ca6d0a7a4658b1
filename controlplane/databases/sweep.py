"""Finds what no row owns, on the clusters and in the storage of backups, and removes it once it has been there long.

Every step is made so that nothing is left over; but a process that was paused for longer than its lease may go on with
one that another has undone meanwhile. Only what is called as we call things is looked at, so that a copy that somebody
made beside a database is his; and whoever has a row is left alone on whatever cluster he is found, as two entries of
the catalogue may be one server.
"""

import asyncio
import re
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from typing import Any, TypeAlias, TypeVar

import structlog
from sqlalchemy import CursorResult, Executable, bindparam, text, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import Field, SQLModel, col, select

from controlplane.backups.model import DEADLINE, Backup
from controlplane.backups.storage import BackupStorage, StorageUnavailable
from controlplane.clock import Clock
from controlplane.databases.engines.engine import Busy, Check, ClusterUnavailable, Engine, EngineError, unchecked
from controlplane.databases.model import Database
from controlplane.databases.names import prefix_of_ours
from controlplane.observe.metrics import Metrics
from controlplane.reconcile.lease import check_lease
from controlplane.reconcile.step import NotYet
from controlplane.sql import Store, UtcDateTime

STORAGE = "backup_storage"  # the place that is no cluster; with an underscore, which no cluster's name has

_ID = "[0-9a-hjkmnp-tv-z]{26}"
_MANY = 500  # so many at a time: on SQLite nothing else is served while we read or write
# For longer than a drop takes. A server that dies over it keeps an undelete or a verification waiting as long.
_LEASE = timedelta(minutes=5)

Key: TypeAlias = tuple[str, str]  # where it is, and what it is called there
T = TypeVar("T")

_log = structlog.get_logger("sweep")


class Orphan(SQLModel, table=True):
    """Something without a row: its place is a cluster or the storage, its name what it is called there."""

    __tablename__ = "orphans"

    place: str = Field(primary_key=True)
    name: str = Field(primary_key=True)
    first_seen_at: datetime = Field(sa_type=UtcDateTime)


_REMEMBER = text(
    "INSERT INTO orphans (place, name, first_seen_at) VALUES (:place, :name, :seen) ON CONFLICT DO NOTHING"
).bindparams(bindparam("seen", type_=UtcDateTime()))
_FORGET = text("DELETE FROM orphans WHERE place = :place AND name = :name")


@dataclass(frozen=True, slots=True)
class Found:
    """What of ours is where: the names by place, which of them no row owns, and why a place could not be looked at."""

    names: dict[str, set[str]] = field(default_factory=dict)
    orphans: set[Key] = field(default_factory=set)
    unseen: dict[str, str] = field(default_factory=dict)


async def find_orphans(store: Store, engines: Mapping[str, Engine], storage: BackupStorage) -> Found:
    """Look at all clusters and at the storage for what no row owns; nothing is changed."""
    found = await _look(store, engines, storage)
    # The rows afterwards: whatever was there by then had its row before it.
    for place, names in found.names.items():
        for some in _some_of(sorted(names)):
            owned = await (_owned_files if place == STORAGE else _owned_names)(store, some)
            found.orphans.update((place, name) for name in some if name not in owned)
            await asyncio.sleep(0)  # reading SQLite lets nobody else in
    if found.orphans:
        # And the places once more: what was being deleted is gone by now, as a row goes last.
        again = await _look(store, engines, storage)
        found.unseen.update(again.unseen)
        for key in [(place, name) for place, name in found.orphans if name not in again.names.get(place, ())]:
            found.orphans.remove(key)
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
        known = await self._remember(found)
        long_ago = self._clock.now() - self._grace
        removed: set[Key] = set()
        for place in found.names:
            old = sorted(name for where, name in found.orphans if where == place and known[where, name] <= long_ago)
            removed |= await self._remove_all(place, old)
        left = Counter(place for place, _ in known.keys() - removed)
        for place in (*self._engines, STORAGE):
            self._metrics.orphans.labels(place).set(left[place])
        try:
            # A backup that is still being written is no older than its deadline, whatever the grace.
            await self._storage.sweep(before=self._clock.now() - max(self._grace, DEADLINE))
        except StorageUnavailable as error:
            _log.warning("what is left of unfinished backups cannot be removed", error=str(error))

    async def _remember(self, found: Found) -> dict[Key, datetime]:
        """Write down what is new and forget what is gone; return since when each has been known."""
        now = self._clock.now()
        rows = await self._store.fetch(select(Orphan))
        known = {(row.place, row.name): row.first_seen_at for row in rows}
        new = found.orphans - known.keys()
        # What is where nobody looked, also because the catalogue has it no more, stays as it is.
        looked_at = found.names.keys() - found.unseen.keys()
        gone = {key for key in known.keys() - found.orphans if key[0] in looked_at}
        for some in _some_of(sorted(new)):
            await self._write(_REMEMBER, [{"place": place, "name": name, "seen": now} for place, name in some])
            for place, name in some:
                _log.warning("nobody owns this", place=place, name=name, removed_after=str(now + self._grace))
        for some in _some_of(sorted(gone)):
            await self._write(_FORGET, [{"place": place, "name": name} for place, name in some])
        return {key: seen for key, seen in known.items() if key not in gone} | dict.fromkeys(new, now)

    async def _remove_all(self, place: str, names: list[str]) -> set[Key]:
        """Remove orphans; return those that are gone."""
        gone = set()
        for name in names:
            try:
                if not await self._remove(place, name):
                    continue
            except (EngineError, StorageUnavailable) as error:
                _log.warning("what nobody owns cannot be removed", place=place, name=name, error=str(error))
                if isinstance(error, ClusterUnavailable | StorageUnavailable):
                    break  # nor can the others
                continue
            gone.add((place, name))
            if await self._write(_FORGET, {"place": place, "name": name}):  # of several servers, one counts it
                self._metrics.orphans_removed.labels(place).inc()
                _log.warning("removed what nobody owns", place=place, name=name)
        return gone

    async def _remove(self, place: str, name: str) -> bool:
        """Remove an orphan; False if somebody owns it after all, or another server removes it right now."""
        if place == STORAGE:
            await self._storage.remove(name)  # a backup's row never comes back
            return True
        async with self._kept_free(name) as check:
            if check is not None:
                with suppress(Busy, NotYet):
                    await self._engines[place].drop(name, check=check)
                    return True
        return False

    @asynccontextmanager
    async def _kept_free(self, name: str) -> AsyncIterator[Check | None]:
        """Keep whoever may come to own a name from making anything of it; None if somebody owns it by now.

        A deleted database may come back, and a backup be verified again: each by a step, which takes a lease first. The
        check tells whether it is ours that keeps him from it.
        """
        lease = secrets.token_hex(16)
        async with self._store.session() as session:
            now = self._clock.now()
            heir = await _heir_of(session, name)
            is_free = heir is None or not _is_owner(heir, now=now)
            if heir is not None and is_free:
                heir.lease_token, heir.lease_until = lease, now + _LEASE
            await session.commit()
        if heir is None or not is_free:
            yield unchecked if is_free else None
            return
        try:
            yield partial(check_lease, self._store, self._clock, heir)
        finally:
            model = type(heir)
            mine = update(model).where(col(model.id) == heir.id, col(model.lease_token) == lease)
            await self._write(mine.values(lease_token=None, lease_until=None))

    async def _write(self, statement: Executable, parameters: Any = None) -> bool:
        async with self._store.session() as session:
            done = await session.execute(statement, parameters)
            await session.commit()
        return isinstance(done, CursorResult) and bool(done.rowcount)


async def _look(store: Store, engines: Mapping[str, Engine], storage: BackupStorage) -> Found:
    """Look at all clusters and at the storage for what is called as we call things."""
    found = Found()
    prefix = await prefix_of_ours(store)
    ours = re.compile(prefix + _ID)
    our_files = re.compile(rf"{prefix}{_ID}/bk_{_ID}\.(htxb|json)")

    async def look_at(cluster: str, engine: Engine) -> None:
        try:
            found.names[cluster] = {name for name in await engine.names(prefix) if ours.fullmatch(name)}
        except EngineError as error:
            found.unseen[cluster] = str(error)

    async with asyncio.TaskGroup() as group:  # one that does not answer takes its time
        for cluster, engine in engines.items():
            group.create_task(look_at(cluster, engine))
    try:
        found.names[STORAGE] = {name for name in await storage.list() if our_files.fullmatch(name)}
    except StorageUnavailable as error:
        found.unseen[STORAGE] = str(error)
    return found


async def _owned_files(store: Store, names: list[str]) -> set[str]:
    """Return which of these files are of backups that have a row, whatever has become of them."""
    backups = {name: name.partition("/")[2].partition(".")[0] for name in names}
    rows = await store.fetch(select(Backup.id).where(col(Backup.id).in_(set(backups.values()))))
    ids = {row.id for row in rows}
    return {name for name, backup in backups.items() if backup in ids}


async def _owned_names(store: Store, names: list[str]) -> set[str]:
    """Return which of these names are of databases that are not deleted, or of backups that are being verified."""
    alive = await store.fetch(
        select(Database.object_name).where(col(Database.object_name).in_(names), col(Database.deleted_at).is_(None))
    )
    owned = {row.object_name for row in alive}
    backups = {_backup_aside(name): name for name in names if name not in owned}
    if backups:
        at_work = select(Backup.id).where(col(Backup.id).in_(backups), col(Backup.lease_token).is_not(None))
        owned |= {backups[row.id] for row in await store.fetch(at_work)}
    return owned


async def _heir_of(session: AsyncSession, name: str) -> Database | Backup | None:
    """Return the row by which this name can come to be used again, for a change."""
    for find in (
        select(Database).where(col(Database.object_name) == name),
        select(Backup).where(col(Backup.id) == _backup_aside(name)),
    ):
        row: Database | Backup | None = await session.scalar(find.with_for_update())
        if row is not None:
            return row
    return None


def _is_owner(row: Database | Backup, *, now: datetime) -> bool:
    is_alive = isinstance(row, Database) and row.deleted_at is None
    return is_alive or (row.lease_until is not None and row.lease_until > now)


def _backup_aside(name: str) -> str:
    """Return the id of the backup that is verified under this name, if it is one's (see `name_aside`)."""
    return f"bk_{name.partition('_')[2]}"


def _some_of(keys: list[T]) -> Iterator[list[T]]:
    for start in range(0, len(keys), _MANY):
        yield keys[start : start + _MANY]
