"""The table of backups, and which states there are."""

from datetime import datetime, timedelta

from sqlalchemy import BigInteger, Index
from sqlmodel import Field

from controlplane.api.v1 import backups_pb2
from controlplane.reconcile import Reconciled, progress_of
from controlplane.rpc.times import stamp
from controlplane.sql import UtcDateTime

RUNNING = "running"
COMPLETED = "completed"
DELETING = "deleting"
DEADLINE = timedelta(hours=6)

ON_DEMAND = "on_demand"


class Backup(Reconciled, table=True):
    """A backup of a database; its file is found by the two ids (see `files.py`)."""

    __tablename__ = "backups"
    __table_args__ = (Index("ix_backups_list", "database_id", "id"),)

    database_id: str = Field(foreign_key="databases.id")
    trigger: str
    size_bytes: int | None = Field(default=None, sa_type=BigInteger)
    sha256: str | None = None
    created_at: datetime = Field(sa_type=UtcDateTime)
    completed_at: datetime | None = Field(default=None, sa_type=UtcDateTime)


def order_deletion(backup: Backup, *, now: datetime) -> None:
    """Want the backup away; once more changes nothing."""
    if backup.state != DELETING:
        backup.order(DELETING, now=now, within=None, waiting_on="its file")


def to_proto(backup: Backup, *, database: str) -> backups_pb2.Backup:
    """Return the backup as the API shows it; `database` is the database's name."""
    return backups_pb2.Backup(
        id=backup.id,
        database=database,
        status=backup.state,
        trigger=backup.trigger,
        size_bytes=backup.size_bytes,
        sha256=backup.sha256,
        created_at=stamp(backup.created_at),
        completed_at=stamp(backup.completed_at),
        progress=progress_of(backup),
    )
