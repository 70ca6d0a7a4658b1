"""The control plane's own database: what was committed is seen at once, nothing is lost, an outage is known as one."""

import asyncio
import secrets
import stat
import struct
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy import column, select, table, text
from sqlalchemy.exc import DBAPIError

from controlplane.local.postgres import EmbeddedPostgres
from controlplane.sql import Store, is_outage
from tests.conftest import new_storage
from tests.stack import free_port

_COUNTERS = table("counters", column("n"))


@pytest.fixture
async def store(storage_url: str) -> AsyncIterator[Store]:
    """A store with one table, in which there is one row: n = 0."""
    store = Store(storage_url)
    async with store.engine.begin() as connection:
        await connection.execute(text("CREATE TABLE counters (n INTEGER NOT NULL)"))
        await connection.execute(text("INSERT INTO counters VALUES (0)"))
    yield store
    await store.close()


@pytest.fixture
async def sqlite(tmp_path: Path) -> AsyncIterator[Store]:
    """A store in a new SQLite file with one table."""
    store = Store(f"sqlite+aiosqlite:///{tmp_path}/own.db")
    async with store.engine.begin() as connection:
        await connection.execute(text("CREATE TABLE counters (n INTEGER NOT NULL)"))
    yield store
    await store.close()


async def test_a_commit_is_seen_by_the_next_fetch(store: Store) -> None:
    """A fetch sees what was committed before it, and nothing that is not committed."""
    for n in range(1, 20):
        async with store.session() as session:
            await session.execute(text("UPDATE counters SET n = :n"), {"n": n})
            assert (await store.fetch(text("SELECT n FROM counters")))[0].n == n - 1
            await session.commit()
        assert (await store.fetch(text("SELECT n FROM counters")))[0].n == n


async def test_parallel_transactions_lose_no_update(store: Store) -> None:
    """Fifty transactions that read and then write all count."""

    async def increment() -> None:
        async with store.session() as session:
            n = (await session.execute(select(_COUNTERS.c.n).with_for_update())).scalar_one()
            await asyncio.sleep(0)
            await session.execute(text("UPDATE counters SET n = :n"), {"n": n + 1})
            await session.commit()

    await asyncio.gather(*(increment() for _ in range(50)))
    assert (await store.fetch(text("SELECT n FROM counters")))[0].n == 50


async def test_the_version_moves_with_each_commit(sqlite: Store) -> None:
    """SQLite's version moves with a commit of this process, and stays where it is otherwise."""
    before = sqlite.version()
    assert sqlite.version() == before
    async with sqlite.session() as session:
        await session.execute(text("INSERT INTO counters VALUES (1)"))
        assert sqlite.version() == before
        await session.commit()
    after = sqlite.version()
    assert after != before
    async with sqlite.session() as session:
        await session.execute(text("INSERT INTO counters VALUES (2)"))
        await session.rollback()
    await sqlite.fetch(text("SELECT n FROM counters"))
    assert sqlite.version() == after


async def test_the_version_moves_with_another_process(sqlite: Store) -> None:
    """SQLite's version moves when another process commits, and the next fetch sees what it wrote."""
    before = sqlite.version()
    program = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('INSERT INTO counters VALUES (7)')"
    subprocess.run([sys.executable, "-c", f"{program}; c.commit()", str(sqlite.url.database)], check=True)  # noqa: ASYNC221
    assert sqlite.version() != before
    assert [row.n for row in await sqlite.fetch(text("SELECT n FROM counters"))] == [7]


async def test_the_version_moves_across_a_checkpoint(sqlite: Store) -> None:
    """A commit is seen also when another process has emptied the log before it, so that the log begins anew."""
    seen = [sqlite.version()]
    program = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None);"
        "c.execute('PRAGMA wal_checkpoint(TRUNCATE)'); c.execute('INSERT INTO counters VALUES (7)')"
    )
    for _ in range(3):
        subprocess.run([sys.executable, "-c", program, str(sqlite.url.database)], check=True)  # noqa: ASYNC221
        seen.append(sqlite.version())
    assert len(set(seen)) == 4
    assert len(await sqlite.fetch(text("SELECT n FROM counters"))) == 3


async def test_postgresql_has_no_version(store: Store) -> None:
    """Where there is no cheap version there is None, so that nobody remembers an answer for too long."""
    assert (store.version() is None) == (not store.is_sqlite)


async def test_a_transaction_takes_the_write_lock_as_it_begins(sqlite: Store) -> None:
    """A transaction that has only read keeps every other writer out: its knowledge cannot grow old."""
    other = Store(str(sqlite.url))
    async with sqlite.session() as session:
        await session.execute(text("SELECT n FROM counters"))
        async with other.engine.connect() as connection:
            # Outside a transaction of its own, so that it does not wait for the ten seconds that ours would.
            raw = (await connection.get_raw_connection()).driver_connection
            assert raw is not None
            await raw.execute("PRAGMA busy_timeout = 0")
            with pytest.raises(Exception, match="database is locked"):
                await raw.execute("INSERT INTO counters VALUES (1)")
    await other.close()


async def test_the_file_is_the_owners_alone(sqlite: Store) -> None:
    """Nobody else may read the SQLite file, nor the files beside it."""
    folder = Path(str(sqlite.url.database)).parent
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()}
    assert modes["own.db"] == 0o600
    assert set(modes.values()) == {0o600}


async def test_the_reader_cannot_write(sqlite: Store) -> None:
    """What `fetch` is given cannot change anything."""
    with pytest.raises(DBAPIError, match="readonly"):
        await sqlite.fetch(text("DELETE FROM counters RETURNING n"))


async def test_a_wrong_statement_is_no_outage(store: Store) -> None:
    """An error that a statement has earned is told apart from a database that does not answer."""
    with pytest.raises(DBAPIError) as wrong:
        async with store.session() as session:
            await session.execute(text("UPDATE counters SET n = NULL"))
    assert not is_outage(wrong.value)


@pytest.mark.parametrize("where", ["127.0.0.1:PORT/ours", "nowhere.invalid/ours", "/ours?host=/nowhere"])
async def test_a_refused_connection_is_an_outage(where: str) -> None:
    """A PostgreSQL that is not there is an outage: its port, its host's name or its socket."""
    store = Store(f"postgresql+asyncpg://us@{where}".replace("PORT", str(free_port())))
    with pytest.raises(Exception) as refused:  # noqa: PT011 - the kind is what is tested
        await store.check()
    assert is_outage(refused.value)
    await store.close()


async def test_a_session_that_is_ended_is_an_outage(postgres: EmbeddedPostgres) -> None:
    """A PostgreSQL that ends our sessions, as it does when it is stopped, is an outage; the next try connects anew."""
    store = Store(await new_storage(postgres, "ended"))
    with pytest.raises(DBAPIError) as ended:
        async with store.session() as session:
            await session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
    assert is_outage(ended.value)
    await store.check()
    await store.close()


@pytest.mark.parametrize("sqlstate", ["57P03", "53300", "53100"])
async def test_a_server_that_cannot_serve_is_an_outage(sqlstate: str) -> None:
    """A PostgreSQL that is starting or stopping, has no connection left, or no disk, is an outage."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer what PostgreSQL answers: no TLS, then one ErrorResponse."""
        while True:
            size, code = struct.unpack("!II", await reader.readexactly(8))
            await reader.readexactly(size - 8)
            if code == 80877103:  # SSLRequest
                writer.write(b"N")
                continue
            fields = f"SFATAL\0VFATAL\0C{sqlstate}\0Mnot now\0\0".encode()
            writer.write(b"E" + struct.pack("!I", len(fields) + 4) + fields)
            writer.close()
            return

    port = free_port()
    async with await asyncio.start_server(refuse, "127.0.0.1", port):
        store = Store(f"postgresql+asyncpg://us:secret@127.0.0.1:{port}/ours")
        with pytest.raises(DBAPIError) as refused:
            await store.check()
        await store.close()
    assert is_outage(refused.value)


async def test_a_connection_that_has_died_fails_nothing(postgres: EmbeddedPostgres) -> None:
    """After the server has ended all sessions, as a restart does, the next read and the next write go through."""
    url = await new_storage(postgres, f"own_{secrets.token_hex(4)}")
    store = Store(url)
    await asyncio.gather(*(store.fetch(text("SELECT pg_sleep(0.05)")) for _ in range(5)))
    async with store.session() as session:
        await session.execute(text("CREATE TABLE t (n int)"))
        await session.commit()
    admin = await asyncpg.connect(postgres.admin_dsn)
    end_all = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1"
    ended = await admin.fetch(end_all, store.url.database)
    await admin.close()
    assert len(ended) >= 6
    assert len(await store.fetch(text("SELECT 1"))) == 1
    async with store.session() as session:
        await session.execute(text("INSERT INTO t VALUES (1)"))
        await session.commit()
    await store.close()
