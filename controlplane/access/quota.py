"""How much of each thing an account may have: a counter that is moved in the transaction of the create or delete."""

from sqlalchemy import CursorResult, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import Field, SQLModel

from controlplane.errors import QuotaExceeded


class QuotaUse(SQLModel, table=True):
    """How many of one kind an account has."""

    __tablename__ = "quota_uses"

    account_id: str = Field(primary_key=True, foreign_key="accounts.id")
    kind: str = Field(primary_key=True)
    used: int = 0


_OPEN = text("INSERT INTO quota_uses (account_id, kind, used) VALUES (:account_id, :kind, 0) ON CONFLICT DO NOTHING")
# One conditional statement: checking first and adding later let in ten times the limit under 200 parallel creates.
_CHARGE = text(
    "UPDATE quota_uses SET used = used + 1 WHERE account_id = :account_id AND kind = :kind AND used < :limit"
)
_RELEASE = text("UPDATE quota_uses SET used = used - 1 WHERE account_id = :account_id AND kind = :kind")
_USED = text("SELECT used FROM quota_uses WHERE account_id = :account_id AND kind = :kind")


async def charge(session: AsyncSession, *, account_id: str, kind: str, limit: int) -> None:
    """Count one more.

    Raises QuotaExceeded if the account has `limit` already.
    """
    account = {"account_id": account_id, "kind": kind}
    for prepare in (False, True):
        if prepare:
            await session.execute(_OPEN, account)
        result = await session.execute(_CHARGE, {**account, "limit": limit})
        if isinstance(result, CursorResult) and result.rowcount:
            return
    used = (await session.execute(_USED, account)).scalar_one()
    raise QuotaExceeded(kind, limit=limit, used=used)


async def release(session: AsyncSession, *, account_id: str, kind: str) -> None:
    """Count one less; call it in the transaction that removes the row, so that it happens once."""
    await session.execute(_RELEASE, {"account_id": account_id, "kind": kind})
