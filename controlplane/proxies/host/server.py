"""The listening side: lets clients in to shake hands, a bounded number at a time, and ends what has to end.

A server of our own rather than dante or its like: a credential lives or dies here without a restart, its bytes are
counted, its open connections can be cut, and a destination is checked at the very address that is then connected to.
No server that we know of does all four.
"""

import asyncio
import traceback
from collections import Counter
from collections.abc import Sequence

import structlog
from prometheus_client import CollectorRegistry

from controlplane.access.allowlist import network_of
from controlplane.clock import Clock
from controlplane.proxies.host.credentials import Credentials
from controlplane.proxies.host.destinations import Destinations
from controlplane.proxies.host.incoming import Incoming
from controlplane.proxies.host.logins import FailedLogins
from controlplane.proxies.host.metrics import Metrics
from controlplane.proxies.host.socks import Limits, Socks

_log = structlog.get_logger("proxy")
_BACKLOG = 1024
_LOOK_EVERY = 1.0  # seconds, for what is past its expiry or idle


class ProxyServer:
    """A SOCKS 5 server for the credentials that it is given; they may change at any time."""

    def __init__(
        self,
        *,
        credentials: Credentials,
        destinations: Destinations,
        registry: CollectorRegistry,
        clock: Clock,
        limits: Limits | None = None,
    ) -> None:
        self._credentials = credentials
        self._destinations = destinations
        self._limits = limits or Limits()
        self._metrics = Metrics(registry, credentials)
        self._socks = Socks(
            credentials=credentials,
            destinations=destinations,
            logins=FailedLogins(clock, first=self._limits.first_delay, most=self._limits.most_delay),
            metrics=self._metrics,
            clock=clock,
            limits=self._limits,
        )
        self._listeners: list[asyncio.Server] = []
        self._tasks: dict[Incoming, asyncio.Task[None]] = {}
        self._unfinished: dict[Incoming, str] = {}  # by whom they count for, the oldest first
        self._of_network: Counter[str] = Counter()
        self._timer: asyncio.TimerHandle | None = None

    async def start(self, hosts: Sequence[str], port: int) -> int:
        """Listen on each of these addresses, and return the port; 0 asks for a free one.

        Raises OSError.
        """
        try:
            for host in hosts:
                listener = await self._listen(host, port)
                self._listeners.append(listener)
                port = listener.sockets[0].getsockname()[1]
        except OSError:
            await self.stop()
            raise
        self._look()
        return port

    async def stop(self) -> None:
        """Stop listening, cut every connection, and let the destinations' threads go."""
        for listener in self._listeners:
            listener.close()
        if self._timer is not None:
            self._timer.cancel()
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for listener in self._listeners:
            await listener.wait_closed()
        self._destinations.close()

    async def _listen(self, host: str, port: int) -> asyncio.Server:
        loop = asyncio.get_running_loop()
        return await loop.create_server(lambda: Incoming(self._connected, self._lost), host, port, backlog=_BACKLOG)

    def _connected(self, client: Incoming) -> None:
        network = network_of(str(client.address))
        if self._of_network[network] >= self._limits.handshakes_per_address:
            self._metrics.refused.labels("handshakes").inc()
            client.transport.abort()
            return
        if len(self._unfinished) >= self._limits.handshakes:
            # The oldest goes: an honest client needs a moment only, and is shut out only by somebody faster than that.
            self._metrics.refused.labels("handshakes").inc()
            oldest = next(iter(self._unfinished))
            self._leave(oldest)
            oldest.transport.abort()
        self._unfinished[client] = network
        self._of_network[network] += 1
        task = self._tasks[client] = asyncio.get_running_loop().create_task(self._serve(client))
        task.add_done_callback(lambda _: self._done(client))

    async def _serve(self, client: Incoming) -> None:
        try:
            await self._socks.serve(client, shaken=lambda: self._leave(client))
        except Exception as error:  # noqa: BLE001 - one client's trouble is nobody else's
            # Without its words: they may hold a customer's destination.
            where = traceback.format_list(traceback.extract_tb(error.__traceback__))
            _log.error("connection_failed", error=type(error).__name__, where="".join(where))

    def _done(self, client: Incoming) -> None:
        """Let go of a client; also of one whose task was cancelled before it began."""
        self._leave(client)
        del self._tasks[client]
        client.transport.close()

    def _leave(self, client: Incoming) -> None:
        """Count a client no longer among those that shake hands. Safe to repeat."""
        network = self._unfinished.pop(client, None)
        if network is None:
            return
        self._of_network[network] -= 1
        if not self._of_network[network]:
            del self._of_network[network]

    def _lost(self, client: Incoming) -> None:
        if task := self._tasks.get(client):
            task.cancel()

    def _look(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_LOOK_EVERY, self._look)
        self._credentials.cut_due(self._limits.idle_seconds)
