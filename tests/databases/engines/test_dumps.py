"""Dumps of the PostgreSQL driver, and what is said to be in them: all of it, as of one moment."""

import asyncio
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import asyncpg
import pytest

from controlplane.databases.engines.engine import ClusterUnavailable, EngineError, Table, Target
from controlplane.databases.engines.postgresql import PostgreSQL
from tests.databases.engines.cluster import BIN_DIR, EVERYTHING, WAITING, Cluster, is_alone, new_target, programs
from tests.stack import eventually

ROWS = {
    '"My Schema"."Table; DROP"': 1,
    "pg_largeobject": 2,
    "public.child": 1,
    "public.forced": 1,
    "public.held": 0,
    "public.many": 20000,
    "public.measured_2023": 1,
    "public.measured_rest": 2,
    "public.no_columns": 1,
    "public.parent": 1,
    "public.scratch": 0,
    "public.types": 2,
}
OBJECTS = """
SELECT pg_describe_object('pg_class'::regclass, oid, 0), CASE WHEN relkind = 'i' THEN pg_get_indexdef(oid) END,
  CASE WHEN relkind IN ('v', 'm') THEN pg_get_viewdef(oid) END, obj_description(oid)
  FROM pg_class WHERE relnamespace::regnamespace::text !~ '^(pg_|information)'
UNION ALL SELECT conname, pg_get_constraintdef(oid), conrelid::regclass::text, NULL FROM pg_constraint
  WHERE connamespace::regnamespace::text !~ '^(pg_|information)'
UNION ALL SELECT tgname, pg_get_triggerdef(oid), NULL, NULL FROM pg_trigger WHERE NOT tgisinternal
UNION ALL SELECT extname, extversion, NULL, NULL FROM pg_extension
UNION ALL SELECT sequencename, schemaname, last_value::text, increment_by::text FROM pg_sequences
UNION ALL SELECT polname, NULL, NULL, NULL FROM pg_policy UNION ALL SELECT pubname, NULL, NULL, NULL FROM pg_publication
UNION ALL SELECT oid::regprocedure::text, prosrc, NULL, NULL FROM pg_proc WHERE pronamespace = 'public'::regnamespace
ORDER BY 1, 2, 3, 4
"""

LOCKED = (
    "SELECT count(*) > 0 FROM pg_locks l JOIN pg_database d ON d.oid = l.database"
    " WHERE datname = $1 AND locktype = 'relation' AND mode = 'AccessShareLock' AND relation >= 16384"
)


async def test_dump_and_restore(cluster: Cluster, target: Target, other: Target) -> None:
    """What was dumped while the tenant was locked out is restored as another tenant, with equal contents."""
    await cluster.run(target, EVERYTHING.read_text())
    owner = await cluster.tenant(target)
    objects = await owner.fetch(OBJECTS)
    await cluster.engine.apply(replace(target, login=False))
    owner.terminate()

    dump, contents = await cluster.dump(target)
    await cluster.restore(other, dump)

    assert {name: table.rows for name, table in contents.tables.items()} == ROWS
    assert await cluster.engine.contents(target.name) == contents
    assert await cluster.engine.contents(other.name) == contents
    tenant = await cluster.tenant(other)
    assert await tenant.fetch(OBJECTS) == objects
    assert await tenant.fetchval("SELECT lo_get(4712, 9990, 100)") == bytes(10) + b"after a hole"
    assert await tenant.fetchval("SELECT tableowner FROM pg_tables WHERE tablename = 'types'") == other.name
    assert await tenant.fetchval("INSERT INTO types DEFAULT VALUES RETURNING text || id") == "stamped3"
    await tenant.close()


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        ("UPDATE types SET float8 = 0.3 WHERE id = 1", "public.types"),
        ("UPDATE types SET cite = '' WHERE id = 2", "public.types"),
        ("DELETE FROM many WHERE n = 7", "public.many"),
        ("UPDATE many SET hash = n::text WHERE n = 8", "public.many"),
        ("UPDATE child SET a = 2, b = 1", "public.child"),
        ("ALTER TABLE measured_rest RENAME TO later", "public.measured_rest"),
        ("SELECT lo_put(4711, 0, 'L')", "pg_largeobject"),
        ("SELECT lo_create(4713)", "pg_largeobject"),
    ],
)
async def test_contents_differ(cluster: Cluster, everything: Target, change: str, changed: str) -> None:
    """Whatever changes, the contents of that table differ and of no other."""
    before = await cluster.engine.contents(everything.name)
    await cluster.run(everything, change)
    after = await cluster.engine.contents(everything.name)
    assert [name for name, table in before.tables.items() if after.tables.get(name) != table] == [changed]


async def test_settings_of_the_owner(cluster: Cluster, everything: Target, tmp_path: Path) -> None:
    """What the owner sets for his database does not change how its contents look, nor end a dump."""
    before = await cluster.engine.contents(everything.name)
    settings = (
        "timezone = 'Asia/Tokyo'",
        "datestyle = 'SQL, DMY'",
        "intervalstyle = 'iso_8601'",
        "bytea_output = escape",
        "extra_float_digits = 0",
        "lc_monetary = 'C.UTF-8'",
        "search_path = 'My Schema'",
        f"role = '{everything.name}'",
        "statement_timeout = '1s'",
        "idle_in_transaction_session_timeout = '1s'",
        "transaction_timeout = '1s'",
        "lock_timeout = 1",
        "default_transaction_isolation = serializable",
    )
    await cluster.run(everything, ";".join(f"ALTER DATABASE {everything.name} SET {setting}" for setting in settings))
    assert await cluster.engine.contents(everything.name) == before
    async with _before_pg_dump(cluster, tmp_path, "sleep 1.5").dump(everything.name) as dump:
        assert [piece async for piece in dump.chunks()]
        assert dump.contents() == before
    owner = await cluster.admin(everything.name)
    await owner.execute(f"ALTER DATABASE {everything.name} RESET ALL")
    await owner.close()


async def test_dump_under_load(cluster: Cluster, target: Target, other: Target) -> None:
    """A dump of what is being written is of one moment, and restored it has the contents that it told."""
    tenant = await cluster.tenant(target)
    await tenant.execute("CREATE TABLE one (n int); CREATE TABLE two (n int)")
    await tenant.execute("INSERT INTO one SELECT generate_series(1, 50000); INSERT INTO two TABLE one")

    async def write() -> None:
        for n in range(50_001, 1_000_000):
            async with tenant.transaction():
                await tenant.execute("INSERT INTO one VALUES ($1)", n)
                await tenant.execute("INSERT INTO two VALUES ($1)", n)

    writer = asyncio.create_task(write())
    dump, contents = await cluster.dump(target)
    now = await cluster.engine.contents(target.name)
    writer.cancel()
    with suppress(asyncio.CancelledError):
        await writer
    tenant.terminate()

    await cluster.restore(other, dump)

    assert contents.tables["public.one"] == contents.tables["public.two"]
    assert 50_000 <= contents.tables["public.one"].rows < now.tables["public.one"].rows
    assert await cluster.engine.contents(other.name) == contents


async def test_truncate_meanwhile(cluster: Cluster, admin: asyncpg.Connection, large: Target) -> None:
    """Whoever empties or alters a table while it is dumped waits, and the dump has all its rows."""
    tenant = await cluster.tenant(large)
    async with cluster.engine.dump(large.name) as dump:
        chunks = aiter(dump.chunks())
        first = await anext(chunks)
        truncate = asyncio.create_task(tenant.execute("TRUNCATE large"))
        await eventually(lambda: admin.fetchval(WAITING, large.name))
        rest = [piece async for piece in chunks]
        assert not truncate.done()
        contents = dump.contents()
    await truncate
    await tenant.close()
    assert max(map(len, [first, *rest])) <= 2**20
    assert len(rest) > 10
    assert contents.tables["public.large"].rows == 30_000
    assert (await cluster.engine.contents(large.name)).tables["public.large"] == Table(rows=0, checksum="0")


async def test_alter_before(
    cluster: Cluster, admin: asyncpg.Connection, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever wants to change a table that we have locked, but not yet pg_dump, soon may, and the dump fails."""
    monkeypatch.setattr("controlplane.databases.engines.postgresql_dump._LOCK_TIMEOUT", 0.5)
    engine = _before_pg_dump(cluster, tmp_path, f"while [ ! -e {tmp_path}/go ]; do sleep 0.05; done")
    tenant = await cluster.tenant(target)
    await tenant.execute("CREATE TABLE whole (n int) PARTITION BY RANGE (n)")
    with pytest.raises(ClusterUnavailable):  # noqa: PT012
        async with asyncio.timeout(30), engine.dump(target.name) as dump:
            first = asyncio.ensure_future(anext(aiter(dump.chunks())))
            await eventually(lambda: admin.fetchval(LOCKED, target.name))
            truncate = asyncio.create_task(tenant.execute("TRUNCATE whole"))
            await eventually(lambda: admin.fetchval(WAITING, target.name))
            (tmp_path / "go").touch()
            await first
    await truncate
    await tenant.close()


async def test_no_code_runs_as_admin(cluster: Cluster, target: Target) -> None:
    """Casts, operators and functions that a tenant made are not used to count what he has."""
    tenant = await cluster.tenant(target)
    await tenant.execute("CREATE TYPE trap AS (n int); CREATE TABLE notes (n int, trap trap); CREATE TABLE r (r int)")
    await tenant.execute("INSERT INTO notes VALUES (1, '(1)')")
    for function, result in (
        ("text_of(notes)", "text"),
        ("text_of(trap)", "text"),
        ("json_of(trap)", "json"),
        ("format(text, record)", "text"),
        ("hashtextextended(text, int)", "bigint"),
        ("count()", "bigint"),
    ):
        body = f"CREATE FUNCTION {function} RETURNS {result} LANGUAGE plpgsql AS $$BEGIN RAISE 'ran'; END$$"
        await tenant.execute(body)
    await tenant.execute("CREATE CAST (notes AS text) WITH FUNCTION text_of(notes)")
    await tenant.execute("CREATE CAST (trap AS text) WITH FUNCTION text_of(trap)")
    await tenant.execute("CREATE CAST (trap AS json) WITH FUNCTION json_of(trap)")
    await tenant.execute(f"ALTER DATABASE {target.name} SET search_path = public, pg_catalog")
    await tenant.close()
    assert (await cluster.engine.contents(target.name)).tables["public.notes"].rows == 1
    assert (await cluster.dump(target))[1].tables["public.notes"].rows == 1


async def test_table_becomes_a_view(cluster: Cluster, admin: asyncpg.Connection, target: Target) -> None:
    """A view that takes a table's place just before it is read is not read, as its functions would run as the admin."""
    tenant = await cluster.tenant(target)
    await tenant.execute("CREATE TABLE notes (n int)")
    await tenant.execute("CREATE FUNCTION trap() RETURNS int LANGUAGE plpgsql AS $$BEGIN RAISE 'trapped'; END$$")
    await tenant.execute("BEGIN; DROP TABLE notes; CREATE VIEW notes AS SELECT trap() AS n")
    contents = asyncio.create_task(cluster.engine.contents(target.name))
    await eventually(lambda: admin.fetchval(WAITING, target.name))
    await tenant.execute("COMMIT")
    with pytest.raises(EngineError) as refused:
        await contents
    assert "is restricted" in str(refused.value.__cause__)
    await tenant.close()


async def test_table_is_dropped(cluster: Cluster, admin: asyncpg.Connection, target: Target) -> None:
    """A table that is dropped between our finding and our reading it is a reason to try again."""
    tenant = await cluster.tenant(target)
    await tenant.execute("CREATE TABLE notes (n int)")
    await tenant.execute("BEGIN; DROP TABLE notes")
    contents = asyncio.create_task(cluster.engine.contents(target.name))
    await eventually(lambda: admin.fetchval(WAITING, target.name))
    await tenant.execute("COMMIT")
    with pytest.raises(ClusterUnavailable):
        await contents
    await tenant.close()


async def test_cancelled_dump(cluster: Cluster, admin: asyncpg.Connection, target: Target) -> None:
    """A dump that is cancelled while it waits for a lock ends its sessions."""
    tenant = await cluster.tenant(target)
    await tenant.execute("CREATE TABLE notes (n int)")
    await tenant.execute("BEGIN; LOCK TABLE notes")
    dump = asyncio.create_task(cluster.dump(target))
    await eventually(lambda: admin.fetchval(WAITING, target.name))
    dump.cancel()
    with pytest.raises(asyncio.CancelledError):
        await dump
    assert not programs()
    await eventually(lambda: is_alone(admin, target, but=1))
    await tenant.close()


async def test_abandoned_dump(cluster: Cluster, admin: asyncpg.Connection, large: Target) -> None:
    """A dump that is not read to its end is ended, and the reader's own error stays what it was."""
    for error in (OSError("disk full"), asyncpg.PostgresError("mine"), asyncio.CancelledError()):
        with pytest.raises(type(error)) as raised:  # noqa: PT012
            async with cluster.engine.dump(large.name) as dump:
                chunks = dump.chunks()
                await anext(chunks)
                assert programs() == {"pg_dump"}
                raise error
        assert raised.value is error
        assert not programs()
        await eventually(lambda: is_alone(admin, large))


async def test_missing_database(cluster: Cluster) -> None:
    """A database that is not there is neither dumped nor counted."""
    for action in (cluster.dump(new_target()), cluster.engine.contents(new_target().name)):
        with pytest.raises(EngineError) as failure:
            await action
        assert type(failure.value) is EngineError
        assert isinstance(failure.value.__cause__, asyncpg.InvalidCatalogNameError)


async def test_failing_program(cluster: Cluster, target: Target, tmp_path: Path) -> None:
    """When pg_dump fails or is not there the customer reads a sentence, the log what happened."""
    nothing = PostgreSQL(admin_dsn=cluster.admin_dsn, host="db", port=1, bin_dir=tmp_path / "none")
    failing = _before_pg_dump(cluster, tmp_path, "echo 'pg_dump: error: no luck' >&2; exit 1")
    for engine, cause in ((nothing, "none/pg_dump"), (failing, "no luck")):
        with pytest.raises(EngineError, match=r"could not be dumped|do not start") as failure:  # noqa: PT012
            async with engine.dump(target.name) as dump:
                async for _ in dump.chunks():
                    pass
        assert type(failure.value) is EngineError
        assert cause in str(failure.value.__cause__)


def _before_pg_dump(cluster: Cluster, folder: Path, command: str) -> PostgreSQL:
    """Return a driver which runs this command before pg_dump."""
    program = folder / "pg_dump"
    program.write_text(f'#!/bin/sh\n{command}\nexec {BIN_DIR}/pg_dump "$@"\n')
    program.chmod(0o700)
    return PostgreSQL(admin_dsn=cluster.admin_dsn, host="db", port=1, bin_dir=folder)
