"""From what a backup's row wants to its files; and whether what is there can be restored, which only trying tells."""

import secrets
from collections.abc import Mapping
from datetime import datetime, timedelta
from functools import partial
from typing import Any

from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from controlplane.access import quota
from controlplane.backups.model import COMPLETED, NEWEST, RUNNING, SCHEDULED, TO_DELETE, Backup, order_deletion
from controlplane.backups.sealed import BrokenBackup, Identity
from controlplane.backups.vault import Progress, Vault, identity_of
from controlplane.catalog.model import Catalog
from controlplane.clock import Clock
from controlplane.databases.engines.engine import Busy, ClusterUnavailable, Engine, EngineError
from controlplane.databases.model import Database
from controlplane.databases.names import name_aside
from controlplane.databases.target import as_not_yet, engine_of, target_of
from controlplane.reconcile.lease import check_lease
from controlplane.reconcile.model import DELETING, FAILED
from controlplane.reconcile.step import Gone, News, Outcome, Settled
from controlplane.sql import Store

_TELL_EVERY = timedelta(seconds=2)
_VERIFY_AGAIN = timedelta(days=7)
_LOOK_AGAIN = timedelta(days=1)  # at what failed its verification, or is kept beyond its time


class BackupProvisioner:
    """Writes, verifies and removes backups through the driver of the database's cluster."""

    kind = "backup"
    model = Backup
    at_once = 4

    def __init__(
        self,
        *,
        store: Store,
        clock: Clock,
        catalog: Catalog,
        engines: Mapping[str, Engine],
        vault: Vault,
        verify_after: timedelta,
    ) -> None:
        self._store = store
        self._clock = clock
        self._catalog = catalog
        self._engines = engines
        self._vault = vault
        self._verify_after = verify_after

    async def step(self, row: Backup) -> Outcome:
        """Take the next step of a backup.

        Raises NotYet while the cluster or the storage does not let us.
        """
        found = await self._store.fetch(select(Database).where(col(Database.id) == row.database_id))
        database: Database = found[0]
        identity = identity_of(row, database)
        with as_not_yet(database):
            if row.state == DELETING:
                await self._vault.remove(identity)
                return Gone()
            if row.state == RUNNING:
                return await self._write(row, database, identity)
            return await self._look(row, database, identity)

    async def follow_up(self, session: AsyncSession, row: Backup, outcome: Outcome) -> bool:
        """Give back the quota of what is gone; order away what a new backup makes superfluous, if anything."""
        if isinstance(outcome, Gone):
            await quota.release(session, resource_id=row.id)
        elif isinstance(outcome, Settled) and row.state == RUNNING and row.trigger == SCHEDULED:
            await self._retain(session, row)
            return True
        return False

    async def _write(self, row: Backup, database: Database, identity: Identity) -> Outcome:
        engine = engine_of(database, self._engines)
        now = self._clock.now()
        manifest = await self._vault.write(engine, identity, now=now, progress=self._progress(row))
        completed_at = self._clock.now()
        learned = {
            "size_bytes": manifest.sealed_bytes,
            "sha256": manifest.sealed_sha256,
            "completed_at": completed_at,
        }
        return Settled(COMPLETED, learned, look_again_at=_earliest(completed_at + self._verify_after, row.expires_at))

    def _progress(self, row: Backup) -> Progress:
        """Return what keeps `size_bytes` going while the file grows, every now and then."""
        told = self._clock.now()
        mine = update(Backup).where(col(Backup.id) == row.id, col(Backup.lease_token) == row.lease_token)

        async def tell(written: int) -> None:
            nonlocal told
            if (now := self._clock.now()) - told < _TELL_EVERY:
                return
            told = now
            async with self._store.session() as session:
                await session.execute(mine.values(size_bytes=written))
                await session.commit()

        return tell

    async def _look(self, row: Backup, database: Database, identity: Identity) -> Outcome:
        """See whether a completed backup has had its time, and else, if it is the newest, whether it can be restored.

        The newest one of a database that is alive stays beyond its time: the one after it may never come.
        """
        now = self._clock.now()
        newest = await self._store.fetch(NEWEST, {"database_id": row.database_id})
        is_newest = bool(newest) and newest[0].id == row.id  # none if it was ordered away meanwhile
        is_alive = database.deleted_at is None and database.state != DELETING
        if row.expires_at is not None and row.expires_at <= now:
            if not (is_newest and is_alive):
                order = {"waiting_on": "its file", "deadline_at": now + TO_DELETE}
                return Settled(DELETING, order, look_again_at=now)
        elif not (is_newest and is_alive):
            return Settled(COMPLETED, look_again_at=row.expires_at)
        error = await self._verify(row, database, identity)
        again = now + (_VERIFY_AGAIN if error is None else _LOOK_AGAIN)
        if row.expires_at is not None:
            again = min(again, max(row.expires_at, now + _LOOK_AGAIN))
        if error is None:
            learned: dict[str, Any] = {"verified_at": self._clock.now(), "verification_error": None}
            news = News("verified") if row.verified_at is None or row.verification_error else None
            return Settled(COMPLETED, learned, look_again_at=again, news=news)
        news = News("verification_failed", error)
        return Settled(COMPLETED, {"verification_error": error}, look_again_at=again, news=news)

    async def _verify(self, row: Backup, database: Database, identity: Identity) -> str | None:
        """Restore the backup aside, compare, and drop it again; return why that cannot be done, None if it can."""
        engine = engine_of(database, self._engines)
        name, password = name_aside(database.object_name, row.id), secrets.token_urlsafe(24)
        aside = target_of(database, self._catalog, name=name, password=password)
        check = partial(check_lease, self._store, self._clock, row)
        try:
            await self._vault.restore(engine, identity, aside, check=check)
        except BrokenBackup as error:
            return str(error)
        except (ClusterUnavailable, Busy):
            raise
        except EngineError as error:
            return f"It could not be restored: {error}"
        finally:
            await engine.drop(name)
        return None

    async def _retain(self, session: AsyncSession, row: Backup) -> None:
        """Order away the scheduled backups that are one too many, and the failed ones that this one makes up for."""
        database = await session.get_one(Database, row.database_id)
        scheduled = select(Backup).where(
            col(Backup.database_id) == row.database_id,
            col(Backup.trigger) == SCHEDULED,
            col(Backup.state).in_((COMPLETED, FAILED)),
        )
        kept = 0
        for backup in await session.scalars(scheduled.order_by(col(Backup.id).desc()).with_for_update()):
            kept += backup.state == COMPLETED
            too_many = database.backups_kept is not None and kept > database.backups_kept
            if backup.id < row.id and (backup.state == FAILED or too_many):
                order_deletion(backup, now=self._clock.now())


def _earliest(*times: datetime | None) -> datetime:
    return min(time for time in times if time is not None)
