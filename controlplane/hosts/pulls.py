"""How hosts follow what they are to hold: each asks for what comes after a place, and so says what it holds already."""

import secrets
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import grpc
from sqlalchemy import CursorResult, bindparam, update
from sqlmodel import col, select

from controlplane.clock import Clock
from controlplane.hosts.interceptor import current_host
from controlplane.hosts.model import LIVE_FOR, Host, Hosted, HostSequence
from controlplane.sql import Store
from controlplane.waiting import Waiting

Context = grpc.aio.ServicerContext[Any, Any]
_LONGEST_WAIT = 20  # seconds
_NOTE_EVERY = LIVE_FOR / 3

_HEADS: Any = select(col(HostSequence.scope).label("key"), HostSequence.sequence).where(
    col(HostSequence.scope).in_(bindparam("keys", expanding=True))
)

HostedT = TypeVar("HostedT", bound=Hosted)


class Pulls:
    """The hosts that wait for something to hold, and what their asking tells."""

    def __init__(self, *, store: Store, clock: Clock, wake: Callable[[], None]) -> None:
        self._store = store
        self._clock = clock
        self._wake = wake
        self._waiting = Waiting(store, _HEADS)

    def announce(self, scope: str) -> None:
        """Wake the hosts that follow this sequence; a place of it has been committed."""
        self._waiting.announce(scope)

    def close(self) -> None:
        """Send all waiting hosts away with what there is."""
        self._waiting.close()

    async def start(self, **learned: Any) -> str:
        """Note that the calling host has started and holds nothing yet; return what this start is called."""
        instance = secrets.token_hex(16)
        values = {**learned, "instance": instance, "applied": 0, "last_seen_at": self._clock.now()}
        async with self._store.session() as session:
            await session.execute(update(Host).where(col(Host.id) == current_host().id).values(values))
            await session.commit()
        return instance

    async def check(self, instance: str, context: Context) -> None:
        """Abort with FAILED_PRECONDITION unless this is the calling host's present start, and it asks in time.

        A host that was away for longer has not been waited for, and what is gone by now was never told to it: it must
        begin anew.
        """
        host, now = current_host(), self._clock.now()
        if host.instance != instance or host.last_seen_at is None or host.last_seen_at < now - LIVE_FOR:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "Start anew: you have been away.")

    async def pull(
        self, model: type[HostedT], holds: Any, *, scope: str, after: int, wait: int, most: int
    ) -> Sequence[HostedT]:
        """Note that the calling host holds everything up to a place; return what comes after it, in order.

        That is at most so many rows of those that `holds` selects, and none if nothing has come in `wait` seconds.
        """
        await self._note(model, holds, after)
        rows = select(model).where(holds, col(model.host_sequence) > after).order_by(col(model.host_sequence))

        async def read() -> Sequence[HostedT]:
            return await self._store.fetch(rows.limit(most))

        return await self._waiting.until(scope, read, wait=min(wait, _LONGEST_WAIT))

    async def _note(self, model: type[HostedT], holds: Any, after: int) -> None:
        """Keep what a host holds, and let the rows that waited for that be looked at; nothing if it is known."""
        host, now = current_host(), self._clock.now()
        if after == host.applied and host.last_seen_at is not None and now < host.last_seen_at + _NOTE_EVERY:
            return
        waited = holds, col(model.host_sequence) <= after, col(model.waiting_on).is_not(None)
        async with self._store.session() as session:
            # The start that is noted now, not the one that was read: that may have ended meanwhile.
            noted = update(Host).where(col(Host.id) == host.id, col(Host.instance) == host.instance)
            done = await session.execute(noted.values(applied=after, last_seen_at=now))
            moved = isinstance(done, CursorResult) and bool(done.rowcount) and after != host.applied
            if moved:
                await session.execute(update(model).where(*waited).values(next_attempt_at=now))
            await session.commit()
        if moved:
            self._wake()
