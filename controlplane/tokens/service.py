"""The servicer of API tokens. Only a login gets here: the policy in the proto says so."""

from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeAlias

import grpc
from sqlalchemy import Executable, bindparam
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from controlplane.access import quota
from controlplane.access.allowlist import checked_networks
from controlplane.access.permissions import unknown_among
from controlplane.access.secrets import SHOWN_PREFIX, new_token
from controlplane.api.v1 import tokens_pb2, tokens_pb2_grpc
from controlplane.catalog.model import Catalog
from controlplane.clock import Clock
from controlplane.errors import BrokenRule, Conflict, InvalidField, NotFound
from controlplane.ids import new_id
from controlplane.keys import Keys
from controlplane.rpc import etag, paging
from controlplane.rpc.call import Call, current
from controlplane.rpc.times import end, end_or_never
from controlplane.sql import Store
from controlplane.tokens.model import Token, TokenPermission, TokenUse, least_privilege, status_of, to_proto

Context = grpc.aio.ServicerContext[Any, Any]
_Fetch: TypeAlias = Callable[[Executable, Mapping[str, Any]], Awaitable[Sequence[Any]]]

_HIGHEST_RATE = 1_000_000  # the most that a plan can allow; the field takes more than the column does

_LIST = (
    select(Token)
    .where(col(Token.account_id) == bindparam("account_id"), col(Token.id) > bindparam("after"))
    .order_by(col(Token.id))
    .limit(bindparam("limit"))
)
_BY_ID = select(Token).where(col(Token.account_id) == bindparam("account_id"), col(Token.id) == bindparam("id"))
_USES = select(TokenUse).where(col(TokenUse.token_id).in_(bindparam("ids", expanding=True)))
_PERMISSIONS = select(TokenPermission).where(col(TokenPermission.token_id).in_(bindparam("ids", expanding=True)))


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
        uses, used = await _uses_of(self._store.fetch, [row.id for row in page])
        return tokens_pb2.ListTokensResponse(
            tokens=[self._shown(call, row, use=uses.get(row.id), used=used[row.id]) for row in page],
            next_page_token=next_page,
        )

    async def CreateToken(self, request: tokens_pb2.CreateTokenRequest, context: Context) -> tokens_pb2.Token:
        """Make a token; this answer is the only place that ever shows it.

        Raises InvalidField or QuotaExceeded.
        """
        call, wanted, now = current(), request.token, self._clock.now()
        permissions = _checked_permissions(wanted)
        expires_at = end(wanted.expires_at, now=now) if wanted.HasField("expires_at") else None
        allowed_ips = checked_networks(wanted.allowed_ips)
        secret = new_token()
        token = Token(
            id=new_id("tk"),
            account_id=call.caller.account_id,
            name=wanted.name,
            scope=None if permissions else wanted.scope or "full",
            permissions=permissions or None,
            secret_digest=self._keys.digest(secret),
            prefix=secret[:SHOWN_PREFIX],
            allowed_ips=allowed_ips,
            rate_limit_per_minute=min(wanted.rate_limit_per_minute, _HIGHEST_RATE) or None,
            created_at=now,
            expires_at=expires_at,
        )
        await self._charge(call, token)
        call.session.add(token)
        await call.session.flush()
        etag.show(call, token)
        return self._shown(call, token, secret=None if request.validate_only else secret)

    async def GetToken(self, request: tokens_pb2.GetTokenRequest, context: Context) -> tokens_pb2.Token:
        """Show one token, with what it was used for.

        Raises NotFound.
        """
        call = current()
        rows = await self._store.fetch(_BY_ID, {"account_id": call.caller.account_id, "id": request.id})
        if not rows:
            raise NotFound("token", request.id)
        etag.show(call, rows[0])
        return await self._shown_with_uses(call, rows[0], self._store.fetch)

    async def UpdateToken(self, request: tokens_pb2.UpdateTokenRequest, context: Context) -> tokens_pb2.Token:
        """Change what the request names.

        Raises NotFound, Stale, InvalidField, Conflict for a revoked token, or QuotaExceeded for an expired one that is
        to come back where its place has been taken.
        """
        call, change = current(), request.token
        token = await self._lock(call, request.id)
        if token.revoked_at is not None:
            raise Conflict(f"The token '{token.name}' is revoked: create a new one.")
        if change.HasField("name"):
            token.name = change.name
        if change.HasField("allowed_ips"):
            token.allowed_ips = checked_networks(value.string_value for value in change.allowed_ips.list_value.values)
        if change.HasField("expires_at"):
            token.expires_at = end_or_never(change.expires_at, now=self._clock.now())
            await self._charge(call, token)
        token.generation += 1
        await call.session.flush()
        etag.show(call, token)
        return await self._shown_with_uses(call, token, _in(call.session))

    async def RotateToken(self, request: tokens_pb2.RotateTokenRequest, context: Context) -> tokens_pb2.Token:
        """Give a token a new secret; the old one is dead with the commit, or when its grace is over.

        Raises NotFound, Stale, or Conflict for a token that cannot be used any more.
        """
        call, wanted = current(), request.rotation
        token = await self._lock(call, request.id)
        now = self._clock.now()  # not before the lock: until it is there, the old secret goes on being used
        if (status := status_of(token, now)) != "active":
            raise Conflict(f"The token '{token.name}' is {status}: create a new one.")
        uses, used = await _uses_of(_in(call.session), [token.id])
        if wanted.narrow and (least := least_privilege(token, used[token.id])) is not None:
            token.scope = least.scope if least.HasField("scope") else None
            token.permissions = None if least.HasField("scope") else list(least.permissions)
        in_grace = wanted.grace_seconds > 0
        token.previous_digest = token.secret_digest if in_grace else None
        token.previous_prefix = token.prefix if in_grace else None
        token.previous_until = now + timedelta(seconds=wanted.grace_seconds) if in_grace else None
        secret = new_token()
        token.secret_digest = self._keys.digest(secret)
        token.prefix = secret[:SHOWN_PREFIX]
        token.rotated_at = now
        token.generation += 1
        await call.session.flush()
        etag.show(call, token)
        return self._shown(
            call, token, use=uses.get(token.id), used=used[token.id], secret=None if request.validate_only else secret
        )

    async def DeleteToken(self, request: tokens_pb2.DeleteTokenRequest, context: Context) -> tokens_pb2.Token:
        """Revoke a token; once more changes nothing. Its row stays, its place in the quota is free again.

        Raises NotFound or Stale.
        """
        call = current()
        token = await self._lock(call, request.id)
        if token.revoked_at is None:
            token.revoked_at = self._clock.now()
            token.previous_digest = token.previous_prefix = token.previous_until = None
            token.generation += 1
            await quota.release(call.session, resource_id=token.id)
        etag.show(call, token)
        return await self._shown_with_uses(call, token, _in(call.session))

    async def _charge(self, call: Call, token: Token) -> None:
        """Count the token, unless it counts already: an expired one has given its place back."""
        limit = self._catalog.plan(call.caller.plan).quotas.tokens
        await quota.charge(call.session, account_id=token.account_id, kind="tokens", resource_id=token.id, limit=limit)

    async def _lock(self, call: Call, token_id: str) -> Token:
        found = await call.session.execute(
            _BY_ID.with_for_update(key_share=True), {"account_id": call.caller.account_id, "id": token_id}
        )
        token: Token | None = found.scalar_one_or_none()
        if token is None:
            raise NotFound("token", token_id)
        etag.check_match(call, token)
        return token

    async def _shown_with_uses(self, call: Call, token: Token, fetch: _Fetch) -> tokens_pb2.Token:
        uses, used = await _uses_of(fetch, [token.id])
        return self._shown(call, token, use=uses.get(token.id), used=used[token.id])

    def _shown(
        self,
        call: Call,
        token: Token,
        *,
        use: TokenUse | None = None,
        used: frozenset[str] = frozenset(),
        secret: str | None = None,
    ) -> tokens_pb2.Token:
        plan_rate = self._catalog.plan(call.caller.plan).rate_limit_per_minute
        return to_proto(token, now=self._clock.now(), plan_rate=plan_rate, use=use, used=used, secret=secret)


async def _uses_of(fetch: _Fetch, ids: list[str]) -> tuple[dict[str, TokenUse], defaultdict[str, frozenset[str]]]:
    """Return of each token its use, if there was any, and the permissions that it has used."""
    uses = {row.token_id: row for row in await fetch(_USES, {"ids": ids})}
    used = defaultdict[str, frozenset[str]](frozenset)
    for row in await fetch(_PERMISSIONS, {"ids": ids}):
        used[row.token_id] |= {row.permission}
    return uses, used


def _in(session: AsyncSession) -> _Fetch:
    """Return what reads in this transaction.

    A write that took a second connection for it, as Store.fetch does, would stand still for good once as many writes at
    once had each taken their first.
    """

    async def fetch(statement: Executable, parameters: Mapping[str, Any]) -> Sequence[Any]:
        return (await (await session.connection()).execute(statement, parameters)).all()

    return fetch


def _checked_permissions(wanted: tokens_pb2.CreateToken) -> list[str]:
    """Return the permissions wanted, each once.

    Raises InvalidField for permissions beside a scope, and for those that permit nothing.
    """
    if wanted.HasField("permissions") and wanted.HasField("scope"):
        raise InvalidField(BrokenRule("permissions", "a scope is a name for permissions: give the one or the other"))
    permissions = [value.string_value for value in wanted.permissions.values]
    unknown = unknown_among(permissions)
    if unknown:
        raise InvalidField(
            *(
                BrokenRule(f"permissions[{index}]", f"there is no '{each}': /api/openapi has all, as x-permission")
                for index, each in enumerate(permissions)
                if each in unknown
            )
        )
    return sorted(set(permissions))
