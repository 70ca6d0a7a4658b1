"""The schema's history (Alembic): one file a change, run at the start and by `controlplane migrate`."""

from pathlib import Path

from sqlalchemy import Connection, inspect, text

from controlplane.sql import Store

# Any number that nothing else locks: it keeps two servers that start together from migrating together.
_LOCK = 4_815_162_342
_FOLDER = Path(__file__).parent


async def migrate(store: Store) -> None:
    """Bring the schema up to date, in one transaction; nothing happens if it is."""
    async with store.engine.begin() as connection:
        await connection.run_sync(_upgrade)


def head() -> str:
    """Return the newest revision: the number that the last file of the history begins with."""
    return max(file.name.partition("_")[0] for file in (_FOLDER / "versions").glob("[0-9]*.py"))


def _upgrade(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
    if _revision(connection) == head():
        return
    # Only now: it takes 11 MB that a server whose schema is up to date never needs.
    from alembic import command  # noqa: PLC0415
    from alembic.config import Config  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", str(_FOLDER))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    revision: str | None = connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one_or_none()
    return revision
