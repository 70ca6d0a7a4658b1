"""The door of the hosts: their services are for them alone, and each host is told by its secret."""

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import grpc
from sqlmodel import col, select

from controlplane.access.secrets import is_well_formed_host_secret
from controlplane.api.hosts.v1 import hosts_pb2
from controlplane.hosts.kinds import FUNCTIONS, PROXIES
from controlplane.hosts.model import Host
from controlplane.keys import Keys
from controlplane.sql import Remembered, Store

_KINDS = {"ProxyHostService": PROXIES, "FunctionHostService": FUNCTIONS}
# By their full names. A service of the file that is for no kind of host stops the start.
HOST_SERVICES = {service.full_name: _KINDS[name] for name, service in hosts_pb2.DESCRIPTOR.services_by_name.items()}
_SCHEME = "bearer "
_MOST_BYTES = 8 * 1024 * 1024
_REMEMBERED = 1000

_host: ContextVar[Host] = ContextVar("host")


def current_host() -> Host:
    """Return the host whose RPC is being answered, as it was when the RPC came."""
    return _host.get()


class HostInterceptor(grpc.aio.ServerInterceptor):
    """Lets a host into the service of its kind, and nobody else into any of them."""

    def __init__(self, *, store: Store, keys: Keys) -> None:
        self._store = store
        self._keys = keys
        self._remembered = Remembered[Host](store, most=_REMEMBERED)
        self._doors: dict[str, Any] = {}

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        """Return the door of the RPC, made once per method."""
        path: str = handler_call_details.method
        kind = HOST_SERVICES.get(path.strip("/").partition("/")[0])
        if kind is None:
            return await continuation(handler_call_details)
        if path not in self._doors:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None
            self._doors[path] = self._door(handler, kind)
        return self._doors[path]

    def _door(self, handler: Any, kind: str) -> Any:
        async def door(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            host = await self._identify(dict(context.invocation_metadata() or ()))
            if host is None:
                await context.abort(grpc.StatusCode.UNAUTHENTICATED, "No host has this secret.")
            elif host.kind != kind:
                await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"The host '{host.name}' is one of {host.kind}.")
            else:
                _host.set(host)
            return await handler.unary_unary(request, context)

        return grpc.unary_unary_rpc_method_handler(door, handler.request_deserializer, handler.response_serializer)

    async def _identify(self, metadata: dict[str, Any]) -> Host | None:
        authorization = str(metadata.get("authorization", ""))
        secret = authorization[len(_SCHEME) :]
        if not authorization.lower().startswith(_SCHEME) or not is_well_formed_host_secret(secret):
            return None
        return await self._remembered.get(secret, lambda: self._find(secret))

    async def _find(self, secret: str) -> Host | None:
        rows = await self._store.fetch(select(Host).where(col(Host.secret_digest).in_(self._keys.digests(secret))))
        return rows[0] if rows else None
