"""What time does to tokens: an old secret's grace ends early, an expired token's place in the quota is free again."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, or_, select

from controlplane.access import quota
from controlplane.access.quota import QuotaCharge
from controlplane.clock import Clock
from controlplane.sql import Store
from controlplane.tokens.model import Token, TokenUse

OUT_OF_USE = timedelta(minutes=5)  # an old secret that nobody has used for so long, while the new one is in use
_AT_A_TIME = 100


async def end_what_is_over(store: Store, clock: Clock) -> None:
    """End the grace of old secrets and release the places of expired tokens, some at a time; repeat it now and then.

    That an old secret or an expired token is refused does not wait for this: each request is held against the time.
    """
    now = clock.now()
    await _end_graces(store, now)
    await _release_places(store, now)


async def _end_graces(store: Store, now: datetime) -> None:
    quiet = now - OUT_OF_USE
    over = (
        select(Token.id)
        .outerjoin(TokenUse, col(TokenUse.token_id) == col(Token.id))
        .where(
            col(Token.previous_digest).is_not(None),
            or_(
                col(Token.previous_until) <= now,
                (col(Token.rotated_at) <= quiet)
                & (col(TokenUse.secret_used_at) > col(Token.rotated_at))
                & (col(TokenUse.previous_used_at).is_(None) | (col(TokenUse.previous_used_at) <= quiet)),
            ),
        )
    )
    if not await store.fetch(over.limit(1)):  # by a read first, so that an idle server writes nothing
        return
    async with store.session() as session:
        for token in await _lock(session, over):
            token.previous_digest = token.previous_prefix = token.previous_until = None
        await session.commit()


async def _release_places(store: Store, now: datetime) -> None:
    expired = (
        select(Token.id)
        .join(QuotaCharge, col(QuotaCharge.resource_id) == col(Token.id))
        .where(col(Token.expires_at) <= now)
    )
    if not await store.fetch(expired.limit(1)):
        return
    async with store.session() as session:
        for token in await _lock(session, expired):
            await quota.release(session, resource_id=token.id)
        await session.commit()


async def _lock(session: AsyncSession, found: Select[Any]) -> Sequence[Token]:
    """Return some of the tokens that are found, locked as every change of a token locks it, the lowest id first.

    They are looked for twice: a statement that waits for a lock still sees the rest as it was before the wait.
    """
    first = found.order_by(col(Token.id)).limit(_AT_A_TIME)
    lock = select(Token.id).where(col(Token.id).in_(first)).order_by(col(Token.id)).with_for_update(key_share=True)
    ids = (await session.scalars(lock)).all()
    return (await session.scalars(select(Token).where(col(Token.id).in_(found.where(col(Token.id).in_(ids)))))).all()
