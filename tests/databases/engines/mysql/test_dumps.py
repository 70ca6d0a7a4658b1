"""Dumps of the MySQL driver: whole, of one moment, and harmless."""

# ruff: noqa: S608 - the statements are made of names of ours

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pymysql
import pytest

from controlplane.databases.engines.engine import ClusterUnavailable, EngineError, Target
from tests.databases.engines.mysql.cluster import Cluster, Session, as_dump, dumped, pieces, run
from tests.stack import eventually

# Each is a statement; together they have something of all that a dump must carry.
_EVERYTHING = r"""
CREATE SEQUENCE numbers START WITH 5
SELECT NEXTVAL(numbers)
CREATE TABLE `odd ``name` (i INT AUTO_INCREMENT PRIMARY KEY, t TINYINT UNSIGNED, b BIGINT UNSIGNED, d DECIMAL(30,10),
  f FLOAT, o DOUBLE, bits BIT(9), y YEAR, flag BOOLEAN, UNIQUE KEY u (t, y)) COMMENT 'it''s; \n x'
INSERT INTO `odd ``name` VALUES (0, 255, 18446744073709551615, 12345678901234567890.0123456789, 16777217, 0.1e-300,
  b'101010101', 2026, TRUE), (1, NULL, NULL, NULL, 3.14159265, -1.5, NULL, NULL, NULL)
CREATE TABLE a_child (n INT, CONSTRAINT fk FOREIGN KEY (n) REFERENCES `odd ``name` (i) ON DELETE CASCADE)
INSERT INTO a_child VALUES (0), (0), (NULL)
CREATE TABLE times (d DATE, t TIME(6), m DATETIME(6), s TIMESTAMP(3) NULL, KEY (d))
INSERT INTO times VALUES ('2026-02-28', '-838:59:59.5', '9999-12-31 23:59:59.999999', '2026-01-01 00:00:00.123'),
  ('0000-00-00', NULL, '2020-02-31 00:00:00', NULL)
CREATE TABLE texts (l CHAR(5) CHARACTER SET latin1, v VARCHAR(99) COLLATE utf8mb4_bin, x LONGTEXT,
  e ENUM('a','b''c','ü'), s SET('x','y'), j JSON, u UUID, ip INET6, FULLTEXT KEY words (x), KEY (v(10)))
INSERT INTO texts VALUES ('üé', '日本語 🎉 '' \\ " \0 \r\n', 'lo\nng;\nDELIMITER ;;', 'ü', 'x,y', '{"a": [1, "é"]}',
  '123e4567-e89b-12d3-a456-426655440000', 'fe80::1'), ('', '', '', '', '', NULL, NULL, NULL)
CREATE TABLE bytes (b BINARY(4), v VARBINARY(50), l LONGBLOB, g GEOMETRY, p POINT NOT NULL, SPATIAL KEY (p))
INSERT INTO bytes VALUES (x'00ff2700', x'0d0a5c27', x'000102', ST_GeomFromText('POINT(1 2)', 4326), POINT(3, 4)),
  (NULL, '', NULL, ST_GeomFromText('POLYGON((0 0,1 0,1 1,0 0))'), POINT(5, 6))
CREATE TABLE large (i INT PRIMARY KEY, b LONGBLOB, t LONGTEXT)
INSERT INTO large SELECT 1, REPEAT(x'00ff27', 4000000), REPEAT('é🎉', 2000000)
INSERT INTO large VALUES (2, NULL, '')
CREATE TABLE generated (n INT, v INT AS (n + 1) VIRTUAL, s INT AS (n * 2) STORED, c INT DEFAULT NEXTVAL(numbers),
  CHECK (n > 0)) PARTITION BY HASH (n) PARTITIONS 3
INSERT INTO generated (n) VALUES (1), (2)
CREATE TABLE empty (n INT)
CREATE FUNCTION plus_one(x INT) RETURNS INT DETERMINISTIC RETURN x + 1 /* ; ;; */
SET sql_mode = 'ANSI_QUOTES,PIPES_AS_CONCAT'
CREATE PROCEDURE greet() BEGIN SELECT "n" FROM "empty"; SELECT 'a' || 'b'; END
SET sql_mode = ''
CREATE TRIGGER first_of_all BEFORE INSERT ON a_child FOR EACH ROW SET NEW.n = plus_one(NEW.n)
CREATE VIEW z AS SELECT plus_one(n) AS x, 'it\'s' AS y FROM a_child
CREATE VIEW a AS SELECT x, y AS `why ``not` FROM z
CREATE TABLE gone (g INT)
CREATE VIEW broken AS SELECT g FROM gone
DROP TABLE gone
"""


def _fill(tenant: Session) -> None:
    statements = re.sub(r"\n  ", " ", _EVERYTHING).strip().split("\n")
    run(tenant, "SET sql_mode = 'ALLOW_INVALID_DATES,NO_AUTO_VALUE_ON_ZERO'", *statements)


def _definitions(session: Session, name: str) -> dict[str, str]:
    """Return the SQL of all that is in the database, without the names of database and user."""
    found = {}
    for (table,) in run(session, "SHOW TABLES"):
        if table != "broken":
            found[table] = run(session, f"SHOW CREATE TABLE `{table.replace('`', '``')}`")[0][1]
    for kind, program in (("FUNCTION", "plus_one"), ("PROCEDURE", "greet"), ("TRIGGER", "first_of_all")):
        found[program] = str(run(session, f"SHOW CREATE {kind} {program}")[0][:6])
    return {key: sql.replace(name, "") for key, sql in found.items()}


async def test_dump(cluster: Cluster, target: Target, other: Target) -> None:
    """A dump restores into another tenant's database to the same rows, types, indexes, views and routines."""
    with cluster.tenant(target) as source, cluster.tenant(other) as copy:
        _fill(source)
        data, contents = await dumped(cluster.engine, target.name)
        assert contents == await cluster.engine.contents(target.name)
        assert contents.tables["a_child"].rows == 3
        assert contents.tables["empty"].rows == 0

        await cluster.engine.restore(other.name, other.password, pieces(data, 100_001))

        assert await cluster.engine.contents(other.name) == contents
        assert _definitions(copy, other.name) == _definitions(source, target.name)
        assert run(copy, "SELECT x, `why ``not` FROM a ORDER BY x") == [(None, "it's"), (1, "it's"), (1, "it's")]
        assert run(copy, "CALL greet()") == []
        assert run(copy, "INSERT INTO a_child VALUES (0)", "SELECT MAX(n) FROM a_child") == [(1,)]
        assert run(copy, "SELECT NEXTVAL(numbers) > 5") == [(1,)]
        assert run(copy, "SELECT f + 0e0 FROM `odd ``name` ORDER BY i") == [(16777216.0,), (3.1415927410125732,)]
        assert target.name.encode() not in data


async def test_dump_without_login(cluster: Cluster, target: Target) -> None:
    """A database whose tenant is locked out can be dumped."""
    with cluster.tenant(target) as tenant:
        run(tenant, "CREATE TABLE notes AS SELECT 1 AS n")
    await cluster.engine.apply(replace(target, login=False))
    assert (await dumped(cluster.engine, target.name))[1].tables["notes"].rows == 1


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE notes SET f = 16777218 WHERE f > 16777216",
        "UPDATE notes SET t = NULL WHERE t = ''",
        "UPDATE notes SET t = 'A' WHERE t = 'a'",
        "INSERT INTO notes SELECT * FROM notes",
        "DELETE FROM notes LIMIT 1",
        "UPDATE notes SET t = u, u = t WHERE n = 3",
        "ALTER TABLE notes RENAME TO n0tes",
    ],
)
async def test_contents(cluster: Cluster, target: Target, change: str) -> None:
    """Contents differ when a value does, or the number of equal rows; not by the order of rows."""
    rows = ["(1, 16777220, 'a', '')", "(2, 0, '', 'a')", "(3, 0, 'x', 'y')", "(3, 0, 'x', 'y')"]
    create = "CREATE TABLE notes (n INT, f FLOAT, t TEXT, u TEXT)"
    with cluster.tenant(target) as tenant:
        run(tenant, create, f"INSERT INTO notes VALUES {', '.join(rows)}")
        before = await cluster.engine.contents(target.name)
        run(tenant, "DROP TABLE notes", create, f"INSERT INTO notes VALUES {', '.join(reversed(rows))}")
        assert await cluster.engine.contents(target.name) == before
        run(tenant, change)
        assert await cluster.engine.contents(target.name) != before


async def test_dump_of_what_is_not_there(cluster: Cluster) -> None:
    """A dump of no database fails, and says why in its cause."""
    with pytest.raises(EngineError) as failure:
        await dumped(cluster.engine, "db_missing")
    assert type(failure.value) is EngineError
    assert "Unknown database" in str(failure.value.__cause__)


async def test_dump_while_written(cluster: Cluster, target: Target, other: Target) -> None:
    """A dump of tables that are written to is of one moment: no transaction is in it by half."""
    with cluster.tenant(target) as tenant:
        run(tenant, "CREATE TABLE a (n INT, pad TEXT)", "CREATE TABLE z (n INT, pad TEXT)")
        run(tenant, "INSERT INTO a SELECT seq, REPEAT('x', 500) FROM seq_1_to_20000", "INSERT INTO z SELECT * FROM a")
    stop = asyncio.Event()

    def write() -> int:
        with cluster.tenant(target) as writer:
            written = 0
            while not stop.is_set():
                for table in "az":
                    run(writer, *(["BEGIN"] if table == "a" else []), f"INSERT INTO {table} VALUES ({written}, 'x')")
                run(writer, "COMMIT")
                written += 1
            return written

    writing = asyncio.create_task(asyncio.to_thread(write))
    data, contents = await dumped(cluster.engine, target.name)
    stop.set()
    written = await writing

    assert contents.tables["a"].rows == contents.tables["z"].rows < 20000 + written
    await cluster.engine.restore(other.name, other.password, pieces(data, 100_000))
    assert await cluster.engine.contents(other.name) == contents


async def test_chunks(cluster: Cluster, target: Target) -> None:
    """A dump comes in pieces of at most a megabyte, and tells nothing of its contents before its end."""
    with cluster.tenant(target) as tenant:
        run(tenant, "CREATE TABLE notes AS SELECT REPEAT('x', 900000) AS text FROM seq_1_to_10")
    async with cluster.engine.dump(target.name) as dump:
        async for chunk in dump.chunks():
            assert 0 < len(chunk) <= 1 << 20
            with pytest.raises(ValueError, match="not read to its end"):
                dump.contents()
            break


async def test_dump_that_is_left(cluster: Cluster, admin: Session, target: Target) -> None:
    """Leaving a dump half read ends its program, and its session on the cluster."""
    with cluster.tenant(target) as tenant:
        run(tenant, "CREATE TABLE notes AS SELECT REPEAT('x', 60000) AS text FROM seq_1_to_500")
    sessions = f"SELECT COUNT(*) FROM information_schema.processlist WHERE db = '{target.name}'"
    async with cluster.engine.dump(target.name) as dump:
        async for _ in dump.chunks():
            break
        assert run(admin, sessions) == [(1,)]
        assert _programs() == 1
    assert _programs() == 0

    async def is_gone() -> bool:
        return run(admin, sessions) == [(0,)]

    await eventually(is_gone)


def _programs() -> int:
    """Count our child processes that make or read a dump."""
    children = [file.read_text().split() for file in Path("/proc/self/task").glob("*/children")]
    commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pids in children for pid in pids]
    return sum(b"mysql_dump_program.py" in command for command in commands)


async def test_finished_table(cluster: Cluster, target: Target) -> None:
    """A table that was dumped can be altered at once, while the dump goes on."""
    with cluster.tenant(target) as tenant:
        run(tenant, "CREATE TABLE a (n INT)", "CREATE TABLE z AS SELECT REPEAT('x', 60000) AS t FROM seq_1_to_500")
        async with cluster.engine.dump(target.name) as dump:
            chunks = dump.chunks()
            await anext(chunks)
            run(tenant, "SET lock_wait_timeout = 2", "ALTER TABLE a ADD m INT")
            await _read(chunks)
            assert dump.contents().tables["z"].rows == 500


async def test_altered_table(cluster: Cluster, target: Target) -> None:
    """A table that is dropped while others are being dumped makes it fail for now, not for good."""
    with cluster.tenant(target) as tenant:
        run(tenant, "CREATE TABLE a AS SELECT REPEAT('x', 60000) AS text FROM seq_1_to_500", "CREATE TABLE z (n INT)")
        async with cluster.engine.dump(target.name) as dump:
            chunks = dump.chunks()
            await anext(chunks)
            run(tenant, "DROP TABLE z")
            with pytest.raises(ClusterUnavailable):
                await _read(chunks)


async def _read(chunks: AsyncIterator[bytes]) -> None:
    async for _ in chunks:
        pass


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO {other}.secrets VALUES (2)",
        "SELECT * FROM {other}.secrets",
        "CREATE VIEW v AS SELECT * FROM {other}.secrets",
        "DROP DATABASE {other}",
        "USE mysql",
        "CREATE USER mine",
        "GRANT ALL ON *.* TO {own}",
        "SET GLOBAL max_connections = 1",
        "CREATE DEFINER = root@localhost PROCEDURE p() SELECT 1",
        "CREATE DEFINER = root@localhost SQL SECURITY DEFINER VIEW v AS SELECT * FROM mysql.global_priv",
        "CREATE EVENT e ON SCHEDULE EVERY 1 SECOND DO DELETE FROM x",
        "LOAD DATA LOCAL INFILE '/etc/hostname' INTO TABLE notes",
        "LOAD DATA INFILE '/etc/hostname' INTO TABLE notes",
        "SELECT 'x' INTO OUTFILE '{file}'",
        "\\! touch {file}",
        "system touch {file}",
        "source {file}",
        "\\. {file}",
        "tee {file}",
        "DO 1; DROP TABLE notes",
        "SELECT REPEAT('x', 1000000) FROM seq_1_to_1000000",
        "KILL CONNECTION_ID()",
        "no SQL at all",
    ],
)
async def test_hostile_dump(cluster: Cluster, target: Target, other: Target, tmp_path: Path, statement: str) -> None:
    """What a tenant may not do, his dump cannot, nor is anything in it for us to obey."""
    file = tmp_path / "file"
    hostile = statement.format(other=other.name, own=target.name, file=file)
    with cluster.tenant(other) as victim:
        run(victim, "CREATE TABLE secrets AS SELECT 1 AS n")
        dump = pieces(as_dump("CREATE TABLE notes (t TEXT)", hostile, "DO 1"))
        with pytest.raises(EngineError):
            await asyncio.wait_for(cluster.engine.restore(target.name, target.password, dump), 20)
        assert run(victim, "SELECT * FROM secrets") == [(1,)]
    with cluster.tenant(target) as tenant:
        assert run(tenant, "SELECT * FROM notes") == []
        assert await cluster.engine.apply(target) == ()
    assert not file.exists()


async def test_broken_dump(cluster: Cluster, target: Target) -> None:
    """Garbage, nothing, and a dump that lacks its end, be it a byte, are refused."""
    good = as_dump("CREATE TABLE notes (n INT)", "DROP TABLE notes")
    await cluster.engine.restore(target.name, target.password, pieces(good, 7))
    for bad in (b"", b"PGDMP", b"DELIMITER ;\n", b"\0" * 3_000_000, good[:-1], good[: len(good) // 2], good + b"x"):
        with pytest.raises(EngineError) as failure:
            await cluster.engine.restore(target.name, target.password, pieces(bad, 100_000))
        assert type(failure.value) is EngineError
        with cluster.tenant(target) as tenant:
            run(tenant, "DROP TABLE IF EXISTS notes")


async def test_endless_statement(cluster: Cluster, target: Target) -> None:
    """A statement without an end is refused before it fills the memory, and its reading stops."""
    given = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal given
        yield b"DELIMITER ;;0123456789ab\n"
        while True:
            given += 1
            yield b"x" * 1_000_000

    with pytest.raises(EngineError) as failure:
        await asyncio.wait_for(cluster.engine.restore(target.name, target.password, endless()), 30)
    assert "longer than the server takes" in str(failure.value.__cause__)
    assert given < 40


async def test_restore_without_rights(cluster: Cluster, target: Target) -> None:
    """A restore is the tenant's doing: with another password it is refused, and the password is in no sentence."""
    with pytest.raises(EngineError) as failure:
        await cluster.engine.restore(target.name, "gu3ss", pieces(as_dump("DO 1")))
    assert "Access denied" in str(failure.value.__cause__)
    assert "gu3ss" not in str(failure.value.__cause__)
    with pytest.raises(pymysql.Error):
        cluster.tenant(replace(target, password="gu3ss"))
