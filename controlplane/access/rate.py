"""How often somebody may ask: an exact sliding window, never more than the limit in any 60 seconds."""

import math
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from controlplane.clock import Clock

WINDOW = 60.0  # seconds


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a request may pass; how many more may now; and in how many seconds (rounded up) one more may."""

    allowed: bool
    limit: int
    remaining: int
    reset: int


class Limiter(Protocol):
    """Counts what happens under a key. `window` is in seconds, and the same for all that is counted under one key."""

    async def hit(
        self, key: str, limit: int, *, window: float = WINDOW, cost: int = 1, fail_closed: bool = False
    ) -> Verdict:
        """Count one request of `key` if it may pass; a refused one does not count. With a cost of 0, only look.

        Counting and deciding are one step. Where the counts are kept elsewhere and do not answer, this process counts
        for itself; or, with `fail_closed`, this raises Unavailable.
        """

    async def forgive(self, key: str) -> None:
        """Take back the newest request of `key`: it was none of those that are limited."""

    async def close(self) -> None:
        """Let go of whatever is held open."""


class LocalLimiter:
    """Counts in the memory of this process.

    It keeps the time of every request that passed in the last window, which is what makes it exact: a counter per
    minute would let twice the limit pass around the full minute. It goes by the monotonic clock, so a jump of the time
    of day locks nobody out.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._passed: dict[str, _Passed] = {}
        self._sweep_at = clock.monotonic() + WINDOW

    async def hit(
        self, key: str, limit: int, *, window: float = WINDOW, cost: int = 1, fail_closed: bool = False
    ) -> Verdict:
        """Count one request of `key` if it may pass; a refused one does not count."""
        del fail_closed  # this memory always answers
        now = self._clock.monotonic()
        if now >= self._sweep_at:
            self._sweep(now)
        passed = self._passed.get(key)
        if passed is None:
            passed = self._passed[key] = _Passed(window)
        passed.forget_until(now - window)
        allowed = len(passed) < limit
        if allowed and cost:
            passed.append(now)
        # Counted from when the oldest of them leaves the window; after a limit was lowered, the one that makes room.
        leaving = passed[max(0, len(passed) - limit)] if passed else now
        return Verdict(
            allowed=allowed,
            limit=limit,
            remaining=max(0, limit - len(passed)),
            reset=max(1, math.ceil(leaving + window - now)),
        )

    async def forgive(self, key: str) -> None:
        """Take back the newest request of `key`."""
        if passed := self._passed.get(key):
            passed.pop()

    async def close(self) -> None:
        """Nothing is held open."""

    def _sweep(self, now: float) -> None:
        """Forget keys that have been quiet for their window."""
        self._sweep_at = now + WINDOW
        for passed in self._passed.values():
            passed.forget_until(now - passed.window)
        self._passed = {key: passed for key, passed in self._passed.items() if passed}


class _Passed(deque[float]):
    """When each request of a key passed, oldest first."""

    def __init__(self, window: float) -> None:
        super().__init__()
        self.window = window

    def forget_until(self, time: float) -> None:
        """Drop those that left the window."""
        while self and self[0] <= time:
            self.popleft()
