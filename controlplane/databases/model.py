"""The table of databases, and which states there are."""

from datetime import datetime, timedelta

from sqlalchemy import JSON, BigInteger, Index, UniqueConstraint, text
from sqlmodel import Field, SQLModel

from controlplane.api.v1 import databases_pb2
from controlplane.reconcile.due import due_indexes
from controlplane.reconcile.model import DELETING, Reconciled, progress_of
from controlplane.rpc.times import stamp
from controlplane.sql import UtcDateTime

# Each state that is not settled, and how long it may last before the database has failed, or its deletion is late.
PROVISIONING = "provisioning"
RESTORING = "restoring"
READY = "ready"
UPDATING = "updating"
STOPPING = "stopping"
STOPPED = "stopped"
STARTING = "starting"
DELETED = "deleted"  # there for as long as it can be undeleted; to the customer it is gone
DEADLINES = {
    PROVISIONING: timedelta(hours=1),
    RESTORING: timedelta(hours=6),
    UPDATING: timedelta(hours=1),
    STOPPING: timedelta(hours=1),
    STARTING: timedelta(hours=1),
    DELETING: timedelta(hours=1),
}
_ALIVE = text("deleted_at IS NULL")


class Database(Reconciled, table=True):
    """A managed database. On its cluster it is called `object_name`, never by what the customer typed."""

    __tablename__ = "databases"
    __table_args__ = (
        UniqueConstraint("account_id", "name"),
        # A page costs what it shows, however long the table is.
        Index("ix_databases_list", "account_id", "id", sqlite_where=_ALIVE, postgresql_where=_ALIVE),
        Index("ix_databases_former_name", "account_id", "former_name"),
        *due_indexes("databases"),
    )

    name: str
    former_name: str | None = None  # of a deleted one, whose name is free: its own is its id by then
    object_name: str = Field(index=True, unique=True)
    engine: str
    sku: str
    region: str
    cluster_target: str
    tags: dict[str, str] = Field(default_factory=dict, sa_type=JSON)
    deletion_protection: bool = False
    password_sealed: str = Field(repr=False)
    stopped: bool = False
    restored_from: str | None = None
    backup_schedule: str | None = None
    backups_kept: int | None = None
    backup_days_kept: int | None = None
    next_backup_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    size_bytes: int | None = Field(default=None, sa_type=BigInteger)
    connections: int | None = None
    observed_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    undelete_until: datetime | None = Field(default=None, sa_type=UtcDateTime)
    deleted_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    created_at: datetime = Field(sa_type=UtcDateTime)
    updated_at: datetime = Field(sa_type=UtcDateTime)

    def order_real(self, state: str, *, now: datetime) -> None:
        """Want what the row says to be real on its cluster, `state` until it is.

        A database that was never finished goes on being made, whatever is changed about it meanwhile.
        """
        if self.restored_from is not None:
            state = RESTORING
        elif self.observed_generation == 0:
            state = PROVISIONING
        self.order(state, now=now, within=DEADLINES[state], waiting_on=f"cluster {self.cluster_target}")
        self.updated_at = now


class ClusterUse(SQLModel, table=True):
    """How many databases a cluster holds."""

    __tablename__ = "cluster_uses"

    cluster: str = Field(primary_key=True)
    used: int = 0


def to_proto(database: Database) -> databases_pb2.Database:
    """Return the database as the API shows it."""
    return databases_pb2.Database(
        id=database.id,
        name=database.former_name or database.name,
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
        backup_schedule=database.backup_schedule,
        backup_retention=_retention(database),
        next_backup_at=stamp(database.next_backup_at),
        size_bytes=database.size_bytes,
        connections=database.connections,
        observed_at=stamp(database.observed_at),
        undelete_until=stamp(database.undelete_until),
    )


def _retention(database: Database) -> databases_pb2.BackupRetention | None:
    if database.backup_schedule is None:
        return None
    return databases_pb2.BackupRetention(count=database.backups_kept, days=database.backup_days_kept)


def password_binding(database: Database) -> str:
    """Return what the sealed password is bound to, so that it opens for this database of this account only."""
    return f"{database.account_id}/{database.id}/password"
