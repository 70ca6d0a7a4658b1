"""What our databases are called on their clusters, so that we know which of what is there is ours."""

from sqlmodel import Field, SQLModel, select

from controlplane.sql import Store


class Installation(SQLModel, table=True):
    """This control plane; two that share a cluster or a bucket keep their hands off each other's things.

    The one row is made with the table.
    """

    __tablename__ = "installations"

    only: int = Field(primary_key=True)
    id: str


_ID = select(Installation.id)


async def name_of_new(store: Store, database_id: str) -> str:
    """Return the name for a new database: our installation and the database's own 26 characters, 32 altogether."""
    return f"{await prefix_of_ours(store)}{database_id.partition('_')[2]}"


def name_aside(object_name: str, backup_id: str) -> str:
    """Return the name under which a backup is restored to see whether it can be."""
    return f"{object_name.partition('_')[0]}_{backup_id.partition('_')[2]}"


async def prefix_of_ours(store: Store) -> str:
    """Return what the names of this installation begin with."""
    rows = await store.fetch(_ID)
    return f"{rows[0].id}_"
