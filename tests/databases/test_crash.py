"""A server that is killed at any point: what it acknowledged is done after the next start, and nothing is left over."""

import asyncio
import os
import random
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg
import grpc

from controlplane.access.secrets import new_token
from controlplane.accounts.admin import create_account
from controlplane.api.v1 import backups_pb2, backups_pb2_grpc, databases_pb2, databases_pb2_grpc
from controlplane.audit.log import AuditLog
from controlplane.catalog.model import Catalog
from controlplane.clock import SystemClock
from controlplane.ids import new_id
from controlplane.keys import Keys
from controlplane.local.postgres import EmbeddedPostgres
from controlplane.migrations import migrate
from controlplane.sql import Store
from controlplane.tokens.model import Token
from tests.conftest import new_storage
from tests.stack import PASSWORD, free_port

KILLS = 3
UNCERTAIN = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN, grpc.StatusCode.CANCELLED}


@dataclass
class Installation:
    """A server process that is killed and started again, and what it has acknowledged to its only customer."""

    folder: Path
    catalog: Path
    database_url: str
    port: int = field(default_factory=free_port)
    created: set[str] = field(default_factory=set)
    deletions: set[str] = field(default_factory=set)
    deleted: set[str] = field(default_factory=set)
    kept: set[str] = field(default_factory=set)
    backed_up: set[str] = field(default_factory=set)
    metadata: tuple[tuple[str, str], ...] = ()

    async def prepare(self) -> None:
        """Make the account and its token."""
        self.folder.mkdir()
        store = Store(self.database_url or f"sqlite+aiosqlite:///{self.folder}/controlplane.db")
        await migrate(store)
        catalog, clock, secret = Catalog.load(self.catalog), SystemClock(), new_token()
        keys = Keys.load(self.folder / "keys.json")
        audit = AuditLog(store=store, keys=keys, clock=clock)
        account = await create_account(store, catalog, clock, audit=audit, email="a@example.com", password=PASSWORD)
        async with store.session() as session:
            session.add(
                Token(
                    id=new_id("tk"),
                    account_id=account.id,
                    name="crash",
                    scope="full",
                    secret_digest=keys.digest(secret),
                    prefix="htx_",
                    created_at=clock.now(),
                )
            )
            await session.commit()
        await store.close()
        self.metadata = (("authorization", f"Bearer {secret}"),)

    async def start(self) -> asyncio.subprocess.Process:
        """Start the server."""
        settings = {
            "HTX_DATA_DIR": self.folder,
            "HTX_CATALOG": self.catalog,
            "HTX_DATABASE_URL": self.database_url,
            "HTX_GRPC_PORT": self.port,
            "HTX_METRICS_PORT": free_port(),
        }
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "controlplane", "serve"),
            env={**os.environ, **{name: str(value) for name, value in settings.items()}},
            stderr=asyncio.subprocess.DEVNULL,
        )

    async def disturb(self) -> None:
        """Create, back up and delete, while the server is killed and started again."""
        process = await self.start()
        async with asyncio.TaskGroup() as group:
            workers = [group.create_task(self._work(f"w{number}")) for number in range(3)]
            for _ in range(KILLS):
                await self.answers()
                await asyncio.sleep(random.uniform(0.1, 1.5))  # noqa: S311
                process.send_signal(signal.SIGKILL)
                await process.wait()
                process = await self.start()
            for worker in workers:
                worker.cancel()
        try:
            await asyncio.wait_for(self._settle(), 60)
        finally:
            process.terminate()
            await process.wait()
        assert process.returncode == 0

    async def answers(self) -> None:
        """Wait until the server answers; a connection of the moment of its start may be cut off again."""
        async with asyncio.timeout(30):
            while True:
                async with grpc.aio.insecure_channel(f"127.0.0.1:{self.port}") as channel:
                    try:
                        await databases_pb2_grpc.DatabaseServiceStub(channel).ListDatabases(
                            databases_pb2.ListDatabasesRequest(), metadata=self.metadata, wait_for_ready=True
                        )
                    except grpc.aio.AioRpcError as error:
                        if error.code() != grpc.StatusCode.UNAVAILABLE:
                            raise
                    else:
                        return

    async def _work(self, prefix: str) -> None:
        """Order one thing after the other, and write down what was acknowledged."""
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self.port}") as channel:
            databases = databases_pb2_grpc.DatabaseServiceStub(channel)
            backups = backups_pb2_grpc.BackupServiceStub(channel)
            for number in range(10_000):
                name = f"{prefix}-{number}"
                wanted = databases_pb2.CreateDatabase(name=name, engine="postgresql", sku="db-s-1vcpu-1gb")
                request = databases_pb2.CreateDatabaseRequest(database=wanted)
                if await self._acknowledged(databases.CreateDatabase, request):
                    self.created.add(name)
                await asyncio.sleep(random.uniform(0, 0.3))  # noqa: S311
                backup = backups_pb2.CreateBackupRequest(name=name)
                if number % 3 == 0 and await self._acknowledged(backups.CreateBackup, backup):
                    self.backed_up.add(name)
                if number % 2 == 0:
                    continue
                self.deletions.add(name)
                if await self._acknowledged(databases.DeleteDatabase, databases_pb2.DeleteDatabaseRequest(name=name)):
                    self.deleted.add(name)

    async def _acknowledged(self, method: grpc.aio.UnaryUnaryMultiCallable, request: object) -> bool:  # type: ignore[type-arg]
        """Call once the server answers; return whether it said yes."""
        try:
            await method(request, metadata=self.metadata, wait_for_ready=True)
        except grpc.aio.AioRpcError as error:
            if error.code() in {*UNCERTAIN, grpc.StatusCode.ABORTED, grpc.StatusCode.NOT_FOUND}:
                return False
            raise
        return True

    async def _settle(self) -> None:
        """Wait until nothing is under way any more, the leases of the killed servers have run out, and compare."""
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self.port}") as channel:
            databases = databases_pb2_grpc.DatabaseServiceStub(channel)
            backups = backups_pb2_grpc.BackupServiceStub(channel)
            while True:
                await asyncio.sleep(0.5)
                answer = await databases.ListDatabases(
                    databases_pb2.ListDatabasesRequest(), metadata=self.metadata, wait_for_ready=True
                )
                kept = {database.name: database for database in answer.databases}
                if any(database.status != "ready" for database in kept.values()):
                    continue
                files, running = {}, False
                for database in kept.values():
                    request = backups_pb2.ListBackupsRequest(name=database.name)
                    for backup in (await backups.ListBackups(request, metadata=self.metadata)).backups:
                        files[f"{database.id}/{backup.id}.dump"] = backup.size_bytes
                        running = running or backup.status != "completed"
                if not running:
                    break
        # What was not acknowledged may have been done or not: of that, only that it is whole.
        assert self.created - self.deletions - set(kept) == set()
        assert self.deleted & set(kept) == set()
        assert len(self.created) > 5
        assert {name.partition("/")[0] for name in files} >= {kept[name].id for name in self.backed_up & set(kept)}
        folder = self.folder / "backups"
        found = {str(file.relative_to(folder)): file.stat().st_size for file in folder.glob("*/*")}
        assert found == files
        self.kept = {database.id for database in kept.values()}


async def test_what_was_acknowledged_survives_any_kill(folder: Path, catalog: Path, postgres: EmbeddedPostgres) -> None:
    """After kills at random, on both storages: each acknowledged order is done, and no object is without a row."""
    before = await objects(postgres)
    pair = [
        Installation(folder / "crash", catalog, ""),
        Installation(folder / "crash-pg", catalog, await new_storage(postgres, "crash")),
    ]
    for installation in pair:
        await installation.prepare()
    await asyncio.gather(*(installation.disturb() for installation in pair))
    expected = {name for installation in pair for name in installation.kept}
    databases, roles = await objects(postgres)
    assert databases - before[0] - {"crash"} == expected
    assert roles - before[1] == expected


async def objects(postgres: EmbeddedPostgres) -> tuple[set[str], set[str]]:
    """Return the names of all databases and roles of the cluster."""
    admin = await asyncpg.connect(postgres.admin_dsn)
    databases = {row["datname"] for row in await admin.fetch("SELECT datname FROM pg_database")}
    roles = {row["rolname"] for row in await admin.fetch("SELECT rolname FROM pg_roles")}
    await admin.close()
    return databases, roles
