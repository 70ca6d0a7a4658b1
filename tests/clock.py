"""Clocks that tests move: one that stands still by itself, one that goes on."""

import time
from datetime import UTC, datetime, timedelta


class ManualClock:
    """A clock that stands still between two calls of `advance`."""

    def __init__(self) -> None:
        self._now = datetime(2030, 1, 1, tzinfo=UTC)

    def now(self) -> datetime:
        """Return the time of day, in UTC."""
        return self._now

    def monotonic(self) -> float:
        """Return seconds since 1970."""
        return self._now.timestamp()

    def advance(self, seconds: float) -> None:
        """Let this much time go by."""
        self._now += timedelta(seconds=seconds)


class MovableClock:
    """The machine's clocks, ahead by what the tests have let pass; the time of day can also jump by itself."""

    def __init__(self) -> None:
        self._passed = 0.0
        self._jumped = timedelta()

    def now(self) -> datetime:
        """Return the time of day."""
        return datetime.now(UTC) + timedelta(seconds=self._passed) + self._jumped

    def monotonic(self) -> float:
        """Return seconds since some fixed point."""
        return time.monotonic() + self._passed

    def let_pass(self, **duration: float) -> None:
        """Let time pass, for both clocks."""
        self._passed += timedelta(**duration).total_seconds()

    def jump(self, **duration: float) -> None:
        """Set the time of day forwards or backwards."""
        self._jumped += timedelta(**duration)
