"""The table of browser logins."""

from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import Field, SQLModel, col, select

from controlplane.api.v1 import sessions_pb2
from controlplane.rpc.times import stamp
from controlplane.sql import UtcDateTime

LASTS = timedelta(hours=12)
IDLE = timedelta(hours=2)


class Session(SQLModel, table=True):
    """A browser login. Of the cookie only a keyed digest is kept."""

    __tablename__ = "sessions"

    id: str = Field(primary_key=True)
    account_id: str = Field(foreign_key="accounts.id", index=True)
    secret_digest: str = Field(unique=True, repr=False)
    created_at: datetime = Field(sa_type=UtcDateTime)
    expires_at: datetime = Field(sa_type=UtcDateTime)
    last_used_at: datetime = Field(sa_type=UtcDateTime)
    last_used_ip: str
    user_agent: str = ""


def idle_end(login: Session) -> datetime:
    """Return when a login ends unless it is used before; a row with these columns will do."""
    return min(login.expires_at, login.last_used_at + IDLE)


async def lock_all(session: AsyncSession, account_id: str) -> Sequence[Session]:
    """Return all logins of an account, those that are over too, oldest first, locked until the transaction ends.

    In one order: two transactions that lock several would wait for each other. Whoever also changes the account locks
    that first.
    """
    mine = select(Session).where(col(Session.account_id) == account_id).order_by(col(Session.id))
    return (await session.scalars(mine.with_for_update())).all()


def to_proto(session: Session, *, email: str, current: bool) -> sessions_pb2.Session:
    """Return the login as the API shows it; `current` is whether it is the one that asks."""
    return sessions_pb2.Session(
        id=session.id,
        email=email,
        created_at=stamp(session.created_at),
        expires_at=stamp(session.expires_at),
        idle_expires_at=stamp(idle_end(session)),
        last_used_at=stamp(session.last_used_at),
        last_used_ip=session.last_used_ip,
        user_agent=session.user_agent,
        current=current,
    )
