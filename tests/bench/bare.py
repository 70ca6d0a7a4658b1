"""What a database takes without us: what its driver says to the cluster, recorded once, and said again by hand.

It is recorded where the driver calls its library, so it is always what the driver says today. Said again, it has a
connection of its own as it had then; what the driver computes beside it, such as a password's verifier, is ready.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import asyncpg
import httpx2
import pymysql
from pymongo import AsyncMongoClient, WriteConcern
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.asynchronous.database import AsyncDatabase

from tests.bench.clusters import Cluster, new_target

Work = Callable[[], Awaitable[object]]
ForName = Callable[[str], Work]
Client = AsyncMongoClient[dict[str, Any]]


class Differs(Exception):
    """What the statements alone make is not what the driver makes; the message says what differs."""


@dataclass(frozen=True, slots=True)
class _Said:
    """One call of the library, the first of which opens the connection."""

    call: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Place:
    """What a command of MongoDB is said to."""

    database: str
    collection: str = ""
    write_concern: WriteConcern | None = None

    def of(self, client: Client) -> Any:
        """Return it, as a connection has it."""
        database = client[self.database]
        return (
            database.get_collection(self.collection, write_concern=self.write_concern) if self.collection else database
        )


async def record(cluster: Cluster) -> tuple[ForName, ForName]:
    """Have a driver make a database and remove it; return how to do both by hand, to a database of any name.

    Raises Differs if the driver finds something to change in what was made by hand.
    """
    target = new_target()
    make = await _record(cluster.kind, target.name, partial(cluster.engine.apply, target))
    remove = await _record(cluster.kind, target.name, partial(cluster.engine.drop, target.name))
    again = replace(new_target(), password=target.password)
    await make(again.name)()
    differed = await cluster.engine.apply(again)
    await remove(again.name)()
    if differed:
        raise Differs(f"{cluster.title}: the driver changes what was made by hand: {', '.join(differed)}.")
    return make, remove


async def _record(kind: str, name: str, work: Work) -> ForName:
    said: list[_Said] = []
    heard, say = _LIBRARIES[kind]
    with ExitStack() as stack:
        for owner, call in heard:
            stack.enter_context(patch.object(owner, call, _listening(getattr(owner, call), said)))
        await work()

    def for_name(other: str) -> Work:
        rename = partial(_renamed, name=name, other=other)
        return partial(say, [_Said(each.call, rename(each.args), rename(each.kwargs)) for each in said])

    return for_name


def _listening(call: Callable[..., Any], said: list[_Said]) -> Callable[..., Any]:
    def listening(*args: Any, **kwargs: Any) -> Any:
        said.append(_Said(call.__name__, args, kwargs))
        return call(*args, **kwargs)

    return listening


def _renamed(value: Any, name: str, other: str) -> Any:
    if isinstance(value, str):
        return value.replace(name, other)
    if isinstance(value, dict):
        return {key: _renamed(each, name, other) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_renamed(each, name, other) for each in value)
    if isinstance(value, AsyncDatabase):
        return _Place(value.name.replace(name, other))
    if isinstance(value, AsyncCollection):
        return _Place(value.database.name, value.name, value.write_concern)
    return value


async def _say_to_postgresql(said: Sequence[_Said]) -> None:
    connect, *statements = said
    connection = await asyncpg.connect(*connect.args, **connect.kwargs)
    for each in statements:
        await getattr(connection, each.call)(*each.args[1:], **each.kwargs)
    await connection.close()


async def _say_to_mysql(said: Sequence[_Said]) -> None:
    await asyncio.to_thread(_say_to_mysql_at_once, said)


def _say_to_mysql_at_once(said: Sequence[_Said]) -> None:
    connect, _, *statements = said  # the second is `init_command`, which goes with the connection
    with pymysql.connect(*connect.args, **{**connect.kwargs, "defer_connect": False}) as connection:
        for each in statements:
            connection.query(*each.args[1:], **each.kwargs)


async def _say_to_mongodb(said: Sequence[_Said]) -> None:
    connect, *commands = said
    async with Client(*connect.args[1:], **connect.kwargs) as client:
        for each in commands:
            place, *args = each.args
            await getattr(place.of(client), each.call)(*args, **each.kwargs)


async def _say_to_clickhouse(said: Sequence[_Said]) -> None:
    connect, *statements = said
    async with httpx2.AsyncClient(**connect.kwargs) as client:
        for each in statements:
            async with client.stream(*each.args[1:], **each.kwargs) as answer:
                await answer.aread()
                answer.raise_for_status()


# Of each engine: where its driver is listened to, and who says it again.
_LIBRARIES: dict[str, tuple[tuple[tuple[Any, str], ...], Callable[[Sequence[_Said]], Awaitable[None]]]] = {
    "postgresql": (
        (
            (asyncpg, "connect"),
            (asyncpg.Connection, "execute"),
            (asyncpg.Connection, "fetch"),
            (asyncpg.Connection, "fetchrow"),
            (asyncpg.Connection, "fetchval"),
        ),
        _say_to_postgresql,
    ),
    "mysql": (((pymysql, "connect"), (pymysql.Connection, "query")), _say_to_mysql),
    "mongodb": (
        (
            (AsyncMongoClient, "__init__"),
            (AsyncDatabase, "command"),
            (AsyncCollection, "find_one_and_update"),
            (AsyncCollection, "delete_one"),
        ),
        _say_to_mongodb,
    ),
    "clickhouse": (((httpx2.AsyncClient, "__init__"), (httpx2.AsyncClient, "stream")), _say_to_clickhouse),
}
