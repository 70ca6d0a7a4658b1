"""The one source of time, so that a test can move it."""

import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """What the house asks about time."""

    def now(self) -> datetime:
        """Return the time of day, in UTC: for what is stored or shown."""

    def monotonic(self) -> float:
        """Return seconds that no change of the time of day moves: for intervals."""


class SystemClock:
    """The machine's own clocks."""

    def now(self) -> datetime:
        """Return the time of day, in UTC."""
        return datetime.now(UTC)

    def monotonic(self) -> float:
        """Return seconds since some fixed point."""
        return time.monotonic()
