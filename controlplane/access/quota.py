"""How much of each thing an account may have: charged in the transaction of the create, released in that of the end.

Each charge is a row with the resource's id, so that one resource is charged once and released once, whatever is
repeated; beside them stands a counter, which one conditional statement moves.
"""

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import Field, SQLModel

from controlplane.errors import QuotaExceeded


class QuotaUse(SQLModel, table=True):
    """How many of one kind an account has: as many as it has charges of that kind."""

    __tablename__ = "quota_uses"

    account_id: str = Field(primary_key=True, foreign_key="accounts.id")
    kind: str = Field(primary_key=True)
    used: int = 0


class QuotaCharge(SQLModel, table=True):
    """One resource that counts."""

    __tablename__ = "quota_charges"

    resource_id: str = Field(primary_key=True)
    account_id: str = Field(foreign_key="accounts.id", index=True)
    kind: str


_OPEN = text("INSERT INTO quota_uses (account_id, kind, used) VALUES (:account_id, :kind, 0) ON CONFLICT DO NOTHING")
# One conditional statement: checking first and adding later let in ten times the limit under 200 parallel creates.
_COUNT = text(
    "UPDATE quota_uses SET used = used + 1 WHERE account_id = :account_id AND kind = :kind AND used < :limit"
    " RETURNING used"
)
_CHARGE = text(
    "INSERT INTO quota_charges (resource_id, account_id, kind) VALUES (:resource_id, :account_id, :kind)"
    " ON CONFLICT DO NOTHING RETURNING kind"
)
_RELEASE = text("DELETE FROM quota_charges WHERE resource_id = :resource_id RETURNING account_id, kind")
_UNCOUNT = text("UPDATE quota_uses SET used = used - 1 WHERE account_id = :account_id AND kind = :kind")
_USED = text("SELECT used FROM quota_uses WHERE account_id = :account_id AND kind = :kind")


async def charge(session: AsyncSession, *, account_id: str, kind: str, resource_id: str, limit: int) -> None:
    """Count one more resource, unless it counts already.

    Raises QuotaExceeded if the account has `limit` already; the transaction must not be committed then.
    """
    account = {"account_id": account_id, "kind": kind}
    if (await session.execute(_CHARGE, {**account, "resource_id": resource_id})).first() is None:
        return
    for prepare in (False, True):
        if prepare:
            await session.execute(_OPEN, account)
        if (await session.execute(_COUNT, {**account, "limit": limit})).first() is not None:
            return
    used = (await session.execute(_USED, account)).scalar_one()
    raise QuotaExceeded(kind, limit=limit, used=used)


async def release(session: AsyncSession, *, resource_id: str) -> None:
    """Count the resource no more, if it does; call it in the transaction in which the thing is really gone."""
    released = (await session.execute(_RELEASE, {"resource_id": resource_id})).first()
    if released is not None:
        await session.execute(_UNCOUNT, {"account_id": released.account_id, "kind": released.kind})
