"""The control plane's own database: its schema brought up to date, or only looked at, for the commands that use it."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import click
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from controlplane.cli.settings import read_settings
from controlplane.house import StartError
from controlplane.migrations import head as newest_revision
from controlplane.migrations import migrate as run_migrations
from controlplane.sql import Store

T = TypeVar("T")


@click.command()
def migrate() -> None:
    """Bring the schema of the database up to date. `up` and `serve` do it as they start."""
    with_store(run_migrations)
    click.echo("The schema is up to date.")


def with_store(work: Callable[[Store], Coroutine[Any, Any, T]]) -> T:
    """Do something with an up-to-date database."""

    async def on_store() -> T:
        store = Store(read_settings().storage_url)
        try:
            await run_migrations(store)
            return await work(store)
        finally:
            await store.close()

    return asyncio.run(on_store())


async def check_schema(store: Store) -> None:
    """Raise StartError unless the schema is up to date, and leave it as it is."""
    try:
        rows = await store.fetch(text("SELECT version_num FROM alembic_version"))
    except DBAPIError as error:
        if "alembic_version" not in str(error.orig):  # there is no such table
            raise
        rows = []
    if [row.version_num for row in rows] != [newest_revision()]:
        raise StartError("The schema of the database is not up to date: run `controlplane migrate` first.")
