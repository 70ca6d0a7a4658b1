"""The tables of the feed."""

from datetime import datetime

from sqlmodel import Field, SQLModel

from controlplane.api.v1 import events_pb2
from controlplane.rpc.times import stamp
from controlplane.sql import UtcDateTime


class Event(SQLModel, table=True):
    """Something that happened, at its place in the account's feed.

    There is no foreign key to the account: its check would wait for whoever changes the account, and he for the feed.
    """

    __tablename__ = "events"

    account_id: str = Field(primary_key=True)
    sequence: int = Field(primary_key=True)
    created_at: datetime = Field(sa_type=UtcDateTime, index=True)
    type: str
    resource_id: str
    resource_name: str | None = None
    status: str | None = None
    request_id: str | None = None
    detail: str | None = None


class EventHead(SQLModel, table=True):
    """The last place in an account's feed, which whoever adds an event locks."""

    __tablename__ = "event_heads"

    account_id: str = Field(primary_key=True)
    sequence: int


def to_proto(event: Event) -> events_pb2.Event:
    """Return the event as the API shows it."""
    return events_pb2.Event(
        sequence=event.sequence,
        created_at=stamp(event.created_at),
        type=event.type,
        resource_id=event.resource_id,
        resource_name=event.resource_name,
        status=event.status,
        request_id=event.request_id,
        detail=event.detail,
    )
