"""A server that speaks MongoDB's protocol, as the tests of its driver see it: a program of its own, never imported.

It is not MongoDB, which no package registry has: where the two are known to differ, the tests say so.
"""

import asyncio
import fcntl
import hashlib
import secrets
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bson
import pytest
from pymongo import AsyncMongoClient
from pymongo.errors import PyMongoError

from controlplane.databases.engines.engine import Target
from controlplane.databases.engines.mongodb import MongoDB
from controlplane.local.child import Child
from tests.stack import eventually, free_port

Client = AsyncMongoClient[dict[str, Any]]

_REQUIREMENTS = Path(__file__).with_name("secantusdb.txt")
_ENVIRONMENT = Path(__file__).parents[3] / "build/wire-compatible"
_HANDSHAKE = {"hello", "ismaster", "isMaster", "saslStart", "saslContinue", "endSessions"}


@dataclass(frozen=True)
class Cluster:
    """A running server: how the admin gets in, where it listens, its log, and the driver bound to it."""

    admin_url: str
    port: int
    log: Path
    engine: MongoDB

    def admin(self) -> Client:
        """Return the admin's client."""
        return Client(self.admin_url)

    def tenant(self, target: Target, *, database: str | None = None, pool: int = 1) -> Client:
        """Return this tenant's client, logged in by the user of his own database unless told otherwise."""
        uri = self.engine.connection(target.name, target.password).uri
        return Client(uri, authSource=database or target.name, maxPoolSize=pool, serverSelectionTimeoutMS=3000)

    async def answers(self, target: Target, *, database: str | None = None) -> bool:
        """Return whether this tenant gets in and sees what is in his database."""
        async with self.tenant(target, database=database) as client:
            try:
                await client[target.name].list_collection_names()
            except PyMongoError:
                return False
            return True


@pytest.fixture(name="cluster", scope="module")
async def cluster_fixture(folder: Path) -> AsyncIterator[Cluster]:
    """A server of their own, as these tests tamper with it."""
    async with running(folder / f"mongodb-{secrets.token_hex(4)}") as cluster:
        yield cluster


@pytest.fixture(name="admin")
async def admin_fixture(cluster: Cluster) -> AsyncIterator[Client]:
    """The admin, to change things behind the driver's back."""
    async with cluster.admin() as client:
        yield client


@pytest.fixture(name="new")
async def new_fixture(cluster: Cluster) -> AsyncIterator[Callable[[], Target]]:
    """Tenants that are not there yet, with passwords that want quoting everywhere; what is made of them goes."""
    made: list[Target] = []

    def new() -> Target:
        name, password = f"db_{secrets.token_hex(8)}", f"s3cret'%@ {secrets.token_hex(8)}"
        made.append(Target(name=name, password=password, connections=5, memory_mb=64, storage_gb=1))
        return made[-1]

    yield new
    for target in made:
        await cluster.engine.drop(target.name)


@pytest.fixture(name="target")
async def target_fixture(cluster: Cluster, new: Callable[[], Target]) -> Target:
    """A database that exists."""
    target = new()
    await cluster.engine.apply(target)
    return target


@pytest.fixture(name="other")
async def other_fixture(cluster: Cluster, new: Callable[[], Target]) -> Target:
    """Another tenant's database."""
    other = new()
    await cluster.engine.apply(other)
    return other


@pytest.fixture(name="tenant")
async def tenant_fixture(cluster: Cluster, target: Target) -> AsyncIterator[Client]:
    """The tenant of the database that exists."""
    async with cluster.tenant(target) as client:
        yield client


@asynccontextmanager
async def running(folder: Path) -> AsyncIterator[Cluster]:
    """Run a server with its data in this folder, on a free port of 127.0.0.1."""
    python = await asyncio.to_thread(_python)
    port, password, log = free_port(), secrets.token_hex(8), folder / "log"
    options = [f"--config={_config(folder)}", f"--storage-path={folder}/data", f"--port={port}", "--cache-size=64M"]
    # It logs to its standard error.
    command = ["sh", "-c", 'exec "$@" 2>&1', "sh", str(python), "-I", "-m", "secantus", "--log-level=DEBUG", *options]
    # Whoever comes while it asks for no password makes the admin; it has no other way.
    async with _server(command, log, f"mongodb://127.0.0.1:{port}") as client:
        await client["admin"].command("createUser", "controlplane", pwd=password, roles=["root"])
    admin_url = f"mongodb://controlplane:{password}@127.0.0.1:{port}/"
    async with _server([*command, "--auth"], log, admin_url):
        engine = MongoDB(admin_url=admin_url, host="127.0.0.1", port=port)
        yield Cluster(admin_url=admin_url, port=port, log=log, engine=engine)


def _config(folder: Path) -> Path:
    """Make the server's folder and an empty configuration, or it would look for one elsewhere."""
    folder.mkdir()
    config = folder / "config"
    config.touch()
    return config


async def pieces(dump: bytes, size: int = 100_000) -> AsyncIterator[bytes]:
    """Return a dump in pieces."""
    for begin in range(0, len(dump), size):
        yield dump[begin : begin + size]


class Cut:
    """A wire to a server that breaks, for good, once it has brought the answers to so many commands."""

    def __init__(self, port: int, commands: int) -> None:
        self._port = port
        self._left = commands
        self._writers: list[asyncio.StreamWriter] = []

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[int]:
        """Listen on the port that this returns."""
        server = await asyncio.start_server(self._carry, "127.0.0.1")
        async with server:
            yield server.sockets[0].getsockname()[1]
            self._break()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            there, back = await asyncio.open_connection("127.0.0.1", self._port)
            self._writers += [writer, back]
            while True:
                request = await _message(reader)
                back.write(request)
                writer.write(await _message(there))
                await writer.drain()
                # OP_MSG has its document after 21 bytes, and a document begins with the command's name.
                if (
                    int.from_bytes(request[12:16], "little") == 2013
                    and next(iter(bson.decode(request[21:]))) not in _HANDSHAKE
                ):
                    self._left -= 1
                if self._left <= 0:
                    self._break()

    def _break(self) -> None:
        for writer in self._writers:
            writer.close()


def _is_command(message: bytes) -> bool:
    """Return whether this is more than a handshake: OP_MSG, whose document after 21 bytes begins with the command."""
    return int.from_bytes(message[12:16], "little") == 2013 and next(iter(bson.decode(message[21:]))) not in _HANDSHAKE


async def _message(reader: asyncio.StreamReader) -> bytes:
    size = await reader.readexactly(4)
    return size + await reader.readexactly(int.from_bytes(size, "little") - 4)


@asynccontextmanager
async def _server(command: list[str], log: Path, url: str) -> AsyncIterator[Client]:
    with log.open("ab") as output:
        server = Child("the wire-compatible server", command, stdout=output)
        await server.start()
        try:
            async with Client(url, serverSelectionTimeoutMS=1000) as client:

                async def answers() -> bool:
                    assert server.is_running, f"it has ended: see {log}"
                    with suppress(PyMongoError):
                        await client["admin"].command("ping")
                        return True
                    return False

                await eventually(answers, seconds=60)
                yield client
        finally:
            await server.stop()


def _python() -> Path:
    """Return the Python of the server's own environment; make that, unless it is there with the packages of today."""
    wanted = hashlib.sha256(_REQUIREMENTS.read_bytes()).hexdigest()
    ready, python = _ENVIRONMENT / "ready", _ENVIRONMENT / "venv/bin/python"
    _ENVIRONMENT.mkdir(parents=True, exist_ok=True)
    with (_ENVIRONMENT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not ready.exists() or ready.read_text() != wanted:
            ready.unlink(missing_ok=True)
            shutil.rmtree(_ENVIRONMENT / "venv", ignore_errors=True)
            _run(sys.executable, "-m", "venv", _ENVIRONMENT / "venv")
            _run(
                python,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--require-hashes",
                "--only-binary=:all:",
                "-r",
                _REQUIREMENTS,
            )
            ready.write_text(wanted)
    return python


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True)
