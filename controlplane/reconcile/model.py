"""What a row has that wants something, and how it is shown while it waits."""

from datetime import datetime, timedelta

from sqlmodel import Field, SQLModel

from controlplane.api.v1 import progress_pb2
from controlplane.rpc.times import stamp
from controlplane.sql import UtcDateTime

FAILED = "failed"
DELETING = "deleting"  # may take forever: what is being deleted must never come to rest as anything else


class Reconciled(SQLModel):
    """What the reconciler needs of a row.

    `state` is shown to the customer as the status. `generation` counts orders, `observed_generation` is the newest one
    that is real. A row is due once `next_attempt_at` has come and nobody holds its lease: for the next try of what was
    ordered, or, where nothing is waited for, for another look at whether it still is so.
    """

    id: str = Field(primary_key=True)
    account_id: str = Field(foreign_key="accounts.id")
    state: str
    generation: int = 1
    observed_generation: int = 0
    waiting_on: str | None = None
    attempts: int = 0
    last_error: str | None = None
    next_attempt_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    deadline_at: datetime | None = Field(default=None, sa_type=UtcDateTime, index=True)
    lease_token: str | None = None
    lease_until: datetime | None = Field(default=None, sa_type=UtcDateTime)

    def order(self, state: str, *, now: datetime, within: timedelta, waiting_on: str) -> None:
        """Want something new of the row: it is due at once, and has failed unless it is settled `within` this time.

        A deletion never fails: the metrics tell of one that takes longer.
        """
        self.state = state
        self.generation = (self.generation or 0) + 1
        self.waiting_on = waiting_on
        self.attempts = 0
        self.last_error = None
        self.next_attempt_at = now
        self.deadline_at = now + within


def progress_of(row: Reconciled) -> progress_pb2.Progress | None:
    """Return what a row is waiting for as the API shows it, or why it failed; None while all is as ordered."""
    if row.waiting_on is None and row.last_error is None:
        return None
    return progress_pb2.Progress(
        waiting_on=row.waiting_on or "",
        attempts=row.attempts,
        next_attempt_at=stamp(row.next_attempt_at) if row.waiting_on and row.attempts else None,
        last_error=row.last_error,
    )
