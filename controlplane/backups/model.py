"""The table of backups, and which states there are."""

from datetime import datetime, timedelta

from sqlalchemy import BigInteger, Index, bindparam
from sqlmodel import Field, col, select

from controlplane.api.v1 import backups_pb2
from controlplane.databases.model import Database
from controlplane.ids import new_id
from controlplane.reconcile.due import due_indexes
from controlplane.reconcile.model import DELETING, Reconciled, progress_of
from controlplane.rpc.times import stamp
from controlplane.sql import UtcDateTime

RUNNING = "running"
COMPLETED = "completed"
DEADLINE = timedelta(hours=6)
TO_DELETE = timedelta(hours=1)

ON_DEMAND = "on_demand"
SCHEDULED = "scheduled"


class Backup(Reconciled, table=True):
    """A backup of a database; where its files are and what they are bound to, `Identity` says (see `sealed.py`)."""

    __tablename__ = "backups"
    __table_args__ = (Index("ix_backups_list", "database_id", "id"), *due_indexes("backups"))

    database_id: str = Field(foreign_key="databases.id")
    trigger: str
    size_bytes: int | None = Field(default=None, sa_type=BigInteger)
    sha256: str | None = None
    created_at: datetime = Field(sa_type=UtcDateTime)
    completed_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    expires_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    verified_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    verification_error: str | None = None


NEWEST = (
    select(Backup)
    .where(col(Backup.database_id) == bindparam("database_id"), col(Backup.state) == COMPLETED)
    .order_by(col(Backup.id).desc())
    .limit(1)
)


def new_backup(database: Database, *, trigger: str, now: datetime) -> Backup:
    """Return the order of a backup."""
    backup = Backup(
        id=new_id("bk"),
        account_id=database.account_id,
        database_id=database.id,
        trigger=trigger,
        state=RUNNING,
        generation=0,
        created_at=now,
        expires_at=expiry(database, trigger=trigger, created_at=now),
    )
    backup.order(RUNNING, now=now, within=DEADLINE, waiting_on=f"cluster {database.cluster_target}")
    return backup


def expiry(database: Database, *, trigger: str, created_at: datetime) -> datetime | None:
    """Return when a backup of the database expires: a scheduled one by the retention, if that is by days."""
    days = database.backup_days_kept if trigger == SCHEDULED else None
    return created_at + timedelta(days=days) if days else None


def order_deletion(backup: Backup, *, now: datetime) -> None:
    """Want the backup away; once more changes nothing."""
    if backup.state != DELETING:
        backup.order(DELETING, now=now, within=TO_DELETE, waiting_on="its file")


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
        expires_at=stamp(backup.expires_at),
        verified_at=stamp(backup.verified_at),
        verification_error=backup.verification_error,
    )
