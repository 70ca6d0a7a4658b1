"""The tables of API tokens."""

from datetime import datetime

from sqlalchemy import JSON, Index
from sqlmodel import Field, SQLModel

from controlplane.access.permissions import CUSTOM, includes, narrower_scope, permissions_of, reach_of
from controlplane.api.v1 import tokens_pb2
from controlplane.rpc.times import stamp
from controlplane.sql import UtcDateTime


class Token(SQLModel, table=True):
    """An API token. Of the secret only a keyed digest is kept, and its first letters to tell tokens apart by.

    What it may do is in `permissions`, else what `scope` stands for; without either, as on tokens from before there
    were scopes, it is `full`. `rate_limit_per_minute` is missing where the plan's limit holds. `previous_…` is the
    secret from before the last rotation, while it goes on.
    """

    __tablename__ = "tokens"
    __table_args__ = (
        Index("ix_tokens_list", "account_id", "id"),
        Index("ix_tokens_previous_digest", "previous_digest", unique=True),
        Index("ix_tokens_expires_at", "expires_at"),
    )

    id: str = Field(primary_key=True)
    account_id: str = Field(foreign_key="accounts.id")
    name: str
    scope: str | None
    permissions: list[str] | None = Field(default=None, sa_type=JSON(none_as_null=True))
    secret_digest: str = Field(unique=True, repr=False)
    prefix: str
    previous_digest: str | None = Field(default=None, repr=False)
    previous_prefix: str | None = None
    previous_until: datetime | None = Field(default=None, sa_type=UtcDateTime)
    allowed_ips: list[str] = Field(default_factory=list, sa_type=JSON)
    rate_limit_per_minute: int | None = None
    generation: int = 1
    created_at: datetime = Field(sa_type=UtcDateTime)
    expires_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    rotated_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    revoked_at: datetime | None = Field(default=None, sa_type=UtcDateTime)


class TokenUse(SQLModel, table=True):
    """When and from where a token was last used, by which of its two secrets, and how often it was refused."""

    __tablename__ = "token_uses"

    token_id: str = Field(primary_key=True, foreign_key="tokens.id")
    last_used_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    last_used_ip: str | None = None
    secret_used_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    previous_used_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    refused_requests: int = 0
    last_refused_at: datetime | None = Field(default=None, sa_type=UtcDateTime)


class TokenPermission(SQLModel, table=True):
    """A permission that a token has used in its life."""

    __tablename__ = "token_permissions"

    token_id: str = Field(primary_key=True, foreign_key="tokens.id")
    permission: str = Field(primary_key=True)


def status_of(token: Token, now: datetime) -> str:
    """Return whether the token can be used: `active`, `revoked` or `expired`."""
    if token.revoked_at is not None:
        return "revoked"
    return "expired" if token.expires_at is not None and token.expires_at <= now else "active"


def scope_of(token: Token) -> str:
    """Return the name of what the token may do, `custom` if it has none."""
    return token.scope or ("full" if token.permissions is None else CUSTOM)


def held_by(token: Token) -> frozenset[str]:
    """Return the permissions of the token."""
    return permissions_of(token.scope) if token.permissions is None else frozenset(token.permissions)


def least_privilege(token: Token, used: frozenset[str]) -> tokens_pb2.LeastPrivilege | None:
    """Return what would have done for all that was used, or None if that is what the token has, or nothing was used.

    It never permits more than the token: what it used before it was narrowed, or by another meaning of its scope, is
    left out.
    """
    held = held_by(token)
    used &= reach_of(held)
    if not used or includes(used, held):
        return None
    return tokens_pb2.LeastPrivilege(scope=narrower_scope(held, used), permissions=sorted(used))


def to_proto(
    token: Token,
    *,
    now: datetime,
    plan_rate: int,
    use: TokenUse | None = None,
    used: frozenset[str] = frozenset(),
    secret: str | None = None,
) -> tokens_pb2.Token:
    """Return the token as the API shows it; with its secret only where it has just been made."""
    use = use or TokenUse(token_id=token.id)
    shown = tokens_pb2.Token(
        id=token.id,
        name=token.name,
        scope=scope_of(token),
        permissions=sorted(held_by(token)),
        prefix=token.prefix,
        allowed_ips=token.allowed_ips,
        rate_limit_per_minute=min(token.rate_limit_per_minute or plan_rate, plan_rate),
        status=status_of(token, now),
        created_at=stamp(token.created_at),
        expires_at=stamp(token.expires_at),
        revoked_at=stamp(token.revoked_at),
        rotated_at=stamp(token.rotated_at),
        last_used_at=stamp(use.last_used_at),
        last_used_ip=use.last_used_ip,
        refused_requests=use.refused_requests,
        last_refused_at=stamp(use.last_refused_at),
        used_permissions=sorted(used),
        least_privilege=least_privilege(token, used),
        token=secret,
    )
    if token.previous_until is not None and now < token.previous_until and shown.status == "active":
        shown.previous_secret.prefix = token.previous_prefix or ""
        ends = min(token.previous_until, token.expires_at or token.previous_until)
        shown.previous_secret.expires_at.CopyFrom(stamp(ends))
        last = use.previous_used_at
        if last is not None and token.rotated_at is not None and last > token.rotated_at:
            shown.previous_secret.last_used_at.CopyFrom(stamp(last))
    return shown
