"""The schema's history (Alembic): one file a change, run at the start and by `controlplane migrate`."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, text

from controlplane.sql import Store

# Any number that nothing else locks: it keeps two servers that start together from migrating together.
_LOCK = 4_815_162_342


async def migrate(store: Store) -> None:
    """Bring the schema up to date, in one transaction; nothing happens if it is."""
    async with store.engine.begin() as connection:
        await connection.run_sync(_upgrade)


def _upgrade(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
