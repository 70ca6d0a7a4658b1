"""A yard for tests of what is on clusters and in the storage beside the rows: all of it is put there by hand."""

from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Self

import structlog
from sqlalchemy import update
from sqlmodel import SQLModel, col, select

from controlplane.accounts.model import Account
from controlplane.backups.model import COMPLETED, Backup
from controlplane.backups.storage import FolderStorage
from controlplane.databases.engines.engine import Engine, Target
from controlplane.databases.engines.postgresql import PostgreSQL
from controlplane.databases.model import READY, Database
from controlplane.databases.names import prefix_of_ours
from controlplane.databases.sweep import Orphan, Sweep
from controlplane.ids import new_id
from controlplane.local.postgres import EmbeddedPostgres
from controlplane.migrations import migrate
from controlplane.observe.metrics import new_metrics
from controlplane.sql import Store
from tests.clock import ManualClock
from tests.databases.engines.cluster import BIN_DIR
from tests.databases.fake_engine import FakeEngine

GRACE = timedelta(days=1)


class Yard:
    """A storage of rows, a folder of backups, a real PostgreSQL and a fake cluster, and a clock that stands still."""

    prefix: str

    def __init__(self, url: str, folder: Path, postgres: EmbeddedPostgres) -> None:
        self.url = url
        self.folder = folder
        self.dsn = postgres.admin_dsn
        self._postgresql = PostgreSQL(admin_dsn=self.dsn, host="127.0.0.1", port=1, bin_dir=BIN_DIR)
        self.clock = ManualClock()
        self.metrics = new_metrics()
        self.fake = FakeEngine()
        self.engines: dict[str, Engine] = {"pg": self._postgresql, "fake": self.fake}
        self.files = FolderStorage(folder)
        self.store = Store(url)

    async def __aenter__(self) -> Self:
        """Make the tables and an account."""
        await migrate(self.store)
        self.prefix = await prefix_of_ours(self.store)
        await self.add(
            Account(id="ac_1", email="a@example.com", password_hash="", plan="roomy", created_at=self.clock.now())
        )
        return self

    async def __aexit__(self, *exception: object) -> None:
        """Leave nothing on the cluster that the other tests share."""
        for name in await self._postgresql.names(self.prefix):
            await self._postgresql.drop(name)
        await self.store.close()

    def sweep(self, *, grace: timedelta = GRACE, store: Store | None = None) -> Sweep:
        """Return a sweep, as a server has it."""
        return Sweep(
            store=store or self.store,
            clock=self.clock,
            engines=self.engines,
            storage=self.files,
            metrics=self.metrics,
            grace=grace,
        )

    async def run(self, **changes: Any) -> list[Any]:
        """Sweep; return what was logged."""
        with structlog.testing.capture_logs() as lines:
            await self.sweep(**changes).run()
        return [line for line in lines if "kind" not in line]  # a reconciler of another test's may still look at things

    async def add(self, *rows: SQLModel) -> None:
        """Put rows there."""
        async with self.store.session() as session:
            session.add_all(rows)
            await session.commit()

    async def change(self, row: Database | Backup, **values: Any) -> None:
        """Change a row."""
        async with self.store.session() as session:
            await session.execute(update(type(row)).where(col(type(row).id) == row.id).values(values))
            await session.commit()

    async def lease_of(self, row: Database | Backup) -> str | None:
        """Return the lease that somebody holds of a row."""
        rows = await self.store.fetch(select(type(row).lease_token).where(col(type(row).id) == row.id))
        lease: str | None = rows[0].lease_token
        return lease

    async def known(self) -> dict[tuple[str, str], datetime]:
        """Return which orphans are known, and since when."""
        return {(row.place, row.name): row.first_seen_at for row in await self.store.fetch(select(Orphan))}

    def new_name(self) -> str:
        """Return a name as a database of ours has it."""
        return self.prefix + new_id("db").partition("_")[2]

    async def appear(self, name: str, cluster: str = "pg", *, login: bool = True) -> str:
        """Put a database and its user on a cluster."""
        await self.engines[cluster].apply(replace(target(name), login=login))
        return name

    def write(self, *names: str) -> None:
        """Put files into the storage of backups."""
        for name in names:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_bytes(b"sealed")

    async def there(self, cluster: str = "pg") -> set[str]:
        """Return what of ours is on a cluster."""
        return await self.engines[cluster].names(self.prefix)

    def gauge(self, place: str) -> float | None:
        """Return what the metric says of a place."""
        return self.metrics.registry.get_sample_value("htx_orphans", {"place": place})

    def removed(self, place: str) -> float | None:
        """Return how many were removed there."""
        return self.metrics.registry.get_sample_value("htx_orphans_removed_total", {"place": place})

    def database(self, *, cluster: str = "pg", **columns: Any) -> Database:
        """Return the row of a database."""
        database_id, now = new_id("db"), self.clock.now()
        columns = {"object_name": self.prefix + database_id.partition("_")[2], "state": READY, **columns}
        return Database(
            id=database_id,
            account_id="ac_1",
            name=database_id,
            engine="postgresql",
            sku="db-s-1vcpu-1gb",
            region="local",
            cluster_target=cluster,
            password_sealed="",
            created_at=now,
            updated_at=now,
            **columns,
        )

    def backup(self, database: Database, **columns: Any) -> Backup:
        """Return the row of a backup."""
        columns = {"state": COMPLETED, **columns}
        return Backup(
            id=new_id("bk"),
            account_id="ac_1",
            database_id=database.id,
            trigger="on_demand",
            created_at=self.clock.now(),
            **columns,
        )


def target(name: str) -> Target:
    """Return what a database of this name is like."""
    return Target(name=name, password="s3cret", connections=3, memory_mb=512, storage_gb=1)


def files_of(database: Database | str, backup: str) -> tuple[str, str]:
    """Return the names of a backup's two files."""
    folder = database if isinstance(database, str) else database.object_name
    return f"{folder}/{backup}.htxb", f"{folder}/{backup}.json"


def leased(clock: ManualClock) -> dict[str, Any]:
    """Return what a row has that somebody works on."""
    return {"lease_token": "somebody", "lease_until": clock.now() + timedelta(seconds=30)}
