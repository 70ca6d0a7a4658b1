"""The clusters of the four engines, each with its driver and with what a tenant does on it; they run once for all."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import httpx2
import pymysql
import pytest
from pymongo import AsyncMongoClient
from pymongo.errors import OperationFailure

from controlplane.api.v1.databases_pb2 import DatabaseConnection
from controlplane.databases.engines.engine import Engine
from controlplane.databases.engines.mysql import MySQL
from controlplane.databases.engines.postgresql import PostgreSQL
from controlplane.local.chdb.gateway import ADMIN, admin_password
from controlplane.local.mariadb import EmbeddedMariaDB
from controlplane.local.postgres import EmbeddedPostgres
from tests.databases.engines import clickhouse_server, wire_compatible
from tests.databases.engines.cluster import BIN_DIR
from tests.stack import free_port


class Refused(Exception):
    """The tenant did not get in, or was thrown out."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A running cluster of one engine.

    `driver` is the project's, bound to it. `write` and `read` are the tenant's: the first keeps a word in his database,
    in place of any before; the second returns it, or None if there was never one. Both raise Refused.
    `expire_locks` does to our own locks on it what time does, where they do not end with the session that took them.
    """

    engine: str
    admin_url: str
    port: int
    driver: Engine
    write: Callable[[DatabaseConnection, str], Awaitable[None]]
    read: Callable[[DatabaseConnection], Awaitable[str | None]]
    expire_locks: Callable[[], Awaitable[None]]


@pytest.fixture(scope="session")
async def all_clusters(folder: Path, postgres: EmbeddedPostgres, postgres_port: int) -> AsyncIterator[list[Cluster]]:
    """A cluster of each engine, in the order of the table in `docs/engines.md`; they start all at once.

    This module is registered as a plugin by each conftest that wants it: imported there, it would be run for each.
    """
    starts = (
        _run_mysql(folder / "cluster-mysql"),
        _run_mongodb(folder / "cluster-mongodb"),
        _run_clickhouse(folder / "cluster-clickhouse"),
    )
    async with AsyncExitStack() as started:
        others = await asyncio.gather(*(started.enter_async_context(start) for start in starts))
        yield [postgresql(postgres, postgres_port), *others]


def entries(clusters: list[Cluster]) -> str:
    """Return the text that these clusters are in a catalogue."""
    return "".join(
        f'\n[[clusters]]\nname = "local-{cluster.engine}"\nengine = "{cluster.engine}"\nregion = "local"\n'
        f"admin = '{cluster.admin_url}'\nhost = \"127.0.0.1\"\nport = {cluster.port}\ncapacity = 1000\n"
        for cluster in clusters
    )


def postgresql(server: EmbeddedPostgres, port: int) -> Cluster:
    """Return the running PostgreSQL as a cluster."""
    driver = PostgreSQL(admin_dsn=server.admin_dsn, host="127.0.0.1", port=port, bin_dir=BIN_DIR)
    return Cluster(
        engine="postgresql",
        admin_url=server.admin_dsn,
        port=port,
        driver=driver,
        write=_write_postgresql,
        read=_read_postgresql,
        expire_locks=_locks_end_with_their_session,
    )


def mysql(server: EmbeddedMariaDB, port: int) -> Cluster:
    """Return the running MariaDB as a cluster."""
    return Cluster(
        engine="mysql",
        admin_url=server.admin_url,
        port=port,
        driver=MySQL(admin_url=server.admin_url, host="127.0.0.1", port=port),
        write=_write_mysql,
        read=_read_mysql,
        expire_locks=_locks_end_with_their_session,
    )


@asynccontextmanager
async def _run_mysql(folder: Path) -> AsyncIterator[Cluster]:
    """Run a MariaDB."""
    port = free_port()
    server = EmbeddedMariaDB(data_dir=folder, run_dir=folder / "run", port=port)
    await server.start()
    try:
        yield mysql(server, port)
    finally:
        await server.stop()


@asynccontextmanager
async def _run_mongodb(folder: Path) -> AsyncIterator[Cluster]:
    """Run a server that speaks MongoDB's protocol."""
    async with wire_compatible.running(folder) as server:

        async def expire_locks() -> None:
            async with server.admin() as admin:
                await admin["controlplane"]["locks"].update_many({}, {"$set": {"until": 0}})

        yield Cluster(
            engine="mongodb",
            admin_url=server.admin_url,
            port=server.port,
            driver=server.engine,
            write=_write_mongodb,
            read=_read_mongodb,
            expire_locks=expire_locks,
        )


@asynccontextmanager
async def _run_clickhouse(folder: Path) -> AsyncIterator[Cluster]:
    """Run the embedded ClickHouse."""
    server = clickhouse_server.Server(folder)
    await server.start()
    try:
        yield Cluster(
            engine="clickhouse",
            admin_url=f"http://{ADMIN}:{admin_password(folder)}@127.0.0.1:{server.port}",
            port=server.port,
            driver=server.engine,
            write=_write_clickhouse,
            read=_read_clickhouse,
            expire_locks=_locks_end_with_their_session,
        )
    finally:
        await server.stop()


async def _locks_end_with_their_session() -> None:
    """Do nothing."""


async def _write_postgresql(connection: DatabaseConnection, word: str) -> None:
    async with _postgresql(connection) as tenant:
        await tenant.execute("DROP TABLE IF EXISTS kept; CREATE TABLE kept (word text PRIMARY KEY)")
        await tenant.execute("INSERT INTO kept VALUES ($1)", word)


async def _read_postgresql(connection: DatabaseConnection) -> str | None:
    async with _postgresql(connection) as tenant:
        if await tenant.fetchval("SELECT to_regclass('kept')") is None:
            return None
        word: str = await tenant.fetchval("SELECT word FROM kept")
        return word


@asynccontextmanager
async def _postgresql(connection: DatabaseConnection) -> AsyncIterator[asyncpg.Connection]:
    try:
        tenant = await asyncpg.connect(connection.uri)
        try:
            yield tenant
        finally:
            await tenant.close()
    except (
        asyncpg.InvalidAuthorizationSpecificationError,
        asyncpg.InvalidCatalogNameError,
        asyncpg.PostgresConnectionError,
        asyncpg.OperatorInterventionError,
        asyncpg.InternalClientError,  # so it calls a server's goodbye that comes between two requests
    ) as error:
        raise Refused from error


async def _write_mysql(connection: DatabaseConnection, word: str) -> None:
    await asyncio.to_thread(
        _mysql,
        connection,
        "DROP TABLE IF EXISTS kept",
        "CREATE TABLE kept (word varchar(80) PRIMARY KEY)",
        f"INSERT INTO kept VALUES ('{word}')",  # noqa: S608 - a word of ours
    )


async def _read_mysql(connection: DatabaseConnection) -> str | None:
    if not await asyncio.to_thread(_mysql, connection, "SHOW TABLES LIKE 'kept'"):
        return None
    [(word,)] = await asyncio.to_thread(_mysql, connection, "SELECT word FROM kept")
    return str(word)


def _mysql(connection: DatabaseConnection, *statements: str) -> list[tuple[Any, ...]]:
    tenant = pymysql.connect(
        host=connection.host,
        port=connection.port,
        user=connection.username,
        password=connection.password,
        database=connection.database,
        autocommit=True,
        defer_connect=True,
    )
    with tenant, tenant.cursor() as cursor:
        try:
            tenant.connect()
            for statement in statements:
                cursor.execute(statement)
        except pymysql.OperationalError as error:
            raise Refused from error
        return list(cursor.fetchall())


async def _write_mongodb(connection: DatabaseConnection, word: str) -> None:
    async with _mongodb(connection) as tenant:
        await tenant[connection.database]["kept"].replace_one({"_id": 1}, {"word": word}, upsert=True)


async def _read_mongodb(connection: DatabaseConnection) -> str | None:
    async with _mongodb(connection) as tenant:
        found = await tenant[connection.database]["kept"].find_one()
        return str(found["word"]) if found else None


@asynccontextmanager
async def _mongodb(connection: DatabaseConnection) -> AsyncIterator[AsyncMongoClient[dict[str, Any]]]:
    async with AsyncMongoClient[dict[str, Any]](connection.uri, maxPoolSize=1, serverSelectionTimeoutMS=5000) as tenant:
        try:
            yield tenant
        except OperationFailure as error:
            raise Refused from error


async def _write_clickhouse(connection: DatabaseConnection, word: str) -> None:
    await _clickhouse(connection, "CREATE TABLE IF NOT EXISTS kept (word String) ENGINE = MergeTree ORDER BY word")
    await _clickhouse(connection, "TRUNCATE TABLE kept")
    await _clickhouse(connection, f"INSERT INTO kept VALUES ('{word}')")  # noqa: S608 - a word of ours


async def _read_clickhouse(connection: DatabaseConnection) -> str | None:
    if await _clickhouse(connection, "EXISTS TABLE kept") == "0":
        return None
    return await _clickhouse(connection, "SELECT word FROM kept")


async def _clickhouse(connection: DatabaseConnection, sql: str) -> str:
    url = urlsplit(connection.uri)
    login = httpx2.BasicAuth(connection.username, connection.password)
    async with httpx2.AsyncClient(auth=login, timeout=30) as tenant:
        answer = await tenant.post(f"{url.scheme}://{connection.host}:{connection.port}", content=sql)
    if answer.status_code != httpx2.codes.OK:
        raise Refused(answer.text)
    return answer.text.removesuffix("\n")
