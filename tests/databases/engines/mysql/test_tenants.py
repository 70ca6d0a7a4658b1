"""The tenants of a MariaDB: who gets in and how often, and what each can do to the others."""

# ruff: noqa: S608 - the statements are made of names of ours

import threading
from contextlib import suppress
from dataclasses import replace

import pymysql
import pytest

from controlplane.databases.engines.engine import Target
from tests.databases.engines.mysql.cluster import Cluster, Session, new_target, run
from tests.databases.engines.mysql.conftest import is_alive


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
        assert is_alive(victim)


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


async def test_lock_of_a_tenant(cluster: Cluster, target: Target, other: Target) -> None:
    """A tenant who takes a lock of ours, as any session can, is thrown out."""
    with cluster.tenant(target) as tenant, cluster.tenant(other) as bystander:
        run(tenant, f"SELECT GET_LOCK('controlplane {other.name}', 0)")
        assert await cluster.engine.apply(replace(other, login=False)) == ("the login",)
        assert not is_alive(tenant)
        assert not is_alive(bystander)


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


async def test_no_login(cluster: Cluster, target: Target) -> None:
    """Without login the tenant's sessions end and no new one starts, until it is back, with the data."""
    tenant = cluster.tenant(target)
    run(tenant, "CREATE TABLE notes (text TEXT)", "START TRANSACTION", "INSERT INTO notes VALUES ('lost')")
    stopped = replace(target, login=False)
    assert await cluster.engine.apply(stopped) == ("the login",)
    assert await cluster.engine.apply(stopped) == ()
    assert not is_alive(tenant)
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
        assert all(is_alive(session) for session in sessions)
        for session in sessions[1:]:
            session.close()
        assert await cluster.engine.apply(replace(target, connections=1)) == ("the connection limit",)
        assert is_alive(first)
        assert not cluster.answers(target)


async def test_new_password(cluster: Cluster, target: Target) -> None:
    """A new password holds at once, the old one no longer does, and sessions that came in with it are ended."""
    changed = replace(target, password="n3w")
    with cluster.tenant(target) as session:
        assert await cluster.engine.apply(changed) == ("the password",)
        assert not is_alive(session)
    assert not cluster.answers(target)
    assert cluster.answers(changed)


async def test_stolen_password(cluster: Cluster, target: Target) -> None:
    """Who changed the password behind our back, as a tenant can, loses his session when ours is put back."""
    with cluster.tenant(target) as tenant:
        run(tenant, "SET PASSWORD = PASSWORD('stolen')")
    with cluster.tenant(replace(target, password="stolen")) as thief:
        assert await cluster.engine.apply(target) == ("the password",)
        assert not is_alive(thief)
    assert not cluster.answers(replace(target, password="stolen"))
