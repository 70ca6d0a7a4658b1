"""Adds to the feeds, and wakes those who wait for something new in one.

A place in the feed is taken by moving the account's head, which locks it until the commit. So places are committed in
their order, and a reader who has seen one has seen all before it: none is skipped, none comes twice.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import bindparam, delete, insert, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import SQLModel, col, select

from controlplane.clock import Clock
from controlplane.events.model import Event, EventHead
from controlplane.sql import Store
from controlplane.waiting import Waiting

_KEPT = timedelta(days=90)

_ADVANCE = text(
    "INSERT INTO event_heads (account_id, sequence) VALUES (:account_id, 1)"
    " ON CONFLICT (account_id) DO UPDATE SET sequence = event_heads.sequence + 1 RETURNING sequence"
)
_ADD = insert(SQLModel.metadata.tables["events"])  # a session's way to add a row takes twice as long
_AFTER = (
    select(Event)
    .where(col(Event.account_id) == bindparam("account_id"), col(Event.sequence) > bindparam("after"))
    .order_by(col(Event.sequence))
    .limit(bindparam("limit"))
)
_HEAD = select(EventHead.sequence).where(col(EventHead.account_id) == bindparam("account_id"))
_HEADS: Any = select(col(EventHead.account_id).label("key"), EventHead.sequence).where(
    col(EventHead.account_id).in_(bindparam("keys", expanding=True))
)


class Feed:
    """The feeds of all accounts."""

    def __init__(self, *, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._waiting = Waiting(store, _HEADS)

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
        event = {
            "account_id": account_id,
            "sequence": sequence,
            "created_at": self._clock.now(),
            "type": type_,
            "resource_id": resource_id,
            "resource_name": resource_name,
            "status": status,
            "request_id": request_id,
            "detail": detail,
        }
        await session.execute(_ADD, event)

    async def head(self, account_id: str) -> int:
        """Return the place of the last event, 0 before the first."""
        rows = await self._store.fetch(_HEAD, {"account_id": account_id})
        return int(rows[0].sequence) if rows else 0

    async def read(self, account_id: str, *, after: int, limit: int, wait: float = 0) -> Sequence[Event]:
        """Return the events after a place, oldest first; if there are none, wait for one for so many seconds."""
        parameters = {"account_id": account_id, "after": after, "limit": limit}

        async def read() -> Sequence[Event]:
            return await self._store.fetch(_AFTER, parameters)

        return await self._waiting.until(account_id, read, wait=wait)

    async def forget_old(self) -> None:
        """Remove events that are older than 90 days."""
        async with self._store.session() as session:
            await session.execute(delete(Event).where(col(Event.created_at) < self._clock.now() - _KEPT))
            await session.commit()

    def announce(self, account_id: str) -> None:
        """Wake whoever waits in this process for an event of this account; one has been committed."""
        self._waiting.announce(account_id)

    def close(self) -> None:
        """Send everybody who waits away with what there is."""
        self._waiting.close()
