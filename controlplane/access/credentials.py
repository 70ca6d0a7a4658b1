"""From what a request carries to who is calling: the token or the session cookie, looked up by its digest."""

from sqlalchemy import bindparam
from sqlmodel import col, select

from controlplane.access.allowlist import parse_network
from controlplane.access.caller import Caller
from controlplane.access.permissions import EVERYTHING, permissions_of
from controlplane.access.secrets import is_well_formed_token
from controlplane.accounts.model import Account
from controlplane.catalog.model import Catalog
from controlplane.clock import Clock
from controlplane.errors import Unauthenticated
from controlplane.keys import Keys
from controlplane.sessions.model import Session
from controlplane.sql import Remembered, Store
from controlplane.tokens.model import Token

COOKIE = "__Host-htx_session"
_SCHEME = "bearer "
_REMEMBERED = 10_000

_TOKEN = (
    select(
        Token.id,
        Token.account_id,
        Token.scope,
        Token.allowed_ips,
        Token.rate_limit_per_minute,
        Token.expires_at,
        Account.plan,
    )  # type: ignore[call-overload]
    .join(Account, col(Account.id) == col(Token.account_id))
    .where(col(Token.secret_digest).in_(bindparam("digests", expanding=True)))
    .where(col(Token.revoked_at).is_(None), col(Account.disabled_at).is_(None))
)
_SESSION = (
    select(Session.id, Session.account_id, Session.expires_at, Account.plan)
    .join(Account, col(Account.id) == col(Session.account_id))
    .where(col(Session.secret_digest).in_(bindparam("digests", expanding=True)))
    .where(col(Account.disabled_at).is_(None))
)


class Credentials:
    """Finds callers, and remembers them for as long as nothing at all was committed.

    A revocation by any process moves the database's version, so it holds from the very next request. Where there is no
    such version (PostgreSQL), every request looks its credential up.
    """

    def __init__(self, *, store: Store, keys: Keys, catalog: Catalog, clock: Clock) -> None:
        self._store = store
        self._keys = keys
        self._catalog = catalog
        self._clock = clock
        self._remembered = Remembered[Caller](store, most=_REMEMBERED)

    async def find_caller(self, metadata: dict[str, str]) -> Caller | None:
        """Return who is calling, or None when nobody says so.

        Raises Unauthenticated for a credential that is malformed, unknown, expired or revoked. A bearer token wins
        over a cookie.
        """
        authorization = metadata.get("authorization")
        if authorization is not None:
            caller = await self._by_token(authorization)
        else:
            secret = _session_secret(metadata.get("cookie"))
            if secret is None:
                return None
            caller = await self._remembered.get(secret, lambda: self._find_session(secret))
        if caller is None or (caller.expires_at is not None and caller.expires_at <= self._clock.now()):
            raise Unauthenticated
        return caller

    async def _by_token(self, authorization: str) -> Caller | None:
        secret = authorization[len(_SCHEME) :].strip()
        if not authorization.lower().startswith(_SCHEME) or not is_well_formed_token(secret):
            return None
        return await self._remembered.get(secret, lambda: self._find_token(secret))

    async def _find_token(self, secret: str) -> Caller | None:
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
            scope=row.scope or "full",
            permissions=permissions_of(row.scope),
            networks=tuple(parse_network(text) for text in row.allowed_ips),
            rate_limit=min(row.rate_limit_per_minute or plan_rate, plan_rate),
            expires_at=row.expires_at,
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
            expires_at=row.expires_at,
        )


def _session_secret(cookies: str | None) -> str | None:
    """Return the session cookie's value; cookies that cannot be read are none."""
    if not cookies or COOKIE not in cookies:
        return None
    for cookie in cookies.split(";"):
        name, _, value = cookie.strip().partition("=")
        if name == COOKIE:
            return value
    return None
