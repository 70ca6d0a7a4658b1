"""The PostgreSQL driver's admin: one with few rights, his secrets, and a cluster that does not answer him."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import asyncpg
import pytest

from controlplane.databases.engines.engine import ClusterUnavailable, EngineError
from controlplane.databases.engines.postgresql import PostgreSQL
from tests.databases.engines.cluster import BIN_DIR, Cluster, new_target, pieces
from tests.stack import eventually


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


async def test_restricted_admin(cluster: Cluster, restricted: PostgreSQL, admin: asyncpg.Connection) -> None:
    """An admin with CREATEROLE and CREATEDB alone suffices for everything but to undo what a superuser gave."""
    target, other = new_target(), new_target()
    assert await restricted.apply(target) == ("the database",)
    assert await restricted.apply(other) == ("the database",)
    assert await restricted.apply(target) == ()
    await admin.execute(f"ALTER ROLE {target.name} PASSWORD 'other'")
    session = await cluster.tenant(replace(target, password="other"))
    assert await restricted.apply(target) == ("the password",)
    assert (await restricted.observe(target.name)).connections == 0  # type: ignore[union-attr]
    session.terminate()
    session = await cluster.tenant(target)
    assert await restricted.apply(replace(target, connections=1)) == ("the connection limit",)
    assert not await cluster.answers(target)
    await session.execute("CREATE TABLE notes (n int); INSERT INTO notes SELECT generate_series(1, 10)")
    await session.execute("SELECT lo_from_bytea(0, 'large')")
    async with restricted.dump(target.name) as dump:
        whole = b"".join([piece async for piece in dump.chunks()])
    await restricted.restore(other.name, other.password, pieces(whole))
    assert await restricted.contents(other.name) == dump.contents()
    assert {name: table.rows for name, table in dump.contents().tables.items()} == {
        "public.notes": 10,
        "pg_largeobject": 1,
    }
    await restricted.apply(replace(target, login=False))

    async def ended() -> bool:
        return bool(session.is_closed())

    await eventually(ended)
    assert not await cluster.answers(target)
    await restricted.apply(target)
    assert await cluster.answers(target)

    await admin.execute(f"ALTER ROLE {target.name} SUPERUSER")
    with pytest.raises(EngineError) as refused:
        await restricted.apply(target)
    assert isinstance(refused.value.__cause__, asyncpg.InsufficientPrivilegeError)
    # Who has all rights can undo it, and takes none from the other admin.
    assert await cluster.engine.apply(target) == ("the user's rights", "the limit of temporary files")

    session = await cluster.tenant(target)
    await restricted.drop(target.name)
    await restricted.drop(target.name)
    await restricted.drop(other.name)
    session.terminate()
    assert await restricted.names("db_") & {target.name, other.name} == set()


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


async def test_unreachable() -> None:
    """A cluster that refuses connections is unavailable, and no word of the sentence tells where it is."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        engine = PostgreSQL(
            admin_dsn=f"postgresql://admin:s3cret@127.0.0.1:{port}/postgres",
            host="127.0.0.1",
            port=port,
            bin_dir=BIN_DIR,
        )
        for action in (
            engine.apply(new_target()),
            engine.drop("db_1"),
            engine.observe("db_1"),
            engine.names("db_"),
            engine.dump("db_1").__aenter__(),
            engine.restore("db_1", "x", pieces(b"")),
            engine.contents("db_1"),
        ):
            with pytest.raises(ClusterUnavailable) as failure:
                await action
            assert str(failure.value) == "The database cluster is not available at the moment; try again later."


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


async def test_wrong_admin_password(restricted: PostgreSQL, cluster: Cluster) -> None:
    """A cluster that does not know its admin is not one to try again, and the sentence has no secret."""
    assert await restricted.names("db_none") == set()
    dsn = f"postgresql://provisioner:wr0ng@127.0.0.1:{cluster.port}/postgres"
    engine = PostgreSQL(admin_dsn=dsn, host="db", port=5432, bin_dir=BIN_DIR)
    with pytest.raises(EngineError) as failure:
        await engine.apply(new_target())
    assert type(failure.value) is EngineError
    assert isinstance(failure.value.__cause__, asyncpg.InvalidPasswordError)
    assert "wr0ng" not in f"{failure.value!r} {failure.value.__cause__!r}"


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
