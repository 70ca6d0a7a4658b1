"""The servicer of API tokens. Only a login gets here: the policy in the proto says so."""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import grpc
from sqlalchemy import bindparam
from sqlmodel import col, select

from controlplane.access import quota
from controlplane.access.allowlist import parse_network
from controlplane.access.secrets import SHOWN_PREFIX, new_token
from controlplane.api.v1 import tokens_pb2, tokens_pb2_grpc
from controlplane.catalog.model import Catalog
from controlplane.clock import Clock
from controlplane.errors import BrokenRule, Conflict, InvalidField, NotFound
from controlplane.ids import new_id
from controlplane.keys import Keys
from controlplane.rpc import etag, paging
from controlplane.rpc.call import Call, current
from controlplane.sql import Store
from controlplane.tokens.model import Token, status_of, to_proto

Context = grpc.aio.ServicerContext[Any, Any]

_HIGHEST_RATE = 1_000_000  # the most that a plan can allow; the field takes more than the column does

_LIST = (
    select(Token)
    .where(col(Token.account_id) == bindparam("account_id"), col(Token.id) > bindparam("after"))
    .order_by(col(Token.id))
    .limit(bindparam("limit"))
)
_BY_ID = select(Token).where(col(Token.account_id) == bindparam("account_id"), col(Token.id) == bindparam("id"))


class TokenService(tokens_pb2_grpc.TokenServiceServicer):
    """API tokens."""

    def __init__(self, *, store: Store, catalog: Catalog, keys: Keys, clock: Clock) -> None:
        self._store = store
        self._catalog = catalog
        self._keys = keys
        self._clock = clock

    async def ListTokens(
        self, request: tokens_pb2.ListTokensRequest, context: Context
    ) -> tokens_pb2.ListTokensResponse:
        """List the account's tokens, the revoked and expired ones too."""
        call = current()
        rows = await self._store.fetch(_LIST, {"account_id": call.caller.account_id, **paging.bounds(request)})
        page, next_page = paging.cut(rows, request, call)
        return tokens_pb2.ListTokensResponse(tokens=[self._shown(call, row) for row in page], next_page_token=next_page)

    async def CreateToken(self, request: tokens_pb2.CreateTokenRequest, context: Context) -> tokens_pb2.Token:
        """Make a token; this answer is the only place that ever shows it.

        Raises InvalidField or QuotaExceeded.
        """
        call, wanted, now = current(), request.token, self._clock.now()
        expires_at = _end(wanted, now=now)
        allowed_ips = _checked(wanted.allowed_ips)
        plan = self._catalog.plan(call.caller.plan)
        await quota.charge(call.session, account_id=call.caller.account_id, kind="tokens", limit=plan.quotas.tokens)
        secret = new_token()
        token = Token(
            id=new_id("tk"),
            account_id=call.caller.account_id,
            name=wanted.name,
            scope=wanted.scope or "full",
            secret_digest=self._keys.digest(secret),
            prefix=secret[:SHOWN_PREFIX],
            allowed_ips=allowed_ips,
            rate_limit_per_minute=min(wanted.rate_limit_per_minute, _HIGHEST_RATE) or None,
            created_at=now,
            expires_at=expires_at,
        )
        call.session.add(token)
        await call.session.flush()
        etag.show(call, token)
        return self._shown(call, token, secret=None if request.validate_only else secret)

    async def GetToken(self, request: tokens_pb2.GetTokenRequest, context: Context) -> tokens_pb2.Token:
        """Show one token.

        Raises NotFound.
        """
        call = current()
        rows = await self._store.fetch(_BY_ID, {"account_id": call.caller.account_id, "id": request.id})
        if not rows:
            raise NotFound("token", request.id)
        etag.show(call, rows[0])
        return self._shown(call, rows[0])

    async def RotateToken(self, request: tokens_pb2.RotateTokenRequest, context: Context) -> tokens_pb2.Token:
        """Give a token a new secret; the old one is dead with the commit.

        Raises NotFound, Stale, or Conflict for a token that cannot be used any more.
        """
        call, now = current(), self._clock.now()
        token = await self._lock(call, request.id)
        if (status := status_of(token, now)) != "active":
            raise Conflict(f"The token '{token.name}' is {status}: create a new one.")
        secret = new_token()
        token.secret_digest = self._keys.digest(secret)
        token.prefix = secret[:SHOWN_PREFIX]
        token.rotated_at = now
        token.generation += 1
        etag.show(call, token)
        return self._shown(call, token, secret=None if request.validate_only else secret)

    async def DeleteToken(self, request: tokens_pb2.DeleteTokenRequest, context: Context) -> tokens_pb2.Token:
        """Revoke a token; once more changes nothing. Its row stays, its place in the quota is free again.

        Raises NotFound or Stale.
        """
        call = current()
        token = await self._lock(call, request.id)
        if token.revoked_at is None:
            token.revoked_at = self._clock.now()
            token.generation += 1
            await quota.release(call.session, account_id=token.account_id, kind="tokens")
        etag.show(call, token)
        return self._shown(call, token)

    async def _lock(self, call: Call, token_id: str) -> Token:
        found = await call.session.execute(
            _BY_ID.with_for_update(), {"account_id": call.caller.account_id, "id": token_id}
        )
        token: Token | None = found.scalar_one_or_none()
        if token is None:
            raise NotFound("token", token_id)
        etag.check_match(call, token)
        return token

    def _shown(self, call: Call, token: Token, *, secret: str | None = None) -> tokens_pb2.Token:
        plan_rate = self._catalog.plan(call.caller.plan).rate_limit_per_minute
        return to_proto(token, now=self._clock.now(), plan_rate=plan_rate, secret=secret)


def _end(wanted: tokens_pb2.CreateToken, *, now: datetime) -> datetime | None:
    """Return when the token is to expire, if it is.

    Raises InvalidField for a time that has passed, or that no calendar has.
    """
    if not wanted.HasField("expires_at"):
        return None
    try:
        expires_at = wanted.expires_at.ToDatetime(tzinfo=UTC)
    except ValueError:
        raise InvalidField(BrokenRule("expires_at", "must lie between the years 1 and 9999")) from None
    if expires_at <= now:
        raise InvalidField(BrokenRule("expires_at", "must lie in the future"))
    return expires_at


def _checked(texts: Iterable[str]) -> list[str]:
    """Return the addresses and networks as they are kept.

    Raises InvalidField naming every one that is wrong.
    """
    kept, broken = [], []
    for index, text in enumerate(texts):
        try:
            network = parse_network(text)
        except ValueError as error:
            broken.append(BrokenRule(f"allowed_ips[{index}]", str(error)))
        else:
            alone = network.prefixlen == network.max_prefixlen
            kept.append(str(network.network_address if alone else network))
    if broken:
        raise InvalidField(*broken)
    return kept
