"""Which host carries a new proxy: the one with the most room, never beyond its capacity."""

import structlog
from sqlalchemy import CursorResult, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from controlplane.clock import Clock
from controlplane.errors import Conflict
from controlplane.hosts.kinds import PROXIES
from controlplane.hosts.model import LIVE_FOR, Host

_log = structlog.get_logger("placement")

_TAKE = text("UPDATE hosts SET used = used + 1 WHERE id = :id AND used < capacity")
_LEAVE = text("UPDATE hosts SET used = used - 1 WHERE id = :id")


async def place(session: AsyncSession, clock: Clock, *, region: str) -> Host:
    """Choose a host and take a place on it, in the transaction of the create.

    Raises Conflict when there is none, or none with room.
    """
    seen = col(Host.last_seen_at) > clock.now() - LIVE_FOR
    there = select(Host).where(col(Host.kind) == PROXIES, col(Host.region) == region, seen)
    hosts = (await session.scalars(there.order_by(col(Host.used) - col(Host.capacity), col(Host.id)))).all()
    if not hosts:
        raise Conflict(
            f"The region '{region}' takes no proxies right now: /api/portal/regions shows what can be ordered where."
        )
    for host in hosts:
        # The condition decides, not the numbers read above: they may be old by now.
        taken = await session.execute(_TAKE, {"id": host.id})
        if isinstance(taken, CursorResult) and taken.rowcount:
            candidates = {each.name: f"{each.used} of {each.capacity} used" for each in hosts}
            _log.info("placed", host=host.name, region=region, candidates=candidates)
            return host
    raise Conflict(f"The region '{region}' has no room for another proxy right now. Try another region.")


async def leave(session: AsyncSession, host_id: str) -> None:
    """Give a place back, in the transaction that removes the proxy's row."""
    await session.execute(_LEAVE, {"id": host_id})
