"""The MongoDB driver against a wire-compatible server."""

import asyncio
import gc
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from pymongo.errors import OperationFailure, PyMongoError

from controlplane.databases.engines.engine import Busy, ClusterUnavailable, EngineError, Target
from controlplane.databases.engines.mongodb import MongoDB
from tests.databases.engines.wire_compatible import (  # noqa: F401
    Client,
    Cluster,
    Cut,
    admin_fixture,
    cluster_fixture,
    new_fixture,
    other_fixture,
    pieces,
    target_fixture,
    tenant_fixture,
)

# pymongo forgets the socket of a connect that its own end cuts off (PYTHON-5867). It knows of no other side.
pytestmark = pytest.mark.filterwarnings(r"ignore:unclosed <socket\.socket [^>]*laddr=\S+, \d+\)>:ResourceWarning")


@pytest.fixture(autouse=True)
def _forgotten_sockets() -> Iterator[None]:
    """Have forgotten sockets collected here, and not in other tests."""
    yield
    gc.collect()


async def test_use(cluster: Cluster, new: Callable[[], Target]) -> None:
    """A new database is reported as one, and its tenant gets in with his URI, whatever is in the password."""
    target = new()
    assert await cluster.engine.apply(target) == ("the database",)
    async with Client(cluster.engine.connection(target.name, target.password).uri) as tenant:
        notes = tenant.get_default_database()["notes"]
        await notes.insert_one({"text": "é"})
        await notes.create_index("text", unique=True)
        assert [note["text"] async for note in notes.find({}, {"_id": False})] == ["é"]


async def test_apply_twice(cluster: Cluster, admin: Client, target: Target, tenant: Client) -> None:
    """A second apply changes nothing, not even the stored verifier, reports nothing, and lets sessions be."""
    await tenant[target.name]["notes"].insert_one({})
    before = await _user(admin, target)
    assert await cluster.engine.apply(target) == ()
    assert await _user(admin, target) == before
    seen = await cluster.engine.observe(target.name)
    assert seen is not None
    assert seen.size_bytes > 0
    assert (seen.login, seen.connections) == (True, 1)


@pytest.mark.parametrize(
    ("command", "differed"),
    [
        ({"updateUser": "NAME", "pwd": "other"}, ("the password",)),
        ({"updateUser": "NAME", "roles": []}, ("the login",)),
        ({"updateUser": "NAME", "roles": ["read"]}, ("the rights",)),
        ({"grantRolesToUser": "NAME", "roles": [{"role": "root", "db": "admin"}]}, ("the rights",)),
        ({"updateUser": "NAME", "pwd": "other", "roles": ["read"]}, ("the password", "the rights")),
        ({"dropUser": "NAME"}, ("the user",)),
        ({"dropAllUsersFromDatabase": 1}, ("the user",)),
    ],
)
async def test_repair(
    cluster: Cluster,
    admin: Client,
    target: Target,
    tenant: Client,
    *,
    command: dict[str, Any],
    differed: tuple[str, ...],
) -> None:
    """Whatever was changed behind our back, the next apply names it and puts it right, and the data stays."""
    await tenant[target.name]["notes"].insert_one({"_id": 1})
    roles = (await _user(admin, target))["roles"]
    await admin[target.name].command({key: target.name if value == "NAME" else value for key, value in command.items()})

    assert await cluster.engine.apply(target) == differed

    assert await cluster.engine.apply(target) == ()
    assert (await _user(admin, target))["roles"] == roles
    async with cluster.tenant(target) as client:
        assert await client[target.name]["notes"].find_one() == {"_id": 1}


async def test_second_mechanism(cluster: Cluster, admin: Client, target: Target) -> None:
    """A user who could log in by a weaker mechanism too, with the same password, is made anew."""
    await admin[target.name].command("dropUser", target.name)
    roles, mechanisms = ["readWrite", "dbAdmin"], ["SCRAM-SHA-1", "SCRAM-SHA-256"]
    await admin[target.name].command("createUser", target.name, pwd=target.password, roles=roles, mechanisms=mechanisms)
    assert await cluster.engine.apply(target) == ("the password",)
    assert (await _user(admin, target))["mechanisms"] == ["SCRAM-SHA-256"]


async def test_other_tenant(cluster: Cluster, target: Target, tenant: Client, other: Target) -> None:
    """A tenant can neither read, write, list, log in at nor end what is another's or the cluster's, nor make users."""
    async with cluster.tenant(other) as client:
        await client[other.name]["notes"].insert_one({"_id": 1})

        for command in (
            {"find": "notes", "$db": other.name},
            {"insert": "notes", "documents": [{}], "$db": other.name},
            {"listCollections": 1, "$db": other.name},
            {"dropDatabase": 1, "$db": other.name},
            {"aggregate": "mine", "pipeline": [{"$out": {"db": other.name, "coll": "x"}}], "cursor": {}},
            {"find": "system.users", "$db": "admin"},
            {"find": "locks", "$db": "controlplane"},
            {"usersInfo": 1, "$db": other.name},
            {"createUser": "more", "pwd": "x", "roles": []},
            {"grantRolesToUser": target.name, "roles": [{"role": "root", "db": "admin"}]},
            {"updateUser": target.name, "pwd": "x"},
            {"createRole": "more", "privileges": [], "roles": []},
            {"currentOp": 1, "$all": True, "$db": "admin"},
            {"killOp": 1, "op": 1, "$db": "admin"},
            {"serverStatus": 1, "$db": "admin"},
            {"getLog": "global", "$db": "admin"},
            {"getCmdLineOpts": 1, "$db": "admin"},
        ):
            database = str(command.pop("$db", target.name))
            with pytest.raises(OperationFailure) as refused:
                await tenant[database].command(command)
            assert refused.value.code == 13, command
        with suppress(OperationFailure):  # MongoDB answers with his own
            assert other.name not in await tenant.list_database_names()
        assert not await cluster.answers(target, database=other.name)
        assert not await cluster.answers(target, database="admin")
        assert await client[other.name]["notes"].find_one() == {"_id": 1}


async def test_no_login(cluster: Cluster, admin: Client, target: Target, tenant: Client) -> None:
    """Without login the tenant's sessions end and no new one starts, until it is back, with the data."""
    await tenant[target.name]["notes"].insert_one({"_id": 1})
    closed = replace(target, login=False)

    assert await cluster.engine.apply(closed) == ("the login",)

    assert await cluster.engine.apply(closed) == ()
    assert not await cluster.answers(target)
    with pytest.raises(PyMongoError):
        await tenant[target.name]["notes"].find_one()
    seen = await cluster.engine.observe(target.name)
    assert seen is not None
    assert (seen.login, seen.connections) == (False, 0)

    await admin[target.name].command("updateUser", target.name, pwd=target.password)
    assert await cluster.engine.apply(closed) == ("the password",)
    assert await cluster.engine.apply(target) == ("the login",)
    async with cluster.tenant(target) as client:
        assert await client[target.name]["notes"].find_one() == {"_id": 1}


async def test_wrong_password(cluster: Cluster, target: Target) -> None:
    """Nobody gets in with another password, or none."""
    assert not await cluster.answers(replace(target, password="guess"))
    async with Client(f"mongodb://127.0.0.1:{cluster.port}") as anybody:
        with pytest.raises(OperationFailure):
            await anybody[target.name].list_collection_names()


async def test_limits_are_advice(cluster: Cluster, new: Callable[[], Target]) -> None:
    """The engine has no limit on connections, memory or storage: others change nothing, and sessions go on."""
    target = replace(new(), connections=1)
    await cluster.engine.apply(target)
    async with cluster.tenant(target, pool=3) as tenant:
        pings = [tenant[target.name]["notes"].insert_one({}) for _ in range(3)]
        await asyncio.gather(*pings)
        seen = await cluster.engine.observe(target.name)
        assert seen is not None
        assert seen.connections > target.connections
        assert await cluster.engine.apply(replace(target, connections=9, memory_mb=128, storage_gb=2)) == ()
        assert await cluster.engine.observe(target.name) == seen


async def test_new_password(cluster: Cluster, target: Target, tenant: Client) -> None:
    """A new password holds at once, the old one no longer does, and who used it is cut off."""
    await tenant[target.name]["notes"].insert_one({})
    changed = replace(target, password="n3w")
    assert await cluster.engine.apply(changed) == ("the password",)
    with pytest.raises(PyMongoError):
        await tenant[target.name]["notes"].find_one()
    assert not await cluster.answers(target)
    assert await cluster.answers(changed)


async def test_stolen_password(cluster: Cluster, admin: Client, target: Target) -> None:
    """Who changed the password behind our back is cut off when ours is put back."""
    await admin[target.name].command("updateUser", target.name, pwd="stolen")
    async with cluster.tenant(replace(target, password="stolen")) as thief:
        await thief[target.name]["notes"].insert_one({})
        assert await cluster.engine.apply(target) == ("the password",)
        with pytest.raises(PyMongoError):
            await thief[target.name]["notes"].find_one()
    assert not await cluster.answers(replace(target, password="stolen"))


@pytest.mark.parametrize("documents", [0, 1])
async def test_lost_user(cluster: Cluster, admin: Client, target: Target, tenant: Client, documents: int) -> None:
    """The user of a database that was to be there comes back, with what data there is, and is never called new."""
    await tenant[target.name]["notes"].insert_one({})
    await admin[target.name].command("dropUser", target.name)
    if not documents:
        await admin.drop_database(target.name)
    assert await cluster.engine.apply(replace(target, exists=True)) == ("the user",)
    assert await cluster.engine.apply(replace(target, exists=True)) == ()
    async with cluster.tenant(target) as client:
        assert await client[target.name]["notes"].count_documents({}) == documents


async def test_drop(cluster: Cluster, admin: Client, target: Target, tenant: Client) -> None:
    """Drop ends open sessions, removes database, users and roles, and may be repeated."""
    await tenant[target.name]["notes"].insert_one({})
    await admin[target.name].command("createUser", "more", pwd="x", roles=["read"])
    await admin[target.name].command("createRole", "role", privileges=[], roles=[])

    await cluster.engine.drop(target.name)
    await cluster.engine.drop(target.name)

    with pytest.raises(PyMongoError):
        await tenant[target.name]["notes"].insert_one({})
    assert await cluster.engine.names(target.name) == set()
    assert await cluster.engine.observe(target.name) is None
    assert (await admin[target.name].command("usersInfo", 1))["users"] == []
    assert (await admin[target.name].command("rolesInfo", "role"))["roles"] == []
    assert not await admin["controlplane"]["locks"].count_documents({})


async def test_names(cluster: Cluster, admin: Client, target: Target, tenant: Client, other: Target) -> None:
    """Databases and users that begin with a prefix are found, each kind alone too, and the prefix is no pattern."""
    alone = f"{target.name[:20]}x"
    await admin[alone]["notes"].insert_one({})
    await tenant[target.name]["notes"].insert_one({})
    assert await cluster.engine.names("db_") >= {target.name, other.name, alone}
    assert await cluster.engine.names(other.name) == {other.name}
    assert await cluster.engine.names(alone) == {alone}
    assert await cluster.engine.names("d.") == set()
    await cluster.engine.drop(alone)


@pytest.mark.parametrize("case", ["new", "new password", "drop"])
async def test_crash_anywhere(
    cluster: Cluster, admin: Client, new: Callable[[], Target], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """After a crash behind any of its commands, an apply or a drop finishes what was begun."""
    monkeypatch.setattr("controlplane.databases.engines.mongodb._CONNECT_TIMEOUT", 1.0)

    async def act(target: Target, engine: MongoDB) -> None:
        await (engine.drop(target.name) if case == "drop" else engine.apply(target))

    for crash in range(1, 20):
        target = new()
        old = replace(target, password="old")
        async with cluster.tenant(old) as session:
            if case != "new":
                await cluster.engine.apply(old)
                await session[target.name]["notes"].insert_one({"_id": 1})
            finished = await _finishes(cluster, crash, partial(act, target))
            await admin["controlplane"]["locks"].update_many({}, {"$set": {"until": 0}})  # as time does
            await act(target, cluster.engine)
            with pytest.raises(PyMongoError):
                await session[target.name]["notes"].insert_one({})
        if case == "drop":
            assert await cluster.engine.names(target.name) == set()
        else:
            assert await cluster.answers(target)
            assert await cluster.engine.apply(target) == ()
            assert await admin[target.name]["notes"].count_documents({}) == (case == "new password")
        if finished:
            break
    assert 6 < crash < 19


async def _finishes(cluster: Cluster, commands: int, action: Callable[[MongoDB], Awaitable[None]]) -> bool:
    """Let an action's connection break after so many commands; return whether it came to its end before."""
    async with Cut(cluster.port, commands).listening() as port:
        url = cluster.admin_url.replace(str(cluster.port), str(port))
        engine = MongoDB(admin_url=f"{url}?directConnection=true&serverMonitoringMode=poll", host="db", port=1)
        try:
            await action(engine)
        except ClusterUnavailable:
            return False
        return True


async def test_busy(cluster: Cluster, admin: Client, target: Target) -> None:
    """While another worker holds the database's lock, a change or a drop is refused; a look needs no lock."""
    locks = admin["controlplane"]["locks"]
    await locks.insert_one({"_id": target.name, "owner": "another", "until": 2**60})
    with pytest.raises(Busy):
        await cluster.engine.apply(replace(target, password="n3w"))
    with pytest.raises(Busy):
        await cluster.engine.drop(target.name)
    assert await cluster.engine.apply(target) == ()
    assert await cluster.answers(target)
    await locks.delete_one({"_id": target.name})


async def test_parallel(cluster: Cluster, new: Callable[[], Target]) -> None:
    """Of several workers on one database one acts at a time; several databases do not get into each other's way."""
    targets = [new() for _ in range(3)]
    same = [cluster.engine.apply(targets[0]) for _ in range(3)]
    done = await asyncio.gather(*same, *map(cluster.engine.apply, targets[1:]), return_exceptions=True)
    assert done[3:] == [("the database",), ("the database",)]
    assert done[:3].count(("the database",)) == 1
    assert all(isinstance(found, Busy) or found in {(), ("the database",)} for found in done[:3])


async def test_late_worker(cluster: Cluster, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker whose lock may have run out sends nothing more."""
    monkeypatch.setattr("controlplane.databases.engines.mongodb._WORK_SECONDS", -1)
    with pytest.raises(ClusterUnavailable, match="took too long"):
        await cluster.engine.apply(replace(target, password="n3w"))
    assert await cluster.answers(target)


@pytest.mark.parametrize("name", ["admin", "controlplane", "db", "Db_1", "db-1", "1db", "db_1\n", "d" * 33, "dbé_1"])
async def test_name(cluster: Cluster, target: Target, name: str) -> None:
    """A name that is none of ours is refused before anything is asked of the cluster."""
    for action in (
        cluster.engine.apply(replace(target, name=name)),
        cluster.engine.drop(name),
        cluster.engine.observe(name),
        cluster.engine.contents(name),
        cluster.engine.restore(name, "x", pieces(b"")),
    ):
        with pytest.raises(ValueError, match="cannot be the name"):
            await action


async def test_no_password_in_logs(
    cluster: Cluster, new: Callable[[], Target], caplog: pytest.LogCaptureFixture
) -> None:
    """No password gets into the server's log or ours, at the most talkative, nor into errors and representations."""
    caplog.set_level(logging.DEBUG)
    target = new()
    await cluster.engine.apply(target)
    await cluster.engine.apply(replace(target, login=False))
    await cluster.engine.apply(target)
    with pytest.raises(EngineError) as refused:
        await cluster.engine.restore(target.name, target.password + "x", pieces(b""))
    text = caplog.text + cluster.log.read_text() + repr((target, refused.value, refused.value.__cause__))
    assert "createUser" in caplog.text
    assert target.password not in text
    assert cluster.admin_url.split(":")[2].split("@")[0] not in text


async def test_unreachable() -> None:
    """A cluster that refuses connections, or is silent, is soon unavailable, and the sentence tells not where it is."""
    for listens in (False, True):
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))
            if listens:
                nobody.listen()
            engine = MongoDB(admin_url=f"mongodb://127.0.0.1:{nobody.getsockname()[1]}", host="db", port=1)
            begin = time.monotonic()
            with pytest.raises(ClusterUnavailable) as failure:
                await engine.drop("db_1")
            assert time.monotonic() - begin < 5
            assert str(failure.value) == "The database cluster is not available at the moment; try again later."


async def test_wrong_admin_password(cluster: Cluster) -> None:
    """A cluster that does not know its admin is not one to try again."""
    engine = MongoDB(admin_url=cluster.admin_url.replace("@", "x@"), host="db", port=1)
    with pytest.raises(EngineError) as failure:
        await engine.observe("db_1")
    assert type(failure.value) is EngineError


def test_connection() -> None:
    """The URI is percent-encoded, an IPv6 address gets brackets, and a URL of another engine is refused."""
    engine = MongoDB(admin_url="mongodb://admin@db", host="::1", port=27017)
    connection = engine.connection("db_1", "a/b@c:é")
    assert connection.uri == "mongodb://db_1:a%2Fb%40c%3A%C3%A9@[::1]:27017/db_1"
    assert "a/b" not in repr(connection)
    with pytest.raises(ValueError, match="must be one of MongoDB"):
        MongoDB(admin_url="postgresql://admin@db", host="db", port=1)


async def _user(admin: Client, target: Target) -> dict[str, Any]:
    found = await admin[target.name].command("usersInfo", target.name, showCredentials=True)
    user: dict[str, Any] = found["users"][0]
    return user
