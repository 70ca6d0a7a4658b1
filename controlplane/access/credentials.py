"""From what a request carries to who is calling: the token or the session cookie, looked up by its digest."""

from datetime import datetime
from typing import Any

from sqlalchemy import BindParameter, bindparam, or_
from sqlmodel import col, select

from controlplane.access.allowlist import parse_network
from controlplane.access.caller import Caller
from controlplane.access.permissions import EVERYTHING
from controlplane.access.secrets import is_well_formed_token
from controlplane.accounts.model import Account
from controlplane.catalog.model import Catalog
from controlplane.errors import Unauthenticated
from controlplane.keys import Keys
from controlplane.sessions.cookies import find_cookie
from controlplane.sessions.model import Session, idle_end
from controlplane.sql import Remembered, Store
from controlplane.tokens.model import Token, held_by, scope_of

COOKIE = "__Host-htx_session"
_SCHEME = "bearer "
_REMEMBERED = 10_000

_DIGESTS: BindParameter[str] = bindparam("digests", expanding=True)
_OF_TOKEN: tuple[Any, ...] = (
    Token.id,
    Token.account_id,
    Token.scope,
    Token.permissions,
    Token.allowed_ips,
    Token.rate_limit_per_minute,
    Token.expires_at,
    Token.revoked_at,
    Token.previous_until,
    col(Token.secret_digest).not_in(_DIGESTS).label("is_previous"),
    Account.plan,
    Account.disabled_at,
)
_TOKEN = (
    select(*_OF_TOKEN)
    .join(Account, col(Account.id) == col(Token.account_id))
    .where(or_(col(Token.secret_digest).in_(_DIGESTS), col(Token.previous_digest).in_(_DIGESTS)))
)
_OF_SESSION: tuple[Any, ...] = (
    Session.id,
    Session.account_id,
    Session.expires_at,
    Session.last_used_at,
    Account.plan,
    Account.disabled_at,
)
_SESSION = (
    select(*_OF_SESSION)
    .join(Account, col(Account.id) == col(Session.account_id))
    .where(col(Session.secret_digest).in_(_DIGESTS))
)


class Credentials:
    """Finds callers, and remembers them for as long as nothing at all was committed.

    A revocation by any process moves the database's version, so it holds from the very next request. Where there is no
    such version (PostgreSQL), every request looks its credential up.
    """

    def __init__(self, *, store: Store, keys: Keys, catalog: Catalog) -> None:
        self._store = store
        self._keys = keys
        self._catalog = catalog
        self._remembered = Remembered[Caller](store, most=_REMEMBERED)

    async def find_caller(self, metadata: dict[str, str]) -> Caller | None:
        """Return whose credential this is, or None when there is none; whether it holds is the caller's own word.

        Raises Unauthenticated for a credential that is malformed or unknown. A bearer token wins over a cookie.
        """
        authorization = metadata.get("authorization")
        if authorization is not None:
            caller = await self._by_token(authorization)
        else:
            secret = find_cookie(metadata, COOKIE)
            if secret is None:
                return None
            caller = await self._remembered.get(secret, lambda: self._find_session(secret))
        if caller is None:
            raise Unauthenticated
        return caller

    async def _by_token(self, authorization: str) -> Caller | None:
        secret = authorization[len(_SCHEME) :].strip()
        if not authorization.lower().startswith(_SCHEME):
            return None
        return await self._remembered.get(secret, lambda: self._find_token(secret))

    async def _find_token(self, secret: str) -> Caller | None:
        if not is_well_formed_token(secret):
            return None
        rows = await self._store.fetch(_TOKEN, {"digests": self._keys.digests(secret)})
        if not rows:
            return None
        row = rows[0]
        plan_rate = self._catalog.plan(row.plan).rate_limit_per_minute
        return Caller(
            account_id=row.account_id,
            plan=row.plan,
            kind="token",
            credential_id=row.id,
            scope=scope_of(row),
            permissions=held_by(row),
            networks=tuple(parse_network(text) for text in row.allowed_ips),
            rate_limit=min(row.rate_limit_per_minute or plan_rate, plan_rate),
            expires_at=_sooner(row.expires_at, row.previous_until) if row.is_previous else row.expires_at,
            has_ended=row.revoked_at is not None or row.disabled_at is not None,
            is_previous=row.is_previous,
        )

    async def _find_session(self, secret: str) -> Caller | None:
        rows = await self._store.fetch(_SESSION, {"digests": self._keys.digests(secret)})
        if not rows:
            return None
        row = rows[0]
        return Caller(
            account_id=row.account_id,
            plan=row.plan,
            kind="session",
            credential_id=row.id,
            scope="login",
            permissions=frozenset({EVERYTHING}),
            networks=(),
            rate_limit=self._catalog.plan(row.plan).rate_limit_per_minute,
            expires_at=idle_end(row),
            has_ended=row.disabled_at is not None,
        )


def _sooner(one: datetime | None, other: datetime | None) -> datetime | None:
    return min((time for time in (one, other) if time is not None), default=None)
