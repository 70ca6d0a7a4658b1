"""The usual way to build this: FastAPI, SQLModel's async session over aiosqlite, and the `limits` library.

It is a peer of the benchmark and does the same work. Where there was a choice, the cheaper one was made: tables with no
more columns than the answer needs, `limits` without its asyncio wrapper, no access log.
"""

import hmac
import os
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from ipaddress import ip_address, ip_network
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Request, Response, status
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from pydantic import AfterValidator, BaseModel
from sqlalchemy import JSON, Column, String
from sqlalchemy.ext.asyncio import create_async_engine
from sqlmodel import Field, SQLModel, col, select
from sqlmodel.ext.asyncio.session import AsyncSession

TOKEN_KEY = bytes.fromhex(os.environ["TOKEN_KEY"])
PLAN_LIMITS = {"bench": int(os.environ["RATE_LIMIT"])}
POOL = {"pool_size": int(os.environ["POOL_SIZE"]), "max_overflow": 0} if "POOL_SIZE" in os.environ else {}
READERS = {"full", "read", "databases", "functions", "proxies"}


class Account(SQLModel, table=True):
    """A customer's account."""

    __tablename__ = "accounts"

    id: str = Field(primary_key=True)
    plan: str
    disabled_at: datetime | None = None


class Token(SQLModel, table=True):
    """An API token."""

    __tablename__ = "tokens"

    id: str = Field(primary_key=True)
    account_id: str = Field(foreign_key="accounts.id")
    scope: str | None
    secret_digest: str = Field(unique=True)
    allowed_ips: list[str] = Field(default_factory=list, sa_type=JSON)
    rate_limit_per_minute: int | None = None
    expires_at: datetime | None = None
    revoked_at: datetime | None = None


class Database(SQLModel, table=True):
    """A managed database."""

    __tablename__ = "databases"

    id: str = Field(primary_key=True)
    account_id: str = Field(foreign_key="accounts.id")
    name: str
    engine: str
    sku: str
    status: str = Field(sa_column=Column("state", String))
    cluster_target: str
    region: str
    tags: dict[str, str] = Field(default_factory=dict, sa_type=JSON)
    deletion_protection: bool
    created_at: datetime
    updated_at: datetime
    generation: int
    observed_generation: int


UtcTime = Annotated[datetime, AfterValidator(lambda time: time.replace(tzinfo=UTC))]


class DatabaseRead(BaseModel):
    """A managed database as the API shows it."""

    id: str
    name: str
    engine: str
    sku: str
    status: str
    cluster_target: str
    region: str
    tags: dict[str, str]
    deletion_protection: bool
    created_at: UtcTime
    updated_at: UtcTime
    generation: int
    observed_generation: int


app = FastAPI()
engine = create_async_engine(os.environ["DATABASE_URL"], **POOL)
limiter = MovingWindowRateLimiter(MemoryStorage())
bearer = HTTPBearer(auto_error=False)


async def get_session() -> AsyncIterator[AsyncSession]:
    """Give every request a session of its own."""
    async with AsyncSession(engine, expire_on_commit=False) as session:
        yield session


SessionOfRequest = Annotated[AsyncSession, Depends(get_session)]


async def get_token(
    request: Request,
    response: Response,
    session: SessionOfRequest,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
) -> Token:
    """Return the token that the request came with, once it has been counted."""
    token, account = await _find_token(session, credentials)
    client = ip_address(request.client.host if request.client else "")
    if token.allowed_ips and not any(client in ip_network(network) for network in token.allowed_ips):
        raise HTTPException(status.HTTP_403_FORBIDDEN, "This address is not on the token's list.")
    plan_limit = PLAN_LIMITS[account.plan]
    limit = RateLimitItemPerMinute(min(token.rate_limit_per_minute or plan_limit, plan_limit))
    allowed = limiter.hit(limit, token.id)
    window = limiter.get_window_stats(limit, token.id)
    response.headers["RateLimit-Limit"] = str(limit.amount)
    response.headers["RateLimit-Remaining"] = str(window.remaining)
    response.headers["RateLimit-Reset"] = str(max(1, int(window.reset_time - datetime.now(UTC).timestamp())))
    if not allowed:
        raise HTTPException(status.HTTP_429_TOO_MANY_REQUESTS, "Rate limit exceeded.")
    return token


async def get_reader(token: Annotated[Token, Depends(get_token)]) -> Token:
    """Return the token if its scope lets it read databases."""
    if (token.scope or "full") not in READERS:
        raise HTTPException(status.HTTP_403_FORBIDDEN, "The token needs the permission databases:list.")
    return token


@app.get("/api/portal/databases", response_model=list[DatabaseRead])
async def list_databases(session: SessionOfRequest, token: Annotated[Token, Depends(get_reader)]) -> Any:
    """List the account's databases, oldest first."""
    return await _databases(session, token.account_id)


async def _find_token(session: AsyncSession, credentials: HTTPAuthorizationCredentials | None) -> tuple[Token, Account]:
    if credentials is not None:
        digest = f"k1:{hmac.digest(TOKEN_KEY, credentials.credentials.encode(), 'sha256').hex()}"
        found = await session.exec(select(Token, Account).join(Account).where(Token.secret_digest == digest))
        row = found.first()
        if row is not None:
            token, account = row
            expired = token.expires_at is not None and token.expires_at.replace(tzinfo=UTC) <= datetime.now(UTC)
            if token.revoked_at is None and account.disabled_at is None and not expired:
                return token, account
    raise HTTPException(status.HTTP_401_UNAUTHORIZED, "Not authenticated.", {"WWW-Authenticate": "Bearer"})


async def _databases(session: AsyncSession, account_id: str) -> Sequence[Database]:
    found = await session.exec(
        select(Database).where(Database.account_id == account_id).order_by(col(Database.id)).limit(1000)
    )
    return found.all()
