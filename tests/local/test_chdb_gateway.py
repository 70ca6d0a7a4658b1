"""The embedded ClickHouse by itself: its HTTP interface, its engines, and what a tenant's queries can reach."""

import asyncio
import gzip
import os
import signal
import struct
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import httpx
import lz4.frame
import pytest

from controlplane.databases.engines.engine import Target
from tests.databases.engines.clickhouse_server import LONG_QUERY, Server, Wrong, new_target
from tests.stack import eventually


@pytest.fixture(scope="module")
async def server(folder: Path) -> AsyncIterator[Server]:
    """An embedded ClickHouse."""
    server = Server(folder / "clickhouse-gateway")
    await server.start()
    yield server
    await server.stop()


@pytest.fixture(scope="module")
async def target(server: Server) -> AsyncIterator[Target]:
    """A database."""
    target = new_target()
    await server.engine.apply(target)
    yield target
    await server.engine.drop(target.name)


@pytest.fixture
async def rest(server: Server, target: Target) -> AsyncIterator[httpx.AsyncClient]:
    """A client with the tenant's credentials."""
    auth = httpx.BasicAuth(target.name, target.password)
    async with httpx.AsyncClient(base_url=server.url, auth=auth, timeout=60) as client:
        yield client


async def test_credentials(server: Server, target: Target) -> None:
    """User and password are taken from wherever ClickHouse takes them; anything else is refused as ClickHouse does."""
    user, password = target.name, "plain"
    await server.admin(f"ALTER USER {user} IDENTIFIED WITH no_password")
    given = [
        {"auth": httpx.BasicAuth(user, password)},
        {"headers": {"x-clickhouse-user": user, "x-clickhouse-key": password}},
        {"params": {"user": user, "password": password}},
    ]
    async with httpx.AsyncClient(base_url=server.url) as client:
        for credentials in given:
            assert (await client.post("/", content="SELECT 1", **credentials)).text == "1\n"  # type: ignore[arg-type]
        assert (await client.get("/ping")).text == "Ok.\n"
        await server.engine.apply(target)
        for credentials in [*given, {}, {"headers": {"authorization": "Basic !"}}]:
            answer = await client.post("/", content="SELECT 1", **credentials)  # type: ignore[arg-type]
            assert (answer.status_code, answer.headers["x-clickhouse-exception-code"]) == (403, "516")


async def test_formats(rest: httpx.AsyncClient) -> None:
    """Answers of any length are in the format that was asked for, and one document; TabSeparated unless told."""
    sql = "SELECT number FROM numbers(300000)"
    rows = (await rest.post("/", content=f"{sql} FORMAT JSON")).json()
    assert (rows["rows"], rows["data"][-1]) == (300000, {"number": 299999})
    assert (await rest.post("/", content=f"{sql} LIMIT 2")).text == "0\n1\n"
    assert (
        await rest.post("/", params={"default_format": "CSVWithNames"}, content=f"{sql} LIMIT 1")
    ).text == '"number"\n0\n'
    answer = await rest.post("/", content=f"{sql} LIMIT 1", headers={"x-clickhouse-format": "JSONEachRow"})
    assert answer.json() == {"number": 0}
    assert (await rest.post("/", content=f"{sql} WHERE 0 FORMAT TSVWithNames")).text == "number\n"
    binary = (await rest.post("/", content=f"{sql} FORMAT RowBinary")).content
    assert binary == struct.pack("<300000Q", *range(300000))
    assert (await rest.get("/", params={"query": "SELECT {n:UInt8} + 1", "param_n": "4"})).text == "5\n"


async def test_insert(server: Server, target: Target, rest: httpx.AsyncClient) -> None:
    """Data goes in behind the statement or apart from it, packed or not, in any pieces; half a row is refused."""
    await server.tenant(target, "CREATE TABLE t (n UInt64) ENGINE = MergeTree ORDER BY n")
    data = struct.pack("<200000Q", *range(200000))

    async def pieces(data: bytes) -> AsyncIterator[bytes]:
        for start in range(0, len(data), 77_777):
            yield data[start : start + 77_777]

    statement = "INSERT INTO t FORMAT RowBinary"
    await rest.post("/", params={"query": statement}, content=pieces(data))
    await rest.post("/", content=pieces(statement.encode() + b"\n" + data))
    packed = {"gzip": gzip.compress(data), "lz4": lz4.frame.compress(data)}
    for encoding, body in packed.items():
        headers = {"content-encoding": encoding}
        answer = await rest.post("/", params={"query": statement}, content=pieces(body), headers=headers)
        assert answer.status_code == 200, answer.text
    await rest.post("/", content='INSERT INTO t (n) FORMAT JSONEachRow {"n": 1}')
    await rest.post("/", content="INSERT INTO t VALUES (2), (3)")
    await rest.post("/", content="INSERT INTO t SELECT 4")
    assert await server.tenant(target, "SELECT count(), sum(n) FROM t") == f"800004\t{4 * sum(range(200000)) + 10}"
    answer = await rest.post("/", params={"query": statement}, content=data[:-3])
    assert (answer.status_code, answer.headers["x-clickhouse-exception-code"]) == (500, "33")
    assert (await rest.post("/", content=data, headers={"content-encoding": "br"})).status_code == 500
    await server.tenant(target, "DROP TABLE t")


async def test_late_error(rest: httpx.AsyncClient) -> None:
    """An error behind the first rows breaks the connection, so that nobody takes them for all; one before is told."""
    with pytest.raises(httpx.RemoteProtocolError):
        await rest.post("/", content="SELECT throwIf(number = 4000000) FROM numbers(5000000)")
    answer = await rest.post("/", content="SELECT nothing")
    assert (answer.status_code, answer.headers["x-clickhouse-exception-code"]) == (500, "47")


async def test_leaving(server: Server, target: Target) -> None:
    """A query ends in its engine when its caller goes away."""
    running = asyncio.create_task(server.tenant(target, LONG_QUERY))
    others = "SELECT count() FROM system.processes WHERE query NOT LIKE '%system.processes%'"

    async def count(expected: str) -> bool:
        return await server.tenant(target, others) == expected

    assert await eventually(lambda: count("1"))
    running.cancel()
    assert await eventually(lambda: count("0"), seconds=10)


async def test_session(rest: httpx.AsyncClient) -> None:
    """What a session sets stays in it; two queries at once in it are refused."""
    await rest.post("/", params={"session_id": "a"}, content="CREATE TEMPORARY TABLE t (n UInt8)")
    await rest.post("/", params={"session_id": "a"}, content="SET max_threads = 1")
    sql = "SELECT getSetting('max_threads'), count() FROM t"
    assert (await rest.post("/", params={"session_id": "a"}, content=sql)).text == "1\t0\n"
    assert (await rest.post("/", params={"session_id": "b"}, content=sql)).status_code == 404
    answer = await rest.post("/", params={"max_threads": "2"}, content="SELECT getSetting('max_threads')")
    assert answer.text == "2\n"
    running = asyncio.create_task(rest.post("/", params={"session_id": "a"}, content=LONG_QUERY))

    async def locked() -> bool:
        nonlocal running
        if running.done():  # it was the one to be refused
            running = asyncio.create_task(rest.post("/", params={"session_id": "a"}, content=LONG_QUERY))
        await asyncio.wait({running}, timeout=0.3)  # lest the next be first, again and again
        answer = await rest.post("/", params={"session_id": "a"}, content="SELECT 2")
        return bool(answer.headers.get("x-clickhouse-exception-code") == "373")

    assert await eventually(locked)
    running.cancel()


@pytest.fixture
def readable(tmp_path: Path) -> Path:
    """A file that everybody may read, in a folder that everybody may write."""
    tmp_path.chmod(0o777)
    file = tmp_path / "readable"
    file.write_text("secret")
    return file


async def test_reach(server: Server, target: Target, readable: Path) -> None:
    """A tenant's queries reach no file but his own, and no host, past whatever ClickHouse itself would check."""
    other = new_target()
    await server.engine.apply(other)
    await server.tenant(other, "CREATE TABLE t (n UInt8) ENGINE = Log")
    databases = server.folder / "databases"
    files = ["/etc/passwd", readable, server.folder / "admin", server.folder / "accounts.json"]
    files += [databases / other.name / "data/store/status", databases / other.name / "users.xml", "/proc/1/environ"]
    for file in files:
        with pytest.raises(Wrong, match=r"denied|not permitted|doesn't exist"):
            await server.tenant(target, f"SELECT file('{file}')")
    with pytest.raises(Wrong):
        await server.tenant(target, f"SELECT 1 INTO OUTFILE '{readable}.written'")
    assert list(readable.parent.iterdir()) == [readable]
    with pytest.raises(Wrong):
        await server.tenant(target, f"INSERT INTO FUNCTION file('{readable}.written', CSV, 'n UInt8') SELECT 1")
    async with asyncio.timeout(20), await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0) as web:
        port = web.sockets[0].getsockname()[1]
        sql = f"CREATE TABLE w (n UInt8) ENGINE = Log SETTINGS disk = disk(type = web, endpoint = 'http://127.0.0.1:{port}/')"
        with pytest.raises(Wrong):
            await server.tenant(target, sql)
    await server.engine.drop(other.name)


async def test_identity(server: Server, target: Target) -> None:
    """Started by root, every engine runs as a user of its own, who owns nothing but his database."""
    await server.tenant(target, "SELECT 2")
    owner = (server.folder / "databases" / target.name / "data").stat()
    assert owner.st_mode & 0o777 == 0o700
    if os.geteuid() == 0:
        assert [process.stat().st_uid for process in _engines(target.name)] == [owner.st_uid]
        assert owner.st_uid > 700_000
    assert (server.folder / "admin").stat().st_mode & 0o777 == 0o600
    assert (server.folder / "accounts.json").stat().st_mode & 0o777 == 0o600


def _engines(name: str) -> list[Path]:
    """Return the /proc folders of the engines of this database."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (process / "cmdline").read_bytes().split(b"\0")
            if b"controlplane.local.chdb.engine" in command and name.encode() in command:
                found.append(process)
    return found


async def test_restart(folder: Path) -> None:
    """Users, databases and rows are there again after a restart, also of one that was killed."""
    target = new_target()
    for number in range(2):
        server = Server(folder / "clickhouse-restart")
        await server.start()
        assert await server.engine.apply(target) == (() if number else ("the database",))
        if number == 0:
            await server.tenant(target, "CREATE TABLE t (n UInt8) ENGINE = MergeTree ORDER BY n")
            await server.tenant(target, "INSERT INTO t VALUES (7)")
        assert await server.tenant(target, "SELECT n FROM t") == "7"
        await server.stop()


async def test_engine_killed(server: Server, target: Target) -> None:
    """An engine that died is started again for the next query."""
    await server.tenant(target, "SELECT 2")
    for process in _engines(target.name):
        os.kill(int(process.name), signal.SIGKILL)

    async def back() -> bool:
        try:
            return await server.tenant(target, "SELECT 2") == "2"
        except Wrong as error:
            assert error.code == "210"  # noqa: PT017 - an engine that is not there; nothing else is in order
            return False

    assert await eventually(back)


async def test_unknown_statement(server: Server) -> None:
    """Of the admin's statements only the driver's are understood; any other is refused, and changes nothing."""
    for sql in ("CREATE USER x", "GRANT ALL ON *.* TO default", "ALTER USER nobody HOST NONE", "SYSTEM SHUTDOWN"):
        with pytest.raises(Wrong, match=r"does not know|no user"):
            await server.admin(sql)


async def test_many_databases(server: Server) -> None:
    """The admin finds each of forty databases, and all of them by what their names begin with."""
    targets = [replace(new_target(), name=f"many_{number:03}") for number in range(40)]
    for target in targets:
        assert await server.engine.apply(target) == ("the database",)
    assert await server.engine.apply(targets[0]) == ()
    assert await server.engine.names("many_") == {target.name for target in targets}
    assert await server.engine.names("many_00") == {f"many_00{number}" for number in range(10)}
    for target in targets:
        await server.engine.drop(target.name)
    assert await server.engine.names("many_") == set()
