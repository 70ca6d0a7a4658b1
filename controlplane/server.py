"""One server process: it listens, works in the background, and stops in order."""

import asyncio
import gc
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import start_http_server
from sqlmodel import col, select

from controlplane.access.interceptor import OPEN_SERVICES
from controlplane.access.uses import FLUSH_EVERY
from controlplane.accounts.model import Account
from controlplane.clock import Clock, SystemClock
from controlplane.databases.engines.engine import Engine
from controlplane.hosts.interceptor import HOST_SERVICES
from controlplane.house import House
from controlplane.migrations import migrate
from controlplane.operator_error import OperatorError
from controlplane.rpc.contract import rpcs
from controlplane.settings import HEALTH_CHECK_EVERY, HEALTH_CHECK_PATIENCE, Settings
from controlplane.tokens.expiry import end_what_is_over

_READY_EVERY = 1.0
_RECORD_EVERY = 1.0
_FORGET_EVERY = 3600.0
_SWEEP_EVERY = 600.0
_GRACE = 10.0
# Asked just before we said that we stop, the edge asks again after the one, and has the answer within the other.
_SECONDS_TO_BE_SEEN = float(HEALTH_CHECK_EVERY + HEALTH_CHECK_PATIENCE)
_METADATA_LIMIT = 64 * 1024
_MESSAGE_LIMIT = 16 * 1024 * 1024  # each RPC has a limit of its own below that
_OPTIONS = [
    ("grpc.so_reuseport", 0),  # a second server on the port is an error, not a partner
    # Above what the edge lets through: what is too long for a credential must reach us to be a 401. gRPC's own answer
    # to long metadata is RESOURCE_EXHAUSTED, which reads as a rate limit.
    ("grpc.max_metadata_size", _METADATA_LIMIT),
    ("grpc.absolute_max_metadata_size", _METADATA_LIMIT),
    ("grpc.max_receive_message_length", _MESSAGE_LIMIT),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5000),  # the edge pings idle connections
]

_log = structlog.get_logger("server")


class Server:
    """One server process: everything behind the Unix socket of the edge and the internal gRPC port."""

    def __init__(
        self, settings: Settings, *, clock: Clock | None = None, engines: Mapping[str, Engine] | None = None
    ) -> None:
        self.house = house = House(settings, clock=clock or SystemClock(), engines=engines)
        self.settings, self.store, self.keys, self.catalog = settings, house.store, house.keys, house.catalog
        self.metrics, self.audit, self.uses, self.reconciler = house.metrics, house.audit, house.uses, house.reconciler
        self._grpc = grpc.aio.server(interceptors=[house.access, house.hosts], options=_OPTIONS)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        house.add_services(self._grpc)
        services = sorted({rpc.service for rpc in rpcs().values()})
        reflection.enable_server_reflection((*services, *HOST_SERVICES, *OPEN_SERVICES[:2]), self._grpc)
        self._services = ("", *services)
        self._background: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Migrate, then listen.

        Raises OperatorError when a port is taken or the catalogue does not fit the accounts.
        """
        await migrate(self.store)
        await self._check_plans()
        self._listen()
        await self._grpc.start()
        self.reconciler.start()
        self._background += [
            asyncio.create_task(self._watch_readiness()),
            asyncio.create_task(_repeat(self.audit.flush, every=_RECORD_EVERY)),
            asyncio.create_task(_repeat(self._look_after_tokens, every=FLUSH_EVERY)),
            asyncio.create_task(_repeat(self.house.feed.forget_old, every=_FORGET_EVERY)),
            asyncio.create_task(_repeat(self.house.sweep.run, every=_SWEEP_EVERY)),
        ]
        if not (self.store.is_sqlite or self.settings.valkey_url):
            _log.warning("rates are counted by this server alone: set HTX_VALKEY_URL if there are several servers")
        _log.info("serving", grpc=f"{self.settings.grpc_host}:{self.settings.grpc_port}")

    def expose_metrics(self) -> None:
        """Serve the Prometheus metrics on their own loopback port, from a thread.

        Raises OperatorError when the port is taken.
        """
        try:
            start_http_server(self.settings.metrics_port, addr="127.0.0.1", registry=self.metrics.registry)
        except OSError as error:
            raise OperatorError(
                f"Port {self.settings.metrics_port} cannot be used ({error.strerror}): set HTX_METRICS_PORT."
            ) from None

    async def stop(self) -> None:
        """Tell the edge to send nothing more, finish what is running, hand leases back, and close."""
        await self._health.enter_graceful_shutdown()
        # Leases go back while requests are still answered: other servers look for due rows every second.
        await asyncio.gather(self._stop_serving(), self.reconciler.stop())
        for task in self._background:
            task.cancel()
        for flush in (self.audit.flush, self.uses.flush):
            await _try(flush)
        await self.house.close()

    async def _stop_serving(self) -> None:
        # What the edge sends until it has seen that we stop is answered; without others there is nowhere else to go,
        # and the sooner we are back, the better.
        if len(self.settings.server_sockets) > 1:
            await asyncio.sleep(_SECONDS_TO_BE_SEEN)
        self.house.pulls.close()
        self.house.function_logs.close()
        self.house.feed.close()  # not before: who waits would come back to us at once, again and again
        await self._grpc.stop(_GRACE)
        await self.house.access.finish()

    def _listen(self) -> None:
        self._add_port(f"{self.settings.grpc_host}:{self.settings.grpc_port}", "HTX_GRPC_PORT")
        path = self.settings.server_socket
        if path not in self.settings.server_sockets:
            raise OperatorError(f"The edge would send nothing to {path}: set HTX_SOCKET to one of HTX_SERVERS.")
        if _is_served(path):
            raise OperatorError(f"Another server listens on {path}: set HTX_SOCKET, or HTX_DATA_DIR.")
        path.parent.mkdir(parents=True, exist_ok=True)
        mask = os.umask(0o117)  # the socket is made here: for its owner and group only
        try:
            self._add_port(f"unix:{path}", "HTX_SOCKET")
        finally:
            os.umask(mask)

    def _add_port(self, address: str, setting: str) -> None:
        try:
            self._grpc.add_insecure_port(address)
        except RuntimeError as error:
            raise OperatorError(f"{address} cannot be used; is another server running? Else set {setting}.") from error

    async def _check_plans(self) -> None:
        """Raise OperatorError if an account has a plan that the catalogue does not."""
        plans = [plan.name for plan in self.catalog.plans]
        rows = await self.store.fetch(select(Account.plan).where(col(Account.plan).not_in(plans)).distinct())
        if rows:
            missing = ", ".join(row.plan for row in rows)
            raise OperatorError(f"There are accounts with plans that the catalogue lacks: {missing}. Put them back.")

    async def _look_after_tokens(self) -> None:
        await self.uses.flush()  # first: an old secret that was used just now does not end early
        await end_what_is_over(self.store, self.house.clock)

    async def _watch_readiness(self) -> None:
        """Keep the health service true: we are ready for as long as our database answers."""
        while True:
            try:
                await self.store.check()
                status = health_pb2.HealthCheckResponse.SERVING
            except Exception as error:  # noqa: BLE001 - whatever it is, we are not ready
                _log.error("not ready: the control plane's database does not answer", error=str(error))
                status = health_pb2.HealthCheckResponse.NOT_SERVING
            for service in self._services:
                await self._health.set(service, status)
            await asyncio.sleep(_READY_EVERY)


def _is_served(path: Path) -> bool:
    """Tell whether somebody listens on a Unix socket, which gRPC would take away without asking."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


async def _repeat(work: Callable[[], Awaitable[None]], *, every: float) -> None:
    """Do something now and then, in so many seconds; a failure is logged and it is tried again."""
    while True:
        await asyncio.sleep(every)
        await _try(work)


async def _try(work: Callable[[], Awaitable[None]]) -> None:
    try:
        await work()
    except Exception:  # noqa: BLE001 - whatever it is, the server goes on
        _log.exception("work in the background failed")


async def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then stop in order."""
    server = Server(settings)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        server.expose_metrics()  # first: a port that is taken ends the start before anybody was served
        await server.start()
        gc.collect()
        gc.freeze()  # what is there now stays: not to be gone through again and again, which stops all for 70 ms
        await stop.wait()
    finally:
        await server.stop()
