"""A table whose row takes as long to restore as a test wants."""

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg

from controlplane.local.postgres import EmbeddedPostgres
from tests.stack import eventually

_TABLE = """
CREATE FUNCTION wait(id int) RETURNS bool LANGUAGE plpgsql AS $$
BEGIN
  WHILE EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = {key}) LOOP
    PERFORM pg_sleep(0.02);
  END LOOP;
  RETURN true;
END $$;
CREATE TABLE slow (id int PRIMARY KEY, CHECK (wait(id)));
INSERT INTO slow VALUES (1)
"""


def new_key() -> int:
    """Return a key for an advisory lock."""
    return secrets.randbits(30)


def slow_table(key: int) -> str:
    """Return SQL for a table into which a row goes once nobody holds this key, in whatever database of the cluster."""
    return _TABLE.format(key=key)


@asynccontextmanager
async def held(postgres: EmbeddedPostgres, key: int) -> AsyncIterator[None]:
    """Hold whatever waits for this key."""
    admin = await asyncpg.connect(postgres.admin_dsn)
    await admin.execute(f"SELECT pg_advisory_lock({key})")
    try:
        yield
    finally:
        await admin.close()


async def until_held(postgres: EmbeddedPostgres, name: str) -> None:
    """Wait until a restore into the database of this name has come to the row that waits."""
    admin = await asyncpg.connect(postgres.admin_dsn)
    waiting = "SELECT count(*) > 0 FROM pg_stat_activity WHERE datname = $1 AND wait_event = 'PgSleep'"
    await eventually(lambda: admin.fetchval(waiting, name))
    await admin.close()
