"""From what a proxy's row wants to what its host has in force, which the host asks for itself."""

from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from controlplane.access import quota
from controlplane.clock import Clock
from controlplane.hosts.model import LIVE_FOR, Host
from controlplane.proxies import placement
from controlplane.proxies.model import EXPIRED, READY, Proxy
from controlplane.reconcile.model import DELETING
from controlplane.reconcile.step import Failed, Gone, NotYet, Outcome, Settled
from controlplane.sql import Store


class ProxyProvisioner:
    """Settles proxies once their host has taken them over, and lets them expire."""

    kind = "proxy"
    model = Proxy
    at_once = 8

    def __init__(self, *, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def step(self, row: Proxy) -> Outcome:
        """Look whether the proxy's host holds it as it is.

        A deletion waits for the host too, however long it is away: it may be carrying traffic all the same. Raises
        NotYet until then.
        """
        hosts = await self._store.fetch(select(Host).where(col(Host.id) == row.host_id))
        if not hosts:  # taken out of service by the operator, with all that it carried
            return Gone() if row.state == DELETING else Failed("Its host was taken out of service: create another.")
        host, now = hosts[0], self._clock.now()
        if host.instance is None or host.applied < row.host_sequence:
            is_away = host.last_seen_at is None or host.last_seen_at < now - LIVE_FOR
            reason = "The host does not answer." if is_away else "The host has not taken it over yet."
            raise NotYet(f"host {host.name}", reason)
        if row.state == DELETING:
            return Gone()
        if row.expires_at is not None and row.expires_at <= now:
            return Settled(EXPIRED)
        return Settled(READY, look_again_at=row.expires_at)

    async def follow_up(self, session: AsyncSession, row: Proxy, outcome: Outcome) -> bool:
        """Give back what a proxy held that is gone."""
        if isinstance(outcome, Gone):
            await quota.release(session, resource_id=row.id)
            await placement.leave(session, row.host_id)
        return False
