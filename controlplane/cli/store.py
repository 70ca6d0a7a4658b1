"""The control plane's own database: its schema brought up to date, or only looked at, for the commands that use it."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from controlplane.cli.settings import read_settings
from controlplane.migrations import head, migrate
from controlplane.operator_error import OperatorError
from controlplane.sql import Store

T = TypeVar("T")


def with_store(work: Callable[[Store], Coroutine[Any, Any, T]]) -> T:
    """Do something with an up-to-date database."""

    async def on_store() -> T:
        store = Store(read_settings().storage_url)
        try:
            await migrate(store)
            return await work(store)
        finally:
            await store.close()

    return asyncio.run(on_store())


async def check_schema(store: Store) -> None:
    """Raise OperatorError unless the schema is up to date, and leave it as it is."""
    try:
        rows = await store.fetch(text("SELECT version_num FROM alembic_version"))
    except DBAPIError as error:
        if "alembic_version" not in str(error.orig):  # there is no such table
            raise
        rows = []
    if [row.version_num for row in rows] != [head()]:
        raise OperatorError("The schema of the database is not up to date: run `controlplane migrate` first.")
