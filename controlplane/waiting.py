"""Lets a read wait until there is something to answer with, whoever commits it."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

import structlog

from controlplane.sql import Store

_LOOK_EVERY = 0.25  # seconds; for what other processes commit, as long as somebody here waits

T = TypeVar("T")
_log = structlog.get_logger("waiting")


class Waiting:
    """Those who wait for something new under a key, such as an account's feed.

    `heads` is a SELECT of `key` and `sequence` for the keys in its parameter `keys`: the sequence moves with everything
    that is worth waking for.
    """

    def __init__(self, store: Store, heads: Any) -> None:
        self._store = store
        self._heads = heads
        self._waiters: dict[str, set[asyncio.Event]] = {}
        self._watch: asyncio.Task[None] | None = None
        self._closed = False

    async def until(self, key: str, read: Callable[[], Awaitable[T]], *, wait: float) -> T:
        """Return what `read` does, as soon as that is something, or after so many seconds."""
        found = await read()
        if found or not wait or self._closed:
            return found
        woken = asyncio.Event()
        self._waiters.setdefault(key, set()).add(woken)
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._watch_heads())
        until = asyncio.get_running_loop().time() + wait
        try:
            # Read again now that whatever is committed wakes us: it may have been committed in between.
            while not (found := await read()) and not self._closed:
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(until):
                        await woken.wait()
                if not woken.is_set():
                    break
                woken.clear()
        finally:
            waiters = self._waiters[key]
            waiters.discard(woken)
            if not waiters:
                del self._waiters[key]
        return found

    def announce(self, key: str) -> None:
        """Wake whoever waits in this process for something under this key; it has been committed."""
        for woken in self._waiters.get(key, ()):
            woken.set()

    def close(self) -> None:
        """Send everybody who waits away with what there is."""
        self._closed = True
        for key in self._waiters:
            self.announce(key)
        if self._watch is not None:
            self._watch.cancel()

    async def _watch_heads(self) -> None:
        """Wake whoever waits for something that another process has committed, until nobody waits any more.

        One statement for all of them, and none at all where the store tells by itself that nothing was committed.
        """
        version, heads = None, dict[str, int]()
        while self._waiters:
            try:
                now = self._store.version()
                if now is None or now != version:
                    rows = await self._store.fetch(self._heads, {"keys": list(self._waiters)})
                    for row in rows:
                        if heads.get(row.key) != row.sequence:
                            self.announce(row.key)
                    version, heads = now, {row.key: row.sequence for row in rows}
            except Exception as error:  # noqa: BLE001 - whatever it is, those who wait go on waiting
                _log.error("looking for something new failed; it is tried again", error=repr(error))
            await asyncio.sleep(_LOOK_EVERY)
