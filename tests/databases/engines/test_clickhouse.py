"""The ClickHouse driver against the embedded server, which has the real engine but accounts of our own making."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import clickhouse_connect
import httpx2
import pytest

from controlplane.databases.engines import clickhouse
from controlplane.databases.engines.clickhouse import ClickHouse
from controlplane.databases.engines.clickhouse_http import Session
from controlplane.databases.engines.engine import ClusterUnavailable, EngineError, Missing, Target
from tests.databases.engines.clickhouse_server import LONG_QUERY, Server, Wrong, cause_of, new_target
from tests.stack import eventually


@pytest.fixture(scope="module")
async def server(folder: Path) -> AsyncIterator[Server]:
    """An embedded ClickHouse of their own, as these tests tamper with it."""
    server = Server(folder / "clickhouse")
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
async def target(server: Server) -> AsyncIterator[Target]:
    """A database that exists."""
    target = new_target()
    await server.engine.apply(target)
    yield target
    await server.engine.drop(target.name)


@pytest.fixture(scope="module")
async def patient(server: Server) -> AsyncIterator[Target]:
    """A database with a table, to be broken and mended again and again."""
    patient = new_target()
    await server.engine.apply(patient)
    await server.tenant(patient, "CREATE TABLE notes (n UInt8) ENGINE = MergeTree ORDER BY n")
    yield patient
    await server.engine.drop(patient.name)


@pytest.fixture
async def other(server: Server) -> AsyncIterator[Target]:
    """Another tenant's database, with a row in it."""
    other = new_target()
    await server.engine.apply(other)
    await server.tenant(other, "CREATE TABLE secrets (n UInt8) ENGINE = MergeTree ORDER BY n")
    await server.tenant(other, "INSERT INTO secrets VALUES (7)")
    yield other
    await server.engine.drop(other.name)


async def test_use(server: Server) -> None:
    """A new database takes the connections of ClickHouse's own client, whatever characters are in the password."""
    target = new_target()
    assert await server.engine.apply(target) == ("the database",)
    uri = server.engine.connection(target.name, target.password).uri

    def work() -> Any:
        with clickhouse_connect.get_client(dsn=uri) as client:
            client.command("CREATE TABLE notes (n UInt32, text String) ENGINE = MergeTree ORDER BY n")
            client.insert("notes", [[1, "é'\n"], [2, "b"]], column_names=["n", "text"])
            return client.query("SELECT currentDatabase(), * FROM notes ORDER BY n").result_rows

    assert await asyncio.to_thread(work) == [(target.name, 1, "é'\n"), (target.name, 2, "b")]
    await server.engine.drop(target.name)


async def test_other_tenant(server: Server, target: Target, other: Target) -> None:
    """A tenant has no right on another's database, nor on users and databases, and sees nobody else's queries."""
    for sql in (
        f"SELECT * FROM {other.name}.secrets",  # noqa: S608
        f"INSERT INTO {other.name}.secrets VALUES (1)",  # noqa: S608
        f"SELECT * FROM merge('{other.name}', 'secrets')",  # noqa: S608
        "SELECT * FROM system.users",
        "SHOW USERS",
        "CREATE USER intruder",
        f"ALTER USER {target.name} SETTINGS max_memory_usage_for_user = 0",
        "CREATE DATABASE more",
        f"DROP DATABASE {target.name}",
        f"GRANT SELECT ON {other.name}.* TO default",
        "CREATE FUNCTION f AS (x) -> x",
        "CREATE TABLE t (n UInt8) ENGINE = File(CSV)",
        "CREATE TABLE t (n UInt8) ENGINE = URL('http://127.0.0.1/', CSV)",
        "CREATE DICTIONARY d (n UInt64, v UInt8) PRIMARY KEY n SOURCE(NULL()) LAYOUT(FLAT())",
        "SELECT * FROM url('http://127.0.0.1/', LineAsString)",
        "SELECT * FROM file('/etc/passwd', LineAsString)",
        "SELECT * FROM remote('127.0.0.1', system.one)",
        "SYSTEM SHUTDOWN",
        "SET max_memory_usage_for_user = 0",
        "SELECT 1 SETTINGS max_memory_usage_for_user = 0",
    ):
        with pytest.raises(Wrong) as refused:
            await server.tenant(target, sql)
        # No right (497), a constant setting (452), or nothing there at all: an engine has one database (81, 636).
        assert refused.value.code in {"497", "452", "81", "636"}, refused.value
    running = asyncio.create_task(server.tenant(other, LONG_QUERY))
    assert await eventually(lambda: _running(server, other))
    await server.tenant(target, "KILL QUERY WHERE 1")
    assert other.name not in await server.tenant(target, "SELECT query FROM system.processes FORMAT TSV")
    assert await server.tenant(target, "SHOW DATABASES") == target.name
    assert (await server.engine.observe(other.name)).connections == 1  # type: ignore[union-attr]
    running.cancel()


async def test_wrong_password(server: Server, target: Target) -> None:
    """Nobody gets in with another password."""
    assert await server.opens(target)
    assert not await server.opens(replace(target, password="guess"))
    assert not await server.opens(replace(target, password=""))


async def test_connection_limit(server: Server) -> None:
    """One query more than the limit is refused; a caller who goes away ends his query, and makes room."""
    target = new_target(connections=2)
    await server.engine.apply(target)
    running = [asyncio.create_task(server.tenant(target, LONG_QUERY)) for _ in range(2)]

    assert await eventually(lambda: _running(server, target, 2))
    with pytest.raises(Wrong, match="session count"):
        await server.tenant(target, "SELECT 2")
    for query in running:
        query.cancel()
    assert await eventually(lambda: _running(server, target, 0), seconds=10)
    assert await server.tenant(target, "SELECT 2") == "2"
    await server.engine.drop(target.name)


async def test_apply_twice(server: Server, target: Target) -> None:
    """A second apply changes nothing, and reports nothing."""
    before = (server.folder / "accounts.json").stat().st_mtime_ns
    assert await server.engine.apply(target) == ()
    assert (server.folder / "accounts.json").stat().st_mtime_ns == before


_LIMITS = "max_concurrent_queries_for_user = 5 CONST, max_memory_usage_for_user = 536870912 CONST"


@pytest.mark.parametrize(
    ("tampering", "reported"),
    [
        (f"ALTER USER {{name}} SETTINGS max_sessions_for_user = 99 CONST, {_LIMITS}", "the connection limit"),
        (f"ALTER USER {{name}} SETTINGS max_sessions_for_user = 5, {_LIMITS}", "the connection limit"),
        (f"ALTER USER {{name}} SETTINGS max_sessions_for_user = 5 CONST, {_LIMITS}, max_threads = 1", "the settings"),
        ("ALTER USER {name} SETTINGS max_memory_usage_for_user = 0", "the connection limit, the memory limit"),
        ("ALTER USER {name} HOST NONE", "the login"),
        ("ALTER USER {name} IDENTIFIED WITH no_password", "the password"),
        (f"ALTER USER {{name}} IDENTIFIED WITH sha256_hash BY '{'0' * 64}' SALT 'aa'", "the password"),
        ("ALTER USER {name} DEFAULT DATABASE system", "the user"),
        ("REVOKE ALL ON *.* FROM {name}", "the rights"),
        ("GRANT SELECT ON other.* TO {name}", "the rights"),
        ("GRANT TABLE ENGINE ON Buffer TO {name}", "the rights"),
        ("DROP USER IF EXISTS {name}", "the user"),
        ("DROP DATABASE IF EXISTS {name} SYNC", "the database"),
    ],
)
async def test_repair(server: Server, patient: Target, tampering: str, reported: str) -> None:
    """Whatever was changed behind our back, the next apply puts right and names, and the data stays."""
    await server.admin(tampering.format(name=patient.name))

    assert ", ".join(await server.engine.apply(patient)) == reported

    assert await server.engine.apply(patient) == ()
    assert await server.tenant(patient, "SHOW TABLES") == ("" if reported == "the database" else "notes")
    with pytest.raises(Wrong):
        await server.tenant(patient, "SET max_memory_usage_for_user = 0")


async def test_lost_database(server: Server, target: Target) -> None:
    """A database that was to be there and is not is missed, with or without its user, and nothing is changed."""
    wanted = replace(target, exists=True, connections=7)
    await server.admin(f"DROP DATABASE IF EXISTS {target.name} SYNC")
    before = (server.folder / "accounts.json").read_text()
    with pytest.raises(Missing):
        await server.engine.apply(wanted)
    assert (server.folder / "accounts.json").read_text() == before
    await server.admin(f"DROP USER IF EXISTS {target.name}")
    with pytest.raises(Missing):
        await server.engine.apply(wanted)
    assert await server.engine.names(target.name) == set()
    assert await server.engine.apply(replace(wanted, exists=False)) == ("the database",)


async def test_database_that_is_there(server: Server, target: Target) -> None:
    """A database that was to be there and is gets its limits, and its user back if he was dropped."""
    wanted = replace(target, exists=True)
    assert await server.engine.apply(wanted) == ()
    assert await server.engine.apply(replace(wanted, connections=7)) == ("the connection limit",)
    await server.admin(f"DROP USER IF EXISTS {target.name}")
    assert await server.engine.apply(wanted) == ("the user",)
    assert await server.opens(target)


async def test_stolen_password(server: Server, target: Target) -> None:
    """Who changed the password behind our back loses what he runs when ours is put back."""
    stolen = f"IDENTIFIED WITH sha256_hash BY '{sha256(b'stolenaa').hexdigest()}' SALT 'aa'"
    await server.admin(f"ALTER USER {target.name} {stolen}")
    thief = replace(target, password="stolen")
    assert await server.tenant(thief, "SELECT 2") == "2"  # so that the engine runs already
    running = asyncio.create_task(server.tenant(thief, LONG_QUERY))
    assert await eventually(lambda: _running(server, target))
    assert await server.engine.apply(target) == ("the password",)
    with pytest.raises((Wrong, httpx2.TransportError)):
        await asyncio.wait_for(running, 10)
    assert not await server.opens(thief)


async def test_resume_after_crash(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever an apply or a drop was cut off, the next one finishes it."""
    for changes in ({}, {"password": "n3w"}, {"login": False}, {"connections": 1}):
        crashes = 0
        while True:
            target = new_target()
            if changes:
                await server.engine.apply(target)
            wanted = replace(target, **changes)
            with monkeypatch.context() as patch:
                _crash_after(patch, crashes + 1)
                try:
                    await server.engine.apply(wanted)
                except _Crash:
                    crashes += 1
                else:
                    break
            await server.engine.apply(wanted)
            assert await server.engine.apply(wanted) == ()
            assert await server.opens(wanted) == wanted.login
            assert target.password == wanted.password or not await server.opens(target)
            await server.engine.drop(target.name)
        assert crashes == {"": 5, "password": 4, "login": 3, "connections": 1}["".join(changes)]
        await _drop_with_crashes(server, target, monkeypatch)


async def _drop_with_crashes(server: Server, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    for crashes in (1, 2, 3):
        with monkeypatch.context() as patch:
            _crash_after(patch, crashes)
            with pytest.raises(_Crash):
                await server.engine.drop(target.name)
        await server.engine.drop(target.name)
        assert await server.engine.names(target.name) == set()
        await server.engine.apply(target)
    await server.engine.drop(target.name)


async def test_resize_and_password(server: Server, target: Target) -> None:
    """New limits are taken in place; a new password holds at once, and the old one and its queries end."""
    bigger = replace(target, connections=9, memory_mb=700)
    assert await server.engine.apply(bigger) == ("the connection limit", "the memory limit")
    assert await server.tenant(bigger, "SELECT getSetting('max_memory_usage_for_user')") == str(700 << 20)

    running = asyncio.create_task(server.tenant(bigger, LONG_QUERY))
    assert await eventually(lambda: _running(server, target))
    changed = replace(bigger, password="n3w")
    assert await server.engine.apply(changed) == ("the password",)
    with pytest.raises((Wrong, httpx2.TransportError)):
        await asyncio.wait_for(running, 10)
    assert not await server.opens(bigger)
    assert await server.opens(changed)


async def test_memory_limit(server: Server) -> None:
    """A query that wants more memory than was paid for is refused, and a new limit lets it through."""
    target = new_target(memory_mb=256)
    await server.engine.apply(target)
    sql = "SELECT length(groupArray(number)) FROM numbers(50000000)"
    with pytest.raises(Wrong, match="memory limit exceeded"):
        await server.tenant(target, sql)
    await server.engine.apply(replace(target, memory_mb=2048))
    assert await server.tenant(target, sql) == "50000000"
    await server.engine.drop(target.name)


async def test_no_login(server: Server, target: Target) -> None:
    """Without login the tenant's queries end and no new one starts, until it is back, with the data."""
    await server.tenant(target, "CREATE TABLE notes (n UInt8) ENGINE = MergeTree ORDER BY n")
    running = asyncio.create_task(server.tenant(target, LONG_QUERY))
    assert await eventually(lambda: _running(server, target))
    stopped = replace(target, login=False)
    assert set(await server.engine.apply(stopped)) >= {"the login"}
    with pytest.raises((Wrong, httpx2.TransportError)):
        await asyncio.wait_for(running, 10)
    assert not await server.opens(target)
    assert await server.engine.apply(stopped) == ()
    observed = await server.engine.observe(target.name)
    assert observed is not None
    assert (observed.login, observed.connections) == (False, 0)

    await server.engine.apply(target)
    assert await server.tenant(target, "SHOW TABLES") == "notes"


async def test_parallel(server: Server) -> None:
    """Several new databases at once do not get into each other's way."""
    targets = [new_target() for _ in range(6)]
    await asyncio.gather(*(server.engine.apply(target) for target in targets))
    assert all([await server.opens(target) for target in targets])
    await asyncio.gather(*(server.engine.drop(target.name) for target in targets))


async def test_drop(server: Server) -> None:
    """Drop ends running queries, removes database and user, and may be repeated."""
    target = new_target()
    await server.engine.apply(target)
    running = asyncio.create_task(server.tenant(target, LONG_QUERY))
    assert await eventually(lambda: _running(server, target))

    await server.engine.drop(target.name)
    await server.engine.drop(target.name)

    with pytest.raises((Wrong, httpx2.TransportError)):
        await asyncio.wait_for(running, 10)
    assert await server.engine.names(target.name) == set()
    assert await server.engine.observe(target.name) is None
    assert not (server.folder / "databases" / target.name).exists()
    await server.engine.drop("db_never_there")


async def test_names(server: Server, target: Target) -> None:
    """Databases and users are found by their beginning, each kind alone too, and no system database."""
    await server.admin("CREATE USER OR REPLACE lonely_user HOST NONE")
    await server.admin("CREATE DATABASE IF NOT EXISTS lonely_database")
    assert await server.engine.names("lonely_") == {"lonely_user", "lonely_database"}
    assert await server.engine.names(target.name) == {target.name}
    assert "system" not in await server.engine.names("")
    await server.engine.drop("lonely_user")
    await server.engine.drop("lonely_database")


async def test_observe(server: Server, target: Target) -> None:
    """A look tells login, running queries and size; nothing of what is not there, or lacks its user."""
    await server.tenant(target, "CREATE TABLE notes (s String) ENGINE = MergeTree ORDER BY s")
    await server.tenant(target, "INSERT INTO notes SELECT randomPrintableASCII(1000) FROM numbers(1000)")
    observed = await server.engine.observe(target.name)
    assert observed is not None
    assert (observed.login, observed.connections) == (True, 0)
    assert 1_000_000 * 0.8 < observed.size_bytes < 10_000_000
    await server.admin(f"DROP USER IF EXISTS {target.name}")
    assert await server.engine.observe(target.name) is None


@pytest.mark.parametrize(
    "name", ["default", "system", "db", "Db_1", "db-1", "1db", "db_1\n", "db`_1", "d" * 33, "dbé_1"]
)
async def test_name(server: Server, name: str) -> None:
    """A name that is none of ours is refused before anything is asked of the server."""
    for action in (server.engine.apply(replace(new_target(), name=name)), server.engine.drop(name)):
        with pytest.raises(ValueError, match="cannot be the name"):
            await action


async def test_unreachable() -> None:
    """A server that refuses connections is unavailable, and no word of the sentence tells where it is."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://admin:s3cret@127.0.0.1:{nobody.getsockname()[1]}"
        engine = ClickHouse(admin_url=url, host="db", port=8123)
        for action in (engine.apply(new_target()), engine.drop("db_1"), engine.names("db_"), engine.contents("db_1")):
            with pytest.raises(ClusterUnavailable) as failure:
                await action
            assert str(failure.value) == "The database cluster is not available at the moment; try again later."


async def test_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that takes the connection and says nothing is unavailable within the time for an answer."""
    monkeypatch.setattr(clickhouse, "_ACTION_TIMEOUT", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://admin:s3cret@127.0.0.1:{silent.getsockname()[1]}"
        begin = time.monotonic()
        with pytest.raises(ClusterUnavailable):
            await ClickHouse(admin_url=url, host="db", port=8123).apply(new_target())
        assert time.monotonic() - begin < 5


async def test_wrong_admin(server: Server) -> None:
    """An admin who is not let in is an error that trying again does not mend; the password stays out of it."""
    engine = ClickHouse(admin_url=f"http://controlplane:s3cret@127.0.0.1:{server.port}", host="db", port=8123)
    with pytest.raises(EngineError) as failure:
        await engine.apply(new_target())
    assert type(failure.value) is EngineError
    assert "Authentication failed" in cause_of(failure.value)
    assert "s3cret" not in str(failure.value) + cause_of(failure.value)


def test_connection() -> None:
    """The URI is percent-encoded, an IPv6 address gets brackets, and secrets stay out of representations."""
    engine = ClickHouse(admin_url="https://admin:x@db:8443", host="::1", port=8443)
    connection = engine.connection("db_1", "a/b@c:é")
    assert connection.uri == "https://db_1:a%2Fb%40c%3A%C3%A9@[::1]:8443/db_1"
    assert (connection.host, connection.port, connection.database, connection.username) == ("::1", 8443, "db_1", "db_1")
    assert "a/b" not in repr(connection)


@pytest.mark.parametrize("url", ["clickhouse://admin:x@db:9000", "http://db:8123", "http://admin@"])
def test_admin_url(url: str) -> None:
    """A URL that is not one of the HTTP interface with a user is refused before the first use."""
    with pytest.raises(ValueError, match="must be http"):
        ClickHouse(admin_url=url, host="db", port=8123)


async def _running(server: Server, target: Target, count: int = 1) -> bool:
    """Return whether so many of the tenant's queries are under way."""
    observed = await server.engine.observe(target.name)
    return observed is not None and observed.connections == count


class _Crash(BaseException):
    """The worker is gone."""


def _crash_after(patch: pytest.MonkeyPatch, statements: int) -> None:
    """Let the worker die right after it has sent this many statements that change something."""
    run = Session.run
    left = statements

    async def crash(self: Session, sql: str, **parameters: Any) -> str:
        nonlocal left
        answer = await run(self, sql, **parameters)
        if sql and not sql.startswith("SELECT"):
            left -= 1
            if left == 0:
                raise _Crash
        return answer

    patch.setattr(Session, "run", crash)
