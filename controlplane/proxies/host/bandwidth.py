"""How many bytes a second: a token bucket, kept as the time until which all that was carried is paid for."""

_BURST = 0.1  # seconds at the full rate that somebody who was quiet has saved up
_TURNS = 20  # a second; the fewer, the longer a small limit keeps one connection waiting for another
_LEAST, _MOST = 1024, 65536  # bytes


class Bandwidth:
    """A limit that all connections of a credential share, both directions together; 0 is none.

    Each connection pays for what it has read and waits before it reads again, so the connections take turns.
    """

    def __init__(self, bytes_per_second: int) -> None:
        self.bytes_per_second = bytes_per_second
        self._paid_until = 0.0

    @property
    def chunk(self) -> int:
        """How many bytes may be read at a time: a small limit wants small turns."""
        if not self.bytes_per_second:
            return _MOST
        return min(_MOST, max(_LEAST, self.bytes_per_second // _TURNS))

    def take(self, count: int, now: float) -> float:
        """Pay for `count` bytes at the time `now`; return in how many seconds more may be read."""
        if not self.bytes_per_second:
            return 0.0
        self._paid_until = max(self._paid_until, now - _BURST) + count / self.bytes_per_second
        return max(0.0, self._paid_until - now)

    def is_spent(self, now: float) -> bool:
        """Tell whether there is nothing left at this time: what cannot wait, such as a datagram, is then dropped."""
        return self.bytes_per_second > 0 and self._paid_until > now
