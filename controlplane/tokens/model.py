"""The table of API tokens."""

from datetime import datetime

from sqlalchemy import JSON, Index
from sqlmodel import Field, SQLModel

from controlplane.api.v1 import tokens_pb2
from controlplane.rpc.times import stamp
from controlplane.sql import UtcDateTime


class Token(SQLModel, table=True):
    """An API token. Of the secret only a keyed digest is kept, and its first letters to tell tokens apart by.

    `scope` may be missing on tokens from before there were scopes, which counts as `full`. `rate_limit_per_minute` is
    missing where the plan's limit holds.
    """

    __tablename__ = "tokens"
    __table_args__ = (Index("ix_tokens_list", "account_id", "id"),)

    id: str = Field(primary_key=True)
    account_id: str = Field(foreign_key="accounts.id")
    name: str
    scope: str | None
    secret_digest: str = Field(unique=True, repr=False)
    prefix: str
    allowed_ips: list[str] = Field(default_factory=list, sa_type=JSON)
    rate_limit_per_minute: int | None = None
    generation: int = 1
    created_at: datetime = Field(sa_type=UtcDateTime)
    expires_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    rotated_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    revoked_at: datetime | None = Field(default=None, sa_type=UtcDateTime)


def status_of(token: Token, now: datetime) -> str:
    """Return whether the token can be used: `active`, `revoked` or `expired`."""
    if token.revoked_at is not None:
        return "revoked"
    return "expired" if token.expires_at is not None and token.expires_at <= now else "active"


def to_proto(token: Token, *, now: datetime, plan_rate: int, secret: str | None = None) -> tokens_pb2.Token:
    """Return the token as the API shows it; with its secret only where it has just been made."""
    return tokens_pb2.Token(
        id=token.id,
        name=token.name,
        scope=token.scope or "full",
        prefix=token.prefix,
        allowed_ips=token.allowed_ips,
        rate_limit_per_minute=min(token.rate_limit_per_minute or plan_rate, plan_rate),
        status=status_of(token, now),
        created_at=stamp(token.created_at),
        expires_at=stamp(token.expires_at),
        revoked_at=stamp(token.revoked_at),
        rotated_at=stamp(token.rotated_at),
        token=secret,
    )
