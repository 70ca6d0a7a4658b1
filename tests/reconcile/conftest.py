"""Reconcilers over a real storage and a cluster that does as the test says."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import timedelta
from pathlib import Path

import pytest
from sqlmodel import col, select

from controlplane.accounts.model import Account
from controlplane.backups.model import ON_DEMAND, new_backup
from controlplane.backups.provisioner import BackupProvisioner
from controlplane.backups.storage import FolderStorage
from controlplane.backups.vault import Vault
from controlplane.catalog.model import Catalog
from controlplane.databases.model import PROVISIONING, ClusterUse, Database, password_binding
from controlplane.databases.provisioner import DatabaseProvisioner
from controlplane.events.feed import Feed
from controlplane.keys import Keys
from controlplane.migrations import migrate
from controlplane.observe.metrics import Metrics, new_metrics
from controlplane.reconcile import loop
from controlplane.reconcile.loop import Reconciler
from controlplane.sql import Store
from tests.clock import ManualClock
from tests.databases.fake_engine import FakeEngine
from tests.stack import eventually

LOOK_EVERY = timedelta(days=1)


class Works:
    """A storage with one account, two fake clusters, a clock that stands still, and reconcilers over them."""

    def __init__(self, url: str, folder: Path, catalog: Catalog) -> None:
        self.url = url
        self.clock = ManualClock()
        self.engine, self.other = FakeEngine(), FakeEngine()
        self.store = Store(url)
        self._catalog = catalog
        self._keys = Keys.load(folder / "keys.json")
        self._vault = Vault(keys=self._keys, storage=FolderStorage(folder / "backups"))
        self._reconcilers: list[tuple[Reconciler, Store]] = []

    async def open(self) -> None:
        """Make the tables and the account."""
        await migrate(self.store)
        async with self.store.session() as session:
            now = self.clock.now()
            session.add(Account(id="ac_1", email="a@example.com", password_hash="", plan="roomy", created_at=now))
            session.add_all(ClusterUse(cluster=name, used=0) for name in ("local-postgresql", "other"))
            await session.commit()

    async def close(self) -> None:
        """Stop what is left."""
        for engine in (self.engine, self.other):
            engine.failure = None
            engine.release()
        for reconciler, store in self._reconcilers:
            await reconciler.stop()
            await store.close()
        await self.store.close()

    def reconciler(self, *, metrics: Metrics | None = None, concurrency: int = 8) -> Reconciler:
        """Return a reconciler with connections of its own, as another process has them; it is not started."""
        store = Store(self.url)
        feed = Feed(store=store, clock=self.clock)
        engines = {"local-postgresql": self.engine, "other": self.other}
        databases = DatabaseProvisioner(
            store=store,
            clock=self.clock,
            catalog=self._catalog,
            keys=self._keys,
            engines=engines,
            vault=self._vault,
            feed=feed,
            look_every=LOOK_EVERY,
        )
        databases.at_once = concurrency
        backups = BackupProvisioner(
            store=store,
            clock=self.clock,
            catalog=self._catalog,
            engines=engines,
            vault=self._vault,
            verify_after=LOOK_EVERY,
        )
        reconciler = Reconciler(
            store=store,
            clock=self.clock,
            feed=feed,
            provisioners=[databases, backups],
            metrics=metrics or new_metrics(),
        )
        self._reconcilers.append((reconciler, store))
        return reconciler

    async def order(
        self,
        database_id: str = "db_1",
        *,
        within: timedelta = timedelta(hours=1),
        cluster: str = "local-postgresql",
        taken_by: Reconciler | None = None,
        is_committed: bool = True,
    ) -> None:
        """Order a new database; `taken_by` is the reconciler of the process that takes the order."""
        now = self.clock.now()
        row = Database(
            id=database_id,
            account_id="ac_1",
            name=database_id.replace("_", "-"),
            object_name=database_id,
            engine="postgresql",
            sku="db-s-1vcpu-1gb",
            region="local",
            cluster_target=cluster,
            state=PROVISIONING,
            generation=0,
            password_sealed="",
            created_at=now,
            updated_at=now,
        )
        row.password_sealed = self._keys.encrypt(b"password", bound_to=password_binding(row))
        row.order(PROVISIONING, now=now, within=within, waiting_on=f"cluster {cluster}")
        committed = asyncio.get_running_loop().create_future()
        async with self.store.session() as session:
            session.add(row)
            if taken_by is not None:
                taken_by.take(row, committed)
            if is_committed:
                await session.commit()
        committed.set_result(is_committed)

    async def order_again(self, state: str, *, sku: str = "db-s-1vcpu-1gb", taken_by: Reconciler | None = None) -> None:
        """Want something else of the database."""
        committed = asyncio.get_running_loop().create_future()
        async with self.store.session() as session:
            row = await session.get_one(Database, "db_1", with_for_update=True)
            row.sku = sku
            row.order(state, now=self.clock.now(), within=timedelta(hours=1), waiting_on="cluster local-postgresql")
            if taken_by is not None:
                taken_by.take(row, committed)
            await session.commit()
        committed.set_result(True)

    async def order_backup(self, database_id: str = "db_1") -> str:
        """Order a backup of the database; return its id."""
        async with self.store.session() as session:
            row = await session.get_one(Database, database_id)
            backup = new_backup(row, trigger=ON_DEMAND, now=self.clock.now())
            session.add(backup)
            await session.commit()
            return backup.id

    async def find(self, database_id: str = "db_1") -> Database | None:
        """Return the row as it is now, if there is one."""
        async with self.store.session() as session:
            return await session.get(Database, database_id)

    async def leased(self) -> Sequence[str]:
        """Return the ids of the rows that somebody holds a lease of."""
        rows = await self.store.fetch(select(Database.id).where(col(Database.lease_token).is_not(None)))
        return [row.id for row in rows]

    async def until(self, holds: Callable[[Database], bool], database_id: str = "db_1") -> Database:
        """Wait until something is true of the row; return it."""

        async def found() -> Database | None:
            row = await self.find(database_id)
            return row if row is not None and holds(row) else None

        row = await eventually(found)
        assert row is not None
        return row

    async def until_gone(self) -> None:
        """Wait until the row is gone."""

        async def gone() -> bool:
            return await self.find() is None

        await eventually(gone)

    async def entered(self) -> None:
        """Wait until one more call has come to the cluster."""
        await asyncio.wait_for(self.engine.entered.acquire(), 5)


@pytest.fixture
def no_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is found because time goes by."""
    monkeypatch.setattr(loop, "_LOOK_EVERY", 3600.0)


@pytest.fixture
async def works(storage_url: str, tmp_path: Path, catalog: Path) -> AsyncIterator[Works]:
    """Works on a storage of either kind."""
    works = Works(storage_url, tmp_path, Catalog.load(catalog))
    await works.open()
    yield works
    await works.close()
