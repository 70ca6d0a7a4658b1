"""`controlplane proxy-host`: a process that carries proxies, and follows what the control plane wants of it."""

import asyncio
import secrets
import signal
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC
from ipaddress import ip_network

import grpc
import structlog
from prometheus_client import CollectorRegistry, start_http_server

from controlplane.api.hosts.v1 import hosts_pb2, hosts_pb2_grpc
from controlplane.clock import SystemClock
from controlplane.hosts.link import Link, LinkError
from controlplane.proxies.host.credentials import Credential, Credentials, Usage
from controlplane.proxies.host.destinations import Destinations
from controlplane.proxies.host.server import ProxyServer

_REPORT_EVERY = 1.0  # seconds; as much is not charged if the process is killed
_WAIT = 5
_SECONDS_TO_ANSWER = 10.0

_log = structlog.get_logger("proxies")


@dataclass(frozen=True, slots=True)
class ProxyHostSettings:
    """What a host must know: the control plane's address, its own secret, and where it listens."""

    server: str
    secret: str
    hosts: tuple[str, ...]
    port: int
    metrics_port: int


class ProxyHost:
    """One process of proxies. It keeps nothing: at its start it asks for all that it is to let in."""

    def __init__(self, settings: ProxyHostSettings) -> None:
        self._settings = settings
        self._link = Link(settings.server, settings.secret)
        self._stub = hosts_pb2_grpc.ProxyHostServiceStub(self._link.channel)
        self._clock = SystemClock()
        self._registry = CollectorRegistry()
        self._credentials = Credentials(self._clock)
        self._server: ProxyServer | None = None
        self._process = secrets.token_hex(16)
        self._instance = ""
        self._unnamed: set[str] | None = None  # held from before, and not named by the control plane since it was asked
        self._removed: set[str] = set()  # to be forgotten once the last that they carried is reported
        self._reported: dict[str, Usage] = {}

    async def run(self) -> None:
        """Carry proxies until cancelled; report the last of what went through.

        Raises LinkError if the control plane does not want this host, or its port is taken.
        """
        metrics, _ = start_http_server(self._settings.metrics_port, addr="127.0.0.1", registry=self._registry)
        reports = asyncio.create_task(self._keep_reporting())
        try:
            await self._link.follow(self._start, self._pull)
        finally:
            reports.cancel()
            if self._server is not None:
                await self._server.stop()
            with suppress(grpc.aio.AioRpcError):
                await self._report()
            await self._link.close()
            metrics.shutdown()
            metrics.server_close()

    async def _start(self) -> None:
        request = hosts_pb2.StartProxyHostRequest()
        answer = await self._stub.StartProxyHost(request, metadata=self._link.metadata, timeout=_SECONDS_TO_ANSWER)
        self._instance = answer.instance
        self._unnamed = set(self._credentials.usage()) - self._removed
        if self._server is None:
            self._server = await self._listen(answer)

    async def _listen(self, policy: hosts_pb2.StartProxyHostResponse) -> ProxyServer:
        server = ProxyServer(
            credentials=self._credentials,
            destinations=Destinations(
                refused_networks=map(ip_network, policy.refused_networks),
                allowed_networks=map(ip_network, policy.allowed_networks),
                refused_ports=list(policy.refused_ports),
            ),
            clock=self._clock,
            registry=self._registry,
        )
        try:
            await server.start(self._settings.hosts, self._settings.port)
        except OSError as error:
            raise LinkError(
                f"Port {self._settings.port} cannot be used ({error.strerror}): set HTX_PROXY_PORT to another."
            ) from None
        _log.info("listening", hosts=self._settings.hosts, port=self._settings.port)
        return server

    async def _pull(self, after: int) -> int:
        """Put in force what has changed after a place; asking for what comes after the next says that it is."""
        # All of a first time at once: what is not among it has gone.
        wait = _WAIT if self._unnamed is None else 0
        answer = await self._stub.PullProxies(
            hosts_pb2.PullProxiesRequest(instance=self._instance, after=after, wait=wait),
            metadata=self._link.metadata,
            timeout=wait + _SECONDS_TO_ANSWER,
        )
        for wanted in answer.proxies:
            if wanted.removed:
                self._remove([wanted.id])
            else:
                self._credentials.put(_credential(wanted))
                self._removed.discard(wanted.id)
            if self._unnamed is not None:
                self._unnamed.discard(wanted.id)
        if self._unnamed is not None and answer.complete:
            self._remove(self._unnamed)
            self._unnamed = None
        return int(answer.sequence)

    def _remove(self, ids: Iterable[str]) -> None:
        for credential_id in ids:
            self._credentials.remove(credential_id)
            self._removed.add(credential_id)

    async def _keep_reporting(self) -> None:
        while True:
            await asyncio.sleep(_REPORT_EVERY)
            try:
                await self._report()
            except grpc.aio.AioRpcError:
                continue  # the link tells of it; the counters go on, and so the next report has it all
            except Exception:  # noqa: BLE001 - whatever it is, the host goes on counting
                _log.exception("what went through could not be reported; it is tried again")

    async def _report(self) -> None:
        """Report the counters that have moved; forget those of removed proxies after that."""
        usage, removed = self._credentials.usage(), set(self._removed)
        moved = {each: used for each, used in usage.items() if used != self._reported.get(each, Usage(0, 0, 0))}
        if moved and self._instance:
            request = hosts_pb2.ReportProxyUsageRequest(
                instance=self._instance,
                process=self._process,
                proxies=[
                    hosts_pb2.ProxyTraffic(
                        id=each, bytes_up=used.bytes_up, bytes_down=used.bytes_down, connections=used.connections
                    )
                    for each, used in moved.items()
                ],
            )
            await self._stub.ReportProxyUsage(request, metadata=self._link.metadata, timeout=_SECONDS_TO_ANSWER)
            self._reported |= moved
        for each in removed & self._removed:
            self._credentials.forget(each)
            self._reported.pop(each, None)
            self._removed.discard(each)


async def run(settings: ProxyHostSettings) -> None:
    """Carry proxies until SIGTERM or SIGINT."""
    work = asyncio.create_task(ProxyHost(settings).run())
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, work.cancel)
    with suppress(asyncio.CancelledError):
        await work


def _credential(wanted: hosts_pb2.ProxyCredential) -> Credential:
    return Credential(
        id=wanted.id,
        username=wanted.username,
        salt=wanted.salt,
        password_digest=wanted.password_digest,
        networks=tuple(map(ip_network, wanted.allowed_ips)),
        max_connections=wanted.max_connections,
        bytes_per_second=wanted.bytes_per_second,
        expires_at=wanted.expires_at.ToDatetime(tzinfo=UTC) if wanted.HasField("expires_at") else None,
    )
