"""How often a credential may ask: an exact sliding window, never more than the limit in any 60 seconds."""

import math
from collections import deque
from dataclasses import dataclass

from controlplane.clock import Clock

WINDOW = 60.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a request may pass; how many more may now; and in how many seconds (rounded up) one more may."""

    allowed: bool
    limit: int
    remaining: int
    reset: int


class RateLimiter:
    """Counts the requests of every credential in this process.

    It keeps the time of every request that passed in the last 60 seconds, which is what makes it exact: a counter per
    minute would let twice the limit pass around the full minute. It goes by the monotonic clock, so a jump of the time
    of day locks nobody out.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._passed: dict[str, deque[float]] = {}
        self._sweep_at = clock.monotonic() + WINDOW

    def hit(self, key: str, limit: int) -> Verdict:
        """Count one request of `key` if it may pass; a refused one does not count."""
        now = self._clock.monotonic()
        if now >= self._sweep_at:
            self._sweep(now)
        passed = self._passed.get(key)
        if passed is None:
            passed = self._passed[key] = deque()
        while passed and passed[0] <= now - WINDOW:
            passed.popleft()
        allowed = len(passed) < limit
        if allowed:
            passed.append(now)
        # Counted from when the oldest of them leaves the window; after a limit was lowered, the one that makes room.
        leaving = passed[max(0, len(passed) - limit)] if passed else now
        return Verdict(
            allowed=allowed,
            limit=limit,
            remaining=max(0, limit - len(passed)),
            reset=max(1, math.ceil(leaving + WINDOW - now)),
        )

    def _sweep(self, now: float) -> None:
        """Forget credentials that have been quiet for a window."""
        self._sweep_at = now + WINDOW
        for key in [key for key, passed in self._passed.items() if not passed or passed[-1] <= now - WINDOW]:
            del self._passed[key]
