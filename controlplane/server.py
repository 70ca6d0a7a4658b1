"""The only place where the house is put together: the resources, what they need, and the gRPC server around them."""

import asyncio
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from pathlib import Path

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import start_http_server
from sqlmodel import col, select

from controlplane.access.credentials import Credentials
from controlplane.access.interceptor import OPEN_SERVICES, AccessInterceptor
from controlplane.access.rate import Limiter, LocalLimiter
from controlplane.access.uses import FLUSH_EVERY, Uses
from controlplane.accounts.model import Account
from controlplane.accounts.passwords import Passwords
from controlplane.accounts.service import AccountService
from controlplane.api.v1 import (
    accounts_pb2_grpc,
    audit_pb2_grpc,
    backups_pb2_grpc,
    catalog_pb2_grpc,
    databases_pb2_grpc,
    events_pb2_grpc,
    functions_pb2_grpc,
    openapi_pb2_grpc,
    proxies_pb2_grpc,
    sessions_pb2_grpc,
    tokens_pb2_grpc,
)
from controlplane.audit.log import AuditLog
from controlplane.audit.service import AuditService
from controlplane.backups.provisioner import BackupProvisioner
from controlplane.backups.service import BackupService
from controlplane.backups.storage import BackupStorage, storage_at
from controlplane.backups.vault import Vault
from controlplane.catalog.model import Catalog, CatalogError
from controlplane.catalog.service import CatalogService
from controlplane.clock import Clock, SystemClock
from controlplane.databases.clusters import open_clusters
from controlplane.databases.engines.engine import Engine
from controlplane.databases.orders import DatabaseOrders
from controlplane.databases.provisioner import DatabaseProvisioner
from controlplane.databases.service import DatabaseService
from controlplane.databases.sweep import Sweep
from controlplane.events.feed import Feed
from controlplane.events.service import EventService
from controlplane.functions.service import FunctionService
from controlplane.keys import Keys
from controlplane.migrations import migrate
from controlplane.observe.metrics import Metrics, new_metrics
from controlplane.observe.traces import Traces
from controlplane.openapi.service import OpenApiService
from controlplane.proxies.service import ProxyService
from controlplane.reconcile import Reconciler
from controlplane.rpc.contract import rpcs
from controlplane.rpc.idempotency import Idempotency
from controlplane.sessions.oidc import OidcLogin
from controlplane.sessions.service import SessionService
from controlplane.sessions.throttle import LoginThrottle
from controlplane.settings import HEALTH_CHECK_EVERY, HEALTH_CHECK_PATIENCE, Settings
from controlplane.sql import Store
from controlplane.tokens.expiry import end_what_is_over
from controlplane.tokens.service import TokenService

_READY_EVERY = 1.0
_RECORD_EVERY = 1.0
_FORGET_EVERY = 3600.0
_SWEEP_EVERY = 600.0
_GRACE = 10.0
# Asked just before we said that we stop, the edge asks again after the one, and has the answer within the other.
_SECONDS_TO_BE_SEEN = float(HEALTH_CHECK_EVERY + HEALTH_CHECK_PATIENCE)
_METADATA_LIMIT = 64 * 1024
_OPTIONS = [
    ("grpc.so_reuseport", 0),  # a second server on the port is an error, not a partner
    # Above what the edge lets through: what is too long for a credential must reach us to be a 401. gRPC's own answer
    # to long metadata is RESOURCE_EXHAUSTED, which reads as a rate limit.
    ("grpc.max_metadata_size", _METADATA_LIMIT),
    ("grpc.absolute_max_metadata_size", _METADATA_LIMIT),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5000),  # the edge pings idle connections
]

_log = structlog.get_logger("server")


class StartError(Exception):
    """The server cannot start; the message says why and what to do."""


class Server:
    """One server process: everything behind the Unix socket of the edge and the internal gRPC port."""

    def __init__(
        self, settings: Settings, *, clock: Clock | None = None, engines: Mapping[str, Engine] | None = None
    ) -> None:
        clock = clock or SystemClock()
        self.settings = settings
        catalog = Catalog.load(settings.catalog)
        engines = _open_clusters(catalog, settings) if engines is None else engines
        self.catalog = catalog.with_clusters(engines)
        self.keys = Keys.load(settings.keys_path)
        self.store = Store(settings.storage_url)
        self.metrics = new_metrics()
        self._traces = Traces()
        store, catalog, keys = self.store, self.catalog, self.keys
        storage = _open_storage(settings)
        vault = Vault(keys=keys, storage=storage)
        orders = DatabaseOrders(store=store, catalog=catalog, keys=keys, clock=clock)
        self._clock = clock
        self.audit = AuditLog(store=store, keys=keys, clock=clock)
        self.uses = Uses(store=store, clock=clock)
        self._feed = Feed(store=store, clock=clock)
        self._limiter = _limiter(settings, clock, self.metrics)
        self.reconciler = Reconciler(
            store=store,
            clock=clock,
            feed=self._feed,
            metrics=self.metrics,
            provisioners=(
                DatabaseProvisioner(
                    store=store,
                    clock=clock,
                    catalog=catalog,
                    keys=keys,
                    engines=engines,
                    vault=vault,
                    feed=self._feed,
                    look_every=timedelta(seconds=settings.look_every),
                ),
                BackupProvisioner(
                    store=store,
                    clock=clock,
                    catalog=catalog,
                    engines=engines,
                    vault=vault,
                    verify_after=timedelta(seconds=settings.verify_after),
                ),
            ),
        )
        self._sweep = Sweep(
            store=store,
            clock=clock,
            engines=engines,
            storage=storage,
            metrics=self.metrics,
            grace=timedelta(seconds=settings.orphan_grace),
        )
        wake = self.reconciler.wake
        self._access = AccessInterceptor(
            rpcs=rpcs(),
            store=store,
            clock=clock,
            credentials=Credentials(store=store, keys=keys, catalog=catalog),
            limiter=self._limiter,
            uses=self.uses,
            audit=self.audit,
            feed=self._feed,
            idempotency=Idempotency(keys=keys, clock=clock),
            metrics=self.metrics,
            traces=self._traces,
            max_body_bytes=settings.max_body_bytes,
            anonymous_rate_limit=settings.anonymous_rate_limit,
        )
        self._grpc = grpc.aio.server(interceptors=[self._access], options=_OPTIONS)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        # The resources. A new one is a line here.
        databases_pb2_grpc.add_DatabaseServiceServicer_to_server(
            DatabaseService(
                store=store, catalog=catalog, keys=keys, clock=clock, engines=engines, orders=orders, wake=wake
            ),
            self._grpc,
        )
        backups_pb2_grpc.add_BackupServiceServicer_to_server(
            BackupService(store=store, catalog=catalog, clock=clock, orders=orders, wake=wake), self._grpc
        )
        functions_pb2_grpc.add_FunctionServiceServicer_to_server(FunctionService(), self._grpc)
        proxies_pb2_grpc.add_ProxyServiceServicer_to_server(ProxyService(), self._grpc)
        tokens_pb2_grpc.add_TokenServiceServicer_to_server(
            TokenService(store=store, catalog=catalog, keys=keys, clock=clock), self._grpc
        )
        self._oidc = _oidc(settings, keys, clock)
        passwords = Passwords()
        throttle = LoginThrottle(limiter=self._limiter, keys=keys, failed_login_limit=settings.failed_login_limit)
        sessions_pb2_grpc.add_SessionServiceServicer_to_server(
            SessionService(
                store=store, keys=keys, clock=clock, passwords=passwords, throttle=throttle, oidc=self._oidc
            ),
            self._grpc,
        )
        accounts_pb2_grpc.add_AccountServiceServicer_to_server(
            AccountService(
                store=store, catalog=catalog, keys=keys, clock=clock, passwords=passwords, throttle=throttle
            ),
            self._grpc,
        )
        audit_pb2_grpc.add_AuditServiceServicer_to_server(AuditService(store=store), self._grpc)
        events_pb2_grpc.add_EventServiceServicer_to_server(EventService(feed=self._feed), self._grpc)
        catalog_pb2_grpc.add_CatalogServiceServicer_to_server(CatalogService(catalog=catalog), self._grpc)
        openapi_pb2_grpc.add_OpenApiServiceServicer_to_server(OpenApiService(), self._grpc)
        services = sorted({rpc.service for rpc in rpcs().values()})
        reflection.enable_server_reflection((*services, *OPEN_SERVICES[:2]), self._grpc)
        self._services = ("", *services)
        self._background: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Migrate, then listen.

        Raises StartError when a port is taken or the catalogue does not fit the accounts.
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
            asyncio.create_task(_repeat(self._feed.forget_old, every=_FORGET_EVERY)),
            asyncio.create_task(_repeat(self._sweep.run, every=_SWEEP_EVERY)),
        ]
        if not (self.store.is_sqlite or self.settings.valkey_url):
            _log.warning("rates are counted by this server alone: set HTX_VALKEY_URL if there are several servers")
        _log.info("serving", grpc=f"{self.settings.grpc_host}:{self.settings.grpc_port}")

    def expose_metrics(self) -> None:
        """Serve the Prometheus metrics on their own loopback port, from a thread.

        Raises StartError when the port is taken.
        """
        try:
            start_http_server(self.settings.metrics_port, addr="127.0.0.1", registry=self.metrics.registry)
        except OSError as error:
            raise StartError(
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
        if self._oidc is not None:
            await self._oidc.close()
        await self._limiter.close()
        await self.store.close()
        self._traces.close()

    async def _stop_serving(self) -> None:
        # What the edge sends until it has seen that we stop is answered; without others there is nowhere else to go,
        # and the sooner we are back, the better.
        if len(self.settings.server_sockets) > 1:
            await asyncio.sleep(_SECONDS_TO_BE_SEEN)
        self._feed.close()  # not before: who waits would come back to us at once, again and again
        await self._grpc.stop(_GRACE)
        await self._access.finish()

    def _listen(self) -> None:
        self._add_port(f"{self.settings.grpc_host}:{self.settings.grpc_port}", "HTX_GRPC_PORT")
        path = self.settings.server_socket
        if path not in self.settings.server_sockets:
            raise StartError(f"The edge would send nothing to {path}: set HTX_SOCKET to one of HTX_SERVERS.")
        if _is_served(path):
            raise StartError(f"Another server listens on {path}: set HTX_SOCKET, or HTX_DATA_DIR.")
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
            raise StartError(f"{address} cannot be used; is another server running? Else set {setting}.") from error

    async def _check_plans(self) -> None:
        """Raise StartError if an account has a plan that the catalogue does not."""
        plans = [plan.name for plan in self.catalog.plans]
        rows = await self.store.fetch(select(Account.plan).where(col(Account.plan).not_in(plans)).distinct())
        if rows:
            missing = ", ".join(row.plan for row in rows)
            raise StartError(f"There are accounts with plans that the catalogue lacks: {missing}. Put them back.")

    async def _look_after_tokens(self) -> None:
        await self.uses.flush()  # first: an old secret that was used just now does not end early
        await end_what_is_over(self.store, self._clock)

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


def _limiter(settings: Settings, clock: Clock, metrics: Metrics) -> Limiter:
    """Return what counts requests: with others in Valkey, or for this process alone.

    Raises StartError for a URL that is none.
    """
    if not settings.valkey_url:
        return LocalLimiter(clock)
    from controlplane.access.valkey import ValkeyLimiter  # noqa: PLC0415 - its library takes memory that few need

    try:
        return ValkeyLimiter(settings.valkey_url, clock=clock, metrics=metrics)
    except ValueError as error:
        raise StartError(f"HTX_VALKEY_URL: {error}") from None


def _oidc(settings: Settings, keys: Keys, clock: Clock) -> OidcLogin | None:
    """Return the provider's own login, if there is one.

    Raises StartError for an issuer that cannot be trusted.
    """
    if not settings.oidc_issuer:
        return None
    try:
        return OidcLogin(
            issuer=settings.oidc_issuer,
            client_id=settings.oidc_client_id,
            client_secret=settings.oidc_client_secret,
            redirect_uri=f"{settings.public_url.rstrip('/')}/api/portal/session/oidc/callback",
            keys=keys,
            clock=clock,
        )
    except ValueError as error:
        raise StartError(f"HTX_OIDC_ISSUER: {error}") from None


def _open_clusters(catalog: Catalog, settings: Settings) -> dict[str, Engine]:
    try:
        return open_clusters(catalog, settings)
    except CatalogError as error:
        raise StartError(str(error)) from None


def _open_storage(settings: Settings) -> BackupStorage:
    try:
        return storage_at(
            settings.backup_storage_url,
            access_key=settings.backup_access_key,
            secret_key=settings.backup_secret_key,
        )
    except ValueError as error:
        raise StartError(str(error)) from None


async def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then stop in order."""
    server = Server(settings)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        server.expose_metrics()  # first: a port that is taken ends the start before anybody was served
        await server.start()
        await stop.wait()
    finally:
        await server.stop()
