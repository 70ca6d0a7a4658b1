"""The tables of the record, and what its chain is made of."""

import json
from datetime import datetime
from typing import Any

from sqlmodel import Field, SQLModel

from controlplane.api.v1 import audit_pb2
from controlplane.rpc.times import stamp
from controlplane.sql import UtcDateTime

PROVIDER = ""  # whose record has what no account is known for, such as a login with an unknown address


class AuditEntry(SQLModel, table=True):
    """One line. `digest` chains it to the line before; the database itself refuses to change or delete a line.

    There is no foreign key: the record outlives what it speaks of.
    """

    __tablename__ = "audit_entries"

    account_id: str = Field(primary_key=True)
    sequence: int = Field(default=0, primary_key=True)
    created_at: datetime = Field(sa_type=UtcDateTime)
    action: str
    outcome: str
    actor: str
    credential: str | None = None
    ip: str | None = None
    request_id: str | None = None
    target: str | None = None
    target_name: str | None = None
    count: int = 1
    digest: str = ""


class AuditHead(SQLModel, table=True):
    """The last line of an account's record, which whoever adds one locks."""

    __tablename__ = "audit_heads"

    account_id: str = Field(primary_key=True)
    sequence: int
    digest: str = ""


_CHAINED = sorted(name for name in AuditEntry.model_fields if name != "digest")


def chained(entry: AuditEntry, before: str) -> str:
    """Return what the digest of a line is of: the line, in one way of writing it, and the digest before."""
    fields: dict[str, Any] = {name: getattr(entry, name) for name in _CHAINED}
    fields["created_at"] = entry.created_at.isoformat()
    return json.dumps([before, fields], separators=(",", ":"))


def to_proto(entry: AuditEntry) -> audit_pb2.AuditEntry:
    """Return the entry as the API shows it."""
    return audit_pb2.AuditEntry(
        sequence=entry.sequence,
        created_at=stamp(entry.created_at),
        action=entry.action,
        outcome=entry.outcome,
        actor=entry.actor,
        credential=entry.credential,
        ip=entry.ip,
        request_id=entry.request_id,
        target=entry.target,
        target_name=entry.target_name,
        count=entry.count,
    )
