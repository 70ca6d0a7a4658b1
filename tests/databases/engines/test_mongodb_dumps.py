"""Dumps of the MongoDB driver against a wire-compatible server: whole, in pieces, and never trusted."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import bson
import pytest
from bson import Binary, Decimal128, Int64, ObjectId, Regex, Timestamp
from pymongo import IndexModel
from pymongo.errors import OperationFailure

from controlplane.databases.engines.engine import EngineError, Target
from tests.databases.engines.wire_compatible import (  # noqa: F401
    Client,
    Cluster,
    admin_fixture,
    cluster_fixture,
    new_fixture,
    other_fixture,
    pieces,
    target_fixture,
    tenant_fixture,
)

DOCUMENTS: list[dict[str, Any]] = [
    {"_id": 1, "text": "é€\U0001f600", "long": Int64(2**60), "double": -0.0, "none": None, "yes": True},
    {"_id": ObjectId(), "when": datetime(2024, 2, 29, tzinfo=UTC), "bytes": Binary(b"\0\xff", 128)},
    {"_id": "two", "exact": Decimal128("1.10"), "regex": Regex("^a", "i"), "stamp": Timestamp(1, 2)},
    {"_id": {"nested": [1, {"deep": []}]}, "array": [None, "x", 1.5], "empty": {}},
]


async def test_dump_and_restore(cluster: Cluster, target: Target, other: Target, tenant: Client) -> None:
    """What was dumped while the tenant was locked out is restored as another tenant, with equal contents."""
    database = tenant[target.name]
    await database["types"].insert_many(DOCUMENTS)
    await database["many"].insert_many([{"n": n, "text": "x" * 500} for n in range(5000)])
    await database["many"].create_indexes(
        [
            IndexModel([("n", -1), ("text", 1)], unique=True, name="both"),
            IndexModel("n", partialFilterExpression={"n": {"$gt": Int64(5)}}, expireAfterSeconds=10**9),
        ]
    )
    await database.create_collection("last", capped=True, size=4096)
    await database["last"].insert_many([{"n": n} for n in range(5)])
    await database["strict"].insert_one({"text": "older than the validator"})
    await database.command("collMod", "strict", validator={"n": {"$type": "int"}})
    await database.create_collection("a_view", viewOn="many", pipeline=[{"$match": {"n": {"$lt": 3}}}])
    await cluster.engine.apply(replace(target, login=False))

    dumped, contents = await _dump(cluster, target)
    await cluster.engine.restore(other.name, other.password, pieces(b"".join(dumped), 1000))

    assert max(map(len, dumped)) <= 2**20
    assert {name: table.rows for name, table in contents.tables.items()} == {
        "types": 4,
        "many": 5000,
        "last": 5,
        "strict": 1,
        "a_view": 0,
    }
    assert await cluster.engine.contents(target.name) == contents
    assert await cluster.engine.contents(other.name) == contents
    async with cluster.tenant(other) as client:
        restored = client[other.name]
        assert (await restored["many"].index_information())["both"]["unique"]
        assert [found["n"] async for found in restored["a_view"].find().sort("n")] == [0, 1, 2]
        with pytest.raises(OperationFailure, match="validation"):
            await restored["strict"].insert_one({"n": "x"})
        await restored["many"].drop_index("both")
        await restored["types"].update_one({"_id": 1}, {"$set": {"long": 2.0**60}})
    changed = await cluster.engine.contents(other.name)
    assert {name for name, table in changed.tables.items() if table != contents.tables[name]} == {"many", "types"}


async def test_dump_under_load(cluster: Cluster, target: Target, other: Target, tenant: Client) -> None:
    """A dump of what is being written says what it has: restored, it has the contents that it told."""
    notes = tenant[target.name]["notes"]
    await notes.insert_many([{"_id": n, "text": "x" * 1000} for n in range(3000)])

    async def write() -> None:
        for n in range(3000, 100_000):
            await notes.insert_one({"_id": n})

    writer = asyncio.create_task(write())
    dumped, contents = await _dump(cluster, target)
    assert not writer.done()
    writer.cancel()
    await cluster.engine.restore(other.name, other.password, pieces(b"".join(dumped)))
    assert await cluster.engine.contents(other.name) == contents
    assert contents.tables["notes"].rows >= 3000


async def test_left_dump(cluster: Cluster, admin: Client, target: Target, tenant: Client) -> None:
    """A dump that nobody reads to its end has no contents to tell, and leaves nothing open on the server."""
    await tenant[target.name]["notes"].insert_many([{"text": "x" * 1000} for n in range(5000)])
    async with cluster.engine.dump(target.name) as dump:
        await anext(dump.chunks())
        assert await _open_cursors(admin, target) == 1
        with pytest.raises(RuntimeError, match="once the dump was read"):
            dump.contents()
    assert await _open_cursors(admin, target) == 0


async def test_dump_of_nothing(cluster: Cluster, target: Target, other: Target) -> None:
    """An empty database is dumped and restored; none is not dumped, and into one with data nothing is restored."""
    dumped, contents = await _dump(cluster, target)
    assert contents.tables == {}
    await cluster.engine.restore(other.name, other.password, pieces(b"".join(dumped)))
    with pytest.raises(EngineError, match="not there"):
        await cluster.engine.contents("db_missing")
    async with cluster.tenant(other) as client:
        await client[other.name]["notes"].insert_one({})
    with pytest.raises(EngineError, match="only into an empty"):
        await cluster.engine.restore(other.name, other.password, pieces(b"".join(dumped)))


async def test_damaged_dump(cluster: Cluster, new: Callable[[], Target], target: Target, tenant: Client) -> None:
    """What is cut off anywhere, longer, changed or no dump at all is refused."""
    await tenant[target.name]["notes"].insert_many([{"_id": 1}, {"_id": 2}])
    whole = b"".join((await _dump(cluster, target))[0])
    begin = whole.index(b"D")
    cuts = [whole[:end] for end in (0, 5, 30, begin, begin + 3, len(whole) - 1)]
    garbage = [secrets.token_bytes(5000), whole[:begin] + b"D\xff\xff\xff\x7f", whole[:begin] + b"D\x05\0\0\0\1"]
    for damaged in (*cuts, *garbage, whole + b"x", whole.replace(b"_id\0\2", b"_id\0\3"), whole + whole):
        into = new()
        await cluster.engine.apply(into)
        with pytest.raises(EngineError) as refused:
            await cluster.engine.restore(into.name, into.password, pieces(damaged))
        assert type(refused.value) is EngineError


@pytest.mark.parametrize(
    "definition",
    [
        {},
        {"name": 1, "options": {}, "indexes": []},
        {"name": "x", "options": [], "indexes": []},
        {"name": "x", "options": {}, "indexes": ["n"]},
        {"name": "x", "options": {}, "indexes": [{}]},
        {"name": "x", "options": {}, "indexes": [], "more": 1},
        {"name": "system.views", "options": {}, "indexes": []},
        {"name": "system.js", "options": {}, "indexes": []},
        {"name": "$cmd", "options": {}, "indexes": []},
        {"name": "x\0y", "options": {}, "indexes": []},
        {"name": "x", "options": {"storageEngine": {"wiredTiger": {}}}, "indexes": []},
        {"name": "x", "options": {"$db": "admin"}, "indexes": []},
        {"name": "x", "options": {"validator": {"$where": "1"}}, "indexes": []},
        {"name": "x", "options": {"viewOn": "y", "pipeline": [{"$set": {"n": {"$function": {}}}}]}, "indexes": []},
        {"name": "x", "options": {"create": "y"}, "indexes": []},
    ],
)
async def test_hostile_dump(cluster: Cluster, target: Target, definition: dict[str, Any]) -> None:
    """A collection such as no dump of ours has is refused, and not made."""
    hostile = b"controlplane mongodb 1\nC" + bson.encode(definition)
    with pytest.raises(EngineError) as refused:
        await cluster.engine.restore(target.name, target.password, pieces(hostile))
    assert type(refused.value) is EngineError
    assert (await cluster.engine.contents(target.name)).tables == {}


async def test_hostile_documents(cluster: Cluster, new: Callable[[], Target]) -> None:
    """A document that is no BSON inside, or nested without end, is refused."""
    collection = b"controlplane mongodb 1\nC" + bson.encode({"name": "x", "options": {}, "indexes": []})
    broken = bson.encode({"text": "x"}).replace(b"\2\0\0\0x", b"\xff\xff\xff\x7fx")
    deep = b""
    for _ in range(20_000):
        deep = b"\3n\0" + (len(deep) + 5).to_bytes(4, "little") + deep + b"\0"
    deep = (len(deep) + 5).to_bytes(4, "little") + deep + b"\0"
    for hostile in (collection + b"D" + broken, collection + b"D" + deep, collection + b"C" + deep):
        into = new()
        await cluster.engine.apply(into)
        with pytest.raises(EngineError):
            await cluster.engine.restore(into.name, into.password, pieces(hostile + b"E" + bson.encode({})))


async def test_javascript(cluster: Cluster, target: Target, tenant: Client) -> None:
    """A view that runs JavaScript could not be restored, so the customer learns it when the backup is made."""
    stage = {"$set": {"n": {"$function": {"body": "function() { return 1 }", "args": [], "lang": "js"}}}}
    await tenant[target.name].create_collection("clever", viewOn="notes", pipeline=[stage])
    with pytest.raises(EngineError, match="no JavaScript: take it out of 'clever'"):
        await cluster.engine.contents(target.name)


async def test_endless_dump(cluster: Cluster, target: Target) -> None:
    """A dump that announces a document of two gigabytes is refused before they are in memory."""
    read = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal read
        yield b"controlplane mongodb 1\nD\xff\xff\xff\x7f"
        while read < 2**26:
            read += 2**20
            yield bytes(2**20)

    with pytest.raises(EngineError):
        await cluster.engine.restore(target.name, target.password, endless())
    assert read == 0


async def _open_cursors(admin: Client, target: Target) -> int:
    found = await admin["admin"].command("currentOp")
    return sum(entry["type"] == "idleCursor" and entry["ns"] == f"{target.name}.notes" for entry in found["inprog"])


async def _dump(cluster: Cluster, target: Target) -> tuple[list[bytes], Any]:
    async with cluster.engine.dump(target.name) as dump:
        return [piece async for piece in dump.chunks()], dump.contents()
