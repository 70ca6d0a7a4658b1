"""The PostgreSQL driver against a real cluster."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Any

import asyncpg
import pytest

from controlplane.databases.engines.engine import Busy, ClusterUnavailable, EngineError, Missing, Target
from controlplane.databases.engines.postgresql import PostgreSQL
from tests.databases.engines.cluster import BIN_DIR, Cluster, Cut, new_target, pieces
from tests.stack import eventually


async def test_use(cluster: Cluster) -> None:
    """A new database is reported as one; its tenant gets in with his URI, and creates tables and schemas."""
    target = new_target()
    assert await cluster.engine.apply(target) == ("the database",)
    tenant = await cluster.tenant(target)
    await tenant.execute("CREATE TABLE notes (text text); INSERT INTO notes VALUES ('é'); CREATE SCHEMA more")
    await tenant.execute("CREATE TEMP TABLE scratch (n int)")
    assert await tenant.fetchval("SELECT text FROM notes") == "é"
    seen = await cluster.engine.observe(target.name)
    assert seen is not None
    assert (seen.login, seen.connections) == (True, 1)
    assert 5_000_000 < seen.size_bytes < 20_000_000
    await tenant.close()
    await cluster.engine.drop(target.name)


async def test_apply_twice(cluster: Cluster, admin: asyncpg.Connection, target: Target) -> None:
    """A second apply changes nothing, not even the stored verifier or the rights' rows, and reports nothing."""
    state = (
        "SELECT rolpassword, a.xmin::text AS role, d.xmin::text AS database"
        " FROM pg_authid a JOIN pg_database d ON datname = rolname WHERE rolname = $1"
    )
    before = await admin.fetchrow(state, target.name)
    assert await cluster.engine.apply(target) == ()
    assert await admin.fetchrow(state, target.name) == before


@pytest.mark.parametrize(
    ("tampering", "differed"),
    [
        ("ALTER ROLE {name} CONNECTION LIMIT 100", ("the connection limit",)),
        ("ALTER ROLE {name} SUPERUSER CREATEDB CREATEROLE REPLICATION BYPASSRLS", ("the user's rights",)),
        ("GRANT pg_execute_server_program TO {name}", ("the user's rights",)),
        ("CREATE ROLE guest LOGIN; GRANT {name} TO guest WITH ADMIN OPTION", ("the user's rights",)),
        ("ALTER ROLE {name} NOLOGIN", ("whether it can be logged in to",)),
        ("ALTER ROLE {name} PASSWORD 'other'", ("the password",)),
        ("ALTER ROLE {name} PASSWORD NULL", ("the password",)),
        (
            f"ALTER ROLE {{name}} PASSWORD 'SCRAM-SHA-256$4096:c2FsdA==${'A' * 43}=:{'A' * 43}='",
            ("the password",),
        ),
        ("ALTER ROLE {name} VALID UNTIL 'yesterday'", ("the password's end",)),
        ("ALTER ROLE {name} RESET temp_file_limit", ("the limit of temporary files",)),
        ("ALTER ROLE {name} SET temp_file_limit = -1", ("the limit of temporary files",)),
        ("ALTER DATABASE {name} OWNER TO CURRENT_USER", ("the owner",)),
        ("ALTER DATABASE {name} CONNECTION LIMIT 0", ("who may connect",)),
        ("ALTER DATABASE {name} ALLOW_CONNECTIONS false", ("who may connect",)),
        ("ALTER DATABASE {name} IS_TEMPLATE true", ("who may connect",)),
        ("GRANT CONNECT ON DATABASE {name} TO PUBLIC", ("who may connect",)),
        ("GRANT TEMPORARY ON DATABASE {name} TO PUBLIC", ("who may connect",)),
        ("CREATE ROLE guest LOGIN; GRANT CONNECT ON DATABASE {name} TO guest", ("who may connect",)),
        ("REVOKE CONNECT ON DATABASE {name} FROM {name}", ("who may connect",)),
        (
            "ALTER ROLE {name} NOLOGIN CONNECTION LIMIT 1; GRANT CONNECT ON DATABASE {name} TO PUBLIC",
            ("whether it can be logged in to", "the connection limit", "who may connect"),
        ),
        # The cluster's, and not this database's.
        ("GRANT CONNECT ON DATABASE postgres TO PUBLIC", ()),
        ("GRANT CONNECT ON DATABASE template1 TO PUBLIC", ()),
    ],
)
async def test_repair(
    cluster: Cluster, admin: asyncpg.Connection, target: Target, tampering: str, differed: tuple[str, ...]
) -> None:
    """Whatever was changed behind our back, the next apply names it and puts it right, and the data stays."""
    await cluster.run(target, "CREATE TABLE notes (text text); GRANT ALL ON notes TO PUBLIC")
    state = (
        "SELECT rolcanlogin, rolconnlimit, rolsuper OR rolcreatedb OR rolcreaterole OR rolreplication OR rolbypassrls,"
        " rolconfig, coalesce(rolvaliduntil, 'infinity') = 'infinity',"
        " pg_get_userbyid(datdba) AS owner, datconnlimit, datallowconn, datistemplate,"
        " ARRAY(SELECT r.rolname FROM pg_roles r WHERE NOT rolsuper"
        "  AND has_database_privilege(r.rolname, d.oid, 'CONNECT')) AS users,"
        " ARRAY(SELECT m.roleid FROM pg_auth_members m WHERE o.oid IN (roleid, member)) AS memberships,"
        " ARRAY(SELECT datname::text || p FROM pg_database o, unnest('{CONNECT,TEMPORARY}'::text[]) p"
        "  WHERE has_database_privilege('public', o.oid, p) AND NOT datname = 'template0') AS public"
        " FROM pg_roles o JOIN pg_database d ON datname = rolname WHERE rolname = $1"
    )
    good = await admin.fetchrow(state, target.name)
    await admin.execute(tampering.format(name=target.name))

    assert await cluster.engine.apply(target) == differed

    assert await admin.fetchrow(state, target.name) == good
    assert (good["public"], good["users"], good["memberships"]) == ([], [target.name], [])
    assert await cluster.engine.apply(target) == ()
    tenant = await cluster.tenant(target)
    assert await tenant.fetchval("SELECT count(*) FROM notes") == 0
    await tenant.close()
    await admin.execute("DROP ROLE IF EXISTS guest")


async def test_dropped_role(cluster: Cluster, admin: asyncpg.Connection, target: Target) -> None:
    """A role that was dropped comes back, and its database is its own again."""
    await admin.execute(f"ALTER DATABASE {target.name} OWNER TO CURRENT_USER; DROP ROLE {target.name}")
    assert await cluster.engine.apply(target) == ("the user", "the owner")
    await cluster.run(target, "CREATE TABLE notes (text text)")


async def test_lost_database(cluster: Cluster, admin: asyncpg.Connection, target: Target) -> None:
    """A database that was to be there and is not is missed, with or without its role, and nothing is changed."""
    wanted = replace(target, exists=True, connections=7)
    await admin.execute(f"DROP DATABASE {target.name}")
    with pytest.raises(Missing):
        await cluster.engine.apply(wanted)
    assert await admin.fetchval("SELECT rolconnlimit FROM pg_roles WHERE rolname = $1", target.name) == 5
    await admin.execute(f"DROP ROLE {target.name}")
    with pytest.raises(Missing):
        await cluster.engine.apply(wanted)
    assert await cluster.engine.names(target.name) == set()
    assert await cluster.engine.apply(replace(wanted, exists=False)) == ("the database",)


async def test_database_that_is_there(cluster: Cluster, admin: asyncpg.Connection, target: Target) -> None:
    """A database that was to be there and is gets its limits, and its role back if that was dropped."""
    wanted = replace(target, exists=True)
    assert await cluster.engine.apply(wanted) == ()
    assert await cluster.engine.apply(replace(wanted, connections=7)) == ("the connection limit",)
    await admin.execute(f"ALTER DATABASE {target.name} OWNER TO CURRENT_USER; DROP ROLE {target.name}")
    assert await cluster.engine.apply(wanted) == ("the user", "the owner")
    assert await cluster.answers(target)


async def test_attributes(admin: asyncpg.Connection, target: Target) -> None:
    """A tenant's role can log in, and nothing else."""
    role = await admin.fetchrow("SELECT * FROM pg_roles WHERE rolname = $1", target.name)
    assert role["rolcanlogin"]
    assert not any(
        role[right] for right in ("rolsuper", "rolcreatedb", "rolcreaterole", "rolreplication", "rolbypassrls")
    )


@pytest.mark.parametrize("database", ["postgres", "template1", "template0"])
async def test_system_databases(cluster: Cluster, admin: asyncpg.Connection, target: Target, database: str) -> None:
    """A tenant cannot connect to the databases that come with the cluster, by its own rights and not by pg_hba only."""
    assert not await cluster.answers(target, database=database)
    assert not await admin.fetchval(
        "SELECT has_database_privilege($1, oid, 'CONNECT') AND datallowconn FROM pg_database WHERE datname = $2",
        target.name,
        database,
    )


async def test_other_tenant(cluster: Cluster, admin: asyncpg.Connection, target: Target, other: Target) -> None:
    """A tenant has no right on another's database or role, sees none of his queries, and ends none of his sessions."""
    assert not await cluster.answers(target, database=other.name)
    assert not await admin.fetchval(
        "SELECT has_database_privilege($1, $2, 'CONNECT, CREATE, TEMPORARY')", target.name, other.name
    )
    session = await cluster.tenant(other)
    pid = await session.fetchval("SELECT pg_backend_pid() AS secret")
    tenant = await cluster.tenant(target)
    for forbidden in (
        f"SELECT pg_terminate_backend({pid})",
        f"SELECT pg_cancel_backend({pid})",
        f"SELECT pg_database_size('{other.name}')",
        f"SET ROLE {other.name}",
        f"GRANT {target.name} TO {other.name}",
        f"GRANT {other.name} TO {target.name}",
        f"ALTER ROLE {other.name} PASSWORD 'x'",
        f"ALTER DATABASE {other.name} CONNECTION LIMIT 0",
        f"DROP DATABASE {other.name}",
        f"CREATE DATABASE more TEMPLATE {other.name}",
        "CREATE ROLE more",
        f"ALTER ROLE {target.name} CONNECTION LIMIT -1",
        "SET temp_file_limit = -1",
        "SELECT rolpassword FROM pg_authid",
        "SELECT pg_read_file('PG_VERSION')",
        "COPY (SELECT 1) TO PROGRAM 'true'",
        "CREATE EXTENSION dblink",
        "LOAD 'dblink'",
        "ALTER SYSTEM SET work_mem = '1MB'",
    ):
        with pytest.raises((asyncpg.InsufficientPrivilegeError, asyncpg.InvalidGrantOperationError)):
            await tenant.execute(forbidden)
    seen = await tenant.fetch("SELECT query FROM pg_stat_activity WHERE pid = $1", pid)
    assert [row["query"] for row in seen] == ["<insufficient privilege>"]
    assert await session.fetchval("SELECT 1") == 1
    await session.close()
    await tenant.close()


async def test_wrong_password(cluster: Cluster, target: Target) -> None:
    """Nobody gets in with another password."""
    assert not await cluster.answers(replace(target, password="guess"))


async def test_connection_limit(cluster: Cluster) -> None:
    """One session more than the limit is refused."""
    target = new_target(connections=2)
    await cluster.engine.apply(target)
    sessions = [await cluster.tenant(target) for _ in range(2)]
    with pytest.raises(asyncpg.TooManyConnectionsError):
        await cluster.tenant(target)
    for session in sessions:
        await session.close()
    await cluster.engine.drop(target.name)


async def test_half_deleted(cluster: Cluster, admin: asyncpg.Connection) -> None:
    """A database whose deletion was interrupted is not passed off as good, and can be deleted."""
    target = new_target()
    await cluster.engine.apply(target)
    await admin.execute("UPDATE pg_database SET datconnlimit = -2 WHERE datname = $1", target.name)
    with pytest.raises(EngineError, match="half deleted"):
        await cluster.engine.apply(target)
    await cluster.engine.drop(target.name)
    assert not await admin.fetchval("SELECT count(*) FROM pg_database WHERE datname = $1", target.name)


async def test_new_limits(cluster: Cluster, target: Target) -> None:
    """New limits hold for new sessions at once; those that run go on."""
    old = await cluster.tenant(target)
    changed = replace(target, connections=2, storage_gb=2, memory_mb=1024)
    assert await cluster.engine.apply(changed) == ("the connection limit", "the limit of temporary files")
    session = await cluster.tenant(changed)
    assert not await cluster.answers(changed)
    assert await session.fetchval("SHOW temp_file_limit") == "2GB"
    assert await old.fetchval("SELECT 1") == 1
    await old.close()
    await session.close()


async def test_new_password(cluster: Cluster, target: Target, other: Target) -> None:
    """A new password holds at once, the old one no longer does, and the sessions that came in with it have ended."""
    session, bystander = await cluster.tenant(target), await cluster.tenant(other)
    await session.execute("BEGIN; CREATE TABLE notes (text text)")
    changed = replace(target, password="n3w")
    assert await cluster.engine.apply(changed) == ("the password",)
    assert await _has_no_session(cluster, target)
    assert await bystander.fetchval("SELECT 1") == 1
    assert not await cluster.answers(target)
    assert await cluster.answers(changed)
    session.terminate()
    await bystander.close()


async def test_stolen_password(cluster: Cluster, target: Target) -> None:
    """Who changed the password behind our back, as a tenant can, loses his session when ours is put back."""
    await cluster.run(target, f"ALTER ROLE {target.name} PASSWORD 'stolen'")
    thief = await cluster.tenant(replace(target, password="stolen"))
    assert await cluster.engine.apply(target) == ("the password",)
    assert await _has_no_session(cluster, target)
    assert not await cluster.answers(replace(target, password="stolen"))
    thief.terminate()


async def test_no_login(cluster: Cluster, target: Target) -> None:
    """Without login the tenant's sessions end and no new one starts, until it is back, with the data."""
    session = await cluster.tenant(target)
    await session.execute("CREATE TABLE notes (text text)")
    closed = replace(target, login=False)

    assert await cluster.engine.apply(closed) == ("whether it can be logged in to",)

    assert await cluster.engine.apply(closed) == ()
    await eventually(lambda: _has_no_session(cluster, target))
    session.terminate()
    assert not await cluster.answers(target)
    seen = await cluster.engine.observe(target.name)
    assert seen is not None
    assert not seen.login

    assert await cluster.engine.apply(target) == ("whether it can be logged in to",)
    session = await cluster.tenant(target)
    assert await session.fetchval("SELECT count(*) FROM notes") == 0
    await session.close()


async def test_names(cluster: Cluster, admin: asyncpg.Connection, target: Target, other: Target) -> None:
    """Databases and roles that begin with a prefix are found, each kind alone too, and the prefix is no pattern."""
    await admin.execute("CREATE DATABASE db_alone")
    await admin.execute("CREATE ROLE db_role")
    found = await cluster.engine.names("db_")
    assert found >= {target.name, other.name, "db_alone", "db_role"}
    assert all(name.startswith("db_") for name in found)
    assert await cluster.engine.names(target.name) == {target.name}
    assert await cluster.engine.names("d%") == set()
    for alone in ("db_alone", "db_role"):
        assert await cluster.engine.observe(alone) is None
        await cluster.engine.drop(alone)
        assert await cluster.engine.names(alone) == set()


@pytest.mark.parametrize("begun", ["nothing", "all different", "another password"])
async def test_apply_after_a_crash(cluster: Cluster, admin: asyncpg.Connection, begun: str) -> None:
    """After a crash behind any of its statements, an apply finishes what was begun, and the data stays."""
    for answers in range(1, 100):
        target, session = new_target(), None
        if begun == "all different":
            await cluster.engine.apply(replace(target, password="old", connections=1, storage_gb=2, login=False))
            await admin.execute(f"GRANT CONNECT ON DATABASE {target.name} TO PUBLIC; GRANT pg_monitor TO {target.name}")
            await admin.execute(f"ALTER DATABASE {target.name} OWNER TO CURRENT_USER")
            owner = await cluster.admin(target.name)
            await owner.execute("CREATE TABLE notes (n int)")
            await owner.close()
        if begun == "another password":
            await cluster.engine.apply(replace(target, password="old"))
            session = await cluster.tenant(replace(target, password="old"))
        crashed = await _crash(cluster, answers, partial(PostgreSQL.apply, target=target))
        await _once_free(cluster, partial(PostgreSQL.apply, target=target))
        assert await cluster.engine.apply(target) == ()
        if session is not None:
            assert await _has_no_session(cluster, target)
            session.terminate()
        tenant = await cluster.tenant(target)
        tables = await tenant.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        assert [row[0] for row in tables] == (["notes"] if begun == "all different" else [])
        await tenant.close()
        await cluster.engine.drop(target.name)
        if not crashed:
            break
    assert not crashed
    assert answers > 8


async def test_drop_after_a_crash(cluster: Cluster) -> None:
    """After a crash behind any of its statements, a drop finishes what was begun."""
    for answers in range(1, 100):
        target = new_target()
        await cluster.engine.apply(target)
        await cluster.run(target, f"CREATE TABLE notes (n int); ALTER DATABASE {target.name} IS_TEMPLATE true")
        crashed = await _crash(cluster, answers, partial(PostgreSQL.drop, name=target.name))
        await _once_free(cluster, partial(PostgreSQL.drop, name=target.name))
        assert await cluster.engine.names(target.name) == set()
        if not crashed:
            break
    assert not crashed
    assert answers > 5


async def test_parallel(cluster: Cluster, admin: asyncpg.Connection) -> None:
    """Several first databases at once do not get into each other's way."""
    await admin.execute("GRANT CONNECT ON DATABASE postgres, template1 TO PUBLIC")
    targets = [new_target() for _ in range(6)]
    await asyncio.gather(*(cluster.engine.apply(target) for target in targets))
    assert all([await cluster.answers(target) for target in targets])
    await asyncio.gather(*(cluster.engine.drop(target.name) for target in targets))


async def test_busy(cluster: Cluster, admin: asyncpg.Connection, target: Target) -> None:
    """While another worker holds the database's lock, apply and drop are refused and change nothing."""
    await admin.execute("SELECT pg_advisory_lock(hashtextextended($1, 0))", target.name)
    with pytest.raises(Busy):
        await cluster.engine.apply(replace(target, password="n3w"))
    with pytest.raises(Busy):
        await cluster.engine.drop(target.name)
    assert await cluster.answers(target)
    await admin.execute("SELECT pg_advisory_unlock_all()")


async def test_drop(cluster: Cluster, admin: asyncpg.Connection) -> None:
    """Drop ends open sessions, whatever the tenant did to keep the database, and may be repeated."""
    target = new_target()
    await cluster.engine.apply(target)
    session = await cluster.tenant(target)
    await session.execute(f"ALTER DATABASE {target.name} IS_TEMPLATE true CONNECTION LIMIT 0")
    await session.execute("BEGIN; CREATE TABLE notes (text text)")
    await admin.execute(f"GRANT CREATE ON DATABASE postgres TO {target.name}")

    await cluster.engine.drop(target.name)
    await cluster.engine.drop(target.name)

    session.terminate()
    assert await cluster.engine.names(target.name) == set()
    assert await cluster.engine.observe(target.name) is None
    await cluster.engine.apply(target)
    await cluster.engine.drop(target.name)


@pytest.mark.parametrize(
    "name", ["postgres", "template1", "pg_monitor", "db", "Db_1", "db-1", "1db", "db_1\n", 'db"_1', "d" * 33, "dbé_1"]
)
async def test_name(cluster: Cluster, target: Target, name: str) -> None:
    """A name that is none of ours is refused before anything is asked of the cluster."""
    for action in (
        cluster.engine.apply(replace(target, name=name)),
        cluster.engine.drop(name),
        cluster.engine.observe(name),
        cluster.engine.dump(name).__aenter__(),
        cluster.engine.restore(name, "x", pieces(b"")),
        cluster.engine.contents(name),
    ):
        with pytest.raises(ValueError, match="cannot be the name"):
            await action


async def _has_no_session(cluster: Cluster, target: Target) -> bool:
    seen = await cluster.engine.observe(target.name)
    assert seen is not None
    return seen.connections == 0


async def _crash(cluster: Cluster, answers: int, action: Callable[[PostgreSQL], Awaitable[Any]]) -> bool:
    """Let an action's connection break after so many answers; return whether it came to that."""
    async with Cut(cluster.admin_dsn, answers).listening() as dsn:
        try:
            await action(PostgreSQL(admin_dsn=dsn, host="db", port=1, bin_dir=BIN_DIR))
        except ClusterUnavailable:
            return True
        return False


async def _once_free(cluster: Cluster, action: Callable[[PostgreSQL], Awaitable[Any]]) -> None:
    """Act as soon as the server has noticed that whoever held the lock is gone."""

    async def done() -> bool:
        try:
            await action(cluster.engine)
        except Busy:
            return False
        return True

    await eventually(done)
