"""Where the house is put together: the resources, what they need, and the gRPC services around them."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import grpc

from controlplane.access.admission import Admission
from controlplane.access.credentials import Credentials
from controlplane.access.interceptor import AccessInterceptor
from controlplane.access.rate import Limiter, LocalLimiter
from controlplane.access.uses import Uses
from controlplane.accounts.passwords import Passwords
from controlplane.accounts.service import AccountService
from controlplane.api.hosts.v1 import hosts_pb2_grpc
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
from controlplane.catalog.model import Catalog
from controlplane.catalog.service import CatalogService
from controlplane.clock import Clock
from controlplane.databases.clusters import open_clusters
from controlplane.databases.engines.engine import Engine
from controlplane.databases.orders import DatabaseOrders
from controlplane.databases.provisioner import DatabaseProvisioner
from controlplane.databases.service import DatabaseService
from controlplane.databases.sweep import Sweep
from controlplane.events.feed import Feed
from controlplane.events.service import EventService
from controlplane.functions.host_service import FunctionHostService
from controlplane.functions.invocations import Invocations
from controlplane.functions.logs import FunctionLogs
from controlplane.functions.orders import FunctionOrders
from controlplane.functions.provisioner import FunctionProvisioner
from controlplane.functions.service import FunctionService
from controlplane.functions.versions import Versions
from controlplane.hosts.interceptor import HostInterceptor
from controlplane.hosts.pulls import Pulls
from controlplane.keys import Keys
from controlplane.observe.metrics import Metrics, new_metrics
from controlplane.observe.traces import Traces
from controlplane.openapi.service import OpenApiService
from controlplane.operator_error import OperatorError
from controlplane.proxies.host_service import ProxyHostService
from controlplane.proxies.provisioner import ProxyProvisioner
from controlplane.proxies.service import ProxyService
from controlplane.reconcile.loop import Reconciler
from controlplane.reconcile.step import Provisioner
from controlplane.rpc.contract import rpcs
from controlplane.rpc.idempotency import Idempotency
from controlplane.sessions.oidc import OidcLogin
from controlplane.sessions.service import SessionService
from controlplane.sessions.throttle import LoginThrottle
from controlplane.settings import Settings
from controlplane.sql import Store
from controlplane.tokens.service import TokenService


class House:
    """Everything that one server process has, put together and not yet running."""

    def __init__(self, settings: Settings, *, clock: Clock, engines: Mapping[str, Engine] | None) -> None:
        """Read what must be readable. Raises OperatorError for what is not."""
        catalog = Catalog.load(settings.catalog)
        self.engines = open_clusters(catalog, settings) if engines is None else engines
        self.settings = settings
        self.clock = clock
        self.catalog = catalog.with_clusters(self.engines)
        self.keys = Keys.load(settings.keys_path)
        self.store = Store(settings.storage_url)
        self.metrics = new_metrics()
        self.traces = Traces()
        self.storage = open_storage(settings)
        self.audit = AuditLog(store=self.store, keys=self.keys, clock=clock)
        self.uses = Uses(store=self.store, clock=clock)
        self.feed = Feed(store=self.store, clock=clock)
        self.limiter = _limiter(settings, clock, self.metrics)
        self.oidc = _oidc(settings, self.keys, clock)
        self.admission = Admission(
            credentials=Credentials(store=self.store, keys=self.keys, catalog=self.catalog),
            limiter=self.limiter,
            uses=self.uses,
            clock=clock,
            anonymous_rate_limit=settings.anonymous_rate_limit,
        )
        self.reconciler = Reconciler(
            store=self.store, clock=clock, feed=self.feed, metrics=self.metrics, provisioners=self._provisioners()
        )
        self.sweep = Sweep(
            store=self.store,
            clock=clock,
            engines=self.engines,
            storage=self.storage,
            metrics=self.metrics,
            grace=timedelta(seconds=settings.orphan_grace),
        )
        self.pulls = Pulls(store=self.store, clock=clock, wake=self.reconciler.wake)
        self.function_logs = FunctionLogs(store=self.store)
        self.invocations = Invocations(store=self.store, clock=clock, keys=self.keys)
        self.access = AccessInterceptor(
            rpcs=rpcs(),
            store=self.store,
            admission=self.admission,
            uses=self.uses,
            audit=self.audit,
            feed=self.feed,
            idempotency=Idempotency(keys=self.keys, clock=clock),
            metrics=self.metrics,
            traces=self.traces,
            max_body_bytes=settings.max_body_bytes,
        )
        self.hosts = HostInterceptor(store=self.store, keys=self.keys)

    def add_services(self, server: grpc.aio.Server) -> None:
        """Give the server all services. Those of a new resource are added here."""
        self._add_databases(server)
        self._add_functions(server)
        self._add_proxies(server)
        self._add_people(server)
        audit_pb2_grpc.add_AuditServiceServicer_to_server(AuditService(store=self.store), server)
        events_pb2_grpc.add_EventServiceServicer_to_server(EventService(feed=self.feed), server)
        catalog_pb2_grpc.add_CatalogServiceServicer_to_server(
            CatalogService(catalog=self.catalog, store=self.store, clock=self.clock), server
        )
        openapi_pb2_grpc.add_OpenApiServiceServicer_to_server(OpenApiService(), server)

    async def close(self) -> None:
        """Close every connection."""
        if self.oidc is not None:
            await self.oidc.close()
        await self.invocations.close()
        await self.limiter.close()
        await self.store.close()
        self.traces.close()

    def _provisioners(self) -> tuple[Provisioner[Any], ...]:
        store, clock, catalog, settings = self.store, self.clock, self.catalog, self.settings
        vault = Vault(keys=self.keys, storage=self.storage)
        return (
            DatabaseProvisioner(
                store=store,
                clock=clock,
                catalog=catalog,
                keys=self.keys,
                engines=self.engines,
                vault=vault,
                feed=self.feed,
                look_every=timedelta(seconds=settings.look_every),
            ),
            BackupProvisioner(
                store=store,
                clock=clock,
                catalog=catalog,
                engines=self.engines,
                vault=vault,
                verify_after=timedelta(seconds=settings.verify_after),
            ),
            FunctionProvisioner(store=store, clock=clock),
            ProxyProvisioner(store=store, clock=clock),
        )

    def _add_databases(self, server: grpc.aio.Server) -> None:
        store, clock, catalog, reconciler = self.store, self.clock, self.catalog, self.reconciler
        orders = DatabaseOrders(store=store, catalog=catalog, keys=self.keys, clock=clock)
        databases_pb2_grpc.add_DatabaseServiceServicer_to_server(
            DatabaseService(
                store=store,
                catalog=catalog,
                keys=self.keys,
                clock=clock,
                engines=self.engines,
                orders=orders,
                reconciler=reconciler,
            ),
            server,
        )
        backups_pb2_grpc.add_BackupServiceServicer_to_server(
            BackupService(store=store, catalog=catalog, clock=clock, orders=orders, reconciler=reconciler), server
        )

    def _add_functions(self, server: grpc.aio.Server) -> None:
        store, clock, reconciler = self.store, self.clock, self.reconciler
        versions = Versions(keys=self.keys, clock=clock)
        functions_pb2_grpc.add_FunctionServiceServicer_to_server(
            FunctionService(
                store=store,
                clock=clock,
                orders=FunctionOrders(store=store, catalog=self.catalog, versions=versions, clock=clock),
                function_logs=self.function_logs,
                invocations=self.invocations,
                pulls=self.pulls,
                reconciler=reconciler,
            ),
            server,
        )
        hosts_pb2_grpc.add_FunctionHostServiceServicer_to_server(
            FunctionHostService(
                store=store,
                catalog=self.catalog,
                clock=clock,
                keys=self.keys,
                admission=self.admission,
                uses=self.uses,
                versions=versions,
                function_logs=self.function_logs,
                feed=self.feed,
                pulls=self.pulls,
                wake=reconciler.wake,
            ),
            server,
        )

    def _add_proxies(self, server: grpc.aio.Server) -> None:
        store, clock, catalog, reconciler = self.store, self.clock, self.catalog, self.reconciler
        proxies_pb2_grpc.add_ProxyServiceServicer_to_server(
            ProxyService(store=store, catalog=catalog, clock=clock, pulls=self.pulls, reconciler=reconciler), server
        )
        hosts_pb2_grpc.add_ProxyHostServiceServicer_to_server(
            ProxyHostService(store=store, catalog=catalog, clock=clock, pulls=self.pulls), server
        )

    def _add_people(self, server: grpc.aio.Server) -> None:
        """Add accounts, logins and tokens."""
        store, clock, catalog, keys = self.store, self.clock, self.catalog, self.keys
        passwords = Passwords()
        throttle = LoginThrottle(limiter=self.limiter, keys=keys, failed_login_limit=self.settings.failed_login_limit)
        tokens_pb2_grpc.add_TokenServiceServicer_to_server(
            TokenService(store=store, catalog=catalog, keys=keys, clock=clock), server
        )
        sessions_pb2_grpc.add_SessionServiceServicer_to_server(
            SessionService(store=store, keys=keys, clock=clock, passwords=passwords, throttle=throttle, oidc=self.oidc),
            server,
        )
        accounts_pb2_grpc.add_AccountServiceServicer_to_server(
            AccountService(
                store=store, catalog=catalog, keys=keys, clock=clock, passwords=passwords, throttle=throttle
            ),
            server,
        )


def _limiter(settings: Settings, clock: Clock, metrics: Metrics) -> Limiter:
    """Return what counts requests: with others in Valkey, or for this process alone.

    Raises OperatorError for a URL that is none.
    """
    if not settings.valkey_url:
        return LocalLimiter(clock)
    from controlplane.access.valkey import ValkeyLimiter  # noqa: PLC0415 - its library takes memory that few need

    try:
        return ValkeyLimiter(settings.valkey_url, clock=clock, metrics=metrics)
    except ValueError as error:
        raise OperatorError(f"HTX_VALKEY_URL: {error}") from None


def _oidc(settings: Settings, keys: Keys, clock: Clock) -> OidcLogin | None:
    """Return the provider's own login, if there is one.

    Raises OperatorError for an issuer that cannot be trusted.
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
        raise OperatorError(f"HTX_OIDC_ISSUER: {error}") from None


def open_storage(settings: Settings) -> BackupStorage:
    """Return the storage of backups.

    Raises OperatorError for a URL that is none.
    """
    try:
        return storage_at(
            settings.backup_storage_url,
            access_key=settings.backup_access_key,
            secret_key=settings.backup_secret_key,
        )
    except ValueError as error:
        raise OperatorError(str(error)) from None
