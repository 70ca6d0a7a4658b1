"""An installation whose server is killed and started again: its folder, its only customer, its rows, its clusters."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import grpc
from sqlalchemy import bindparam, text

from controlplane.access.secrets import new_token
from controlplane.accounts.admin import create_account
from controlplane.api.v1 import backups_pb2_grpc, databases_pb2_grpc, functions_pb2_grpc, proxies_pb2_grpc
from controlplane.audit.log import AuditLog
from controlplane.catalog.model import Catalog
from controlplane.clock import SystemClock
from controlplane.ids import new_id
from controlplane.keys import Keys
from controlplane.migrations import migrate
from controlplane.sql import Store, UtcDateTime
from controlplane.tokens.model import Token
from tests.clusters import Cluster, entries
from tests.faults.points import Scope
from tests.faults.process import Launcher, Process
from tests.stack import PASSWORD, free_port

RequestT = TypeVar("RequestT")
AnswerT = TypeVar("AnswerT")
Row = Mapping[str, Any]

_CATALOG = Path(__file__).with_name("catalog.toml")
SECONDS = 20.0  # within which everything is as ordered once the server is back
_TABLES = ("databases", "backups", "functions", "proxies")
_BUSY = text(
    " UNION ALL ".join(
        f"SELECT 1 FROM {table} WHERE waiting_on IS NOT NULL OR lease_token IS NOT NULL"  # noqa: S608
        " OR next_attempt_at <= :now"
        for table in _TABLES
    )
).bindparams(bindparam("now", type_=UtcDateTime()))
# What a caller gets whose server dies meanwhile: he does not know whether his order was recorded.
_UNCERTAIN = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN, grpc.StatusCode.CANCELLED}


class Uncertain(Exception):
    """The server has ended before it answered."""


class Refusal(Exception):
    """The server said no; `status` is gRPC's."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        super().__init__(error.details())
        self.status = error.code()


class Installation:
    """A server in a folder of its own, for which `new_installation` has made an account with a token.

    `clusters` are by engine. `process` is the server that runs, or ran last; `databases`, `backups`, `functions` and
    `proxies` are its stubs, to be called by `ask`.
    """

    process: Process
    databases: databases_pb2_grpc.DatabaseServiceStub
    backups: backups_pb2_grpc.BackupServiceStub
    functions: functions_pb2_grpc.FunctionServiceStub
    proxies: proxies_pb2_grpc.ProxyServiceStub

    def __init__(
        self,
        folder: Path,
        *,
        launcher: Launcher,
        clusters: Mapping[str, Cluster],
        store: Store,
        secret: str,
        scope: Scope,
    ) -> None:
        self.folder = folder
        self.clusters = clusters
        self.store = store
        self._launcher = launcher
        self._scope: Scope = scope
        self._metadata = (("authorization", f"Bearer {secret}"),)
        self._channel: grpc.aio.Channel | None = None
        self._seconds: dict[str, float] = {}

    async def start(self) -> None:
        """Start the server; return once it serves."""
        port = free_port()  # another each time, as somebody may have taken that of a server that was killed
        settings = {
            "HTX_DATA_DIR": str(self.folder),
            "HTX_CATALOG": str(self.folder / "catalog.toml"),
            "HTX_DATABASE_URL": self.store.url.render_as_string(hide_password=False),
            "HTX_GRPC_PORT": str(port),
            "HTX_METRICS_PORT": str(free_port()),
        }
        self.process = await self._launcher.start(settings, scope=self._scope, seconds=self._seconds)
        assert await self.process.ready(), f"the server has ended at its start:\n{self.log()}"
        # A new one: a channel that has lost its server waits before it tries again.
        before, self._channel = self._channel, grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        self.databases = databases_pb2_grpc.DatabaseServiceStub(self._channel)
        self.backups = backups_pb2_grpc.BackupServiceStub(self._channel)
        self.functions = functions_pb2_grpc.FunctionServiceStub(self._channel)
        self.proxies = proxies_pb2_grpc.ProxyServiceStub(self._channel)
        if before is not None:
            await before.close(grace=SECONDS)  # without it, who still waits for an answer there would be cancelled

    async def kill(self) -> None:
        """Kill the server, unless it has been killed."""
        self.process.kill()
        await self.process.ended.wait()

    async def close(self) -> None:
        """Kill the server, and let go of everything."""
        await self.kill()
        if self._channel is not None:
            await self._channel.close()
        await self.store.close()

    async def start_again(self) -> None:
        """Start the server that was killed, as if its leases had run out.

        They do so after half a minute, and its lock on a MongoDB after a whole one. To wait for that at each of
        hundreds of kills would take hours.
        """
        await self.kill()
        async with self.store.session() as session:
            for table in _TABLES:
                await session.execute(text(f"UPDATE {table} SET lease_until = NULL, lease_token = NULL"))  # noqa: S608
            await session.commit()
        for cluster in self.clusters.values():
            await cluster.expire_locks()
        await self.start()

    async def ask(
        self, method: grpc.aio.UnaryUnaryMultiCallable[RequestT, AnswerT], request: RequestT, *, key: str | None = None
    ) -> AnswerT:
        """Call a method as the customer, with an `Idempotency-Key` if one is given.

        Raises Refusal, or Uncertain if the server has ended.
        """
        more = (("idempotency-key", key),) if key else ()
        try:
            return await method(request, metadata=(*self._metadata, *more), timeout=SECONDS)
        except grpc.aio.AioRpcError as error:
            raise (Uncertain if error.code() in _UNCERTAIN else Refusal)(error) from None

    async def rows(self, table: str) -> list[Row]:
        """Return all rows of a table."""
        return [row._mapping for row in await self.store.fetch(text(f"SELECT * FROM {table}"))]  # noqa: S608, SLF001

    async def is_at_rest(self) -> bool:
        """Return whether nothing is ordered, due or being worked on."""
        return not await self.store.fetch(_BUSY, {"now": datetime.now(UTC)})

    async def rest(self) -> None:
        """Wait until nothing is to be done any more, or the server has ended."""
        async with asyncio.timeout(SECONDS):
            while not (self.process.ended.is_set() or await self.is_at_rest()):  # noqa: ASYNC110 - nobody tells us
                await asyncio.sleep(0.02)

    def log(self) -> str:
        """Return the end of what the servers have logged."""
        return "\n".join((self.folder / "server.log").read_text().splitlines()[-30:])


@asynccontextmanager
async def new_installation(
    folder: Path, *, launcher: Launcher, clusters: list[Cluster], database_url: str = "", scope: Scope = "usual"
) -> AsyncIterator[Installation]:
    """Make an installation on these clusters, and run it; its own database is a SQLite file unless told otherwise.

    `scope` says which moments its server has (`points.py`). Make one after the other: Alembic knows one at a time.
    """
    folder.mkdir()  # noqa: ASYNC240
    (folder / "catalog.toml").write_text(_CATALOG.read_text() + entries(clusters))
    store = Store(database_url or f"sqlite+aiosqlite:///{folder}/controlplane.db")
    await migrate(store)
    keys, clock, secret = Keys.load(folder / "keys.json"), SystemClock(), new_token()
    account = await create_account(
        store,
        Catalog.load(folder / "catalog.toml"),
        clock,
        audit=AuditLog(store=store, keys=keys, clock=clock),
        email="killed@example.com",
        password=PASSWORD,
    )
    async with store.session() as session:
        session.add(
            Token(
                id=new_id("tk"),
                account_id=account.id,
                name="faults",
                scope="full",
                secret_digest=keys.digest(secret),
                prefix="htx_",
                created_at=clock.now(),
            )
        )
        await session.commit()
    by_engine = {cluster.engine: cluster for cluster in clusters}
    installation = Installation(folder, launcher=launcher, clusters=by_engine, store=store, secret=secret, scope=scope)
    await installation.start()
    try:
        yield installation
    finally:
        await installation.close()
