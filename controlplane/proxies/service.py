"""The servicer of proxies: rules and queries; one RPC is one transaction, which the interceptor opens and commits."""

import hashlib
import secrets
from functools import partial
from typing import Any

import grpc
from sqlalchemy import bindparam
from sqlalchemy.exc import IntegrityError
from sqlmodel import col, select

from controlplane.access import quota
from controlplane.access.allowlist import checked_networks
from controlplane.api.v1 import proxies_pb2, proxies_pb2_grpc
from controlplane.catalog.model import Catalog
from controlplane.clock import Clock
from controlplane.errors import AlreadyExists, BrokenRule, Conflict, InvalidField, NotFound
from controlplane.hosts.pulls import Pulls
from controlplane.ids import new_id
from controlplane.proxies import placement
from controlplane.proxies.model import PROVISIONING, UPDATING, Proxy, ProxyUsage, sequence_of, to_proto
from controlplane.reconcile.loop import Reconciler
from controlplane.reconcile.model import DELETING
from controlplane.rpc import etag, paging
from controlplane.rpc.call import Call, current
from controlplane.rpc.remembered import remembered
from controlplane.rpc.times import end, end_or_never
from controlplane.sql import Store

Context = grpc.aio.ServicerContext[Any, Any]

_PASSWORD_BYTES = 24
_SALT_BYTES = 16
_MOST_DAYS = 400

_LIST = (
    select(Proxy)
    .where(col(Proxy.account_id) == bindparam("account_id"), col(Proxy.id) > bindparam("after"))
    .order_by(col(Proxy.id))
    .limit(bindparam("limit"))
)
_BY_NAME = select(Proxy).where(col(Proxy.account_id) == bindparam("account_id"), col(Proxy.name) == bindparam("name"))
_USAGE = (
    select(ProxyUsage)
    .where(col(ProxyUsage.proxy_id) == bindparam("proxy_id"))
    .order_by(col(ProxyUsage.day).desc())
    .limit(_MOST_DAYS)
)


class ProxyService(proxies_pb2_grpc.ProxyServiceServicer):
    """SOCKS5 proxies."""

    def __init__(self, *, store: Store, catalog: Catalog, clock: Clock, pulls: Pulls, reconciler: Reconciler) -> None:
        self._store = store
        self._catalog = catalog
        self._clock = clock
        self._pulls = pulls
        self._reconciler = reconciler

    @remembered
    async def ListProxies(
        self, request: proxies_pb2.ListProxiesRequest, context: Context
    ) -> proxies_pb2.ListProxiesResponse:
        """List the account's proxies."""
        call = current()
        rows = await self._store.fetch(_LIST, {"account_id": call.caller.account_id, **paging.bounds(request)})
        page, next_page = paging.cut(rows, request, call)
        return proxies_pb2.ListProxiesResponse(proxies=map(to_proto, page), next_page_token=next_page)

    async def CreateProxy(self, request: proxies_pb2.CreateProxyRequest, context: Context) -> proxies_pb2.Proxy:
        """Order a proxy; this answer shows its password, the only one that does.

        Raises InvalidField, AlreadyExists, QuotaExceeded, or Conflict where no host takes it.
        """
        call, wanted, now = current(), request.proxy, self._clock.now()
        region = wanted.region or self._catalog.default_region
        if not self._catalog.has_region(region):
            raise InvalidField(BrokenRule("region", f"there is no region '{region}': /api/portal/regions lists them"))
        allowed_ips = checked_networks(wanted.allowed_ips)
        expires_at = end(wanted.expires_at, now=now) if wanted.HasField("expires_at") else None
        found = await call.session.execute(_BY_NAME, {"account_id": call.caller.account_id, "name": wanted.name})
        if found.first() is not None:
            raise AlreadyExists("proxy", wanted.name)
        plan, proxy_id = self._catalog.plan(call.caller.plan), new_id("px")
        await quota.charge(
            call.session,
            account_id=call.caller.account_id,
            kind="proxies",
            resource_id=proxy_id,
            limit=plan.quotas.proxies,
        )
        host = await placement.place(call.session, self._clock, region=region)
        password, salt, digest = _new_password()
        proxy = Proxy(
            id=proxy_id,
            account_id=call.caller.account_id,
            state=PROVISIONING,
            generation=0,
            name=wanted.name,
            region=region,
            host_id=host.id,
            address=host.address,
            salt=salt,
            password_digest=digest,
            allowed_ips=allowed_ips,
            max_connections=plan.proxy_connections,
            bytes_per_second=plan.proxy_bytes_per_second,
            expires_at=expires_at,
            created_at=now,
            updated_at=now,
        )
        call.session.add(proxy)
        try:
            await call.session.flush()
        except IntegrityError:
            raise AlreadyExists("proxy", wanted.name) from None
        return await self._ordered(call, proxy, PROVISIONING, password=None if request.validate_only else password)

    @remembered
    async def GetProxy(self, request: proxies_pb2.GetProxyRequest, context: Context) -> proxies_pb2.Proxy:
        """Show one proxy.

        Raises NotFound.
        """
        call = current()
        proxy = await self._read(call, request.name)
        etag.show(call, proxy)
        return to_proto(proxy)

    async def UpdateProxy(self, request: proxies_pb2.UpdateProxyRequest, context: Context) -> proxies_pb2.Proxy:
        """Change what the request names.

        Raises NotFound, Stale, InvalidField, or Conflict while it is being deleted.
        """
        call, change = current(), request.proxy
        proxy = await self._lock_for_change(call, request.name)
        if change.HasField("allowed_ips"):
            proxy.allowed_ips = checked_networks(value.string_value for value in change.allowed_ips.list_value.values)
        if change.HasField("expires_at"):
            proxy.expires_at = end_or_never(change.expires_at, now=self._clock.now())
        return await self._ordered(call, proxy, UPDATING)

    async def DeleteProxy(self, request: proxies_pb2.DeleteProxyRequest, context: Context) -> proxies_pb2.Proxy:
        """Order the proxy away; once more changes nothing.

        Raises NotFound or Stale.
        """
        call = current()
        proxy = await self._lock(call, request.name)
        if proxy.state == DELETING:
            etag.show(call, proxy)
            return to_proto(proxy)
        return await self._ordered(call, proxy, DELETING)

    async def RotateProxyPassword(
        self, request: proxies_pb2.RotateProxyPasswordRequest, context: Context
    ) -> proxies_pb2.Proxy:
        """Decide on a new password; this answer shows it, the only one that does.

        Raises NotFound, Stale, or Conflict while it is being deleted.
        """
        call = current()
        proxy = await self._lock_for_change(call, request.name)
        password, proxy.salt, proxy.password_digest = _new_password()
        return await self._ordered(call, proxy, UPDATING, password=None if request.validate_only else password)

    async def GetProxyUsage(
        self, request: proxies_pb2.GetProxyUsageRequest, context: Context
    ) -> proxies_pb2.ProxyUsage:
        """Show what went through a proxy, day by day.

        Raises NotFound.
        """
        proxy = await self._read(current(), request.name)
        rows = await self._store.fetch(_USAGE, {"proxy_id": proxy.id})
        return proxies_pb2.ProxyUsage(
            days=[
                proxies_pb2.ProxyUsageDay(
                    date=row.day.isoformat(),
                    bytes_up=row.bytes_up,
                    bytes_down=row.bytes_down,
                    connections=row.connections,
                )
                for row in reversed(rows)
            ]
        )

    async def _read(self, call: Call, name: str) -> Proxy:
        rows = await self._store.fetch(_BY_NAME, {"account_id": call.caller.account_id, "name": name})
        if not rows:
            raise NotFound("proxy", name)
        proxy: Proxy = rows[0]
        return proxy

    async def _lock(self, call: Call, name: str) -> Proxy:
        statement = _BY_NAME.with_for_update(key_share=True)
        found = await call.session.execute(statement, {"account_id": call.caller.account_id, "name": name})
        proxy: Proxy | None = found.scalar_one_or_none()
        if proxy is None:
            raise NotFound("proxy", name)
        etag.check_match(call, proxy)
        return proxy

    async def _lock_for_change(self, call: Call, name: str) -> Proxy:
        proxy = await self._lock(call, name)
        if proxy.state == DELETING:
            raise Conflict(f"The proxy '{proxy.name}' is being deleted and cannot be changed any more.")
        plan = self._catalog.plan(call.caller.plan)
        proxy.max_connections, proxy.bytes_per_second = plan.proxy_connections, plan.proxy_bytes_per_second
        return proxy

    async def _ordered(self, call: Call, proxy: Proxy, state: str, *, password: str | None = None) -> proxies_pb2.Proxy:
        """Order the proxy as it is now, and let its host take it over."""
        now, scope = self._clock.now(), sequence_of(proxy.host_id)
        proxy.order_real(state, now=now)
        await proxy.hand_over(call.session, scope, now=now)
        await call.session.flush()
        etag.show(call, proxy)
        call.after_commit.append(partial(self._pulls.announce, scope))
        self._reconciler.take(proxy, call.committed)
        return to_proto(proxy, password=password)


def _new_password() -> tuple[str, bytes, bytes]:
    """Return a new password, a salt, and the digest to know it by.

    One round of SHA-256 is enough for 192 random bits, which nobody tries out; a host checks it at each connection.
    """
    password, salt = secrets.token_urlsafe(_PASSWORD_BYTES), secrets.token_bytes(_SALT_BYTES)
    return password, salt, hashlib.sha256(salt + password.encode()).digest()
