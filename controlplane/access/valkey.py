"""The rate limit of several server processes together, counted in Valkey, or in Redis from 6.2 on."""

import asyncio
import math
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import structlog
from valkey.asyncio import Valkey
from valkey.asyncio.connection import ConnectionPool, SSLConnection
from valkey.exceptions import ValkeyError

from controlplane.access.rate import WINDOW, LocalLimiter, Verdict
from controlplane.clock import Clock
from controlplane.errors import Unavailable
from controlplane.observe.metrics import Metrics

_PREFIX = "htx:rate:"
_TIMEOUT = 0.25  # seconds in which an answer has to be there, connecting included
_PAUSE = 1.0  # seconds without a try after Valkey has not answered
_CONNECTIONS = 8  # unless the URL says `max_connections`

# A key is a list of when each request passed, in microseconds, oldest first. The time is the server's own, so that the
# clocks of those that ask do not matter.
SCRIPT = """
local key, limit, window, cost = KEYS[1], tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]

local function passed_at(index)
    return tonumber(redis.call('LINDEX', key, index)) or now
end

local function pass()
    redis.call('RPUSH', key, now)
    redis.call('PEXPIRE', key, math.ceil(window / 1000))
end

-- If the clock was set back, what lies in the future counts as made now: nobody waits for longer than a window.
local ahead = 0
while passed_at(-1) > now do
    redis.call('RPOP', key)
    ahead = ahead + 1
end
for _ = 1, ahead do
    pass()
end
while passed_at(0) <= now - window do
    redis.call('LPOP', key)
end

local count = redis.call('LLEN', key)
local allowed = count < limit
if allowed and cost > 0 then
    pass()
    count = count + 1
end
-- Counted from when the oldest of them leaves the window; after a limit was lowered, the one that makes room.
return {allowed and 1 or 0, count, passed_at(math.max(0, count - limit)) + window - now}
"""

_log = structlog.get_logger("limiter")


class ValkeyLimiter:
    """Counts what passed in the last window for all server processes that name the same Valkey.

    `url` is `valkey://`, `valkeys://` (TLS), `redis://`, `rediss://` or `unix://`; anything else is a ValueError. An
    answer that takes longer than `timeout` seconds is none.

    While Valkey does not answer, each process counts for itself: in a window that an outage touches, each may let the
    limit pass, besides what the shared count lets pass before and after. A request whose answer got lost can be in both
    counts, but never twice in one, because nothing is sent again. A Valkey that comes back empty, or evicts keys for
    want of memory, has forgotten what it counted; one whose clock is set forward forgets earlier by that much.
    """

    def __init__(self, url: str, *, clock: Clock, metrics: Metrics, timeout: float = _TIMEOUT) -> None:
        self._clock = clock
        self._metrics = metrics
        self._timeout = timeout
        self._local = LocalLimiter(clock)
        self._pool = _pool(url, timeout)
        self._turns = asyncio.Semaphore(self._pool.max_connections)
        self._client: Any = Valkey(connection_pool=self._pool)  # its types mix up its two kinds of client
        # By its hash; if Valkey does not know it (and so has counted nothing), it is sent and asked for again.
        self._count = self._client.register_script(SCRIPT)
        self._down = False
        self._try_at = 0.0

    async def hit(
        self, key: str, limit: int, *, window: float = WINDOW, cost: int = 1, fail_closed: bool = False
    ) -> Verdict:
        """Count one request of `key` if it may pass, in one round trip. Raises Unavailable only with `fail_closed`."""
        arguments = (limit, round(window * 1_000_000), cost)
        counted = await self._ask(lambda: self._count(keys=[_PREFIX + key], args=arguments))
        if counted is None:
            self._metrics.limiter_fallbacks.inc()
            if fail_closed:
                raise Unavailable
            return await self._local.hit(key, limit, window=window, cost=cost)
        allowed, passed, microseconds = counted
        return Verdict(
            allowed=bool(allowed),
            limit=limit,
            remaining=max(0, limit - passed),
            reset=max(1, math.ceil(microseconds / 1_000_000)),
        )

    async def forgive(self, key: str) -> None:
        """Take back the newest request of `key`, wherever it was counted."""
        await self._ask(lambda: self._client.rpop(_PREFIX + key))
        await self._local.forgive(key)

    async def close(self) -> None:
        """Close the connections."""
        await self._hang_up(in_use=True)

    async def _ask(self, question: Callable[[], Awaitable[Any]]) -> Any:
        """Return Valkey's answer; None if it does not answer, or has not just now."""
        if self._down:
            if self._clock.monotonic() < self._try_at:
                return None
            self._try_at = self._clock.monotonic() + _PAUSE  # one request tries; the others do not wait for it
        try:
            async with asyncio.timeout(self._timeout), self._turns:
                answer = await question()
        except (ValkeyError, OSError) as error:
            self._try_at = self._clock.monotonic() + _PAUSE
            self._tell(down=True, error=f"{type(error).__name__}: {error}")
            await self._hang_up(in_use=False)  # they may all be dead, and each would cost a wait of its own
            return None
        self._tell(down=False)
        return answer

    def _tell(self, *, down: bool, error: str = "") -> None:
        """Tell when it goes down, and when it is back."""
        if down == self._down:
            return
        self._down = down
        self._metrics.limiter_up.set(not down)
        if down:
            _log.error("the shared rate limit does not answer; this process counts for itself", error=error)
        else:
            _log.info("the shared rate limit answers again")

    async def _hang_up(self, *, in_use: bool) -> None:
        with suppress(ValkeyError, OSError):  # a peer that does not take leave is left
            await self._pool.disconnect(inuse_connections=in_use)


def _pool(url: str, timeout: float) -> ConnectionPool:
    # The whole question has one timeout, ours. There are no retries unless the URL asks for them: a script whose answer
    # got lost would count twice.
    pool = ConnectionPool.from_url(
        url, max_connections=_CONNECTIONS, socket_timeout=None, socket_connect_timeout=timeout
    )
    if issubclass(pool.connection_class, SSLConnection):
        # The library takes a trusted certificate of any host.
        pool.connection_kwargs.setdefault("ssl_check_hostname", True)
    return pool
