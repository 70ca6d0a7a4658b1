"""Wrong logins are answered ever more slowly."""

from collections import OrderedDict

from controlplane.access.allowlist import network_of
from controlplane.clock import Clock

_MOST_KEPT = 10_000  # of addresses and of names each: whoever makes names up must not fill the memory


class FailedLogins:
    """Counts wrong logins by network address (of IPv6 the /64) and by username, right ones of which are never slowed.

    The first is answered after `first` seconds, each further one after twice as long, at the most after `most`; a
    quarter of an hour without one, and the next is a first one again. An attacker's failures do not slow a customer
    whose password is right: neither the address nor the name is ever locked.
    """

    def __init__(self, clock: Clock, *, first: float = 0.25, most: float = 8.0, forgotten_after: float = 900.0) -> None:
        self._clock = clock
        self._first = first
        self._most = most
        self._forgotten_after = forgotten_after
        # By when they last failed, the longest ago first.
        self._by_address: OrderedDict[str, tuple[int, float]] = OrderedDict()
        self._by_username: OrderedDict[str, tuple[int, float]] = OrderedDict()

    def count(self, address: str, username: str) -> float:
        """Count a wrong login; return how many seconds its answer has to wait."""
        times = max(self._add(self._by_address, network_of(address)), self._add(self._by_username, username))
        return float(min(self._most, self._first * 2 ** min(times - 1, 30)))

    def _add(self, failures: OrderedDict[str, tuple[int, float]], key: str) -> int:
        now = self._clock.monotonic()
        while failures and next(iter(failures.values()))[1] <= now - self._forgotten_after:
            failures.popitem(last=False)
        times = failures.pop(key, (0, now))[0] + 1
        failures[key] = (times, now)
        if len(failures) > _MOST_KEPT:
            failures.popitem(last=False)
        return times
