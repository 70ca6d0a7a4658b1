"""Times in messages."""

from datetime import UTC, datetime
from typing import overload

from google.protobuf.struct_pb2 import Value
from google.protobuf.timestamp_pb2 import Timestamp

from controlplane.errors import BrokenRule, InvalidField


@overload
def stamp(time: datetime) -> Timestamp: ...
@overload
def stamp(time: None) -> None: ...
@overload
def stamp(time: datetime | None) -> Timestamp | None: ...
def stamp(time: datetime | None) -> Timestamp | None:
    """Return a time as a message's field, to the microsecond.

    By its two numbers: handing protobuf the datetime itself takes twice as long.
    """
    if time is None:
        return None
    return Timestamp(seconds=int(time.timestamp()), nanos=time.microsecond * 1000)


def end(wanted: Timestamp, *, now: datetime) -> datetime:
    """Return when something is to end, as its field `expires_at` says.

    Raises InvalidField for a time that has passed, or that no calendar has.
    """
    try:
        expires_at = wanted.ToDatetime(tzinfo=UTC)
    except ValueError:
        raise InvalidField(BrokenRule("expires_at", "must lie between the years 1 and 9999")) from None
    if expires_at <= now:
        raise InvalidField(BrokenRule("expires_at", "must lie in the future"))
    return expires_at


def end_or_never(wanted: Value, *, now: datetime) -> datetime | None:
    """Return when something is to end, None if never, as a change of `expires_at` says: by a string or null.

    Raises InvalidField.
    """
    if wanted.HasField("null_value"):
        return None
    stamp = Timestamp()
    try:
        stamp.FromJsonString(wanted.string_value)
    except ValueError:
        raise InvalidField(BrokenRule("expires_at", "must be a time such as 2027-01-31T12:00:00Z, or null")) from None
    return end(stamp, now=now)
