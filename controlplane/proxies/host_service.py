"""The servicer of the hosts that carry proxies: what each is to let in, and what went through."""

from collections.abc import Sequence
from typing import Any

import grpc
from sqlalchemy import delete, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from controlplane.api.hosts.v1 import hosts_pb2, hosts_pb2_grpc
from controlplane.catalog.model import Catalog
from controlplane.clock import Clock
from controlplane.hosts.interceptor import current_host
from controlplane.hosts.pulls import Pulls
from controlplane.proxies.model import Proxy, ProxyCounter, sequence_of
from controlplane.reconcile.model import DELETING
from controlplane.rpc.times import stamp
from controlplane.sql import Store

Context = grpc.aio.ServicerContext[Any, Any]
_MOST = 500

_ADD = text(
    "INSERT INTO proxy_usage (proxy_id, day, bytes_up, bytes_down, connections)"
    " VALUES (:proxy_id, :day, :bytes_up, :bytes_down, :connections) ON CONFLICT (proxy_id, day) DO UPDATE SET"
    " bytes_up = proxy_usage.bytes_up + excluded.bytes_up, bytes_down = proxy_usage.bytes_down + excluded.bytes_down,"
    " connections = proxy_usage.connections + excluded.connections"
)


class ProxyHostService(hosts_pb2_grpc.ProxyHostServiceServicer):
    """What a host of proxies asks."""

    def __init__(self, *, store: Store, catalog: Catalog, clock: Clock, pulls: Pulls) -> None:
        self._store = store
        self._policy = catalog.proxy_policy
        self._clock = clock
        self._pulls = pulls

    async def StartProxyHost(
        self, request: hosts_pb2.StartProxyHostRequest, context: Context
    ) -> hosts_pb2.StartProxyHostResponse:
        """Begin a host's start: it learns what is refused to everybody."""
        return hosts_pb2.StartProxyHostResponse(
            instance=await self._pulls.start(),
            refused_networks=map(str, self._policy.refused_networks),
            allowed_networks=map(str, self._policy.allowed_networks),
            refused_ports=self._policy.refused_ports,
        )

    async def PullProxies(
        self, request: hosts_pb2.PullProxiesRequest, context: Context
    ) -> hosts_pb2.PullProxiesResponse:
        """Return the proxies of the calling host that have changed after a place."""
        await self._pulls.check(request.instance, context)
        host = current_host()
        rows = await self._pulls.pull(
            Proxy,
            col(Proxy.host_id) == host.id,
            scope=sequence_of(host.id),
            after=request.after,
            wait=request.wait,
            most=_MOST,
        )
        return hosts_pb2.PullProxiesResponse(
            proxies=map(_credential, rows),
            sequence=rows[-1].host_sequence if rows else request.after,
            complete=len(rows) < _MOST,
        )

    async def ReportProxyUsage(
        self, request: hosts_pb2.ReportProxyUsageRequest, context: Context
    ) -> hosts_pb2.ReportProxyUsageResponse:
        """Add up what went through; numbers count from the process's beginning, so a repeated report adds nothing."""
        await self._pulls.check(request.instance, context)
        async with self._store.session() as session:
            counted = {each.id: each for each in request.proxies}
            for proxy_id in await self._present(session, list(counted)):
                await self._add(session, request.process, counted[proxy_id])
            await session.commit()
        return hosts_pb2.ReportProxyUsageResponse()

    async def _present(self, session: AsyncSession, ids: Sequence[str]) -> Sequence[str]:
        """Return those of the proxies that are the calling host's, locked in their order, so that no two deadlock."""
        mine = select(Proxy.id).where(col(Proxy.id).in_(ids), col(Proxy.host_id) == current_host().id)
        return (await session.scalars(mine.order_by(col(Proxy.id)).with_for_update(key_share=True))).all()

    async def _add(self, session: AsyncSession, process: str, counted: hosts_pb2.ProxyTraffic) -> None:
        known = await session.get(ProxyCounter, (counted.id, process))
        if known is None:
            # The counts of earlier processes are added up, and are never asked for again.
            await session.execute(delete(ProxyCounter).where(col(ProxyCounter.proxy_id) == counted.id))
            known = ProxyCounter(proxy_id=counted.id, process=process, bytes_up=0, bytes_down=0, connections=0)
            session.add(known)
        more = {
            name: max(getattr(counted, name) - getattr(known, name), 0)
            for name in ("bytes_up", "bytes_down", "connections")
        }
        for name, number in more.items():
            setattr(known, name, getattr(known, name) + number)
        if any(more.values()):
            await session.execute(_ADD, {"proxy_id": counted.id, "day": self._clock.now().date(), **more})


def _credential(proxy: Proxy) -> hosts_pb2.ProxyCredential:
    if proxy.state == DELETING:
        return hosts_pb2.ProxyCredential(id=proxy.id, removed=True)
    return hosts_pb2.ProxyCredential(
        id=proxy.id,
        username=proxy.id,
        salt=proxy.salt,
        password_digest=proxy.password_digest,
        allowed_ips=proxy.allowed_ips,
        max_connections=proxy.max_connections,
        bytes_per_second=proxy.bytes_per_second,
        expires_at=stamp(proxy.expires_at),
    )
