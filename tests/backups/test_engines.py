"""Backups of the other engines over REST: each comes back whole, as a database of its own, and is verified."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pymysql
import pytest
from google.protobuf.json_format import ParseDict
from pymongo import AsyncMongoClient

from controlplane.api.v1.databases_pb2 import DatabaseConnection
from tests.backups.rest import (
    DATABASES,
    back_up,
    connection_of,
    delete,
    events_of,
    file_of,
    object_name_of,
    order_restore,
    path_of,
    restore,
)
from tests.clusters import Cluster, Refused
from tests.stack import Customer, Stack, eventually

Connection = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Tenant:
    """What the tenant of an engine does: fill a database, look at all that is in it, and change it."""

    sku: str
    fill: Callable[[Connection], Awaitable[None]]
    look: Callable[[Connection], Awaitable[Any]]
    change: Callable[[Connection], Awaitable[None]]


async def _mysql(connection: Connection, *statements: str) -> list[tuple[Any, ...]]:
    def run() -> list[tuple[Any, ...]]:
        names = {"host": connection["host"], "port": connection["port"], "user": connection["username"]}
        password, database = connection["password"], connection["database"]
        with (
            pymysql.connect(**names, password=password, database=database, autocommit=True) as tenant,
            tenant.cursor() as cursor,
        ):
            for statement in statements:
                cursor.execute(statement)
            return list(cursor.fetchall())

    return await asyncio.to_thread(run)


async def _fill_mysql(connection: Connection) -> None:
    await _mysql(
        connection,
        "CREATE TABLE notes (id int AUTO_INCREMENT PRIMARY KEY, text varchar(80) NOT NULL, UNIQUE KEY by_text (text))",
        "INSERT INTO notes (text) SELECT CONCAT('Zoë ', seq) FROM seq_1_to_500",
        "CREATE VIEW few AS SELECT text FROM notes WHERE id < 3",
    )


async def _look_mysql(connection: Connection) -> Any:
    return (
        await _mysql(connection, "SELECT id, text FROM notes ORDER BY id"),
        await _mysql(connection, "SELECT text FROM few ORDER BY text"),
        [row[2] for row in await _mysql(connection, "SHOW INDEX FROM notes")],
        (await _mysql(connection, "SHOW TABLE STATUS LIKE 'notes'"))[0][10],  # what AUTO_INCREMENT gives next
    )


async def _change_mysql(connection: Connection) -> None:
    await _mysql(connection, "INSERT INTO notes (text) VALUES ('too late')", "DROP VIEW few")


async def _fill_mongodb(connection: Connection) -> None:
    async with AsyncMongoClient[dict[str, Any]](connection["uri"], maxPoolSize=1) as tenant:
        database = tenant[connection["database"]]
        await database["notes"].create_index("text", unique=True, name="by_text")
        await database["notes"].insert_many([{"_id": n, "text": f"Zoë {n}", "more": [n, None]} for n in range(500)])
        await database["others"].insert_one({"_id": "alone"})


async def _look_mongodb(connection: Connection) -> Any:
    async with AsyncMongoClient[dict[str, Any]](connection["uri"], maxPoolSize=1) as tenant:
        database = tenant[connection["database"]]
        names = await database.list_collection_names()
        indexes = await database["notes"].index_information()
        return (
            {name: [found async for found in database[name].find().sort("_id")] for name in sorted(names)},
            {name: (index["key"], index.get("unique")) for name, index in indexes.items()},
        )


async def _change_mongodb(connection: Connection) -> None:
    async with AsyncMongoClient[dict[str, Any]](connection["uri"], maxPoolSize=1) as tenant:
        database = tenant[connection["database"]]
        await database["notes"].delete_many({"_id": {"$lt": 100}})
        await database["others"].insert_one({"_id": "too late"})


async def _clickhouse(connection: Connection, sql: str) -> str:
    url = urlsplit(connection["uri"])
    login = httpx2.BasicAuth(connection["username"], connection["password"])
    async with httpx2.AsyncClient(auth=login, timeout=30) as tenant:
        answer = await tenant.post(f"{url.scheme}://{connection['host']}:{connection['port']}", content=sql)
    assert answer.status_code == httpx2.codes.OK, answer.text
    return answer.text


async def _fill_clickhouse(connection: Connection) -> None:
    notes = "CREATE TABLE notes (id UInt32, text String, INDEX by_text text TYPE bloom_filter) ENGINE = MergeTree"
    await _clickhouse(connection, f"{notes} ORDER BY id")
    await _clickhouse(connection, "INSERT INTO notes SELECT number, concat('Zoë ', toString(number)) FROM numbers(500)")
    await _clickhouse(connection, "CREATE VIEW few AS SELECT text FROM notes WHERE id < 3")


async def _look_clickhouse(connection: Connection) -> Any:
    rows = await _clickhouse(connection, "SELECT id, text FROM notes ORDER BY id")
    few = await _clickhouse(connection, "SELECT text FROM few ORDER BY text")
    made = [await _clickhouse(connection, f"SHOW CREATE TABLE {name}") for name in ("notes", "few")]
    return rows, few, [each.replace(connection["database"], "DATABASE") for each in made]


async def _change_clickhouse(connection: Connection) -> None:
    await _clickhouse(connection, "INSERT INTO notes VALUES (1000, 'too late')")
    await _clickhouse(connection, "DROP VIEW few")


TENANTS = {
    "mysql": Tenant("db-s-1vcpu-2gb", _fill_mysql, _look_mysql, _change_mysql),
    "mongodb": Tenant("db-s-1vcpu-2gb", _fill_mongodb, _look_mongodb, _change_mongodb),
    "clickhouse": Tenant("ch-s-1vcpu-2gb", _fill_clickhouse, _look_clickhouse, _change_clickhouse),
}


@pytest.fixture(params=TENANTS)
def engine(request: pytest.FixtureRequest) -> str:
    """Each engine but PostgreSQL in turn."""
    name: str = request.param
    return name


@pytest.fixture
async def filled(engine: str, owner: Customer) -> Connection:
    """The customer's database of this engine, with something of each kind in it."""
    await owner.create_database("analytics", engine=engine, sku=TENANTS[engine].sku)
    connection = await connection_of(owner, "analytics")
    await TENANTS[engine].fill(connection)
    return connection


async def test_everything_comes_back(
    engine: str, owner: Customer, filled: Connection, by_engine: dict[str, Cluster]
) -> None:
    """The new database holds what the old one did when it was backed up, with a user and a password of its own."""
    tenant, cluster = TENANTS[engine], by_engine[engine]
    before = await tenant.look(filled)
    backup = await back_up(owner, "analytics")
    await tenant.change(filled)
    await restore(owner, backup, "copy")
    copy = await connection_of(owner, "copy")
    assert await tenant.look(copy) == before
    assert before[0]
    for one, other in ((filled, copy), (copy, filled)):
        assert one["username"] != other["username"]
        uri = one["uri"].replace(one["password"], other["password"])
        with pytest.raises(Refused):
            await cluster.read(ParseDict({**one, "password": other["password"], "uri": uri}, DatabaseConnection()))
    await tenant.change(copy)  # it is his own: he may write
    await delete(owner, "analytics")
    assert await cluster.driver.names(filled["database"]) == set()
    await delete(owner, "copy")
    assert await cluster.driver.names(copy["database"]) == set()


async def test_a_damaged_backup_is_not_restored(
    engine: str, all_engines: Stack, owner: Customer, filled: Connection, by_engine: dict[str, Cluster]
) -> None:
    """A changed bit is found, the reason is told, nobody gets in, and the deletion leaves nothing."""
    backup = await back_up(owner, "analytics")
    file = file_of(all_engines, filled["database"], backup)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    name = await object_name_of(all_engines, await order_restore(owner, backup, "copy"))
    failed = await owner.until("failed", f"{DATABASES}/copy")
    assert failed["progress"]["last_error"].startswith("The backup cannot be restored: The backup was changed")
    assert (await owner.call("GET", f"{DATABASES}/copy/connection")).status_code == 409
    await delete(owner, "copy")
    assert await by_engine[engine].driver.names(name) == set()


async def test_a_new_backup_is_verified(
    engine: str, owner: Customer, filled: Connection, by_engine: dict[str, Cluster]
) -> None:
    """It is restored aside and compared; that is told, and nothing is left of it on the cluster."""
    backup = await back_up(owner, "analytics")

    async def verified() -> bool:
        return "verified_at" in (await owner.call("GET", path_of(backup))).json()

    await eventually(verified)
    assert [event["resource_id"] for event in await events_of(owner, "backup.verified")] == [backup["id"]]
    aside = f"{filled['database'].partition('_')[0]}_{backup['id'].partition('_')[2]}"
    assert await by_engine[engine].driver.names(aside) == set()
