"""The schema's history: from nothing to what the models say, on both kinds of storage, as often as one likes."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, inspect, text

from controlplane.migrations import migrate
from controlplane.sql import Store
from controlplane.tables import METADATA


@pytest.fixture
async def store(storage_url: str) -> AsyncIterator[Store]:
    """An empty storage."""
    store = Store(storage_url)
    yield store
    await store.close()


def differences(connection: Connection) -> list[Any]:
    """Return what Alembic would change to get from the schema to the models."""
    found: list[Any] = compare_metadata(MigrationContext.configure(connection, opts={"compare_type": True}), METADATA)
    return found


async def test_the_migrations_make_what_the_models_say(store: Store) -> None:
    """From an empty storage the migrations lead to the models' tables, columns, types, keys and indexes."""
    async with store.engine.connect() as connection:
        assert await connection.run_sync(differences)
    await migrate(store)
    async with store.engine.connect() as connection:
        assert await connection.run_sync(differences) == []
        tables = await connection.run_sync(lambda sync: inspect(sync).get_table_names())
    assert set(tables) == {*METADATA.tables, "alembic_version"}


async def test_a_second_time_changes_nothing(store: Store) -> None:
    """To migrate what is up to date leaves the rows alone."""
    await migrate(store)
    async with store.engine.begin() as connection:
        await connection.execute(text("INSERT INTO cluster_uses VALUES ('kept', 7)"))
    await migrate(store)
    assert [(row.cluster, row.used) for row in await store.fetch(text("SELECT * FROM cluster_uses"))] == [("kept", 7)]


async def test_two_at_once_take_turns(store: Store, storage_url: str) -> None:
    """Servers that start together on an empty storage both find it migrated, and none of them fails."""
    program = (
        "import asyncio, sys; from controlplane.migrations import migrate; from controlplane.sql import Store;"
        "asyncio.run(migrate(Store(sys.argv[1])))"
    )
    command = [sys.executable, "-c", program, storage_url]
    racing = [await asyncio.create_subprocess_exec(*command, stderr=subprocess.PIPE) for _ in range(3)]
    ends = [await process.communicate() for process in racing]
    assert [process.returncode for process in racing] == [0, 0, 0], ends
    async with store.engine.connect() as connection:
        assert await connection.run_sync(differences) == []


async def test_a_migration_that_fails_leaves_nothing(store: Store) -> None:
    """A change of the schema is one transaction: what stands in the way is mended, and the next start goes on."""
    async with store.engine.begin() as connection:
        await connection.execute(text("CREATE TABLE backups (in_the_way INTEGER)"))
    with pytest.raises(Exception, match="already exists"):
        await migrate(store)
    async with store.engine.begin() as connection:
        assert await connection.run_sync(lambda sync: inspect(sync).get_table_names()) == ["backups"]
        await connection.execute(text("DROP TABLE backups"))
    await migrate(store)
    async with store.engine.connect() as connection:
        assert await connection.run_sync(differences) == []
