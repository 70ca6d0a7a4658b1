"""Servers that look after one database by themselves; their cluster is a dictionary, and their clock stands still."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sqlalchemy import or_, update
from sqlmodel import col, select

from controlplane.backups.model import ON_DEMAND, Backup, new_backup
from controlplane.databases.model import Database
from controlplane.events.model import Event
from controlplane.server import Server
from controlplane.settings import Settings
from tests.clock import ManualClock
from tests.databases.fake_engine import FakeEngine
from tests.reconcile.conftest import Works
from tests.stack import eventually

HOUR, DAY = 3600, 86400


class Servers:
    """Any number of servers on the storage of `works`, whose files are in `folder`; nobody asks them anything."""

    def __init__(self, works: Works, folder: Path, catalog: Path) -> None:
        self.works = works
        self.clock: ManualClock = works.clock
        self.engine: FakeEngine = works.engine
        self.folder = folder / "backups/db_1"
        defaults = Settings.model_construct().model_dump()
        self._settings = Settings.model_construct(
            **{**defaults, "data_dir": folder, "database_url": works.url, "catalog": catalog}
        )
        self._running: list[Server] = []

    async def start(self) -> None:
        """Let one more server look after what is there."""
        server = Server(self._settings, clock=self.clock, engines={"local-postgresql": self.engine})
        server.reconciler.start()
        self._running.append(server)

    async def stop(self) -> None:
        """Stop all servers."""
        for server in self._running:
            await server.reconciler.stop()
            await server.store.close()
        self._running.clear()

    async def order(self, **columns: Any) -> None:
        """Order the database, with these further columns."""
        await self.works.order()
        if columns:
            await self.change(Database, **columns)

    async def change(self, model: type[Database | Backup], **columns: Any) -> None:
        """Write these columns into all rows."""
        async with self.works.store.session() as session:
            await session.execute(update(model).values(**columns))
            await session.commit()

    async def back_up(self, *, trigger: str = ON_DEMAND, **columns: Any) -> str:
        """Order a backup of the database, with these further columns; return its id once it is written, if it is."""
        async with self.works.store.session() as session:
            database = await session.get_one(Database, "db_1")
            backup = new_backup(database, trigger=trigger, now=self.clock.now())
            session.add(backup.sqlmodel_update(columns))
            await session.commit()
        await self.rest()
        return backup.id

    async def pass_time(self, seconds: float) -> None:
        """Let time pass, and wait until all is done that has become due by that."""
        self.clock.advance(seconds)
        await self.rest()

    async def rest(self) -> None:
        """Wait until nothing is due or being worked on."""
        for server in self._running:
            server.reconciler.wake()

        async def is_at_rest() -> bool:
            for model in (Database, Backup):
                due = col(model.next_attempt_at) <= self.clock.now()
                busy = select(model.id).where(or_(due, col(model.lease_token).is_not(None)))
                if await self.works.store.fetch(busy):
                    return False
            return True

        await eventually(is_at_rest)

    def hold(self) -> asyncio.Event:
        """Let the cluster answer what it is asked from now on only once the event that this returns is set."""
        self.engine.calls.clear()
        return self.engine.hold()

    async def asked(self, *call: str) -> None:
        """Wait until the cluster was asked this since the last `hold`."""

        async def is_asked() -> bool:
            return call in self.engine.calls

        await eventually(is_asked)

    async def database(self) -> Database:
        """Return the database's row."""
        row = await self.works.find()
        assert row is not None
        return row

    async def backups(self) -> Sequence[Backup]:
        """Return the rows of the backups, oldest first."""
        return await self.works.store.fetch(select(Backup).order_by(col(Backup.id)))

    async def events(self, prefix: str) -> list[tuple[str, str | None]]:
        """Return the events whose type begins with this, each with its detail."""
        rows = await self.works.store.fetch(select(Event).order_by(col(Event.sequence)))
        return [(row.type, row.detail) for row in rows if row.type.startswith(prefix)]

    def files(self) -> set[str]:
        """Return the names of the backups' files."""
        with suppress(FileNotFoundError):
            return {file.name for file in self.folder.iterdir()}
        return set()


def files_of(*backups: str) -> set[str]:
    """Return the names of the files that these backups have."""
    return {f"{backup}{suffix}" for backup in backups for suffix in (".htxb", ".json")}
