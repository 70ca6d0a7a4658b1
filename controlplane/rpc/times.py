"""Times in messages."""

from datetime import datetime
from typing import cast

from google.protobuf.timestamp_pb2 import Timestamp


def stamp(time: datetime | None) -> Timestamp | None:
    """Return a time in UTC as a message's field takes it.

    Protobuf's runtime takes the datetime as it is, and faster than Python could convert it; only its type stubs do not
    say so.
    """
    return cast("Timestamp | None", time)
