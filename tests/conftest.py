"""The stack that the tests talk to: one per kind of storage, started once."""

import os
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import asyncpg
import grpc
import hypothesis
import pytest

from controlplane.functions.host.host import FunctionHost
from controlplane.local.postgres import EmbeddedPostgres
from tests.clock import MovableClock
from tests.doors import Door, Native, Rest
from tests.hosts import function_host, proxy_host
from tests.stack import Customer, Stack, free_port

CATALOG = Path(__file__).with_name("catalog.toml")

_MEMORY = "/dev/shm"  # noqa: S108 - a file system that Linux keeps in memory
_ROOM = 8 << 30  # bytes: what a whole run leaves lying until its end, and half as much again

# How long an example takes says nothing on a machine that others share.
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")


@pytest.fixture(scope="session")
def folder() -> Iterator[Path]:
    """A folder with a path short enough for Unix sockets, which the embedded PostgreSQL's user may pass through.

    It is in memory if there is room: our servers sync whatever they commit, and a disk takes its time for that.
    """
    made = Path(tempfile.mkdtemp(prefix="htx-", dir=_MEMORY if _has_room(_MEMORY) else "/tmp"))  # noqa: S108
    made.chmod(0o711 if os.geteuid() == 0 else 0o700)
    yield made
    shutil.rmtree(made)


def _has_room(place: str) -> bool:
    """Tell whether there is a file system of that much room, from which programs may be started."""
    if not os.access(place, os.W_OK):
        return False
    found = os.statvfs(place)
    return found.f_bavail * found.f_frsize >= _ROOM and not found.f_flag & os.ST_NOEXEC


@pytest.fixture(scope="session")
def postgres_port() -> int:
    """The port on which customers reach their databases."""
    return free_port()


@pytest.fixture(scope="session")
async def postgres(folder: Path, postgres_port: int) -> AsyncIterator[EmbeddedPostgres]:
    """The PostgreSQL that is the cluster of every stack, and the storage of one of them."""
    run_dir = folder / "run"
    run_dir.mkdir(mode=0o711)
    server = EmbeddedPostgres(data_dir=folder, run_dir=run_dir, port=postgres_port)
    await server.start()
    yield server
    await server.stop()


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
async def database_url(request: pytest.FixtureRequest, postgres: EmbeddedPostgres) -> str:
    """Where the control plane keeps its own rows: each test that uses the stack runs on both."""
    if request.param == "sqlite":
        return ""
    return await new_storage(postgres, "storage")


async def new_storage(postgres: EmbeddedPostgres, name: str) -> str:
    """Make an empty database for a control plane's own rows; return its SQLAlchemy URL."""
    connection = await asyncpg.connect(postgres.admin_dsn)
    await connection.execute(f'CREATE DATABASE "{name}"')
    await connection.close()
    return postgres.admin_dsn.replace("postgresql://", "postgresql+asyncpg://").replace("/postgres?", f"/{name}?")


@pytest.fixture
async def storage_url(database_url: str, postgres: EmbeddedPostgres, tmp_path: Path) -> str:
    """An empty storage of the test's own, of either kind."""
    if not database_url:
        return f"sqlite+aiosqlite:///{tmp_path}/own.db"
    return await new_storage(postgres, f"own_{secrets.token_hex(4)}")


@pytest.fixture(scope="session")
def catalog(folder: Path, postgres: EmbeddedPostgres, postgres_port: int) -> Path:
    """The catalogue of the tests, whose cluster is the running PostgreSQL."""
    file = folder / "catalog.toml"
    text = CATALOG.read_text().replace("ADMIN-DSN", postgres.admin_dsn)
    file.write_text(text.replace("port = 5432", f"port = {postgres_port}"))
    return file


@pytest.fixture(scope="session")
async def stack(folder: Path, database_url: str, catalog: Path) -> AsyncIterator[Stack]:
    """The stack that most tests share; they keep apart by having customers of their own."""
    kind = "pg" if database_url else "lite"
    async with Stack(folder / kind, database_url=database_url, catalog=catalog) as running:
        yield running


@pytest.fixture(scope="session")
async def timed(
    folder: Path, database_url: str, catalog: Path, postgres: EmbeddedPostgres, postgres_port: int
) -> AsyncIterator[tuple[Stack, MovableClock]]:
    """A stack whose clock the tests move, whose edge waits for 3 seconds only, and whose storage has its own role."""
    url = ""
    if database_url:
        await new_storage(postgres, "timed")
        connection = await asyncpg.connect(postgres.admin_dsn)
        await connection.execute("CREATE ROLE timed LOGIN PASSWORD 'timed'; ALTER DATABASE timed OWNER TO timed")
        await connection.close()
        url = f"postgresql+asyncpg://timed:timed@127.0.0.1:{postgres_port}/timed"
    clock = MovableClock()
    kind = "timed-pg" if database_url else "timed-lite"
    async with Stack(folder / kind, database_url=url, catalog=catalog, clock=clock, upstream_timeout=3) as running:
        yield running, clock


@pytest.fixture(scope="session")
async def proxy_port(stack: Stack) -> AsyncIterator[int]:
    """The port of a host of proxies that serves the shared stack."""
    async with proxy_host(stack) as port:
        yield port


@pytest.fixture(scope="session")
async def functions(stack: Stack, folder: Path) -> AsyncIterator[FunctionHost]:
    """A host of functions that serves the shared stack."""
    async with function_host(stack, folder / f"functions-{stack.settings.data_dir.name}") as host:
        yield host


@pytest.fixture
async def customer(stack: Stack) -> Customer:
    """A new customer with a login and a token of full scope."""
    return await stack.customer()


@pytest.fixture(scope="module")
async def somebody(stack: Stack) -> Customer:
    """A customer for the tests of a module that leave nothing behind."""
    return await stack.customer()


@pytest.fixture
def grpc_addr(stack: Stack) -> str:
    """Where pytest-grpc-aio's channels and stubs go: to the running server's internal port."""
    return f"127.0.0.1:{stack.settings.grpc_port}"


@pytest.fixture
def grpc_aio_server(stack: Stack) -> Callable[..., AbstractAsyncContextManager[Stack]]:
    """The server that pytest-grpc-aio would start: it runs already."""

    @asynccontextmanager
    async def running(*_servicer: object) -> AsyncIterator[Stack]:
        yield stack

    return running


@pytest.fixture
async def native(
    grpc_aio_channel: Callable[..., AbstractAsyncContextManager[grpc.aio.Channel]],
) -> AsyncIterator[Native]:
    """The native door of the stack."""
    async with grpc_aio_channel() as channel:
        yield Native(channel)


@pytest.fixture(params=["rest", "native"])
def door(request: pytest.FixtureRequest, stack: Stack) -> Door:
    """Each of the two doors of the stack in turn."""
    return Rest(stack.rest) if request.param == "rest" else Native(stack.channel)
