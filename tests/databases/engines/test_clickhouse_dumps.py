"""Dumps of the ClickHouse driver: every type to the last bit, one moment per table, and never to be trusted."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from controlplane.databases.engines.clickhouse_dump import _MAGIC, _frame, _Rows
from controlplane.databases.engines.engine import EngineError, Target
from tests.databases.engines.clickhouse_server import Server, Wrong, cause_of, dump_of, new_target, restore

_ALL_TYPES = """
    a UInt8, b Nullable(Int64), c String, d FixedString(3), e Float64, f Decimal(38, 10), g Date, h Date32,
    i DateTime('Europe/Vienna'), j DateTime64(6), k UUID, l IPv4, m IPv6, n Array(Nullable(String)),
    o Tuple(x Int8, y String), p Map(String, UInt8), q LowCardinality(Nullable(String)), r Enum8('x' = 1, 'y' = 2),
    s Int256, t Nested(u Int8, v String), w Variant(String, UInt64), x Dynamic, y JSON,
    z AggregateFunction(uniq, UInt64), `odd ``name\\`` Bool, za Point, zb UInt64 MATERIALIZED rand64(),
    zc UInt8 ALIAS a, zd SimpleAggregateFunction(sum, UInt64), INDEX by_name c TYPE bloom_filter GRANULARITY 2,
    PROJECTION by_c (SELECT c, count() GROUP BY c)"""
_ROWS = """
    SELECT number, if(number % 2, NULL, number), 'x\\0\\n', 'abc', if(number % 3, nan, -0.), 1.5, '2020-01-01',
    '1950-01-01', '2020-10-25 02:30:00', now64(6), generateUUIDv4(), '1.2.3.4', '::1', ['a', NULL], (1, 'z'),
    map('k', 2), if(number % 2, NULL, 'lc'), 'y', -5, [1, 2], ['p', 'q'],
    if(number % 2, 'str'::Variant(String, UInt64), 7::Variant(String, UInt64)),
    if(number % 2, 'dyn'::Dynamic, 42::Dynamic),
    '{"a": {"b": 1}, "c": [1, "x"]}', uniqState(number::UInt64), true, (1.5, 2.5), 5
    FROM numbers(300) GROUP BY number"""


@pytest.fixture(scope="module")
async def server(folder: Path) -> AsyncIterator[Server]:
    """An embedded ClickHouse."""
    server = Server(folder / "clickhouse-dumps")
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
async def target(server: Server) -> AsyncIterator[Target]:
    """A database with a table that has everything, one that merges, one without an order, and views."""
    target = new_target()
    await server.engine.apply(target)
    for sql in (
        f"CREATE TABLE everything ({_ALL_TYPES}) ENGINE = MergeTree ORDER BY a",
        "INSERT INTO everything" + _ROWS,
        "CREATE TABLE newest (n UInt32, t UInt32) ENGINE = ReplacingMergeTree(t) ORDER BY n PARTITION BY n % 2",
        "INSERT INTO newest SELECT number % 100, number FROM numbers(1000)",
        "INSERT INTO newest SELECT number % 100, number FROM numbers(1000, 1000)",
        "CREATE TABLE `log of ``it\\`` (s String) ENGINE = Log",
        "INSERT INTO `log of ``it\\`` VALUES ('one'), ('one')",
        "CREATE TABLE empty (n UInt8) ENGINE = Memory",
        f"CREATE VIEW b_first AS SELECT * FROM {target.name}.newest",  # noqa: S608
        "CREATE VIEW a_second AS SELECT count() AS c FROM b_first",
        "CREATE MATERIALIZED VIEW sums ENGINE = SummingMergeTree ORDER BY k POPULATE AS SELECT n%3 k, 1 c FROM newest",
    ):
        await server.tenant(target, sql)
    yield target
    await server.engine.drop(target.name)


@pytest.fixture
async def empty(server: Server) -> AsyncIterator[Target]:
    """A database with nothing in it, of a tenant who may take two connections."""
    empty = new_target(connections=2)
    await server.engine.apply(empty)
    yield empty
    await server.engine.drop(empty.name)


async def test_dump(server: Server, target: Target, empty: Target) -> None:
    """A dump restores elsewhere with equal contents, indexes and views, also when its own tenant is locked out."""
    await server.engine.apply(replace(target, login=False))
    async with server.engine.dump(target.name) as dump:
        chunks = [chunk async for chunk in dump.chunks()]
        contents = dump.contents()
    assert max(map(len, chunks)) <= 1 << 20
    assert {name: table.rows for name, table in contents.tables.items()} == {
        "everything": 300, "newest": 100, "log of `it`": 2, "empty": 0, "sums": 3,
    }  # fmt: skip

    await restore(server.engine, empty, b"".join(chunks))

    assert await server.engine.contents(empty.name) == contents
    assert await server.engine.contents(target.name) == contents
    assert await server.tenant(empty, "SELECT * FROM a_second") == "100"
    assert await server.tenant(empty, "SELECT sum(c) FROM sums") == await _as_owner(
        server, target, "SELECT sum(c) FROM sums"
    )
    structure = "SELECT count() FROM system.data_skipping_indices WHERE name = 'by_name'"
    assert await server.tenant(empty, structure) == "1"
    shown = await server.tenant(empty, "SHOW CREATE TABLE everything FORMAT TSVRaw")
    assert "PROJECTION by_c" in shown
    assert target.name not in shown
    await server.tenant(empty, "INSERT INTO newest VALUES (1000, 1)")
    assert await server.tenant(empty, "SELECT sum(c) FROM sums WHERE k = 1") != ""


async def _as_owner(server: Server, target: Target, sql: str) -> str:
    await server.engine.apply(target)
    return await server.tenant(target, sql)


async def test_contents(server: Server, empty: Target) -> None:
    """The same rows in another order are the same contents; one other bit is not."""
    await server.tenant(empty, "CREATE TABLE t (n UInt32) ENGINE = Log")
    contents = []
    for rows in (
        "numbers(100)",
        "(SELECT number FROM numbers(100) ORDER BY number DESC)",
        "numbers(1, 100)",
        "numbers(99)",
    ):
        await server.tenant(empty, "TRUNCATE TABLE t")
        await server.tenant(empty, f"INSERT INTO t SELECT * FROM {rows}")  # noqa: S608
        contents.append(await server.engine.contents(empty.name))
    assert contents[0] == contents[1]
    assert contents[2] != contents[0] != contents[3]


async def test_dump_while_written(server: Server, empty: Target) -> None:
    """Of a table that is written to, count and checksum are of the very rows in the dump."""
    await server.tenant(empty, "CREATE TABLE t (n UInt64, s String) ENGINE = MergeTree ORDER BY n")
    await server.tenant(empty, "INSERT INTO t SELECT number, repeat('x', 100) FROM numbers(300000)")
    async with server.engine.dump(empty.name) as dump:
        chunks = []
        async for chunk in dump.chunks():
            chunks.append(chunk)
            if len(chunks) == 3:
                await server.tenant(empty, "INSERT INTO t SELECT number, 'late' FROM numbers(1000)")
    assert len(chunks) > 30
    copy = new_target()
    await server.engine.apply(copy)
    await restore(server.engine, copy, b"".join(chunks))
    assert await server.engine.contents(copy.name) == dump.contents()
    assert await server.engine.contents(empty.name) != dump.contents()
    await server.engine.drop(copy.name)


async def test_left_dump(server: Server, empty: Target) -> None:
    """A dump that nobody reads on ends its query, and has no contents to tell."""
    await server.tenant(empty, "CREATE TABLE t (n UInt64, s String) ENGINE = MergeTree ORDER BY n")
    await server.tenant(empty, "INSERT INTO t SELECT number, repeat('x', 1000) FROM numbers(100000)")
    async with server.engine.dump(empty.name) as dump:
        async for chunk in dump.chunks():
            if chunk.startswith(b"D"):
                break
        with pytest.raises(EngineError, match="not read to its end"):
            dump.contents()
    async with asyncio.timeout(10):
        while await server.tenant(empty, "SELECT count() FROM system.processes") != "1":  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_dump_of_nothing(server: Server, empty: Target) -> None:
    """An empty database has a dump; a missing one is an error."""
    await restore(server.engine, empty, await dump_of(server.engine, empty.name))
    with pytest.raises(EngineError) as failure:
        await dump_of(server.engine, "db_missing")
    assert "db_missing does not exist" in cause_of(failure.value)


async def test_strange_engine(server: Server, empty: Target) -> None:
    """A table that a dump cannot take along is named, and not left out in silence."""
    await server.tenant(empty, "CREATE TABLE b (n UInt8) ENGINE = Buffer('', 't', 1, 1, 1, 1, 1, 1, 1)")
    with pytest.raises(EngineError, match="has the engine Buffer"):
        await dump_of(server.engine, empty.name)


async def test_damaged_dump(server: Server, empty: Target) -> None:
    """A dump that was cut short, has something behind its end, or is none at all, is refused."""
    await server.tenant(empty, "CREATE TABLE t (n UInt64, s String) ENGINE = MergeTree ORDER BY n")
    await server.tenant(empty, "INSERT INTO t SELECT number, toString(number) FROM numbers(10000)")
    dump = await dump_of(server.engine, empty.name)
    end = dump.index(b"E\x00")
    damaged = [b"", b"\x1f\x8b garbage" * 100, dump[:10], dump[:100], dump[: len(dump) // 2], dump[:end], dump + b"x"]
    stray = _MAGIC + _table("t", "CREATE TABLE t (n UInt8) ENGINE = Log") + b"D\0\0\0\1x"
    damaged += [stray, stray + _frame(b"E", {})]
    damaged.append(dump[: end - 500] + b"\xff" * 500 + dump[end:])
    for data in damaged:
        await server.tenant(empty, "DROP TABLE IF EXISTS t")
        with pytest.raises(EngineError) as failure:
            await restore(server.engine, empty, data)
        assert type(failure.value) is EngineError


_HOSTILE = (
    "DROP TABLE t",
    "CREATE TABLE x (n UInt8) ENGINE = File(CSV)",
    "CREATE TABLE x (n UInt8) ENGINE = URL('http://127.0.0.1/', CSV)",
    "CREATE TABLE x (n UInt8) ENGINE = MergeTree ORDER BY n AS SELECT n FROM {other}.secrets",
    "CREATE TABLE {other}.x (n UInt8) ENGINE = MergeTree ORDER BY n",
    "CREATE VIEW x AS SELECT * FROM {other}.secrets",
    "CREATE VIEW x AS SELECT * FROM file('/etc/passwd', LineAsString)",
    "CREATE MATERIALIZED VIEW x TO {other}.secrets AS SELECT n FROM t",
    "CREATE TABLE x (n UInt8) ENGINE = Log; DROP DATABASE {other}",
    "CREATE USER intruder",
    "GRANT SELECT ON {other}.* TO {name}",
)


async def test_hostile_dump(server: Server, empty: Target) -> None:
    """A dump whose statements reach beyond the database is refused, and does nothing there."""
    other = new_target()
    await server.engine.apply(other)
    await server.tenant(other, "CREATE TABLE secrets (n UInt8) ENGINE = MergeTree ORDER BY n")
    await server.tenant(other, "INSERT INTO secrets VALUES (7)")
    for statement in _HOSTILE:
        dump = _MAGIC + _table("t", "CREATE TABLE t (n UInt8) ENGINE = Log")
        dump += _table("x", statement.format(other=other.name, name=empty.name)) + _frame(b"E", {})
        with pytest.raises(EngineError):
            await restore(server.engine, empty, dump)
        await server.tenant(empty, "DROP TABLE IF EXISTS t")
        await server.tenant(empty, "DROP TABLE IF EXISTS x")
    assert await server.tenant(other, "SELECT n, (SELECT count() FROM system.tables) FROM secrets") == "7\t1"
    await server.engine.drop(other.name)


async def test_restore_needs_the_password(server: Server, empty: Target) -> None:
    """A restore is done as the tenant: without his password it is refused."""
    dump = _MAGIC + _table("t", "CREATE TABLE t (n UInt8) ENGINE = Log") + _frame(b"E", {})
    with pytest.raises(EngineError) as failure:
        await restore(server.engine, replace(empty, password="guess"), dump)
    assert "Authentication failed" in cause_of(failure.value)
    with pytest.raises(Wrong):
        await server.tenant(empty, "SELECT * FROM t")


def _table(name: str, statement: str) -> bytes:
    return _frame(b"T", {"name": name, "statement": statement, "columns": []})


def test_error_behind_rows() -> None:
    """An error that an older server appends to the rows is no row, however it is cut."""
    row = (5).to_bytes(8, "little") + b"\x03abc"
    for tail in (b"Code: 395. DB::Exception: " + b"x" * 100, b"\r\n__exception__\r\n" + b"x" * 100, row[:5]):
        rows = _Rows()
        taken = b"".join(rows.take(bytes([byte])) for byte in row + row + tail)
        assert taken == b"abcabc"
        with pytest.raises(EngineError):
            rows.total()
    assert json.loads(_frame(b"E", {"a": 1})[5:]) == {"a": 1}
