"""The MySQL driver against a real MariaDB."""

# ruff: noqa: S608 - the statements are made of names of ours

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pymysql
import pytest

from controlplane.databases.engines.engine import Busy, ClusterUnavailable, EngineError, Missing, Target
from controlplane.databases.engines.mysql import MySQL
from tests.databases.engines.mysql.cluster import Cluster, Session, dumped, new_target, pieces, run
from tests.stack import eventually

UNAVAILABLE = r"^The database cluster is not available at the moment; try again later\.$"


def _state(admin: Session, name: str) -> list[object]:
    """Return all that there is about an account."""
    return [
        run(admin, f"SELECT host FROM mysql.user WHERE user = '{name}'"),
        run(admin, f"SHOW CREATE USER '{name}'@'%'"),
        run(admin, f"SHOW GRANTS FOR '{name}'@'%'"),
    ]


def _is_alive(session: Session) -> bool:
    try:
        run(session, "SELECT 1")
    except pymysql.Error:
        return False
    return True


async def test_use(cluster: Cluster) -> None:
    """A new database is reported as such, and takes connections, tables of any text, views and routines."""
    target = new_target()
    assert await cluster.engine.apply(target) == ("the database",)
    with cluster.tenant(target) as tenant:
        run(tenant, "CREATE TABLE notes (text TEXT)", "INSERT INTO notes VALUES ('é🎉')")
        run(tenant, "CREATE VIEW v AS SELECT * FROM notes", "CREATE FUNCTION f() RETURNS INT RETURN 1")
        run(tenant, "CREATE TRIGGER t BEFORE INSERT ON notes FOR EACH ROW SET NEW.text = 'x'")
        run(tenant, "CREATE TEMPORARY TABLE scratch (n INT)", "LOCK TABLES notes WRITE", "UNLOCK TABLES")
        assert run(tenant, "SELECT text, f() FROM v") == [("é🎉", 1)]
    await cluster.engine.drop(target.name)


async def test_apply_twice(cluster: Cluster, admin: Session, target: Target) -> None:
    """A second apply reports nothing, changes nothing, and ends no session."""
    before = _state(admin, target.name)
    with cluster.tenant(target) as tenant:
        assert await cluster.engine.apply(target) == ()
        assert _is_alive(tenant)
    assert _state(admin, target.name) == before


@pytest.mark.parametrize(
    ("tampering", "named"),
    [
        ("ALTER USER {name} WITH MAX_USER_CONNECTIONS 99", "the connection limit"),
        ("ALTER USER {name} WITH MAX_USER_CONNECTIONS 0", "the connection limit"),
        ("ALTER USER {name} IDENTIFIED BY 'other'", "the password"),
        ("ALTER USER {name} ACCOUNT LOCK", "the login"),
        ("ALTER USER {name} IDENTIFIED VIA unix_socket", "the user's options"),
        ("ALTER USER {name} REQUIRE SSL", "the user's options"),
        ("ALTER USER {name} PASSWORD EXPIRE INTERVAL 1 DAY", "the user's options"),
        ("ALTER USER {name} WITH MAX_STATEMENT_TIME 1", "the user's options"),
        ("GRANT PROCESS ON *.* TO {name}", "the rights"),
        ("GRANT SELECT ON mysql.* TO {name}", "the rights"),
        ("GRANT USAGE ON *.* TO {name} WITH GRANT OPTION", "the rights"),
        ("GRANT EVENT ON {database}.* TO {name}", "the rights"),
        ("REVOKE INSERT ON {database}.* FROM {name}", "the rights"),
        ("REVOKE ALL ON {database}.* FROM {name}", "the rights"),
        ("CREATE ROLE IF NOT EXISTS powerful|GRANT powerful TO {name}", "the rights"),
        ("DROP USER {name}", "the user"),
        ("CREATE USER {name}@localhost", "a second user of its name"),
    ],
)
async def test_repair(cluster: Cluster, admin: Session, target: Target, tampering: str, named: str) -> None:
    """Whatever was changed behind our back, the next apply names and puts right, and the data stays."""
    with cluster.tenant(target) as tenant:
        run(tenant, "CREATE TABLE notes (text TEXT)")
    good = _state(admin, target.name)
    database = f"`{target.name}`".replace("_", r"\_")
    run(admin, *tampering.format(name=target.name, database=database).split("|"))

    assert await cluster.engine.apply(target) == (named,)

    assert _state(admin, target.name) == good
    with cluster.tenant(target) as tenant:
        assert run(tenant, "INSERT INTO notes VALUES ('x')", "SELECT * FROM notes") == [("x",)]


async def test_repair_ends_sessions(cluster: Cluster, admin: Session, target: Target) -> None:
    """A session that began with rights too many ends when they are taken away, as it would keep them."""
    run(admin, f"GRANT SELECT ON mysql.* TO {target.name}")
    with cluster.tenant(target) as tenant:
        assert run(tenant, "SELECT COUNT(*) FROM mysql.global_priv")
        assert await cluster.engine.apply(target) == ("the rights",)
        assert not _is_alive(tenant)


async def test_dropped_database(cluster: Cluster, target: Target) -> None:
    """A database that its own tenant dropped comes back, empty."""
    with cluster.tenant(target) as tenant:
        run(tenant, f"DROP DATABASE {target.name}")
    assert await cluster.engine.apply(target) == ("the database",)
    assert cluster.answers(target)


async def test_lost_database(cluster: Cluster, admin: Session, target: Target) -> None:
    """A database that was to be there and is not is missed, with or without its user, and nothing is changed."""
    wanted = replace(target, exists=True, connections=7)
    before = _state(admin, target.name)
    run(admin, f"DROP DATABASE {target.name}")
    with pytest.raises(Missing):
        await cluster.engine.apply(wanted)
    assert _state(admin, target.name) == before
    run(admin, f"DROP USER {target.name}")
    with pytest.raises(Missing):
        await cluster.engine.apply(wanted)
    assert await cluster.engine.names(target.name) == set()
    assert await cluster.engine.apply(replace(wanted, exists=False)) == ("the database",)


async def test_database_that_is_there(cluster: Cluster, admin: Session, target: Target) -> None:
    """A database that was to be there and is gets its limits, and its user back if he was dropped."""
    wanted = replace(target, exists=True)
    assert await cluster.engine.apply(wanted) == ()
    assert await cluster.engine.apply(replace(wanted, connections=7)) == ("the connection limit",)
    run(admin, f"DROP USER {target.name}")
    assert await cluster.engine.apply(wanted) == ("the user",)
    assert cluster.answers(target)


async def test_other_tenant(cluster: Cluster, target: Target, other: Target) -> None:
    """A tenant can neither read another, nor end his sessions, nor do anything for the server as a whole."""
    with cluster.tenant(other) as victim, cluster.tenant(target) as tenant:
        run(victim, "CREATE TABLE secrets (text TEXT)")
        assert not cluster.answers(target, database=other.name)
        assert not cluster.answers(target, database="mysql")
        for statement in (
            f"SELECT * FROM {other.name}.secrets",
            f"CREATE TABLE {other.name}.mine (n INT)",
            f"DROP DATABASE {other.name}",
            f"SHOW CREATE DATABASE {other.name}",
            f"KILL {run(victim, 'SELECT CONNECTION_ID()')[0][0]}",
            f"SHOW GRANTS FOR {other.name}",
            f"SHOW CREATE USER {other.name}",
            "SELECT * FROM mysql.user",
            "CREATE USER mine",
            "CREATE ROLE mine",
            "CREATE DATABASE mine",
            f"GRANT SELECT ON {target.name}.* TO {other.name}",
            "ALTER USER CURRENT_USER() WITH MAX_USER_CONNECTIONS 1000",
            "SET GLOBAL max_connections = 1",
            "CREATE EVENT e ON SCHEDULE EVERY 1 SECOND DO DELETE FROM x",
            "LOAD DATA INFILE '/etc/hostname' INTO TABLE notes",
            "SELECT 1 INTO OUTFILE '/tmp/htx-outfile'",
            "INSTALL SONAME 'ha_archive'",
            "SHOW ENGINE INNODB STATUS",
            "FLUSH TABLES",
        ):
            with pytest.raises(pymysql.Error):
                run(tenant, statement)
        assert run(tenant, "SELECT LOAD_FILE('/etc/hostname')") == [(None,)]
        run(tenant, "CREATE TABLE t (n INT) DATA DIRECTORY = '/tmp'")
        assert "DIRECTORY" not in run(tenant, "SHOW CREATE TABLE t")[0][1]
        assert _is_alive(victim)


async def test_similar_name(cluster: Cluster, admin: Session, target: Target) -> None:
    """The underscore in a tenant's name stands for itself, not for any character of somebody else's."""
    similar = target.name.replace("_", "x")
    run(admin, f"CREATE DATABASE {similar}")
    assert not cluster.answers(target, database=similar)
    run(admin, f"DROP DATABASE {similar}")


async def test_what_is_told_of_others(cluster: Cluster, target: Target, other: Target) -> None:
    """Nothing that the server tells a tenant about itself names another tenant, or holds his query."""
    with cluster.tenant(other) as victim, cluster.tenant(target) as tenant:
        run(victim, "CREATE TABLE a (secret_column INT PRIMARY KEY)", "CREATE VIEW v AS SELECT secret_column FROM a")
        run(victim, "CREATE PROCEDURE p() SELECT secret_column FROM a", "SELECT * FROM a")
        busy = threading.Thread(target=run, args=(victim, "SELECT SLEEP(2), 'secret_column'"))
        busy.start()
        tables = [
            f"SELECT * FROM information_schema.`{name}`"
            for (name,) in run(tenant, "SHOW TABLES FROM information_schema")
        ]
        shows = (
            "DATABASES",
            "FULL PROCESSLIST",
            "OPEN TABLES",
            "GLOBAL STATUS",
            "GLOBAL VARIABLES",
            "PROCEDURE STATUS",
        )
        told = 0
        for statement in (*tables, *(f"SHOW {what}" for what in shows)):
            with suppress(pymysql.Error):  # some need a right that he has not
                answer = str(run(tenant, statement))
                assert other.name not in answer, statement
                assert "secret_column" not in answer.replace(target.name, ""), statement
                told += 1
        assert told > 50
        busy.join()


async def test_no_login(cluster: Cluster, target: Target) -> None:
    """Without login the tenant's sessions end and no new one starts, until it is back, with the data."""
    tenant = cluster.tenant(target)
    run(tenant, "CREATE TABLE notes (text TEXT)", "START TRANSACTION", "INSERT INTO notes VALUES ('lost')")
    stopped = replace(target, login=False)
    assert await cluster.engine.apply(stopped) == ("the login",)
    assert await cluster.engine.apply(stopped) == ()
    assert not _is_alive(tenant)
    assert not cluster.answers(target)

    assert await cluster.engine.apply(target) == ("the login",)
    with cluster.tenant(target) as tenant:
        assert run(tenant, "SELECT COUNT(*) FROM notes") == [(0,)]


async def test_wrong_password(cluster: Cluster, target: Target) -> None:
    """Nobody gets in with another password, or with none."""
    assert not cluster.answers(replace(target, password="guess"))
    assert not cluster.answers(replace(target, password=""))


async def test_connection_limit(cluster: Cluster) -> None:
    """One session more than the limit is refused, and none at all is no limit that the server knows."""
    target = new_target(connections=2)
    await cluster.engine.apply(target)
    with cluster.tenant(target), cluster.tenant(target):
        assert not cluster.answers(target)
    await cluster.engine.drop(target.name)
    with pytest.raises(ValueError, match="no limit"):
        await cluster.engine.apply(replace(target, connections=0))


async def test_resize(cluster: Cluster, target: Target) -> None:
    """A new size holds at once for the next session, while those that are open go on."""
    bigger = replace(target, connections=7, memory_mb=1024)
    with cluster.tenant(target) as first:
        assert await cluster.engine.apply(bigger) == ("the connection limit",)
        sessions = [first, *(cluster.tenant(bigger) for _ in range(6))]
        assert not cluster.answers(bigger)
        assert all(_is_alive(session) for session in sessions)
        for session in sessions[1:]:
            session.close()
        assert await cluster.engine.apply(replace(target, connections=1)) == ("the connection limit",)
        assert _is_alive(first)
        assert not cluster.answers(target)


async def test_new_password(cluster: Cluster, target: Target) -> None:
    """A new password holds at once, the old one no longer does, and sessions that came in with it are ended."""
    changed = replace(target, password="n3w")
    with cluster.tenant(target) as session:
        assert await cluster.engine.apply(changed) == ("the password",)
        assert not _is_alive(session)
    assert not cluster.answers(target)
    assert cluster.answers(changed)


async def test_stolen_password(cluster: Cluster, target: Target) -> None:
    """Who changed the password behind our back, as a tenant can, loses his session when ours is put back."""
    with cluster.tenant(target) as tenant:
        run(tenant, "SET PASSWORD = PASSWORD('stolen')")
    with cluster.tenant(replace(target, password="stolen")) as thief:
        assert await cluster.engine.apply(target) == ("the password",)
        assert not _is_alive(thief)
    assert not cluster.answers(replace(target, password="stolen"))


async def test_drop(cluster: Cluster, admin: Session) -> None:
    """Drop ends open sessions and dumps, removes database and all users of its name, and may be repeated."""
    target = new_target()
    await cluster.engine.apply(target)
    run(admin, f"CREATE USER {target.name}@localhost")
    session = cluster.tenant(target)
    run(session, "CREATE TABLE notes AS SELECT REPEAT('x', 60000) AS text FROM seq_1_to_500", "LOCK TABLES notes READ")
    async with cluster.engine.dump(target.name) as dump:
        chunks = dump.chunks()
        await anext(chunks)
        await cluster.engine.drop(target.name)
        with pytest.raises(ClusterUnavailable):
            await _read(chunks)
    await cluster.engine.drop(target.name)
    assert not _is_alive(session)
    assert await cluster.engine.names(target.name) == set()
    assert await cluster.engine.apply(target) == ("the database",)
    await cluster.engine.drop(target.name)


async def _read(chunks: AsyncIterator[bytes]) -> None:
    async for _ in chunks:
        pass


async def test_drop_what_is_not_there(cluster: Cluster) -> None:
    """Nothing happens when a name that nobody has is dropped."""
    await cluster.engine.drop(new_target().name)


async def test_names(cluster: Cluster, admin: Session, target: Target, other: Target) -> None:
    """Names are found by their beginning, be it a database without a user or a user without a database."""
    run(admin, f"DROP USER {target.name}", f"DROP DATABASE {other.name}")
    assert {target.name, other.name} <= await cluster.engine.names("db_")
    assert await cluster.engine.names(target.name) == {target.name}
    assert await cluster.engine.names(target.name.upper()) == set()


@pytest.mark.parametrize("begun", ["nothing", "another password", "a second user"])
async def test_crash_of_apply(cluster: Cluster, admin: Session, begun: str) -> None:
    """After whichever statement the line breaks, another apply finishes the work, and no old session goes on."""
    for after in range(1, 100):
        target, session = new_target(), None
        if begun != "nothing":
            old = target if begun == "a second user" else replace(target, password="old")
            await cluster.engine.apply(old)
            if begun == "a second user":
                run(admin, f"CREATE USER {target.name}@localhost")
            session = cluster.tenant(old)
        async with cluster.line_that_breaks(after=after) as port:
            try:
                await cluster.with_operator(port=port).apply(target)
                finished = True
            except ClusterUnavailable:
                finished = False
        await _when_not_busy(lambda target=target: cluster.engine.apply(target))  # type: ignore[misc]
        assert cluster.answers(target)
        assert await cluster.engine.apply(target) == ()
        assert session is None or not _is_alive(session)
        await cluster.engine.drop(target.name)
        if finished:
            assert after > 10
            return
    pytest.fail("apply never finished")


async def test_crash_of_drop(cluster: Cluster) -> None:
    """After whichever statement the line breaks, another drop finishes the work."""
    for after in range(1, 100):
        target = new_target()
        await cluster.engine.apply(target)
        with cluster.tenant(target):
            async with cluster.line_that_breaks(after=after) as port:
                try:
                    await cluster.with_operator(port=port).drop(target.name)
                    finished = True
                except ClusterUnavailable:
                    finished = False
        await _when_not_busy(lambda target=target: cluster.engine.drop(target.name))  # type: ignore[misc]
        assert await cluster.engine.names(target.name) == set()
        if finished:
            assert after >= 10
            return
    pytest.fail("drop never finished")


async def _when_not_busy(action: Callable[[], Awaitable[object]]) -> None:
    """Do it once the session whose line broke has given back its lock."""

    async def attempt() -> bool:
        with suppress(Busy):
            await action()
            return True
        return False

    await eventually(attempt)


async def test_parallel(cluster: Cluster) -> None:
    """Several databases at once do not get into each other's way."""
    targets = [new_target() for _ in range(6)]
    await asyncio.gather(*(cluster.engine.apply(target) for target in targets))
    assert all(cluster.answers(target) for target in targets)
    await asyncio.gather(*(cluster.engine.drop(target.name) for target in targets))


async def test_busy(cluster: Cluster, admin: Session, target: Target) -> None:
    """While another worker holds the database's lock, apply and drop are refused and change nothing."""
    run(admin, f"SELECT GET_LOCK('controlplane {target.name}', 0)")
    with pytest.raises(Busy):
        await cluster.engine.apply(replace(target, password="n3w"))
    with pytest.raises(Busy):
        await cluster.engine.drop(target.name)
    assert cluster.answers(target)
    run(admin, f"SELECT RELEASE_LOCK('controlplane {target.name}')")


async def test_lock_of_a_tenant(cluster: Cluster, target: Target, other: Target) -> None:
    """A tenant who takes a lock of ours, as any session can, is thrown out."""
    with cluster.tenant(target) as tenant, cluster.tenant(other) as bystander:
        run(tenant, f"SELECT GET_LOCK('controlplane {other.name}', 0)")
        assert await cluster.engine.apply(replace(other, login=False)) == ("the login",)
        assert not _is_alive(tenant)
        assert not _is_alive(bystander)


@pytest.mark.parametrize("url", ["mysql://admin:s3cret@127.0.0.1:{port}/", "mysql://admin@/?socket={socket}"])
async def test_unreachable(tmp_path: Path, url: str) -> None:
    """A cluster that refuses connections is unavailable, and no word of the sentence tells where it is."""
    with socket.socket() as nobody, socket.socket(socket.AF_UNIX) as unix:
        nobody.bind(("127.0.0.1", 0))
        unix.bind(str(tmp_path / "s"))
        url = url.format(port=nobody.getsockname()[1], socket=tmp_path / "s")
        engine = MySQL(admin_url=url, host="db", port=3306)
        for action in (
            engine.apply(new_target()),
            engine.drop("db_1"),
            engine.observe("db_1"),
            engine.names("db_"),
            engine.contents("db_1"),
            engine.restore("db_1", "x", pieces(b"DELIMITER")),
            dumped(engine, "db_1"),
        ):
            with pytest.raises(ClusterUnavailable, match=UNAVAILABLE):
                await action


async def test_silent() -> None:
    """A cluster that accepts the connection and says nothing is unavailable within seconds."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        engine = MySQL(admin_url=f"mysql://admin@127.0.0.1:{silent.getsockname()[1]}/", host="db", port=3306)
        begin = time.monotonic()
        with pytest.raises(ClusterUnavailable):
            await engine.apply(new_target())
        with pytest.raises(ClusterUnavailable):
            await engine.contents("db_1")
        assert time.monotonic() - begin < 12


async def test_wrong_admin_password(cluster: Cluster) -> None:
    """An admin who is refused is no passing trouble, and neither sentence nor cause has his password."""
    engine = cluster.with_operator(password="wr0ng")
    for action in (engine.apply(new_target()), engine.contents("db_1")):
        with pytest.raises(EngineError) as failure:
            await action
        assert type(failure.value) is EngineError
        assert "Access denied" in str(failure.value.__cause__)
        assert "wr0ng" not in f"{failure.value!r} {failure.value.__cause__!r}"


async def test_no_tls(cluster: Cluster) -> None:
    """Where a certificate is asked for, a server without TLS is never spoken to."""
    url = f"mysql://operator:x@127.0.0.1:{cluster.port}/?ssl-ca=/etc/ssl/certs/ca-certificates.crt"
    with pytest.raises(EngineError) as failure:
        await MySQL(admin_url=url, host="db", port=3306).names("db_")
    assert "SSL is required" in str(failure.value.__cause__)


async def test_gaps(cluster: Cluster, admin: Session, target: Target, capsys: pytest.CaptureFixture[str]) -> None:
    """A cluster whose configuration lets tenants out of their databases is warned of, and a sound one is not."""
    await cluster.engine.apply(target)
    assert "warning" not in capsys.readouterr().out
    run(admin, "CREATE USER ''@nowhere", "GRANT SELECT ON test.* TO PUBLIC")
    await cluster.engine.apply(target)
    log = capsys.readouterr().out
    assert "user without a name" in log
    assert "revoke those of '' and PUBLIC" in log
    run(admin, "REVOKE SELECT ON test.* FROM PUBLIC", "DROP USER ''@nowhere")


async def test_observe(cluster: Cluster, admin: Session) -> None:
    """Login, sessions and size are seen; of what lacks its database or its user there is nothing to see."""
    target = new_target()
    assert await cluster.engine.observe(target.name) is None
    await cluster.engine.apply(target)
    with cluster.tenant(target) as first, cluster.tenant(target):
        run(first, "CREATE TABLE notes AS SELECT REPEAT('x', 1000) AS text FROM seq_1_to_3000", "ANALYZE TABLE notes")
        seen = await cluster.engine.observe(target.name)
        assert seen is not None
        assert (seen.login, seen.connections) == (True, 2)
        assert 3_000_000 < seen.size_bytes < 10_000_000
    await cluster.engine.apply(replace(target, login=False))
    seen = await cluster.engine.observe(target.name)
    assert seen is not None
    assert (seen.login, seen.connections) == (False, 0)
    run(admin, f"DROP USER {target.name}")
    assert await cluster.engine.observe(target.name) is None
    await cluster.engine.apply(target)
    run(admin, f"DROP DATABASE {target.name}")
    assert await cluster.engine.observe(target.name) is None
    await cluster.engine.drop(target.name)


async def test_statements_hold_no_password(cluster: Cluster, admin: Session, folder: Path) -> None:
    """No password gets into the log of all statements, whatever is done."""
    log = folder / "mysql/mariadb/general.log"
    run(admin, f"SET GLOBAL general_log_file = '{log}'", "SET GLOBAL general_log = 1")
    target = new_target()
    await cluster.engine.apply(target)
    await cluster.engine.apply(replace(target, password="an0ther"))
    await cluster.engine.apply(replace(target, password="an0ther", connections=9))
    data, _ = await dumped(cluster.engine, target.name)
    await cluster.engine.restore(target.name, "an0ther", pieces(data))
    await cluster.engine.drop(target.name)
    run(admin, "SET GLOBAL general_log = 0")
    text = log.read_text(errors="replace")
    assert f"CREATE USER '{target.name}'@'%'" in text
    assert f"ALTER USER '{target.name}'@'%'" in text
    assert target.password not in text
    assert target.password.replace("'", "\\'") not in text
    assert "an0ther" not in text


@pytest.mark.parametrize("name", ["mysql", "test", "db", "Db_1", "db-1", "1db", "db_1\n", "db'_1", "d" * 33, "dbé_1"])
async def test_name(cluster: Cluster, name: str) -> None:
    """A name that is none of ours is refused before anything is asked of the cluster."""
    for action in (
        cluster.engine.apply(replace(new_target(), name=name)),
        cluster.engine.drop(name),
        cluster.engine.observe(name),
        cluster.engine.contents(name),
        cluster.engine.restore(name, "x", pieces(b"")),
        dumped(cluster.engine, name),
    ):
        with pytest.raises(ValueError, match="cannot be the name"):
            await action


def test_connection() -> None:
    """The URI is percent-encoded, an IPv6 address gets brackets, and secrets stay out of representations."""
    engine = MySQL(admin_url="mysql://admin@/?socket=/s", host="::1", port=3306)
    connection = engine.connection("db_1", "a/b@c:é")
    assert connection.uri == "mysql://db_1:a%2Fb%40c%3A%C3%A9@[::1]:3306/db_1"
    assert (connection.host, connection.port, connection.database, connection.username) == ("::1", 3306, "db_1", "db_1")
    assert "a/b" not in repr(connection)


@pytest.mark.parametrize("url", ["postgresql://admin@host/", "mysql://host/", "mysql://admin@host/?sslca=x", "x"])
def test_admin_url(url: str) -> None:
    """An admin URL that is none, or has a setting that nobody knows, is refused before the first use."""
    with pytest.raises(ValueError, match="The admin URL must be"):
        MySQL(admin_url=url, host="db", port=3306)
