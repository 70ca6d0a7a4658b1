"""What the ClickHouse driver sends, held against ClickHouse's own parser and system tables, in chDB."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from controlplane.databases.engines import clickhouse
from controlplane.databases.engines.clickhouse_http import Session
from controlplane.databases.engines.engine import Target
from tests.databases.engines.clickhouse_server import Server, new_target


@pytest.fixture(scope="module")
async def server(folder: Path) -> AsyncIterator[Server]:
    """An embedded ClickHouse."""
    server = Server(folder / "clickhouse-sql")
    await server.start()
    yield server
    await server.stop()


async def test_statements(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every statement is one to ClickHouse's own parser, and none has a password in it."""
    sent: list[str] = []
    run = Session.run

    async def note(self: Session, sql: str, **parameters: Any) -> str:
        sent.append(sql)
        return await run(self, sql, **parameters)

    monkeypatch.setattr(Session, "run", note)
    target = new_target()
    await server.engine.apply(target)
    await server.engine.apply(replace(target, connections=1))
    await server.engine.apply(replace(target, login=False))
    await server.engine.observe(target.name)
    await server.engine.names("db_")
    await server.engine.contents(target.name)
    await server.engine.drop(target.name)
    reader = new_target()
    await server.engine.apply(reader)
    assert len([sql for sql in sent if sql]) > 15
    for sql in filter(None, list(sent)):
        assert target.password not in sql
        formatted = await server.tenant(reader, "SELECT formatQuerySingleLine({sql:String})", param_sql=_escaped(sql))
        assert formatted.split()[0] == sql.split()[0]
    await server.engine.drop(reader.name)


async def test_real_system_tables(tmp_path: Path) -> None:
    """What the driver reads is in the real system tables, and says of a user with our rights that all is well."""
    grants = {"default": "GRANT ALL ON *.*", "db_1": await _grant_of("db_1")}
    queries = [clickhouse._LOOK, clickhouse._OBSERVE, clickhouse._NAMES]  # noqa: SLF001
    answers = await _run_chdb(tmp_path, grants, ["CREATE DATABASE db_1", *queries])
    found = clickhouse._found(answers[1])  # noqa: SLF001
    observe, names = map(json.loads, answers[2:])
    # Only SQL users, which chDB lacks, have settings of their own.
    assert found.differences(_TARGET) == {"the connection limit", "the memory limit"}
    assert observe == {"databases": 1, "users": [1], "connections": 0, "size": None}
    assert names == {"name": "db_1"}


async def test_rights(tmp_path: Path) -> None:
    """With the rights that a tenant is granted, ClickHouse lets him do all in his database, and nothing in another."""
    await _run_chdb(
        tmp_path,
        {"default": "GRANT ALL ON *.*"},
        ["CREATE DATABASE db_1", "CREATE DATABASE db_2", "CREATE TABLE db_2.t (n UInt8) ENGINE = MergeTree ORDER BY n"],
    )
    allowed = [
        "CREATE TABLE db_1.t (n UInt8) ENGINE = MergeTree ORDER BY n",
        "INSERT INTO db_1.t VALUES (1)",
        "ALTER TABLE db_1.t ADD COLUMN s String",
        "ALTER TABLE db_1.t UPDATE s = 'x' WHERE n = 1 SETTINGS mutations_sync = 1",
        "CREATE VIEW db_1.v AS SELECT * FROM db_1.t",
        "CREATE MATERIALIZED VIEW db_1.m ENGINE = SummingMergeTree ORDER BY n AS SELECT n FROM db_1.t",
        "RENAME TABLE db_1.t TO db_1.u",
        "OPTIMIZE TABLE db_1.u FINAL",
        "TRUNCATE TABLE db_1.u",
        "DROP VIEW db_1.v",
        "DROP TABLE db_1.u",
        "CREATE TEMPORARY TABLE t (n UInt8)",
        "SELECT * FROM values('n UInt8', 1)",
    ]
    refused = [
        "SELECT * FROM db_2.t",
        "INSERT INTO db_2.t VALUES (1)",
        "CREATE TABLE db_2.u (n UInt8) ENGINE = MergeTree ORDER BY n",
        "CREATE TABLE db_1.u AS db_2.t",
        "CREATE VIEW db_1.v AS SELECT * FROM db_2.t",
        "CREATE MATERIALIZED VIEW db_1.w TO db_2.t AS SELECT n FROM db_1.m",
        "RENAME TABLE db_1.m TO db_2.m",
        "ALTER TABLE db_2.t DROP COLUMN n",
        "DROP TABLE db_2.t",
        "TRUNCATE TABLE db_2.t",
        "DESCRIBE TABLE db_2.t",
        "SHOW CREATE TABLE db_2.t",
        "SELECT * FROM loop('db_2', 't')",
        "CREATE DATABASE db_3",
        "DROP DATABASE db_1",
        "CREATE DICTIONARY db_1.d (n UInt64, v UInt8) PRIMARY KEY n SOURCE(NULL()) LAYOUT(FLAT())",
        "CREATE TABLE db_1.f (n UInt8) ENGINE = File(CSV)",
        "CREATE TABLE db_1.f (n UInt8) ENGINE = URL('http://127.0.0.1/', CSV)",
        "CREATE TABLE db_1.f (n UInt8) ENGINE = Distributed('c', 'db_2', 't')",
        "SELECT * FROM remote('127.0.0.1', db_2.t)",
        "SELECT * FROM system.users",
        "CREATE USER intruder",
        "BACKUP DATABASE db_1 TO File('/tmp/backup')",
        "SYSTEM SHUTDOWN",
    ]
    answers = await _run_chdb(tmp_path, {"default": await _grant_of("db_1")}, [*allowed, *refused, "SHOW DATABASES"])
    failed = [(sql, answer) for sql, answer in zip(allowed, answers, strict=False) if answer.startswith("Code: ")]
    assert failed == []
    done = [
        (sql, answer)
        for sql, answer in zip(refused, answers[len(allowed) :], strict=False)
        if "Code: 497" not in answer
    ]
    assert done == []
    assert answers[-1] == "db_1"


_TARGET = Target(name="db_1", password="", connections=5, memory_mb=512, storage_gb=1)


async def _grant_of(name: str) -> str:
    """Return the statement by which the driver gives a user his rights, as ClickHouse's configuration has it."""
    sent: list[str] = []

    class Recorder(Session):
        async def run(self, sql: str, **_: Any) -> str:
            sent.append(sql)
            return ""

    await clickhouse._grant(Recorder(None), replace(_TARGET, name=name))  # type: ignore[arg-type]  # noqa: SLF001
    return sent[0].removesuffix(f" TO {name}")


async def _run_chdb(folder: Path, grants: dict[str, str], queries: list[str]) -> list[str]:
    """Run queries as the user `default` in a process of their own; return each answer or error in one line."""
    users = "".join(
        f"<{user}><password_sha256_hex>{sha256().hexdigest()}</password_sha256_hex><networks><ip>::/0</ip></networks>"
        f"<default_database>{user}</default_database><grants><query>{grant}</query></grants></{user}>"
        for user, grant in grants.items()
    )
    improvements = "<select_from_system_db_requires_grant>1</select_from_system_db_requires_grant>"
    files = {
        "users.xml": f"<profiles><default/></profiles><quotas><default/></quotas><users>{users}</users>",
        "config.xml": f"<users_config>{folder}/users.xml</users_config>"
        f"<access_control_improvements>{improvements}</access_control_improvements>",
    }
    for name, text in files.items():
        await asyncio.to_thread((folder / name).write_text, f"<clickhouse>{text}</clickhouse>")
    script = [sys.executable, "-c", _SCRIPT, *queries]
    done = await asyncio.to_thread(subprocess.run, script, cwd=folder, check=True, capture_output=True)
    answers: list[str] = json.loads(done.stdout)
    return answers


_SCRIPT = """
import json, sys
from chdb.session import Session
session = Session("data?config-file=config.xml")
answers = []
for query in sys.argv[1:]:
    try:
        answers.append(str(session.query(query, "TSV", params={"name": "db_1", "prefix": "db_"})).strip())
    except Exception as error:
        answers.append(str(error))
print(json.dumps(answers))
"""


def _escaped(value: str) -> str:
    """Write a query parameter as ClickHouse reads it."""
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")
