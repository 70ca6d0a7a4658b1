"""From what a database's row wants to what is on its cluster: one step at a time, each safe to repeat."""

import secrets
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from typing import Any

from sqlalchemy import func
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from controlplane.access import quota
from controlplane.accounts.model import Account
from controlplane.backups.model import COMPLETED, RUNNING, SCHEDULED, Backup, new_backup
from controlplane.backups.sealed import BrokenBackup
from controlplane.backups.vault import Vault, identity_of
from controlplane.catalog.model import Catalog
from controlplane.clock import Clock
from controlplane.databases import placement
from controlplane.databases.engines.engine import Busy, Check, ClusterUnavailable, Engine, EngineError, Missing
from controlplane.databases.model import DELETED, READY, STOPPED, Database, password_binding
from controlplane.databases.schedule import next_run
from controlplane.databases.target import as_not_yet, engine_of, target_of
from controlplane.errors import QuotaExceeded
from controlplane.events.feed import Feed
from controlplane.keys import Keys
from controlplane.reconcile.lease import check_lease
from controlplane.reconcile.model import DELETING
from controlplane.reconcile.step import Failed, Gone, News, NotYet, Outcome, Settled
from controlplane.sql import Store

_FIRST_LOOK = timedelta(seconds=5)  # its size and sessions are shown soon, and the order need not wait for them
_RESTORES_AT_ONCE = 4  # of the steps that may run, so that ordering a new database is quick all the same
_RESTORE_TRIES = 40  # about twenty minutes of a cluster that is away, and an end for a dump that only looks like that


class DatabaseProvisioner:
    """Makes, changes and removes databases through the driver of their cluster, and looks whether they still are."""

    kind = "database"
    model = Database
    at_once = 8

    def __init__(
        self,
        *,
        store: Store,
        clock: Clock,
        catalog: Catalog,
        keys: Keys,
        engines: Mapping[str, Engine],
        vault: Vault,
        feed: Feed,
        look_every: timedelta,
    ) -> None:
        self._store = store
        self._clock = clock
        self._catalog = catalog
        self._keys = keys
        self._engines = engines
        self._vault = vault
        self._feed = feed
        self._look_every = look_every
        self._silent: set[str] = set()  # clusters that did not answer when they were asked last
        self._asking: Counter[str] = Counter()
        self._restores = 0

    async def step(self, row: Database) -> Outcome:
        """Take the next step of a database.

        Raises NotYet while its cluster, its backups' storage, or a backup that has to go first, is in the way.
        """
        cluster = row.cluster_target
        if row.state == DELETED:
            return await self._end_undelete(row)
        engine = engine_of(row, self._engines)
        if cluster in self._silent and self._asking[cluster]:
            # One asks whether it is back; if all did, there would be nobody left for the other clusters.
            raise NotYet(f"cluster {cluster}", "The cluster does not answer.")
        self._asking[cluster] += 1
        with as_not_yet(row):
            try:
                outcome = await self._take(row, engine)
            except ClusterUnavailable:
                self._silent.add(cluster)
                raise
            finally:
                self._asking[cluster] -= 1
        self._silent.discard(cluster)
        return outcome

    async def follow_up(self, session: AsyncSession, row: Database, outcome: Outcome) -> bool:
        """Give back what a database held that is gone; order the backup that is due, and tell whether one was."""
        if row.state == DELETING and not isinstance(outcome, Failed):
            # In the order of the create, or the two deadlock.
            await quota.release(session, resource_id=row.id)
            for backup_id in await session.scalars(select(Backup.id).where(col(Backup.database_id) == row.id)):
                await quota.release(session, resource_id=backup_id)  # kept for us to undelete, not for him to use
            await placement.leave(session, row.cluster_target)
        elif (
            isinstance(outcome, Settled)
            and outcome.state == READY
            # As the step saw it: asked once more, a backup whose time has come since would be ordered twice.
            and row.next_backup_at not in {None, outcome.values["next_backup_at"]}
        ):
            return await self._order_backup(session, row)
        return False

    async def _take(self, row: Database, engine: Engine) -> Outcome:
        if row.state == DELETING:
            return await self._delete(row, engine)
        if row.restored_from is not None:
            return await self._restore(row, engine)
        return await self._apply(row, engine)

    async def _apply(self, row: Database, engine: Engine) -> Outcome:
        """Make the cluster match the row; where it did already, tell what had changed there behind our back."""
        is_look = row.observed_generation == row.generation
        target = target_of(
            row,
            self._catalog,
            name=row.object_name,
            password=self._keys.decrypt(row.password_sealed, bound_to=password_binding(row)).decode(),
            login=not row.stopped,
            exists=row.observed_generation > 0,
        )
        try:
            differed = await engine.apply(target, check=self._check(row))
        except Missing:
            return Failed(
                "The database is not on its cluster any more. Restore a backup of it into a new one, and delete it."
            )
        now = self._clock.now()
        learned: dict[str, Any] = {"observed_at": now, "next_backup_at": self._next_backup(row)}
        if is_look and (observed := await engine.observe(row.object_name)) is not None:
            learned |= {"size_bytes": observed.size_bytes, "connections": observed.connections}
        again = now + (self._look_every if is_look else _FIRST_LOOK)
        return Settled(
            STOPPED if row.stopped else READY,
            learned,
            look_again_at=min(again, learned["next_backup_at"] or again),
            news=News("repaired", f"Put right: {', '.join(differed)}.") if is_look and differed else None,
        )

    async def _restore(self, row: Database, engine: Engine) -> Outcome:
        """Make the database of the backup that the row names; each try begins anew."""
        if self._restores >= _RESTORES_AT_ONCE:
            raise NotYet("other restores", "Other databases are being restored first.")
        backups = await self._store.fetch(
            select(Backup).where(col(Backup.id) == row.restored_from, col(Backup.account_id) == row.account_id)
        )
        if not backups or backups[0].state != COMPLETED:
            return Failed("The backup was deleted before it was restored.")
        backup = backups[0]
        source = (await self._store.fetch(select(Database).where(col(Database.id) == backup.database_id)))[0]
        # With another password: nobody is to get in before it is whole. It becomes the row's own by the step after.
        aside = target_of(row, self._catalog, name=row.object_name, password=secrets.token_urlsafe(24))
        self._restores += 1
        try:
            await self._vault.restore(engine, identity_of(backup, source), aside, check=self._check(row))
        except BrokenBackup as error:
            return Failed(f"The backup cannot be restored: {error}")
        except (ClusterUnavailable, Busy) as error:
            if row.attempts >= _RESTORE_TRIES:
                return Failed(f"The backup could not be restored: {error}")
            raise
        except EngineError as error:
            return Failed(f"The backup could not be restored: {error}")
        finally:
            self._restores -= 1
        outcome = await self._apply(row, engine)
        if isinstance(outcome, Settled):
            outcome = replace(outcome, values={**outcome.values, "restored_from": None})
        return outcome

    async def _delete(self, row: Database, engine: Engine) -> Outcome:
        """Remove the database; if it has a backup, the row stays until that goes, so that it can be undeleted."""
        counted = await self._store.fetch(
            select(func.count(), func.count().filter(col(Backup.state) != COMPLETED)).where(
                col(Backup.database_id) == row.id
            )
        )
        backups, leaving = counted[0]
        if leaving:
            raise NotYet(f"{leaving} backups that are removed first", "Its backups are being removed.")
        await engine.drop(row.object_name, check=self._check(row))
        if not backups:
            return Gone()
        gives_up = {"name": row.id, "former_name": row.name, "deleted_at": self._clock.now(), "next_backup_at": None}
        return Settled(DELETED, gives_up, look_again_at=row.undelete_until)

    async def _end_undelete(self, row: Database) -> Outcome:
        """Forget a deleted database once its backup is gone, which has its own time to go."""
        if await self._store.fetch(select(Backup.id).where(col(Backup.database_id) == row.id)):
            raise NotYet("its last backup", "Its last backup is being removed.")
        return Gone()

    def _check(self, row: Database) -> Check:
        return partial(check_lease, self._store, self._clock, row)

    def _is_backup_due(self, row: Database) -> bool:
        return row.next_backup_at is not None and row.next_backup_at <= self._clock.now()

    def _next_backup(self, row: Database) -> datetime | None:
        if row.backup_schedule is None:
            return None
        if row.next_backup_at is not None and not self._is_backup_due(row):
            return row.next_backup_at
        return next_run(row.backup_schedule, after=self._clock.now(), database_id=row.id)

    async def _order_backup(self, session: AsyncSession, row: Database) -> bool:
        """Order the scheduled backup, or have the customer told why there is none; return whether it was ordered."""
        backup = new_backup(row, trigger=SCHEDULED, now=self._clock.now())
        if (reason := await self._why_none(session, row, backup)) is None:
            session.add(backup)
            await session.flush()
            return True
        await self._feed.append(
            session,
            account_id=row.account_id,
            type_="backup.skipped",
            resource_id=row.id,
            resource_name=row.name,
            detail=reason,
        )
        return False

    async def _why_none(self, session: AsyncSession, row: Database, backup: Backup) -> str | None:
        """Charge the quota; return why there can be no backup now, None if there can."""
        running = select(Backup.id).where(
            col(Backup.database_id) == row.id, col(Backup.trigger) == SCHEDULED, col(Backup.state) == RUNNING
        )
        if (await session.scalars(running.limit(1))).first() is not None:
            return "The backup before it is still being written."
        account = await session.get_one(Account, row.account_id)
        limit = self._catalog.plan(account.plan).quotas.backups
        try:
            async with session.begin_nested():
                await quota.charge(
                    session, account_id=row.account_id, kind="backups", resource_id=backup.id, limit=limit
                )
        except QuotaExceeded as error:
            return str(error)
        return None
