"""The PostgreSQL driver against a real cluster."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import asyncpg
import pytest

from controlplane.databases.engines.engine import Busy, ClusterUnavailable, EngineError, Target
from controlplane.databases.engines.postgresql import PostgreSQL
from tests.databases.engines.cluster import BIN_DIR, Cluster, files_in, new_target


async def _ended(admin: asyncpg.Connection, target: Target) -> None:
    """Wait until the tenant has no session."""
    async with asyncio.timeout(5):
        while await admin.fetchval("SELECT count(*) FROM pg_stat_activity WHERE usename = $1", target.name):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_use(cluster: Cluster, target: Target) -> None:
    """A tenant connects with his URI, whatever characters are in the password, and creates tables and schemas."""
    tenant = await cluster.tenant(target)
    await tenant.execute("CREATE TABLE notes (text text); INSERT INTO notes VALUES ('é'); CREATE SCHEMA more")
    await tenant.execute("CREATE TEMP TABLE scratch (n int)")
    assert await tenant.fetchval("SELECT text FROM notes") == "é"
    await tenant.close()


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
    """A tenant has no right whatsoever on another's database."""
    assert not await cluster.answers(target, database=other.name)
    assert not await admin.fetchval(
        "SELECT has_database_privilege($1, $2, 'CONNECT, CREATE, TEMPORARY')", target.name, other.name
    )


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


async def test_apply_twice(cluster: Cluster, admin: asyncpg.Connection, target: Target) -> None:
    """A second apply changes nothing: not even the stored verifier, or the rights' rows."""
    state = (
        "SELECT rolpassword, a.xmin::text AS role, d.xmin::text AS database"
        " FROM pg_authid a JOIN pg_database d ON datname = rolname WHERE rolname = $1"
    )
    before = await admin.fetchrow(state, target.name)
    await cluster.engine.apply(target)
    assert await admin.fetchrow(state, target.name) == before


@pytest.mark.parametrize(
    "tampering",
    [
        "ALTER ROLE {name} CONNECTION LIMIT 100",
        "ALTER ROLE {name} SUPERUSER CREATEDB CREATEROLE REPLICATION BYPASSRLS",
        "ALTER ROLE {name} NOLOGIN",
        "ALTER ROLE {name} PASSWORD 'other'",
        "ALTER ROLE {name} PASSWORD NULL",
        f"ALTER ROLE {{name}} PASSWORD 'SCRAM-SHA-256$4096:c2FsdA==${'A' * 43}=:{'A' * 43}='",
        "ALTER DATABASE {name} OWNER TO CURRENT_USER",
        "ALTER DATABASE {name} CONNECTION LIMIT 0",
        "ALTER DATABASE {name} ALLOW_CONNECTIONS false",
        "GRANT CONNECT ON DATABASE {name} TO PUBLIC",
        "GRANT TEMPORARY ON DATABASE {name} TO PUBLIC",
        "REVOKE CONNECT ON DATABASE {name} FROM {name}",
        "GRANT CONNECT ON DATABASE postgres TO PUBLIC",
        "GRANT CONNECT ON DATABASE template1 TO PUBLIC",
    ],
)
async def test_repair(cluster: Cluster, admin: asyncpg.Connection, target: Target, tampering: str) -> None:
    """Whatever was changed behind our back, the next apply puts right, and the data stays."""
    tenant = await cluster.tenant(target)
    await tenant.execute("CREATE TABLE notes (text text); GRANT ALL ON notes TO PUBLIC")
    await tenant.close()
    state = (
        "SELECT rolcanlogin, rolconnlimit, rolsuper OR rolcreatedb OR rolcreaterole OR rolreplication OR rolbypassrls,"
        " pg_get_userbyid(datdba) AS owner, datconnlimit, datallowconn,"
        " has_database_privilege(rolname, d.oid, 'CONNECT'),"
        " ARRAY(SELECT datname::text || p FROM pg_database o, unnest('{CONNECT,TEMPORARY}'::text[]) p"
        "  WHERE has_database_privilege('public', o.oid, p) AND NOT datname = 'template0') AS public"
        " FROM pg_roles JOIN pg_database d ON datname = rolname WHERE rolname = $1"
    )
    good = await admin.fetchrow(state, target.name)
    await admin.execute(tampering.format(name=target.name))

    await cluster.engine.apply(target)

    assert await admin.fetchrow(state, target.name) == good
    assert good["public"] == []
    tenant = await cluster.tenant(target)
    assert await tenant.fetchval("SELECT count(*) FROM notes") == 0
    await tenant.close()


async def test_dropped_role(cluster: Cluster, admin: asyncpg.Connection, target: Target) -> None:
    """A role that was dropped comes back, and its database is its own again."""
    await admin.execute(f"ALTER DATABASE {target.name} OWNER TO CURRENT_USER; DROP ROLE {target.name}")
    await cluster.engine.apply(target)
    tenant = await cluster.tenant(target)
    await tenant.execute("CREATE TABLE notes (text text)")
    await tenant.close()


@pytest.mark.parametrize(
    "begun",
    [
        "CREATE ROLE {name}",
        "CREATE ROLE {name} LOGIN|CREATE DATABASE {name} OWNER {name} TEMPLATE template0 ALLOW_CONNECTIONS false",
    ],
)
async def test_resume(cluster: Cluster, admin: asyncpg.Connection, begun: str) -> None:
    """An apply goes on where a crash left the one before."""
    target = new_target()
    for statement in begun.format(name=target.name).split("|"):
        await admin.execute(statement)
    await cluster.engine.apply(target)
    assert await cluster.answers(target)
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


async def test_new_limit_and_password(cluster: Cluster, target: Target) -> None:
    """A new password and a new limit hold at once, and the old password no longer does."""
    changed = replace(target, password="n3w", connections=1)
    await cluster.engine.apply(changed)
    assert not await cluster.answers(target)
    session = await cluster.tenant(changed)
    assert not await cluster.answers(changed)
    await session.close()


async def test_no_login(cluster: Cluster, admin: asyncpg.Connection, target: Target) -> None:
    """Without login the tenant's sessions end and no new one starts, until it is back, with the data."""
    session = await cluster.tenant(target)
    await session.execute("CREATE TABLE notes (text text)")
    await cluster.engine.apply(replace(target, login=False))
    await _ended(admin, target)
    session.terminate()
    assert not await cluster.answers(target)

    await cluster.engine.apply(target)
    session = await cluster.tenant(target)
    assert await session.fetchval("SELECT count(*) FROM notes") == 0
    await session.close()


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
    """Drop ends open sessions, removes database and role though rights hold it elsewhere, and may be repeated."""
    target = new_target()
    await cluster.engine.apply(target)
    session = await cluster.tenant(target)
    await session.execute("BEGIN; CREATE TABLE notes (text text)")
    await admin.execute(f"GRANT CREATE ON DATABASE postgres TO {target.name}")

    await cluster.engine.drop(target.name)
    await cluster.engine.drop(target.name)

    session.terminate()
    assert not await admin.fetchval(
        "SELECT (SELECT count(*) FROM pg_roles WHERE rolname = $1)"
        " + (SELECT count(*) FROM pg_database WHERE datname = $1)",
        target.name,
    )
    await cluster.engine.apply(target)
    await cluster.engine.drop(target.name)


@pytest.mark.parametrize(
    "name", ["postgres", "template1", "pg_monitor", "db", "Db_1", "db-1", "1db", "db_1\n", 'db"_1', "d" * 64, "dbé_1"]
)
async def test_name(cluster: Cluster, tmp_path: Path, name: str) -> None:
    """A name that is none of ours is refused before anything is asked of the cluster."""
    for action in (
        cluster.engine.apply(Target(name=name, password="x", connections=1)),
        cluster.engine.drop(name),
        cluster.engine.dump(name, tmp_path / "dump"),
    ):
        with pytest.raises(ValueError, match="cannot be the name"):
            await action


@pytest.fixture
async def restricted(cluster: Cluster, admin: asyncpg.Connection) -> AsyncIterator[PostgreSQL]:
    """The driver with an admin who has just the two rights it needs, and comes in by TCP with a password."""
    usual = cluster.rules.read_text()
    cluster.rules.write_text(f"{usual}host all provisioner 127.0.0.1/32 scram-sha-256\n")
    await admin.execute("CREATE ROLE provisioner LOGIN CREATEROLE CREATEDB PASSWORD 'p w:x'")
    await admin.execute("GRANT CONNECT ON DATABASE postgres TO provisioner")
    await admin.execute("SELECT pg_reload_conf()")
    dsn = f"postgresql://provisioner:p%20w%3Ax@127.0.0.1:{cluster.port}/postgres"
    yield PostgreSQL(admin_dsn=dsn, host="127.0.0.1", port=cluster.port, bin_dir=BIN_DIR)
    await admin.execute("DROP OWNED BY provisioner; DROP ROLE provisioner")
    cluster.rules.write_text(usual)
    await admin.execute("SELECT pg_reload_conf()")


async def test_restricted_admin(
    cluster: Cluster, restricted: PostgreSQL, admin: asyncpg.Connection, tmp_path: Path
) -> None:
    """An admin with CREATEROLE and CREATEDB alone suffices for everything but to undo what a superuser gave."""
    target = new_target()
    await restricted.apply(target)
    await restricted.apply(replace(target, connections=1))
    session = await cluster.tenant(target)
    assert not await cluster.answers(target)
    await session.execute("CREATE TABLE notes (n int)")
    await restricted.dump(target.name, tmp_path / "dump")
    assert (tmp_path / "dump").read_bytes().startswith(b"PGDMP")
    await restricted.apply(replace(target, login=False))
    await _ended(admin, target)
    session.terminate()
    assert not await cluster.answers(target)
    await restricted.apply(target)
    assert await cluster.answers(target)

    await admin.execute(f"ALTER ROLE {target.name} SUPERUSER")
    with pytest.raises(EngineError) as refused:
        await restricted.apply(target)
    assert isinstance(refused.value.__cause__, asyncpg.InsufficientPrivilegeError)
    await admin.execute(f"ALTER ROLE {target.name} NOSUPERUSER")

    session = await cluster.tenant(target)
    await restricted.drop(target.name)
    await restricted.drop(target.name)
    session.terminate()
    assert not await admin.fetchval("SELECT count(*) FROM pg_roles WHERE rolname = $1", target.name)


async def test_restricted_admin_cannot_isolate(
    cluster: Cluster, restricted: PostgreSQL, admin: asyncpg.Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    """An admin who cannot take PUBLIC's right to a system database away says so in the log, and goes on."""
    await admin.execute("GRANT CONNECT ON DATABASE template1 TO PUBLIC")
    target = new_target()
    await restricted.apply(target)
    assert "revoke CONNECT on it" in capsys.readouterr().out
    await cluster.engine.apply(target)
    await restricted.drop(target.name)


async def test_statements_hold_no_password(
    cluster: Cluster, admin: asyncpg.Connection, capfd: pytest.CaptureFixture[str]
) -> None:
    """No password gets into the server's log, though it logs every statement and they fail."""
    target = new_target()
    settings = {"log_statement": "all", "log_min_messages": "debug1", "log_min_error_statement": "debug5"}
    for setting, value in settings.items():
        await admin.execute(f"ALTER ROLE controlplane SET {setting} = '{value}'")
    capfd.readouterr()
    try:
        await cluster.engine.apply(target)
        await admin.execute(f"ALTER ROLE {target.name} RENAME TO gone; CREATE ROLE {target.name} SUPERUSER")
        await cluster.engine.apply(replace(target, connections=-2))
    except EngineError:
        pass
    else:
        pytest.fail("the last apply should have been refused")
    finally:
        await admin.execute("ALTER ROLE controlplane RESET ALL")
        await cluster.engine.drop(target.name)
        await admin.execute("DROP ROLE gone")
    await asyncio.sleep(0.2)
    log = "".join(capfd.readouterr())
    assert "ERROR:  invalid connection limit: -2" in log
    assert log.count(f'ALTER ROLE "{target.name}"') >= 2
    assert "PASSWORD 'SCRAM-SHA-256$4096:" in log
    assert target.password not in log
    assert target.password.replace("'", "''") not in log


async def test_unreachable(tmp_path: Path) -> None:
    """A cluster that refuses connections is unavailable, and no word of the sentence tells where it is."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        engine = PostgreSQL(
            admin_dsn=f"postgresql://admin:s3cret@127.0.0.1:{port}/postgres", host="db", port=5432, bin_dir=BIN_DIR
        )
        for action in (engine.apply(new_target()), engine.drop("db_1"), engine.dump("db_1", tmp_path / "dump")):
            with pytest.raises(ClusterUnavailable) as failure:
                await action
            assert str(failure.value) == "The database cluster is not available at the moment; try again later."
    assert not files_in(tmp_path)


async def test_silent() -> None:
    """A cluster that accepts the connection and says nothing is unavailable within the connect timeout."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        dsn = f"postgresql://admin@127.0.0.1:{silent.getsockname()[1]}/postgres"
        engine = PostgreSQL(admin_dsn=dsn, host="db", port=5432, bin_dir=BIN_DIR)
        begin = time.monotonic()
        with pytest.raises(ClusterUnavailable):
            await engine.apply(new_target())
        assert time.monotonic() - begin < 5


def test_connection() -> None:
    """The URI is percent-encoded, an IPv6 address gets brackets, and secrets stay out of representations."""
    engine = PostgreSQL(admin_dsn="postgresql://admin@/postgres", host="::1", port=5432, bin_dir=BIN_DIR)
    connection = engine.connection("db_1", "a/b@c:é")
    assert connection.uri == "postgresql://db_1:a%2Fb%40c%3A%C3%A9@[::1]:5432/db_1"
    assert (connection.host, connection.port, connection.database, connection.username) == ("::1", 5432, "db_1", "db_1")
    assert "a/b" not in repr(connection)
    assert "a%2Fb" not in repr(connection)
    assert "s3cret" not in repr(new_target())


def test_admin_dsn() -> None:
    """A DSN that is no PostgreSQL URL is refused before the first use."""
    with pytest.raises(ValueError, match="must be a URL"):
        PostgreSQL(admin_dsn="host=/tmp user=admin", host="db", port=5432, bin_dir=BIN_DIR)
