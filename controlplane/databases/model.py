"""The table of databases, and which states there are."""

from datetime import datetime, timedelta

from sqlalchemy import JSON, Index, UniqueConstraint
from sqlmodel import Field, SQLModel

from controlplane.api.v1 import databases_pb2
from controlplane.reconcile import Reconciled, progress_of
from controlplane.rpc.times import stamp
from controlplane.sql import UtcDateTime

# Each state that is not settled, and how long it may last before the database has failed. Deletion may take forever:
# what is being deleted must never come to rest as anything else.
PROVISIONING = "provisioning"
READY = "ready"
UPDATING = "updating"
DELETING = "deleting"
FAILED = "failed"
DEADLINES: dict[str, timedelta | None] = {
    PROVISIONING: timedelta(hours=1),
    UPDATING: timedelta(hours=1),
    DELETING: None,
}


class Database(Reconciled, table=True):
    """A managed database. On its cluster it is called by its id, never by what the customer typed."""

    __tablename__ = "databases"
    __table_args__ = (
        UniqueConstraint("account_id", "name"),
        Index("ix_databases_list", "account_id", "id"),  # a page costs what it shows, however long the table is
    )

    name: str
    engine: str
    sku: str
    region: str
    cluster_target: str
    tags: dict[str, str] = Field(default_factory=dict, sa_type=JSON)
    deletion_protection: bool = False
    password_sealed: str = Field(repr=False)
    created_at: datetime = Field(sa_type=UtcDateTime)
    updated_at: datetime = Field(sa_type=UtcDateTime)


class ClusterUse(SQLModel, table=True):
    """How many databases a cluster holds."""

    __tablename__ = "cluster_uses"

    cluster: str = Field(primary_key=True)
    used: int = 0


def to_proto(database: Database) -> databases_pb2.Database:
    """Return the database as the API shows it."""
    return databases_pb2.Database(
        id=database.id,
        name=database.name,
        engine=database.engine,
        sku=database.sku,
        status=database.state,
        cluster_target=database.cluster_target,
        region=database.region,
        tags=database.tags,
        deletion_protection=database.deletion_protection,
        created_at=stamp(database.created_at),
        updated_at=stamp(database.updated_at),
        generation=database.generation,
        observed_generation=database.observed_generation,
        progress=progress_of(database),
    )


def password_binding(database: Database) -> str:
    """Return what the sealed password is bound to, so that it opens for this database of this account only."""
    return f"{database.account_id}/{database.id}/password"
