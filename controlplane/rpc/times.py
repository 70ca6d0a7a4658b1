"""Times in messages."""

from datetime import datetime
from typing import overload

from google.protobuf.timestamp_pb2 import Timestamp


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
