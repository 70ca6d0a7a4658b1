"""Adds to the feeds, and wakes those who wait for something new in one.

A place in the feed is taken by moving the account's head, which locks it until the commit. So places are committed in
their order, and a reader who has seen one has seen all before it: none is skipped, none comes twice.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta

import structlog
from sqlalchemy import bindparam, delete, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from controlplane.clock import Clock
from controlplane.events.model import Event, EventHead
from controlplane.sql import Store

_KEPT = timedelta(days=90)
_LOOK_EVERY = 0.25  # seconds; for events of other processes, as long as somebody here waits

_ADVANCE = text(
    "INSERT INTO event_heads (account_id, sequence) VALUES (:account_id, 1)"
    " ON CONFLICT (account_id) DO UPDATE SET sequence = event_heads.sequence + 1 RETURNING sequence"
)
_AFTER = (
    select(Event)
    .where(col(Event.account_id) == bindparam("account_id"), col(Event.sequence) > bindparam("after"))
    .order_by(col(Event.sequence))
    .limit(bindparam("limit"))
)
_HEAD = select(EventHead.sequence).where(col(EventHead.account_id) == bindparam("account_id"))
_HEADS = select(EventHead.account_id, EventHead.sequence).where(
    col(EventHead.account_id).in_(bindparam("accounts", expanding=True))
)

_log = structlog.get_logger("events")


class Feed:
    """The feeds of all accounts."""

    def __init__(self, *, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._waiters: dict[str, set[asyncio.Event]] = {}
        self._watch: asyncio.Task[None] | None = None
        self._closed = False

    async def append(
        self,
        session: AsyncSession,
        *,
        account_id: str,
        type_: str,
        resource_id: str,
        resource_name: str | None = None,
        status: str | None = None,
        request_id: str | None = None,
        detail: str | None = None,
    ) -> None:
        """Add an event, in the transaction of what it tells and as its last step: the feed is locked from here on."""
        sequence = (await session.execute(_ADVANCE, {"account_id": account_id})).scalar_one()
        session.add(
            Event(
                account_id=account_id,
                sequence=sequence,
                created_at=self._clock.now(),
                type=type_,
                resource_id=resource_id,
                resource_name=resource_name,
                status=status,
                request_id=request_id,
                detail=detail,
            )
        )
        await session.flush()

    async def head(self, account_id: str) -> int:
        """Return the place of the last event, 0 before the first."""
        rows = await self._store.fetch(_HEAD, {"account_id": account_id})
        return int(rows[0].sequence) if rows else 0

    async def read(self, account_id: str, *, after: int, limit: int, wait: float = 0) -> Sequence[Event]:
        """Return the events after a place, oldest first; if there are none, wait for one for so many seconds."""
        parameters = {"account_id": account_id, "after": after, "limit": limit}
        events: Sequence[Event] = await self._store.fetch(_AFTER, parameters)
        if events or not wait or self._closed:
            return events
        woken = asyncio.Event()
        self._waiters.setdefault(account_id, set()).add(woken)
        self._start_watching()
        until = asyncio.get_running_loop().time() + wait
        try:
            # Read again now that whatever is committed wakes us: it may have been committed in between.
            while not (events := await self._store.fetch(_AFTER, parameters)) and not self._closed:
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(until):
                        await woken.wait()
                if not woken.is_set():
                    break
                woken.clear()
        finally:
            waiters = self._waiters[account_id]
            waiters.discard(woken)
            if not waiters:
                del self._waiters[account_id]
        return events

    async def forget_old(self) -> None:
        """Remove events that are older than 90 days."""
        async with self._store.session() as session:
            await session.execute(delete(Event).where(col(Event.created_at) < self._clock.now() - _KEPT))
            await session.commit()

    def announce(self, account_id: str) -> None:
        """Wake whoever waits in this process for an event of this account; one has been committed."""
        for woken in self._waiters.get(account_id, ()):
            woken.set()

    def close(self) -> None:
        """Send everybody who waits away with what there is."""
        self._closed = True
        for account_id in self._waiters:
            self.announce(account_id)
        if self._watch is not None:
            self._watch.cancel()

    def _start_watching(self) -> None:
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._watch_heads())

    async def _watch_heads(self) -> None:
        """Wake whoever waits for an event that another process has committed, until nobody waits any more.

        One statement for all of them, and none at all where the store tells by itself that nothing was committed.
        """
        version, heads = None, dict[str, int]()
        while self._waiters:
            try:
                now = self._store.version()
                if now is None or now != version:
                    rows = await self._store.fetch(_HEADS, {"accounts": list(self._waiters)})
                    for row in rows:
                        if heads.get(row.account_id) != row.sequence:
                            self.announce(row.account_id)
                    version, heads = now, {row.account_id: row.sequence for row in rows}
            except Exception as error:  # noqa: BLE001 - whatever it is, those who wait go on waiting
                _log.error("looking for events failed; it is tried again", error=repr(error))
            await asyncio.sleep(_LOOK_EVERY)
