"""The MySQL driver against a real MariaDB: a database that is made, put right, looked at and dropped."""

# ruff: noqa: S608 - the statements are made of names of ours

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import replace

import pytest

from controlplane.databases.engines.engine import Busy, ClusterUnavailable, Missing, Target
from tests.databases.engines.mysql.cluster import Cluster, Session, dumped, new_target, pieces, run
from tests.databases.engines.mysql.conftest import is_alive
from tests.stack import eventually


def _state(admin: Session, name: str) -> list[object]:
    """Return all that there is about an account."""
    return [
        run(admin, f"SELECT host FROM mysql.user WHERE user = '{name}'"),
        run(admin, f"SHOW CREATE USER '{name}'@'%'"),
        run(admin, f"SHOW GRANTS FOR '{name}'@'%'"),
    ]


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
        assert is_alive(tenant)
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
        assert not is_alive(tenant)


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
    assert not is_alive(session)
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
        assert session is None or not is_alive(session)
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
